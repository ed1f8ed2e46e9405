"""What people wish (pools, reservations, a limit, the Node's labels), and what they did to our blocks: by watching the
store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ipam.errors import in_words
from ipam.keeper import Keeper
from ipam.ledger import Ledger, Own
from ipam.model import Settings
from ipam.pool import Pools
from store.base import Store
from store.clock import Clock
from store.errors import StoreError
from store.informer import Informer
from store.model import IPAMBlock, IPAMConfiguration, IPPool, IPReservation, Node

log = logging.getLogger(__name__)

_DEFAULT = {"metadata.name": "default"}


class Watches:
    """``superseded`` says whether a block's object shows a newer server than this one; ``seen`` is called with each
    object of an own block that the store shows."""

    def __init__(
        self,
        node: str,
        store: Store,
        ledger: Ledger,
        keeper: Keeper,
        clock: Clock,
        settings: Settings,
        *,
        superseded: Callable[[Own, IPAMBlock], bool],
        seen: Callable[[IPAMBlock], None],
    ) -> None:
        self._node = node
        self._store = store
        self._ledger = ledger
        self._keeper = keeper
        self._clock = clock
        self._settings = settings
        self._superseded = superseded
        self._show = seen
        self._pools = Informer(store, IPPool, clock, on_change=self._wishes_moved)
        self._reservations = Informer(store, IPReservation, clock, on_change=self._wishes_moved)
        self._configurations = Informer(store, IPAMConfiguration, clock, _DEFAULT, on_change=self._limit_moved)
        self._nodes = Informer(store, Node, clock, {"metadata.name": node}, on_change=self._wishes_moved)
        self._blocks = Informer(store, IPAMBlock, clock, {"spec.node": node}, on_change=self._blocks_moved)
        self._informers: tuple[Informer[Any], ...] = (
            self._pools,
            self._reservations,
            self._configurations,
            self._nodes,
            self._blocks,
        )
        self._seen: dict[str, str] = {}  # own blocks that the informer has shown: name -> uid

    async def read(self) -> tuple[IPAMBlock, ...]:
        """Reads the wishes and our blocks once, uncached; ``run`` goes on from there. StoreError."""
        for informer in self._informers:
            await informer.load()
        self._limit_moved()
        self._wishes_moved()
        blocks = tuple(self._blocks.items.values())
        self._seen = {obj.name: obj.metadata.uid for obj in blocks}
        for obj in blocks:
            self._show(obj)
        return blocks

    async def run(self) -> None:
        """Follows the store until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers:
                group.create_task(informer.run())
            group.create_task(self._check_ownership())

    def _wishes_moved(self) -> None:
        """Nothing is concluded before all three have the whole state."""
        if self._pools.synced and self._reservations.synced and self._nodes.synced:
            node = self._nodes.items.get(self._node)
            self._keeper.see_node(node.metadata.uid if node else "")
            self._wish(self._pools.items.values(), self._reservations.items.values(), node)

    def _wish(self, pools: Iterable[IPPool], reservations: Iterable[IPReservation], node: Node | None) -> None:
        self._keeper.pools = Pools(pools, node.metadata.labels, node.spec.pod_cidrs) if node else Pools(pools)
        reserved = tuple(cidr for reservation in reservations for cidr in reservation.spec.reserved_cidrs)
        if reserved != self._keeper.reserved:
            self._keeper.reserved = reserved
            self._ledger.reserve(reserved)
        self._keeper.poke()

    def _limit_moved(self) -> None:
        """Apart from the others: a limit that cannot be read must not hold up pools."""
        if self._configurations.synced:
            self._limit(self._configurations.items.values())

    def _limit(self, configurations: Iterable[IPAMConfiguration]) -> None:
        limit = next((c.spec.max_blocks_per_host for c in configurations), 0)
        if limit != self._keeper.max_blocks:
            self._keeper.max_blocks = limit
            self._keeper.poke()

    def _blocks_moved(self) -> None:
        """The informer may lag behind our own writes, so a block that it has never shown is not missing, and the status
        that it shows is not taken for the newest."""
        if not self._blocks.synced:
            return
        shown = {name: obj.metadata.uid for name, obj in self._blocks.items.items()}
        known = {own.obj.name: own for own in self._ledger.blocks.values()}
        for name, uid in self._seen.items():
            own = known.get(name)
            if shown.get(name) != uid and own is not None and own.obj.metadata.uid == uid:
                self._keeper.vanished(own)
        for name, obj in self._blocks.items.items():
            own = known.get(name)
            if own is None:
                self._keeper.found(obj)
            elif own.obj.metadata.uid == obj.metadata.uid:
                if self._superseded(own, obj):
                    return
                self._keeper.mark(own, obj)
                self._show(obj)
        self._seen = shown

    async def _check_ownership(self) -> None:
        """Reads our blocks uncached every 5 min: a store restored from a backup sends no events (R5)."""
        while not self._keeper.stopped:
            await self._clock.sleep(self._settings.recheck)
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    listing = await self._store.list(IPAMBlock, where={"spec.node": self._node})
            except (StoreError, TimeoutError) as e:
                log.warning("ownership of the blocks is not checked this time: %s", in_words(e))
                continue
            there = {obj.metadata.uid: obj for obj in listing.items}
            for own in tuple(self._ledger.blocks.values()):
                seen = there.get(own.obj.metadata.uid)
                if seen is None:
                    self._keeper.vanished(own)  # which reads it once more
                    continue
                if self._superseded(own, seen):
                    return
                self._keeper.mark(own, seen)
                self._show(seen)
                if seen.metadata.resource_version != own.obj.metadata.resource_version:
                    # From before a restored backup, or we have written since: then the next write says so.
                    own.obj = seen
                    self._ledger.changed(own)
            for obj in listing.items:
                self._keeper.found(obj)
            self._keeper.untied = True
            self._keeper.poke()
