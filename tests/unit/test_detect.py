"""Where a node is reached: each method over frozen interfaces, what the plan makes of it, and whom others believe."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.bgp.history import History
from agent.bgp.model import Family, SpeakerState
from agent.detect import AddressNotUsable, Method, find, parse, reached
from agent.fib import Address, KernelState, Link
from agent.plan import Cluster, Plan, Snapshot, plan
from agent.report import report
from agent.rib import Rib
from cni.marks import LINK_GROUP
from store.model import (
    ANNOTATION_ADDRESS,
    DETECTED,
    BGPNodeStatus,
    BGPNodeStatusStatus,
    Meta,
    Node,
    NodeAddress,
    NodeStatus,
)
from tests.agent_fakes import configuration, pool

V4: Family = "ipv4 unicast"
V6: Family = "ipv6 unicast"


def kernel(*entries: tuple[str, str], **changes: Any) -> KernelState:
    """Interfaces by name with an address and its length each, in their order."""
    names = list(dict.fromkeys(name for name, _ in entries))
    links = {i: Link(index=i, name=n, group=LINK_GROUP if n.startswith("ul") else 0) for i, n in enumerate(names, 1)}
    addresses = []
    for name, text in entries:
        address, _, length = text.partition("/")
        length = length or ("64" if ":" in address else "24")
        bits = 128 if ":" in address else 32
        number = int(ip_address(address)) >> (bits - int(length)) << (bits - int(length))
        subnet = f"{type(ip_address(address))(number)}/{length}"
        addresses.append(Address(address=address, subnet=subnet, interface=names.index(name) + 1))
    return replace(KernelState(links=links, addresses=tuple(addresses)), **changes)


RACK = kernel(
    ("lo", "127.0.0.1/8"),
    ("lo", "192.0.2.99/32"),
    ("docker0", "172.17.0.1/16"),
    ("eth0", "192.0.2.1"),
    ("eth0", "2001:db8::1"),
    ("eth1", "198.51.100.1"),
    ("eth1", "2001:db8:1::1"),
    ("ens192", "203.0.113.1"),
    ("kube-ipvs0", "10.96.0.1/32"),
    ("ul0123", "169.254.1.1/32"),
)


@pytest.mark.parametrize(
    ("text", "four"),
    [
        ("first-found", "192.0.2.1"),
        ("interface=eth1", "198.51.100.1"),
        ("interface=e.*", "192.0.2.1"),
        ("interface=eth9,ens.*", "203.0.113.1"),
        ("interface=docker0", "172.17.0.1"),
        ("interface=lo", "192.0.2.99"),
        ("skip-interface=eth0", "198.51.100.1"),
        ("skip-interface=eth.*", "203.0.113.1"),
        ("cidr=203.0.113.0/24", "203.0.113.1"),
        ("cidr=10.0.0.0/8,198.51.0.0/16", "198.51.100.1"),
        ("can-reach=8.8.8.8", "198.51.100.1"),
        ("none", ""),
    ],
)
def test_each_method_takes_the_address_that_it_names(text: str, four: str) -> None:
    method = parse(text, 4)
    assert find(method, V4, RACK, [], routed={"8.8.8.8": "198.51.100.1"}) == (four, "")
    assert reached(method, Method()) == (("8.8.8.8",) if text.startswith("can-reach") else ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("interface=eth", "no interface eth has an address"),
        ("skip-interface=e.*", "no interface but e.* has an address"),
        ("cidr=10.9.0.0/16", "no address in 10.9.0.0/16"),
        ("can-reach=9.9.9.9", "no route leads to 9.9.9.9"),
    ],
)
def test_what_is_not_there_is_said(text: str, said: str) -> None:
    address, why = find(parse(text, 4), V4, RACK, [], routed={})
    assert address == ""
    assert said in why


@pytest.mark.parametrize(
    "kept_back",
    [{"usable": False}, {"lasting": False}, {"interface": 77}],
)
def test_an_address_that_is_not_there_for_good_is_passed_over(kept_back: dict[str, Any]) -> None:
    first, second = (a for a in RACK.addresses if a.address in ("192.0.2.1", "198.51.100.1"))
    state = replace(RACK, addresses=(replace(first, **kept_back), second))
    assert find(Method("first-found"), V4, state, [])[0] == "198.51.100.1"


def test_an_interface_that_is_down_and_addresses_of_pods_are_passed_over() -> None:
    down = {i: replace(link, up=link.name != "eth0") for i, link in RACK.links.items()}
    assert find(Method("first-found"), V4, replace(RACK, links=down), [])[0] == "198.51.100.1"
    assert find(Method("first-found"), V4, RACK, ["192.0.2.0/24", "198.51.100.0/24"])[0] == "203.0.113.1"


def test_a_virtual_address_beside_the_node_s_own_is_not_taken_for_it() -> None:
    state = kernel(("eth0", "192.0.2.5/32"), ("eth0", "192.0.2.10"))
    assert find(Method("first-found"), V4, state, [])[0] == "192.0.2.10"


@given(st.permutations(RACK.addresses))
def test_the_order_in_which_the_kernel_tells_them_does_not_count(addresses: list[Address]) -> None:
    state = replace(RACK, addresses=tuple(addresses))
    assert [find(Method("first-found"), f, state, []) for f in (V4, V6)] == [("192.0.2.1", ""), ("2001:db8::1", "")]


@pytest.mark.parametrize(
    ("text", "version", "said"),
    [
        ("", 4, "write internal-ip"),
        ("eth0", 4, "write internal-ip"),
        ("interface=", 4, "write internal-ip"),
        ("first-found=eth0", 4, "write internal-ip"),
        ("interface=eth[", 4, "cannot be read"),
        ("cidr=2001:db8::/64", 4, "is none of IPv4"),
        ("cidr=192.0.2.1/24", 4, "host bits"),
        ("can-reach=192.0.2.1", 6, "is none of IPv6"),
        ("can-reach=example.org", 4, "cannot be read"),
        ("can-reach=192.0.2.1,192.0.2.2", 4, "one address"),
    ],
)
def test_a_method_that_cannot_be_meant_says_what_to_write(text: str, version: int, said: str) -> None:
    with pytest.raises(AddressNotUsable, match=said):
        parse(text, version)


# -- the plan ----------------------------------------------------------------------------------------------------------


def a_node(name: str, *internal: str, **annotations: str) -> Node:
    return Node(
        metadata=Meta(name=name, annotations={ANNOTATION_ADDRESS[int(k[1])]: v for k, v in annotations.items()}),
        status=NodeStatus(addresses=tuple(NodeAddress(type="InternalIP", address=a) for a in internal)),
    )


def said(name: str, *addresses: str) -> BGPNodeStatus:
    return BGPNodeStatus(
        metadata=Meta(name=name), status=BGPNodeStatusStatus(addresses=addresses, address_source=DETECTED)
    )


POOLS = (pool("10.244.0.0/16"), pool("fd00:10:244::/112"))
MESH = configuration(node_to_node_mesh_enabled=True)


def planned(
    *,
    node: Node,
    methods: dict[int, Method] | None = None,
    kernel: KernelState = RACK,
    others: tuple[Node, ...] = (a_node("node-2", "192.0.2.2", "2001:db8::2"),),
    **cluster: Any,
) -> Plan:
    values: dict[str, Any] = {"pools": POOLS, "configuration": MESH, **cluster}
    return plan(
        Snapshot(
            node=node.name,
            now=0.0,
            cluster=Cluster(node=node, nodes=others, **values),
            kernel=kernel,
            speaker=SpeakerState(known=True),
            rib=Rib(),
            link_name=lambda container, interface: "",
            methods=methods or {},
        )
    )


def ends(found: Plan) -> dict[str, str]:
    """Each session's end, and ours."""
    assert found.sessions is not None
    return {session.address: session.local_address for session in found.sessions}


