"""The plan: who is peered with, what is announced, what stands in the kernel, and when something may go."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from agent.bgp.model import Announcement, Attributes, EndOfRib, Received, SessionUp, SpeakerState, Update
from agent.fib import Installed, KernelState, Link, NextHop, Route
from agent.plan import Plan, Snapshot, plan
from agent.plan.exports import SETTLE
from agent.plan.pods import REPAIR_AFTER
from agent.rib import Refusal, Rib
from cni.marks import (
    LINK_GROUP,
    LINK_GROUP_DOOMED,
    METRIC_FALLBACK,
    METRIC_IMPORTS,
    PROTO_BLOCKS,
    PROTO_IMPORTS,
    PROTO_PODS,
)
from store.model import (
    AddCommunity,
    Allocation,
    BGPPassword,
    Community,
    CommunityMatch,
    FilterOperation,
    FilterRuleV4,
    Meta,
    PrefixAdvertisement,
    PrependASPath,
    Secret,
    SecretKeyRef,
)
from tests.agent_fakes import FakeKernel, bgp_filter, bgp_peer, block, cluster, configuration, node, of_node, pool

V4, V6 = "ipv4 unicast", "ipv6 unicast"
OWN4, OWN6 = "10.244.1.0/26", "fd00:10:244::40/122"
PEERS = {"10.0.1.0": 65001, "fd00:0:1::": 65001, "10.0.2.0": 65002, "fd00:0:2::": 65002}


def blackholed(*cidrs: str) -> dict[Any, Installed]:
    routes = (Route(prefix=c, protocol=PROTO_BLOCKS, metric=512, kind="blackhole") for c in cidrs)
    return {r.key: Installed(route=r) for r in routes}


def kernel_of(*cidrs: str, **changes: Any) -> KernelState:
    """The fake's links and addresses, and these blackholes."""
    return replace(FakeKernel().read(), **{"routes": blackholed(*cidrs), **changes})


def snapshot(**changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "node": "node-1",
        "now": 1000.0,
        "cluster": cluster(),
        "kernel": kernel_of(OWN4, OWN6),
        "speaker": SpeakerState(known=True),
        "rib": Rib(),
        "link_name": lambda container, interface: f"ul{container}{interface}",
    }
    return Snapshot(**{**values, **changes})


def rib_with(routes: dict[str, list[str]], **changes: Any) -> Rib:
    """All peers up and reported at time 0; ``routes``: peer -> prefixes that it told."""
    rib = Rib()
    rib.configure(plan(snapshot(**changes)).peers, 0.0)
    for address, asn in PEERS.items():
        rib.apply(SessionUp(peer=address, generation=1, families=(V4, V6), helper=True), 0.0)
        told = tuple(
            Received(prefix=p, next_hop=address, attributes=Attributes(as_path=(asn,), origin="igp"))
            for p in routes.get(address, ())
        )
        rib.apply(Update(peer=address, generation=1, announced=told), 0.0)
        for family in (V4, V6):
            rib.apply(EndOfRib(peer=address, generation=1, family=family), 0.0)
    return rib


def prefixes(wanted: Plan, protocol: int) -> set[str]:
    return {p for p, proto, _ in wanted.routes if proto == protocol}


def announced(wanted: Plan) -> set[tuple[str, str, str]]:
    assert wanted.announcements is not None
    return {(a.peer, a.prefix, a.next_hop) for a in wanted.announcements}


def types(wanted: Plan) -> list[str]:
    return [c.type for c in wanted.conditions]


def message(wanted: Plan, kind: str) -> str:
    return next(c.message for c in wanted.conditions if c.type == kind)


# -- sessions -------------------------------------------------------------------------------------------------------


def test_one_session_per_peer_from_our_address_on_its_subnet() -> None:
    wanted = plan(snapshot())
    assert wanted.sessions is not None
    assert {(s.name, s.address, s.local_address, s.local_as, s.peer_as, s.families) for s in wanted.sessions} == {
        ("tor-1-v4", "10.0.1.0", "10.0.1.1", 65100, 65001, (V4,)),
        ("tor-1-v6", "fd00:0:1::", "fd00:0:1::1", 65100, 65001, (V6,)),
        ("tor-2-v4", "10.0.2.0", "10.0.2.1", 65100, 65002, (V4,)),
        ("tor-2-v6", "fd00:0:2::", "fd00:0:2::1", 65100, 65002, (V6,)),
    }
    assert {s.router_id for s in wanted.sessions} == {"10.0.1.1"}


def test_a_peer_off_link_is_met_from_the_node_s_address() -> None:
    wanted = plan(snapshot(cluster=cluster(peers=(bgp_peer("rr", "192.0.2.1:1179"),))))
    assert wanted.sessions is not None
    assert [(s.address, s.port, s.local_address) for s in wanted.sessions] == [("192.0.2.1", 1179, "10.0.1.1")]


BEHIND = bgp_peer("rr", "192.0.2.1", reachable_by="10.0.2.0")


def test_a_peer_behind_a_gateway_has_a_host_route_and_its_own_address_leads_there() -> None:
    """As a BGPPeer says it, with reachableBy: no route of a peer, and no default, is asked for the way."""
    wanted = plan(snapshot(cluster=cluster(peers=(BEHIND, bgp_peer("tor", "10.0.1.0")))))
    assert wanted.sessions is not None
    assert {(s.address, s.local_address) for s in wanted.sessions} == {
        ("192.0.2.1", "10.0.1.1"),
        ("10.0.1.0", "10.0.1.1"),
    }
    assert [r for r in wanted.routes.values() if r.protocol == PROTO_IMPORTS] == [
        Route(
            prefix="192.0.2.1/32",
            protocol=PROTO_IMPORTS,
            metric=METRIC_IMPORTS,
            nexthops=(NextHop("10.0.2.0", 3),),
            src="10.0.1.1",
        )
    ]
    assert wanted.conditions == ()
    rib = Rib()
    rib.configure(wanted.peers, 0.0)
    rib.apply(SessionUp(peer="192.0.2.1", generation=1, families=(V4,), helper=True), 0.0)
    far = Attributes(as_path=(65001,), origin="igp")
    told = tuple(
        Received(prefix=p, next_hop=hop, attributes=far)
        for p, hop in (
            ("10.244.7.0/26", "192.0.2.1"),
            ("10.244.8.0/26", "192.0.2.9"),
            # What it says of the way to itself does not count.
            ("192.0.2.1/32", "10.0.1.0"),
        )
    )
    rib.apply(Update(peer="192.0.2.1", generation=1, announced=told), 0.0)
    changed = cluster(peers=(BEHIND,), configuration=configuration(import_cidrs=("192.0.2.0/24",)))
    wanted = plan(snapshot(cluster=changed, rib=rib))
    assert {p: r.nexthops for (p, proto, _), r in wanted.routes.items() if proto == PROTO_IMPORTS} == {
        "10.244.7.0/26": (NextHop("10.0.2.0", 3),),
        "192.0.2.1/32": (NextHop("10.0.2.0", 3),),
    }
    assert wanted.selection.refused["192.0.2.1"] == {"10.244.8.0/26": Refusal.NextHopNotOnLink}


