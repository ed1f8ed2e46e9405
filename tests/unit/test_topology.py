"""The map of a lab: sizes, names, addresses; and what BIRD, store, matrix and picture make of it."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import bird, matrix, picture
from lab.matrix import Path, Pod, Report
from lab.objects import objects
from lab.topology import MAX_NODES, MAX_RACKS, Topology, TopologyError, node_of_pod
from lab.wire import LinkState, NodeState, PodState, ProcessState, RouterState, State
from store import model

shapes = st.builds(
    Topology.build,
    racks=st.integers(1, 12),
    nodes=st.integers(1, 8),
    pods=st.integers(0, 4),
    spines=st.integers(1, 3),
)


def test_the_default_is_the_rack_of_the_issue() -> None:
    t = Topology.build()
    assert [r.name for r in t.routers] == ["spine-1", "tor-1", "tor-2"]
    assert [(n.name, n.rack, n.asn, n.tor) for n in t.nodes] == [
        ("node-1", 1, 65101, "tor-1"),
        ("node-2", 1, 65101, "tor-1"),
        ("node-3", 2, 65102, "tor-2"),
        ("node-4", 2, 65102, "tor-2"),
    ]
    assert t.nodes[0].pods == ("pod-1-1", "pod-1-2", "pod-1-3")
    assert t.nodes[1].addresses == ("10.1.0.3", "fd00:10:1::3")
    assert t.nodes[1].gateways == ("10.1.0.2", "fd00:10:1::2")
    assert t.shape == (2, 2, 3)


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_addresses_are_unique_canonical_and_outside_of_every_pool(t: Topology) -> None:
    addresses = [a for link in t.links for end in (link.upper, link.lower) for a in end.addresses]
    assert len(set(addresses)) == len(addresses)
    pools = [ip_network(p.cidr) for p in t.pools]
    for text in addresses:
        assert str(ip_interface(text)) == text
        assert not any(ip_interface(text).ip in pool for pool in pools)
    for link in t.links:
        for upper, lower in zip(link.upper.addresses, link.lower.addresses, strict=True):
            assert ip_interface(upper).network == ip_interface(lower).network
    networks = {ip_interface(a).network for a in addresses}
    assert len(networks) * 2 == len(addresses)


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_every_node_hangs_on_its_tor_and_every_tor_on_every_spine(t: Topology) -> None:
    for node in t.nodes:
        assert [far.name for _, far in t.ends(node.name)] == [node.tor]
        assert [t.owner(a) for a in node.addresses] == [node.name] * 2
        assert [t.owner(a) for a in node.gateways] == [node.tor] * 2
    for tor in t.tors:
        for spine in t.spines:
            assert t.link(tor.name, spine.name) == t.link(spine.name, tor.name) is not None
    assert all(len(end.port) <= 15 for link in t.links for end in (link.upper, link.lower))
    names = [m.name for m in t.routers] + [m.name for m in t.nodes] + [p for n in t.nodes for p in n.pods]
    assert len(set(names)) == len(names)
    assert all(node_of_pod(pod) == node.name for node in t.nodes for pod in node.pods)


def test_the_largest_is_still_sound() -> None:
    t = Topology.build(racks=MAX_RACKS, nodes=MAX_NODES, pods=0)
    assert len({a for n in t.nodes for a in n.addresses}) == 2 * MAX_RACKS * MAX_NODES
    assert all(str(ip_address(a)) == a for n in t.nodes for a in n.addresses)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"racks": 0}, "racks"),
        ({"nodes": 65}, "nodes per rack"),
        ({"pods": -1}, "pods per node"),
        ({"spines": 0}, "spin"),
    ],
)
def test_a_size_out_of_range_is_refused_by_name(wrong: dict[str, int], word: str) -> None:
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
    assert "filter pools4 { if net ~ [ 10.244.0.0/16{26,32} ] then accept; reject; }" in text
    assert "filter pools6 { if net ~ [ fd00:10:244::/112{122,128} ] then accept; reject; }" in text
    assert text.count("protocol bgp ") == 2 * (2 + 2)  # two spines, two nodes
    assert text.count("passive yes") == text.count("import filter pools") == 4
    assert text.count("merge paths on limit 16") == 2
    assert "neighbor 10.1.0.1 as 65101" in text
    assert "passive" not in bird.configuration(t, t.spines[0])


def test_the_store_begins_with_one_peer_a_node_and_family() -> None:
    t = Topology.build()
    made = objects(t)
    peers = [o for o in made if isinstance(o, model.BGPPeer)]
    assert len(peers) == 2 * len(t.nodes)
    assert {(p.spec.node, p.spec.peer_ip, p.spec.as_number) for p in peers} == {
        (n.name, gateway, n.tor_asn) for n in t.nodes for gateway in n.gateways
    }
    assert all(p.spec.num_allowed_local_as_numbers == 1 for p in peers)
    (configuration,) = (o for o in made if isinstance(o, model.BGPConfiguration))
    assert not configuration.spec.node_to_node_mesh_enabled
    nodes = [o for o in made if isinstance(o, model.Node)]
    assert [n.metadata.annotations[model.ANNOTATION_ASN] for n in nodes] == ["65101", "65101", "65102", "65102"]
    assert [a.address for a in nodes[0].status.addresses] == list(t.nodes[0].addresses)


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


def state(racks: int, *, cut: bool = False) -> State:
    t = Topology.build(racks=racks, nodes=1, pods=1)
    up = ProcessState(pid=1, state="running", restarts=0)
    return State(
        state="up",
        dir="/d",
        store="sqlite:/d/store.db",
        shape=t.shape,
        routers=tuple(
            RouterState(name=r.name, rack=f"rack-{r.rack}" if r.rack else "", asn=r.asn, processes={"bird": up})
            for r in t.routers
        ),
        links=tuple(LinkState(a=link.upper.name, b=link.lower.name, up=not cut) for link in t.links),
        nodes=tuple(
            NodeState(
                name=n.name,
                rack=f"rack-{n.rack}",
                asn=n.asn,
                addresses=n.addresses,
                blocks=(f"10.244.{n.number}.0/26",),
                pods=(PodState(name=n.pods[0], addresses=(f"10.244.{n.number}.1",)),),
                processes={"agent": up},
            )
            for n in t.nodes
        ),
    )


@pytest.mark.parametrize("racks", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [80, 160, 400])
def test_the_picture_names_everything_and_keeps_to_its_width(racks: int, width: int) -> None:
    s = state(racks)
    text = picture.picture(s, width=width)
    for member in [*(r.name for r in s.routers), *(n.name for n in s.nodes)]:
        assert member in text
    for node in s.nodes:
        assert all(word in text for word in (*node.blocks, *node.addresses, node.pods[0].name, *node.pods[0].addresses))
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_picture_shows_a_cut() -> None:
    assert "╳" in picture.picture(state(1, cut=True), width=80)
    assert "╳" not in picture.picture(state(1), width=80)
