"""The shims alone: one program for each machine, and all of them behave the same, whatever they are given."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni import install, message, netns
from cni.queue import Queue
from store.clock import SystemClock
from tests.conftest import build_shim, eventually

EXAMPLES = int(os.environ.get("UNDERLAY_EXAMPLES", "20"))
CONF = b'{"cniVersion": "0.4.0", "name": "underlay", "type": "underlay"}'
DEL = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}


@pytest.fixture(scope="session")
def shim_arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shim.c for arm64, behind an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
    if not compiler or not emulator:
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user-static")
    folder = tmp_path_factory.mktemp("shim")
    program = build_shim(compiler, folder / "underlay-arm64")
    wrapper = folder / "underlay"
    wrapper.write_text(f"#!/bin/sh\nexec {emulator} {program}\n")
    wrapper.chmod(0o755)
    return wrapper


@pytest.fixture(params=["c", "py", "arm64"])
def shim(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"shim_{request.param}")
    return found


@pytest.fixture
def shims(request: pytest.FixtureRequest, shim_c: Path, shim_py: Path) -> list[Path]:
    """All that can be had here."""
    found = [shim_c, shim_py]
    if shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64-static"):
        found.append(request.getfixturevalue("shim_arm64"))
    return found


class Recorder:
    """Answers every request with the same bytes and keeps what came: request and inode of its descriptor."""

    def __init__(self, run: Path, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[tuple[bytes, int]] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(run / "cni.sock"))
        self.listener.listen(8)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                data, descriptors, _, _ = socket.recv_fds(connection, 1 << 21, 4)
                while len(data) >= 12 and len(data) < 12 + sum(struct.unpack_from("<II", data, 4)):
                    chunk = connection.recv(1 << 21)
                    if not chunk:
                        break
                    data += chunk
                self.requests.append((data, os.fstat(descriptors[0]).st_ino if descriptors else 0))
                for fd in descriptors:
                    os.close(fd)
                if data == b"end":
                    return
                with suppress(BrokenPipeError):  # too long: the shim has seen that in its head
                    connection.sendall(self.answer)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self.listener.getsockname())
            last.sendall(b"end")
            self.thread.join(10)
        self.listener.close()


@contextmanager
def recording(answer: bytes) -> Iterator[tuple[Path, Recorder]]:
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder), answer)
        try:
            yield Path(folder), recorder
        finally:
            recorder.close()


def execute(shim: Path, run: Path | bytes, environment: dict[Any, Any], text: bytes) -> tuple[int, bytes]:
    env = {b"PATH": os.environb[b"PATH"], b"UNDERLAY_RUN": os.fsencode(run)}
    env |= {os.fsencode(k): os.fsencode(v) for k, v in environment.items()}
    done = subprocess.run([shim], env=env, input=text, capture_output=True, timeout=60, check=False)
    assert done.stderr == b"", done.stderr
    return done.returncode, done.stdout


def outcome(code: int, printed: bytes) -> tuple[int, object]:
    """JSON may be written in more than one way."""
    try:
        return code, json.loads(printed)
    except ValueError:
        return code, printed


def test_it_is_small_static_and_for_its_machine(shim_c: Path, tmp_path: Path) -> None:
    programs = {62: shim_c}
    if cross := shutil.which("aarch64-linux-gnu-gcc"):
        programs[183] = build_shim(cross, tmp_path / "underlay")
    for machine, program in programs.items():
        data = program.read_bytes()
        assert len(data) < 100_000
        kind, found = struct.unpack_from("<HH", data, 16)
        assert (kind, found) == (2, machine)  # ET_EXEC; EM_X86_64, EM_AARCH64
        start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
        assert 3 not in {struct.unpack_from("<I", data, start + i * size)[0] for i in range(count)}  # PT_INTERP


# -- the same, whatever it is given ----------------------------------------------------------------------------------

NAMES = st.sampled_from([b"CNI_ARGS", b"CNI_IFNAME", b"CNI_NETNS", b"CNI_PATH", b"CNI_", b"CNI", b"XCNI_A", b"cni_x"])
VALUES = st.binary(max_size=40).map(lambda b: b.replace(b"\0", b"="))
ENVIRONMENTS = st.dictionaries(NAMES, VALUES, max_size=5)
COMMANDS = st.sampled_from([b"ADD", b"DEL", b"CHECK", b"GC", b"STATUS", b"VERSION", b"", b"DELE", b"D"])
VERSIONED = st.sampled_from(
    [b'{"cniVersion": "0.4.0"}', b'"cniVersion":1,"cniVersion" : "1.0.0"', b'"cniVersion":"1.0']
)
TEXTS = st.binary(max_size=200) | VERSIONED
ANSWERS = st.builds(message.encode_answer, st.integers(0, 300), st.binary(max_size=300))


def told(shim: Path, answer: bytes, environment: dict[bytes, bytes], text: bytes) -> tuple[object, ...]:
    """What comes of a call where a server gives this answer: what is printed, and what the server heard."""
    with recording(answer) as (run, recorder):
        result = outcome(*execute(shim, run, environment, text))
        heard = recorder.requests[:]
    plain = []
    for data, inode in heard:
        length = struct.unpack_from("<I", data, 4)[0]
        # The emulator turns the order of the variables round.
        variables = dict(pair.split(b"=", 1) for pair in data[12 : 12 + length].split(b"\0") if pair)
        began = int(variables.pop(b"UNDERLAY_ASKED"))
        assert 0 <= time.monotonic_ns() - began < 60e9
        plain.append((data[:4], data[8:12], variables, data[12 + length :], inode))
    return result, plain


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=COMMANDS, environment=ENVIRONMENTS, text=TEXTS, answer=ANSWERS)
def test_every_shim_says_the_same_and_prints_the_same(
    shims: list[Path], command: bytes, environment: dict[bytes, bytes], text: bytes, answer: bytes
) -> None:
    results = [told(shim, answer, {**environment, b"CNI_COMMAND": command}, text) for shim in shims]
    assert results == [results[0]] * len(results)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("what", ["environment", "configuration", "answer"])
def test_every_shim_has_the_same_limits(shims: list[Path], what: str, more: int) -> None:
    environment, text, answer = {b"CNI_COMMAND": b"DEL", b"CNI_ARGS": b"x"}, CONF, b"{}"
    if what == "environment":
        others = f"UNDERLAY_ASKED={time.monotonic_ns()}\0CNI_COMMAND=DEL\0CNI_ARGS=\0"
        environment[b"CNI_ARGS"] = b"x" * (message.ENVIRONMENT_LIMIT - len(others) + more)
    elif what == "configuration":
        text += b" " * (message.CONFIG_LIMIT - len(text) + more)
    else:
        answer = b"a" * ((1 << 20) + more)
    results = [told(shim, message.encode_answer(3, answer), environment, text) for shim in shims]
    wanted = 0 if (what, more) == ("answer", 1) else 1 if more else 3  # queued, refused, answered
    assert [result[0][0] for result in results] == [wanted] * len(shims)  # type: ignore[index]
    assert all(result == results[0] for result in results)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    run=st.sampled_from([b"/proc/x", b"/etc/passwd", b"/sys/a", b'/proc/n"\\\n\xff\xc3\xa9', b"/" + b"x" * 300]),
    text=TEXTS,
)
def test_every_shim_fails_in_the_same_words(shims: list[Path], run: bytes, text: bytes) -> None:
    """DEL with no server, where it cannot be queued either, or a path that is none."""
    results = [outcome(*execute(shim, run, DEL, text)) for shim in shims]
    assert results == [results[0]] * len(results)
    assert results[0][0] == 1


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"ULR",
        b"ULR1" + bytes(7),
        b"XXXX" + bytes(8),
        struct.pack("<4sII", b"ULR1", 0, 9),
        b"ULR1\0\0\0\0\0\0\x20\0",
    ],
    ids=["nothing", "cut", "head-cut", "magic", "text-cut", "too-long"],
)
def test_a_broken_answer_is_none(shim: Path, broken: bytes) -> None:
    with recording(broken) as (run, _):
        assert execute(shim, run, DEL, CONF) == (0, b"")
        (left,) = (run / "queue").iterdir()
        assert message.decode(left.read_bytes()).environment.items() >= DEL.items()
        assert left.stat().st_mode & 0o777 == 0o600
        assert left.parent.stat().st_mode & 0o777 == 0o700


def test_the_namespace_travels_with_the_request(shim: Path) -> None:
    with recording(message.encode_answer(0, b"yes")) as (run, recorder):
        assert execute(shim, run, {**DEL, "CNI_NETNS": "/proc/self/ns/net"}, CONF) == (0, b"yes")
        assert execute(shim, run, {**DEL, "CNI_NETNS": "/nowhere"}, CONF) == (0, b"yes")
        assert [inode for _, inode in recorder.requests] == [Path("/proc/self/ns/net").stat().st_ino, 0]


def test_a_request_that_is_refused_early_gets_its_answer(shim: Path, tmp_path: Path) -> None:
    """The server closes before it has read a megabyte; what it said is there to be read."""
    answer = message.encode_answer(1, b"too long")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        env = {**DEL, "UNDERLAY_RUN": str(tmp_path), "PATH": os.environ["PATH"]}
        with subprocess.Popen([shim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as started:
            assert started.stdin is not None
            started.stdin.write(b" " * (1 << 20))
            started.stdin.close()
            started.stdin = None
            connection, _ = listener.accept()
            connection.recv(12)
            connection.sendall(answer)
            connection.close()
            printed = started.communicate(timeout=60)[0]
    assert (started.returncode, printed) == (1, b"too long")


# -- a full disk, a kill -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    yield folder
    netns.unmount(folder)


def test_a_del_that_has_no_room_on_disk_fails_and_leaves_nothing(shim: Path, small: Path) -> None:
    code, printed = execute(shim, small, DEL, b" " * (1 << 17))
    assert code == 1
    assert json.loads(printed)["code"] == 11
    assert json.loads(printed)["details"] == (
        f"{small}/queue: No space left on device; make room there or start underlay-cni"
    )
    assert list((small / "queue").iterdir()) == []
    assert execute(shim, small, DEL, CONF) == (0, b"")


def test_a_shim_may_be_replaced_while_it_runs(shim_c: Path, tmp_path: Path) -> None:
    """As the installer does: the old one ends as it began."""
    binary = install.install_binary(shim_c, tmp_path)
    newer = tmp_path / "newer"
    newer.write_bytes(shim_c.read_bytes() + b"\0")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        env = {**DEL, "UNDERLAY_RUN": str(tmp_path)}
        with subprocess.Popen([binary], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env) as running:
            connection, _ = listener.accept()
            install.install_binary(newer, tmp_path)
            connection.sendall(message.encode_answer(0, b"old"))
            assert running.communicate(timeout=60)[0] == b"old"
            connection.close()
    assert binary.read_bytes() == newer.read_bytes()
    assert execute(binary, tmp_path, {"CNI_COMMAND": "VERSION"}, b"")[0] == 0


def test_a_killed_shim_leaves_a_whole_del_or_none(shim_c: Path, tmp_path: Path) -> None:
    """Killed again and again while it writes: nothing half is ever there under a DEL's name."""
    text = CONF + b" " * (1 << 19)
    for i in range(30):
        env = {**DEL, "UNDERLAY_RUN": str(tmp_path)}
        with subprocess.Popen([shim_c], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env) as started:
            assert started.stdin is not None
            started.stdin.write(text)
            started.stdin.close()
            started.stdin = None
            time.sleep(i * 1e-4)
            started.send_signal(signal.SIGKILL)
            started.wait()
    for left in (tmp_path / "queue").glob("*.del"):
        assert message.decode(left.read_bytes()).config == text


def test_what_killed_shims_left_half_is_removed(tmp_path: Path) -> None:
    async def carry_out(*_: object) -> bytes:
        return b""

    queue = Queue(directory=tmp_path, carry_out=carry_out, clock=SystemClock())
    old, new = tmp_path / "queue/.1.tmp", tmp_path / "queue/.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    asyncio.run(queue.drain())
    eventually(lambda: not old.exists())
    assert new.exists()