@pytest.mark.parametrize(
    ("address", "gateway", "kind", "words"),
    [
        ("192.0.2.1", "10.0.9.9", "NextHopNotOnLink", "on no connected subnet"),
        ("192.0.2.1", "10.0.1.1", "NextHopNotOnLink", "of this node itself"),
        ("10.244.1.7", "10.0.1.0", "PeerNotUsable", OWN4),
    ],
)
def test_a_gateway_that_leads_nowhere_is_named_and_gives_no_route(
    address: str, gateway: str, kind: str, words: str
) -> None:
    wanted = plan(snapshot(cluster=cluster(peers=(bgp_peer("rr", address, reachable_by=gateway),))))
    assert prefixes(wanted, PROTO_IMPORTS) == set()
    assert words in message(wanted, kind)
    assert wanted.sessions is not None
    assert [s.address for s in wanted.sessions] == [address]


def test_a_peer_on_a_link_of_ours_needs_no_gateway() -> None:
    wanted = plan(snapshot(cluster=cluster(peers=(bgp_peer("tor", "10.0.1.0", reachable_by="10.0.2.0"),))))
    assert prefixes(wanted, PROTO_IMPORTS) == set()
    assert [p.gateway for p in wanted.peers] == [""]


def test_an_ignored_interface_is_no_way_to_peers_and_next_hops() -> None:
    """The subnets of ignoredInterfaces are as if they were not connected; its addresses stay the node's own."""
    changes = {"cluster": cluster(configuration=configuration(ignored_interfaces=("lo", "*2")))}
    rib = rib_with({"10.0.1.0": ["10.244.7.0/26"], "10.0.2.0": ["10.244.8.0/26"]}, **changes)
    wanted = plan(snapshot(rib=rib, **changes))
    assert wanted.sessions is not None
    # The session of a peer there begins at the node's address.
    assert {s.address: s.local_address for s in wanted.sessions}["10.0.2.0"] == "10.0.1.1"
    assert prefixes(wanted, PROTO_IMPORTS) == {"10.244.7.0/26"}
    assert wanted.selection.refused["10.0.2.0"] == {"10.244.8.0/26": Refusal.NextHopNotOnLink}
    # No sysctl of an interface that is nothing to us is touched.
    assert not any("up2" in key for key in wanted.sysctls)
    rib = rib_with({"10.0.1.0": ["10.244.7.0/26"]}, **changes)
    mine = Received(prefix="10.244.9.0/26", next_hop="10.0.2.1", attributes=Attributes(as_path=(65001,), origin="igp"))
    rib.apply(Update(peer="10.0.1.0", generation=1, announced=(mine,)), 0.0)
    refused = plan(snapshot(rib=rib, **changes)).selection.refused["10.0.1.0"]
    assert refused == {"10.244.9.0/26": Refusal.NextHopIsSelf}


@pytest.mark.parametrize(
    ("changes", "peers"),
    [
        ({"node": "node-1"}, True),
        ({"node": "node-2"}, False),
        ({"node_selector": "rack == 'rack-1'"}, True),
        ({"node_selector": "rack == 'rack-2'"}, False),
        ({}, True),
    ],
)
def test_which_nodes_a_peer_is_for(changes: dict[str, str], peers: bool) -> None:
    wanted = plan(snapshot(cluster=cluster(node=node(rack="rack-1"), peers=(bgp_peer("tor", "10.0.1.0", **changes),))))
    assert bool(wanted.sessions) is peers


def test_a_peer_without_its_filter_has_no_session_and_no_other_takes_its_place() -> None:
    """R13: one peer alone stays down; never a session without what was to keep its routes apart."""
    peers = (
        bgp_peer("a", "10.0.1.0", filters=("deny", "typo")),
        bgp_peer("b", "10.0.1.0"),
        bgp_peer("c", "10.0.2.0", filters=("deny",)),
    )
    mesh = configuration(node_to_node_mesh_enabled=True)
    others = (node("node-2", "10.0.1.0"),)
    wanted = plan(
        snapshot(cluster=cluster(peers=peers, filters=(bgp_filter("deny"),), configuration=mesh, nodes=others))
    )
    assert wanted.sessions is not None
    assert [s.name for s in wanted.sessions] == ["c"]
    assert "BGPPeer a: there is no usable BGPFilter typo" in message(wanted, "PeerNotUsable")
    assert "BGPPeer b: 10.0.1.0 is the peer of a already" in message(wanted, "PeerNotUsable")


def test_a_filter_that_cannot_be_read_is_named_and_is_none() -> None:
    broken = bgp_filter("deny", import_v4=(FilterRuleV4(action="Perhaps"),))
    wanted = plan(snapshot(cluster=cluster(peers=(bgp_peer("a", "10.0.1.0", filters=("deny",)),), filters=(broken,))))
    assert wanted.sessions == frozenset()
    assert "BGPFilter deny" in message(wanted, "ObjectNotUsable")
    assert "BGPPeer a" in message(wanted, "PeerNotUsable")


def test_what_stands_as_it_last_could_be_used_is_said() -> None:
    wanted = plan(snapshot(cluster=cluster(standing={"BGPFilter deny": "it was deleted"})))
    assert message(wanted, "ObjectNotUsable") == "BGPFilter deny: it was deleted; it stands as it last could be used"


