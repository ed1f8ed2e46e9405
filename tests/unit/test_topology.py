"""The map of a lab: sizes, names, addresses; and what BIRD, store, matrix and picture make of it."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import bird, frr, matrix, picture
from lab.matrix import Path, Pod, Report
from lab.objects import objects
from lab.topology import (
    AS_MESH,
    MAX_MESH,
    MAX_NODES,
    MAX_RACKS,
    SWITCH,
    Shape,
    Topology,
    TopologyError,
    node_of_pod,
    rack_name,
)
from lab.wire import LinkState, NodeState, PodState, ProcessState, RouterState, State
from store import model

racks = st.builds(
    Topology.build,
    racks=st.integers(1, 12),
    nodes=st.integers(1, 8),
    pods=st.integers(0, 4),
    spines=st.integers(1, 3),
    dual_tor=st.booleans(),
    tor=st.sampled_from(("bird", "frr")),
)
meshes = st.builds(
    Topology.build, mesh=st.just(True), nodes=st.integers(1, 60), pods=st.integers(0, 4), ipv6_only=st.booleans()
)
shapes = racks | meshes
SEGMENT = (ip_network("10.1.0.0/24"), ip_network("fd00:10:1::/64"))


def test_the_default_is_the_rack_of_the_issue() -> None:
    t = Topology.build()
    assert [r.name for r in t.routers] == ["spine-1", "tor-1", "tor-2"]
    assert [(n.name, n.rack, n.asn, *(u.tor for u in n.uplinks)) for n in t.nodes] == [
        ("node-1", 1, 65101, "tor-1"),
        ("node-2", 1, 65101, "tor-1"),
        ("node-3", 2, 65102, "tor-2"),
        ("node-4", 2, 65102, "tor-2"),
    ]
    assert t.nodes[0].pods == ("pod-1-1", "pod-1-2", "pod-1-3")
    assert t.nodes[1].addresses == t.nodes[1].uplinks[0].addresses == ("10.1.0.3", "fd00:10:1::3")
    assert t.nodes[1].uplinks[0].gateways == ("10.1.0.2", "fd00:10:1::2")
    assert t.shape == Shape(racks=2, nodes=2, pods=3)
    assert t.shape.options == "--racks 2 --nodes 2 --pods 3"


def test_with_dual_tors_a_node_has_two_uplinks_and_is_known_by_the_first() -> None:
    t = Topology.build(dual_tor=True)
    assert [(r.name, r.rack, r.asn) for r in t.tors] == [
        ("tor-1a", 1, 65001), ("tor-1b", 1, 65201), ("tor-2a", 2, 65002), ("tor-2b", 2, 65202)
    ]  # fmt: skip
    node = t.nodes[2]
    assert [(u.tor, u.asn, u.addresses, u.gateways) for u in node.uplinks] == [
        ("tor-2a", 65002, ("10.2.0.1", "fd00:10:2::1"), ("10.2.0.0", "fd00:10:2::")),
        ("tor-2b", 65202, ("10.2.1.1", "fd00:10:2:1::1"), ("10.2.1.0", "fd00:10:2:1::")),
    ]
    assert node.addresses == node.uplinks[0].addresses
    assert t.shape.options == "--racks 2 --nodes 2 --pods 3 --dual-tor"


def test_a_mesh_is_one_segment_and_nothing_else() -> None:
    t = Topology.build(mesh=True, pods=1)
    assert (t.routers, t.switches) == ((), (SWITCH,))
    assert [(n.name, n.rack, n.asn, n.addresses, n.uplinks) for n in t.nodes] == [
        (f"node-{n}", 0, AS_MESH, (f"10.1.0.{n}", f"fd00:10:1::{n}"), ()) for n in (1, 2, 3, 4)
    ]
    assert [(near.port, far.port) for near, far in t.ends(SWITCH)] == [(n.name, SWITCH) for n in t.nodes]
    assert all(ip_interface(a).network in SEGMENT for link in t.links for a in link.lower.addresses)
    assert t.link("node-3", SWITCH) is not None
    assert t.shape.options == "--mesh --nodes 4 --pods 1"


def test_a_mesh_without_ipv4_has_no_ipv4() -> None:
    t = Topology.build(mesh=True, ipv6_only=True)
    assert [node.addresses for node in t.nodes] == [(f"fd00:10:1::{n}",) for n in (1, 2, 3, 4)]
    assert [link.lower.addresses for link in t.links] == [(f"{node.addresses[0]}/64",) for node in t.nodes]
    assert [pool.name for pool in t.pools] == ["pods-v6"]
    assert t.shape.options == "--mesh --nodes 4 --pods 3 --ipv6-only"


@given(shapes)
@settings(max_examples=20)
def test_a_shape_says_how_to_build_it_again(t: Topology) -> None:
    assert Topology.build(**msgspec.structs.asdict(t.shape)) == t


@given(shapes)
@settings(max_examples=40)
def test_addresses_are_unique_canonical_and_outside_of_every_pool(t: Topology) -> None:
    addresses = [a for link in t.links for end in (link.upper, link.lower) for a in end.addresses]
    assert len(set(addresses)) == len(addresses)
    pools = [ip_network(p.cidr) for p in t.pools]
    for text in addresses:
        assert str(ip_interface(text)) == text
        assert not any(ip_interface(text).ip in pool for pool in pools)
    assert len({r.router_id for r in t.routers}) == len({r.asn for r in t.tors}) + len(t.spines) == len(t.routers)


@given(racks)
@settings(max_examples=40)
def test_every_link_between_routers_and_nodes_is_a_network_of_two(t: Topology) -> None:
    addresses = [a for link in t.links for end in (link.upper, link.lower) for a in end.addresses]
    for link in t.links:
        for upper, lower in zip(link.upper.addresses, link.lower.addresses, strict=True):
            assert ip_interface(upper).network == ip_interface(lower).network
    networks = {ip_interface(a).network for a in addresses}
    assert len(networks) * 2 == len(addresses)


@given(shapes)
@settings(max_examples=40)
def test_every_node_hangs_on_its_tors_and_every_tor_on_every_spine(t: Topology) -> None:
    for node in t.nodes:
        tors = [tor.name for tor in t.tors if tor.rack == node.rack]
        assert [uplink.tor for uplink in node.uplinks] == tors
        assert [far.name for _, far in t.ends(node.name)] == (tors or [SWITCH])
        assert [t.owner(a) for a in node.addresses] == [node.name] * (1 if t.shape.ipv6_only else 2)
        for uplink in node.uplinks:
            assert [t.owner(a) for a in uplink.addresses] == [node.name] * 2
            assert [t.owner(a) for a in uplink.gateways] == [uplink.tor] * 2
    for tor in t.tors:
        for spine in t.spines:
            assert t.link(tor.name, spine.name) == t.link(spine.name, tor.name) is not None
    assert all(len(end.port) <= 15 for link in t.links for end in (link.upper, link.lower))
    names = [m.name for m in t.routers] + [m.name for m in t.nodes] + [p for n in t.nodes for p in n.pods]
    assert len(set(names)) == len(names)
    assert all(node_of_pod(pod) == node.name for node in t.nodes for pod in node.pods)


def test_the_largest_is_still_sound() -> None:
    t = Topology.build(racks=MAX_RACKS, nodes=MAX_NODES, pods=0, dual_tor=True)
    addresses = [a for n in t.nodes for u in n.uplinks for a in u.addresses]
    assert len(set(addresses)) == len(addresses) == 4 * MAX_RACKS * MAX_NODES
    assert all(str(ip_address(a)) == a for a in addresses)
    assert len({a for n in Topology.build(mesh=True, nodes=MAX_MESH).nodes for a in n.addresses}) == 2 * MAX_MESH


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"racks": 0}, "racks"),
        ({"nodes": 65}, "nodes per rack"),
        ({"pods": -1}, "pods per node"),
        ({"spines": 0}, "spin"),
        ({"mesh": True, "nodes": 251}, "nodes of a mesh"),
        ({"ipv6_only": True}, "--ipv6-only is for --mesh"),
        ({"mesh": True, "racks": 2}, "--mesh and --racks: a mesh has no rack"),
        ({"mesh": True, "dual_tor": True}, "--mesh and --dual-tor: a mesh has no rack, ToR"),
        ({"mesh": True, "tor": "frr"}, "--mesh and --tor frr: a mesh has no rack, ToR"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(TopologyError, match=word):
        Topology.build(**wrong)


@pytest.mark.parametrize(
    "name", ["pod-1", "pod-0-1", "pod-01-1", "pod-a-1", "node-1-1", "pod-1-1-1", "pod-1-", "pod-²-1"]
)
def test_a_pod_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(TopologyError, match="pod-NODE-NUMBER"):
        node_of_pod(name)


def test_bird_takes_only_pools_from_nodes_and_speaks_one_family_a_session() -> None:
    t = Topology.build(spines=2)
    text = bird.configuration(t, t.tors[0])
    assert "filter pools4 { weigh(); if net ~ [ 10.244.0.0/15{26,32} ] then accept; reject; }" in text
    assert "filter pools6 { weigh(); if net ~ [ fd00:10:244::/111{122,128} ] then accept; reject; }" in text
    assert text.count("protocol bgp ") == 2 * (2 + 2)  # two spines, two nodes
    assert text.count("passive yes") == text.count("import filter pools") == 4
    assert text.count("merge paths on limit 16") == 2
    assert "neighbor 10.1.0.1 as 65101" in text
    assert "passive" not in bird.configuration(t, t.spines[0])


def test_frr_takes_only_pools_from_nodes_and_speaks_one_family_a_session() -> None:
    t = Topology.build(spines=2, dual_tor=True, tor="frr")
    text = frr.configuration(t, t.tors[1])
    assert "\nrouter bgp 65201\n bgp router-id 10.255.2.1\n" in text
    for line in (
        "ip prefix-list pools4 seq 1 permit 10.244.0.0/15 ge 26 le 32",
        "ip prefix-list pools4 seq 99 deny any",
        "ipv6 prefix-list pools6 seq 1 permit fd00:10:244::/111 ge 122 le 128",
        "ipv6 prefix-list pools6 seq 99 deny any",
        " neighbor 10.1.1.1 remote-as 65101",
        " neighbor fd00:10:1:1::1 timers 3 9",
    ):
        assert text.count(f"{line}\n") == 1
    assert text.count("remote-as") == text.count(" activate") == 2 * (2 + 2)  # two spines, two nodes
    assert text.count(" passive") == text.count("  neighbor ") - text.count(" activate") == 4
    assert text.count("maximum-paths 16") == text.count("redistribute connected") == 2
    four, six = (part.partition("exit-address-family")[0] for part in text.split("address-family ipv")[1:])
    assert four.count(".") > 8 and ":" not in four and "pools6" not in four
    assert "fd00:10:1:1::1 prefix-list pools6 in" in six and "pools4" not in six
    assert "passive" not in frr.configuration(t, t.spines[0])


@pytest.mark.parametrize("dual", [False, True])
def test_the_store_begins_with_one_peer_an_uplink_and_family(dual: bool) -> None:
    t = Topology.build(dual_tor=dual)
    made = objects(t)
    peers = [o for o in made if isinstance(o, model.BGPPeer)]
    assert len({p.metadata.name for p in peers}) == len(peers) == (4 if dual else 2) * len(t.nodes)
    assert {(p.spec.node, p.spec.peer_ip, p.spec.as_number) for p in peers} == {
        (n.name, gateway, uplink.asn) for n in t.nodes for uplink in n.uplinks for gateway in uplink.gateways
    }
    assert all(p.spec.num_allowed_local_as_numbers == 1 for p in peers)
    (configuration,) = (o for o in made if isinstance(o, model.BGPConfiguration))
    assert not configuration.spec.node_to_node_mesh_enabled
    nodes = [o for o in made if isinstance(o, model.Node)]
    assert [n.metadata.annotations[model.ANNOTATION_ASN] for n in nodes] == ["65101", "65101", "65102", "65102"]
    assert [a.address for a in nodes[0].status.addresses] == list(t.nodes[0].addresses)


def test_the_store_of_a_mesh_says_nothing_of_bgp() -> None:
    t = Topology.build(mesh=True)
    made = objects(t)
    assert {type(o) for o in made} == {model.IPPool, model.Node}
    nodes = [o for o in made if isinstance(o, model.Node)]
    assert not any(n.metadata.annotations or n.metadata.labels for n in nodes)
    # What holds then.
    assert model.BGPConfigurationSpec().node_to_node_mesh_enabled
    assert model.BGPConfigurationSpec().as_number == AS_MESH == t.nodes[0].asn


PODS = (Pod("pod-1-1", ("10.244.0.1", "fd00::1")), Pod("pod-2-1", ("10.244.1.1", "fd00::2")))


def report(*paths: Path) -> Report:
    return Report(nodes=2, pods=PODS, paths=paths)


def test_the_last_line_counts_paths_and_lost_probes() -> None:
    good = report(Path("pod-1-1", "pod-2-1", 4, 5, 5), Path("pod-2-1", "pod-1-1", 4, 5, 5))
    assert matrix.summary(good) == "lab: 2 pods on 2 nodes, 2/2 paths answered (IPv4 and IPv6), 0 lost"
    assert good.good


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (Path("pod-1-1", "pod-2-1", 6, 5, 0), "0/1 paths answered (IPv4 and IPv6), 5 lost"),
        (Path("pod-1-1", "pod-2-1", 6, 5, 4), "1/1 paths answered (IPv4 and IPv6), 1 lost"),
        (Path("pod-1-1", "pod-2-1", 6, 5, 5, "was seen as 10.1.0.1"), "0/1 paths answered (IPv4 and IPv6), 0 lost"),
    ],
)
def test_a_lost_probe_or_a_wrong_source_is_not_good(path: Path, line: str) -> None:
    bad = report(path)
    assert matrix.summary(bad).endswith(line)
    assert not bad.good
    assert "pod-1-1 to pod-2-1, IPv6" in matrix.table(bad)


def test_the_table_has_a_mark_for_each_pair() -> None:
    text = matrix.table(
        report(
            Path("pod-1-1", "pod-2-1", 4, 1, 1),
            Path("pod-1-1", "pod-2-1", 6, 1, 0),
            Path("pod-2-1", "pod-1-1", 4, 1, 1),
            Path("pod-2-1", "pod-1-1", 6, 1, 1),
        )
    )
    rows = text.splitlines()
    assert rows[1].split() == ["pod-1-1", "·", "4"]
    assert rows[2].split() == ["pod-2-1", "●", "·"]


def test_beyond_24_pods_a_row_is_a_node() -> None:
    pods = tuple(Pod(f"pod-{n}-{i}", ()) for n in (1, 2) for i in range(1, 14))
    paths = tuple(
        Path(a.name, b.name, f, 1, 0 if (a.name, b.name, f) == ("pod-1-2", "pod-2-5", 4) else 1)
        for a in pods
        for b in pods
        if a != b
        for f in (4, 6)
    )
    rows = matrix.table(Report(nodes=2, pods=pods, paths=paths)).splitlines()
    assert [row.split() for row in rows[1:3]] == [["node-1", "●", "6"], ["node-2", "●", "●"]]
    assert rows[3:] == ["  pod-1-2 to pod-2-5, IPv4: 1 of 1 lost"]


def state(t: Topology, *cut: tuple[str, str]) -> State:
    up = ProcessState(pid=1, state="running", restarts=0)
    return State(
        state="up",
        dir="/d",
        store="sqlite:/d/store.db",
        shape=t.shape,
        routers=tuple(
            RouterState(name=r.name, rack=rack_name(r.rack), asn=r.asn, processes={"bird": up}) for r in t.routers
        ),
        links=tuple(
            LinkState(a=link.upper.name, b=link.lower.name, up=(link.upper.name, link.lower.name) not in cut)
            for link in t.links
        ),
        nodes=tuple(
            NodeState(
                name=n.name,
                rack=rack_name(n.rack),
                asn=n.asn,
                addresses=n.addresses,
                blocks=(f"10.244.{n.number}.0/26",),
                pods=(PodState(name=n.pods[0], addresses=(f"10.244.{n.number}.1",)),),
                processes={"agent": up},
            )
            for n in t.nodes
        ),
        switches=t.switches,
    )


@pytest.mark.parametrize(
    "t",
    [
        *(Topology.build(racks=r, nodes=1, pods=1, dual_tor=dual) for r in (1, 2, 3, 5) for dual in (False, True)),
        Topology.build(mesh=True, pods=1),
    ],
    ids=lambda t: t.shape.options,
)
@pytest.mark.parametrize("width", [80, 160, 400])
def test_the_picture_names_everything_and_keeps_to_its_width(t: Topology, width: int) -> None:
    s = state(t)
    text = picture.picture(s, width=width)
    for member in [*(r.name for r in s.routers), *(n.name for n in s.nodes), *s.switches]:
        assert member in text
    for node in s.nodes:
        assert all(word in text for word in (*node.blocks, *node.addresses, node.pods[0].name, *node.pods[0].addresses))
    assert max(len(line) for line in text.splitlines()) <= width
    wide = 0
    for line in text.splitlines():
        wide = len(line) if line.startswith("┌─ ") else wide
        assert len(line) == wide or not line.startswith(("│ ", "└─")), "a box is not closed"


ONE = Topology.build(racks=1, nodes=1, pods=1)
TWO = Topology.build(racks=1, nodes=1, pods=1, dual_tor=True)
MESH = Topology.build(mesh=True, nodes=2, pods=1)


@pytest.mark.parametrize(
    ("t", "cut", "line"),
    [
        (ONE, (), "├─ node-1"),
        (ONE, (("tor-1", "node-1"),), "╳─ node-1"),
        (ONE, (("spine-1", "tor-1"),), "rack-1: tor-1 (AS 65001) ✂ ─"),
        (TWO, (), "├─┼─ node-1"),
        (TWO, (("tor-1a", "node-1"),), "╳ ├─ node-1"),
        (TWO, (("tor-1b", "node-1"),), "├─╳─ node-1"),
        (TWO, (("spine-1", "tor-1b"),), "rack-1: tor-1a (AS 65001)  tor-1b (AS 65201) ✂ ─"),
        (MESH, (("switch", "node-2"),), "╳─ node-2"),
    ],
)
def test_the_picture_shows_which_link_is_cut(t: Topology, cut: tuple[tuple[str, str], ...], line: str) -> None:
    text = picture.picture(state(t, *cut), width=120)
    assert line in text
    assert ("╳" in text or "✂" in text) == bool(cut)
