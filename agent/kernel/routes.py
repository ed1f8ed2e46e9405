"""Routes of ours in the kernel's main table: dumped by protocol number, written as messages.

Attributes and numbers are those of include/uapi/linux/rtnetlink.h. Messages are packed by hand, as 100,000 of them are
to be loaded in a second; tests/unit compares them with pyroute2's, byte by byte.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Final

from agent.delta import group_hops
from agent.fib import Installed, KernelState, NextHop, Route, RouteKey
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from cni.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Netlink,
    NetlinkError,
    attr,
    attr_header,
    attr_u32,
    attributes,
)

PROTOCOLS: Final = (PROTO_PODS, PROTO_BLOCKS, PROTO_IMPORTS)

RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
_RTM_GETROUTE = 26

#: rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
HEADER: Final = struct.Struct("=BBBBBBBBI")
_U32 = struct.Struct("=I")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_VIA, _RTA_NH_ID = 1, 4, 5, 6, 7, 18, 30
_TABLE_MAIN = 254
_UNIVERSE, _LINK, _NOWHERE = 0, 253, 255
_UNICAST, _BLACKHOLE = 1, 6

#: What a dump says of a route besides its prefix: metric, kind, next hops, source, nexthop id.
_Rest = tuple[int, str, tuple[NextHop, ...], str, int]


def add(route: Route, nexthop_id: int) -> Message:
    """A route where there is none of its prefix and metric: refused with EEXIST beside any other, ours or foreign."""
    return Message(RTM_NEWROUTE, _body(route, nexthop_id), NLM_F_CREATE | NLM_F_EXCL)


def replace(route: Route, nexthop_id: int) -> Message:
    """In the place of the route of this prefix and metric, whoever's it is: only for one that is known to be ours."""
    return Message(RTM_NEWROUTE, _body(route, nexthop_id), NLM_F_REPLACE)


def delete(route: Route) -> Message:
    """The route with this prefix, metric, kind and protocol number, whatever it leads to."""
    address, _, length = route.prefix.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    before, behind = _around(family, length, route.protocol, route.metric, route.kind, None, "", 0)
    return Message(RTM_DELROUTE, before + socket.inet_pton(family, address) + behind)


def sources(netlink: Netlink, targets: Iterable[str]) -> dict[str, str]:
    """The source address that the kernel would send from to each of the addresses; those left out that it has no way
    to, or needs none to as they are its own (RTM_GETROUTE, ip-route(8) "get")."""
    found = {}
    for target in targets:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        header = HEADER.pack(family, 128 if family == socket.AF_INET6 else 32, 0, 0, 0, 0, 0, 0, 0)
        try:
            answer = netlink.get(Message(_RTM_GETROUTE, header + attr(_RTA_DST, socket.inet_pton(family, target))))
        except NetlinkError:
            continue  # no route to host, or no network at all
        values = attributes(answer.body, HEADER.size)
        if HEADER.unpack_from(answer.body)[7] == _UNICAST and _RTA_PREFSRC in values:
            found[target] = socket.inet_ntop(family, values[_RTA_PREFSRC])
    return found


def dump(netlink: Netlink) -> dict[RouteKey, tuple[Route, int]]:
    """Our routes in the main table, both families, and the id of the nexthop object that each goes through (0: none);
    what is behind the id is left open. Raises NetlinkError."""
    found: dict[RouteKey, tuple[Route, int]] = {}
    rests: dict[bytes, _Rest] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in PROTOCOLS:
            header = HEADER.pack(family, 0, 0, 0, 0, protocol, 0, 0, 0)
            for message in netlink.dump(Message(_RTM_GETROUTE, header)):
                parsed = _parse(message.body, rests)
                if parsed is not None:
                    found[parsed[0].key] = parsed
    return found


def resolve(
    dumped: Mapping[RouteKey, tuple[Route, int]],
    nexthops: Mapping[int, NextHop],
    groups: Mapping[int, tuple[int, ...]],
) -> dict[RouteKey, Installed]:
    """Puts in what is behind the ids; nothing for an id that is not ours."""
    state = KernelState(nexthops=nexthops, groups=groups)
    behind = {id_: group_hops(members, state) for id_, members in groups.items()}
    behind |= {id_: (hop,) for id_, hop in nexthops.items()}
    found: dict[RouteKey, Installed] = {}
    for key, (route, id_) in dumped.items():
        if id_:
            route = Route(
                prefix=route.prefix,
                protocol=route.protocol,
                metric=route.metric,
                kind=route.kind,
                nexthops=behind.get(id_, ()),
                src=route.src,
            )
        found[key] = Installed(route=route, nexthop_id=id_)
    return found


