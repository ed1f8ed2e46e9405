"""How a node is found in a real kernel: what that says of addresses, which way it would go, and what changes."""

from __future__ import annotations

import pytest

from agent.bgp.model import Family
from agent.detect import find, parse
from agent.kernel.state import Kernel
from lab.net import Net

V4: Family = "ipv4 unicast"
V6: Family = "ipv6 unicast"
#: A gateway behind eth1; eth0 has the lower index.
FAR = ("198.18.0.1", "2001:db8:ffff::1")
METHODS = ("first-found", "interface=eth1", "skip-interface=eth0", "cidr=10.2.0.0/16", "can-reach=198.18.0.1")


@pytest.fixture
def node(net: Net) -> Net:
    net.add("node")
    net.ip("node", [f"link add name {name} type veth peer name {name}-far" for name in ("docker0", "eth0", "eth1")])
    net.sysctl("node", {"net.ipv6.conf.all.accept_dad": "0", "net.ipv6.conf.default.accept_dad": "0"})
    for name in ("docker0", "eth0", "eth1"):
        net.ip("node", [f"link set dev {name}-far up", f"link set dev {name} up"])
    net.ip(
        "node",
        [
            "address add 172.17.0.1/16 dev docker0",
            # Not what the node is known by: of the link alone, alone in its subnet, the second of one, deprecated.
            "address add 10.1.7.3/24 scope link dev eth0",
            "address add 10.1.9.1/32 dev eth0",
            "address add 10.1.0.9/24 dev eth0",
            "address add 10.1.0.5/24 dev eth0",
            "address add 2001:db8:1::2/64 nodad preferred_lft 0 dev eth0",
            "address add 2001:db8:1::9/64 nodad dev eth0",
            "address add 10.2.0.9/24 dev eth1",
            "address add 2001:db8:2::9/64 nodad dev eth1",
            f"route add {FAR[0]}/32 via 10.2.0.1",
            f"route add {FAR[1]}/128 via 2001:db8:2::1",
        ],
    )
    return net


def found(kernel: Kernel, text: str, family: Family) -> str:
    state = kernel.read()
    return find(parse(text, 4 if family == V4 else 6), family, state, [], routed=state.sources)[0]


def test_the_kernel_says_which_address_a_node_is_known_by(node: Net) -> None:
    with node.inside("node"):
        kernel = Kernel(reach=FAR)
    try:
        lasting = {a.address for a in kernel.read().addresses if a.lasting}
        assert lasting >= {"10.1.9.1", "10.1.0.9", "2001:db8:1::9", "10.2.0.9"}
        assert not lasting & {"10.1.7.3", "10.1.0.5", "2001:db8:1::2"}
        assert [found(kernel, text, V4) for text in METHODS] == ["10.1.0.9", *["10.2.0.9"] * 4]
        assert found(kernel, "first-found", V6) == "2001:db8:1::9"
        assert found(kernel, f"can-reach={FAR[1]}", V6) == "2001:db8:2::9"
    finally:
        kernel.close()


def test_what_changes_is_seen_at_the_next_look(node: Net) -> None:
    with node.inside("node"):
        kernel = Kernel(reach=FAR)
    try:
        assert found(kernel, "interface=eth1", V4) == "10.2.0.9"
        node.ip("node", ["address del 10.2.0.9/24 dev eth1", "address add 10.3.0.7/24 dev eth1"])
        # Such news wake the agent.
        assert kernel.news()
        assert found(kernel, "interface=eth1", V4) == "10.3.0.7"
        # The way went with the address.
        assert found(kernel, f"can-reach={FAR[0]}", V4) == ""
        node.ip("node", [f"route add {FAR[0]}/32 via 10.1.0.1"])
        assert found(kernel, f"can-reach={FAR[0]}", V4) == "10.1.0.9"
        node.ip("node", ["link set dev eth1 down"])
        assert found(kernel, "interface=eth1", V4) == ""
    finally:
        kernel.close()
