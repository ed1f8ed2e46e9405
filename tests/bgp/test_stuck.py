"""Peers that take nothing, or say a byte a second: nobody else waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from agent.bgp.model import SessionDown
from lab.net import Net
from tests.bgp.conftest import Node, announce, run, session, until
from tests.bgp.hostile import CANARY, HERE, Rack
from tests.bgp.routers import TOR4, Bird


def resident(pid: int) -> int:
    """Bytes of memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def closed(rack: Rack) -> None:
    """The first peer's window is closed in the middle of a large table, and it says that it lives."""
    slow = rack.raws[0]
    slow.reading.clear()
    rack.announced |= {
        announce(f"10.{100 + i // 250}.{i % 250}.0/24", med=i, peer=slow.address, next_hop=HERE) for i in range(2000)
    }
    rack.driver.set_announcements(rack.announced)
    await until(lambda: 0 < len(rack.driver.state().confirmed) < 2000)


def test_a_peer_that_stops_reading_holds_up_nobody_else(net: Net, bird: Bird, node: Node) -> None:
    """ExaBGP has the rest of the table at hand until the peer reads on, and goes on with the other peer."""
    rack = Rack(net, node, bird, 1, buffer=2048)
    (slow,) = rack.raws

    async def main() -> None:
        async with rack.running():
            await closed(rack)
            before = {pid: resident(pid) for pid in (node.process.pid, node.relay())}
            await rack.sound()
            waiting = net.run("node", ["ss", "-Htn", "dst", slow.address]).stdout.split()
            assert int(waiting[2]) > 10_000, "there was room for all"
            assert len(slow.told) < 100
            grown = {pid: resident(pid) - size for pid, size in before.items()}
            assert max(grown.values()) < 20 << 20
            slow.reading.set()
            whole = {(a.peer, a.prefix) for a in rack.announced}
            await until(lambda: whole <= rack.driver.state().confirmed)
            await until(lambda: len(slow.told) >= 2000)
            assert (slow.ups, slow.notifications) == (1, [])

    run(main(), 120)


def test_a_peer_that_takes_nothing_is_left_in_the_end(net: Net, bird: Bird, node: Node) -> None:
    """RFC 9687: or ExaBGP would burn a core for ever, and no block be withdrawn from all peers (R9)."""
    node.options = ("--send-hold", "5")
    rack = Rack(net, node, bird, 1, buffer=2048)
    (slow,) = rack.raws

    async def main() -> None:
        async with rack.running():
            await closed(rack)
            await until(lambda: [e.peer for e in rack.events if isinstance(e, SessionDown)] == [slow.address])
            await until(lambda: {peer for peer, _ in rack.driver.state().sent} == {TOR4})
            slow.reading.set()
            await until(lambda: slow.ups == 2)
            await rack.sound()

    run(main(), 120)


def test_a_peer_that_takes_nothing_keeps_no_configuration_away(net: Net, bird: Bird, node: Node) -> None:
    """ExaBGP loses a reload while announcements are pending (exabgp.md, fault 2), and so it would be restarted."""
    rack = Rack(net, node, bird, 2, buffer=2048)
    slow, other = rack.raws

    async def main() -> None:
        async with rack.running():
            await closed(rack)
            rack.announced |= {announce("10.200.0.0/24", peer=slow.address, next_hop=HERE)}
            rack.driver.set_announcements(rack.announced)
            left = {session(name=slow.address, address=slow.address, local_address=HERE), session()}
            rack.driver.set_sessions(frozenset(left))
            await until(lambda: not other.up)
            await rack.sound()

    run(main(), 120)


def test_a_peer_that_says_a_byte_a_second_is_dead_in_time(net: Net, bird: Bird, node: Node) -> None:
    rack = Rack(net, node, bird, 1, hold=3)
    (slow,) = rack.raws

    async def main() -> None:
        async with rack.running():
            ups, old = slow.ups, len(slow.notifications)
            slow.keepalives = False
            for byte in rack.canary(slow)[:8]:
                with contextlib.suppress(OSError):
                    await slow.say(bytes([byte]))
                if slow.notifications[old:]:
                    break
                await asyncio.sleep(1)
            assert slow.notifications[old:][:1] == [(4, 0)], "the hold timer expired (RFC 4271, 6.5)"
            slow.keepalives = True
            await until(lambda: slow.ups > ups)
            await until(lambda: CANARY in rack.seen()[0].peers[slow.address].routes)
            await rack.sound()

    run(main(), 120)


def test_a_peer_that_names_no_family_is_not_stuck(net: Net, bird: Bird, node: Node) -> None:
    """ExaBGP tells it nothing, not even an End-of-RIB."""
    node.options = ("--send-hold", "5")
    rack = Rack(net, node, bird, 1, families=())
    (plain,) = rack.raws

    async def main() -> None:
        async with rack.running():
            rack.announced |= {announce("10.244.1.0/26", peer=plain.address, next_hop=HERE)}
            rack.driver.set_announcements(rack.announced)
            await asyncio.sleep(8)  # longer than it may take nothing
            assert (plain.ups, plain.told) == (1, [])
            assert "names no family" in node.log.read_text()
            await rack.sound()

    run(main(), 120)
