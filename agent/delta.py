"""Wanted against actual: the operations that make the kernel what the plan says, in their order. Pure.

Sysctls come first, then nexthops and groups, then routes to add and to change, and last what goes. A route of ours is
added only where there is none (the kernel refuses it beside a foreign one of the same prefix and metric) and changed
only where the present one is ours (R10). Nothing goes before the plan says that its sources have reported (R8), and a
nexthop goes only when no route that the kernel has uses it: the kernel would take those routes along.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import msgspec

from agent.adjrib import family_of
from agent.errors import AgentError
from agent.fib import Installed, KernelState, NextHop, Route
from agent.plan import Plan
from cni.marks import NEXTHOP_BASE, NEXTHOP_SPAN, PROTO_BLOCKS, PROTO_IMPORTS


class NoFreeId(AgentError):
    """The kernel's nexthop objects take up every id that is ours."""


class SetSysctl(msgspec.Struct, frozen=True):
    key: str
    value: str


class AddNextHop(msgspec.Struct, frozen=True):
    id: int
    hop: NextHop


class AddGroup(msgspec.Struct, frozen=True):
    """Members are ids of nexthops that are there, or added before."""

    id: int
    members: tuple[int, ...]


class AddRoute(msgspec.Struct, frozen=True):
    """``nexthop_id`` is the group that it goes through; 0: its one next hop, or none, stands in the route itself."""

    route: Route
    nexthop_id: int = 0


class ReplaceRoute(msgspec.Struct, frozen=True):
    """Puts ``route`` in the place of the one of ours with the same key, without a moment without any."""

    route: Route
    nexthop_id: int = 0


class DeleteRoute(msgspec.Struct, frozen=True):
    route: Route


class DeleteNextHop(msgspec.Struct, frozen=True):
    """A nexthop or a group."""

    id: int


Operation = SetSysctl | AddNextHop | AddGroup | AddRoute | ReplaceRoute | DeleteRoute | DeleteNextHop


class Failure(msgspec.Struct, frozen=True):
    """An operation that the kernel refused, with its errno and its words."""

    operation: Operation
    number: int
    message: str


def delta(plan: Plan, kernel: KernelState) -> tuple[Operation, ...]:
    """What is to be done, in order; () when the kernel is as planned. Applying it and asking again gives ()."""
    groups = _Groups(kernel)
    added: list[Operation] = []
    replaced: list[Operation] = []
    for key, route in plan.routes.items():
        present = kernel.routes.get(key)
        if present is None:
            added.append(AddRoute(route, groups.through(route)))
        elif not is_as_wanted(present, route):
            replaced.append(ReplaceRoute(route, groups.through(route)))
    # Blackholes before all: whoever waits for one waits for a pod's start.
    added.sort(key=lambda op: not (isinstance(op, AddRoute) and op.route.protocol == PROTO_BLOCKS))
    return (
        *(SetSysctl(k, v) for k, v in sorted(plan.sysctls.items()) if kernel.sysctls.get(k) != v),
        *groups.operations,
        *added,
        *replaced,
        *_deletions(plan, kernel),
        *_unused_nexthops(plan, kernel),
    )


def is_as_wanted(present: Installed, wanted: Route) -> bool:
    """Equal, and through a group exactly if it has several next hops."""
    return present.route == wanted and bool(present.nexthop_id) == (len(wanted.nexthops) > 1)


def _deletions(plan: Plan, kernel: KernelState) -> Iterator[DeleteRoute]:
    for key, present in kernel.routes.items():
        if key not in plan.routes and (key[1], family_of(key[0])) in plan.deletable:
            yield DeleteRoute(present.route)


def _unused_nexthops(plan: Plan, kernel: KernelState) -> Iterator[DeleteNextHop]:
    """Groups and nexthops that neither a route in the kernel nor the plan uses; a group goes before its members."""
    if not {(PROTO_IMPORTS, "ipv4 unicast"), (PROTO_IMPORTS, "ipv6 unicast")} <= plan.deletable:
        return
    routed = {installed.nexthop_id for installed in kernel.routes.values()}
    wanted = {route.nexthops for route in plan.routes.values() if len(route.nexthops) > 1}
    kept: set[int] = set(routed)
    for id_, members in kernel.groups.items():
        if id_ in routed or group_hops(members, kernel) in wanted:
            kept |= {id_, *members}
        else:
            yield DeleteNextHop(id_)
    hops = {hop for nexthops in wanted for hop in nexthops}
    for id_, hop in kernel.nexthops.items():
        if id_ not in kept and hop not in hops:
            yield DeleteNextHop(id_)


def group_hops(members: tuple[int, ...], kernel: KernelState) -> tuple[NextHop, ...]:
    """What a group's members are; () if one of them is not ours."""
    if not all(m in kernel.nexthops for m in members):
        return ()
    return tuple(sorted(kernel.nexthops[m] for m in members))


class _Groups:
    """Finds the group for a set of next hops, or makes it of free ids."""

    def __init__(self, kernel: KernelState) -> None:
        self.operations: list[Operation] = []
        self._hops = {hop: id_ for id_, hop in sorted(kernel.nexthops.items(), reverse=True)}
        self._groups = {group_hops(members, kernel): id_ for id_, members in sorted(kernel.groups.items())}
        used = {*kernel.nexthops, *kernel.groups, *kernel.foreign_ids}
        self._free = (i for i in range(NEXTHOP_BASE + 1, NEXTHOP_BASE + NEXTHOP_SPAN) if i not in used)

    def through(self, route: Route) -> int:
        """The id of the route's group; 0 if it needs none. Raises NoFreeId."""
        if len(route.nexthops) < 2:
            return 0
        found = self._groups.get(route.nexthops)
        if found is None:
            members = tuple(self._member(hop) for hop in route.nexthops)
            found = self._groups[route.nexthops] = self._take()
            self.operations.append(AddGroup(found, members))
        return found

    def _member(self, hop: NextHop) -> int:
        found = self._hops.get(hop)
        if found is None:
            found = self._hops[hop] = self._take()
            self.operations.append(AddNextHop(found, hop))
        return found

    def _take(self) -> int:
        found = next(self._free, 0)
        if not found:
            raise NoFreeId(f"all {NEXTHOP_SPAN} nexthop ids from {NEXTHOP_BASE:#x} on are in use: see 'ip nexthop'")
        return found


def explain(failure: Failure) -> tuple[str, str]:
    """A failure as a condition's type and message."""
    match failure.operation:
        case AddRoute(route=route) if failure.number == errno.EEXIST:
            return (
                "ForeignRoute",
                f"{route.prefix} metric {route.metric} is there already and not ours: it stays as it is; "
                f"remove it, or what writes it",
            )
        case AddRoute(route=route) | ReplaceRoute(route=route) | DeleteRoute(route=route):
            what = f"{type(failure.operation).__name__} {route.prefix} metric {route.metric}"
        case SetSysctl(key=key, value=value):
            what = f"setting {key} to {value}"
        case AddNextHop() | AddGroup() | DeleteNextHop():
            what = f"{type(failure.operation).__name__} {failure.operation.id}"
    return "KernelRefused", f"{what}: {failure.message}"
