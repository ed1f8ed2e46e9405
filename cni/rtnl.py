"""rtnetlink's messages as far as the plugin speaks them: headers, numbers, links.

Names and numbers are those of the kernel's include/uapi/linux/{if_link,rtnetlink,neighbour,if_addr,nexthop}.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

import msgspec

from cni.netlink import Message, Netlink, NetlinkError, attr_text, attributes

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, GETADDR = 20, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, GETNEIGH = 28, 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34
SETNEIGHTBL: Final = 67
GETNEXTHOP: Final = 106

LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
ADDR: Final = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
ROUTE: Final = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
NEIGH: Final = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
NEIGHTBL: Final = struct.Struct("=Bxxx")  # ndtmsg: family
NEXTHOP: Final = struct.Struct("=BBBxI")  # nhmsg: family, scope, protocol, flags
RULE: Final = struct.Struct("=BBBBBxxBI")  # fib_rule_hdr: family, dst_len, src_len, tos, table, action, flags
MULTIPATH: Final = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, index
U32: Final = struct.Struct("=I")

IFF_UP: Final = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_LINKINFO = 1, 3, 4, 5, 18
IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 26, 27, 28, 31, 32
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFLA_INET_CONF, CONF_FORWARDING, CONF_PROXY_ARP = 1, 1, 3
IFLA_INET6_CONF, IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_NONE, DEVCONF_ACCEPT_RA = 2, 8, 1, 3
IFA_ADDRESS, IFA_LOCAL, IFA_F_NODAD = 1, 2, 0x02
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE = 1, 4, 5, 6, 9, 15
RT_TABLE_MAIN, RT_TABLE_LOCAL, RTPROT_BOOT, RTM_F_FIB_MATCH = 254, 255, 3, 0x2000
RTN_UNICAST, RTN_LOCAL, RTN_BLACKHOLE = 1, 2, 6
RTNH_F_ONLINK: Final = 4
FRA_SRC, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL, FR_ACT_TO_TBL = 2, 6, 15, 21, 1
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
NDTA_NAME, NDTA_PARMS, NDTPA_IFINDEX, NDTPA_PROXY_DELAY = 1, 6, 1, 13
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NUD_STALE, NUD_PERMANENT = 1, 2, 8, 0x04, 0x80
NHA_OIF: Final = 5


class Link(msgspec.Struct, frozen=True):
    """An interface as RTM_GETLINK shows it. ``peer`` is the index of a veth's other end in its own namespace."""

    index: int
    name: str
    mac: str
    mtu: int
    group: int
    peer: int
    up: bool
    #: Its settings by family, as the kernel packs them.
    families: bytes

    @property
    def forwarding(self) -> bool:
        """Of IPv4; so is ``proxy_arp``."""
        return _devconf(self.families, socket.AF_INET, IFLA_INET_CONF, CONF_FORWARDING - 1) != 0

    @property
    def proxy_arp(self) -> bool:
        return _devconf(self.families, socket.AF_INET, IFLA_INET_CONF, CONF_PROXY_ARP - 1) != 0

    @property
    def accept_ra(self) -> int:
        """0 also for an interface without IPv6."""
        return _devconf(self.families, socket.AF_INET6, IFLA_INET6_CONF, DEVCONF_ACCEPT_RA)


def find(netlink: Netlink, name: str) -> Link | None:
    """The interface of this name in the socket's namespace. Raises NetlinkError."""
    return _get_link(netlink, LINK.pack(0, 0, 0, 0, 0) + attr_text(IFLA_IFNAME, name))


def find_index(netlink: Netlink, index: int) -> Link | None:
    """The interface of this index in the socket's namespace. Raises NetlinkError."""
    return _get_link(netlink, LINK.pack(0, 0, index, 0, 0))


def links(netlink: Netlink) -> list[Link]:
    """Every interface in the socket's namespace. Raises NetlinkError, DumpInterrupted."""
    return [read_link(m.body) for m in netlink.dump(Message(GETLINK, LINK.pack(0, 0, 0, 0, 0)))]


def read_link(body: bytes) -> Link:
    """A RTM_NEWLINK of the kernel's."""
    _, _, index, flags, _ = LINK.unpack_from(body)
    values = attributes(body, LINK.size)
    return Link(
        index=index,
        name=values[IFLA_IFNAME].rstrip(b"\0").decode(errors="surrogateescape"),
        mac=values.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(values.get(IFLA_MTU)),
        group=_number(values.get(IFLA_GROUP)),
        peer=_number(values.get(IFLA_LINK)),
        up=bool(flags & IFF_UP),
        families=values.get(IFLA_AF_SPEC, b""),
    )


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def packed(address: str) -> bytes:
    """Network byte order. OSError if it is no address."""
    return socket.inet_pton(family(address), address)


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _get_link(netlink: Netlink, body: bytes) -> Link | None:
    try:
        return read_link(netlink.get(Message(GETLINK, body)).body)
    except NetlinkError as e:
        if e.number == errno.ENODEV:
            return None
        raise


def _devconf(families: bytes, family: int, conf_of: int, index: int) -> int:
    """A setting out of IFLA_INET_CONF or IFLA_INET6_CONF: arrays of numbers. IPv4's settings count from 1 and lie from
    0 on (include/uapi/linux/ip.h), IPv6's count from 0 (ipv6.h)."""
    conf = attributes(attributes(families, 0).get(family, b""), 0).get(conf_of, b"")
    return int(U32.unpack_from(conf, 4 * index)[0]) if len(conf) >= 4 * index + 4 else 0


def _number(value: bytes | None) -> int:
    return int(U32.unpack(value)[0]) if value else 0