def test_internal_ip_is_the_default_and_others_are_told_nothing() -> None:
    found = planned(node=a_node("node-1", "192.0.2.1", "2001:db8::1"))
    assert (found.addresses, found.detected) == (("192.0.2.1", "2001:db8::1"), False)
    assert ends(found) == {"192.0.2.2": "192.0.2.1", "2001:db8::2": "2001:db8::1"}


def test_a_family_that_the_node_does_not_say_is_found_on_the_same_interface() -> None:
    found = planned(node=a_node("node-1", "198.51.100.1"))
    assert (found.addresses, found.detected) == (("198.51.100.1", "2001:db8:1::1"), True)
    assert found.router_id == "198.51.100.1"
    six = planned(node=a_node("node-1", "2001:db8:1::1"))
    assert (six.addresses, six.detected) == (("198.51.100.1", "2001:db8:1::1"), True)


def test_a_family_of_which_there_is_no_pool_or_no_address_stays_away() -> None:
    alone = planned(node=a_node("node-1", "192.0.2.1"), pools=POOLS[:1])
    assert (alone.addresses, alone.detected) == (("192.0.2.1",), False)
    off = planned(node=a_node("node-1", "192.0.2.1"), methods={6: Method("none")})
    assert (off.addresses, off.detected) == (("192.0.2.1",), False)
    without = planned(node=a_node("node-1", "192.0.2.1"), kernel=kernel(("eth0", "192.0.2.1")))
    assert (without.addresses, without.detected, without.conditions) == (("192.0.2.1",), False, ())


