from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.model import (
    ANNOTATION_ADDRESS,
    ANNOTATION_ASN,
    AddCommunity,
    Allocation,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPFilter,
    BGPFilterSpec,
    BGPPassword,
    BGPPeer,
    BGPPeerSpec,
    Community,
    CommunityMatch,
    FilterOperation,
    FilterRuleV4,
    FilterRuleV6,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    IPReservation,
    IPReservationSpec,
    Meta,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    OwnerReference,
    PrefixAdvertisement,
    PrefixLength,
    PrependASPath,
    Resource,
    SecretKeyRef,
    block_name,
)
from store.validate import block_size, duration, is_community, overlaps, peer_address, validate, validate_against


def pool(cidr: str = "10.0.0.0/16", name: str = "pool", **spec: Any) -> IPPool:
    return IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr, **spec))


def block(
    cidr: str = "10.0.0.64/26", name: str = "", allocations: tuple[Allocation, ...] = (), **spec: str
) -> IPAMBlock:
    spec = {"pool": "pool", "node": "node-1", **spec}
    return IPAMBlock(
        metadata=Meta(name=name or block_name(cidr)),
        spec=IPAMBlockSpec(cidr=cidr, **spec),
        status=IPAMBlockStatus(allocations=allocations),
    )


def peer(**spec: Any) -> BGPPeer:
    return BGPPeer(metadata=Meta(name="peer"), spec=BGPPeerSpec(**{"peer_ip": "10.0.0.1", "as_number": 65001, **spec}))


def given_to(address: str, **parts: str) -> Allocation:
    return Allocation(address=address, **{"network": "underlay", "container": "c", "interface": "eth0", **parts})


def fields(obj: Resource, old: Resource | None = None) -> list[str]:
    return [p.field for p in validate(obj, old=old)]


def refused(obj: Resource, field: str, remedy: str) -> None:
    found = [p for p in validate(obj) if p.field == field]
    assert found, f"{field} was not refused: {validate(obj)}"
    assert any(remedy in p.remedy for p in found), found


@pytest.mark.parametrize(
    "obj",
    [
        pool(),
        pool("fd00:10:244::/48", block_size=122),
        pool("10.0.0.0/8", block_size=32),
        pool("10.0.0.0/28", block_size=28),
        pool("10.0.0.0/26"),
        pool("fd00::/64", node_selector="rack == 'r1'", assignment_mode="Manual", disabled=True),
        pool(allowed_uses=("Workload", "Tunnel")),
        IPReservation(
            metadata=Meta(name="r"), spec=IPReservationSpec(reserved_cidrs=("10.0.0.0/28", "10.0.1.1", "fd00::1"))
        ),
        block(),
        block("fd00:10:244::40/122"),
        block("10.0.0.1/32", allocations=(given_to("10.0.0.1"),)),
        block(allocations=(given_to("10.0.0.64"), given_to("10.0.0.127"))),
        BGPConfiguration(metadata=Meta(name="default")),
        BGPConfiguration(metadata=Meta(name="default"), spec=BGPConfigurationSpec(import_cidrs=("0.0.0.0/0", "::/0"))),
        peer(),
        peer(peer_ip="[fd00::1]:1179", node="node-1", filters=("deny", "allow")),
        BGPFilter(metadata=Meta(name="f")),
        peer(node_selector="rack == 'r1'", hold_time=3, max_restart_time="1h", default_route="Fallback"),
        Node(metadata=Meta(name="node-1.example.org", annotations={ANNOTATION_ASN: "4200000000"})),
        Node(
            metadata=Meta(name="n", labels={"topology.kubernetes.io/zone": "a", "spare": ""}),
            spec=NodeSpec(pod_cidrs=("10.0.0.0/24", "fd00::/64")),
            status=NodeStatus(
                addresses=(
                    NodeAddress(type="InternalIP", address="10.0.0.1"),
                    NodeAddress(type="Hostname", address="n"),
                ),
            ),
        ),
    ],
    ids=lambda o: f"{o.kind()}-{msgspec.json.encode(o.spec).decode()[:50]}",
)
def test_good_objects(obj: Resource) -> None:
    assert validate(obj) == ()
    assert validate(obj, old=obj) == ()


