"""ExaBGP's faults 1, 2, 3, 8 and 9 (exabgp.md), each provoked twice (faults.py): what becomes of what it is told."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from agent.bgp import conf
from lab.net import Net
from tests.bgp.conftest import SESSIONS, Node, announce, blocks, run, session, until
from tests.bgp.faults import FIRST, SECOND, Without, downs, handled, ups
from tests.bgp.routers import NODE4, TOR4, TOR6, Bird, Router

GONE = "10.0.1.99"


@handled
def test_fault_1_a_burst_is_reordered(router: Router, node: Node, without: Without, handled: bool) -> None:
    """150 prefixes announced, withdrawn, announced again and changed in one go."""
    if not handled:
        without("order")
    one, two, plain = blocks(150, med=1), blocks(150, med=2), blocks(150)
    whole = {a.prefix: {"med 2"} for a in two} | {FIRST.prefix: set(), SECOND.prefix: set()}

    async def main() -> None:
        router.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            await until(lambda: len(ups(events)) == 2)
            for number in range(3 if handled else 20):
                # The relay hears of all this at once, and would say it to ExaBGP at once.
                os.kill(node.relay(), signal.SIGSTOP)
                marker = announce(f"10.250.{number}.0/24")
                for wanted in (one, frozenset(), plain, one, two | {marker}):
                    driver.set_announcements(wanted)
                os.kill(node.relay(), signal.SIGCONT)
                await until(lambda marker=marker: marker.prefix in router.table())
                # What was said before the first is on the wire with it or before it, so all of it before the second.
                for wanted in (two | {FIRST}, two | {FIRST, SECOND}):
                    driver.set_announcements(wanted)
                    newest = SECOND if SECOND in wanted else FIRST
                    await until(lambda newest=newest: newest.prefix in router.table())
                if handled:
                    await until(lambda: router.table() == whole)
                wrong = router.table() != whole
                driver.set_announcements(frozenset())
                if wrong:
                    break
                await until(lambda: router.table() == {})
            assert wrong != handled

    run(main())


def test_bursts_leave_neither_ghost_nor_gap(router: Router, node: Node) -> None:
    """The same slower, so that all of it is said, as fast as it can be."""
    one = blocks(150, med=1)
    two = blocks(150, med=2)
    plain = blocks(150)

    async def main() -> None:
        router.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            await until(lambda: driver.state().known)
            for _ in range(3):
                for wanted in (one, frozenset(), two, plain, one, frozenset(), plain, two):
                    driver.set_announcements(wanted)
                    await asyncio.sleep(0.004)
            await until(lambda: driver.state().confirmed == {(a.peer, a.prefix) for a in two})
            # The pairs are the same with every attribute, so this may still be the table before the last: a ghost or a
            # gap is what stays, and the peer reads on.
            await until(lambda: router.table() == {a.prefix: {"med 2"} for a in two})
            for wanted in (plain, one, two, frozenset()):
                driver.set_announcements(wanted)
                await asyncio.sleep(0.004)
            await until(lambda: driver.state().sent == frozenset())
            # Reported withdrawn is handed to TCP: the peer needs a moment to read it.
            await until(lambda: router.table() == {})
            assert driver.state().withdrawn_at.keys() == {a.prefix for a in two}

    run(main())


@handled
def test_fault_2_a_reload_is_forgotten(bird: Bird, node: Node, without: Without, net: Net, handled: bool) -> None:
    """A SIGUSR1 while announcements are pending, also those for a peer that is down. One of the peers here is."""
    if not handled:
        without("confirmation")
    gone = session(name="gone", address=GONE)
    log = node.folder / "exabgp.log"

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4"), gone}))
            await until(lambda: ups(events) == [TOR4])
            await until(lambda: "loaded new configuration" in log.read_text())
            driver.set_announcements(blocks(40) | {announce("10.240.0.0/26", peer=GONE)})
            await until(lambda: {p for p, _ in driver.state().confirmed} == {TOR4})
            signals, reloads = (log.read_text().count(said) for said in ("SIGUSR1 received", "performing reload"))
            # The sessions first: by the time the reload is due, ExaBGP is in the middle of the announcements.
            driver.set_sessions(SESSIONS | {gone})
            many = frozenset(announce(f"10.{100 + i // 250}.{i % 250}.0/24", med=i % 7) for i in range(3000))
            driver.set_announcements(many | {announce("10.240.0.64/26", peer=GONE)})
            if not handled:
                await until(lambda: log.read_text().count("SIGUSR1 received") > signals)
                driver.set_announcements(frozenset({FIRST}))
                await until(lambda: bird.table().keys() == {FIRST.prefix})
                assert log.read_text().count("performing reload") == reloads, "and nothing says so"
                assert ups(events) == [TOR4]
                return
            await until(lambda: set(ups(events)) == {TOR4, TOR6})
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(300))
            await until(lambda: bird.table().keys() == {a.prefix for a in blocks(300)})
            await until(lambda: GONE not in net.run("node", ["ss", "-tn", "state", "syn-sent"]).stdout)
            assert node.process.poll() is None
            assert downs(events) == []

    run(main())


@handled
def test_fault_3_one_bad_peer_spoils_the_file(
    bird: Bird, node: Node, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """What ExaBGP would refuse never gets the file's name; its peer alone is refused (R13)."""
    monkeypatch.setattr(conf, "problem", lambda session: "")
    bad = session("6", hold_time=2)
    log = node.folder / "exabgp.log"

    async def unseen(path: Path) -> str:
        return ""

    if not handled:
        monkeypatch.setattr("agent.bgp.driver.exabgp_validate", unseen)

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4"), bad}))
            if not handled:
                await until(lambda: log.exists() and "could not load/reload" in log.read_text())
                assert ups(events) == [], "the good one has no session either"
                return
            await until(lambda: ups(events) == [TOR4])
            assert driver.state().refused.keys() == {TOR6}
            assert "hold" in driver.state().refused[TOR6].lower()
            assert TOR6 not in (node.folder / "exabgp.conf").read_text()
            driver.set_sessions(SESSIONS)
            await until(lambda: set(ups(events)) == {TOR4, TOR6})
            assert driver.state().refused == {}
            # It was good once: it stays as it was, and up.
            driver.set_sessions(frozenset({session("4"), bad}))
            await until(lambda: driver.state().refused.keys() == {TOR6})
            assert TOR6 in (node.folder / "exabgp.conf").read_text()
            assert downs(events) == []

    run(main())


