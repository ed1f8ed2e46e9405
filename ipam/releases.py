"""Ends allocations that people ask to have ended, by an annotation on the block (R2): only what nothing uses any more.

The annotation is removed once it is answered. What is refused is told in another one, with the reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from ipam.errors import in_words
from ipam.ledger import Ledger, Own, Phase
from ipam.mirror import Superseded
from ipam.model import Settings
from store.base import Store, mutate
from store.clock import Clock
from store.errors import NotFound, StoreError
from store.model import ANNOTATION_RELEASE, ANNOTATION_RELEASE_REFUSED, IPAMBlock, release_wanted

log = logging.getLogger(__name__)


class Releases:
    """``release`` ends what has an address if nothing uses it, or says why not; ``check`` raises if the block's object
    shows a newer server than this one."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        clock: Clock,
        settings: Settings,
        *,
        release: Callable[[str], str],
        check: Callable[[Own, IPAMBlock], None],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._settings = settings
        self._release = release
        self._check = check
        self._asked: dict[str, None] = {}  # CIDRs
        self._news = asyncio.Event()

    def see(self, obj: IPAMBlock) -> None:
        """The store shows this of an own block, perhaps a while ago."""
        if release_wanted(obj):
            self._asked[obj.spec.cidr] = None
            self._news.set()

    async def run(self) -> None:
        """Answers until cancelled, or until a newer server is met."""
        pause = self._settings.backoff_min
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._answer_all()
            except Superseded:
                return
            except (StoreError, TimeoutError) as e:
                log.warning("no answer yet to who wants addresses released: %s", in_words(e))
                await self._clock.sleep(pause)
                pause = min(2 * pause, self._settings.backoff_max)
                self._news.set()
            else:
                pause = self._settings.backoff_min

    async def _answer_all(self) -> None:
        for cidr in tuple(self._asked):
            own = self._ledger.blocks.get(cidr)
            if own is not None and own.phase is not Phase.LOST:
                async with asyncio.timeout(self._settings.store_limit):
                    await self._answer(own)
            self._asked.pop(cidr, None)

    async def _answer(self, own: Own) -> None:
        try:
            seen = await self._store.get(IPAMBlock, own.obj.name)
            wanted = release_wanted(seen)
            if seen.metadata.uid != own.obj.metadata.uid or not wanted:
                return
            self._check(own, seen)
            refused = {address: why for address in wanted if (why := self._release(address))}
            for address, why in refused.items():
                log.warning("%s is not released, as people ask: %s", address, why)
            own.obj = await mutate(self._store, IPAMBlock, seen.name, lambda block: _answered(block, wanted, refused))
        except NotFound:
            log.info("block %s has gone before its addresses could be released", own.cidr)


def _answered(block: IPAMBlock, answered: tuple[str, ...], refused: dict[str, str]) -> IPAMBlock:
    """The block without the wishes that were answered; those that came since stay."""
    left = [address for address in release_wanted(block) if address not in answered]
    annotations = dict(block.metadata.annotations)
    for key, text in (
        (ANNOTATION_RELEASE, ",".join(left)),
        (ANNOTATION_RELEASE_REFUSED, "; ".join(f"{address}: {why}" for address, why in refused.items())),
    ):
        annotations.pop(key, None)
        if text:
            annotations[key] = text
    return msgspec.structs.replace(block, metadata=msgspec.structs.replace(block.metadata, annotations=annotations))
