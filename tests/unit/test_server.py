"""The socket's queue: what a server takes at once, and what waits."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cni import message
from cni.server import Server, Settings
from cni.spec import Call

CONF = b'{"cniVersion": "1.0.0", "name": "underlay", "type": "underlay"}'
ENVIRONMENT = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}
REQUEST = b"".join(f"{key}={value}\0".encode() for key, value in ENVIRONMENT.items())

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may call")


class Front:
    """A server whose calls end when they are told to."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.path = folder / "cni.sock"
        self.under_way = 0
        self.most = 0
        self.go_on = asyncio.Event()
        self.server = Server(directory=folder, carry_out=self.carry_out, settings=settings)

    async def carry_out(self, call: Call, pod_ns: int | None) -> bytes:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.go_on.wait()
        finally:
            self.under_way -= 1
        return b"{}"

    async def call(self, *parts: bytes) -> bytes:
        """What the server answers to a request that is sent in these parts."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        for part in parts or (message.REQUEST.pack(b"ULC1", len(REQUEST), len(CONF)) + REQUEST + CONF,):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        answer = await reader.read()
        writer.close()
        return answer


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not probe():  # noqa: ASYNC110 (it polls what others do)
            await asyncio.sleep(0.001)


def test_calls_beyond_the_bound_wait_and_none_is_lost(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(tmp_path, Settings(connections=3))
        serving = asyncio.create_task(front.server.run())
        await until(front.path.exists)
        calls = [asyncio.create_task(front.call()) for _ in range(20)]
        await until(lambda: front.under_way == 3)
        front.go_on.set()
        assert await asyncio.gather(*calls) == [message.encode_answer(0, b"{}")] * 20
        assert front.most == 3
        serving.cancel()

    asyncio.run(test())


def test_a_machine_without_descriptors_takes_calls_again_when_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        front = Front(tmp_path, Settings(full_limit=0.05))
        front.go_on.set()
        listen, refusals = front.server._listen, [OSError(24, "Too many open files")] * 3

        class Starved(socket.socket):
            def accept(self) -> tuple[socket.socket, object]:
                if refusals:
                    raise refusals.pop()
                return super().accept()

        def starved() -> tuple[socket.socket, int]:
            listener, inode = listen()
            return Starved(fileno=listener.detach()), inode

        monkeypatch.setattr(front.server, "_listen", starved)
        serving = asyncio.create_task(front.server.run())
        await until(front.path.exists)
        assert await front.call() == message.encode_answer(0, b"{}")
        assert not refusals
        serving.cancel()

    asyncio.run(test())


@pytest.mark.parametrize("size", [1, 5, 12, 13, 60])
def test_a_request_may_come_in_pieces(tmp_path: Path, size: int) -> None:
    whole = message.REQUEST.pack(b"ULC1", len(REQUEST), len(CONF)) + REQUEST + CONF

    async def test() -> None:
        front = Front(tmp_path, Settings())
        front.go_on.set()
        serving = asyncio.create_task(front.server.run())
        await until(front.path.exists)
        parts = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert await front.call(*parts) == message.encode_answer(0, b"{}")
        assert b"something after its end" in await front.call(whole + b"x")
        serving.cancel()

    asyncio.run(test())


def test_a_caller_that_says_nothing_is_left_after_the_limit(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(tmp_path, Settings(read_limit=0.05))
        serving = asyncio.create_task(front.server.run())
        await until(front.path.exists)
        async with asyncio.timeout(10):
            assert await front.call(b"ULC1") == b""
        serving.cancel()

    asyncio.run(test())