@pytest.mark.parametrize(("asn", "path"), [(65001, (65100, 65009, 65008)), (65100, (65009, 65008))])
def test_export_rules_narrow_and_decorate(asn: int, path: tuple[int, ...]) -> None:
    """An AS_PATH that is said begins with our AS towards an eBGP peer, and with what is prepended towards iBGP."""
    operations = (
        FilterOperation(prepend_as_path=PrependASPath(prefix=(65009, 65008))),
        FilterOperation(add_community=AddCommunity(value="65100:7:7")),
        FilterOperation(add_community=AddCommunity(value="65100:7")),
    )
    first = FilterRuleV4(action="Accept", match_operator="Equal", cidr=OWN4, operations=operations)
    narrow = bgp_filter("narrow", export_v4=(first, FilterRuleV4(action="Reject")))
    peers = (bgp_peer("tor", "10.0.1.0", as_number=asn, filters=("narrow",)), bgp_peer("other", "10.0.2.0"))
    blocks = (block(OWN4), block("10.244.9.0/26"))
    wanted = plan(
        snapshot(
            kernel=kernel_of(OWN4, "10.244.9.0/26"),
            cluster=cluster(peers=peers, filters=(narrow,), blocks=blocks),
        )
    )
    assert wanted.announcements is not None
    assert {a for a in wanted.announcements if a.peer == "10.0.1.0"} == {
        Announcement(
            peer="10.0.1.0",
            prefix=OWN4,
            next_hop="10.0.1.1",
            communities=("65100:7",),
            large_communities=("65100:7:7",),
            as_path=path,
        )
    }
    assert {a.prefix for a in wanted.announcements if a.peer == "10.0.2.0"} == {OWN4, "10.244.9.0/26"}


def test_import_rules_reach_the_rib_with_the_interfaces_they_ask_for() -> None:
    by_name = bgp_filter("by-name", import_v4=(FilterRuleV4(action="Reject", interface="up1"),))
    peers = (
        bgp_peer("tor-1", "10.0.1.0", filters=("by-name",)),
        bgp_peer("tor-2", "10.0.2.0", as_number=65002, filters=("by-name",)),
    )
    at = cluster(peers=peers, filters=(by_name,))
    told = {"10.0.1.0": ["10.244.8.0/26"], "10.0.2.0": ["10.244.8.0/26"]}
    wanted = plan(snapshot(cluster=at, rib=rib_with(told, cluster=at)))
    assert wanted.selection.best == {"10.244.8.0/26": (NextHop("10.0.2.0", 3),)}
    assert wanted.selection.refused["10.0.1.0"] == {"10.244.8.0/26": Refusal.RejectedByFilter}


def test_a_mesh_with_password_ports_and_restart_time() -> None:
    ref = BGPPassword(secret_key_ref=SecretKeyRef(name="mesh", key="k"))
    secret = Secret(metadata=Meta(name="mesh", namespace="underlay-system"), data={"k": b"hunter2"})
    whole = configuration(
        node_to_node_mesh_enabled=True, node_mesh_password=ref, node_mesh_max_restart_time="30s", listen_port=1179
    )
    at = cluster(
        configuration=whole,
        node_configurations=(of_node("node-1", listen_port=1181), of_node("node-2", listen_port=1182)),
        nodes=(node("node-0", "10.9.0.2"), node("node-2", "10.9.0.3"), node("node-3", "10.9.0.4")),
        peers=(bgp_peer("waited", "10.0.1.0", passive=True), bgp_peer("tor", "10.0.2.0:1790")),
        secrets=(secret,),
    )
    wanted = plan(snapshot(cluster=at))
    assert wanted.sessions is not None
    # A session that waits is on our own port, one that connects goes to the other's.
    assert {(s.name, s.port, s.passive, s.password) for s in wanted.sessions} == {
        ("mesh-node-0", 1181, True, "aHVudGVyMg=="),
        ("mesh-node-2", 1182, False, "aHVudGVyMg=="),
        ("mesh-node-3", 1179, False, "aHVudGVyMg=="),
        ("waited", 1181, True, ""),
        ("tor", 1790, False, ""),
    }
    assert {p.max_restart_time for p in wanted.peers if p.name.startswith("mesh")} == {30.0}


def test_blocks_carry_the_communities_of_their_prefixes_and_export_rules_see_them() -> None:
    named = (Community(name="pods", value="65100:1"), Community(name="large", value="65100:1:1"))
    whole = configuration(
        communities=named,
        prefix_advertisements=(
            PrefixAdvertisement(cidr="10.244.0.0/16", communities=("pods", "65100:2")),
            PrefixAdvertisement(cidr="10.244.1.0/24", communities=("large", "pods")),
            PrefixAdvertisement(cidr="10.245.0.0/16", communities=("65100:9",)),
        ),
    )
    rejects = FilterRuleV4(action="Reject", communities=CommunityMatch(values=("65100:1:1",)))
    peers = (bgp_peer("tor", "10.0.1.0"), bgp_peer("picky", "10.0.2.0", filters=("picky",)))
    at = cluster(configuration=whole, peers=peers, filters=(bgp_filter("picky", export_v4=(rejects,)),))

    def told(**changes: Any) -> set[tuple[str, tuple[str, ...], tuple[str, ...]]]:
        announcements = plan(snapshot(cluster=replace(at, **changes))).announcements
        assert announcements is not None
        return {(a.peer, a.communities, a.large_communities) for a in announcements}

    assert told() == {("10.0.1.0", ("65100:1", "65100:2"), ("65100:1:1",))}
    # A node's own stand in for the cluster's.
    own = of_node("node-1", prefix_advertisements=(PrefixAdvertisement(cidr=OWN4, communities=("65100:5",)),))
    others = of_node("node-2", prefix_advertisements=(PrefixAdvertisement(cidr=OWN4, communities=("65100:6",)),))
    mine = told(node_configurations=(own, others))
    assert mine == {("10.0.1.0", ("65100:5",), ()), ("10.0.2.0", ("65100:5",), ())}


