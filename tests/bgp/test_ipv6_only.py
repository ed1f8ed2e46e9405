"""Nodes without any IPv4: their router id is 32 bits of their name's hash (RFC 6286)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp import routers
from tests.bgp.agents import OWN6, Agent, peers
from tests.bgp.routers import NODE6, TOR6
from tests.conftest import eventually

FAR = "fd00:10:244::80/122"


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_a_session_comes_up_and_routes_pass(net: Net, tmp_path: Path, kind: str) -> None:
    net.add("node", forwarding=True)
    net.add("tor", forwarding=True)
    net.link("node", "up0", "tor", "down0")
    net.address("node", "up0", [f"{NODE6}/64"])
    net.address("tor", "down0", [f"{TOR6}/64"])
    only = {name: spec for name, spec in peers().items() if ":" in spec.peer_ip}
    agent = Agent(net, tmp_path, peers=only, addresses=(NODE6,), blocks=(OWN6,))
    router = routers.KINDS[kind](net, tmp_path)
    agent.start_speaker()
    agent.start()
    eventually(lambda: any(line.startswith("blackhole") for line in agent.routes()))
    router.start([FAR], families=("6",))
    eventually(lambda: router.table().keys() == {OWN6})
    wanted = f"{FAR} via {TOR6} dev up0 proto 143 src {NODE6} metric 2048 pref medium"
    eventually(lambda: wanted in agent.routes())
    # What the agent writes first need not have a router id yet.
    own = eventually(lambda: (status := agent.status()) and status.status.router_id)
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", own)
    assert router.identifier(NODE6) == own
