"""Makes a block this node's: by create, then a look whether anything overlaps (R1, R4). And ends it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TypeVar

from ipam.errors import Exhausted
from ipam.ledger import Ledger, Own, Phase
from ipam.model import Settings
from ipam.pool import candidates, overlap, within
from store.base import Store
from store.clock import Clock
from store.errors import AlreadyExists, Conflict, NotFound
from store.model import IPAMBlock, IPAMBlockSpec, IPPool, Meta, block_name

log = logging.getLogger(__name__)

T = TypeVar("T")


class Claims:
    """``check`` raises if a block's object shows a newer server than this one. Every method may raise StoreError or
    TimeoutError (no answer within ``store_limit``); what was begun is then in ``pending`` and goes on later."""

    def __init__(
        self,
        node: str,
        store: Store,
        ledger: Ledger,
        clock: Clock,
        settings: Settings,
        *,
        check: Callable[[Own, IPAMBlock], None],
        step: Callable[[str], None],
    ) -> None:
        self._node = node
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._settings = settings
        self._check = check
        self._step = step
        #: Own objects by CIDR that nothing is handed out of, until it is known that nothing overlaps them.
        self.pending: dict[str, IPAMBlock] = {}

    async def claim(self, pool: IPPool, reserved: tuple[str, ...], cidr: str = "") -> Own:
        """A new block of the pool (this very one, if given) that is ours alone. Exhausted, saying why."""
        for waiting in [c for c, o in self.pending.items() if o.spec.pool == pool.name and cidr in ("", c)]:
            with contextlib.suppress(Exhausted):
                return await self.settle(waiting)
        obj = await self._create_at(pool, cidr) if cidr else await self._create(pool, reserved)
        self.pending[obj.spec.cidr] = obj
        self._step("block-created")
        return await self.settle(obj.spec.cidr)

    async def settle(self, cidr: str) -> Own:
        """Looks, uncached, whether a pending block is ours and overlaps nothing, and adopts it. Otherwise it is given
        back, and Exhausted says why."""
        obj = self.pending[cidr]
        async with asyncio.timeout(self._settings.store_limit):
            pools = await self._store.list(IPPool)
            blocks = await self._store.list(IPAMBlock)
        seen = next((b for b in blocks.items if b.metadata.uid == obj.metadata.uid), None)
        if seen is None or seen.metadata.deletion_timestamp:
            self.pending.pop(cidr, None)
            raise Exhausted(f"block {cidr} was deleted while it was being claimed; another one is tried next time")
        problem = _problem(seen, pools.items, blocks.items)
        if problem:
            log.error("block %s is given back: %s", cidr, problem)
            await self._delete(seen)
            self.pending.pop(cidr, None)
            raise Exhausted(f"block {cidr} of pool {seen.spec.pool} cannot be used: {problem}")
        self.pending.pop(cidr, None)
        own = self._ledger.adopt(seen, Phase.NEW, self._clock.monotonic())
        self._check(own, seen)
        return own

    async def recreate(self, pool: str, cidr: str) -> IPAMBlock | None:
        """Our block anew, after somebody deleted it; None if another node holds it by now (R5)."""
        try:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.create(_block(cidr, pool, self._node))
        except AlreadyExists:
            async with asyncio.timeout(self._settings.store_limit):
                present = await self._store.get(IPAMBlock, block_name(cidr))
            return present if present.spec.node == self._node else None

    async def is_there(self, own: Own) -> bool:
        """The block's object is in the store as we know it; read uncached."""
        try:
            async with asyncio.timeout(self._settings.store_limit):
                seen = await self._store.get(IPAMBlock, own.obj.name)
        except NotFound:
            return False
        if seen.metadata.uid != own.obj.metadata.uid:
            return False
        self._check(own, seen)
        return True

    async def end(self, own: Own) -> bool:
        """Deletes a block that is withdrawn, if it still is as we know it. False: try again later."""
        try:
            await self._delete(own.obj)
        except Conflict:
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    seen = await self._store.get(IPAMBlock, own.obj.name)
            except NotFound:
                return True
            if seen.metadata.uid != own.obj.metadata.uid:
                return True
            self._check(own, seen)
            own.obj = seen
            return False
        self._step("block-deleted")
        return True

    async def _create(self, pool: IPPool, reserved: tuple[str, ...]) -> IPAMBlock:
        """Probes by create; lists once in a while, when that met too many blocks of others."""
        taken: frozenset[str] = frozenset()
        creates = conflicts = 0
        for cidr in candidates(pool, self._node, reserved):
            if cidr in taken or cidr in self._ledger.blocks:
                continue
            if creates == self._settings.creates_limit:
                raise Exhausted(f"pool {pool.name}: {creates} blocks in a row were taken by others; trying again")
            creates += 1
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    return await self._store.create(_block(cidr, pool.name, self._node))
            except AlreadyExists:
                conflicts += 1
            if conflicts % self._settings.conflicts_before_list == 0:
                async with asyncio.timeout(self._settings.store_limit):
                    listing = await self._store.list(IPAMBlock)
                taken = frozenset(b.spec.cidr for b in listing.items)
        raise Exhausted(
            f"pool {pool.name} ({pool.spec.cidr}) has no free block left for node {self._node}: add a pool, or delete "
            f"blocks of nodes that are gone"
        )

    async def _create_at(self, pool: IPPool, cidr: str) -> IPAMBlock:
        try:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.create(_block(cidr, pool.name, self._node))
        except AlreadyExists:
            async with asyncio.timeout(self._settings.store_limit):
                try:
                    present = await self._store.get(IPAMBlock, block_name(cidr))
                except NotFound:
                    raise Exhausted(f"block {cidr} was being given back by another node; try again") from None
            if present.spec.node == self._node:
                return present
            raise Exhausted(
                f"block {cidr} belongs to node {present.spec.node}: an address is handed out by its block's node only"
            ) from None

    async def _delete(self, obj: IPAMBlock) -> None:
        try:
            async with asyncio.timeout(self._settings.store_limit):
                await self._store.delete(
                    IPAMBlock,
                    obj.name,
                    uid=obj.metadata.uid,
                    resource_version=obj.metadata.resource_version,
                )
        except NotFound:
            log.info("block %s was gone already", obj.spec.cidr)


def _problem(obj: IPAMBlock, pools: tuple[IPPool, ...], blocks: tuple[IPAMBlock, ...]) -> str:
    """Why the block must not be used (R1); empty if it may."""
    cidr = obj.spec.cidr
    if not any(p.name == obj.spec.pool and within(cidr, p.spec.cidr) for p in pools):
        return f"its pool {obj.spec.pool} is gone, or has another range"
    for pool in pools:
        if pool.name != obj.spec.pool and overlap(cidr, pool.spec.cidr):
            return f"IPPool {pool.name} ({pool.spec.cidr}) overlaps it: delete one of the two pools"
    for block in blocks:
        if block.name != obj.name and overlap(cidr, block.spec.cidr):
            other = f"block {block.spec.cidr} of node {block.spec.node}, pool {block.spec.pool}"
            return f"{other} overlaps it: delete that block once nothing uses it"
    return ""


def _block(cidr: str, pool: str, node: str) -> IPAMBlock:
    return IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=IPAMBlockSpec(cidr=cidr, pool=pool, node=node))