@pytest.mark.parametrize(
    ("cidr", "remedy"),
    [
        ("10.0.0.1/16", "write 10.0.0.0/16"),
        ("10.0.0.0", "write 10.0.0.0/32"),
        ("10.0.0.0/255.255.0.0", "write 10.0.0.0/16"),
        ("FD00::/48", "write fd00::/48"),
        ("fd00:0::/48", "write fd00::/48"),
        ("fd00:0:0:0:0:0:0:0/48", "write fd00::/48"),
        ("::ffff:10.0.0.0/112", "write an IPv4 prefix as IPv4"),
        ("10.0.0.0/33", "write an IPv4 or IPv6 prefix"),
        ("010.0.0.0/16", "write an IPv4 or IPv6 prefix"),
        (" 10.0.0.0/16", "write an IPv4 or IPv6 prefix"),
        ("10.0.0.0/16 ", "write an IPv4 or IPv6 prefix"),
        ("fd00::%eth0/64", "write an IPv4 or IPv6 prefix"),
        ("", "write an IPv4 or IPv6 prefix"),
        ("0.0.0.0/0", "this network"),
        ("127.0.0.0/16", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/8", "multicast"),
        ("192.0.0.0/2", "multicast"),
        ("::/0", "loopback and reserved"),
        ("fe80::/64", "link-local"),
        ("ff00::/16", "multicast"),
    ],
)
def test_a_pools_cidr_has_one_spelling_and_can_be_routed(cidr: str, remedy: str) -> None:
    refused(pool(cidr), "spec.cidr", remedy)


@pytest.mark.parametrize(
    ("cidr", "size", "remedy"),
    [
        ("10.0.0.0/22", 21, "write 22..32"),
        (
            "10.0.0.0/16",
            16,
            "write 20..32: the prefix length of a block, which lies inside the pool and has at most 4096",
        ),
        ("10.0.0.0/16", 19, "write 20..32"),
        ("10.0.0.0/16", 33, "write 20..32"),
        ("10.0.0.0/16", -1, "write 20..32"),
        ("10.0.0.0/28", 0, "default size, /26: write 28..32"),
        ("fd00::/48", 115, "write 116..128"),
        ("fd00::/48", 129, "write 116..128"),
        ("fd00::/120", 119, "write 120..128"),
        ("fd00::/124", 0, "default size, /122: write 124..128"),
    ],
)
def test_a_block_lies_in_its_pool(cidr: str, size: int, remedy: str) -> None:
    refused(pool(cidr, block_size=size), "spec.blockSize", remedy)


def test_the_largest_block_and_the_smallest() -> None:
    for cidr, size in (("10.0.0.0/8", 20), ("10.0.0.0/8", 32), ("fd00::/48", 116), ("fd00::/48", 128)):
        assert fields(pool(cidr, block_size=size)) == []


def test_what_a_pool_cannot_ask_for() -> None:
    refused(pool(ipip_mode="Always"), "spec.ipipMode", "no overlay")
    refused(pool(ipip_mode="CrossSubnet"), "spec.ipipMode", "BGPPeer")
    refused(pool(vxlan_mode="CrossSubnet"), "spec.vxlanMode", "no overlay")
    refused(pool(nat_outgoing=True), "spec.natOutgoing", "not served")
    refused(pool(node_selector="rack = 'r1'"), "spec.nodeSelector", "character 6")
    refused(pool(assignment_mode="Sometimes"), "spec.assignmentMode", "Automatic or Manual")
    refused(pool(allowed_uses=("Workload", "LoadBalancer")), "spec.allowedUses", "not served")
    refused(pool(allowed_uses=("Tunnel",)), "spec.allowedUses", "[Workload]")


def test_reservations() -> None:
    def reserved(*cidrs: str) -> IPReservation:
        return IPReservation(metadata=Meta(name="r"), spec=IPReservationSpec(reserved_cidrs=cidrs))

    refused(reserved("10.0.0.0/24", "10.0.0.1/24"), "spec.reservedCIDRs[1]", "write 10.0.0.0/24")
    refused(reserved("fd00::0"), "spec.reservedCIDRs[0]", "write fd00::/128")
    refused(reserved("10.0.0.1", "10.0.0.1"), "spec.reservedCIDRs", "once")


def test_a_block_is_named_by_its_cidr_and_gives_its_own_addresses_once() -> None:
    refused(block(name="10-0-0-0-26"), "metadata.name", "write 10-0-0-64-26")
    refused(block("10.0.0.65/26"), "spec.cidr", "write 10.0.0.64/26")
    refused(block(pool="A_Pool"), "spec.pool", "RFC 1123")
    refused(block(node=""), "spec.node", "RFC 1123")
    for address in ("10.0.0.63", "10.0.0.128", "fd00::1"):
        refused(block(allocations=(given_to(address),)), "status.allocations[0].address", "outside the block")
    refused(block("fd00::/122", allocations=(given_to("FD00::1"),)), "status.allocations[0].address", "write fd00::1")
    refused(block(allocations=(given_to("pod"),)), "status.allocations[0].address", "write an IPv4 or IPv6 address")
    twice = (given_to("10.0.0.64"), given_to("10.0.0.65"), given_to("10.0.0.64", container="d"))
    assert fields(block(allocations=twice)) == ["status.allocations[2].address"]
    refused(block(allocations=(given_to("10.0.0.64", container=""),)), "status.allocations[0].container", "say which")


def test_what_never_changes() -> None:
    assert fields(pool("10.1.0.0/16", block_size=28), pool()) == ["spec.cidr", "spec.blockSize"]
    assert fields(pool(disabled=True), pool()) == []
    assert fields(block(pool="p", node="n"), block()) == ["spec.pool", "spec.node"]
    (problem,) = validate(block(node="n"), old=block())
    assert "stays 'node-1'" in problem.remedy


@pytest.mark.parametrize("number", [0, -1, 23456, 65535, 4294967295, 1 << 40])
def test_as_numbers_that_nobody_has(number: int) -> None:
    refused(peer(as_number=number), "spec.asNumber", "")
    configuration = BGPConfiguration(metadata=Meta(name="default"), spec=BGPConfigurationSpec(as_number=number))
    refused(configuration, "spec.asNumber", "")
    node = Node(metadata=Meta(name="n", annotations={ANNOTATION_ASN: str(number)}))
    refused(node, f"metadata.annotations[{ANNOTATION_ASN}]", "")


@pytest.mark.parametrize("number", [1, 23455, 64512, 65534, 65536, 4294967294])
def test_as_numbers(number: int) -> None:
    assert validate(peer(as_number=number)) == ()


@pytest.mark.parametrize("text", ["", "AS1", "1.1", "+1", " 1", "١"])
def test_the_annotation_is_a_plain_number(text: str) -> None:
    node = Node(metadata=Meta(name="n", annotations={ANNOTATION_ASN: text}))
    refused(node, f"metadata.annotations[{ANNOTATION_ASN}]", "write an AS number")


def test_one_bgp_configuration_holds_for_all() -> None:
    refused(BGPConfiguration(metadata=Meta(name="mine")), "metadata.name", ANNOTATION_ASN)
    spec = BGPConfigurationSpec(import_cidrs=("10.0.0.1/24",))
    refused(BGPConfiguration(metadata=Meta(name="default"), spec=spec), "spec.importCIDRs[0]", "write 10.0.0.0/24")


def test_a_bgp_configuration_of_one_node_says_what_a_node_may_have_of_its_own() -> None:
    def of(name: str, **spec: Any) -> BGPConfiguration:
        return BGPConfiguration(metadata=Meta(name=name), spec=BGPConfigurationSpec(**spec))

    named = (Community(name="rack", value="65001:7"),)
    own: dict[str, Any] = {
        "listen_port": 1179,
        "communities": named,
        "prefix_advertisements": (PrefixAdvertisement(cidr="10.244.0.0/16", communities=("rack", "1:2:3")),),
    }
    password = BGPPassword(secret_key_ref=SecretKeyRef(name="mesh", key="k"))
    shared: dict[str, Any] = {
        "as_number": 64513,
        "node_to_node_mesh_enabled": False,
        "import_cidrs": ("10.9.0.0/16",),
        "node_mesh_password": password,
        "node_mesh_max_restart_time": "60s",
        "ignored_interfaces": ("docker*",),
    }
    assert {f.name for f in msgspec.structs.fields(BGPConfigurationSpec)} == own.keys() | shared.keys()
    assert validate(of("default", **own, **shared)) == ()
    assert validate(of("node.node-1.example.org", **own)) == ()
    assert len(validate(of("node.node-1", **own, **shared))) == len(shared)
    refused(of("node.node-1", as_number=64513), "spec.asNumber", ANNOTATION_ASN)
    refused(of("default", listen_port=65536), "spec.listenPort", "1..65535")
    refused(of("default", node_mesh_max_restart_time="2d"), "spec.nodeMeshMaxRestartTime", "with its unit")
    refused(of("default", communities=named * 2), "spec.communities", "once")
    refused(of("default", communities=(Community(name="a", value="1"),)), "spec.communities[0].value", "65001:100")
    unknown = (Community(name="a", value="no-such"),)
    refused(of("default", communities=unknown), "spec.communities[0].value", "by its name")
    assert validate(of("default", communities=(Community(name="a", value="no-export"),))) == ()
    long = (Community(name="a" * 64, value="1:1"),)
    refused(of("default", communities=long), "spec.communities[0].name", "at most 63")
    unnamed = (PrefixAdvertisement(cidr="10.244.0.0/16", communities=("rack",)),)
    refused(of("default", prefix_advertisements=unnamed), "spec.prefixAdvertisements[0].communities", "in communities")
    many = (PrefixAdvertisement(cidr="10.0.0.0/8", communities=("1:1",) * 9),)
    refused(of("default", prefix_advertisements=many), "spec.prefixAdvertisements[0].communities", "at most 8")
    refused(of("default", prefix_advertisements=many * 33), "spec.prefixAdvertisements", "at most 32")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 179)),
        ("10.0.0.1:1179", ("10.0.0.1", 1179)),
        ("fd00::1", ("fd00::1", 179)),
        ("[fd00::1]:1179", ("fd00::1", 1179)),
        ("[fd00::1]", ("fd00::1", 179)),
    ],
)
def test_peer_addresses(text: str, expected: tuple[str, int]) -> None:
    assert peer_address(text) == expected
    assert validate(peer(peer_ip=text)) == ()


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "write an IPv4 or IPv6 address"),
        ("tor-1", "write an IPv4 or IPv6 address"),
        ("10.0.0.1/32", "write an IPv4 or IPv6 address"),
        ("10.0.0.1:", "port"),
        ("10.0.0.1:0", "port"),
        ("10.0.0.1:65536", "port"),
        ("10.0.0.1:bgp", "port"),
        ("10.0.0.1:" + "9" * 5000, "port"),
        ("[fd00::1]:", "port"),
        ("[10.0.0.1]:1179", "write 10.0.0.1:1179"),
        ("[fd00::1", "write an IPv4 or IPv6 address"),
        ("FD00::1", "write the address as fd00::1"),
        ("fe80::1%eth0", "zone"),
        ("224.0.0.1", "no peer"),
        ("0.0.0.0", "no peer"),
        ("::", "no peer"),
    ],
)
def test_peer_addresses_that_are_none(text: str, remedy: str) -> None:
    refused(peer(peer_ip=text), "spec.peerIP", remedy)


