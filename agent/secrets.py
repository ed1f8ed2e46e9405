"""The Secrets that BGPPeers name, each followed by itself: nobody may list the others (``Resource.BY_NAME``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from store.base import Store
from store.clock import Clock
from store.errors import StoreError
from store.informer import Informer
from store.model import Secret

log = logging.getLogger(__name__)

#: Seconds until a Secret that could not be followed is tried again.
AGAIN = 10.0


class Secrets:
    """Those of one namespace that are asked for. ``on_change`` is called on the event loop whenever ``present`` moves.

    A Secret that cannot be read (yet) is not there; nothing waits for it.
    """

    def __init__(self, store: Store, namespace: str, clock: Clock, on_change: Callable[[], None]) -> None:
        self._store, self._namespace, self._clock, self._on_change = store, namespace, clock, on_change
        self._informers: dict[str, Informer[Secret]] = {}
        self._wanted: frozenset[str] = frozenset()
        self._asked = asyncio.Event()

    def want(self, names: frozenset[str]) -> None:
        """The whole set of names that are to be followed."""
        if names != self._wanted:
            self._wanted = names
            self._asked.set()

    def present(self) -> tuple[Secret, ...]:
        """The Secrets that are there, by name."""
        found = (s for name in sorted(self._informers) for s in self._informers[name].items.values())
        return tuple(s for s in found if s.name in self._wanted)

    def followed(self) -> tuple[bool, float]:
        """Whether all that are asked for have been read, and for how many seconds one has not been followed."""
        informers = self._informers.values()
        return all(i.synced for i in informers), max((i.behind for i in informers), default=0.0)

    async def run(self) -> None:
        """Until cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                for name in tasks.keys() - self._wanted:
                    await _end(tasks.pop(name))
                    del self._informers[name]
                for name in self._wanted - tasks.keys():
                    where = {"metadata.namespace": self._namespace, "metadata.name": name}
                    self._informers[name] = Informer(self._store, Secret, self._clock, where, on_change=self._on_change)
                    tasks[name] = asyncio.create_task(self._follow(name, self._informers[name]), name=f"secret-{name}")
        finally:
            for task in tasks.values():
                await _end(task)

    async def _follow(self, name: str, informer: Informer[Secret]) -> None:
        while True:
            try:
                await informer.run()
            except StoreError as e:
                log.warning("Secret %s/%s cannot be followed: %s", self._namespace, name, e)
            await self._clock.sleep(AGAIN)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