def _body(route: Route, nexthop_id: int) -> bytes:
    """Routes by the thousand differ only in where they go: what stands around that is made once."""
    address, _, length = route.prefix.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    before, behind = _around(
        family, length, route.protocol, route.metric, route.kind, route.nexthops, route.src, nexthop_id
    )
    return before + socket.inet_pton(family, address) + behind


@lru_cache(maxsize=1024)
def _around(
    family: int,
    length: str,
    protocol: int,
    metric: int,
    kind: str,
    nexthops: tuple[NextHop, ...] | None,
    src: str,
    nexthop_id: int,
) -> tuple[bytes, bytes]:
    """A route's message up to its destination, and after it; ``nexthops`` None: wherever it leads to."""
    hop = nexthops[0] if nexthops and not nexthop_id else None
    # IPv6 knows no scopes; in IPv4 a route without a gateway must say that its destination is on the link.
    scope = _LINK if family == socket.AF_INET and hop is not None and not hop.gateway else _UNIVERSE
    if nexthops is None:
        scope = _NOWHERE
    header = HEADER.pack(family, int(length), 0, 0, _TABLE_MAIN, protocol, scope, _type(kind), 0)
    parts = [attr_u32(_RTA_PRIORITY, metric)]
    if src:
        parts.append(attr(_RTA_PREFSRC, _packed(src)))
    if nexthop_id:
        parts.append(attr_u32(_RTA_NH_ID, nexthop_id))
    if hop is not None:
        parts += _hop(family, hop)
    return header + attr_header(_RTA_DST, 16 if family == socket.AF_INET6 else 4), b"".join(parts)


def _hop(family: int, hop: NextHop) -> Iterator[bytes]:
    if hop.gateway:
        gateway = _packed(hop.gateway)
        if (len(gateway) == 16) == (family == socket.AF_INET6):
            yield attr(_RTA_GATEWAY, gateway)
        else:
            yield attr(_RTA_VIA, struct.pack("=H", socket.AF_INET6) + gateway)  # RFC 8950
    yield attr_u32(_RTA_OIF, hop.interface)


def _type(kind: str) -> int:
    return _BLACKHOLE if kind == "blackhole" else _UNICAST


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def _parse(body: bytes, rests: dict[bytes, _Rest]) -> tuple[Route, int] | None:
    """One dumped route. Most differ only in the prefix, which the kernel puts second, after the table (fib_dump_info,
    rt6_fill_node): what else they say is parsed once and kept in ``rests``."""
    family, length, _, tos, table, protocol, _, _, _ = HEADER.unpack_from(body)
    if table != _TABLE_MAIN or tos:
        return None
    size = 16 if family == socket.AF_INET6 else 4
    if body[20:24] == struct.pack("=HH", size + 4, _RTA_DST):
        address, rest = body[24 : 24 + size], body[:20] + body[24 + size :]
        values = rests.get(rest)
        if values is None:
            values = rests[rest] = _rest(rest)
    else:
        address, values = attributes(body, HEADER.size).get(_RTA_DST, bytes(size)), _rest(body)
    metric, kind, nexthops, src, id_ = values
    prefix = f"{socket.inet_ntop(family, address)}/{length}"
    route = Route(
        prefix=prefix,
        protocol=protocol,
        metric=metric,
        kind="blackhole" if kind == "blackhole" else "unicast",
        nexthops=nexthops,
        src=src,
    )
    return route, id_


def _rest(body: bytes) -> _Rest:
    family, kind = body[0], body[7]
    found = attributes(body, HEADER.size)
    metric = _number(found.get(_RTA_PRIORITY))
    src = socket.inet_ntop(family, found[_RTA_PREFSRC]) if _RTA_PREFSRC in found else ""
    id_ = _number(found.get(_RTA_NH_ID))
    if kind == _BLACKHOLE:
        return metric, "blackhole", (), "", 0
    hops: Iterable[NextHop] = ()
    if not id_ and _RTA_OIF in found:  # several next hops in the route itself are none of ours: to be replaced
        hops = (NextHop(_gateway(family, found), _number(found[_RTA_OIF])),)
    return metric, "unicast", tuple(hops), src, id_


def _gateway(family: int, found: Mapping[int, bytes]) -> str:
    if _RTA_GATEWAY in found:
        return socket.inet_ntop(family, found[_RTA_GATEWAY])
    if _RTA_VIA in found:
        return socket.inet_ntop(socket.AF_INET6, found[_RTA_VIA][2:])
    return ""


def _number(value: bytes | None) -> int:
    return 0 if value is None else int(_U32.unpack(value)[0])
