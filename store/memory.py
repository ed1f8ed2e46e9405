"""A store in this process's memory: for unit tests. Strict: it refuses what the API server refuses."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

from store.base import T
from store.clock import Clock
from store.errors import Expired, Unavailable
from store.local import BATCH, HISTORY, Decide, LocalStore, Recent, beside, new_uuid
from store.model import Resource
from store.semantics import Change


class MemoryStore(LocalStore):
    """``history`` is how many writes it remembers for watches. Two switches play a store's bad days:
    ``fail_with`` and ``forget``."""

    def __init__(self, clock: Clock, *, history: int = HISTORY, new_uid: Callable[[], str] = new_uuid) -> None:
        super().__init__(clock, new_uid=new_uid)
        self._objects: dict[type[Resource], dict[str, Resource]] = {}
        self._log: deque[tuple[int, Change[Any]]] = deque(maxlen=history)
        self._head = 0
        self._down = ""

    def fail_with(self, reason: str) -> None:
        """From now on every call and every running watch raises ``Unavailable(reason)``, until called with ""."""
        self._down = reason
        self._ring()

    def forget(self) -> None:
        """Drops the history: watches that have not read all of it raise ``Expired``."""
        self._log.clear()

    async def close(self) -> None:
        self.fail_with("the store is closed")

    async def _get(self, kind: type[T], key: str) -> T | None:
        self._check()
        return cast("T | None", self._objects.get(kind, {}).get(key))

    async def _all(self, kind: type[T]) -> tuple[Sequence[T], int]:
        self._check()
        objects = self._objects.get(kind, {})
        return [cast(T, objects[key]) for key in sorted(objects)], self._head

    async def _write(self, kind: type[T], key: str, decide: Decide[T], *, durable: bool) -> T | None:
        self._check()
        objects = self._objects.setdefault(kind, {})
        current = cast("T | None", objects.get(key))
        other = beside(kind)
        change = decide(current, tuple(self._objects.get(other, {}).values()) if other else (), str(self._head + 1))
        if change is None:
            return current
        self._head += 1
        if change.type == "deleted":
            del objects[key]
        else:
            objects[key] = change.object
        self._log.append((self._head, change))
        self._ring()
        return change.object

    async def _recent(self, kind: type[T], since: int) -> Recent[T]:
        self._check()
        if not self._head - len(self._log) <= since <= self._head:
            raise Expired(f"version {since} is no longer kept: list again")
        found = [(v, c) for v, c in self._log if v > since and type(c.object) is kind][:BATCH]
        return Recent(tuple(c for _, c in found), found[-1][0] if len(found) == BATCH else self._head)

    async def _heard(self, news: asyncio.Event) -> None:
        await news.wait()

    def _check(self) -> None:
        if self._down:
            raise Unavailable(self._down)
