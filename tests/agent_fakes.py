"""A kernel, a speaker and a store's view in memory for the agent's tests. They are strict: what the real one refuses is
refused, and what would hurt (a foreign route replaced, a nexthop deleted under its routes) fails the test."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.bgp.model import Announcement, Session, SpeakerState
from agent.delta import (
    AddGroup,
    AddNextHop,
    AddRoute,
    DeleteNextHop,
    DeleteRoute,
    Failure,
    Operation,
    ReplaceRoute,
    SetSysctl,
)
from agent.fib import Address, Installed, KernelState, Link, NextHop, Route, RouteKey
from agent.plan import Cluster
from agent.prefix import PrefixSet
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from store.model import (
    ANNOTATION_ASN,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPFilter,
    BGPFilterSpec,
    BGPPeer,
    BGPPeerSpec,
    FilterRuleV4,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    Meta,
    Node,
    NodeAddress,
    NodeStatus,
    block_name,
)

OURS = {PROTO_PODS, PROTO_BLOCKS, PROTO_IMPORTS}


class FakeKernel:
    """Two uplinks by default, ``up1`` (index 2) and ``up2`` (3), each on a /31 and a /127 with a ToR."""

    def __init__(self) -> None:
        self.links: dict[int, Link] = {i: Link(index=i, name=name) for i, name in ((1, "lo"), (2, "up1"), (3, "up2"))}
        self.addresses: list[Address] = [
            Address(address="10.0.1.1", subnet="10.0.1.0/31", interface=2),
            Address(address="fd00:0:1::1", subnet="fd00:0:1::/127", interface=2),
            Address(address="10.0.2.1", subnet="10.0.2.0/31", interface=3),
            Address(address="fd00:0:2::1", subnet="fd00:0:2::/127", interface=3),
        ]
        self.routes: dict[RouteKey, tuple[Route, int]] = {}
        self.foreign: set[tuple[str, int]] = set()
        self.nexthops: dict[int, NextHop] = {}
        self.groups: dict[int, tuple[int, ...]] = {}
        self.sysctls: dict[str, str] = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"}
        self.sysctls["net.ipv4.conf.all.rp_filter"] = "0"
        for name in ("up1", "up2"):
            for version in ("ipv4", "ipv6"):
                self.sysctls[f"net.{version}.conf.{name}.ignore_routes_with_linkdown"] = "0"
            self.sysctls[f"net.ipv4.conf.{name}.rp_filter"] = "0"
        #: Failure switches: an errno for an operation (0: none), and whether it can be read at all.
        self.refuse: Callable[[Operation], int] = lambda _: 0
        self.unreadable: OSError | None = None
        #: Everything that was asked of it.
        self.log: list[Operation] = []
        self._pipe: tuple[int, ...] = ()

    def close(self) -> None:
        for fd in self._pipe:
            os.close(fd)
        self._pipe = ()

    # -- KernelPort

    def fileno(self) -> int:
        """Of a pipe that nothing comes through; made where it is asked for, as few of these fakes are closed."""
        self._pipe = self._pipe or os.pipe()
        return self._pipe[0]

    def news(self) -> bool:
        return False

    def forget(self) -> None:
        return None

    def read(self) -> KernelState:
        if self.unreadable is not None:
            raise self.unreadable
        return KernelState(
            routes={key: Installed(route=self._seen(r, id_), nexthop_id=id_) for key, (r, id_) in self.routes.items()},
            nexthops=dict(self.nexthops),
            groups=dict(self.groups),
            links=dict(self.links),
            addresses=tuple(self.addresses),
            sysctls=dict(self.sysctls),
        )

    async def apply(self, operations: Sequence[Operation]) -> tuple[Failure, ...]:
        return self.do(operations)

    # -- the kernel's own doing

    def do(self, operations: Sequence[Operation]) -> tuple[Failure, ...]:
        failures = []
        for operation in operations:
            self.log.append(operation)
            number = self.refuse(operation) or self._carry_out(operation)
            if number:
                failures.append(Failure(operation, number, os.strerror(number)))
        return tuple(failures)

    def carrier(self, index: int, on: bool) -> None:
        """A group loses its member without a word and does not take it back; with none left, its routes go."""
        self.links[index] = msgspec.structs.replace(self.links[index], carrier=on)
        if not on:
            for id_ in [i for i, hop in self.nexthops.items() if hop.interface == index]:
                self._drop_nexthop(id_)

    def pod(self, index: int, name: str, group: int, *addresses: str) -> None:
        """A pod's veth, and its routes as the CNI server writes them."""
        self.links[index] = Link(index=index, name=name, group=group)
        for address in addresses:
            route = Route(
                prefix=f"{address}/{128 if ':' in address else 32}",
                protocol=PROTO_PODS,
                metric=32,
                nexthops=(NextHop("", index),),
            )
            self.routes[route.key] = (route, 0)

    def shown(self) -> dict[RouteKey, tuple[NextHop, ...]]:
        return {key: self._seen(*value).nexthops for key, value in self.routes.items()}

    def blackholes(self) -> set[str]:
        return {prefix for prefix, protocol, _ in self.routes if protocol == PROTO_BLOCKS}

    def imports(self) -> dict[str, tuple[NextHop, ...]]:
        return {prefix: hops for (prefix, protocol, _), hops in self.shown().items() if protocol == PROTO_IMPORTS}

    def _seen(self, route: Route, id_: int) -> Route:
        if not id_:
            return route
        hops = tuple(sorted(self.nexthops[m] for m in self.groups.get(id_, (id_,))))
        return msgspec.structs.replace(route, nexthops=hops)

    def _carry_out(self, operation: Operation) -> int:
        match operation:
            case SetSysctl(key=key, value=value):
                if key not in self.sysctls:
                    return errno.ENOENT
                self.sysctls[key] = value
            case AddNextHop(id=id_, hop=hop):
                return self._add_nexthop(id_, hop)
            case AddGroup(id=id_, members=members):
                assert len(members) > 1, "a group of one"
                if id_ in self.groups or id_ in self.nexthops:
                    return errno.EEXIST
                if not all(m in self.nexthops for m in members):
                    return errno.EINVAL
                self.groups[id_] = members
            case AddRoute(route=route, nexthop_id=id_):
                if any((p, m) == (route.prefix, route.metric) for p, _, m in self.routes):
                    return errno.EEXIST
                if (route.prefix, route.metric) in self.foreign:
                    return errno.EEXIST
                return self._put(route, id_)
            case ReplaceRoute(route=route, nexthop_id=id_):
                assert (route.prefix, route.metric) not in self.foreign, f"a foreign route would be replaced: {route}"
                assert route.key in self.routes, f"nothing to replace: {route}"
                return self._put(route, id_)
            case DeleteRoute(route=route):
                assert route.protocol in OURS - {PROTO_PODS}, f"not the agent's to delete: {route}"
                if self.routes.pop(route.key, None) is None:
                    return errno.ESRCH
            case DeleteNextHop(id=id_):
                assert all(used != id_ for _, used in self.routes.values()), f"routes would go along with nexthop {id_}"
                assert not any(id_ in members for members in self.groups.values()), f"a group would lose {id_}"
                if self.groups.pop(id_, None) is None and self.nexthops.pop(id_, None) is None:
                    return errno.ENOENT
        return 0

    def _add_nexthop(self, id_: int, hop: NextHop) -> int:
        if id_ in self.groups or id_ in self.nexthops:
            return errno.EEXIST
        link = self.links.get(hop.interface)
        if link is None:
            return errno.ENODEV
        if not (link.up and link.carrier):
            return errno.ENETDOWN
        self.nexthops[id_] = hop
        return 0

    def _put(self, route: Route, id_: int) -> int:
        if route.src and route.src not in {a.address for a in self.addresses}:
            return errno.EINVAL
        if id_:
            if id_ not in self.groups:
                return errno.EINVAL
        elif route.kind == "unicast":
            assert len(route.nexthops) == 1, f"a route without a group has one next hop: {route}"
            hop = route.nexthops[0]
            link = self.links.get(hop.interface)
            if link is None:
                return errno.ENODEV
            if not link.up:
                return errno.ENETDOWN
            subnets = PrefixSet(a.subnet for a in self.addresses if a.interface == hop.interface)
            if hop.gateway and not subnets.covers_address(hop.gateway):
                return errno.ENETUNREACH
        self.routes[route.key] = (route, id_)
        return 0

    def _drop_nexthop(self, id_: int) -> None:
        del self.nexthops[id_]
        for group, members in list(self.groups.items()):
            left = tuple(m for m in members if m != id_)
            if left:
                self.groups[group] = left
            else:
                del self.groups[group]
                self.routes = {key: v for key, v in self.routes.items() if v[1] != group}


