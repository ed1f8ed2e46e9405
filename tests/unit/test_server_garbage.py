"""Whatever comes to the socket gets an answer that a runtime can read, harms nobody, and leaves nothing open."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import message, spec
from cni.listener import Listener
from cni.server import Server, Settings
from cni.spec import Call

EXAMPLES = int(os.environ.get("UNDERLAY_EXAMPLES", "100"))
CODES = {spec.INCOMPATIBLE_VERSION, spec.INVALID_ENVIRONMENT, spec.UNDECODABLE, spec.INVALID_CONFIG}
DONE = b'{"done":1}'

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may call")

VARIABLES = {
    "CNI_COMMAND": st.sampled_from([*spec.COMMANDS, "EXPLODE", ""]),
    "CNI_CONTAINERID": st.sampled_from(["c1", "", "a/b", "x" * 300]) | st.text(max_size=8),
    "CNI_IFNAME": st.sampled_from(["eth0", "", "..", "a" * 16]) | st.text(max_size=8),
    "CNI_NETNS": st.sampled_from(["/proc/self/ns/net", "", "/etc/passwd"]),
    "CNI_ARGS": st.sampled_from(["", "IgnoreUnknown=1;A=1", "A=1", ";;=;", "IP=x", "MAC=y"]) | st.text(max_size=20),
    "UNDERLAY_ASKED": st.sampled_from(["", "1", "-1", "x", "9" * 40, "1e3", "\u0663"]),
}
ENVIRONMENTS = st.fixed_dictionaries({}, optional=VARIABLES)
KEYS = st.sampled_from(
    ["cniVersion", "name", "type", "mtu", "runtimeConfig", "prevResult", "cni.dev/valid-attachments"]
)
VALUES = st.none() | st.integers() | st.text(max_size=9) | st.just([]) | st.just({}) | st.just({"ips": ["x"], "mac": 7})
CONFIGS = st.dictionaries(KEYS, VALUES, max_size=4).map(
    lambda more: json.dumps({"cniVersion": "1.1.0", "name": "underlay", "type": "underlay", **more}).encode()
) | st.binary(max_size=60)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request as a shim makes it, or one that was damaged on the way."""
    pairs = [f"{k}={v}".encode(errors="replace").replace(b"\0", b"") + b"\0" for k, v in draw(ENVIRONMENTS).items()]
    environment, config = b"".join(pairs), draw(CONFIGS)
    whole = bytearray(message.REQUEST.pack(b"ULC1", len(environment), len(config)) + environment + config)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(whole) - 1)) if whole else 0
        match draw(st.sampled_from(["change", "cut", "more", "none"])):
            case "change" if whole:
                whole[at] = draw(st.integers(0, 255))
            case "cut":
                del whole[at:]
            case "more":
                whole[at:at] = draw(st.binary(max_size=9))
    return bytes(whole)


CALLS = st.lists(st.tuples(requests(), st.integers(0, 3), st.integers(1, 400)), min_size=1, max_size=6)


async def ask(path: Path, data: bytes, descriptors: int, piece: int) -> bytes:
    """Sends it in pieces, the descriptors with the first; what is answered until the server closes."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as connection, socket.socket(socket.AF_UNIX) as file:
        connection.setblocking(False)
        await loop.sock_connect(connection, str(path))
        try:
            if data:
                socket.send_fds(connection, [data[:piece]], [file.fileno()] * descriptors)
            for start in range(piece, len(data), piece):
                await asyncio.sleep(0)
                await loop.sock_sendall(connection, data[start : start + piece])
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all was said: the answer is there
        found = b""
        while True:
            try:
                chunk = await loop.sock_recv(connection, 1 << 16)
            except ConnectionResetError:
                continue  # it is told once, before what is there to be read
            if not chunk:
                return found
            found += chunk


def descriptors_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@settings(max_examples=EXAMPLES)
@given(CALLS)
def test_whatever_comes_is_answered(calls: list[tuple[bytes, int, int]]) -> None:
    async def carry_out(call: Call, pod_ns: int | None) -> bytes:
        assert call.command in spec.COMMANDS
        assert call.config.version in spec.VERSIONS
        return DONE

    async def main(folder: Path) -> list[bytes]:
        server = Server(listener=Listener(folder), carry_out=carry_out, settings=Settings())
        serving = asyncio.create_task(server.run())
        while not (folder / "cni.sock").exists():  # noqa: ASYNC110 - it polls what another does
            await asyncio.sleep(0)
        answers = await asyncio.gather(*(ask(folder / "cni.sock", *call) for call in calls))
        assert not serving.done()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return answers

    before = descriptors_open()
    with tempfile.TemporaryDirectory() as folder:
        answers = asyncio.run(asyncio.wait_for(main(Path(folder)), 60))
    assert descriptors_open() == before
    for answer in answers:
        magic, code, length = message.ANSWER.unpack(answer[: message.ANSWER.size])
        text = answer[message.ANSWER.size :]
        assert (magic, length) == (message.ANSWER_MAGIC, len(text))
        if code:
            body = json.loads(text)
            assert body["code"] in CODES
            assert body["cniVersion"] in spec.VERSIONS
            assert body["msg"]
        else:
            assert text == DONE
