"""Writes the node's BGPNodeStatus: the newest word, about once a second, and only when it differs."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from store.base import Store, mutate
from store.clock import Clock
from store.errors import AlreadyExists, NotFound, StoreError
from store.model import BGPNodeStatus, BGPNodeStatusStatus, Meta

log = logging.getLogger(__name__)

#: Seconds between two writes at least; after a failure, doubled each time up to the second number.
INTERVAL: Final = (1.0, 30.0)


class StatusWriter:
    """``offer`` takes the newest status; ``run`` brings it into the store."""

    def __init__(self, store: Store, node: str, clock: Clock) -> None:
        self._store, self._node, self._clock = store, node, clock
        self._newest: BGPNodeStatusStatus | None = None
        self._offered = asyncio.Event()
        #: Writes that were done, and that failed.
        self.written = self.failed = 0

    def offer(self, status: BGPNodeStatusStatus) -> None:
        if status != self._newest:
            self._newest = status
            self._offered.set()

    async def run(self) -> None:
        """Until cancelled. The store's faults are waited out."""
        pause = INTERVAL[0]
        while True:
            await self._offered.wait()
            self._offered.clear()
            try:
                await self._write()
                self.written += 1
                pause = INTERVAL[0]
            except StoreError as e:
                log.info("status is not written: %s", e)
                self.failed += 1
                self._offered.set()
                pause = min(pause * 2, INTERVAL[1])
            await self._clock.sleep(pause)

    async def _write(self) -> None:
        def change(current: BGPNodeStatus) -> BGPNodeStatus | None:
            newest = self._newest
            if newest is None or current.status == newest:
                return None
            return BGPNodeStatus(metadata=current.metadata, status=newest)

        try:
            await mutate(self._store, BGPNodeStatus, self._node, change, status=True)
        except NotFound:
            try:
                await self._store.create(BGPNodeStatus(metadata=Meta(name=self._node)))
            except AlreadyExists:
                log.debug("somebody else created BGPNodeStatus %s meanwhile", self._node)
            await mutate(self._store, BGPNodeStatus, self._node, change, status=True)
