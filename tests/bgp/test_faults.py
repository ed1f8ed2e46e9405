"""ExaBGP's faults (exabgp.md), each provoked for real; what comes through is the relay's and driver's doing.

Faults 4, 8, 11 and 12 are in test_restart.py, 13 in test_session.py.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from agent.bgp import conf
from agent.bgp.model import EndOfRib, Resync, SessionDown, SessionUp, Update
from lab.net import Net
from tests.bgp.conftest import SESSIONS, Node, Witness, announce, blocks, run, session, until
from tests.bgp.routers import NODE6, TOR4, TOR6, Bird, Router


def test_bursts_leave_neither_ghost_nor_gap(router: Router, node: Node) -> None:
    """Fault 1: 150 prefixes announced, changed, withdrawn and announced again as fast as they can be said."""
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
            await until(lambda: router.table() == {}, limit=2)
            assert driver.state().withdrawn_at.keys() == {a.prefix for a in two}

    run(main())


def test_reload_in_the_middle_of_a_burst(bird: Bird, node: Node, net: Net) -> None:
    """Fault 2: ExaBGP forgets a SIGUSR1 that comes while announcements are pending, also those for a peer that is
    down. One of the peers here is."""
    gone = session(name="gone", address="10.0.1.99")

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4"), gone}))
            driver.set_announcements(blocks(40) | {announce("10.240.0.0/26", peer=gone.address)})
            await until(lambda: any(isinstance(e, SessionUp) for e in events))
            # The sessions first: by the time the reload is due, ExaBGP is in the middle of the announcements.
            driver.set_sessions(SESSIONS | {gone})
            many = frozenset(announce(f"10.{100 + i // 250}.{i % 250}.0/24", med=i % 7) for i in range(3000))
            driver.set_announcements(many | {announce("10.240.0.64/26", peer=gone.address)})
            await until(lambda: {e.peer for e in events if isinstance(e, SessionUp)} == {TOR4, TOR6})
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(300))
            await until(lambda: bird.table().keys() == {a.prefix for a in blocks(300)})
            await until(lambda: gone.address not in net.run("node", ["ss", "-tn", "state", "syn-sent"]).stdout)
            assert node.process.poll() is None
            assert not any(isinstance(e, SessionDown) for e in events)

    run(main())


def test_unreadable_file_kills_no_session(bird: Bird, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 3, our side: what ExaBGP would refuse never gets the file's name; its peer alone is refused (R13)."""
    monkeypatch.setattr(conf, "problem", lambda session: "")

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4"), session("6", hold_time=2)}))
            await until(lambda: any(isinstance(e, SessionUp) for e in events))
            assert driver.state().refused.keys() == {TOR6}
            assert "hold" in driver.state().refused[TOR6].lower()
            assert TOR6 not in (node.folder / "exabgp.conf").read_text()
            driver.set_sessions(SESSIONS)
            await until(lambda: {e.peer for e in events if isinstance(e, SessionUp)} == {TOR4, TOR6})
            assert driver.state().refused == {}
            # It was good once: it stays as it was, and up.
            driver.set_sessions(frozenset({session("4"), session("6", hold_time=2)}))
            await until(lambda: driver.state().refused.keys() == {TOR6})
            assert TOR6 in (node.folder / "exabgp.conf").read_text()
            assert not any(isinstance(e, SessionDown) for e in events)

    run(main())


def test_file_spoiled_by_somebody_else(bird: Bird, node: Node) -> None:
    """Fault 3, others: a truncated file and a SIGUSR1 leave an ExaBGP without helper and with a broken parser."""

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            path = node.folder / "exabgp.conf"
            path.write_text(path.read_text()[:-40])
            os.kill(node.process.pid, signal.SIGUSR1)
            await until(lambda: node.process.poll() is not None)  # the relay saw to it
            assert bird.table().keys() == {a.prefix for a in blocks(4)}
            # The agent puts the file right whatever it finds, and a supervisor starts the speaker.
            await until(lambda: not driver.state().known)
            driver.set_sessions(SESSIONS | {session(name="other", address="10.0.1.99")})
            await until(lambda: "10.0.1.99" in path.read_text())
            node.start()
            await until(lambda: len(driver.state().confirmed) == 4)
            await until(lambda: not bird.stale())
            assert bird.table().keys() == {a.prefix for a in blocks(4)}

    run(main())


