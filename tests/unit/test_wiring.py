"""The bytes of the pod's wiring, with pyroute2 as the oracle."""

from __future__ import annotations

from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni import podnet, rtnl
from cni.marks import LINK_GROUP, LINK_MAC, PROTO_PODS
from cni.netlink import (
    encode,
)

WANT = podnet.Wiring("ulabcdefghijklm", "eth0", "02:00:00:00:00:01", ("10.0.0.1", "fd00::1"), 1400)


def oracle(kind: Any, fields: dict[str, Any], *attrs: tuple[str, Any]) -> bytes:
    message = kind()
    for key, value in fields.items():
        message[key] = value
    message["attrs"] = list(attrs)
    return encode(message)


def test_the_pair_is_as_pyroute2_writes_it() -> None:
    queues = [("IFLA_NUM_TX_QUEUES", 1), ("IFLA_NUM_RX_QUEUES", 1), ("IFLA_MTU", 1400)]
    peer = [("IFLA_IFNAME", "eth0"), ("IFLA_ADDRESS", WANT.mac), *queues, ("IFLA_NET_NS_FD", 7)]
    info = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
    assert podnet.pair(WANT, 7) == oracle(
        ifinfmsg,
        {},
        ("IFLA_IFNAME", WANT.node_end),
        ("IFLA_ADDRESS", LINK_MAC),
        *queues,
        ("IFLA_GROUP", LINK_GROUP),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", info)]}),
    )


def test_the_pods_end_is_as_pyroute2_writes_it() -> None:
    def address(family: int, length: int, text: str, flags: int) -> bytes:
        head = {"family": family, "prefixlen": length, "flags": flags, "index": 5, "scope": 0}
        return oracle(ifaddrmsg, head, ("IFA_LOCAL", text), ("IFA_ADDRESS", text))

    def neighbour(family: int, text: str) -> bytes:
        head = {"family": family, "ifindex": 5, "state": 0x80}
        return oracle(ndmsg, head, ("NDA_DST", text), ("NDA_LLADDR", LINK_MAC))

    def route(family: int, length: int, scope: int, attr: tuple[str, str]) -> bytes:
        head = {"family": family, "dst_len": length, "table": 254, "proto": 3, "scope": scope, "type": 1}
        return oracle(rtmsg, head, attr, ("RTA_OIF", 5))

    assert [m.body for m in podnet.pod_end(WANT, 5)] == [
        oracle(ifinfmsg, {"index": 5, "flags": 1, "change": 1}),
        address(2, 32, "10.0.0.1", 0),
        neighbour(2, "169.254.1.1"),
        route(2, 32, 253, ("RTA_DST", "169.254.1.1")),
        route(2, 0, 0, ("RTA_GATEWAY", "169.254.1.1")),
        address(10, 128, "fd00::1", 2),
        neighbour(10, podnet.GATEWAY6),
        oracle(
            rtmsg,
            {"family": 10, "dst_len": 128, "table": 255, "proto": 3, "scope": 0, "type": 2},
            ("RTA_DST", "fd00::1"),
            ("RTA_OIF", 5),
        ),
        route(10, 0, 0, ("RTA_GATEWAY", podnet.GATEWAY6)),
    ]


def test_the_nodes_routes_are_as_pyroute2_writes_them() -> None:
    bodies = [m.body for m in podnet.node_end(WANT, 9) if m.type == rtnl.NEWROUTE]
    assert bodies == [
        oracle(
            rtmsg,
            {"family": family, "dst_len": length, "table": 254, "proto": PROTO_PODS, "scope": 253, "type": 1},
            ("RTA_DST", text),
            ("RTA_PRIORITY", 32),
            ("RTA_OIF", 9),
        )
        for family, length, text in ((2, 32, "10.0.0.1"), (10, 128, "fd00::1"))
    ]


def test_names_and_macs_come_from_container_and_interface_alone() -> None:
    name = podnet.link_name("c" * 64, "eth0")
    assert len(name) == 15
    assert name == podnet.link_name("c" * 64, "eth0")
    assert name != podnet.link_name("c" * 64, "eth1")
    mac = podnet.pod_mac("c1", "eth0")
    assert mac != podnet.pod_mac("c2", "eth0")
    assert int(mac[:2], 16) & 3 == 2


def test_the_gateways_link_local_is_that_of_its_mac() -> None:
    raw = bytes.fromhex(LINK_MAC.replace(":", ""))
    identifier = bytes((raw[0] ^ 2,)) + raw[1:3] + b"\xff\xfe" + raw[3:]
    assert rtnl.packed(podnet.GATEWAY6) == bytes.fromhex("fe80000000000000") + identifier