def racks(here: str) -> Any:
    """Node 1 and 2 in rack a, 3 in rack b, 4 of no AS; ``here`` is the one that is asked."""
    all_nodes = {
        "node-1": node("node-1", "10.0.1.1", "fd00:0:1::1", rack="a"),
        "node-2": node("node-2", "10.0.9.2", "fd00:9::2", rack="a"),
        "node-3": node("node-3", "10.0.9.3", asn="65103", rack="b"),
        "node-4": node("node-4", "10.0.9.4", asn="nonsense", rack="b"),
    }
    return {"node": all_nodes.pop(here), "nodes": tuple(all_nodes.values())}


@pytest.mark.parametrize(
    ("here", "selectors", "expected"),
    [
        ("node-1", {"node_selector": "rack == 'a'", "peer_selector": "rack == 'a'"}, {"10.0.9.2", "fd00:9::2"}),
        ("node-1", {"node": "node-1", "peer_selector": "rack == 'b'"}, {"10.0.9.3"}),
        # Those that it names peer back by themselves.
        ("node-1", {"node": "node-2", "peer_selector": "rack == 'a'"}, {"10.0.9.2", "fd00:9::2"}),
        ("node-3", {"node_selector": "rack == 'a'", "peer_selector": "rack == 'b'"}, {"10.0.1.1", "10.0.9.2"}),
        ("node-3", {"node_selector": "rack == 'a'", "peer_selector": "rack == 'a'"}, set()),
        ("node-2", {"peer_selector": "all()"}, {"10.0.1.1", "fd00:0:1::1", "10.0.9.3"}),
    ],
)
def test_peers_among_nodes(here: str, selectors: dict[str, str], expected: set[str]) -> None:
    peer = bgp_peer("rack", "", as_number=0, hold_time=30, filters=("deny",), **selectors)
    at = cluster(peers=(peer,), filters=(bgp_filter("deny"),), **racks(here))
    kernel = kernel_of() if here == "node-1" else replace(kernel_of(), addresses=())
    wanted = plan(snapshot(node=here, cluster=at, kernel=kernel))
    assert wanted.sessions is not None
    assert {s.address for s in wanted.sessions} == expected
    for session in wanted.sessions:
        other = next(n.name for n in at.nodes if any(a.address == session.address for a in n.status.addresses))
        assert (session.name, session.hold_time, session.passive) == (f"rack-{other}", 30, here > other)
        assert session.peer_as == (65103 if other == "node-3" else 65100)
        assert session.local_address in {a.address for a in at.node.status.addresses}
    assert all(p.imports.v4 for p in wanted.peers)


def test_what_a_peer_says_of_its_session() -> None:
    peers = (
        bgp_peer("a", "10.0.1.0", local_as_number=64999, ttl_security=1),
        bgp_peer("b", "10.0.2.0", source_address="UseNodeIP", passive=True),
        bgp_peer("c", "fd00:0:2::", source_address="None"),
    )
    wanted = plan(snapshot(cluster=cluster(peers=peers)))
    assert wanted.sessions is not None
    assert {(s.name, s.local_as, s.local_address, s.hops, s.passive) for s in wanted.sessions} == {
        ("a", 64999, "10.0.1.1", 1, False),
        ("b", 65100, "10.0.1.1", 0, True),
        ("c", 65100, "fd00:0:2::1", 0, False),
    }
    assert [(p.name, p.local_as, p.node_as) for p in wanted.peers if p.name == "a"] == [("a", 64999, 65100)]


def test_what_a_peer_says_of_its_routes() -> None:
    peer = bgp_peer(
        "tor",
        "10.0.1.0",
        num_allowed_local_as_numbers=2,
        max_restart_time="1m30s",
        max_prefixes=7,
        import_cidrs=("192.0.2.0/24",),
        default_route="Fallback",
    )
    (judged,) = plan(snapshot(cluster=cluster(peers=(peer,)))).peers
    assert (judged.allowed_own_as, judged.max_restart_time, judged.max_prefixes) == (2, 90.0, 7)
    assert (judged.import_cidrs, judged.default_route) == (("192.0.2.0/24",), True)
    (plain,) = plan(snapshot(cluster=cluster(peers=(bgp_peer("tor", "10.0.1.0"),)))).peers
    assert (plain.allowed_own_as, plain.max_restart_time, plain.max_prefixes) == (0, 120.0, 100_000)
    assert (plain.import_cidrs, plain.default_route) == ((), False)


def test_a_password_comes_from_its_secret_and_is_asked_for_without() -> None:
    ref = BGPPassword(secret_key_ref=SecretKeyRef(name="tor", key="password"))
    peers = (bgp_peer("a", "10.0.1.0", password=ref),)
    tor = Secret(metadata=Meta(name="tor", namespace="underlay-system"), data={"password": b"hunter2", "other": b"x"})
    for secrets, value in (((tor,), "aHVudGVyMg=="), ((replace(tor, data={"other": b"x"}),), ""), ((), "")):
        wanted = plan(snapshot(cluster=cluster(peers=peers, secrets=secrets)))
        assert wanted.sessions is not None
        assert [(s.secret, s.password) for s in wanted.sessions] == [("Secret tor, key password", value)]


def test_the_as_number_is_the_node_s_or_the_cluster_s_or_the_default() -> None:
    for asn, config, expected in (
        ("65100", configuration(as_number=64600), 65100),
        ("", configuration(as_number=64600), 64600),
        ("", None, 64512),
    ):
        assert plan(snapshot(cluster=cluster(node=node(asn=asn), configuration=config))).local_as == expected


@pytest.mark.parametrize("asn", ["nonsense", "0", "23456", "4294967295", "-5"])
def test_an_as_number_that_is_none_leaves_sessions_and_announcements_as_they_are(asn: str) -> None:
    wanted = plan(snapshot(cluster=cluster(node=node(asn=asn))))
    assert wanted.sessions is None
    assert wanted.announcements is None
    assert "NodeNotUsable" in types(wanted)
    assert prefixes(wanted, PROTO_BLOCKS) == {OWN4, OWN6}
    assert {p for p, _ in wanted.deletable} == {PROTO_BLOCKS}


