"""The hand-packed route messages, against pyroute2's encoder as the oracle, byte by byte; and back."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.fib import NextHop, Route
from agent.kernel import routes
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from cni.netlink import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, encode

UNIVERSE, LINK, NOWHERE = 0, 253, 255


def oracle(family: int, length: int, protocol: int, scope: int, kind: int, *attrs: tuple[str, Any]) -> bytes:
    message = rtmsg()
    message.update(family=family, dst_len=length, table=254, proto=protocol, scope=scope, type=kind, flags=0)
    message["attrs"] = list(attrs)
    return encode(message)


CASES = {
    "blackhole": (
        Route(prefix="10.244.1.0/26", protocol=PROTO_BLOCKS, metric=512, kind="blackhole"),
        (socket.AF_INET, 26, PROTO_BLOCKS, UNIVERSE, 6, ("RTA_DST", "10.244.1.0"), ("RTA_PRIORITY", 512)),
    ),
    "blackhole-6": (
        Route(prefix="fd00::40/122", protocol=PROTO_BLOCKS, metric=512, kind="blackhole"),
        (socket.AF_INET6, 122, PROTO_BLOCKS, UNIVERSE, 6, ("RTA_DST", "fd00::40"), ("RTA_PRIORITY", 512)),
    ),
    "pod": (
        Route(prefix="10.244.1.9/32", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),)),
        (
            *(socket.AF_INET, 32, PROTO_PODS, LINK, 1),
            *(("RTA_DST", "10.244.1.9"), ("RTA_PRIORITY", 32), ("RTA_OIF", 9)),
        ),
    ),
    "pod-6": (
        Route(prefix="fd00::9/128", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),)),
        (
            *(socket.AF_INET6, 128, PROTO_PODS, UNIVERSE, 1),
            *(("RTA_DST", "fd00::9"), ("RTA_PRIORITY", 32), ("RTA_OIF", 9)),
        ),
    ),
    "import": (
        Route(
            prefix="10.244.2.0/26",
            protocol=PROTO_IMPORTS,
            metric=2048,
            nexthops=(NextHop("10.0.1.0", 2),),
            src="10.0.1.1",
        ),
        (
            *(socket.AF_INET, 26, PROTO_IMPORTS, UNIVERSE, 1, ("RTA_DST", "10.244.2.0"), ("RTA_PRIORITY", 2048)),
            *(("RTA_PREFSRC", "10.0.1.1"), ("RTA_GATEWAY", "10.0.1.0"), ("RTA_OIF", 2)),
        ),
    ),
    "import-6": (
        Route(
            prefix="fd00::80/122",
            protocol=PROTO_IMPORTS,
            metric=2048,
            nexthops=(NextHop("fe80::1", 2),),
            src="fd00:1::1",
        ),
        (
            *(socket.AF_INET6, 122, PROTO_IMPORTS, UNIVERSE, 1, ("RTA_DST", "fd00::80"), ("RTA_PRIORITY", 2048)),
            *(("RTA_PREFSRC", "fd00:1::1"), ("RTA_GATEWAY", "fe80::1"), ("RTA_OIF", 2)),
        ),
    ),
    "import-4-over-6": (
        Route(prefix="10.244.2.0/26", protocol=PROTO_IMPORTS, metric=2048, nexthops=(NextHop("fe80::1", 2),)),
        (
            *(socket.AF_INET, 26, PROTO_IMPORTS, UNIVERSE, 1, ("RTA_DST", "10.244.2.0"), ("RTA_PRIORITY", 2048)),
            *(("RTA_VIA", {"family": socket.AF_INET6, "addr": "fe80::1"}), ("RTA_OIF", 2)),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_route_is_packed_as_pyroute2_packs_it_and_parsed_as_it_was(case: tuple[Route, Any]) -> None:
    route, said = case
    assert routes.add(route, 0).body == oracle(*said)
    assert routes.add(route, 0).flags == NLM_F_CREATE | NLM_F_EXCL
    assert routes.replace(route, 0).body == oracle(*said)
    assert routes.replace(route, 0).flags == NLM_F_REPLACE
    assert routes._parse(routes.add(route, 0).body, {}) == (route, 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_deletion_names_prefix_protocol_kind_and_metric(case: tuple[Route, Any]) -> None:
    route, (family, length, protocol, _, kind, *attrs) = case
    assert routes.delete(route).body == oracle(family, length, protocol, NOWHERE, kind, *attrs[:2])


def test_a_group_stands_in_place_of_next_hops() -> None:
    route = Route(
        prefix="10.244.2.0/26",
        protocol=PROTO_IMPORTS,
        metric=2048,
        nexthops=(NextHop("10.0.1.0", 2), NextHop("10.0.2.0", 3)),
    )
    parsed = routes._parse(routes.add(route, 0x554C0003).body, {})
    assert parsed is not None
    assert parsed[1] == 0x554C0003
    resolved = routes.resolve(
        {route.key: parsed},
        {1: NextHop("10.0.2.0", 3), 2: NextHop("10.0.1.0", 2)},
        {0x554C0003: (1, 2)},
    )
    assert resolved[route.key].route == route
    assert routes.resolve({route.key: parsed}, {}, {})[route.key].route.nexthops == ()


def test_other_tables_are_not_ours_to_see() -> None:
    body = bytearray(routes.add(CASES["import"][0], 0).body)
    body[4] = 100
    assert routes._parse(bytes(body), {}) is None