def test_agent_that_does_not_read(bird: Bird, node: Node) -> None:
    """Fault 5: were the relay to stop reading, ExaBGP would stand still and every session end at its hold time. An
    agent that was behind is told everything again."""
    routes = [f"10.{100 + i // 250}.{i % 250}.0/24" for i in range(4000)]
    node.options = ("--buffer", "20000")
    log = node.folder.parent.parent / "speaker.log"
    quick = frozenset({session("4", hold_time=3, families=("ipv4 unicast",))})

    async def main() -> None:
        bird.start(routes)
        node.write_conf(quick)
        node.start()
        await until(lambda: (node.folder / "relay.sock").exists())
        _, writer = await asyncio.open_unix_connection(str(node.folder / "relay.sock"), limit=1024)
        writer.write(b'{"do":"hello","version":1}\n')
        # Not one byte is read from here on, for longer than the hold time, while BIRD tells it all over and over.
        end = asyncio.get_running_loop().time() + 4
        while asyncio.get_running_loop().time() < end:
            bird.ask("reload", "out", "node4")
            await asyncio.sleep(0.2)
        assert (node.folder / "exabgp.log").read_text().count("connected to peer") == 1
        assert "Established" in bird.ask("show", "protocols", "node4")
        writer.close()
        async with node.driver() as (_, events):
            await until(lambda: sum(isinstance(e, EndOfRib) for e in events) >= 1)
            got = {r.prefix for e in events if isinstance(e, Update) for r in e.announced}
            assert got >= set(routes)
            # This one stands still too, then reads on: it is told of the gap, and everything again.
            events.clear()
            for _ in range(500):
                bird.ask("reload", "out", "node4")  # the event loop does not run meanwhile
                if log.read_text().count("bytes behind") >= 2:
                    break

            def whole() -> bool:
                starts = [i for i, e in enumerate(events) if isinstance(e, Resync)]
                after = events[starts[-1] :] if starts else []
                told = {r.prefix for e in after if isinstance(e, Update) for r in e.announced}
                return told >= set(routes) and any(isinstance(e, EndOfRib) for e in after)

            await until(whole)
            assert not any(isinstance(e, SessionDown | SessionUp) for e in events)
        assert log.read_text().count("bytes behind") >= 2

    run(main())


def test_peer_that_is_made_anew(bird: Bird, node: Node) -> None:
    """Fault 8: a changed router id makes ExaBGP forget what that peer was told."""

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            driver.set_sessions(frozenset({session("4", router_id="10.0.1.77"), session("6")}))
            await until(lambda: sum(isinstance(e, SessionUp) for e in events) == 3)
            await until(lambda: len(driver.state().confirmed) == 4)
            assert bird.table().keys() == {a.prefix for a in blocks(4)}
            assert [e.peer for e in events if isinstance(e, SessionDown)] == [TOR4], "the other was left alone"

    run(main())


