"""What each verb of ``Store`` does to an object: the API server's rules as functions. Pure.

The backends that keep objects themselves (memory, sqlite) read, ask here, and write what the answer says; so both
refuse and stamp alike. Source: Kubernetes API conventions, "Metadata", "Concurrency Control", "Finalizers".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final, Generic, Literal

import msgspec

from store.base import Event, T
from store.errors import AlreadyExists, Conflict, Invalid, NotFound, Problem
from store.model import KubeEvent, Resource
from store.validate import validate, validate_against

EVENT_TTL: Final = timedelta(hours=1)


class Change(msgspec.Struct, Generic[T], frozen=True):
    """One write: the object as it is now (a deleted one as it was last), and the values that it could be selected by
    before (None: it was not there)."""

    type: Literal["added", "modified", "deleted"]
    object: T
    was: Mapping[str, str] | None


def create(obj: T, current: T | None, beside: Iterable[Resource], *, uid: str, version: str, now: str) -> Change[T]:
    """A new object with the store's stamps; ``status`` and stamps that it brings along are dropped."""
    if obj.metadata.resource_version:
        remedy = "leave it out: a new object has no version yet"
        raise Invalid(title(obj), [Problem("metadata.resourceVersion", obj.metadata.resource_version, remedy)])
    if current is not None:
        raise AlreadyExists(f"{title(obj)} exists already: change it, or delete it first")
    new = _replace(_typed(obj), status=_empty_status(obj))
    _refuse(new, [*validate(new), *validate_against(new, beside)])
    new = _stamp(
        new,
        uid=uid,
        resource_version=version,
        generation=1,
        creation_timestamp=now,
        deletion_timestamp="",
    )
    return Change("added", new, None)


def update(obj: T, current: T | None, beside: Iterable[Resource], *, version: str) -> Change[T] | None:
    """The current object with ``obj``'s spec, labels, annotations, finalizers and owners; None if that is no change.
    A marked object that loses its last finalizer is deleted."""
    present = _decided_on(obj, current)
    beside = tuple(beside)
    wanted, meta = _typed(obj), present.metadata
    new = _replace(wanted, status=getattr(present, "status", None))
    new = _stamp(
        new,
        namespace=meta.namespace,
        uid=meta.uid,
        resource_version=meta.resource_version,
        generation=meta.generation,
        creation_timestamp=meta.creation_timestamp,
        deletion_timestamp=meta.deletion_timestamp,
    )
    if new == present:
        return None
    problems = [*validate(new, old=present), *validate_against(new, beside)]
    added = set(new.metadata.finalizers) - set(meta.finalizers)
    if meta.deletion_timestamp and added:
        remedy = "add none: the object is being deleted"
        problems.append(Problem("metadata.finalizers", sorted(added), remedy))
    _refuse(new, problems, [*validate(present), *validate_against(present, beside)])
    # A generation is one of what is wished: all but metadata and status, which is the present one's already.
    respecified = msgspec.structs.replace(new, metadata=meta) != present
    new = _stamp(new, resource_version=version, generation=meta.generation + respecified)
    gone = bool(meta.deletion_timestamp) and not new.metadata.finalizers
    return Change("deleted" if gone else "modified", new, selectable(present))


def update_status(obj: T, current: T | None, *, version: str) -> Change[T] | None:
    """The current object with ``obj``'s status; None if that is no change."""
    present = _decided_on(obj, current)
    if "status" not in type(obj).__struct_fields__:
        raise Invalid(title(obj), [Problem("status", None, f"a {obj.kind()} has no status to update")])
    new = _replace(present, status=getattr(_typed(obj), "status", None))
    if new == present:
        return None
    _refuse(new, validate(new, old=present), validate(present))
    return Change("modified", _stamp(new, resource_version=version), selectable(present))


def delete(
    kind: type[T], key: str, current: T | None, *, uid: str, resource_version: str, version: str, now: str
) -> Change[T] | None:
    """The object gone, or marked where it has finalizers; None if it is marked already."""
    if current is None:
        raise NotFound(f"{kind.kind()} {key} does not exist")
    meta = current.metadata
    if uid and uid != meta.uid:
        raise Conflict(f"{title(current)} has uid {meta.uid}, not {uid}: it was deleted and created again")
    if resource_version and resource_version != meta.resource_version:
        raise Conflict(_stale(current, resource_version))
    if not meta.finalizers:
        return Change("deleted", _stamp(current, resource_version=version), selectable(current))
    if meta.deletion_timestamp:
        return None
    # A mark counts as a new wish, so it moves the generation (API conventions, "Metadata").
    marked = _stamp(current, resource_version=version, generation=meta.generation + 1, deletion_timestamp=now)
    return Change("modified", marked, selectable(current))


def is_expired(event: KubeEvent, now: str) -> bool:
    """Whether nobody has said it for an hour: so long the API server keeps an Event after its last write
    (kube-apiserver, ``--event-ttl``)."""
    said = [event.metadata.creation_timestamp, event.series.last_observed_time if event.series else ""]
    last = max(datetime.fromisoformat(stamp) for stamp in said if stamp)
    return datetime.fromisoformat(now) - last > EVENT_TTL


# -- addressing and selecting --------------------------------------------------------------------------------------


