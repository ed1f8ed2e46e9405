"""The socket's queue: what a server takes at once, and what waits."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cni import message
from cni.listener import Listener, ListenerError
from cni.lock import in_turn
from cni.server import Server, Settings
from cni.spec import Call
from store.clock import SystemClock

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
        self.listener = Listener(folder)
        self.server = Server(listener=self.listener, carry_out=self.carry_out, settings=settings)

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
    async with asyncio.timeout(60):
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
        refusals = [OSError(24, "Too many open files")] * 3

        class Starved(socket.socket):
            def accept(self) -> tuple[socket.socket, object]:
                if refusals:
                    raise refusals.pop()
                return super().accept()

        starved = Starved(fileno=front.listener.open().detach())
        monkeypatch.setattr(front.listener, "_socket", starved)
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
        async with asyncio.timeout(60):
            assert await front.call(b"ULC1") == b""
        serving.cancel()

    asyncio.run(test())


# -- from one server to the next ---------------------------------------------------------------------------------------


def test_calls_that_come_while_an_older_server_ends_its_own_wait_for_the_newer(tmp_path: Path) -> None:
    """Whatever the old one has under way, and however long the new one takes to begin: nobody is told 'no server'."""

    async def test() -> None:
        old, new = Front(tmp_path, Settings()), Front(tmp_path, Settings())
        begins = asyncio.Event()

        async def slowly() -> None:
            new.listener.open()
            await begins.wait()
            await new.server.run()

        lock, clock = tmp_path / "cni.lock", SystemClock()
        first = asyncio.create_task(in_turn(lock, clock, old.server.run, ahead=old.listener.queue))
        await until(old.path.exists)
        under_way = asyncio.create_task(old.call())
        await until(lambda: old.under_way == 1)

        second = asyncio.create_task(in_turn(lock, clock, slowly, ahead=new.listener.queue))
        await until(lambda: new.listener._socket is not None)
        waiting = asyncio.create_task(new.call())
        await asyncio.sleep(0.05)
        assert (old.under_way, new.under_way) == (1, 0), "the old one still works, the new one not yet"
        old.go_on.set()
        assert await under_way == message.encode_answer(0, b"{}")
        assert not waiting.done()
        begins.set()
        new.go_on.set()
        assert await waiting == message.encode_answer(0, b"{}")

        # And back: the newer one ends, and takes its socket along; the older one answers.
        second.cancel()
        await asyncio.wait({second})
        await until(old.path.exists)
        assert await old.call() == message.encode_answer(0, b"{}")
        first.cancel()
        await asyncio.wait({first})
        assert not old.path.exists()

    asyncio.run(test())


def test_a_newer_server_that_dies_while_it_waits_leaves_the_older_one_its_callers(tmp_path: Path) -> None:
    async def test() -> None:
        old, new = Front(tmp_path, Settings()), Listener(tmp_path)
        lock, clock = tmp_path / "cni.lock", SystemClock()
        first = asyncio.create_task(in_turn(lock, clock, old.server.run, ahead=old.listener.queue))
        await until(old.path.exists)
        under_way = asyncio.create_task(old.call())
        await until(lambda: old.under_way == 1)
        second = asyncio.create_task(in_turn(lock, clock, asyncio.Event().wait, ahead=new.queue))
        await until(lambda: new._socket is not None)
        # As a kill does: the file stays, and nobody is behind it.
        new._socket, dead = None, new._socket
        assert dead
        dead.close()
        second.cancel()
        await asyncio.wait({second})
        old.go_on.set()
        await under_way
        await until(lambda: old.path.stat().st_ino != new._inode)
        assert await old.call() == message.encode_answer(0, b"{}")
        first.cancel()
        await asyncio.wait({first})

    asyncio.run(test())


def test_a_socket_that_somebody_answers_is_not_taken(tmp_path: Path) -> None:
    one, other = Listener(tmp_path), Listener(tmp_path)
    one.open()
    other.queue()
    with pytest.raises(ListenerError, match="somebody answers there who does not hold our lock"):
        other.open()
    other.close()
    assert (tmp_path / "cni.sock").exists()
    one.close()
    assert not (tmp_path / "cni.sock").exists()
