"""Sessions, tables and configuration, as the agent uses them."""

from __future__ import annotations

from pathlib import Path

from agent.bgp.model import EndOfRib, Event, Resync, Session, SessionUp, Update
from lab.net import Net
from tests.bgp.conftest import BOTH, SESSIONS, Node, announce, blocks, ended, run, session, until
from tests.bgp.routers import NODE4, NODE_AS, TOR4, TOR6, Router, wire


def test_both_families_go_both_ways(router: Router, node: Node) -> None:
    async def main() -> None:
        router.start(["10.9.0.0/24", "fd09::/64"])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            # Each prefix also over the session of the other family: next hops are explicit (fault 13).
            wanted = {
                announce("10.244.0.0/26", med=7),
                announce("fd00:10:244::/122"),
                announce("10.244.0.64/26", peer=TOR6),
                announce("fd00:10:244::40/122", peer=TOR4),
            }
            driver.set_announcements(frozenset(wanted))
            await until(lambda: router.table().keys() == {a.prefix for a in wanted})
            assert "med 7" in router.table()["10.244.0.0/26"]
            await until(lambda: driver.state().confirmed == {(a.peer, a.prefix) for a in wanted})
            assert driver.state().sent == driver.state().confirmed

            everything = {(peer, family) for peer in (TOR4, TOR6) for family in BOTH}
            await until(lambda: {(e.peer, e.family) for e in events if isinstance(e, EndOfRib)} >= everything)
            ups = {e.peer: e for e in events if isinstance(e, SessionUp)}
            assert ups[TOR4].families == BOTH
            assert ups[TOR4].helper
            assert ups[TOR4].graceful_restart == BOTH
            assert ups[TOR4].restart_time == 60
            # By peer: over the session of the other family FRR may say 0.0.0.0, which the agent refuses (R11).
            got = {(e.peer, r.prefix): r for e in events if isinstance(e, Update) for r in e.announced}
            assert got[TOR4, "10.9.0.0/24"].next_hop == TOR4
            assert got[TOR6, "fd09::/64"].next_hop == TOR6
            assert got[TOR4, "10.9.0.0/24"].attributes.as_path == (65001,)

    run(main())


def mesh(net: Net, folder: Path) -> tuple[frozenset[Session], frozenset[Session], Node]:
    """A second node, where the router would be: the sessions of both ends, of which the second's waits, and itself."""
    wire(net)
    (folder / "other").mkdir()
    here = frozenset({session("4", peer_as=NODE_AS), session("6", peer_as=NODE_AS)})
    there = frozenset(
        Session(
            name="mesh",
            address=s.local_address,
            local_address=s.address,
            local_as=NODE_AS,
            peer_as=NODE_AS,
            router_id=TOR4,
            families=s.families,
            passive=True,
        )
        for s in here
    )
    return here, there, Node(net, folder / "other", "tor")


def learned(events: list[Event]) -> set[str]:
    return {r.prefix for e in events if isinstance(e, Update) for r in e.announced}


def test_two_nodes_of_a_mesh(net: Net, tmp_path: Path, node: Node) -> None:
    """Node to node: one side waits, both speak iBGP, and either may restart its agent or its speaker."""
    here, there, other = mesh(net, tmp_path)
    back = frozenset({announce("10.245.0.0/26", peer=NODE4, next_hop=TOR4)})

    async def main() -> None:
        node.start()
        other.start()
        async with node.driver() as (one, told_one), other.driver() as (two, told_two):
            one.set_sessions(here)
            two.set_sessions(there)
            one.set_announcements(blocks(4))
            two.set_announcements(back)
            await until(lambda: learned(told_two) == {a.prefix for a in blocks(4)})
            await until(lambda: learned(told_one) == {"10.245.0.0/26"})
            await until(lambda: len(ended(told_one)) == len(ended(told_two)) == 4)
        async with other.driver() as (again, told_again):
            again.set_sessions(there)
            again.set_announcements(back)
            await until(lambda: len(ended(told_again)) == 4)
            assert learned(told_again) == {a.prefix for a in blocks(4)}
            node.kill()
            told_again.clear()
            node.start()
            await until(lambda: len(ended(told_again)) == 4)
            assert learned(told_again) == {a.prefix for a in blocks(4)}

    run(main())


def test_what_a_node_of_a_mesh_lacks_is_not_waited_for(net: Net, tmp_path: Path, node: Node) -> None:
    """Sessions are there before the agent is: it asks for all routes, and an ExaBGP that has none answers nothing. But
    it said so once, by its End-of-RIB."""
    here, there, other = mesh(net, tmp_path)
    node.options = ("--silence", "3600")
    back = frozenset({announce("10.245.0.0/26", peer=NODE4, next_hop=TOR4)})

    async def main() -> None:
        node.write_conf(here)
        node.start()
        other.start()
        async with other.driver() as (two, told_two):
            two.set_sessions(there)
            two.set_announcements(back)
            await until(lambda: sum(isinstance(e, SessionUp) for e in told_two) == 2)
            async with node.driver() as (one, told_one):
                one.set_sessions(here)
                one.set_announcements(frozenset())
                await until(lambda: len(ended(told_one)) == 4)
                assert learned(told_one) == {"10.245.0.0/26"}
            async with node.driver() as (_, told_one):
                await until(lambda: len(ended(told_one)) == 4)
                assert learned(told_one) == {"10.245.0.0/26"}

    run(main())


def test_an_answer_of_a_peer_that_has_no_table_yet_is_not_its_end(net: Net, tmp_path: Path, node: Node) -> None:
    """Both speakers have just started, and the peer's is asked for its routes before its relay gave it any. ExaBGP then
    answers that it begins and ends, and only then tells what came meanwhile: by that end, routes went for 25 ms."""
    here, there, other = mesh(net, tmp_path)
    back = frozenset({announce("10.245.0.0/26", peer=NODE4, next_hop=TOR4)})

    async def main() -> None:
        node.write_conf(here)
        other.write_conf(there)
        other.start()
        node.start()
        async with node.driver() as (one, told):
            one.set_sessions(here)
            one.set_announcements(blocks(4))
            await until(lambda: sum(isinstance(e, SessionUp) for e in told) == 2)
        async with node.driver() as (_, told):
            await until(lambda: sum(isinstance(e, Resync) for e in told) == 4)
            async with other.driver() as (two, _):
                two.set_sessions(there)
                two.set_announcements(back)
                await until(lambda: len(ended(told)) == 4)
        peer_told = [e for e in told if e.peer == TOR4]
        ends = [isinstance(e, EndOfRib) and e.family == "ipv4 unicast" for e in peer_told].index(True)
        assert learned(peer_told[:ends]) == {"10.245.0.0/26"}

    run(main())
