"""The driver against a relay that does wrong: what ours never does on purpose."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from agent.bgp import wire
from agent.bgp.driver import Driver
from agent.bgp.model import Announcement, Event, SpeakerLost
from store.clock import SystemClock

HELLO = {
    "version": wire.VERSION,
    "mark": "",
    "table": None,
    "problem": "",
    "peers": {},
    "wanted": [],
    "held": [],
    "confirmed": [],
}


@pytest.mark.parametrize(
    "second",
    [
        wire.frame(2, wire.KIND_SENT, wire.pack({"peer": "10.0.1.2", "states": {"10.244.0.0/26": "confirmed"}})),
        wire.frame(1, "unheard-of", b"{}"),
        wire.frame(1, wire.KIND_SENT, b"{"),
        b"\n",
    ],
    ids=["a number is missing", "unknown", "not JSON", "empty"],
)
def test_a_line_that_cannot_be_used_begins_anew(tmp_path: Path, second: bytes) -> None:
    """What was said is not known any more: the next connection tells everything."""
    greetings = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greetings
        assert json.loads(await reader.readline())["do"] == "hello"
        greetings += 1
        held = [["10.0.1.2", "10.244.9.0/26"]] if greetings > 1 else []
        writer.write(wire.frame(0, wire.KIND_HELLO, wire.pack(HELLO | {"held": held})))
        if greetings == 1:
            writer.write(second)
        await reader.read()
        writer.close()

    async def main() -> None:
        events: list[Event] = []
        driver = Driver(tmp_path, SystemClock(), events.append)
        server = await asyncio.start_unix_server(serve, tmp_path / "relay.sock")
        running = asyncio.create_task(driver.run())
        async with asyncio.timeout(60):
            while driver.state().sent != {("10.0.1.2", "10.244.9.0/26")}:
                await driver.changed.wait()
                driver.changed.clear()
        assert [type(e) for e in events] == [SpeakerLost]
        assert driver.state().confirmed == frozenset()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()

    asyncio.run(main())


def test_the_table_is_the_relay_s_own_until_this_agent_gives_one(tmp_path: Path) -> None:
    """By it the plan knows what is on its way out: such a thing is held, and in no table."""
    peer, kept, leaving = "10.0.1.2", "10.244.1.0/26", "10.244.9.0/26"
    hello = HELLO | {"wanted": [[peer, kept]], "held": [[peer, kept], [peer, leaving]]}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.frame(0, wire.KIND_HELLO, wire.pack(hello)))
        await reader.read()
        writer.close()

    async def main() -> None:
        driver = Driver(tmp_path, SystemClock(), lambda event: None)
        assert driver.state().table == frozenset()
        server = await asyncio.start_unix_server(serve, tmp_path / "relay.sock")
        running = asyncio.create_task(driver.run())
        async with asyncio.timeout(60):
            while not driver.state().known:
                await driver.changed.wait()
                driver.changed.clear()
        assert driver.state().sent - driver.state().table == {(peer, leaving)}
        driver.set_announcements(frozenset({Announcement(peer=peer, prefix=leaving, next_hop="10.0.1.1")}))
        assert driver.state().table == {(peer, leaving)}
        driver.set_announcements(frozenset())
        assert driver.state().table == frozenset()
        assert driver.state().sent == {(peer, kept), (peer, leaving)}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        server.close()

    asyncio.run(main())