def test_without_its_node_object_nothing_changes() -> None:
    wanted = plan(snapshot(cluster=cluster(node=None)))
    assert (wanted.sessions, wanted.announcements) == (None, None)
    assert "node-1" in message(wanted, "NodeNotUsable")


def test_a_node_without_ipv4_has_a_router_id_all_the_same() -> None:
    six = kernel_of(addresses=tuple(a for a in FakeKernel().read().addresses if ":" in a.address))
    first = plan(snapshot(cluster=cluster(node=node("node-1", "fd00:0:1::1")), kernel=six))
    other = plan(snapshot(node="node-2", cluster=cluster(node=node("node-2", "fd00:0:1::1")), kernel=six))
    assert first.router_id.count(".") == 3
    assert first.router_id != other.router_id


def test_a_broken_peer_takes_down_only_itself() -> None:
    good = cluster().peers
    bad = (
        bgp_peer("a-same-address", "10.0.1.0"),
        bgp_peer("b-no-address", "nonsense"),
        bgp_peer("c-ourselves", "10.0.1.1"),
        bgp_peer("d-selector", "10.0.1.7", node_selector="rack =="),
    )
    wanted = plan(snapshot(cluster=cluster(peers=(*good, *bad))))
    assert wanted.sessions is not None
    assert {s.name for s in wanted.sessions} == {"a-same-address", "tor-1-v6", "tor-2-v4", "tor-2-v6"}
    assert "tor-1-v4" in message(wanted, "PeerNotUsable")
    assert "c-ourselves" in message(wanted, "PeerNotUsable")
    assert "b-no-address" in message(wanted, "ObjectNotUsable")
    assert "d-selector" in message(wanted, "ObjectNotUsable")


def test_a_mesh_has_a_session_per_family_and_one_side_waits() -> None:
    nodes = (node("node-0", "10.9.0.2", "fd00:9::2", asn="65109"), node("node-2", "10.9.0.3", asn=""))
    config = configuration(node_to_node_mesh_enabled=True, as_number=64600)
    wanted = plan(snapshot(cluster=cluster(nodes=nodes, peers=(), configuration=config)))
    assert wanted.sessions is not None
    assert {(s.name, s.address, s.peer_as, s.passive) for s in wanted.sessions} == {
        ("mesh-node-0", "10.9.0.2", 65109, True),
        ("mesh-node-0", "fd00:9::2", 65109, True),
        ("mesh-node-2", "10.9.0.3", 64600, False),
    }
    assert plan(snapshot(cluster=cluster(nodes=nodes, peers=()))).sessions == frozenset(), "the mesh is off"


def test_a_mesh_that_is_too_large_says_so() -> None:
    nodes = tuple(node(f"n-{i}", f"10.9.{i // 250}.{i % 250 + 1}") for i in range(100))
    wanted = plan(snapshot(cluster=cluster(nodes=nodes, configuration=configuration(node_to_node_mesh_enabled=True))))
    assert "MeshTooLarge" in types(wanted)


def test_a_peer_over_its_maximum_is_removed_and_its_routes_with_it() -> None:
    few = cluster(peers=(bgp_peer("tor-1-v4", "10.0.1.0", max_prefixes=1), *cluster().peers[1:]))
    rib = rib_with({"10.0.1.0": ["10.244.2.0/26", "10.244.3.0/26"], "10.0.2.0": ["10.244.2.0/26"]}, cluster=few)
    wanted = plan(snapshot(cluster=few, rib=rib))
    assert wanted.sessions is not None
    assert {s.name for s in wanted.sessions} == {"tor-1-v6", "tor-2-v4", "tor-2-v6"}
    assert "maxPrefixes" in message(wanted, "MaxPrefixesExceeded")
    assert {p: r.nexthops for (p, proto, _), r in wanted.routes.items() if proto == PROTO_IMPORTS} == {
        "10.244.2.0/26": (NextHop("10.0.2.0", 3),)
    }
    assert "10.0.1.0" not in {a.peer for a in wanted.announcements or ()}


# -- blocks and announcements ------------------------------------------------------------------------------------------


def test_blackholes_come_before_announcements() -> None:
    before = plan(snapshot(kernel=kernel_of()))
    assert prefixes(before, PROTO_BLOCKS) == {OWN4, OWN6}
    assert announced(before) == set()
    half = plan(snapshot(kernel=kernel_of(OWN4)))
    assert {prefix for _, prefix, _ in announced(half)} == {OWN4}


def test_each_block_goes_to_the_peers_of_its_family_with_our_end_as_next_hop() -> None:
    assert announced(plan(snapshot())) == {
        ("10.0.1.0", OWN4, "10.0.1.1"),
        ("10.0.2.0", OWN4, "10.0.2.1"),
        ("fd00:0:1::", OWN6, "fd00:0:1::1"),
        ("fd00:0:2::", OWN6, "fd00:0:2::1"),
    }


def test_only_own_blocks_go_out_never_what_was_received() -> None:
    rib = rib_with({"10.0.1.0": ["10.244.2.0/26"]})
    assert {prefix for _, prefix, _ in announced(plan(snapshot(rib=rib)))} == {OWN4, OWN6}


def test_blocks_of_a_pool_without_export_have_a_blackhole_and_no_announcement() -> None:
    pools = (pool("10.244.0.0/16", disable_bgp_export=True), pool("fd00:10:244::/48"))
    wanted = plan(snapshot(cluster=cluster(pools=pools)))
    assert prefixes(wanted, PROTO_BLOCKS) == {OWN4, OWN6}
    assert {prefix for _, prefix, _ in announced(wanted)} == {OWN6}


def test_blocks_of_a_disabled_pool_or_of_none_stay_announced() -> None:
    assert {p for _, p, _ in announced(plan(snapshot(cluster=cluster(pools=()))))} == {OWN4, OWN6}
    disabled = (pool("10.244.0.0/16", disabled=True),)
    assert OWN4 in {p for _, p, _ in announced(plan(snapshot(cluster=cluster(pools=disabled))))}


