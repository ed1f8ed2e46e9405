"""What the kernel forwards by, as frozen values: routes, nexthops, links, addresses. Pure.

Both sides speak in these: the plan says which routes are wanted, the kernel's drivers say which are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec


class NextHop(msgspec.Struct, frozen=True, order=True):
    """Where a packet goes next: through ``gateway`` ("" = the destination itself is on the link) out of the interface
    with this index."""

    gateway: str
    interface: int


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One route of ours in the main table. ``nexthops`` are sorted; more than one are a nexthop group (R11)."""

    prefix: str
    protocol: int
    metric: int
    kind: Literal["unicast", "blackhole"] = "unicast"
    nexthops: tuple[NextHop, ...] = ()
    #: The source address that the node itself uses on this route; "" lets the kernel choose.
    src: str = ""

    @property
    def key(self) -> RouteKey:
        return (self.prefix, self.protocol, self.metric)


#: Prefix, protocol number and metric: what a route of ours is found by.
RouteKey = tuple[str, int, int]


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A route that the kernel has, and the id of the nexthop object that it goes through (0: none)."""

    route: Route
    nexthop_id: int = 0


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """An interface. ``up`` is what the administrator wants, ``carrier`` what the wire says."""

    index: int
    name: str
    up: bool = True
    carrier: bool = True
    group: int = 0


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """An address of the node itself, and the prefix that is on-link through it."""

    address: str
    subnet: str
    interface: int
    #: False while duplicate address detection has not passed: the kernel refuses it as a route's source.
    usable: bool = True
    #: False for what a node is not known by: an address of another scope than the whole world's, the second of a
    #: subnet, a temporary (RFC 8981) or deprecated one.
    lasting: bool = True


class KernelState(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel at one moment: routes with our protocol numbers, nexthop objects of ours, links, addresses."""

    routes: Mapping[RouteKey, Installed] = {}
    #: Id -> what it is, for nexthop objects in our range of ids.
    nexthops: Mapping[int, NextHop] = {}
    #: Id -> ids of the members, for groups in our range.
    groups: Mapping[int, tuple[int, ...]] = {}
    #: Ids in our range that somebody else's nexthop objects have.
    foreign_ids: frozenset[int] = frozenset()
    links: Mapping[int, Link] = {}
    addresses: tuple[Address, ...] = ()
    #: The source that would be used to each address that was asked for, as far as there is a way.
    sources: Mapping[str, str] = {}
    #: Dotted names as in ``net.ipv4.conf.eth0.rp_filter`` (a dot in an interface's name is ``/``); those we look at.
    sysctls: Mapping[str, str] = {}
