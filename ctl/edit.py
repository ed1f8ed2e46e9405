"""Writing what people want into a store: create, apply, replace, delete, one object at a time.

None of them writes ``status``: that is its owner's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from ctl.kinds import reference
from store.base import Store, mutate
from store.errors import AlreadyExists, NotFound, StoreError
from store.model import IPAMBlock, IPPool, Meta, Resource

Verb = Literal["created", "configured", "replaced", "unchanged", "deleted"]


class InUse(StoreError):
    """Pods still hold addresses of what was to be deleted."""


async def create(store: Store, wanted: Resource, *, dry_run: bool = False) -> Verb:
    """A new object. Raises AlreadyExists, Invalid, Unavailable."""
    if await _exists(store, wanted):
        raise AlreadyExists(f"{reference(wanted)} exists already: 'apply' or 'replace' changes it")
    if not dry_run:
        await store.create(_fresh(wanted))
    return "created"


async def apply(store: Store, wanted: Resource, *, dry_run: bool = False) -> Verb:
    """Creates the object, or makes its spec that of ``wanted``. Labels and annotations of ``wanted`` are set, others
    are left. Decided again when somebody else writes at the same time. Raises Invalid, Conflict, Unavailable."""

    def merged(current: Resource) -> Resource:
        have, want = current.metadata, wanted.metadata
        meta = msgspec.structs.replace(
            have, labels={**have.labels, **want.labels}, annotations={**have.annotations, **want.annotations}
        )
        return _rebuilt(current, meta, wanted)

    return await amend(store, wanted, merged, dry_run=dry_run)


async def amend(
    store: Store, initial: Resource, change: Callable[[Resource], Resource], *, dry_run: bool = False
) -> Verb:
    """Changes the object of the name of ``initial``; where there is none, creates what ``change`` makes of ``initial``.
    Decided again when somebody else writes at the same time. Raises Invalid, Conflict, Unavailable."""
    if not await _exists(store, initial):
        if dry_run:
            return "created"
        try:
            await store.create(_fresh(change(initial)))
        except AlreadyExists:
            pass  # somebody was faster: theirs is changed below
        else:
            return "created"
    return await _change(store, initial, change, "configured", dry_run)


async def replace(store: Store, wanted: Resource, *, dry_run: bool = False) -> Verb:
    """Makes spec, labels and annotations of an object exactly those of ``wanted``. A ``resourceVersion`` in it is the
    one that must still be current. Raises NotFound, Conflict, Invalid, Unavailable."""
    version = wanted.metadata.resource_version

    def exact(current: Resource) -> Resource:
        meta = msgspec.structs.replace(
            current.metadata,
            labels=wanted.metadata.labels,
            annotations=wanted.metadata.annotations,
            resource_version=version or current.metadata.resource_version,
        )
        return _rebuilt(current, meta, wanted)

    if version and not dry_run:
        current = await store.get(type(wanted), wanted.key)
        after = await store.update(exact(current))
        return "unchanged" if after == current else "replaced"
    return await _change(store, wanted, exact, "replaced", dry_run)


async def delete(store: Store, kind: type[Resource], key: str, *, force: bool = False) -> Verb:
    """Deletes an object. A pool or block of which pods hold addresses is left alone unless ``force`` is given.

    Raises NotFound, InUse, Conflict (it changed between look and delete), Unavailable."""
    current = await store.get(kind, key)
    if not force:
        await _refuse_in_use(store, current)
    await store.delete(kind, key, uid=current.metadata.uid)
    return "deleted"


async def _exists(store: Store, wanted: Resource) -> bool:
    try:
        await store.get(type(wanted), wanted.key)
    except NotFound:
        return False
    return True


async def _change(
    store: Store, wanted: Resource, change: Callable[[Resource], Resource], verb: Verb, dry_run: bool
) -> Verb:
    same = False

    def decide(current: Resource) -> Resource | None:
        nonlocal same
        changed = change(current)
        same = changed == current
        return None if same or dry_run else changed

    await mutate(store, type(wanted), wanted.key, decide)
    return "unchanged" if same else verb


def _rebuilt(current: Resource, meta: Meta, wanted: Resource) -> Resource:
    """``current`` with all that ``wanted`` says but its status."""
    wishes = (name for name in wanted.__struct_fields__ if name not in ("metadata", "status"))
    return msgspec.structs.replace(current, metadata=meta, **{name: getattr(wanted, name) for name in wishes})


def _fresh(wanted: Resource) -> Resource:
    """The object without what is the store's to set, as a file from another cluster may carry it."""
    given = wanted.metadata
    meta = Meta(name=given.name, namespace=given.namespace, labels=given.labels, annotations=given.annotations)
    return msgspec.structs.replace(wanted, metadata=meta)


async def _refuse_in_use(store: Store, current: Resource) -> None:
    if isinstance(current, IPAMBlock):
        blocks = [current]
    elif isinstance(current, IPPool):
        blocks = [b for b in (await store.list(IPAMBlock)).items if b.spec.pool == current.name]
    else:
        return
    used = sum(b.status.used for b in blocks)
    if used:
        nodes = ", ".join(sorted({b.spec.node for b in blocks if b.status.used}))
        raise InUse(
            f"{reference(current)}: pods hold {used} of its addresses (on {nodes}): delete the pods first"
            + (" (disabled: true keeps new ones out)" if isinstance(current, IPPool) else "")
            + ", or use --force: they keep them until they end"
        )
