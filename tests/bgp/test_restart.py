"""Who may die: speaker, agent, relay. The peer's kernel is the judge: it must not hear of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from agent.bgp.model import EndOfRib, Resync, SessionDown, SessionUp, SpeakerLost, Update
from lab.net import Net
from tests.bgp.conftest import BOTH, SESSIONS, Node, Witness, announce, blocks, ended, run, until
from tests.bgp.routers import TOR4, TOR6, Bird, Router


@pytest.mark.parametrize(
    ("with_agent", "how"),
    [(True, signal.SIGKILL), (True, signal.SIGTERM), (False, signal.SIGKILL), (False, signal.SIGTERM)],
    ids=["kill-agent", "term-agent", "kill-alone", "term-alone"],
)
def test_speaker_restart_loses_no_route(
    router: Router, node: Node, net: Net, tmp_path: Path, with_agent: bool, how: signal.Signals
) -> None:
    """Faults 8 and 11, R14: the relay gives the table again and only then the End-of-RIB."""
    wanted = blocks(12)
    prefixes = {a.prefix for a in wanted}

    async def main() -> None:
        router.start(["10.9.0.0/24"])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(wanted)
            await until(lambda: router.table().keys() == prefixes)
            await until(lambda: len(driver.state().confirmed) == 12)
            await witness.begin(prefixes)
            if with_agent:
                events.clear()
                node.kill(how)
                await until(lambda: any(isinstance(e, SpeakerLost) for e in events))
                assert not driver.state().known
                # No peer went away, so what they told stays (the agent's own speaker did: SpeakerLost).
                assert not [e for e in events if isinstance(e, SessionDown)]
                await until(router.stale)
                node.start()
                await until(lambda: len(driver.state().confirmed) == 12)
        if not with_agent:
            node.kill(how)
            await until(router.stale)
            node.start()
        # No stale route is left, so the peer has the new table and its End-of-RIB.
        await until(lambda: not router.stale())
        assert router.table().keys() == prefixes
        assert witness.seen() == []

    run(main())


def test_withdrawn_while_the_speaker_was_away(bird: Bird, node: Node) -> None:
    """The peer keeps stale routes over the restart; what left the table meanwhile is gone after the End-of-RIB."""
    wanted = blocks(4)

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(wanted)
            await until(lambda: len(bird.table()) == 4)
            node.kill()
            await until(lambda: not driver.state().known)
            left = frozenset(a for a in wanted if ":" in a.prefix)
            driver.set_announcements(left)
            node.start()
            await until(lambda: bird.table().keys() == {a.prefix for a in left})
            await until(lambda: {p for _, p in driver.state().sent} == {a.prefix for a in left})

    run(main())


def test_agent_restart_touches_no_session(router: Router, node: Node, net: Net, tmp_path: Path) -> None:
    """A new driver learns sessions, what was sent and, by route refresh, what the peers announce."""
    wanted = blocks(6)

    async def main() -> None:
        router.start(["10.9.0.0/24", "fd09::/64"])
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(wanted)
            await until(lambda: len(driver.state().confirmed) == 6)
            await until(lambda: router.table().keys() == {a.prefix for a in wanted})
            await witness.begin({a.prefix for a in wanted})
        before = (node.folder / "exabgp.log").read_text()
        for _ in range(3 if router.kind == "bird" else 1):  # FRR takes its time over a refresh
            async with node.driver() as (driver, events):
                driver.set_sessions(SESSIONS)
                driver.set_announcements(wanted)
                await until(lambda events=events: len(ended(events)) == 4)
                assert driver.state().sent == driver.state().confirmed == {(a.peer, a.prefix) for a in wanted}
            assert {type(e) for e in events} == {SessionUp, Resync, Update, EndOfRib}
            got = {r.prefix for e in events if isinstance(e, Update) for r in e.announced}
            assert got >= {"10.9.0.0/24", "fd09::/64"}
            for family in BOTH:
                mine = [
                    type(e) for e in events if isinstance(e, Resync | EndOfRib) and (e.peer, e.family) == (TOR4, family)
                ]
                assert mine == [Resync, EndOfRib]
        assert (node.folder / "exabgp.log").read_text() == before, "ExaBGP did something but talk"
        assert witness.seen() == []
        assert router.table().keys() == {a.prefix for a in wanted}

    run(main())


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "too many"])
def test_agent_restart_with_a_peer_that_cannot_be_asked(bird: Bird, node: Node, kept: bool) -> None:
    """Without route refresh (RFC 2918) the relay tells what it heard; only for what it cannot keep the session
    restarts, gracefully."""
    bird.options = "enable route refresh off;"
    node.options = () if kept else ("--heard", "100")
    told = {f"10.9.{i}.0/24" for i in range(20)} | {"fd09::/64"}

    async def main() -> None:
        bird.start([*told, "10.99.0.0/24"])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(2))
            await until(lambda: len(ended(events)) == 4)
            config = bird.folder / "bird.conf"
            config.write_text(config.read_text().replace("  route 10.99.0.0/24 blackhole;\n", ""))
            bird.ask("configure")
            await until(lambda: any("10.99.0.0/24" in e.withdrawn for e in events if isinstance(e, Update)))
        for _ in range(2):
            async with node.driver() as (driver, events):
                await until(lambda events=events: len(ended(events)) == 4)
                got = [(e.peer, r) for e in events if isinstance(e, Update) for r in e.announced]
                assert {r.prefix for _, r in got} == told
                assert {r.next_hop for peer, r in got if peer == TOR6 and ":" in r.prefix} == {TOR6}
                restarted = any(isinstance(e, SessionDown) for e in events)
                assert restarted != kept
                if kept:
                    assert len(got) == len({(peer, r.prefix) for peer, r in got}), "each is told once"

    run(main())


def test_killed_relay_restarts_the_speaker(bird: Bird, node: Node, net: Net, tmp_path: Path) -> None:
    """In a quiet moment; test_fault_4 has the other."""
    wanted = blocks(4)

    async def main() -> None:
        bird.start(["10.100.0.0/24"])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(wanted)
            await until(lambda: len(driver.state().confirmed) == 4)
            await until(lambda: any(isinstance(e, EndOfRib) for e in events))
            await witness.begin({a.prefix for a in wanted})
            first = node.process.pid
            os.kill(node.relay(), signal.SIGKILL)
            await until(lambda: node.process.poll() is not None)
            node.start()
            assert node.process.pid != first
            await until(lambda: driver.state().known and len(driver.state().confirmed) == 4)
            await until(lambda: not bird.stale())
            assert bird.table().keys() == {a.prefix for a in wanted}
            assert witness.seen() == []

    run(main())


def test_sigterm_ends_it_cleanly(bird: Bird, node: Node) -> None:
    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            await until(lambda: any(isinstance(e, SessionUp) for e in events))
            node.process.terminate()
            await until(lambda: node.process.poll() is not None)
            assert node.process.returncode == 0

    run(main())


def test_down_peer_is_reported_at_once(bird: Bird, node: Node) -> None:
    """Fault 12: ExaBGP withdraws nothing of a peer that went down, so the agent must hear that it went."""

    async def main() -> None:
        bird.start(["10.9.0.0/24"])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(2))
            await until(lambda: len(driver.state().confirmed) == 2)
            events.clear()
            bird.stop()
            await until(lambda: {e.peer for e in events if isinstance(e, SessionDown)} == {TOR4, TOR6})
            assert driver.state().sent == frozenset()
            assert driver.state().withdrawn_at.keys() == {a.prefix for a in blocks(2)}
            # What changes while a peer is down must not come back from ExaBGP's memory when it returns.
            driver.set_announcements(frozenset({announce("10.244.9.0/26")}))
            bird.start()
            await until(lambda: bird.table().keys() == {"10.244.9.0/26"})
            assert "10.244.0.0/26" not in bird.ask("show", "route", "all")

    run(main())