@pytest.mark.parametrize(
    "blocks", [(block(OWN4, releasing=True),), (block(OWN4, marked=True),), ()], ids=["releasing", "marked", "gone"]
)
class TestLeaving:
    """A block on its way out: withdrawn at once, its blackhole kept until that is told and a second passed."""

    def snap(self, blocks: Any, **changes: Any) -> Snapshot:
        return snapshot(cluster=cluster(blocks=blocks), **{"kernel": kernel_of(OWN4), **changes})

    def test_it_is_withdrawn_while_the_blackhole_stays(self, blocks: Any) -> None:
        speaker = SpeakerState(known=True, sent=frozenset({("10.0.1.0", OWN4)}))
        wanted = plan(self.snap(blocks, speaker=speaker))
        assert announced(wanted) == set()
        assert prefixes(wanted, PROTO_BLOCKS) == {OWN4}

    def test_the_blackhole_goes_a_second_after_the_withdrawal_was_sent(self, blocks: Any) -> None:
        speaker = SpeakerState(known=True, withdrawn_at={OWN4: 999.5})
        early = plan(self.snap(blocks, speaker=speaker))
        assert prefixes(early, PROTO_BLOCKS) == {OWN4}
        assert early.wake_at == 999.5 + SETTLE
        late = plan(self.snap(blocks, speaker=speaker, now=999.5 + SETTLE))
        assert prefixes(late, PROTO_BLOCKS) == set()
        assert (PROTO_BLOCKS, V4) in late.deletable

    def test_one_that_no_peer_was_told_of_goes_at_once(self, blocks: Any) -> None:
        assert prefixes(plan(self.snap(blocks)), PROTO_BLOCKS) == set()

    def test_it_stays_while_the_speaker_says_nothing(self, blocks: Any) -> None:
        wanted = plan(self.snap(blocks, speaker=SpeakerState()))
        assert prefixes(wanted, PROTO_BLOCKS) == {OWN4}
        assert wanted.deletable == frozenset()
        assert "SpeakerUnreachable" in types(wanted)

    def test_with_live_pods_it_stays_announced_until_another_node_owns_it(self, blocks: Any) -> None:
        pod = Route(prefix="10.244.1.9/32", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),))
        kernel = kernel_of(OWN4, routes={**blackholed(OWN4), pod.key: Installed(route=pod)})
        assert OWN4 in {p for _, p, _ in announced(plan(self.snap(blocks, kernel=kernel)))}
        taken = plan(replace(self.snap(blocks, kernel=kernel), cluster=cluster(blocks=blocks, taken=frozenset({OWN4}))))
        assert announced(taken) == set()

    def test_pods_of_a_neighbouring_block_do_not_count(self, blocks: Any) -> None:
        pod = Route(prefix="10.244.1.64/32", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),))
        kernel = kernel_of(OWN4, routes={**blackholed(OWN4), pod.key: Installed(route=pod)})
        assert announced(plan(self.snap(blocks, kernel=kernel))) == set()


def test_a_view_from_disk_keeps_what_the_kernel_has_and_deletes_nothing() -> None:
    rib = rib_with({})
    wanted = plan(snapshot(cluster=cluster(live=False), kernel=kernel_of(OWN4, OWN6, "10.244.7.0/26"), rib=rib))
    assert "10.244.7.0/26" in {p for _, p, _ in announced(wanted)}
    assert wanted.deletable == frozenset()
    assert "StoreUnreachable" in types(wanted)


# -- imports ----------------------------------------------------------------------------------------------------------


def imported(wanted: Plan) -> dict[str, Route]:
    return {p: r for (p, proto, _), r in wanted.routes.items() if proto == PROTO_IMPORTS}


# -- foreign routes in own blocks (R5) --------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [OWN4, "10.244.1.7/32", "10.244.1.32/27"])
def test_a_new_block_that_a_peer_routes_to_gets_no_blackhole_and_the_import_stays(theirs: str) -> None:
    rib = rib_with({"10.0.1.0": [theirs], "fd00:0:2::": ["fd00:10:244::40/126"]}, kernel=kernel_of())
    wanted = plan(snapshot(kernel=kernel_of(), rib=rib))
    assert prefixes(wanted, PROTO_BLOCKS) == set()
    assert announced(wanted) == set()
    assert set(imported(wanted)) == {theirs, "fd00:10:244::40/126"}
    assert theirs in message(wanted, "ForeignRoute")
    assert OWN4 in message(wanted, "ForeignRoute")
    assert "10.0.1.0" in message(wanted, "ForeignRoute")
    gone = plan(snapshot(kernel=kernel_of(), rib=rib_with({})))
    assert prefixes(gone, PROTO_BLOCKS) == {OWN4, OWN6}


def test_a_route_around_a_new_block_or_beside_it_is_nobody_s_claim() -> None:
    rib = rib_with({"10.0.1.0": ["10.244.0.0/16", "10.244.1.0/24", "10.244.1.64/26"]}, kernel=kernel_of())
    wanted = plan(snapshot(kernel=kernel_of(), rib=rib))
    assert prefixes(wanted, PROTO_BLOCKS) == {OWN4, OWN6}
    assert "ForeignRoute" not in types(wanted)


@pytest.mark.parametrize("how", ["blackhole", "pod", "announced"])
def test_a_block_in_use_is_ours_whatever_a_peer_routes_to(how: str) -> None:
    """Also when somebody took its blackhole away."""
    pod = Route(prefix="10.244.1.9/32", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),))
    kernel, sent = {
        "blackhole": (kernel_of(OWN4), frozenset()),
        "pod": (kernel_of(routes={pod.key: Installed(route=pod)}), frozenset()),
        "announced": (kernel_of(), frozenset({("10.0.1.0", OWN4)})),
    }[how]
    speaker = SpeakerState(known=True, sent=sent)
    rib = rib_with({"10.0.1.0": ["10.244.1.0/27"]})
    wanted = plan(snapshot(kernel=kernel, rib=rib, speaker=speaker, cluster=cluster(blocks=(block(OWN4),))))
    assert prefixes(wanted, PROTO_BLOCKS) == {OWN4}
    assert imported(wanted) == {}
    assert "tor-1-v4 announces 10.244.1.0/27" in message(wanted, "ForeignRoute")


