"""A ToR that announces what it must not: the node's own connectivity stays, and so does the other ToR's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp import routers
from tests.bgp.agents import OWN4, OWN6
from tests.bgp.conftest import run
from tests.bgp.raw import Raw, nlri, update, usual
from tests.bgp.routers import NODE4, NODE_AS, SECOND, TOR4, TOR_AS
from tests.bgp.worlds import HONEST, WORLD4, WORLD6, World
from tests.conftest import eventually

BAD = (
    *("0.0.0.0/0", "::/0"),
    # Our own blocks, and what is in them.
    *(OWN4, "10.244.1.8/29", "10.244.1.5/32", OWN6, "fd00:10:244::41/128"),
    # The management network, by itself and by what holds it; the world that is reached through it.
    *("192.168.0.0/24", "192.168.0.0/16", "192.168.0.254/32", "198.51.100.0/24", "2001:db8:1::/64", "2001:db8::/32"),
    # The uplinks: more specific than they are, our own address, and all of them.
    *("10.0.0.0/8", "10.0.1.0/25", "10.0.2.2/32", f"{NODE4}/32", "fd00::/8", "fd00:2::2/128"),
)
GOOD = ("10.244.2.0/26", "10.244.0.0/16", "fd00:10:244::80/122")


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_nothing_comes_in_that_is_the_node_s_own(net: Net, tmp_path: Path, kind: str) -> None:
    world = World(net, tmp_path)
    world.start()
    bad = routers.KINDS[kind](net, tmp_path)
    bad.start((*BAD, *GOOD))
    wanted = {*GOOD, *HONEST}
    eventually(lambda: world.imports() == wanted)

    def received() -> bool:
        four, six = world.told("tor-4"), world.told("tor-6")
        assert (four.received, six.received) == (
            sum(":" not in p for p in (*BAD, *GOOD)),
            sum(":" in p for p in (*BAD, *GOOD)),
        )
        assert (four.accepted, six.accepted) == (2, 1)
        return True

    eventually(received)
    assert world.imports() == wanted
    said = world.conditions()["ForeignRoute"]
    assert all(prefix in said for prefix in (OWN4, "10.244.1.8/29", "10.244.1.5/32", OWN6, "fd00:10:244::41/128"))
    # A default route that may come in stands behind the node's own.
    for name in ("tor-4", "tor-6"):
        world.change(name, default_route="Fallback")
    eventually(lambda: world.imports() == wanted | {"0.0.0.0/0", "::/0"})
    assert all("metric 4096" in line for line in world.agent.routes() if line.startswith("default"))
    for target in (WORLD4, WORLD6):
        assert "dev mgmt0" in net.run("node", ["ip", "route", "get", target]).stdout
    world.sound()
    net.ip("node", ["route del default via 192.168.0.254"])
    assert f"via {TOR4} dev up0" in net.run("node", ["ip", "route", "get", WORLD4]).stdout


def test_a_wide_import_leads_no_session_away_from_its_link(net: Net, tmp_path: Path) -> None:
    """importCIDRs that hold the uplinks: the addresses of ToRs and node stay where they are."""
    world = World(net, tmp_path, import_cidrs=("10.0.0.0/8", "fd00::/8"))
    world.start()
    wide = {"10.0.0.0/8", "10.9.0.0/16", "fd00:9::/64"}
    bad = routers.Bird(net, tmp_path)
    bad.start((*wide, "10.0.2.2/32", "10.0.2.0/30", f"{NODE4}/32", "fd00:2::2/128", "fd00:2::/112"))
    eventually(lambda: world.imports() == {*wide, *HONEST})
    eventually(lambda: (world.told("tor-4").received, world.told("tor-6").received) == (5, 3))
    assert world.imports() == {*wide, *HONEST}
    assert f"{SECOND.tor4} dev up1" in net.run("node", ["ip", "route", "get", SECOND.tor4]).stdout
    world.sound()


def test_next_hops_and_paths_that_lead_nowhere(net: Net, tmp_path: Path) -> None:
    """Byte by byte, as no router would say most of it. The pod lives, and its route is on the link."""
    world = World(net, tmp_path)
    net.add("pod")
    net.link("node", "pod0", "pod", "eth0")
    net.ip("node", ["route add 10.244.1.5/32 dev pod0 proto 141 metric 32"])
    world.start()
    bad = Raw(net)
    hops = {
        "10.244.16.0/26": usual("10.244.1.5"),
        "10.244.17.0/26": usual("10.9.9.9"),
        "10.244.18.0/26": usual(WORLD4),
        "10.244.19.0/26": usual(NODE4),
        "10.244.20.0/26": usual("10.244.2.1"),  # in a prefix that it announces itself
        "10.244.21.0/26": usual(path=(TOR_AS, NODE_AS)),
        "10.244.22.0/26": usual(path=(65009, TOR_AS)),
    }
    good = update(usual(), nlri("10.244.2.0/26"))

    async def main() -> None:
        async with bad.running():
            bad.greeting = b"".join((good, *(update(said, nlri(prefix)) for prefix, said in hops.items()), good))

            def judged() -> bool:
                session = world.told("tor-4")
                assert (session.received, session.accepted) == (len(hops) + 1, 1)
                assert world.imports() == {"10.244.2.0/26", *HONEST}
                return True

            await asyncio.to_thread(lambda: eventually(judged))
            said = await asyncio.to_thread(world.conditions)
            assert "tor-4: 4 prefixes" in said["NextHopNotOnLink"]
            assert "NextHopIsSelf" in said["RoutesRefused"]
            assert "FirstASNotPeer" in said["RoutesRefused"]

    run(main(), 120)
    world.sound()
