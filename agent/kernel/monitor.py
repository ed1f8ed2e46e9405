"""The kernel's news, as "something changed, look again": which part, and whether it is worth waking up for."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

import msgspec

from agent.kernel import links, nexthops, routes
from cni.marks import LINK_GROUP, LINK_GROUP_DOOMED, PROTO_PODS
from cni.netlink import Message, Monitor, NetlinkError, attributes

LINKS: Final = "links"  # and addresses
ROUTES: Final = "routes"
NEXTHOPS: Final = "nexthops"
ALL: Final = frozenset({LINKS, ROUTES, NEXTHOPS})

#: RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE, IPV4_NETCONF, IPV6_NETCONF, NEXTHOP.
_GROUPS: Final = (1, 5, 7, 9, 11, 24, 25, 32)
_RTM_NEWADDR, _RTM_DELADDR = 20, 21
_RTM_NEWNETCONF = 80
_NETCONF = 4  # netconfmsg: family, padded
#: Those of the sysctls that a plan looks at (include/uapi/linux/netconf.h): forwarding, rp_filter,
#: ignore_routes_with_linkdown.
_NETCONFA_IFINDEX, _SYSCTLS = 1, frozenset({2, 3, 6})


class News(msgspec.Struct, frozen=True):
    """``changed`` names the parts to read again; ``urgent``: now, and not at the next occasion."""

    changed: frozenset[str] = frozenset()
    urgent: bool = False


class KernelMonitor:
    """Listens in the network namespace that it was made in."""

    def __init__(self) -> None:
        self._monitor = Monitor(_GROUPS)

    def fileno(self) -> int:
        return self._monitor.fileno()

    def close(self) -> None:
        self._monitor.close()

    def read(self) -> News:
        """What has changed since the last call. News that were lost (a burst overran the buffer) are news of all."""
        try:
            return combine(classify(message) for message in self._monitor.read())
        except NetlinkError as e:
            if e.number != errno.ENOBUFS:
                raise
            return News(ALL, urgent=True)


def combine(news: Iterable[News]) -> News:
    """All of them as one."""
    changed: set[str] = set()
    urgent = False
    for item in news:
        changed |= item.changed
        urgent |= item.urgent
    return News(frozenset(changed), urgent)


def classify(message: Message) -> News:
    """Pods come and go by the CNI server's hand, hundreds in a burst: that alone wakes nobody, but for a pod's route
    that goes, which may be one to repair. Foreign routes are none of our business. An uplink that goes takes nexthops
    and routes along, as an address does routes, and a nexthop its routes; the kernel says nothing of those. Sysctls are
    read in each pass anyway; of one that somebody writes the kernel tells alone, of a new interface's all together."""
    match message.type:
        case links.RTM_NEWLINK | links.RTM_DELLINK:
            ours = links.parse_link(message.body).group in (LINK_GROUP, LINK_GROUP_DOOMED)
            return News(frozenset({LINKS})) if ours else News(ALL, urgent=True)
        case _t if _t in (_RTM_NEWADDR, _RTM_DELADDR):
            return News(ALL, urgent=True)
        case nexthops.RTM_NEWNEXTHOP | nexthops.RTM_DELNEXTHOP:
            return News(frozenset({NEXTHOPS, ROUTES}), urgent=True)
        case routes.RTM_NEWROUTE | routes.RTM_DELROUTE:
            protocol = routes.HEADER.unpack_from(message.body)[5]
            if protocol not in routes.PROTOCOLS:
                return News()
            urgent = protocol != PROTO_PODS or message.type == routes.RTM_DELROUTE
            return News(frozenset({ROUTES}), urgent)
        case _t if _t == _RTM_NEWNETCONF:
            told = attributes(message.body, _NETCONF).keys() - {_NETCONFA_IFINDEX}
            return News(urgent=len(told) == 1 and told <= _SYSCTLS)
    return News()
