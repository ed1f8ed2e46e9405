"""The driver and a relay of another age: speaker and agent are upgraded apart from each other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from agent.bgp import wire
from agent.bgp.driver import Driver
from agent.bgp.model import Capabilities, Change, Event, Notification, SessionChanges, SessionDown, SessionUp
from agent.bgp.relay import Relay
from store.clock import SystemClock

TOR = "10.0.1.0"
#: Word for word what relays said before they told of the past and of capabilities.
OLD_ABOUT = {"generation": 5, "families": ["ipv4 unicast"], "graceful": [], "restart_time": 0, "helper": False}
OLD_HELLO = {
    "version": 1,
    "mark": "",
    "table": None,
    "problem": "",
    "peers": {},
    "wanted": [],
    "held": [],
    "confirmed": [],
}
OLD: list[tuple[str, dict[str, Any]]] = [
    ("up", {"peer": TOR, **OLD_ABOUT}),
    ("down", {"peer": TOR, "generation": 5, "reason": "notification received (6,2)"}),
]
SAID = {"direction": "receive", "code": 6, "subcode": 2, "data": "0x"}
UP = {"state": "up", "reason": "", "notification": None, "generation": 5, "at": 100, "last": 100, "times": 1}
DOWN = {**UP, "state": "down", "reason": "notification received (6,2)", "notification": SAID, "at": 160, "last": 160}
NEW: list[tuple[str, dict[str, Any]]] = [
    (
        "up",
        {
            **OLD[0][1],
            "refresh": True,
            "enhanced": True,
            "asn4": True,
            "extended_next_hop": [],
            "hold_time": 9,
            "router_id": "10.0.0.9",
            "change": UP,
        },
    ),
    ("down", {**OLD[1][1], "change": DOWN}),
    # Never a session: an older agent takes it for the end of one that it does not have.
    ("down", {"peer": TOR, "generation": 5, "reason": "closing connection", "change": {**DOWN, "state": "failed"}}),
]


def heard(folder: Path, hello: dict[str, Any], lines: list[tuple[str, dict[str, Any]]]) -> list[Event]:
    """What the driver makes of a relay that says this and waits. A line that it does not understand fails the test."""
    events: list[Event] = []

    async def main() -> None:
        done = asyncio.Event()
        expected = len(lines) + len(hello.get("history", {}))

        def sink(event: Event) -> None:
            events.append(event)
            if sum(isinstance(e, SessionChanges) for e in events) == expected:
                done.set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert json.loads(await reader.readline()) == {"do": "hello", "version": wire.VERSION}
            last = ("table", {"generation": 1, "problem": ""})
            for number, (kind, payload) in enumerate([("hello", hello), *lines, last]):
                writer.write(wire.frame(number, kind, wire.pack(payload)))
            try:
                await reader.read()
            finally:
                writer.close()

        server = await asyncio.start_unix_server(serve, str(folder / "relay.sock"))
        driver = Driver(folder, SystemClock(), sink)
        task = asyncio.create_task(driver.run())
        try:
            async with asyncio.timeout(60):
                await done.wait()
            assert driver.state().known, "the driver took offence"
        finally:
            task.cancel()
            server.close()

    asyncio.run(main())
    return events


def test_an_older_relay_is_understood(tmp_path: Path) -> None:
    up, changed_up, down, changed_down = heard(tmp_path, OLD_HELLO, OLD)
    assert isinstance(up, SessionUp)
    assert up.capabilities is None
    assert isinstance(down, SessionDown)
    assert down.reason == "the peer said: Cease, Administrative Shutdown"
    assert isinstance(changed_up, SessionChanges)
    assert isinstance(changed_down, SessionChanges)
    (one,) = changed_down.changes
    assert (one.state, one.notification) == ("down", Notification(sent=False, code=6, subcode=2))
    assert one.at >= changed_up.changes[0].at > 0


def test_a_relay_of_today_tells_more(tmp_path: Path) -> None:
    hello = {**OLD_HELLO, "history": {"10.0.2.0": [UP, DOWN]}}
    past, up, _, down, changed, failed = heard(tmp_path, hello, NEW)
    notification = Notification(sent=False, code=6, subcode=2)
    ended = Change(
        state="down", generation=5, at=160, last=160, reason="notification received (6,2)", notification=notification
    )
    assert past == SessionChanges(peer="10.0.2.0", changes=(Change(state="up", generation=5, at=100, last=100), ended))
    assert isinstance(up, SessionUp)
    assert up.capabilities == Capabilities(refresh=True, enhanced=True, asn4=True, hold_time=9, router_id="10.0.0.9")
    assert isinstance(down, SessionDown)
    assert changed == SessionChanges(peer=TOR, changes=(ended,))
    assert isinstance(failed, SessionChanges)
    assert failed.changes[0].state == "failed"


def test_an_older_agent_finds_all_that_it_reads() -> None:
    """Fields were added, none was taken away or renamed."""
    from agent.bgp.relay import Session

    assert Relay._about(Session(5, wire.Peering())).keys() >= OLD_ABOUT.keys()
    for (_, old), (_, new) in zip(OLD, NEW, strict=False):
        assert old.items() <= new.items()
