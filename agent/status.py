"""Writes the node's BGPNodeStatus: the newest word, about once a second, and only when it differs.

It names its Node as owner, as a block does, so that Kubernetes deletes it with the Node.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from msgspec.structs import replace

from store.base import Store, mutate
from store.clock import Clock
from store.errors import AlreadyExists, NotFound, StoreError
from store.model import BGPNodeStatus, BGPNodeStatusStatus, Meta, with_owner

log = logging.getLogger(__name__)

#: Seconds between two writes at least; after a failure, doubled each time up to the second number.
INTERVAL: Final = (1.0, 30.0)


class StatusWriter:
    """``offer`` takes the newest status, ``own`` the Node's uid; ``run`` brings both into the store."""

    def __init__(self, store: Store, node: str, clock: Clock) -> None:
        self._store, self._node, self._clock = store, node, clock
        self._newest: BGPNodeStatusStatus | None = None
        self._uid = ""
        self._offered = asyncio.Event()
        #: Writes that were done, and that failed.
        self.written = self.failed = 0

    def offer(self, status: BGPNodeStatusStatus) -> None:
        if status != self._newest:
            self._newest = status
            self._offered.set()

    def own(self, uid: str) -> None:
        """Of our Node; "" while there is none: then no status is made, as nobody would delete it."""
        if uid != self._uid:
            self._uid = uid
            if uid:
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
        try:
            written = await mutate(self._store, BGPNodeStatus, self._node, self._told, status=True)
        except NotFound:
            if not self._uid or self._newest is None:
                return
            meta = with_owner(Meta(name=self._node), self._node, self._uid)
            try:
                await self._store.create(BGPNodeStatus(metadata=meta))
            except AlreadyExists:
                log.debug("somebody else created BGPNodeStatus %s meanwhile", self._node)
            written = await mutate(self._store, BGPNodeStatus, self._node, self._told, status=True)
        # Last: where this is not allowed the status is told all the same.
        if self._owned(written) is not None:
            await mutate(self._store, BGPNodeStatus, self._node, self._owned)

    def _told(self, current: BGPNodeStatus) -> BGPNodeStatus | None:
        newest = self._newest
        return None if newest is None or current.status == newest else replace(current, status=newest)

    def _owned(self, current: BGPNodeStatus) -> BGPNodeStatus | None:
        """The owner of one that has none, or whose Node was made anew: it would be deleted with the one before."""
        meta = with_owner(current.metadata, self._node, self._uid)
        return None if meta == current.metadata else replace(current, metadata=meta)
