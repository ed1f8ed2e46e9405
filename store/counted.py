"""A store that counts what is asked of it, for metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import TypeVar

from store.base import Event, Listing, Store
from store.errors import Expired, StoreError, Unavailable
from store.model import R

T = TypeVar("T")


class CountedStore:
    """``store`` with ``requests`` and ``failures`` counted by verb. A failure is an answer that did not come (or a
    watch that must begin anew); one that says no, as a conflict does, is an answer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.requests: dict[str, int] = {}
        self.failures: dict[str, int] = {}

    async def get(self, kind: type[R], key: str) -> R:
        return await self._counted("get", self._store.get(kind, key))

    async def list(self, kind: type[R], *, where: Mapping[str, str] | None = None) -> Listing[R]:
        return await self._counted("list", self._store.list(kind, where=where))

    async def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        _add(self.requests, "watch")
        events = self._store.watch(kind, since=since, where=where)
        try:
            async for event in events:
                yield event
        except (StoreError, TimeoutError):
            _add(self.failures, "watch")
            raise
        finally:
            await events.aclose()

    async def create(self, obj: R) -> R:
        return await self._counted("create", self._store.create(obj))

    async def update(self, obj: R) -> R:
        return await self._counted("update", self._store.update(obj))

    async def update_status(self, obj: R) -> R:
        return await self._counted("update_status", self._store.update_status(obj))

    async def delete(self, kind: type[R], key: str, *, uid: str = "", resource_version: str = "") -> None:
        await self._counted("delete", self._store.delete(kind, key, uid=uid, resource_version=resource_version))

    async def close(self) -> None:
        await self._store.close()

    async def _counted(self, verb: str, call: Awaitable[T]) -> T:
        _add(self.requests, verb)
        try:
            return await call
        except (Unavailable, Expired, TimeoutError):
            _add(self.failures, verb)
            raise


def _add(counts: dict[str, int], verb: str) -> None:
    counts[verb] = counts.get(verb, 0) + 1
