"""Blocks that are marked for deletion and whose owner is gone for good (R5): who needs one lets go of it in its stead.

Nobody looks for such blocks but a node that finds no free one, and it looks at those that stood in its way only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import msgspec

from ipam.model import Settings
from store.base import Store
from store.clock import Clock
from store.errors import Conflict, NotFound
from store.model import FINALIZER_OWNER, IPAMBlock, Node

log = logging.getLogger(__name__)

#: Owners that are asked after at once.
OWNERS = 16


class _Absence(msgspec.Struct):
    """Monotonic: at the first and at the last of a row of looks there was no such Node."""

    first: float
    last: float


class DeadOwners:
    """``node`` is our name. What this node has not seen itself, in this process, does not count: a look that comes more
    than ``settings.absence_gap`` after the one before begins anew."""

    def __init__(self, node: str, store: Store, clock: Clock, settings: Settings) -> None:
        self._node = node
        self._store = store
        self._clock = clock
        self._settings = settings
        self._absent: dict[str, _Absence] = {}

    async def free(self, blocks: Iterable[IPAMBlock], lives: Callable[[str], bool]) -> str:
        """Lets go of one of these blocks if its owner has been gone for ``settings.grace``, and ``lives`` does not say
        of its CIDR that somebody is there all the same. Its CIDR; "" for none."""
        marked = [b for b in blocks if _is_left(b) and b.spec.node != self._node]
        owners = list(dict.fromkeys(b.spec.node for b in marked))
        # Those whose absence is known for longest first: others come in when these have come to an end.
        owners.sort(key=lambda name: self._absent[name].first if name in self._absent else float("inf"))
        dead = {name for name in owners[:OWNERS] if await self._is_dead(name)}
        for block in marked:
            if block.spec.node not in dead:
                continue
            if lives(block.spec.cidr):
                log.warning(
                    "block %s of node %s is not freed: there is no such Node, and a route leads to the block",
                    block.spec.cidr,
                    block.spec.node,
                )
                continue
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    await let_go(self._store, block)
            except (Conflict, NotFound) as e:
                log.info("block %s of node %s is looked after by somebody: %s", block.spec.cidr, block.spec.node, e)
                continue
            log.warning(
                "block %s was marked for deletion, and there has been no node %s for %.0f s: freed in its stead",
                block.spec.cidr,
                block.spec.node,
                self._settings.grace,
            )
            return block.spec.cidr
        return ""

    async def _is_dead(self, name: str) -> bool:
        try:
            async with asyncio.timeout(self._settings.store_limit):
                await self._store.get(Node, name)
        except NotFound:
            now = self._clock.monotonic()
            gap = self._settings.absence_gap
            self._absent = {n: a for n, a in self._absent.items() if now - a.last <= gap}
            absence = self._absent.setdefault(name, _Absence(now, now))
            absence.last = now
            return now - absence.first >= self._settings.grace
        self._absent.pop(name, None)
        return False


def _is_left(block: IPAMBlock) -> bool:
    """It is marked, and nothing holds it but its owner."""
    return bool(block.metadata.deletion_timestamp) and block.metadata.finalizers == (FINALIZER_OWNER,)


async def let_go(store: Store, obj: IPAMBlock) -> None:
    """Removes the owner's finalizer of a marked block, which then is gone if it has no other. Conflict, NotFound."""
    others = tuple(f for f in obj.metadata.finalizers if f != FINALIZER_OWNER)
    if others != obj.metadata.finalizers:
        await store.update(
            msgspec.structs.replace(obj, metadata=msgspec.structs.replace(obj.metadata, finalizers=others))
        )