def user_of(pid: int) -> int:
    return int(re.findall(r"^Uid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])


def test_it_stays_the_user_that_can_read_its_file(bird: Bird, node: Node) -> None:
    """Fault 10: as root ExaBGP would become nobody, and could not read a 0600 file when it reloads."""

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4")}))
            await until(lambda: len([e for e in events if isinstance(e, SessionUp)]) == 1)
            driver.set_sessions(SESSIONS)
            await until(lambda: len([e for e in events if isinstance(e, SessionUp)]) == 2)
            assert (node.folder / "exabgp.conf").stat().st_mode & 0o777 == 0o600
            assert {user_of(node.process.pid), user_of(node.relay())} == {os.geteuid()}

    run(main())


def test_no_end_of_rib_before_the_first_table(router: Router, node: Node) -> None:
    """Fault 11 the other way round: a relay that lost its table must not have the peer sweep our routes."""

    async def main() -> None:
        router.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(4))
            await until(lambda: router.table().keys() == {a.prefix for a in blocks(4)})
            await until(lambda: len(driver.state().confirmed) == 4)
        node.kill()
        table = node.folder / "table.json"
        table.write_text(table.read_text().replace("10.244.0.0/26", "10.244.0.0/27"))
        await until(router.stale)
        node.start()
        log = node.folder.parent.parent / "speaker.log"
        await until(lambda: "damaged" in log.read_text())
        await until(lambda: (node.folder / "exabgp.log").read_text().count("connected to peer") == 4)
        await asyncio.sleep(0.5)  # long enough for an End-of-RIB that must not come
        assert router.stale()
        assert router.table().keys() == {a.prefix for a in blocks(4)}
        async with node.driver() as (driver, _):
            driver.set_announcements(blocks(2))
            await until(lambda: router.table().keys() == {a.prefix for a in blocks(2)})
            await until(lambda: not router.stale())

    run(main())


def test_two_next_hops_are_one_path(bird: Bird, node: Node, net: Net) -> None:
    """Fault 14: BIRD gives a global and a link-local next hop, ExaBGP reports the route under both."""

    async def main() -> None:
        await until(lambda: "tentative" not in net.run("tor", ["ip", "-6", "addr", "show", "dev", "down0"]).stdout)
        bird.start(["fd09::/64"])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            await until(lambda: sum(isinstance(e, EndOfRib) for e in events) == 4)
            got = [r for e in events if isinstance(e, Update) for r in e.announced]
            assert {(r.prefix, r.next_hop) for r in got} == {("fd09::/64", TOR6)}
            raw = bird.ask("show", "route", "export", "node6", "all")
            assert raw, "BIRD exports it"

    run(main())


def test_next_hop_of_the_other_family_is_not_sent(bird: Bird, node: Node) -> None:
    """Fault 15: ExaBGP would answer done and send nothing."""
    odd = announce("10.244.7.0/26", next_hop=NODE6)

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(frozenset({odd, announce("10.244.8.0/26")}))
            await until(lambda: driver.state().confirmed == {(TOR4, "10.244.8.0/26")})
            assert driver.state().unsendable.keys() == {(TOR4, "10.244.7.0/26")}
            assert (TOR4, "10.244.7.0/26") not in driver.state().sent

    run(main())


def test_family_that_the_peer_does_not_speak(bird: Bird, node: Node) -> None:
    """Wanted, never sent, and it holds nothing up."""
    only4 = session("4", families=("ipv4 unicast",))

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(frozenset({only4}))
            driver.set_announcements(frozenset({announce("10.244.8.0/26"), announce("fd00:10:244::/122", peer=TOR4)}))
            await until(lambda: driver.state().confirmed == {(TOR4, "10.244.8.0/26")})
            assert driver.state().sent == {(TOR4, "10.244.8.0/26")}
            driver.set_announcements(frozenset())
            await until(lambda: driver.state().sent == frozenset())

    run(main())


def test_gaps_heal(bird: Bird, node: Node, net: Net, tmp_path: Path) -> None:
    """The table is asserted now and then, on the wire; a peer that has it all does not notice."""
    node.options = ("--assert-every", "0.5")
    everything = {a.prefix for a in blocks(4)}

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            await witness.begin(everything)
            await asyncio.sleep(1.2)  # two assertions
            assert witness.seen() == []
            # BIRD asks for nothing when its filter changes softly: it loses a route now, and does not get it back.
            config = bird.folder / "bird.conf"
            plain = config.read_text()
            config.write_text(plain.replace("import all;", "import where net != 10.244.0.0/26;"))
            bird.ask("configure", "soft")
            await until(lambda: bird.table().keys() == everything - {"10.244.0.0/26"})
            config.write_text(plain)
            bird.ask("configure", "soft")
            await until(lambda: bird.table().keys() == everything)
            assert not any(isinstance(e, SessionDown) for e in events)
            assert driver.state().sent == driver.state().confirmed == {(a.peer, a.prefix) for a in blocks(4)}

    run(main())
