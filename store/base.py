"""The one protocol that all backends serve, and the helper for read-change-write."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from store.errors import Conflict
from store.model import R, Resource

T = TypeVar("T", bound=Resource)


class Listing(msgspec.Struct, Generic[T], frozen=True):
    """Objects in order of key, and the version of the store that they were read at (for ``watch``'s ``since``)."""

    items: tuple[T, ...]
    version: str


class Event(msgspec.Struct, Generic[T], frozen=True):
    """A change, in the store's order. ``synced`` (with no object) ends the initial state; from there on it is news.

    ``version`` is where a later ``watch(since=...)`` resumes after this event; an event of the initial state has none
    (""), as it cannot be resumed half way: ``since=""`` begins anew.
    """

    type: Literal["added", "modified", "deleted", "synced"]
    object: T | None
    version: str


class Store(Protocol):
    """Typed objects with optimistic concurrency. Every method may raise ``Unavailable``.

    ``key`` is ``Resource.key``: ``namespace/name``, or the name alone where the kind has no namespaces; another form is
    ``Invalid``.

    ``where`` selects by equality of fields that the kind declares in ``SELECTABLE``, as ``{"spec.node": "node-1"}``, or
    of ``metadata.name`` and ``metadata.namespace``; another field is ``Invalid``. So is a selection of a kind that is
    read ``BY_NAME`` only, without both.
    """

    async def get(self, kind: type[R], key: str) -> R:
        """The current object. ``NotFound``."""
        ...

    async def list(self, kind: type[R], *, where: Mapping[str, str] | None = None) -> Listing[R]: ...

    def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        """Without ``since``: the present objects as ``added``, then ``synced``, then every change from there on.
        With ``since``: the changes after that version, at once. Raises ``Expired`` when that version is too old.
        An object that stops matching ``where`` is ``deleted``. Ends only by ``aclose`` or an error.
        """
        ...

    async def create(self, obj: R) -> R:
        """Stores a new object, ``status`` left out (as the API server does), and returns it with uid, version and
        creation stamp. ``AlreadyExists``, ``Invalid``."""
        ...

    async def update(self, obj: R) -> R:
        """Replaces all but ``status`` and the metadata that are the store's own. The object carries the
        ``resource_version`` that it was decided on (none: ``Invalid``). An equal object changes nothing: no new
        version, no event. Removing the last finalizer of a marked object deletes it.
        ``NotFound``, ``Conflict``, ``Invalid``."""
        ...

    async def update_status(self, obj: R) -> R:
        """Replaces ``status`` alone; everything else is left as it is in the store. Of the conditions of a kind that is
        not ours those that are not given may stay: others write them. Otherwise as ``update``."""
        ...

    async def delete(self, kind: type[R], key: str, *, uid: str = "", resource_version: str = "") -> None:
        """Deletes; an object with finalizers is only marked (``deletion_timestamp``). ``NotFound``; ``Conflict`` if a
        given precondition does not hold."""
        ...

    async def close(self) -> None: ...


MUTATE_LIMIT = 16


async def mutate(store: Store, kind: type[R], key: str, change: Callable[[R], R | None], *, status: bool = False) -> R:
    """Reads the object, applies ``change``, writes; reads again on a conflict, at most ``MUTATE_LIMIT`` times.

    ``change`` is pure: it may be called more than once. Returning None means that nothing is to be done.
    ``status`` says which half is written. Raises what the store raises, ``Conflict`` when the limit is reached.
    """
    for attempt in range(MUTATE_LIMIT):
        current = await store.get(kind, key)
        wanted = change(current)
        if wanted is None:
            return current
        try:
            return await (store.update_status(wanted) if status else store.update(wanted))
        except Conflict:
            if attempt == MUTATE_LIMIT - 1:
                raise
    raise AssertionError("unreachable")
