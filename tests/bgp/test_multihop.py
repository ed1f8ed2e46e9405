"""A peer two hops away, a whole agent and a real router: how it is reached, and what of it comes in."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.net import Net
from store.model import BGPPeer, BGPPeerSpec
from tests.bgp import routers
from tests.bgp.agents import OWN4, OWN6, Agent
from tests.bgp.routers import NODE4, NODE6, TOR_AS, Ends
from tests.conftest import eventually

#: The router is behind the machine ``mid``, which only forwards.
FAR = Ends(NODE4, "10.0.9.2", NODE6, "fd00:9::2")
MID4, MID6 = "10.0.1.254", "fd00:1::fe"
THEIRS4, THEIRS6 = "10.244.9.0/26", "fd00:10:244:9::/122"

Begin = Callable[..., tuple[Agent, routers.Router]]


@pytest.fixture
def begin(net: Net, tmp_path: Path) -> Iterator[Begin]:
    """Starts a router of this kind, and the agent with a BGPPeer of each family; ``gateway``: it says the way."""
    agents: list[Agent] = []

    def wire() -> None:
        for name in ("node", "mid", "tor"):
            net.add(name, forwarding=True)
        net.link("node", "up0", "mid", "down0")
        net.link("mid", "up0", "tor", "down0")
        net.address("node", "up0", [f"{NODE4}/24", f"{NODE6}/64"])
        net.address("mid", "down0", [f"{MID4}/24", f"{MID6}/64"])
        net.address("mid", "up0", ["10.0.9.254/24", "fd00:9::fe/64"])
        net.address("tor", "down0", [f"{FAR.tor4}/24", f"{FAR.tor6}/64"])
        net.run("tor", ["ip", "route", "add", "10.0.1.0/24", "via", "10.0.9.254"])
        net.run("tor", ["ip", "route", "add", "fd00:1::/64", "via", "fd00:9::fe"])

    def start(kind: str, *, gateway: bool) -> tuple[Agent, routers.Router]:
        wire()
        router = routers.KINDS[kind](net, tmp_path, "tor", FAR)
        router.start([THEIRS4, THEIRS6], hops=2)
        ways = ((FAR.tor4, MID4), (FAR.tor6, MID6))
        peers = {
            f"far-{'6' if ':' in address else '4'}": BGPPeerSpec(
                peer_ip=address, as_number=TOR_AS, node="node-1", reachable_by=way if gateway else ""
            )
            for address, way in ways
        }
        agent = Agent(net, tmp_path, peers=peers)
        agents.append(agent)
        agent.start_speaker()
        return agent, router

    yield start
    for agent in agents:
        if agent.process is not None and agent.process.poll() is None:
            agent.stop(signal.SIGKILL)
        for log in (tmp_path / "agent.log", tmp_path / "speaker.log"):
            if log.exists():
                print(f"--- {log.name}\n{log.read_text()[-4000:]}")


def imports(agent: Agent) -> list[str]:
    return [line for line in agent.routes() if "proto 143" in line]


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_a_gateway_leads_to_the_peer_and_to_what_it_announces(begin: Begin, kind: str) -> None:
    agent, router = begin(kind, gateway=True)
    agent.start()
    eventually(lambda: router.table().keys() == {OWN4, OWN6})
    wanted = [
        f"{FAR.tor4} via {MID4} dev up0 proto 143 src {NODE4} metric 2048",
        f"{THEIRS4} via {MID4} dev up0 proto 143 src {NODE4} metric 2048",
        f"{FAR.tor6} via {MID6} dev up0 proto 143 src {NODE6} metric 2048 pref medium",
        f"{THEIRS6} via {MID6} dev up0 proto 143 src {NODE6} metric 2048 pref medium",
    ]
    eventually(lambda: imports(agent) == sorted(wanted))
    agent.store(lambda store: store.delete(BGPPeer, "far-4"))
    agent.store(lambda store: store.delete(BGPPeer, "far-6"))
    eventually(lambda: imports(agent) == [])


def test_somebody_elses_route_to_the_peer_stays_and_is_named(begin: Begin, net: Net) -> None:
    """R10, with the very prefix and metric that ours would have."""
    agent, router = begin("bird", gateway=True)
    theirs = f"{FAR.tor4} via {MID4} dev up0 proto static metric 2048"
    net.run("node", ["ip", "route", "add", *theirs.split()])
    agent.start()
    eventually(lambda: router.table().keys() == {OWN4, OWN6})

    def named() -> bool:
        status = agent.status()
        return status is not None and any(
            c.type == "ForeignRoute" and f"{FAR.tor4}/32" in c.message for c in status.status.conditions
        )

    eventually(named)
    assert net.run("node", ["ip", "route", "show", FAR.tor4]).stdout.split() == theirs.split()


def test_without_a_gateway_we_announce_by_the_nodes_own_routes_and_nothing_comes_in(begin: Begin, net: Net) -> None:
    """R11: a next hop that is on no link is resolved by no other route, and that is said."""
    agent, router = begin("bird", gateway=False)
    net.run("node", ["ip", "route", "add", "default", "via", MID4])
    net.run("node", ["ip", "route", "add", "default", "via", MID6])
    agent.start()
    eventually(lambda: router.table().keys() == {OWN4, OWN6})

    def named() -> bool:
        status = agent.status()
        said = [c.message for c in status.status.conditions if c.type == "NextHopNotOnLink"] if status else []
        return bool(said) and all(f"far-{f}: 1 prefixes" in said[0] for f in "46")

    eventually(named)
    assert imports(agent) == []
