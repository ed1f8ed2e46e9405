"""Makes a block this node's: by create, then a look whether anything overlaps (R1, R4). And ends it again (R5).

A block names its Node as owner, so that Kubernetes deletes it with the Node, and carries our finalizer, so that a
delete by anybody only marks it. So it ends in two steps: the mark, and our finalizer's removal once it is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from ipaddress import ip_network

import msgspec

from ipam.dead import DeadOwners, let_go
from ipam.errors import Exhausted, KernelUnavailable, NotReady
from ipam.foreign import Foreign, InUseElsewhere
from ipam.ledger import Ledger, Own, Phase
from ipam.model import News, Settings
from ipam.pool import candidates, is_candidate, overlap, within
from store.base import Store
from store.clock import Clock
from store.errors import AlreadyExists, Conflict, Invalid, NotFound
from store.model import (
    FINALIZER_OWNER,
    LABEL_MANAGED_BY,
    IPAMBlock,
    IPAMBlockSpec,
    IPPool,
    Meta,
    Node,
    block_name,
    with_owner,
    within_of,
)

log = logging.getLogger(__name__)

#: Places remembered that a claim could not use.
SHUNNED = 64
#: Blocks that one claim gives back for their foreign routes. From the first on it keeps away from all that it can see.
FOREIGN_TRIES = 3


class Claims:
    """``node`` is our name; ``check`` raises if a block's object shows a newer server than this one; ``ending`` is told
    the uid of each block that is about to be given back. Every method may raise StoreError or TimeoutError (no answer
    within ``store_limit``); what was begun is then in ``pending`` and goes on later."""

    def __init__(
        self,
        node: str,
        store: Store,
        ledger: Ledger,
        foreign: Foreign,
        clock: Clock,
        settings: Settings,
        *,
        check: Callable[[Own, IPAMBlock], None],
        ending: Callable[[str], None],
        step: Callable[[str], None],
    ) -> None:
        self._dead = DeadOwners(node, store, clock, settings)
        self._dead_looked: dict[str, float] = {}  # pool -> when
        self._shun_list: dict[str, str] = {}  # range -> what stands in the way there
        self.node = node
        self._store = store
        self._ledger = ledger
        self._foreign = foreign
        self._clock = clock
        self._settings = settings
        self._check = check
        self._ending = ending
        self._step = step
        #: Own objects by CIDR that nothing is handed out of, until it is known that nothing overlaps them.
        self.pending: dict[str, IPAMBlock] = {}
        #: Nothing is claimed without a Node of our name: whoever saw one needs it from then on.
        self.node_needed = settings.node_needed

    async def claim(self, pool: IPPool, reserved: tuple[str, ...], cidr: str = "") -> Own:
        """A new block of the pool (this very one, if given) that is ours alone. Exhausted, saying why; NotReady while
        there is no Node to own it."""
        for waiting in [c for c, o in self.pending.items() if o.spec.pool == pool.name and cidr in ("", c)]:
            with contextlib.suppress(Exhausted):
                return await self.settle(waiting)
        for tries_left in reversed(range(1 if cidr else FOREIGN_TRIES)):
            obj = await self._create_at(pool, cidr) if cidr else await self._create(pool, reserved)
            self.pending[obj.spec.cidr] = obj
            self._step("block-created")
            try:
                return await self.settle(obj.spec.cidr)
            except InUseElsewhere:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    async def settle(self, cidr: str) -> Own:
        """Looks, uncached, whether a pending block is ours, overlaps nothing and nobody routes to it, and adopts it.
        Otherwise it is given back, and Exhausted says why."""
        obj = self.pending[cidr]
        async with asyncio.timeout(self._settings.store_limit):
            pools = (await self._store.list(IPPool)).items
            blocks = await self._around(obj)
        seen = next((b for b in blocks if b.metadata.uid == obj.metadata.uid), None)
        if seen is None or seen.metadata.deletion_timestamp:
            self.pending.pop(cidr, None)
            if seen is not None and FINALIZER_OWNER in seen.metadata.finalizers:
                self._ledger.adopt(seen, Phase.MARKED, self._clock.monotonic())
            raise Exhausted(f"block {cidr} was deleted while it was being claimed; another one is tried next time")
        problem, at = _problem(seen, pools, blocks)
        if problem:
            log.error("block %s is given back: %s", cidr, problem)
            self._ledger.tell(News("BlockOverlaps", "Claim", f"block {cidr} is given back: {problem}"))
            await self._end(seen)
            self.pending.pop(cidr, None)
            self._shun(at, problem)
            raise Exhausted(f"block {cidr} of pool {seen.spec.pool} cannot be used: {problem}")
        problem = self._foreign.problem(cidr)
        if problem:
            log.error("%s", problem)
            await self._end(seen)
            self.pending.pop(cidr, None)
            raise InUseElsewhere(problem)
        self.pending.pop(cidr, None)
        own = self._ledger.adopt(seen, Phase.NEW, self._clock.monotonic())
        self._check(own, seen)
        return own

    async def _around(self, obj: IPAMBlock) -> tuple[IPAMBlock, ...]:
        """The block itself and what may overlap it, without listing the cluster (docs/decisions/0009): what shares its
        ``within``."""
        cidr, shared = ip_network(obj.spec.cidr), obj.spec.within
        if not shared:
            return (await self._store.list(IPAMBlock)).items
        # Blocks of an older release say nothing of it until their own server has started anew: there are few, or none.
        found = list((await self._store.list(IPAMBlock, where={"spec.within": ""})).items)
        if cidr.num_addresses > 1:
            return (*found, *(await self._store.list(IPAMBlock, where={"spec.within": shared})).items)
        # Nothing is inside an address, and a /20 of fixed addresses is a long list.
        for size in range(ip_network(shared).prefixlen, cidr.max_prefixlen + 1):
            with contextlib.suppress(NotFound):
                found.append(await self._store.get(IPAMBlock, block_name(str(cidr.supernet(new_prefix=size)))))
        return tuple(found)

    async def recreate(self, pool: str, cidr: str) -> IPAMBlock:
        """Our block anew, after somebody deleted it; or what is there by now, perhaps another node's (R5). Invalid if
        the pool would no longer have it."""
        obj = await self._block(cidr, pool, again=True)
        try:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.create(obj)
        except AlreadyExists:
            async with asyncio.timeout(self._settings.store_limit):
                return await self._store.get(IPAMBlock, obj.name)

    def is_ours(self, obj: IPAMBlock) -> bool:
        return obj.spec.node == self.node

    async def tie(self, blocks: Iterable[Own], uid: str) -> bool:
        """Gives each block what it lacks: our finalizer, its Node as owner (it is older than the Node of today, or was
        claimed while there was none), and what it is within. ``uid`` is the Node's as it was seen last: where nothing
        is lacking by that, the store is not asked. False: try again later."""
        lacking = [own for own in blocks if _tied(own.obj, uid) != own.obj]
        if not lacking:
            return True
        uid, done = await self._node_uid(), True
        for own in lacking:
            wanted = _tied(own.obj, uid)
            if wanted == own.obj:
                continue
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    own.obj = await self._store.update(wanted)
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

    async def end_again(self, obj: IPAMBlock) -> None:
        """Gives back a block that this node had given back before: the store was restored from a backup, and another
        node may have claimed it since."""
        log.error("block %s, given back before, is in the store again: given back once more", obj.spec.cidr)
        self._ledger.tell(
            News(
                "BlockRestored",
                "GiveBack",
                f"block {obj.spec.cidr} was given back before, and the store says again that it is of this node: given "
                f"back once more; was the store restored from a backup? underlayctl ipam check says what else differs",
            )
        )
        with contextlib.suppress(Conflict):
            await self._end(obj)

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
        routed = self._foreign.places(pool)
        for cidr in candidates(pool, self.node, reserved):
            if cidr in taken or cidr in routed or cidr in self._ledger.blocks or self._shunned(cidr):
                continue
            if creates == self._settings.creates_limit:
                raise Exhausted(f"pool {pool.name}: {creates} blocks in a row were taken by others; trying again")
            creates += 1
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    return await self._store.create(_at(template, cidr))
            except AlreadyExists:
                conflicts += 1
            except Invalid as e:
                self._shun(cidr, str(e))
                raise
            if conflicts % self._settings.conflicts_before_list == 0:
                taken = frozenset(b.spec.cidr for b in await self._of_pool(pool))
        freed = await self._of_dead_owners(pool, reserved)
        if freed:
            return await self._create_at(pool, freed)
        problems = "; ".join(why for why in (self._unshun(pool), self._foreign.of(pool)) if why)
        if problems:
            raise Exhausted(f"pool {pool.name} ({pool.spec.cidr}) has no usable block left: {problems}")
        raise Exhausted(
            f"pool {pool.name} ({pool.spec.cidr}) has no free block left for node {self.node}: add a pool, or delete "
            f"blocks of nodes that are gone"
        )

    async def _of_pool(self, pool: IPPool) -> tuple[IPAMBlock, ...]:
        async with asyncio.timeout(self._settings.store_limit):
            return (await self._store.list(IPAMBlock, where={"spec.pool": pool.name})).items

    async def _of_dead_owners(self, pool: IPPool, reserved: tuple[str, ...]) -> str:
        """The CIDR of a block of the pool that was left behind by a node that is gone, and is free now; "" for none."""
        now = self._clock.monotonic()
        if now < self._dead_looked.get(pool.name, -math.inf) + self._settings.absence_look:
            return ""
        blocks = await self._of_pool(pool)
        freed = await self._free_one(b for b in blocks if is_candidate(pool, b.spec.cidr, reserved))
        if not freed:
            self._dead_looked[pool.name] = now
        return freed

    async def _free_one(self, blocks: Iterable[IPAMBlock]) -> str:
        """Lets go of one of these in its dead owner's stead: not of one that somebody still routes to, who may be that
        owner, cut off from the store with all its pods."""
        try:
            return await self._dead.free(blocks, self._foreign.leads_to)
        except KernelUnavailable as e:
            log.warning("no block of a dead owner is freed this time: %s", e)
            return ""

    async def forget_foreign(self) -> None:
        """Looks again at what was given back for a foreign route: it counts until the route is gone, or leads to
        another node of this cluster."""
        for cidr in tuple(self._foreign.found):
            if not self._foreign.problem(cidr):
                log.info("no foreign route leads to block %s any more", cidr)
                continue
            with contextlib.suppress(NotFound):
                async with asyncio.timeout(self._settings.store_limit):
                    present = await self._store.get(IPAMBlock, block_name(cidr))
                if not self.is_ours(present):
                    self._foreign.found.pop(cidr, None)

    # -- places that something stands in the way of -----------------------------------------------------------------

    def _shun(self, cidr: str, why: str) -> None:
        """The next claims go elsewhere, until there is no other place."""
        if len(self._shun_list) >= SHUNNED:
            self._shun_list.pop(next(iter(self._shun_list)))
        self._shun_list[cidr] = why

    def _shunned(self, cidr: str) -> bool:
        return any(overlap(cidr, other) for other in self._shun_list)

    def _unshun(self, pool: IPPool) -> str:
        """Why places of the pool were not tried; they are, the next time."""
        found = [cidr for cidr in self._shun_list if overlap(cidr, pool.spec.cidr)]
        return "; ".join(dict.fromkeys(self._shun_list.pop(cidr) for cidr in found))

    async def _create_at(self, pool: IPPool, cidr: str) -> IPAMBlock:
        obj = await self._block(cidr, pool.name)
        while True:
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    return await self._store.create(obj)
            except AlreadyExists:
                async with asyncio.timeout(self._settings.store_limit):
                    try:
                        present = await self._store.get(IPAMBlock, obj.name)
                    except NotFound:
                        raise Exhausted(f"block {cidr} was being given back by another node; try again") from None
            if present.spec.node == self.node:
                if present.metadata.uid in self._ledger.ended:
                    await self.end_again(present)
                    raise Exhausted(f"block {cidr} is being given back; try again")
                return present
            if not await self._free_one((present,)):
                raise Exhausted(
                    f"block {cidr} belongs to node {present.spec.node}: an address is handed out by the node of its "
                    f"block only"
                )

    async def _end(self, obj: IPAMBlock) -> None:
        """Marks the block, and removes our finalizer. Conflict: it is no longer as we know it."""
        meta = obj.metadata
        self._ending(meta.uid)
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

    async def _block(self, cidr: str, pool: str, *, again: bool = False) -> IPAMBlock:
        """As it is created. With no Node of our name nobody would clean up after us: NotReady, unless it was ours
        before (``again``), as something lives in it. That one gets its owner once there is one: see ``tie``."""
        uid = await self._node_uid()
        if not uid and self.node_needed and not again:
            raise NotReady(self.no_node())
        meta = Meta(name=block_name(cidr), labels={LABEL_MANAGED_BY: "underlay-cni"}, finalizers=(FINALIZER_OWNER,))
        spec = IPAMBlockSpec(cidr=cidr, pool=pool, node=self.node, within=within_of(cidr))
        return IPAMBlock(metadata=with_owner(meta, self.node, uid), spec=spec)

    def no_node(self) -> str:
        return (
            f"there is no Node {self.node}, so no block is claimed, as nobody would delete it when this machine goes: "
            f"restart the kubelet, which makes the Node, or see whether UNDERLAY_NODE is its name"
        )

    async def _node_uid(self) -> str:
        """Of our Node, read uncached: a block whose owner has gone is deleted at once. "" for none."""
        try:
            async with asyncio.timeout(self._settings.store_limit):
                return (await self._store.get(Node, self.node)).metadata.uid
        except NotFound:
            return ""


def _problem(obj: IPAMBlock, pools: tuple[IPPool, ...], blocks: tuple[IPAMBlock, ...]) -> tuple[str, str]:
    """Why the block must not be used (R1), and the range in which none can be; empty if it may."""
    cidr = obj.spec.cidr
    if not any(p.name == obj.spec.pool and within(cidr, p.spec.cidr) for p in pools):
        return f"its pool {obj.spec.pool} is gone, or has another range", cidr
    for pool in pools:
        if pool.name != obj.spec.pool and overlap(cidr, pool.spec.cidr):
            return f"IPPool {pool.name} ({pool.spec.cidr}) overlaps it: delete one of the two pools", pool.spec.cidr
    for block in blocks:
        if block.name != obj.name and overlap(cidr, block.spec.cidr):
            other = f"block {block.spec.cidr} of node {block.spec.node}, pool {block.spec.pool}"
            return f"{other} overlaps it: delete that block once nothing uses it", block.spec.cidr
    return "", ""


def _tied(obj: IPAMBlock, uid: str) -> IPAMBlock:
    """The block with our finalizer, what it is within, and its Node, of this uid (if any), as owner."""
    meta = with_owner(obj.metadata, obj.spec.node, uid)
    meta = msgspec.structs.replace(meta, finalizers=tuple(dict.fromkeys((*meta.finalizers, FINALIZER_OWNER))))
    spec = msgspec.structs.replace(obj.spec, within=within_of(obj.spec.cidr))
    return msgspec.structs.replace(obj, metadata=meta, spec=spec)


def _at(template: IPAMBlock, cidr: str) -> IPAMBlock:
    """The same block at another place."""
    return msgspec.structs.replace(
        template,
        metadata=msgspec.structs.replace(template.metadata, name=block_name(cidr)),
        spec=msgspec.structs.replace(template.spec, cidr=cidr, within=within_of(cidr)),
    )