def test_a_peer() -> None:
    refused(peer(node="node-1", node_selector="all()"), "spec.nodeSelector", "leave out node (node-1)")
    refused(peer(node="Node_1"), "spec.node", "RFC 1123")
    refused(peer(node_selector="has("), "spec.nodeSelector", "character 5")
    refused(peer(hold_time=2), "spec.holdTime", "3..65535")
    refused(peer(hold_time=0), "spec.holdTime", "3..65535")
    refused(peer(hold_time=65536), "spec.holdTime", "3..65535")
    refused(peer(max_restart_time="120"), "spec.maxRestartTime", "with its unit")
    refused(peer(max_restart_time="69m"), "spec.maxRestartTime", "4095s")
    refused(peer(num_allowed_local_as_numbers=11), "spec.numAllowedLocalASNumbers", "0..10")
    refused(peer(max_prefixes=0), "spec.maxPrefixes", "1 or more")
    refused(peer(default_route="Always"), "spec.defaultRoute", "Fallback")
    refused(peer(import_cidrs=("10.0.0.0/8", "fd00::1/8")), "spec.importCIDRs[1]", "write fd00::/8")
    by_label: dict[str, Any] = {"peer_ip": "", "as_number": 0, "peer_selector": "has(rr)"}
    assert validate(peer(**by_label, node_selector="!has(rr)", hold_time=30)) == ()
    refused(peer(**{**by_label, "peer_selector": "has("}), "spec.peerSelector", "character 5")
    refused(peer(**{**by_label, "peer_ip": "10.0.0.1"}), "spec.peerIP", "or peerSelector")
    refused(peer(**{**by_label, "as_number": 65001}), "spec.asNumber", "or peerSelector")
    refused(peer(**by_label, passive=True), "spec.passive", "or peerSelector")
    assert validate(peer(reachable_by="10.0.0.254")) == validate(peer(peer_ip="fd00::1", reachable_by="fd00::2")) == ()
    refused(peer(reachable_by="10.0.0.1"), "spec.reachableBy", "the gateway's address")
    refused(peer(reachable_by="fd00::1"), "spec.reachableBy", "family of peerIP (10.0.0.1)")
    refused(peer(reachable_by="gw"), "spec.reachableBy", "IPv4 or IPv6 address")
    refused(peer(reachable_by="224.0.0.1"), "spec.reachableBy", "no gateway")
    refused(peer(peer_ip="fd00::1", reachable_by="fe80::1"), "spec.reachableBy", "link-local")
    refused(peer(**by_label, reachable_by="10.0.0.254"), "spec.reachableBy", "peerSelector")
    refused(peer(ttl_security=255), "spec.ttlSecurity", "1..254")
    refused(peer(ttl_security=1, passive=True), "spec.ttlSecurity", "share one socket")
    refused(peer(peer_ip="10.0.0.1:1179", passive=True), "spec.passive", "connects to us")
    refused(peer(peer_ip="[fd00::1]:1179", passive=True), "spec.passive", "connects to us")
    assert validate(peer(peer_ip="fd00::1", passive=True)) == ()
    refused(peer(source_address="Any"), "spec.sourceAddress", "UseNodeIP")
    refused(peer(local_as_number=0), "spec.localASNumber", "1..4294967294")
    for name, key, field in (
        ("A", "k", "name"),
        ("", "k", "name"),
        ("s", "", "key"),
        ("s", "a b", "key"),
        ("s", "..", "key"),
    ):
        ref = BGPPassword(secret_key_ref=SecretKeyRef(name=name, key=key))
        refused(peer(password=ref), f"spec.password.secretKeyRef.{field}", "")
    refused(peer(filters=("deny", "De_ny")), "spec.filters[1]", "name a BGPFilter")
    refused(peer(filters=("deny", "deny")), "spec.filters", "once")
    refused(peer(filters=tuple(f"f{i}" for i in range(17))), "spec.filters", "at most 16")


