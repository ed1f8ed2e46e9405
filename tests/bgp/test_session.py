"""Sessions, tables and configuration, as the agent uses them."""

from __future__ import annotations

from agent.bgp.model import EndOfRib, SessionUp, Update
from tests.bgp.conftest import BOTH, SESSIONS, Node, announce, run, until
from tests.bgp.routers import TOR4, TOR6, Router


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

            ends = {(e.peer, e.family) for e in events if isinstance(e, EndOfRib)}
            (
                await until(
                    lambda: (
                        {(e.peer, e.family) for e in events if isinstance(e, EndOfRib)}
                        >= {(peer, family) for peer in (TOR4, TOR6) for family in BOTH}
                    )
                ),
                ends,
            )
            ups = {e.peer: e for e in events if isinstance(e, SessionUp)}
            assert ups[TOR4].families == BOTH
            assert ups[TOR4].helper
            assert ups[TOR4].graceful_restart == BOTH
            assert ups[TOR4].restart_time == 60
            got = {r.prefix: r for e in events if isinstance(e, Update) for r in e.announced}
            assert got["10.9.0.0/24"].next_hop == TOR4
            assert got["fd09::/64"].next_hop == TOR6
            assert got["10.9.0.0/24"].attributes.as_path == (65001,)

    run(main())