def test_an_own_announcement_that_comes_back_is_nobody_else_s() -> None:
    peers = (bgp_peer("tor", "10.0.1.0", num_allowed_local_as_numbers=1),)
    rib = rib_with({}, cluster=cluster(peers=peers))
    back = Received(prefix=OWN4, next_hop="10.0.1.0", attributes=Attributes(as_path=(65001, 65100), origin="igp"))
    rib.apply(Update(peer="10.0.1.0", generation=1, announced=(back,)), 0.0)
    wanted = plan(snapshot(rib=rib, cluster=cluster(peers=peers)))
    assert imported(wanted) == {}
    assert "ForeignRoute" not in types(wanted)


def test_imports_have_source_metric_and_all_equal_next_hops() -> None:
    rib = rib_with(
        {
            "10.0.1.0": ["10.244.2.0/26", "10.244.3.0/26", "192.0.2.0/24", "0.0.0.0/0", "10.244.1.8/29"],
            "10.0.2.0": ["10.244.2.0/26"],
            "fd00:0:1::": ["fd00:10:244::80/122"],
        }
    )
    assert imported(plan(snapshot(rib=rib))) == {
        "10.244.2.0/26": Route(
            prefix="10.244.2.0/26",
            protocol=PROTO_IMPORTS,
            metric=2048,
            nexthops=(NextHop("10.0.1.0", 2), NextHop("10.0.2.0", 3)),
            src="10.0.1.1",
        ),
        "10.244.3.0/26": Route(
            prefix="10.244.3.0/26",
            protocol=PROTO_IMPORTS,
            metric=2048,
            nexthops=(NextHop("10.0.1.0", 2),),
            src="10.0.1.1",
        ),
        "fd00:10:244::80/122": Route(
            prefix="fd00:10:244::80/122",
            protocol=PROTO_IMPORTS,
            metric=2048,
            nexthops=(NextHop("fd00:0:1::", 2),),
            src="fd00:0:1::1",
        ),
    }


def test_import_cidrs_and_disabled_pools_count_for_import() -> None:
    rib = rib_with({"10.0.1.0": ["192.0.2.0/24", "10.250.1.0/26"]})
    changed = cluster(
        configuration=configuration(import_cidrs=("192.0.2.0/24",)),
        pools=(*cluster().pools, pool("10.250.0.0/16", disabled=True)),
    )
    assert set(imported(plan(snapshot(rib=rib, cluster=changed)))) == {"192.0.2.0/24", "10.250.1.0/26"}


def test_a_deleted_pool_counts_as_before_and_is_inhabited_by_blocks_and_routes_inside_it() -> None:
    ours, theirs, empty = pool("10.244.0.0/16", "ours"), pool("10.250.0.0/16", "theirs"), pool("10.251.0.0/16", "empty")
    gone = frozenset({"ours", "theirs", "empty"})
    rib = rib_with({"10.0.1.0": ["10.250.1.0/26"]})
    before = snapshot(rib=rib, cluster=cluster(pools=(ours, theirs, empty)))
    after = replace(before, cluster=replace(before.cluster, deleted_pools=gone))
    assert plan(before).inhabited == frozenset()
    assert plan(after).inhabited == {"ours", "theirs"}
    assert plan(after).routes == plan(before).routes
    assert plan(after).announcements == plan(before).announcements
    assert "10.250.1.0/26" in imported(plan(after))


def test_a_fallback_default_route_stands_below_every_other() -> None:
    peers = (bgp_peer("tor-1-v4", "10.0.1.0", default_route="Fallback"), *cluster().peers[1:])
    rib = rib_with({"10.0.1.0": ["0.0.0.0/0"], "10.0.2.0": ["0.0.0.0/0"]}, cluster=cluster(peers=peers))
    wanted = plan(snapshot(rib=rib, cluster=cluster(peers=peers)))
    (route,) = imported(wanted).values()
    assert (route.metric, route.nexthops) == (METRIC_FALLBACK, (NextHop("10.0.1.0", 2),))


def test_a_next_hop_without_carrier_leaves_the_group_and_the_last_one_stays() -> None:
    rib = rib_with({"10.0.1.0": ["10.244.2.0/26"], "10.0.2.0": ["10.244.2.0/26"]})
    for down, left in (((2,), ("10.0.2.0",)), ((3,), ("10.0.1.0",)), ((2, 3), ("10.0.1.0",))):
        kernel = kernel_of(OWN4, OWN6)
        links = {i: replace(link, carrier=i not in down) for i, link in kernel.links.items()}
        wanted = imported(plan(snapshot(rib=rib, kernel=replace(kernel, links=links))))
        assert tuple(hop.gateway for hop in wanted["10.244.2.0/26"].nexthops) == left


def test_a_next_hop_on_an_interface_that_is_down_is_not_on_link() -> None:
    rib = rib_with({"10.0.1.0": ["10.244.2.0/26"]})
    kernel = kernel_of(OWN4, OWN6)
    kernel = replace(kernel, links={**kernel.links, 2: Link(index=2, name="up1", up=False, carrier=False)})
    wanted = plan(snapshot(rib=rib, kernel=kernel))
    assert imported(wanted) == {}
    assert "tor-1-v4: 1 prefixes" in message(wanted, "NextHopNotOnLink")


def annotated(obj: Any, **addresses: str) -> Any:
    """The node with these addresses in its annotations, by ``ipv4`` and ``ipv6``."""
    more = {f"underlay.network/{family}-address": text for family, text in addresses.items()}
    return replace(obj, metadata=replace(obj.metadata, annotations={**obj.metadata.annotations, **more}))


def test_a_node_s_annotations_say_where_its_sessions_end() -> None:
    """For itself, and for who peers with it in the mesh; the other family stays as it is."""
    here = annotated(node(), ipv4="10.0.2.1")
    there = annotated(node("node-2", "10.0.9.9", "fd00:9::9"), ipv4="10.0.8.8")
    mesh = configuration(node_to_node_mesh_enabled=True)
    wanted = plan(snapshot(cluster=cluster(node=here, nodes=(there,), peers=(), configuration=mesh)))
    assert wanted.sessions is not None
    assert {(s.address, s.local_address) for s in wanted.sessions} == {
        ("10.0.8.8", "10.0.2.1"),
        ("fd00:9::9", "fd00:0:1::1"),
    }
    assert wanted.router_id == "10.0.2.1"
    assert wanted.conditions == ()


