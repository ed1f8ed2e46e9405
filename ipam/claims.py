"""Makes a block this node's: by create, then a look whether anything overlaps (R1, R4). And ends it again (R5).

A block names its Node as owner, so that Kubernetes deletes it with the Node, and carries our finalizer, so that a
delete by anybody only marks it. So it ends in two steps: the mark, and our finalizer's removal once it is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import msgspec

from ipam.errors import Exhausted
from ipam.ledger import Ledger, Own, Phase
from ipam.model import Settings
from ipam.pool import candidates, overlap, within
from store.base import Store
from store.clock import Clock
from store.errors import AlreadyExists, Conflict, NotFound
from store.model import (
    FINALIZER_OWNER,
    LABEL_MANAGED_BY,
    IPAMBlock,
    IPAMBlockSpec,
    IPPool,
    Meta,
    Node,
    OwnerReference,
    block_name,
)

log = logging.getLogger(__name__)


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
            if seen is not None and FINALIZER_OWNER in seen.metadata.finalizers:
                self._ledger.adopt(seen, Phase.MARKED, self._clock.monotonic())
            raise Exhausted(f"block {cidr} was deleted while it was being claimed; another one is tried next time")
        problem = _problem(seen, pools.items, blocks.items)
        if problem:
            log.error("block %s is given back: %s", cidr, problem)
            await self._end(seen)
            self.pending.pop(cidr, None)
            raise Exhausted(f"block {cidr} of pool {seen.spec.pool} cannot be used: {problem}")
        self.pending.pop(cidr, None)
        own = self._ledger.adopt(seen, Phase.NEW, self._clock.monotonic())
        self._check(own, seen)
        return own

    async def recreate(self, pool: str, cidr: str) -> IPAMBlock:
        """Our block anew, after somebody deleted it; or what is there by now, perhaps another node's (R5). Invalid if
        the pool would no longer have it."""
        obj = await self._block(cidr, pool)
        try:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.create(obj)
        except AlreadyExists:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.get(IPAMBlock, obj.name)

    def is_ours(self, obj: IPAMBlock) -> bool:
        return obj.spec.node == self._node

    async def tie(self, blocks: Iterable[Own]) -> bool:
        """Gives each block that lacks it our finalizer, and its Node as owner: one that is older than the Node of
        today, or that was claimed while there was none. False: try again later."""
        owner, done = await self._owner(), True
        for own in blocks:
            meta = own.obj.metadata
            others = tuple(r for r in meta.owner_references if r.kind != Node.kind())
            wanted = msgspec.structs.replace(
                meta,
                finalizers=tuple(dict.fromkeys((*meta.finalizers, FINALIZER_OWNER))),
                owner_references=(*others, *owner) if owner else meta.owner_references,
            )
            if wanted == meta:
                continue
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    own.obj = await self._store.update(msgspec.structs.replace(own.obj, metadata=wanted))
            except NotFound:
                continue  # the watch tells
            except Conflict:
                done = False
                seen = await self._again(own)
                if seen is not None:
                    own.obj = seen
        return done

    async def is_there(self, own: Own) -> bool:
        """The block's object is in the store as we know it; read uncached."""
        try:
            async with asyncio.timeout(self._settings.store_limit):
                seen = await self._store.get(IPAMBlock, own.obj.name)
        except NotFound:
            return False
        if seen.metadata.uid != own.obj.metadata.uid or not self.is_ours(seen):
            return False
        self._check(own, seen)
        return True

    async def end(self, own: Own) -> bool:
        """Deletes a block that is withdrawn, or lets go of a marked one, if it still is as we know it. False: try again
        later."""
        try:
            await self._end(own.obj)
        except Conflict:
            seen = await self._again(own)
            if seen is None:
                return True
            own.obj = seen
            return False
        self._step("block-deleted")
        return True

    async def _again(self, own: Own) -> IPAMBlock | None:
        """The block as it is now; None if it is gone, or another."""
        try:
            async with asyncio.timeout(self._settings.store_limit):
                seen = await self._store.get(IPAMBlock, own.obj.name)
        except NotFound:
            return None
        if seen.metadata.uid != own.obj.metadata.uid:
            return None
        self._check(own, seen)
        return seen

    async def _create(self, pool: IPPool, reserved: tuple[str, ...]) -> IPAMBlock:
        """Probes by create; lists once in a while, when that met too many blocks of others."""
        taken: frozenset[str] = frozenset()
        creates = conflicts = 0
        template = await self._block(pool.spec.cidr, pool.name)
        for cidr in candidates(pool, self._node, reserved):
            if cidr in taken or cidr in self._ledger.blocks:
                continue
            if creates == self._settings.creates_limit:
                raise Exhausted(f"pool {pool.name}: {creates} blocks in a row were taken by others; trying again")
            creates += 1
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    return await self._store.create(_at(template, cidr))
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
        obj = await self._block(cidr, pool.name)
        try:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.create(obj)
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

    async def _end(self, obj: IPAMBlock) -> None:
        """Marks the block, and removes our finalizer. Conflict: it is no longer as we know it."""
        meta = obj.metadata
        try:
            if not meta.deletion_timestamp:
                async with asyncio.timeout(self._settings.store_limit):
                    await self._store.delete(IPAMBlock, obj.name, uid=meta.uid, resource_version=meta.resource_version)
                self._step("block-marked")
                if not meta.finalizers:
                    return
                async with asyncio.timeout(self._settings.store_limit):
                    obj = await self._store.get(IPAMBlock, obj.name)
                if obj.metadata.uid != meta.uid:
                    return
            async with asyncio.timeout(self._settings.store_limit):
                await let_go(self._store, obj)
        except NotFound:
            log.info("block %s was gone already", obj.spec.cidr)

    async def _block(self, cidr: str, pool: str) -> IPAMBlock:
        """As it is created. With no Node of our name it has no owner until there is one: see ``tie``."""
        meta = Meta(
            name=block_name(cidr),
            labels={LABEL_MANAGED_BY: "underlay-cni"},
            finalizers=(FINALIZER_OWNER,),
            owner_references=await self._owner(),
        )
        return IPAMBlock(metadata=meta, spec=IPAMBlockSpec(cidr=cidr, pool=pool, node=self._node))

    async def _owner(self) -> tuple[OwnerReference, ...]:
        """Our Node, read uncached: a block whose owner has gone is deleted at once."""
        try:
            async with asyncio.timeout(self._settings.store_limit):
                node = await self._store.get(Node, self._node)
        except NotFound:
            return ()
        return (OwnerReference(api_version=Node.API, kind=Node.kind(), name=node.name, uid=node.metadata.uid),)


async def let_go(store: Store, obj: IPAMBlock) -> None:
    """Removes the owner's finalizer of a marked block, which then is gone if it has no other. Conflict, NotFound."""
    others = tuple(f for f in obj.metadata.finalizers if f != FINALIZER_OWNER)
    if others != obj.metadata.finalizers:
        await store.update(
            msgspec.structs.replace(obj, metadata=msgspec.structs.replace(obj.metadata, finalizers=others))
        )


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


def _at(template: IPAMBlock, cidr: str) -> IPAMBlock:
    """The same block at another place."""
    return msgspec.structs.replace(
        template,
        metadata=msgspec.structs.replace(template.metadata, name=block_name(cidr)),
        spec=msgspec.structs.replace(template.spec, cidr=cidr),
    )
