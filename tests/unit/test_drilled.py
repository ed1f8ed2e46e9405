"""What a drill found: groups, verdicts and tables; which drills there are; what counts as a path."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import pytest

from lab import bird, connections, drill, drilled, frr, visitor
from lab.drilled import PathLoss, Report
from lab.drilling import pairs
from lab.errors import LabError
from lab.pinger import Member
from lab.topology import Topology, Use

TOPOLOGIES = (Topology.build(), Topology.build(dual_tor=True), Topology.build(tor="frr"), Topology.build(mesh=True))


def path(sender: str, receiver: str, family: int = 4, *, lost: int = 0, gap: float = 0.0, sent: int = 100) -> PathLoss:
    return PathLoss(
        sender=sender,
        receiver=receiver,
        family=family,
        sent=sent,
        unsent=0,
        lost=lost,
        gaps=1 if lost else 0,
        gap=gap,
        at=1.0,
    )


def report(*paths: PathLoss, planned: bool = False, unrest: str = "") -> Report:
    return Report(
        drill="cut-uplink",
        topology="single ToR, BIRD",
        planned=planned,
        struck=("node-1",),
        name_struck="node-1",
        seconds=12.3,
        paths=paths,
        unrest=unrest,
    )


EACH = (
    path("pod-1-1", "pod-1-2"),
    path("pod-1-1", "pod-2-1", lost=3, gap=0.04),
    path("pod-1-1", "pod-2-1", 6, lost=2, gap=0.02),
    path("pod-2-1", "pod-1-1", lost=4, gap=0.05),
    path("node-2", "pod-1-1", lost=5, gap=0.06),
    path("pod-2-1", "pod-3-1"),
)


def test_paths_are_grouped_by_how_they_lie_to_what_was_struck() -> None:
    found = {g.name: (len(g.paths), g.lost(4), g.gap(4), g.lost(6)) for g in drilled.groups(report(*EACH))}
    assert found == {
        "within a node": (1, 0, 0.0, 0),
        "from node-1": (2, 3, 0.04, 2),
        "to node-1": (2, 9, 0.06, 0),
        "between the others": (1, 0, 0.0, 0),
    }
    rack = msgspec.structs.replace(report(*EACH), struck=("node-1", "node-2"), name_struck="rack-1")
    assert [g.name for g in drilled.groups(rack)] == [
        "within a node",
        "from rack-1",
        "between rack-1",
    ]


def test_of_an_unplanned_drill_the_others_must_lose_nothing() -> None:
    assert report(*EACH).good
    assert drilled.verdict(report(*EACH)).endswith("none where node-1 had no part; longest 0.06 s")
    bad = report(*EACH, path("pod-3-1", "pod-2-1", lost=1, gap=0.01))
    assert not bad.good
    assert "FAILED, 1 of them where node-1 had no part" in drilled.verdict(bad)


def test_of_a_planned_drill_nobody_may_lose_anything() -> None:
    assert report(path("pod-1-1", "pod-2-1"), planned=True).good
    bad = report(path("pod-1-1", "pod-2-1", lost=1), planned=True)
    assert not bad.good
    assert "FAILED, none was to be lost" in drilled.verdict(bad)


def test_what_is_not_as_before_or_was_not_measured_is_no_success() -> None:
    assert not report(path("pod-1-1", "pod-2-1"), unrest="agent of node-1 is down").good
    assert "in the end agent of node-1 is down" in drilled.verdict(report(unrest="agent of node-1 is down"))
    assert not report(path("pod-1-1", "pod-2-1", sent=0)).good


def test_the_text_has_the_groups_and_with_each_the_paths() -> None:
    text = drilled.text(report(*EACH))
    assert [line.split()[0] for line in text.splitlines()] == [
        "paths",
        "within",
        "from",
        "to",
        "between",
        "cut-uplink:",
    ]
    lines = drilled.text(report(*EACH), each=True).splitlines()
    assert "  pod-1-1 to pod-2-1  2   200          3   0.04 s          2   0.02 s" in lines
    assert len(lines) == 6 + 5


def test_the_text_names_the_paths_that_were_to_lose_nothing() -> None:
    bad = report(path("pod-1-1", "pod-2-1", lost=3), path("pod-1-2", "pod-2-1"), planned=True)
    named = [line for line in drilled.text(bad).splitlines() if line.startswith("lost: ")]
    assert len(named) == 1
    assert named[0].startswith("lost: pod-1-1 > pod-2-1, IPv4: 3 in ")


def test_the_table_for_a_page_has_a_row_a_drill() -> None:
    lines = drilled.markdown([report(*EACH), report(path("pod-1-1", "pod-2-1", lost=1), planned=True)]).splitlines()
    assert lines[2] == ("| `cut-uplink` | single ToR, BIRD | 600 | 14 | 0.06 s | from node-1: 5; to node-1: 9 |")
    assert lines[3].startswith("| `cut-uplink` (FAILED) |")


def test_a_report_goes_through_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(report(*EACH)), type=Report) == report(*EACH)
    assert json.loads(msgspec.json.encode(report(*EACH)))["paths"][0]["sender"] == "pod-1-1"


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: t.shape.options)
def test_each_drill_is_for_a_topology_or_says_why_not(topology: Topology) -> None:
    names = {node.name for node in topology.nodes}
    for one in drill.DRILLS:
        refusal = one.refusal(topology)
        if not refusal:
            struck = one.struck(topology)
            assert struck.nodes
            assert set(struck.nodes) <= names


def test_an_unknown_drill_is_told_which_there_are() -> None:
    assert [drill.find(one.name) for one in drill.DRILLS] == list(drill.DRILLS)
    with pytest.raises(LabError, match="kill-agent, kill-speaker"):
        drill.find("kill-everything")


def test_paths_are_all_pairs_of_pods_and_each_node_to_a_pod_of_each_other() -> None:
    names = ("pod-1-1", "pod-1-2", "pod-2-1", "node-1", "node-2")
    members = [Member(name, "", ()) for name in names]
    found = [(names[a], names[b]) for a, b in pairs(members)]
    assert len(found) == len(set(found)) == 3 * 2 + 2
    assert {pair for pair in found if pair[0].startswith("node")} == {("node-1", "pod-2-1"), ("node-2", "pod-1-1")}


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0101010A:8BCC 0001010A:00B3 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 0 10 -1
   1: 0101010A:00B3 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 0 10 -1
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 100000FD000001000000000001000000:9C40 100000FD000001000000000002000000:00B3 01 0:0 00:0 0 0 0 1
"""


