"""What changed while nobody looked: a ToR that went for good, a block that was given back."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from agent.bgp.model import Announcement
from lab.net import Net
from store.base import Store
from store.model import BGPPeer
from tests.bgp import routers
from tests.bgp.conftest import SESSIONS, Node, announce, blocks, run, session, until
from tests.bgp.routers import SECOND
from tests.bgp.test_restarting_peers import KEPT, KEPT6
from tests.bgp.worlds import HONEST, World
from tests.conftest import eventually


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "dead"])
def test_a_tor_that_is_gone_has_no_routes_after_an_agent_restart(net: Net, tmp_path: Path, deleted: bool) -> None:
    """Its BGPPeer was deleted while the agent was away, or it died then for ever: its routes leave the kernel, those of
    the other ToR stay."""
    world = World(net, tmp_path, max_restart_time="4s")
    world.start()
    gone = routers.Bird(net, tmp_path)
    gone.start([KEPT, KEPT6], restart=4)
    eventually(lambda: world.imports() == {KEPT, KEPT6, *HONEST})
    world.agent.stop()
    gone.stop()
    if deleted:

        async def delete(store: Store) -> None:
            for name in ("tor-4", "tor-6"):
                await store.delete(BGPPeer, name)

        world.agent.store(delete)
    assert world.imports() == {KEPT, KEPT6, *HONEST}
    world.agent.start()
    eventually(lambda: world.imports() == set(HONEST))
    world.sound()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_speaker_restart_with_the_agent_away_leaves_no_ghost(
    net: Net, tmp_path: Path, node: Node, how: signal.Signals
) -> None:
    """Blocks are withdrawn, the agent goes, the speaker restarts: neither ToR, a BIRD and an FRR, sees them again."""
    routers.wire(net)
    routers.attach(net, "tor2", "up1", SECOND)
    bird, frr = routers.Bird(net, tmp_path), routers.Frr(net, tmp_path, "tor2", SECOND)
    tors = (bird, frr)
    second = {
        session("4", name="second-4", address=SECOND.tor4, local_address=SECOND.node4),
        session("6", name="second-6", address=SECOND.tor6, local_address=SECOND.node6),
    }

    def at_both(count: int) -> frozenset[Announcement]:
        mine = blocks(count)
        other = {
            announce(
                a.prefix,
                peer=SECOND.tor6 if ":" in a.prefix else SECOND.tor4,
                next_hop=SECOND.node6 if ":" in a.prefix else SECOND.node4,
            )
            for a in mine
        }
        return mine | other

    async def main() -> None:
        for tor in tors:
            tor.start()
        node.start()
        kept = {a.prefix for a in blocks(4)}
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS | second)
            driver.set_announcements(at_both(8))
            await until(lambda: all(tor.table().keys() == {a.prefix for a in blocks(8)} for tor in tors))
            driver.set_announcements(at_both(4))
            await until(lambda: len(driver.state().sent) == 8)
            # Reported withdrawn is a moment before it is handed to TCP, and the kill would be in between.
            await until(lambda: all(tor.table().keys() == kept for tor in tors))
        node.kill(how)
        if how == signal.SIGKILL:
            await until(lambda: all(tor.stale() for tor in tors))
        node.start()
        seen: set[str] = set()

        def settled() -> bool:
            tables = [tor.table().keys() for tor in tors]
            seen.update(*tables)
            return all(table == kept for table in tables) and not any(tor.stale() for tor in tors)

        log = node.folder / "exabgp.log"
        await until(lambda: log.read_text().count("connected to peer") >= 8)
        await until(settled)
        assert seen <= kept, "a ghost"

    run(main(), 120)
