"""What the well-known communities say is done, in both directions."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import pytest

from agent.bgp.model import Announcement
from agent.filters import Candidate, compiled
from agent.plan.exports import announcement
from agent.prefix import parse
from lab.net import Net
from store.model import AddCommunity, BGPFilter, BGPFilterSpec, FilterOperation, FilterRuleV4, Meta
from tests.bgp import routers
from tests.bgp.agents import OWN4
from tests.bgp.conftest import SESSIONS, Node, run, session, until
from tests.bgp.raw import END_OF_RIB, Raw, communities, nlri, update, usual
from tests.bgp.routers import NODE4, SECOND, TOR4, Router
from tests.bgp.worlds import HONEST, World
from tests.conftest import eventually

BLOCK = "10.244.0.0/26"
NO_EXPORT, NO_ADVERTISE, SHUTDOWN = "65535:65281", "65535:65282", "65535:0"
#: Behind both ToRs.
FAR, SERVER = "10.244.3.0/26", "10.244.3.1"


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_a_tor_that_is_drained_is_left_before_its_session_goes(net: Net, tmp_path: Path, kind: str) -> None:
    """RFC 8326: it says that it goes, traffic leaves it, and nothing is lost when it is killed then."""
    world = World(net, tmp_path)
    world.start()
    leaving = routers.KINDS[kind](net, tmp_path)
    leaving.start([FAR])
    for tor in ("tor", "tor2"):
        net.address(tor, "lo", [f"{SERVER}/32"])
    net.ip("tor2", [f"route add {NODE4}/32 via {SECOND.node4}"])  # the node's own address is on the other's subnet

    def over(*devices: str) -> bool:
        out = net.run("node", ["ip", "route", "show", FAR]).stdout
        return sorted(re.findall(r"dev (up\d)", out)) == list(devices)

    eventually(lambda: over("up0", "up1"))
    ping = net.spawn("node", ["stdbuf", "-oL", "ping", "-i", "0.02", SERVER], log=tmp_path / "pings")
    eventually(lambda: (tmp_path / "pings").read_text().count("bytes from") > 10)
    leaving.drain()
    eventually(lambda: over("up1"))
    eventually(lambda: world.told("tor-4").state == "Established")  # its routes are in the kernel before it is written
    assert over("up1")
    leaving.stop()
    eventually(lambda: world.told("tor-4").state != "Established")
    net.ip("tor", ["link set down0 down"])
    ping.send_signal(signal.SIGINT)
    ping.wait(timeout=60)
    sent, got = re.search(r"(\d+) packets transmitted, (\d+) received", (tmp_path / "pings").read_text()).groups()  # type: ignore[union-attr]
    assert int(sent) - int(got) <= 1, "more than the one that may have been under way"


def test_nothing_that_was_received_is_announced(net: Net, tmp_path: Path) -> None:
    """R12, and so NO_EXPORT and NO_ADVERTISE are honoured: two peers hear of our own blocks alone."""
    world = World(net, tmp_path)
    world.start()
    teller = Raw(net)
    told = {"10.244.16.0/26": (), "10.244.17.0/26": (NO_EXPORT,), "10.244.18.0/26": (NO_ADVERTISE,)}

    async def main() -> None:
        async with teller.running():
            said = [update(usual(TOR4, communities(*c) if c else b""), nlri(p)) for p, c in told.items()]
            teller.greeting = b"".join((*said, END_OF_RIB))
            await asyncio.to_thread(
                lambda: eventually(lambda: world.imports() == {*told, *HONEST}),
            )
            # What is announced after they came would have them before it, if ever they went out.
            await asyncio.to_thread(world.agent.claim, "10.244.1.64/26")
            await until(lambda: any(nlri("10.244.1.64/26") in body for body in teller.told))
            await until(lambda: "10.244.1.64/26" in world.honest.table())
            assert set(world.honest.table()) - {"10.244.1.64/26"} == {OWN4, "fd00:10:244::40/122"}
            for prefix in (*told, HONEST[0]):
                assert not any(nlri(prefix) in body for body in teller.told)

    run(main(), 120)


@pytest.mark.parametrize("text", ["no-export", NO_EXPORT])
def test_our_filters_add_well_known_communities_by_name_or_number(router: Router, node: Node, text: str) -> None:
    add = tuple(FilterOperation(add_community=AddCommunity(value=v)) for v in (text, "graceful-shutdown", "65100:7"))
    made = BGPFilter(
        metadata=Meta(name="f"), spec=BGPFilterSpec(export_v4=(FilterRuleV4(action="Accept", operations=add),))
    )
    rule = compiled([made], "export", external=True).decide(Candidate(parse(BLOCK)))
    wanted: frozenset[Announcement] = frozenset({announcement(BLOCK, session("4"), rule)})

    async def main() -> None:
        router.start([])
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(wanted)
            await until(lambda: BLOCK in router.table())
            assert router.communities(BLOCK) == {NO_EXPORT, SHUTDOWN, "65100:7"}

    run(main())