def split_key(kind: type[Resource], key: str) -> tuple[str, str]:
    """Namespace ("" where the kind has none) and name of a ``Resource.key``. ``Invalid`` if it is none of this kind."""
    namespace, slash, name = key.rpartition("/")
    if kind.NAMESPACED and not (namespace and name and "/" not in namespace):
        remedy = f"write namespace/name: a {kind.kind()} lives in a namespace"
    elif not kind.NAMESPACED and (slash or not name):
        remedy = f"write the name alone: a {kind.kind()} belongs to the whole cluster"
    else:
        return namespace, name
    raise Invalid(f"{kind.kind()} {key}", [Problem("key", key, remedy)])


def check_where(kind: type[Resource], where: Mapping[str, str] | None) -> None:
    """``Invalid`` if ``where`` names a field that cannot be selected by, or leaves out one that must be named."""
    where, allowed = where or {}, _selected_by(kind)
    wrong = [Problem(f, v, f"select by {' or '.join(allowed)}") for f, v in where.items() if f not in allowed]
    if kind.BY_NAME:
        remedy = f"say which: {kind.PLURAL} are read one by one, never all together"
        wrong += [Problem(f, "", remedy) for f in ("metadata.namespace", "metadata.name") if not where.get(f)]
    if wrong:
        raise Invalid(f"the selection of {kind.PLURAL}", wrong)


def selectable(obj: Resource) -> dict[str, str]:
    """The values that ``where`` can ask for, by dotted wire path."""
    values = {}
    for path in _selected_by(type(obj)):
        value: object = obj
        for attribute in _attributes(type(obj), path):
            value = getattr(value, attribute)
        values[path] = str(value)
    return values


def _selected_by(kind: type[Resource]) -> tuple[str, ...]:
    return ("metadata.name", *(("metadata.namespace",) if kind.NAMESPACED else ()), *kind.SELECTABLE)


@lru_cache(maxsize=64)
def _attributes(kind: type[msgspec.Struct], path: str) -> tuple[str, ...]:
    """The names in Python of a dotted path on the wire."""
    first, _, rest = path.partition(".")
    field = next(f for f in msgspec.structs.fields(kind) if f.encode_name == first)
    return (field.name, *_attributes(field.type, rest)) if rest else (field.name,)


def matches(values: Mapping[str, str], where: Mapping[str, str] | None) -> bool:
    return all(values.get(field, "") == value for field, value in (where or {}).items())


def as_event(change: Change[T], where: Mapping[str, str] | None) -> Event[T] | None:
    """What a watch with ``where`` tells of the change: an object that begins to match is added, one that stops to match
    is deleted; None if it matched neither before nor after."""
    before = change.was is not None and matches(change.was, where)
    after = change.type != "deleted" and matches(selectable(change.object), where)
    version = change.object.metadata.resource_version
    if after:
        return Event("modified" if before else "added", change.object, version)
    return Event("deleted", change.object, version) if before else None


# -- parts --------------------------------------------------------------------------------------------------------


def title(obj: Resource) -> str:
    return f"{obj.kind()} {obj.key}"


def _decided_on(obj: T, current: T | None) -> T:
    """The current object, if it is the one that the caller has seen."""
    meta = obj.metadata
    if not meta.resource_version:
        remedy = "give the version that was read: without it a change by somebody else would be undone"
        raise Invalid(title(obj), [Problem("metadata.resourceVersion", "", remedy)])
    if current is None:
        raise NotFound(f"{title(obj)} does not exist")
    if meta.uid and meta.uid != current.metadata.uid:
        raise Conflict(f"{title(obj)} has uid {current.metadata.uid}, not {meta.uid}: it was deleted and created again")
    if meta.resource_version != current.metadata.resource_version:
        raise Conflict(_stale(current, meta.resource_version))
    return current


def _stale(current: Resource, version: str) -> str:
    return (
        f"{title(current)} is at version {current.metadata.resource_version}, this was decided on {version}: "
        f"read it again and decide again"
    )


def _refuse(new: Resource, problems: Iterable[Problem], known: Iterable[Problem] = ()) -> None:
    """Raises for what is wrong, but not for what was wrong before (``known``): an object that an older release let in,
    or a block whose pool was made again, can still be mirrored, released and repaired step by step."""
    known = tuple(known)
    problems = [p for p in problems if p not in known]
    if problems:
        raise Invalid(title(new), problems)


def _typed(obj: T) -> T:
    """A copy of its own, with every field of the type that the model says; a struct's constructor checks none."""
    try:
        return msgspec.json.decode(msgspec.json.encode(obj), type=type(obj))
    except (msgspec.MsgspecError, TypeError) as e:
        raise Invalid(f"{type(obj).__name__}", [Problem("object", repr(obj)[:200], str(e))]) from e


def _empty_status(obj: Resource) -> object:
    for field in msgspec.structs.fields(type(obj)):
        if field.name == "status":
            return field.default
    return None


def _replace(obj: T, *, status: object) -> T:
    return msgspec.structs.replace(obj, status=status) if "status" in obj.__struct_fields__ else obj


def _stamp(obj: T, **stamps: object) -> T:
    return msgspec.structs.replace(obj, metadata=msgspec.structs.replace(obj.metadata, **stamps))
