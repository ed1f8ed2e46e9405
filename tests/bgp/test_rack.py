"""The lab's routers by themselves: they take the configuration, use both spines, take only pools from a node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from lab import rack, routers
from lab.bird import protocol_name
from lab.net import Net, NetError
from lab.topology import Node, Software, Topology
from tests.conftest import eventually

MAPS: Mapping[Software, Topology] = {
    "bird": Topology.build(racks=2, nodes=1, pods=0, spines=2),
    "frr": Topology.build(racks=2, nodes=1, pods=0, spines=2, tor="frr"),
}
MAP = MAPS["bird"]

SPEAKER = """
log stderr all;
router id {v4};
protocol device {{ }}
protocol static {{ ipv4; {routes4} }}
protocol static {{ ipv6; {routes6} }}
protocol bgp tor4 {{ local {v4} as {asn}; neighbor {tor4} as {tor_asn}; connect delay time 1;
  ipv4 {{ import none; export all; }}; }}
protocol bgp tor6 {{ local {v6} as {asn}; neighbor {tor6} as {tor_asn}; connect delay time 1;
  ipv6 {{ import none; export all; }}; }}
"""


@pytest.fixture(params=["bird", "frr"])
def software(request: pytest.FixtureRequest) -> Software:
    return request.param


@pytest.fixture
def fabric(software: Software, net: Net, tmp_path: Path) -> Net:
    rack.build(net, MAP)
    for router in MAP.routers:
        routers.start(net, MAPS[software], router, tmp_path / router.name)
    return net


def speak(net: Net, folder: Path, node: Node, prefixes: list[str]) -> None:
    """A BIRD in the node that announces the prefixes, good and bad."""
    folder.mkdir()
    (uplink,) = node.uplinks
    lines = {
        family: " ".join(f"route {p} blackhole;" for p in prefixes if (":" in p) == (family == 6)) for family in (4, 6)
    }
    (folder / "bird.conf").write_text(
        SPEAKER.format(
            v4=node.addresses[0],
            v6=node.addresses[1],
            tor4=uplink.gateways[0],
            tor6=uplink.gateways[1],
            asn=node.asn,
            tor_asn=uplink.asn,
            routes4=lines[4],
            routes6=lines[6],
        )
    )
    net.spawn(node.name, routers.bird_argv(folder), log=folder / "log")


def test_equal_paths_over_both_spines_are_one_route(fabric: Net) -> None:
    for family, prefix in (("-4", "10.2.0.0/31"), ("-6", "fd00:10:2::/127")):

        def hops(family: str = family, prefix: str = prefix) -> bool:
            told = json.loads(fabric.run("tor-1", ["ip", family, "-j", "route", "show", prefix]).stdout or "[]")
            return [len(route.get("nexthops", ())) for route in told] == [2]

        eventually(hops)


def test_a_tor_takes_blocks_of_the_pools_and_nothing_else(software: Software, fabric: Net, tmp_path: Path) -> None:
    good = ["10.244.7.64/26", "10.244.9.9/32", "fd00:10:244::700/122", "fd00:10:244::909/128"]
    bad = ["10.244.0.0/16", "10.244.8.0/25", "192.0.2.0/26", "10.1.0.0/31", "fd00:10:244::/112", "2001:db8::/122"]
    speak(fabric, tmp_path / "node", MAP.nodes[0], good + bad)

    def probe() -> bool:
        told = {r for f in (4, 6) for r in accepted(software, fabric, tmp_path / "tor-1", f)}
        assert told == set(good)
        return rack.routes(fabric, "tor-2", protocol=routers.PROTOCOL[software]) >= set(good)

    eventually(probe)
    assert not (set(bad) - {"10.1.0.0/31"}) & rack.routes(fabric, "spine-1")


def accepted(software: Software, net: Net, folder: Path, family: int) -> set[str]:
    """What tor-1 holds from node-1 over the session of this family."""
    if software == "bird":
        words = ("show", "route", "primary", "protocol", protocol_name("node-1", family))
        said = routers.birdc(net, "tor-1", folder, *words)
        return {line.split()[0] for line in said.splitlines() if "unicast" in line}
    peer = MAP.nodes[0].addresses[(4, 6).index(family)]
    try:
        words = f"show bgp ipv{family} unicast neighbors {peer} routes json"
        return set(json.loads(routers.vtysh(net, "tor-1", folder, words))["routes"])
    except (NetError, ValueError, KeyError):  # it has only just been started
        return set()


def test_a_cut_takes_the_carrier_and_a_mend_gives_everything_back(fabric: Net, tmp_path: Path) -> None:
    link = MAP.link("node-1", "tor-1")
    assert link is not None
    before = rack.routes(fabric, "node-1"), rack.routes(fabric, "tor-1", protocol="kernel")
    rack.cut(fabric, link)
    told = json.loads(fabric.run("node-1", ["ip", "-j", "link", "show", "tor-1"]).stdout)
    assert "NO-CARRIER" in told[0]["flags"]
    assert "UP" in told[0]["flags"]
    rack.mend(fabric, link)
    eventually(lambda: (rack.routes(fabric, "node-1"), rack.routes(fabric, "tor-1", protocol="kernel")) == before)
    fabric.run("node-1", ["ping", "-c", "1", "-W", "10", "-6", MAP.nodes[0].uplinks[0].gateways[1]])


def test_missing_names_who_lacks_what(fabric: Net) -> None:
    assert rack.missing(fabric, ["tor-1"], frozenset({"10.1.0.0/31"}), protocol="kernel") is None
    assert rack.missing(fabric, ["tor-1", "tor-2"], frozenset({"10.1.0.0/31"}), protocol="kernel") == (
        "tor-2",
        "10.1.0.0/31",
    )