@handled
def test_fault_8_a_peer_that_is_made_anew_is_told_nothing(
    bird: Bird, node: Node, without: Without, handled: bool
) -> None:
    """A changed router id makes ExaBGP forget what that peer was told."""
    if not handled:
        without("repetition")

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            await until(lambda: len(ups(events)) == 2)
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            driver.set_sessions(frozenset({session("4", router_id="10.0.1.77"), session("6")}))
            await until(lambda: len(ups(events)) == 3)
            assert downs(events) == [TOR4], "the other was left alone"
            if not handled:
                await until(lambda: bird.table().keys() == {a.prefix for a in blocks(4) if a.peer == TOR6})
                return
            await until(lambda: len(driver.state().confirmed) == 4)
            await until(lambda: bird.table().keys() == {a.prefix for a in blocks(4)})

    run(main())


@handled
def test_fault_9_a_static_route_is_not_withdrawn(
    bird: Bird, node: Node, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """One that is taken out of the file. So none of ours is in there: what the relay says can be taken back."""
    route = announce("10.251.0.0/24")
    neighbor, static = conf._neighbor, {"text": ""}
    monkeypatch.setattr(conf, "_neighbor", lambda s, name: neighbor(s, name)[:-2] + static["text"] + "}\n")

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            static["text"] = "" if handled else f"    static {{ route {route.prefix} next-hop {NODE4}; }}\n"
            driver.set_sessions(frozenset({session("4")}))
            driver.set_announcements(frozenset({route} if handled else ()))
            await until(lambda: bird.table().keys() == {route.prefix})
            static["text"] = ""
            driver.set_sessions(SESSIONS)
            driver.set_announcements(frozenset())
            await until(lambda: set(ups(events)) == {TOR4, TOR6})
            assert "static {" not in (node.folder / "exabgp.conf").read_text()
            driver.set_announcements(frozenset({FIRST}))
            await until(lambda: FIRST.prefix in bird.table())
            if handled:
                await until(lambda: bird.table().keys() == {FIRST.prefix})
            assert (route.prefix in bird.table()) != handled

    run(main())
