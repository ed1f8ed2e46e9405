"""Writes what is handed out into the blocks' ``status``, behind the answer, many changes in one write (R2)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from ipam.errors import in_words
from ipam.ledger import Ledger, Own, Phase
from ipam.model import Settings
from store.base import Store
from store.clock import Clock
from store.errors import Conflict, NotFound, StoreError
from store.model import Allocation, IPAMBlock, IPAMBlockStatus, Writer

log = logging.getLogger(__name__)

#: A write that meets another's that often in a row is tried again with the next batch.
CONFLICTS = 5


class Superseded(Exception):
    """A newer server writes our blocks: this one is to stop."""


class Mirror:
    """``vanished`` is called with a block whose object is gone or was replaced; ``superseded`` with a sentence, once a
    newer writer is met. ``ledger`` is given after the making, as it reports its changes to ``touch``."""

    ledger: Ledger

    def __init__(
        self,
        store: Store,
        writer: Writer,
        clock: Clock,
        settings: Settings,
        *,
        vanished: Callable[[Own], None],
        superseded: Callable[[str], None],
        step: Callable[[str], None],
    ) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._vanished = vanished
        self._superseded = superseded
        self._step = step
        self._dirty: dict[str, float] = {}  # CIDRs, and since when (monotonic), in order of their change
        self._writing: float | None = None  # since when the block that is being written was dirty
        self._news = asyncio.Event()
        self._stopped = False

    def touch(self, own: Own) -> None:
        self._dirty.setdefault(own.cidr, self._clock.monotonic())
        self._news.set()

    def lag(self) -> float:
        """Seconds since the oldest change that is not in the store yet; 0 if all is."""
        oldest = min(self._dirty.values(), default=None)
        if self._writing is not None:
            oldest = self._writing if oldest is None else min(oldest, self._writing)
        return 0.0 if oldest is None else self._clock.monotonic() - oldest

    async def run(self) -> None:
        """Runs until cancelled, or until a newer server is met."""
        pause = self._settings.backoff_min
        while True:
            await self._news.wait()
            self._news.clear()
            await self._clock.sleep(self._settings.batch)
            try:
                done = await self.flush()
            except Superseded:
                return
            if done:
                pause = self._settings.backoff_min
            else:
                await self._clock.sleep(pause)
                pause = min(2 * pause, self._settings.backoff_max)
                self._news.set()

    async def flush(self) -> bool:
        """Writes every block that has changed, once. False if something is left to be tried again. Superseded."""
        for cidr in tuple(self._dirty):
            if self._stopped:
                raise Superseded("a newer server writes these blocks")
            own = self.ledger.blocks.get(cidr)
            since = self._dirty.pop(cidr)  # a change while we write counts for the next round
            if own is None or own.phase in (Phase.DELETING, Phase.LOST):
                continue
            self._writing = since
            try:
                async with asyncio.timeout(self._settings.store_limit):
                    written = await self._write(own)
            except (StoreError, TimeoutError) as e:
                log.warning("block %s is not mirrored yet: %s", cidr, in_words(e))
                written = False
            finally:
                self._writing = None
            if not written:
                self._dirty[cidr] = since
        return not self._dirty

    def check(self, own: Own, seen: IPAMBlock) -> None:
        """Raises Superseded if a newer server than this has written the block (R2).

        Within a boot the start counter says who is newer. A boot that had written the block before we did is an older
        one; one that appears after that is newer.
        """
        writer = seen.status.writer
        if writer is None or writer == self._writer:
            return
        if writer.boot_id == self._writer.boot_id:
            newer = writer.start > self._writer.start
        else:
            if not own.written:
                own.void_boots.add(writer.boot_id)
            newer = writer.boot_id not in own.void_boots
        if newer:
            self._stopped = True
            reason = (
                f"block {own.cidr} was written by a newer CNI server (boot {writer.boot_id}, start {writer.start}; "
                f"this one: boot {self._writer.boot_id}, start {self._writer.start}): is there another machine with "
                f"this node's name? Stop one of the two servers, then restart the other"
            )
            self._superseded(reason)
            raise Superseded(reason)

    def is_superseded(self, own: Own, seen: IPAMBlock) -> bool:
        """``check``, as an answer."""
        try:
            self.check(own, seen)
        except Superseded:
            return True
        return False

    async def _write(self, own: Own) -> bool:
        for _ in range(CONFLICTS):
            wanted = self.status(own)
            if own.obj.status == wanted:
                return True
            try:
                own.obj = await self._store.update_status(msgspec.structs.replace(own.obj, status=wanted))
                own.written = True
                self._step("mirrored")
                return True
            except NotFound:
                self._vanished(own)
                return True
            except Conflict:
                if not await self._read_again(own):
                    return True
        return False

    async def _read_again(self, own: Own) -> bool:
        """The object as it is now, if it is still ours."""
        try:
            seen = await self._store.get(IPAMBlock, own.obj.name)
        except NotFound:
            self._vanished(own)
            return False
        if seen.metadata.uid != own.obj.metadata.uid:
            self._vanished(own)
            return False
        self.check(own, seen)
        own.obj = seen
        return True

    def status(self, own: Own) -> IPAMBlockStatus:
        """What the block's status is to say."""
        return IPAMBlockStatus(
            allocations=tuple(
                self._allocation(own.block.address(offset), own, offset) for offset in sorted(own.block.owners)
            ),
            used=own.block.used,
            free=own.block.free,
            releasing=own.phase is Phase.RELEASING,
            writer=self._writer,
            conditions=tuple(self.ledger.conditions.values()),
        )

    def _allocation(self, address: str, own: Own, offset: int) -> Allocation:
        owner = own.block.owners[offset]
        lease = self.ledger.leases.get(owner)
        return Allocation(
            address=address,
            network=owner.network,
            container=owner.container,
            interface=owner.interface,
            pod=lease.pod if lease else "",
            since=lease.since if lease else "",
        )