def test_a_filter() -> None:
    def refuse(field: str, remedy: str, **rule: Any) -> None:
        made = FilterRuleV4(**{"action": "Accept", **rule})
        refused(
            BGPFilter(metadata=Meta(name="f"), spec=BGPFilterSpec(import_v4=(made,))),
            f"spec.importV4[0]{field}",
            remedy,
        )

    refuse(".action", "Accept or Reject", action="accept")
    refuse(".matchOperator", "or neither", cidr="10.0.0.0/8")
    refuse(".matchOperator", "or neither", match_operator="In")
    refuse(".matchOperator", "NotIn", cidr="10.0.0.0/8", match_operator="Inside")
    refuse(".cidr", "write 10.0.0.0/8", cidr="10.0.0.1/8", match_operator="In")
    refuse(".cidr", "IPv4 rules", cidr="fd00::/8", match_operator="In")
    within: dict[str, Any] = {"cidr": "10.0.0.0/8", "match_operator": "In"}
    refuse(".prefixLength", "goes with In and NotIn", prefix_length=PrefixLength(min=8))
    refuse(".prefixLength", "goes with In", **{**within, "match_operator": "Equal"}, prefix_length=PrefixLength())
    refuse(".prefixLength.min", "8..32", **within, prefix_length=PrefixLength(min=7))
    refuse(".prefixLength.min", "8..32", **within, prefix_length=PrefixLength(min=33))
    refuse(".prefixLength.max", "16..32", **within, prefix_length=PrefixLength(min=16, max=15))
    refuse(".prefixLength.max", "8..32", **within, prefix_length=PrefixLength(max=33))
    refuse(".source", "RemotePeers", source="Local")
    refuse(".interface", "at most 15", interface="a" * 16)
    refuse(".peerType", "eBGP", peer_type="ebgp")
    for community in ("", "1", "1:2:3:4", "65536:0", "01:1", "1:4294967296:1", "no-such", "1:1 "):
        refuse(".communities.values", "65001:100", communities=CommunityMatch(values=(community,)))
    refuse(".communities.values", "another rule", communities=CommunityMatch(values=("1:1", "1:2")))
    refuse(".asPathPrefix[0]", "23456", as_path_prefix=(23456,))
    refuse(".asPathPrefix", "10 AS numbers", as_path_prefix=(1,) * 11)
    added = FilterOperation(add_community=AddCommunity(value="1:1"))
    refuse(".operations", "action Accept", action="Reject", operations=(added,))
    refuse(".operations", "at most 10", operations=(added,) * 11)
    refuse(".operations[0]", "one of", operations=(FilterOperation(),))
    refuse(".operations[0].prependASPath.prefix", "1..10", operations=(prepended(),))
    refuse(".operations[0].prependASPath.prefix[0]", "1..4294967294", operations=(prepended(0),))
    many = BGPFilterSpec(export_v6=(FilterRuleV6(action="Accept"),) * 129)
    refused(BGPFilter(metadata=Meta(name="f"), spec=many), "spec.exportV6", "at most 128")