class FakeSpeaker:
    """Takes whole sets. ``report`` tells the agent that what is wanted was sent, withdrawals at ``now``."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.known = True
        self.sessions: frozenset[Session] | None = None
        self.announcements: frozenset[Announcement] | None = None
        self.sent: frozenset[tuple[str, str]] = frozenset()
        self.withdrawn_at: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.history: list[frozenset[Announcement]] = []

    def set_sessions(self, sessions: frozenset[Session]) -> None:
        assert len({s.address for s in sessions}) == len(sessions), "two sessions with one address"
        self.sessions = sessions

    def set_announcements(self, announcements: frozenset[Announcement]) -> None:
        addresses = {s.address for s in self.sessions or ()}
        assert {a.peer for a in announcements} <= addresses, "announced to a peer without a session"
        if announcements != self.announcements:
            self.history.append(announcements)
        self.announcements = announcements

    def state(self) -> SpeakerState:
        return SpeakerState(
            known=self.known,
            sent=self.sent,
            confirmed=self.sent,
            table=frozenset((a.peer, a.prefix) for a in self.announcements or ()),
            withdrawn_at=dict(self.withdrawn_at),
            refused=dict(self.refused),
        )

    def report(self, now: float) -> None:
        wanted = frozenset((a.peer, a.prefix) for a in self.announcements or ())
        for prefix in {p for _, p in self.sent} - {p for _, p in wanted}:
            self.withdrawn_at[prefix] = now
        self.sent = wanted

    def prefixes(self) -> set[str]:
        return {a.prefix for a in self.announcements or ()}


class FakeView:
    def __init__(self, cluster: Cluster | None) -> None:
        self.now = cluster
        self.questioned: frozenset[str] = frozenset()
        self.inhabited: frozenset[str] = frozenset()

    def cluster(self) -> Cluster | None:
        return self.now

    def inhabit(self, pools: frozenset[str]) -> None:
        self.inhabited = pools

    def question(self, cidrs: frozenset[str]) -> None:
        self.questioned = cidrs


# -- objects -----------------------------------------------------------------------------------------------------------


def node(name: str = "node-1", *addresses: str, asn: str = "65100", **labels: str) -> Node:
    return Node(
        metadata=Meta(name=name, labels=labels, annotations={ANNOTATION_ASN: asn} if asn else {}),
        status=NodeStatus(
            addresses=tuple(NodeAddress(type="InternalIP", address=a) for a in addresses or ("10.0.1.1", "fd00:0:1::1"))
        ),
    )


def bgp_peer(name: str, address: str, **changes: Any) -> BGPPeer:
    return BGPPeer(metadata=Meta(name=name), spec=BGPPeerSpec(**{"peer_ip": address, "as_number": 65001, **changes}))


def bgp_filter(name: str, **rules: Any) -> BGPFilter:
    """Lists of rules by field; without any it rejects every IPv4 import."""
    return BGPFilter(
        metadata=Meta(name=name), spec=BGPFilterSpec(**(rules or {"import_v4": (FilterRuleV4(action="Reject"),)}))
    )


def pool(cidr: str, name: str = "", **changes: Any) -> IPPool:
    return IPPool(metadata=Meta(name=name or block_name(cidr)), spec=IPPoolSpec(cidr=cidr, **changes))


def block(cidr: str, *, marked: bool = False, **status: Any) -> IPAMBlock:
    stamp = "2026-01-01T00:00:00Z" if marked else ""
    return IPAMBlock(
        metadata=Meta(name=block_name(cidr), deletion_timestamp=stamp),
        spec=IPAMBlockSpec(cidr=cidr, pool="pool", node="node-1"),
        status=IPAMBlockStatus(**status),
    )


def configuration(**changes: Any) -> BGPConfiguration:
    spec = BGPConfigurationSpec(**{"node_to_node_mesh_enabled": False, **changes})
    return BGPConfiguration(metadata=Meta(name="default"), spec=spec)


def of_node(name: str, **changes: Any) -> BGPConfiguration:
    return BGPConfiguration(metadata=Meta(name=f"node.{name}"), spec=BGPConfigurationSpec(**changes))


def cluster(**changes: Any) -> Cluster:
    """Node 1 with a block of each family and a session of each family to each of two ToRs."""
    values: dict[str, Any] = {
        "node": node(),
        "configuration": configuration(),
        "peers": (
            bgp_peer("tor-1-v4", "10.0.1.0"),
            bgp_peer("tor-1-v6", "fd00:0:1::"),
            bgp_peer("tor-2-v4", "10.0.2.0", as_number=65002),
            bgp_peer("tor-2-v6", "fd00:0:2::", as_number=65002),
        ),
        "pools": (pool("10.244.0.0/16"), pool("fd00:10:244::/48")),
        "blocks": (block("10.244.1.0/26"), block("fd00:10:244::40/122")),
    }
    return Cluster(**{**values, **changes})
