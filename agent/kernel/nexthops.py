"""Nexthop objects and groups of ours, by id. Numbers are those of include/uapi/linux/nexthop.h."""

from __future__ import annotations

import socket
import struct
from typing import Final

import msgspec

from agent.fib import NextHop
from cni.marks import NEXTHOP_BASE, NEXTHOP_SPAN, PROTO_IMPORTS
from cni.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attr, attr_u32, attributes

RTM_NEWNEXTHOP: Final = 104
RTM_DELNEXTHOP: Final = 105
_RTM_GETNEXTHOP = 106

#: nhmsg: family, scope, protocol, reserved, flags.
HEADER: Final = struct.Struct("=BBBBI")
_MEMBER = struct.Struct("=IBBH")  # nexthop_grp: id, weight - 1, reserved
_U32 = struct.Struct("=I")
_NHA_ID, _NHA_GROUP, _NHA_OIF, _NHA_GATEWAY = 1, 2, 5, 6


class Dumped(msgspec.Struct, frozen=True):
    """Nexthops and groups by id, and the ids in our range that are somebody else's."""

    nexthops: dict[int, NextHop]
    groups: dict[int, tuple[int, ...]]
    foreign: frozenset[int]


def add(id_: int, hop: NextHop) -> Message:
    """Refused where the id is taken, or the interface is down or without carrier."""
    family = socket.AF_INET6 if ":" in hop.gateway else socket.AF_INET
    body = HEADER.pack(family, 0, PROTO_IMPORTS, 0, 0) + attr_u32(_NHA_ID, id_) + attr_u32(_NHA_OIF, hop.interface)
    return Message(
        RTM_NEWNEXTHOP, body + attr(_NHA_GATEWAY, socket.inet_pton(family, hop.gateway)), NLM_F_CREATE | NLM_F_EXCL
    )


def add_group(id_: int, members: tuple[int, ...]) -> Message:
    """Members share the packets evenly, a flow stays with one."""
    body = HEADER.pack(socket.AF_UNSPEC, 0, PROTO_IMPORTS, 0, 0) + attr_u32(_NHA_ID, id_)
    group = b"".join(_MEMBER.pack(member, 0, 0, 0) for member in members)
    return Message(RTM_NEWNEXTHOP, body + attr(_NHA_GROUP, group), NLM_F_CREATE | NLM_F_EXCL)


def delete(id_: int) -> Message:
    """The kernel takes along whatever routes use it."""
    return Message(RTM_DELNEXTHOP, HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attr_u32(_NHA_ID, id_))


def dump(netlink: Netlink) -> Dumped:
    """All in our range of ids. Raises NetlinkError."""
    nexthops: dict[int, NextHop] = {}
    groups: dict[int, tuple[int, ...]] = {}
    foreign: set[int] = set()
    for message in netlink.dump(Message(_RTM_GETNEXTHOP, HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0))):
        family, _, protocol, _, _ = HEADER.unpack_from(message.body)
        found = attributes(message.body, HEADER.size)
        id_ = _U32.unpack(found[_NHA_ID])[0]
        if not NEXTHOP_BASE <= id_ < NEXTHOP_BASE + NEXTHOP_SPAN:
            continue
        if protocol != PROTO_IMPORTS:
            foreign.add(id_)
        elif _NHA_GROUP in found:
            groups[id_] = tuple(sorted(member for member, _, _, _ in _MEMBER.iter_unpack(found[_NHA_GROUP])))
        elif _NHA_GATEWAY in found and _NHA_OIF in found:
            gateway = socket.inet_ntop(family, found[_NHA_GATEWAY])
            nexthops[id_] = NextHop(gateway, _U32.unpack(found[_NHA_OIF])[0])
        else:
            foreign.add(id_)
    return Dumped(nexthops, groups, frozenset(foreign))