def test_the_setting_goes_before_internal_ip_and_people_s_annotation_before_both() -> None:
    method = {4: parse("interface=eth1", 4)}
    found = planned(node=a_node("node-1", "192.0.2.1", "2001:db8::1"), methods=method)
    assert (found.addresses, found.detected) == (("198.51.100.1", "2001:db8::1"), True)
    assert ends(found)["192.0.2.2"] == "198.51.100.1"
    told = planned(node=a_node("node-1", "192.0.2.1", "2001:db8::1", v4="203.0.113.1"), methods=method)
    assert (told.addresses, told.detected) == (("203.0.113.1", "2001:db8::1"), False)


def test_where_nothing_is_found_the_node_s_word_stands_and_it_is_said() -> None:
    found = planned(node=a_node("node-1", "192.0.2.1", "2001:db8::1"), methods={4: parse("interface=bond0", 4)})
    assert (found.addresses, found.detected) == (("192.0.2.1", "2001:db8::1"), False)
    (condition,) = found.conditions
    assert condition.type == "NodeAddressNotFound"
    assert "no interface bond0" in condition.message
    assert "192.0.2.1 of its Node is used" in condition.message


def test_a_change_of_the_address_is_followed() -> None:
    node, method = a_node("node-1", "192.0.2.1"), {4: parse("interface=eth0", 4), 6: Method("none")}
    before = planned(node=node, methods=method, kernel=kernel(("eth0", "192.0.2.1")))
    after = planned(node=node, methods=method, kernel=kernel(("eth0", "192.0.2.7")))
    assert [ends(p)["192.0.2.2"] for p in (before, after)] == ["192.0.2.1", "192.0.2.7"]
    assert [p.detected for p in (before, after)] == [False, True]


def test_others_are_told_what_a_node_does_not_say() -> None:
    found = planned(node=a_node("node-1", "198.51.100.1"))
    told = report(found, Rib(), SpeakerState(known=True), History(), (), BGPNodeStatusStatus(), "now")
    assert (told.addresses, told.address_source) == (("198.51.100.1", "2001:db8:1::1"), DETECTED)
    plain = planned(node=a_node("node-1", "192.0.2.1", "2001:db8::1"))
    quiet = report(plain, Rib(), SpeakerState(known=True), History(), (), BGPNodeStatusStatus(), "now")
    assert (quiet.addresses, quiet.address_source) == (("192.0.2.1", "2001:db8::1"), "")


def test_they_believe_it_before_internal_ip_and_after_an_annotation() -> None:
    other = a_node("node-2", "192.0.2.2")
    found = planned(
        node=a_node("node-1", "192.0.2.1"), others=(other,), statuses=(said("node-2", "198.51.100.2", "2001:db8:1::2"),)
    )
    assert ends(found) == {"198.51.100.2": "192.0.2.1", "2001:db8:1::2": "2001:db8::1"}
    annotated = a_node("node-2", "192.0.2.2", v4="203.0.113.2")
    found = planned(node=a_node("node-1", "192.0.2.1"), others=(annotated,), statuses=(said("node-2", "198.51.100.2"),))
    assert ends(found) == {"203.0.113.2": "192.0.2.1"}
    # A family that it has switched off has no session.
    both = a_node("node-2", "192.0.2.2", "2001:db8::2")
    found = planned(node=a_node("node-1", "192.0.2.1"), others=(both,), statuses=(said("node-2", "192.0.2.2"),))
    assert ends(found) == {"192.0.2.2": "192.0.2.1"}


def test_nobody_takes_another_s_address_by_saying_that_it_is_his() -> None:
    """Neither this node's, nor one that a Node has, nor one that a second node says of itself as well."""
    others = (a_node("node-2", "192.0.2.2"), a_node("node-3", "192.0.2.3"), a_node("node-4", "192.0.2.4"))
    for lies in (("192.0.2.3",), ("192.0.2.1",)):
        found = planned(node=a_node("node-1", "192.0.2.1"), others=others, statuses=(said("node-2", *lies),))
        names = {s.address: s.name for s in found.sessions or ()}
        assert names == {"192.0.2.2": "mesh-node-2", "192.0.2.3": "mesh-node-3", "192.0.2.4": "mesh-node-4"}
        assert "NodeAddressTwice" in {c.type for c in found.conditions}
    twice = (said("node-2", "198.51.100.9"), said("node-3", "198.51.100.9"))
    found = planned(node=a_node("node-1", "192.0.2.1"), others=others, statuses=twice)
    assert set(ends(found)) == {"192.0.2.2", "192.0.2.3", "192.0.2.4"}
