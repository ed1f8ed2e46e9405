"""The half of ``Store`` that memory and sqlite share: verbs, watches, waking. A backend adds where the objects lie."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Generic

import msgspec

from store import semantics
from store.base import Event, Listing, T
from store.clock import Clock
from store.errors import Conflict, Expired, NotFound
from store.model import BGPNodeStatus, IPAMBlock, KubeEvent, R, Resource
from store.semantics import Change
from store.validate import BESIDE

#: Writes that a store remembers for watchers that lag behind or come back; an older version is ``Expired``.
HISTORY = 2048
#: Changes that a watch reads at once, so that one that comes back late does not hold up its process.
BATCH = 256

#: From the current object, those beside it and the next version to the change to write (None: nothing changes).
Decide = Callable[[T | None, Sequence[Resource], str], Change[T] | None]


def new_uuid() -> str:
    return str(uuid.uuid4())


class Recent(msgspec.Struct, Generic[T], frozen=True):
    """Changes of one kind after a version, oldest first, and the version up to which they are complete."""

    changes: tuple[Change[T], ...]
    version: int


class LocalStore(ABC):
    """Each write is one decision of ``store.semantics``, made while nobody else can write.

    Versions are the numbers of the writes. A watch is a cursor into the log of writes, so a slow watcher costs nothing
    and falls out (``Expired``) once the log has moved past it.
    """

    def __init__(self, clock: Clock, *, new_uid: Callable[[], str] = new_uuid) -> None:
        self._clock = clock
        self._new_uid = new_uid
        self._news = asyncio.Event()

    # -- what a backend adds ---------------------------------------------------------------------------------------

    @abstractmethod
    async def _get(self, kind: type[T], key: str) -> T | None: ...

    @abstractmethod
    async def _all(self, kind: type[T]) -> tuple[Sequence[T], int]:
        """All objects in order of key, and the version that they were read at."""

    @abstractmethod
    async def _write(self, kind: type[T], key: str, decide: Decide[T], *, durable: bool) -> T | None:
        """Applies ``decide`` to the current object, in one step; what it raises leaves everything as it was. Returns
        the object written, or the current one if nothing changes. ``durable``: outlives a power cut."""

    @abstractmethod
    async def _recent(self, kind: type[T], since: int) -> Recent[T]:
        """At most ``BATCH`` changes. ``Expired`` if some are no longer kept, or ``since`` is yet to come."""

    @abstractmethod
    async def _heard(self, news: asyncio.Event) -> None:
        """Waits until there may be changes; ``news`` was taken before the last look, so none is missed."""

    @abstractmethod
    async def close(self) -> None: ...

    # -- Store -----------------------------------------------------------------------------------------------------

    async def get(self, kind: type[R], key: str) -> R:
        semantics.split_key(kind, key)
        found = await self._get(kind, key)
        if found is None:
            raise NotFound(f"{kind.kind()} {key} does not exist")
        return found

    async def list(self, kind: type[R], *, where: Mapping[str, str] | None = None) -> Listing[R]:
        semantics.check_where(kind, where)
        objects, version = await self._all(kind)
        if where:
            objects = [o for o in objects if semantics.matches(semantics.selectable(o), where)]
        return Listing(tuple(objects), str(version))

    async def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        if since:
            semantics.check_where(kind, where)
            cursor = self._version(since)
        else:
            present = await self.list(kind, where=where)
            cursor = int(present.version)
            for obj in present.items:
                yield Event("added", obj, "")
            yield Event("synced", None, present.version)
        while True:
            news = self._news
            recent = await self._recent(kind, cursor)
            for change in recent.changes:
                event = semantics.as_event(change, where)
                if event is not None:
                    yield event
            cursor = recent.version
            if len(recent.changes) < BATCH:
                await self._heard(news)

    async def create(self, obj: R) -> R:
        if isinstance(obj, KubeEvent):
            for old in await self._expired():
                with contextlib.suppress(NotFound, Conflict):  # said again just now, or forgotten by another process
                    await self.delete(KubeEvent, old.key, resource_version=old.metadata.resource_version)
        return await self._written(
            obj,
            lambda current, beside, version: semantics.create(
                obj, current, beside, uid=self._new_uid(), version=version, now=self._clock.now()
            ),
        )

    async def update(self, obj: R) -> R:
        return await self._written(
            obj, lambda current, beside, version: semantics.update(obj, current, beside, version=version)
        )

    async def update_status(self, obj: R) -> R:
        return await self._written(
            obj, lambda current, _, version: semantics.update_status(obj, current, version=version), status=True
        )

    async def delete(self, kind: type[R], key: str, *, uid: str = "", resource_version: str = "") -> None:
        semantics.split_key(kind, key)

        def decide(current: R | None, beside: Sequence[Resource], version: str) -> Change[R] | None:
            return semantics.delete(
                kind, key, current, uid=uid, resource_version=resource_version, version=version, now=self._clock.now()
            )

        await self._write(kind, key, decide, durable=_is_wish(kind))

    async def _expired(self) -> Sequence[KubeEvent]:
        """Events that the API server would have forgotten by now; here they go when another one comes."""
        events, _ = await self._all(KubeEvent)
        now = self._clock.now()
        return [event for event in events if semantics.is_expired(event, now)]

    # -- parts -----------------------------------------------------------------------------------------------------

    async def _written(self, obj: R, decide: Decide[R], *, status: bool = False) -> R:
        written = await self._write(type(obj), obj.key, decide, durable=not status and _is_wish(type(obj)))
        if written is None:
            raise AssertionError(f"a write of {semantics.title(obj)} left nothing behind")
        return written

    def _ring(self) -> None:
        """Wakes every watch of this process. Each waiter holds the event that it took before it looked, so setting that
        one and laying out a new one loses nobody."""
        self._news.set()
        self._news = asyncio.Event()

    @staticmethod
    def _version(text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise Expired(f"version {text!r} is not of this store: list again")
        return int(text)


def beside(kind: type[Resource]) -> type[Resource] | None:
    """The kind whose objects a write of this kind is checked against."""
    return BESIDE.get(kind)


def _is_wish(kind: type[Resource]) -> bool:
    """What people asked for must outlive a power cut; what a node says of itself is void after a boot anyway (R3)."""
    return kind not in (IPAMBlock, BGPNodeStatus, KubeEvent)
