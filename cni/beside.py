"""A pod's interface beside another one that has the default route: what is sent from its addresses leaves by it.

The pod's main table has one default route, the first interface's. Each further one gets a table of its own, with its
default route, and a rule for each of its addresses. Without them an answer would leave by the first interface, whose
veth lets pass only what has its own addresses (``sources``).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Final

from cni import rtnl
from cni.marks import PROTO_PODS
from cni.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attr, attr_u32, attributes

#: The table of the interface with this index in the pod.
TABLE_BASE: Final = 1000
#: Before the main table's rule, 32766.
RULE_PRIORITY: Final = 1000

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


def wire(pod: Netlink, index: int, addresses: Sequence[str], gateways: Sequence[str]) -> None:
    """Makes table and rules of the pod's interface; ``gateways`` are the addresses', in their order. Rules of ours for
    interfaces that are gone go, too: the kernel removes routes with their interface, but no rules. Raises
    NetlinkError."""
    _tidy(pod)
    messages = []
    for address, gateway in zip(addresses, gateways, strict=True):
        # The gateway is on the link by declaration: the main table may have it on another.
        head = rtnl.ROUTE.pack(
            rtnl.family(address), 0, 0, 0, 0, rtnl.RTPROT_BOOT, 0, rtnl.RTN_UNICAST, rtnl.RTNH_F_ONLINK
        )
        hop = attr(rtnl.RTA_GATEWAY, rtnl.packed(gateway)) + attr_u32(rtnl.RTA_OIF, index)
        table = attr_u32(rtnl.RTA_TABLE, TABLE_BASE + index)
        messages.append(Message(rtnl.NEWROUTE, head + hop + table, NLM_F_CREATE | NLM_F_EXCL))
        messages.append(Message(rtnl.NEWRULE, _rule(index, address), NLM_F_CREATE | NLM_F_EXCL))
    pod.apply(messages)


def rules(pod: Netlink) -> set[tuple[int, bytes]]:
    """Our rules in the pod: index of the interface, and the address. Raises NetlinkError."""
    found = set()
    for family in _FAMILIES:
        for m in pod.dump(Message(rtnl.GETRULE, rtnl.RULE.pack(family, 0, 0, 0, 0, 0, 0))):
            values = attributes(m.body, rtnl.RULE.size)
            if values.get(rtnl.FRA_PROTOCOL) == bytes((PROTO_PODS,)) and rtnl.FRA_SRC in values:
                table = rtnl.U32.unpack(values[rtnl.FRA_TABLE])[0]
                found.add((table - TABLE_BASE, values[rtnl.FRA_SRC]))
    return found


def _tidy(pod: Netlink) -> None:
    there = {link.index for link in rtnl.links(pod)}
    old = [(index, source) for index, source in rules(pod) if index not in there]
    messages = [Message(rtnl.DELRULE, _rule(i, socket.inet_ntop(_FAMILIES[len(s) == 16], s))) for i, s in old]
    for error in pod.batch(messages):
        if error is not None and error.number != errno.ENOENT:
            raise error


def _rule(index: int, address: str) -> bytes:
    raw = rtnl.packed(address)
    return (
        rtnl.RULE.pack(rtnl.family(address), 0, len(raw) * 8, 0, 0, rtnl.FR_ACT_TO_TBL, 0)
        + attr(rtnl.FRA_SRC, raw)
        + attr_u32(rtnl.FRA_PRIORITY, RULE_PRIORITY)
        + attr_u32(rtnl.FRA_TABLE, TABLE_BASE + index)
        + attr(rtnl.FRA_PROTOCOL, bytes((PROTO_PODS,)))
    )
