"""What ipam asks of the kernel (``ipam.model.KernelView``), answered over netlink."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from cni import rtnl
from cni.marks import LINK_GROUP, PROTO_BLOCKS, PROTO_PODS
from cni.netlink import Message, Netlink, NetlinkError, attributes
from ipam.errors import KernelUnavailable
from ipam.model import ForeignRoute

_ANY: Final = {socket.AF_INET: bytes(4), socket.AF_INET6: bytes(16)}
#: Types of route that say of a range that it is in use: unicast, local, blackhole, unreachable, prohibit (rtnetlink.h).
#: Broadcast, anycast and multicast come with a node's own addresses.
_IN_USE: Final = frozenset({1, 2, 6, 7, 8})
#: Main, and the one of the node's own addresses.
_TABLES: Final = frozenset({rtnl.RT_TABLE_MAIN, rtnl.RT_TABLE_LOCAL})
_OURS: Final = frozenset({PROTO_PODS, PROTO_BLOCKS})


class NetlinkView:
    """A KernelView of the namespace that ``netlink`` was made in. A doomed link counts as gone."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink

    def netns(self) -> int:
        return Path("/proc/thread-self/ns/net").stat().st_ino

    def links(self) -> Mapping[int, str]:
        try:
            return {link.index: link.name for link in rtnl.links(self._netlink) if link.group == LINK_GROUP}
        except NetlinkError as e:
            raise KernelUnavailable(f"the node's links cannot be read: {e}") from e

    def link(self, index: int, name: str) -> bool:
        try:
            by_name = rtnl.find(self._netlink, name)
            by_index = rtnl.find_index(self._netlink, index) if index else None
        except NetlinkError as e:
            raise KernelUnavailable(f"the link {name} ({index}) cannot be read: {e}") from e
        return any(link is not None and link.group == LINK_GROUP for link in (by_name, by_index))

    def pod_routes(self) -> Mapping[str, int]:
        found = {}
        for address, _, values in self._routes(PROTO_PODS, rtnl.RTN_UNICAST):
            found[str(address)] = rtnl.U32.unpack(values[rtnl.RTA_OIF])[0] if rtnl.RTA_OIF in values else 0
        return found

    def blackholes(self) -> frozenset[str]:
        return frozenset(f"{a}/{length}" for a, length, _ in self._routes(PROTO_BLOCKS, rtnl.RTN_BLACKHOLE))

    def foreign_routes(self, within: str) -> tuple[ForeignRoute, ...]:
        network = ipaddress.ip_network(within)
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        first, shift = int(network.network_address), network.max_prefixlen - network.prefixlen
        try:
            routes = self._netlink.dump(Message(rtnl.GETROUTE, rtnl.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)))
        except NetlinkError as e:
            raise KernelUnavailable(f"the node's routes inside {within} cannot be read: {e}") from e
        found = []
        for m in routes:
            _, length, _, _, table, protocol, _, kind, _ = rtnl.ROUTE.unpack_from(m.body)
            # There may be many, and this runs where pods wait: what costs more comes last.
            if length < network.prefixlen or table not in _TABLES or kind not in _IN_USE or protocol in _OURS:
                continue
            values = attributes(m.body, rtnl.ROUTE.size)
            destination = values.get(rtnl.RTA_DST, _ANY[family])
            if int.from_bytes(destination, "big") >> shift == first >> shift:
                found.append((f"{ipaddress.ip_address(destination)}/{length}", protocol, values))
        names: dict[int, str] = {}
        return tuple(ForeignRoute(p, *self._hop(values, names), protocol) for p, protocol, values in found)

    def _hop(self, values: Mapping[int, bytes], names: dict[int, str]) -> tuple[str, str]:
        """Gateway and device of a route, the first of several; "" for what it has not. ``names`` are of links already
        asked for."""
        device, gateway = values.get(rtnl.RTA_OIF), values.get(rtnl.RTA_GATEWAY)
        index = rtnl.U32.unpack(device)[0] if device else 0
        hops = values.get(rtnl.RTA_MULTIPATH)
        if hops:
            length, _, _, index = rtnl.MULTIPATH.unpack_from(hops)
            gateway = attributes(hops[:length], rtnl.MULTIPATH.size).get(rtnl.RTA_GATEWAY)
        if index and index not in names:
            try:
                link = rtnl.find_index(self._netlink, index)
            except NetlinkError:
                link = None  # the name is for people only
            names[index] = link.name if link else ""
        return str(ipaddress.ip_address(gateway)) if gateway else "", names.get(index, "")

    def _routes(
        self, protocol: int, kind: int
    ) -> Iterator[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, dict[int, bytes]]]:
        for family, anything in _ANY.items():
            request = rtnl.ROUTE.pack(family, 0, 0, 0, rtnl.RT_TABLE_MAIN, protocol, 0, kind, 0)
            try:
                routes = self._netlink.dump(Message(rtnl.GETROUTE, request))
            except NetlinkError as e:
                raise KernelUnavailable(f"the node's routes of protocol {protocol} cannot be read: {e}") from e
            for m in routes:
                values = attributes(m.body, rtnl.ROUTE.size)
                if m.body[5] == protocol and m.body[7] == kind:
                    yield ipaddress.ip_address(values.get(rtnl.RTA_DST, anything)), m.body[1], values