def test_an_annotation_that_is_no_address_is_named_and_left_out() -> None:
    wanted = plan(snapshot(cluster=cluster(node=annotated(node(), ipv4="10.0.2.1/31"))))
    assert wanted.router_id == "10.0.1.1"
    assert "underlay.network/ipv4-address" in message(wanted, "NodeAddressNotLocal")


def test_an_address_that_the_kernel_lacks_is_no_source() -> None:
    rib = rib_with({"10.0.1.0": ["10.244.2.0/26"]})
    wanted = plan(snapshot(rib=rib, cluster=cluster(node=node("node-1", "10.7.7.7", "fd00:0:1::1"))))
    assert imported(wanted)["10.244.2.0/26"].src == ""
    assert "10.7.7.7" in message(wanted, "NodeAddressNotLocal")


def test_nothing_imported_goes_before_every_peer_of_its_family_has_reported() -> None:
    rib = Rib()
    rib.configure(plan(snapshot()).peers, 990.0)
    assert {p for p, _ in plan(snapshot(rib=rib)).deletable} == {PROTO_BLOCKS}
    for address in PEERS:
        rib.apply(SessionUp(peer=address, generation=1, families=(V4, V6), helper=True), 995.0)
    for address in ("10.0.1.0", "fd00:0:1::", "fd00:0:2::"):
        for family in (V4, V6):
            rib.apply(EndOfRib(peer=address, generation=1, family=family), 996.0)
    waiting = plan(snapshot(rib=rib))
    assert {(p, f) for p, f in waiting.deletable if p == PROTO_IMPORTS} == {(PROTO_IMPORTS, V6)}
    assert waiting.wake_at == 995.0 + 30
    assert (PROTO_IMPORTS, V4) in plan(snapshot(rib=rib, now=995.0 + 30)).deletable
    assert not plan(snapshot(rib=rib, now=2000.0, speaker=SpeakerState())).deletable


def test_a_peer_that_would_drop_our_routes_is_named() -> None:
    rib = rib_with({})
    assert "GracefulRestartNotNegotiated" not in types(plan(snapshot(rib=rib)))
    rib.apply(SessionUp(peer="10.0.2.0", generation=2, families=(V4, V6)), 1.0)
    wanted = plan(snapshot(rib=rib))
    assert message(wanted, "GracefulRestartNotNegotiated").startswith("tor-2-v4: ")
    assert "tor-1" not in message(wanted, "GracefulRestartNotNegotiated")


# -- pods and sysctls --------------------------------------------------------------------------------------------------


def pod_snapshot(group: int = LINK_GROUP, **changes: Any) -> Snapshot:
    allocation = Allocation(address="10.244.1.9", network="n", container="abc", interface="eth0")
    kernel = kernel_of(OWN4)
    kernel = replace(kernel, links={**kernel.links, 9: Link(index=9, name="ulabceth0", group=group)})
    blocks = (block(OWN4, allocations=(allocation,)),)
    return snapshot(**{"cluster": cluster(blocks=blocks), "kernel": kernel, **changes})


def test_a_pod_s_route_is_repaired_once_it_has_been_missing_for_a_while() -> None:
    first = plan(pod_snapshot())
    assert prefixes(first, PROTO_PODS) == set()
    assert first.missing == {"10.244.1.9"}
    assert first.wake_at == 1000.0 + REPAIR_AFTER
    later = plan(pod_snapshot(now=1000.0 + REPAIR_AFTER, missing={"10.244.1.9": 1000.0}))
    route = Route(prefix="10.244.1.9/32", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),))
    assert later.routes[route.key] == route
    assert not any(p == PROTO_PODS for p, _ in later.deletable)


def test_a_pod_whose_veth_is_gone_or_about_to_go_is_left_alone() -> None:
    missing = {"10.244.1.9": 0.0}
    assert plan(pod_snapshot(LINK_GROUP_DOOMED, missing=missing)).missing == frozenset()
    assert plan(pod_snapshot(0, missing=missing)).missing == frozenset()
    other = replace(pod_snapshot(missing=missing), link_name=lambda c, i: "ulother")
    assert plan(other).missing == frozenset()


def test_uplinks_pass_over_dead_links_and_take_packets_of_either() -> None:
    kernel = kernel_of(OWN4, OWN6)
    wanted = plan(snapshot(kernel=kernel)).sysctls
    assert wanted == {
        f"net.{v}.conf.{n}.ignore_routes_with_linkdown": "1" for v in ("ipv4", "ipv6") for n in ("up1", "up2")
    }
    strict = replace(kernel, sysctls={**kernel.sysctls, "net.ipv4.conf.all.rp_filter": "1"})
    assert plan(snapshot(kernel=strict)).sysctls["net.ipv4.conf.up1.rp_filter"] == "2"
    loose = replace(strict, sysctls={**strict.sysctls, "net.ipv4.conf.up1.rp_filter": "2"})
    assert "net.ipv4.conf.up1.rp_filter" not in plan(snapshot(kernel=loose)).sysctls
    vlan = {2: Link(index=2, name="up1.100"), 3: kernel.links[3]}
    key = "net.ipv4.conf.up1/100.rp_filter"
    tagged = replace(kernel, links=vlan, sysctls={**kernel.sysctls, key: "1"})
    assert plan(snapshot(kernel=tagged)).sysctls[key] == "2"


def test_a_node_that_does_not_forward_says_so() -> None:
    kernel = kernel_of(OWN4, OWN6)
    off = replace(kernel, sysctls={**kernel.sysctls, "net.ipv6.conf.all.forwarding": "0"})
    assert "net.ipv6.conf.all.forwarding" in message(plan(snapshot(kernel=off)), "ForwardingOff")
    assert "ForwardingOff" not in types(plan(snapshot(kernel=kernel)))


def test_equal_snapshots_give_equal_plans_and_are_not_changed() -> None:
    rib = rib_with({"10.0.1.0": ["10.244.2.0/26", "10.0.0.0/8"], "10.0.2.0": ["10.244.2.0/26"]})
    shot = snapshot(rib=rib)
    assert plan(shot) == plan(shot) == plan(snapshot(rib=rib))