def prepended(*numbers: int) -> FilterOperation:
    return FilterOperation(prepend_as_path=PrependASPath(prefix=numbers))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("120s", 120), ("2m", 120), ("1h30m", 5400), ("500ms", 0.5), ("1.5s", 1.5), ("0s", 0), ("1m500ms", 60.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "-5s", "5d", "1..5s", "٥s", "5s\n"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        duration(text)


@pytest.mark.parametrize(
    "name", ["", "A", "a_b", "-a", "a-", ".a", "a..b", "a" * 64, ("a" * 60 + ".") * 5 + "a", "a\n"]
)
def test_names_that_are_none(name: str) -> None:
    refused(pool(name=name), "metadata.name", "RFC 1123")


def test_metadata() -> None:
    def with_meta(**meta: Any) -> IPPool:
        return IPPool(metadata=Meta(**{"name": "pool", **meta}), spec=IPPoolSpec(cidr="10.0.0.0/16"))

    refused(with_meta(namespace="default"), "metadata.namespace", "leave it out")
    refused(with_meta(labels={"a b": "c"}), "metadata.labels", "domain/name")
    refused(with_meta(labels={"UPPER.org/a": "c"}), "metadata.labels", "domain/name")
    refused(with_meta(labels={"a": "b c"}), "metadata.labels[a]", "63")
    refused(with_meta(labels={"a": "b" * 64}), "metadata.labels[a]", "63")
    refused(with_meta(annotations={"/a": ""}), "metadata.annotations", "domain/name")
    refused(with_meta(annotations={"a": "b" * (1 << 18)}), "metadata.annotations", "at most")
    refused(with_meta(finalizers=("owner",)), "metadata.finalizers", "domain/name")
    refused(with_meta(finalizers=("a.b/c", "a.b/c")), "metadata.finalizers", "once")
    owner = OwnerReference(api_version="v1", kind="Node", name="node-1", uid="")
    refused(with_meta(owner_references=(owner,)), "metadata.ownerReferences[0].uid", "all four")


def test_nodes() -> None:
    refused(Node(metadata=Meta(name="n"), spec=NodeSpec(pod_cidrs=("10.0.0.1/24",))), "spec.podCIDRs[0]", "10.0.0.0/24")
    four, six = ANNOTATION_ADDRESS[4], ANNOTATION_ADDRESS[6]
    assert validate(Node(metadata=Meta(name="n", annotations={four: "10.0.0.1", six: "fd00::1"}))) == ()
    for key, text in ((four, "fd00::1"), (four, "10.0.0.1/24"), (four, ""), (six, "fd00::0"), (six, "fe80::1")):
        refused(Node(metadata=Meta(name="n", annotations={key: text})), f"metadata.annotations[{key}]", "one spelling")
    status = NodeStatus(addresses=(NodeAddress(type="InternalIP", address="10.0.0.01"),))
    refused(Node(metadata=Meta(name="n"), status=status), "status.addresses[0].address", "IPv4 or IPv6")


def test_a_block_beside_its_pool() -> None:
    pools = [pool("10.0.0.0/16", block_size=26), pool("10.1.0.0/16", name="other", block_size=28)]
    assert validate_against(block(), pools) == ()
    assert validate_against(block(pool="deleted"), pools) == ()
    (outside,) = validate_against(block("10.1.0.0/26"), pools)
    assert "not inside its pool pool (10.0.0.0/16)" in outside.remedy
    (size,) = validate_against(block("10.0.0.0/27"), pools)
    assert "are /26" in size.remedy
    (larger,) = validate_against(block("10.0.0.0/15"), pools)
    assert "not inside" in larger.remedy
    (family,) = validate_against(block("fd00::/122"), pools)
    assert "not inside" in family.remedy


# -- properties ---------------------------------------------------------------------------------------------------

cidrs = st.one_of(
    st.builds(
        lambda a, n: str(ip_network((a, n), strict=False)), st.integers(10 << 24, (11 << 24) - 1), st.integers(8, 32)
    ),
    st.builds(
        lambda a, n: str(ip_network((a, n), strict=False)),
        st.integers(0xFD << 120, (0xFE << 120) - 1),
        st.integers(8, 128),
    ),
)


@given(cidrs)
def test_every_canonical_prefix_names_a_good_block(cidr: str) -> None:
    assert validate(block(cidr)) == ()
    for wrong in (cidr.upper(), f" {cidr}", cidr + "/"):
        if wrong != cidr:
            assert "spec.cidr" in fields(block(wrong, name=block_name(cidr)))


@given(cidrs, cidrs)
def test_overlapping_is_mutual_and_means_a_shared_address(one: str, other: str) -> None:
    a, b = pool(one, name="a"), pool(other, name="b")
    ranges = [(ip_network(c).version, int(ip_network(c)[0]), int(ip_network(c)[-1])) for c in (one, other)]
    (v, first, last), (w, first_, last_) = ranges
    shared = v == w and max(first, first_) <= min(last, last_)
    assert overlaps(a, [b]) == ((b,) if shared else ())
    assert bool(overlaps(b, [a])) is shared
    assert bool(validate_against(a, [b])) is shared
    assert overlaps(a, [a]) == ()


sixes = st.builds(
    lambda groups, n: str(ip_network((sum(g << 16 * i for i, g in enumerate(groups)), n), strict=False)),
    st.lists(st.sampled_from([0, 0, 1, 0x10, 0xFFFF]), min_size=8, max_size=8),
    st.sampled_from([64, 122, 127, 128]),
)


@given(st.one_of(cidrs, sixes), st.one_of(cidrs, sixes))
def test_two_blocks_have_two_names_that_kubernetes_takes(one: str, other: str) -> None:
    assert (block_name(one) == block_name(other)) is (one == other)
    assert "metadata.name" not in fields(block(one))


@given(st.builds(pool, cidrs, block_size=st.integers(-1, 130)))
def test_a_valid_pools_blocks_are_inside_it(candidate: IPPool) -> None:
    if not any(p.field == "spec.blockSize" for p in validate(candidate)):
        network = ip_network(candidate.spec.cidr)
        assert network.prefixlen <= block_size(candidate) <= network.max_prefixlen
        assert network.max_prefixlen - block_size(candidate) <= 12


@given(st.text(max_size=30))
def test_any_text_is_judged_without_a_crash(text: str) -> None:
    for obj in (
        pool(text),
        block(text, name="x"),
        peer(peer_ip=text, max_restart_time=text, node_selector=text, import_cidrs=(text,)),
        Node(metadata=Meta(name=text, labels={text: text}, annotations={ANNOTATION_ASN: text})),
    ):
        validate(obj)
    validate(block(allocations=(given_to(text),)))


@given(st.integers(0, 70000), st.integers(0, 70000), st.integers(0, 2**33), st.sampled_from(["", "0", " "]))
def test_a_community_has_two_numbers_of_16_bits_or_three_of_32(a: int, b: int, c: int, before: str) -> None:
    assert is_community(f"{before}{a}:{b}") is (not before and a < 65536 and b < 65536)
    assert is_community(f"{a}:{before}{c}:{b}") is (not before and c < 2**32)
    for edge in (0, 9, 10, 99, 100, 999, 1000, 9999, 10000, 65535, 65536, 99999):
        assert is_community(f"{edge}:0") is (edge < 65536)
    for edge in (4294967295, 4294967296, 4294967300, 4300000000, 999999999, 1000000000, 9999999999, 3999999999):
        assert is_community(f"0:{edge}:0") is (edge < 2**32)
