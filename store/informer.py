"""A kept copy of one kind: lists, watches, and goes on by itself after every fault of the store."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Generic

from store.base import Event, Store
from store.clock import Clock
from store.errors import Expired, StoreError, Unavailable
from store.model import R

#: Seconds between attempts while the store cannot be reached: doubled each time, up to the second number.
BACKOFF = (0.1, 10.0)


class Informer(Generic[R]):
    """What the store said last of the objects of ``kind`` (those that match ``where``), by key.

    Nothing is ever forgotten because of a fault: while the store is away, and while everything is read again, the last
    state stands; what vanished meanwhile goes when the new state is complete. ``rng`` spreads the attempts of many
    nodes. ``on_change`` is called, on the event loop, after each change of ``items``, ``synced`` or ``error``.
    """

    def __init__(
        self,
        store: Store,
        kind: type[R],
        clock: Clock,
        where: Mapping[str, str] | None = None,
        *,
        rng: random.Random | None = None,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._store = store
        self._kind = kind
        self._clock = clock
        self._where = where
        self._rng = rng or random.Random()
        self._on_change = on_change
        self._items: dict[str, R] = {}
        self._fresh: dict[str, R] | None = None
        self._synced = False
        self._error = ""
        #: Since when the copy may be out of date; None while it follows the store.
        self._behind_since: float | None = clock.monotonic()
        self._generation = 0
        #: A watch that has shown the whole state, and the version of that.
        self._opened: tuple[AsyncGenerator[Event[R], None], str] | None = None
        #: The watch of now has told anything, and anything that came after the state that it began with.
        self._heard = self._followed = False
        self._moved = asyncio.Event()

    @property
    def kind(self) -> type[R]:
        return self._kind

    @property
    def items(self) -> Mapping[str, R]:
        """By key; a live view that cannot be written: copy it to keep it."""
        return MappingProxyType(self._items)

    @property
    def synced(self) -> bool:
        """The whole state has been seen once; stays true."""
        return self._synced

    @property
    def error(self) -> str:
        """Why the copy may be out of date, in words; "" while it follows the store."""
        return self._error

    @property
    def behind(self) -> float:
        """Seconds for which the copy may be out of date; 0 while it follows the store."""
        return 0.0 if self._behind_since is None else max(0.0, self._clock.monotonic() - self._behind_since)

    @property
    def generation(self) -> int:
        """Counts the changes of ``items``, ``synced`` and ``error``."""
        return self._generation

    async def changed(self, since: int) -> int:
        """Waits until ``generation`` is past ``since`` and returns it. Any number may wait, and none misses a change:
        each says up to where it has seen."""
        while self._generation <= since:
            await self._moved.wait()
        return self._generation

    async def load(self) -> None:
        """Reads the whole state, past every cache, into ``items``; nobody is told. ``run`` goes on from there without a
        second reading. StoreError."""
        items: dict[str, R] = {}
        events = self._store.watch(self._kind, where=self._where)
        async for event in events:
            if event.object is None:
                break
            items[event.object.key] = event.object
        self._items, self._synced, self._error, self._behind_since = items, True, "", None
        before, self._opened = self._opened, (events, event.version)
        if before is not None:
            await before[0].aclose()

    async def run(self) -> None:
        """Follows the store until cancelled. Raises only what trying again cannot mend (``Invalid``: bad ``where``)."""
        version: str | None = None
        pause = BACKOFF[0]
        while True:
            self._heard = False
            at_once = True
            try:
                version = await self._follow(version)
            except Expired:
                # With nothing told but the state itself, the next state may be too old at once as well.
                version, self._heard = None, self._followed
            except Unavailable as e:
                version, at_once = None, False
                self._fail(e)
            if self._heard:
                pause = BACKOFF[0]
            # A watch that ended or expired is taken up at once, unless it has told nothing at all.
            if not (at_once and self._heard):
                await self._clock.sleep(pause * self._rng.uniform(0.5, 1.0))
                pause = min(pause * 2, BACKOFF[1])

    async def _follow(self, version: str | None) -> str | None:
        """One watch, to its end; returns where the next one resumes."""
        watch, self._opened = self._opened, None
        if watch is None:
            watch = self._store.watch(self._kind, since=version, where=self._where), version or ""
        events, version = watch
        self._fresh, self._followed = None if version else {}, False
        async with aclosing(events):
            async for event in events:
                self._apply(event)
                version = event.version or version
        return version

    def _apply(self, event: Event[R]) -> None:
        self._heard = True
        if event.type == "synced":
            if self._fresh is not None:
                self._replace(self._fresh)
        elif event.object is not None:
            self._followed = self._fresh is None
            target = self._items if self._fresh is None else self._fresh
            if event.type == "deleted":
                target.pop(event.object.key, None)
            else:
                target[event.object.key] = event.object
            if self._fresh is None:
                self._move()

    def _replace(self, fresh: dict[str, R]) -> None:
        different = fresh != self._items or not self._synced or self._error
        self._items, self._fresh = fresh, None
        self._synced, self._error, self._behind_since = True, "", None
        if different:
            self._move()

    def _fail(self, error: StoreError) -> None:
        text = f"{self._kind.PLURAL}: {error}"
        if self._behind_since is None:
            self._behind_since = self._clock.monotonic()
        if text != self._error:
            self._error = text
            self._move()

    def _move(self) -> None:
        self._generation += 1
        # Each waiter holds the event that was there when it looked; the next ones get a new one.
        self._moved.set()
        self._moved = asyncio.Event()
        if self._on_change is not None:
            self._on_change()
