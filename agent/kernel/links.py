"""Interfaces and addresses of the node (include/uapi/linux/if_link.h, if_addr.h)."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

from agent.fib import Address, Link
from agent.prefix import subnet
from cni.netlink import Message, Netlink, attr_u32, attributes

RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
_RTM_GETLINK = 18
_RTM_GETADDR = 22

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_U32 = struct.Struct("=I")
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
_IFLA_IFNAME, _IFLA_GROUP, _IFLA_EXT_MASK = 3, 27, 29
_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_NOT_YET = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
_OPTIMISTIC = 0x04
_SECONDARY, _DEPRECATED = 0x01, 0x20  # IFA_F_SECONDARY is IFA_F_TEMPORARY for IPv6
_EVERYWHERE = 0  # RT_SCOPE_UNIVERSE


def dump_links(netlink: Netlink) -> dict[int, Link]:
    """All interfaces by index. Raises NetlinkError."""
    request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)
    links = (parse_link(message.body) for message in netlink.dump(Message(_RTM_GETLINK, request)))
    return {link.index: link for link in links}


def parse_link(body: bytes) -> Link:
    """An answer of RTM_GETLINK, or news of a link."""
    _, _, index, flags, _ = _LINK.unpack_from(body)
    found = attributes(body, _LINK.size)
    return Link(
        index=index,
        name=found[_IFLA_IFNAME].rstrip(b"\0").decode(),
        up=bool(flags & _IFF_UP),
        carrier=bool(flags & _IFF_LOWER_UP),
        group=_U32.unpack(found[_IFLA_GROUP])[0] if _IFLA_GROUP in found else 0,
    )


def dump_addresses(netlink: Netlink) -> tuple[Address, ...]:
    """The node's addresses but for IPv6 link-local ones, with the subnet that each makes on-link: for a point-to-point
    address that is the other end's. Raises NetlinkError."""
    found = []
    for message in netlink.dump(Message(_RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))):
        family, length, low_flags, scope, index = _ADDRESS.unpack_from(message.body)
        values = attributes(message.body, _ADDRESS.size)
        if family not in (socket.AF_INET, socket.AF_INET6) or _IFA_ADDRESS not in values:
            continue
        far = socket.inet_ntop(family, values[_IFA_ADDRESS])
        own = socket.inet_ntop(family, values[_IFA_LOCAL]) if _IFA_LOCAL in values else far
        if family == socket.AF_INET6 and ipaddress.IPv6Address(own).is_link_local:
            continue
        flags = _U32.unpack(values[_IFA_FLAGS])[0] if _IFA_FLAGS in values else low_flags
        usable = not flags & _NOT_YET or bool(flags & _OPTIMISTIC)
        lasting = scope == _EVERYWHERE and not flags & (_SECONDARY | _DEPRECATED)
        found.append(Address(address=own, subnet=subnet(far, length), interface=index, usable=usable, lasting=lasting))
    return tuple(sorted(found, key=lambda a: (a.interface, a.address)))
