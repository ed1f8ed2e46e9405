"""The kernel as the reconciler sees it: read whole, change in batches, hear of news."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

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
from agent.fib import Address, Installed, KernelState, Link, Route, RouteKey
from agent.kernel import links, nexthops, routes, sysctls
from agent.kernel.monitor import ALL, LINKS, NEXTHOPS, ROUTES, KernelMonitor
from cni.netlink import Message, Netlink
from cni.sysctls import change

#: Operations between which others get their turn on the event loop.
_TURN: Final = 512


class Kernel:
    """The kernel of the network namespace that this was made in. ``root`` is where its sysctls can be written,
    ``record`` where it is kept what they were before (``cni.sysctls``; None: nowhere). ``reach`` are
    addresses to which the way is asked for.

    ``read`` dumps only what the news since the last time named; ``forget`` makes the next one dump everything.
    """

    def __init__(self, root: Path = sysctls.ROOT, record: Path | None = None, *, reach: Sequence[str] = ()) -> None:
        self._sysctls = root
        self._record = record
        self._reach = tuple(reach)
        self._netlink = Netlink()
        self._monitor = KernelMonitor()
        self._stale = set(ALL)
        self._links: dict[int, Link] = {}
        self._addresses: tuple[Address, ...] = ()
        self._nexthops = nexthops.Dumped({}, {}, frozenset())
        self._dumped: dict[RouteKey, tuple[Route, int]] = {}
        self._routes: dict[RouteKey, Installed] = {}

    def fileno(self) -> int:
        """Readable when there is news: for ``loop.add_reader``."""
        return self._monitor.fileno()

    def news(self) -> bool:
        """Takes in what changed; True if it is worth a pass now."""
        news = self._monitor.read()
        self._stale |= news.changed
        return news.urgent

    def forget(self) -> None:
        self._stale = set(ALL)

    def read(self) -> KernelState:
        """The kernel now. Raises NetlinkError, OSError; then the next call reads the same parts again."""
        self.news()
        if LINKS in self._stale:
            self._links = links.dump_links(self._netlink)
            self._addresses = links.dump_addresses(self._netlink)
            self._stale.discard(LINKS)
        if ROUTES in self._stale or NEXTHOPS in self._stale:
            self._nexthops = nexthops.dump(self._netlink)
            if ROUTES in self._stale:
                self._dumped = routes.dump(self._netlink)
            self._routes = routes.resolve(self._dumped, self._nexthops.nexthops, self._nexthops.groups)
            self._stale -= {ROUTES, NEXTHOPS}
        return KernelState(
            routes=self._routes,
            nexthops=self._nexthops.nexthops,
            groups=self._nexthops.groups,
            foreign_ids=self._nexthops.foreign,
            links=self._links,
            addresses=self._addresses,
            sources=routes.sources(self._netlink, self._reach),
            sysctls=sysctls.read(self._links.values(), self._sysctls),
        )

    async def apply(self, operations: Sequence[Operation]) -> tuple[Failure, ...]:
        """Carries out each operation, in order, whatever becomes of the others; returns those that were refused."""
        failures: list[Failure] = []
        for is_sysctl, run in groupby(operations, key=lambda op: isinstance(op, SetSysctl)):
            if is_sysctl:
                failures += self._set(tuple(run))
                continue
            self._stale |= {ROUTES, NEXTHOPS}
            pending = tuple(run)
            for start in range(0, len(pending), _TURN):
                turn = pending[start : start + _TURN]
                for operation, error in zip(turn, self._netlink.batch([message(op) for op in turn]), strict=True):
                    if error is not None:
                        failures.append(Failure(operation, error.number, error.message))
                await asyncio.sleep(0)
        return tuple(failures)

    def close(self) -> None:
        self._netlink.close()
        self._monitor.close()

    def _set(self, operations: Sequence[Operation]) -> list[Failure]:
        failures = []
        for operation in operations:
            if isinstance(operation, SetSysctl):
                try:
                    change(operation.key, operation.value, self._sysctls, self._record)
                except OSError as e:
                    number = e.errno or 0
                    failures.append(Failure(operation, number, os.strerror(number)))
        return failures


def message(operation: Operation) -> Message:
    """The netlink request for an operation (a sysctl has none: ValueError)."""
    match operation:
        case AddRoute():  # the ones that come by the thousand first
            return routes.add(operation.route, operation.nexthop_id)
        case DeleteRoute():
            return routes.delete(operation.route)
        case ReplaceRoute(route=route, nexthop_id=id_):
            return routes.replace(route, id_)
        case AddNextHop(id=id_, hop=hop):
            return nexthops.add(id_, hop)
        case AddGroup(id=id_, members=members):
            return nexthops.add_group(id_, members)
        case DeleteNextHop(id=id_):
            return nexthops.delete(id_)
    raise ValueError(f"{operation!r} is not for netlink")