def test_connections_are_read_from_the_kernels_table() -> None:
    assert connections.parse(TCP) == {("10.1.1.0", 0x8BCC, 179)}
    assert connections.parse(TCP6) == {("fd00:10:1::2", 0x9C40, 179)}


def test_a_router_tells_others_first_and_then_uses_other_ways_itself() -> None:
    topology = Topology.build(dual_tor=True)
    tor = topology.tors[0]
    normal, leaving, left = (bird.configuration(topology, tor, use=use) for use in get_args(Use))
    assert normal == bird.configuration(topology, tor)
    assert "bgp_community.add((65535, 0))" not in normal
    assert "bgp_community.add((65535, 0))" in leaving
    assert "if (65535, 0) ~ bgp_community then bgp_local_pref = 0;" in leaving
    assert "{ bgp_local_pref = 0; }" in left
    first, second, last = (frr.change(topology, tor, use=use) for use in get_args(Use))
    peers = 2 * len(topology.ends(tor.name))
    assert sum(line.startswith("no neighbor") for line in first) == peers
    assert (
        sum(line.startswith("neighbor") for line in second) == sum(line.startswith("neigh") for line in last) == peers
    )
    assert [line for line in (*first, *second, *last) if "bgp graceful-shutdown" in line] == [
        "no bgp graceful-shutdown",
        "no bgp graceful-shutdown",
        "bgp graceful-shutdown",
    ]


def test_the_tor_that_comes_to_a_mesh_peers_with_every_node_and_is_every_routes_next_hop() -> None:
    mesh = Topology.build(mesh=True)
    seen = visitor.around(mesh)
    text = bird.configuration(seen, seen.tors[0])
    for node in mesh.nodes:
        for address in node.addresses:
            assert f"neighbor {address} as {node.asn};" in text
    assert text.count("next hop self") == text.count("passive yes") == 2 * len(mesh.nodes)
    assert not {address for node in mesh.nodes for address in node.addresses} & set(visitor.ADDRESSES)
