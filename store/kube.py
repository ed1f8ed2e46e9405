"""The API server as store: custom resources, and core objects as far as the model knows them.

Reads are the API server's consistent ones (no ``resourceVersion``), so what R5 wants uncached is. A watch goes on over
everything that is no loss: it resumes where bookmarks and events left it, and says ``Expired`` when that is too old.

Kubernetes' own objects have fields that the model does not know, so they are patched; ours are written whole.
"""

from __future__ import annotations

import random
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from store import kubewire
from store.base import Event, Listing
from store.clock import Clock
from store.errors import AlreadyExists, Conflict, Expired, Invalid, NotFound, Problem, StoreError, Unavailable
from store.kubeaccess import Access
from store.kubehttp import USER_AGENT, Http, Limits, Refusal, Status
from store.model import GROUP, IPAMBlock, IPPool, Namespace, R, Resource
from store.semantics import check_where, split_key, title
from store.validate import validate, validate_against

#: Objects in one answer to a list: some MB of full blocks.
PAGE = 500
#: Of the status of kinds that are not ours: a list that many write, each its own entries.
_SHARED = "conditions"
_MERGE_PATCH = "application/merge-patch+json"
#: Knows the lists of Kubernetes' own kinds: entries of conditions are merged by type, where a merge patch would replace
#: them all (Kubernetes, "Update API Objects in Place Using kubectl patch").
_STRATEGIC_PATCH = "application/strategic-merge-patch+json"
#: How admission refuses what it cannot judge: for some seconds after a start, or by a policy that asks for what is not
#: there. It says nothing of the object.
NOT_YET = re.compile(r"failed to configure (policy|binding)|not yet ready to handle request")
#: Metadata that are ours to write; the rest is the API server's.
_WRITTEN = ("name", "namespace", "uid", "resourceVersion", "labels", "annotations", "finalizers", "ownerReferences")


class _Line(msgspec.Struct, frozen=True):
    """One line of a watch."""

    type: str
    object: msgspec.Raw


class _BookmarkMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str


class _Bookmark(msgspec.Struct, frozen=True):
    metadata: _BookmarkMeta


class KubeStore:
    """``Store`` over the API server that ``access`` leads to. Call and close it on one event loop."""

    def __init__(
        self,
        access: Access,
        clock: Clock,
        *,
        rng: random.Random | None = None,
        limits: Limits | None = None,
        agent: str = USER_AGENT,
    ) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self._http = Http(access, clock, self._rng, limits or Limits(), agent=agent)

    async def close(self) -> None:
        await self._http.close()

    # -- reading --------------------------------------------------------------------------------------------------

    async def get(self, kind: type[R], key: str) -> R:
        what = f"{kind.kind()} {key}"
        try:
            body = await self._http.call("GET", _object_path(kind, key))
        except Refusal as e:
            if e.code == 404 and not _is_ours(kind):
                # Also where the whole kind is somebody else's, who is not here.
                raise NotFound(f"{what} does not exist") from e
            raise self._refused(what, e) from e
        return self._decode(kind, body)

    async def list(self, kind: type[R], *, where: Mapping[str, str] | None = None) -> Listing[R]:
        check_where(kind, where)
        path, selection = _selection(kind, where)
        # What is selected is little. In pages, an API server before 1.34 reads all of a kind from etcd to find it.
        query = selection or {"limit": str(PAGE)}
        items: list[R] = []
        while True:
            try:
                page = self._decode_page(kind, await self._http.call("GET", path, query=query))
            except Refusal as e:
                if e.code != 410 or "continue" not in query:
                    raise self._refused(kind.PLURAL, e) from e
                # The state that the first page was of is gone: once more, in one piece.
                query, items = selection, []
                continue
            items += page.items
            if not page.metadata.more:
                break
            query["continue"] = page.metadata.more
        items.sort(key=lambda obj: obj.key)
        return Listing(tuple(items), page.metadata.resource_version)

    async def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        check_where(kind, where)
        path, selection = _selection(kind, where)
        if since:
            version = since
            await self._check_version(kind, version, where)
        else:
            present = await self.list(kind, where=where)
            version = present.version
            for obj in present.items:
                yield Event("added", obj, "")
            yield Event("synced", None, version)
        backoff = self._http.backoff()
        sure = True
        while True:
            fault: StoreError | None = None
            quiet, put_off = True, 0
            try:
                if not sure:
                    # A watch from a version that is not there yet says nothing, for ever: after a restore of etcd, say.
                    await self._check_version(kind, version, where)
                seconds, end = self._span()
                async with self._http.lines(path, selection | _watching(version, seconds)) as lines:
                    async for line in lines:
                        event, version = self._read(kind, line, version)
                        quiet = False
                        if event is not None:
                            yield event
            except Refusal as e:
                fault, put_off = self._refused(kind.PLURAL, e), e.status.details.retry_after_seconds
                if not isinstance(fault, Unavailable):
                    raise fault from e
            except Unavailable as e:
                fault = e
            if self._http.closed:
                raise Unavailable("the store is closed")
            if not quiet:
                backoff.reset()
            if (fault is not None or quiet) and not await backoff.pause(put_off):
                raise fault or Unavailable(f"API server {self._http.server}: its watches end as soon as they begin")
            # One that was served for all its time was served by one that knows the version. Nobody who went back in
            # time lets a watch go on.
            sure = fault is None and self._clock.monotonic() >= end

    # -- writing --------------------------------------------------------------------------------------------------

    async def create(self, obj: R) -> R:
        if obj.metadata.resource_version:
            remedy = "leave it out: a new object has no version yet"
            raise Invalid(title(obj), [Problem("metadata.resourceVersion", obj.metadata.resource_version, remedy)])
        body = _body(obj)
        problems = [*validate(obj), *validate_against(obj, await self._beside(obj))]
        if problems:
            raise Invalid(title(obj), problems)
        body["metadata"].pop("uid", None)
        return await self._write(
            "POST", _path(type(obj), obj.metadata.namespace), obj, body, {"fieldValidation": "Strict"}
        )

    async def update(self, obj: R) -> R:
        _decided(obj)
        body = _body(obj)
        if not _is_ours(type(obj)):
            return await self._patch(obj, body)
        return await self._write("PUT", _object_path(type(obj), obj.key), obj, body, {"fieldValidation": "Strict"})

    async def update_status(self, obj: R) -> R:
        _decided(obj)
        if "status" not in type(obj).__struct_fields__:
            raise Invalid(title(obj), [Problem("status", None, f"a {obj.kind()} has no status to update")])
        whole = kubewire.encode(_typed(obj))
        meta = {key: value for key, value in whole["metadata"].items() if key in ("name", "uid", "resourceVersion")}
        body = {"apiVersion": obj.API, "kind": obj.kind(), "metadata": meta}
        path = f"{_object_path(type(obj), obj.key)}/status"
        if not _is_ours(type(obj)):
            # An absent field is one that is left as it is, so what is empty must be said.
            status = {**_empty(type(obj)), **whole.get("status", {})}
            conditions = status.pop(_SHARED, None)
            if conditions:
                # Apart: a Node's two InternalIPs are one by type, and a patch of that kind that has them is refused.
                body["status"] = {_SHARED: conditions}
                written = await self._write("PATCH", path, obj, body, content_type=_STRATEGIC_PATCH)
                there = kubewire.encode(written).get("status", {})
                if {**there, _SHARED: None} == {**whole["status"], _SHARED: None}:
                    return written
                meta["resourceVersion"] = written.metadata.resource_version
            body["status"] = status
            return await self._write("PATCH", path, obj, body, content_type=_MERGE_PATCH)
        if whole.get("status"):
            body["status"] = whole["status"]
        return await self._write("PUT", path, obj, body)

    async def delete(self, kind: type[R], key: str, *, uid: str = "", resource_version: str = "") -> None:
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {key: value for key, value in preconditions.items() if value},
        }
        try:
            await self._http.call("DELETE", _object_path(kind, key), body=options)
        except Refusal as e:
            raise self._refused(f"{kind.kind()} {key}", e) from e

    async def _write(
        self,
        method: str,
        path: str,
        obj: R,
        body: Mapping[str, Any],
        query: Mapping[str, str] | None = None,
        *,
        content_type: str = "application/json",
    ) -> R:
        try:
            answer = await self._http.call(method, path, query=query, body=body, content_type=content_type)
        except Refusal as e:
            raise self._refused(title(obj), e) from e
        return self._decode(type(obj), answer)

    async def _patch(self, obj: R, body: dict[str, Any]) -> R:
        """Changes what differs between the object that it was decided on and ``body``, and nothing else of it."""
        kind, meta = type(obj), obj.metadata
        current = await self.get(kind, obj.key)
        stale = meta.resource_version != current.metadata.resource_version
        if stale or (meta.uid and meta.uid != current.metadata.uid):
            raise Conflict(f"{title(obj)} is another one than it was decided on (version or uid): read it again")
        changes = _difference(_body(current), body)
        if not changes:
            return current
        if "endpoints" in changes:
            remedy = "change it as its owner does: entries have parts that are not known here, and would lose them"
            raise Invalid(title(obj), [Problem("endpoints", None, remedy)])
        pinned = {"uid": current.metadata.uid, "resourceVersion": current.metadata.resource_version}
        changes["metadata"] = {**changes.get("metadata", {}), **pinned}
        return await self._write("PATCH", _object_path(kind, obj.key), obj, changes, content_type=_MERGE_PATCH)

    async def _beside(self, obj: Resource) -> tuple[Resource, ...]:
        """The pools that a pool or a block is measured by. Another may come just then: a guard, no lock (R1)."""
        if isinstance(obj, IPPool):
            return (await self.list(IPPool)).items
        if isinstance(obj, IPAMBlock):
            try:
                return (await self.get(IPPool, obj.spec.pool),)
            except NotFound:
                return ()
        return ()

    # -- versions and events --------------------------------------------------------------------------------------

    def _span(self) -> tuple[int, float]:
        """How many seconds a watch is asked for that begins now, and from when on (monotonic) its end is that of its
        time. Spread, so that a cluster's watches do not end together."""
        seconds = max(1, round(self._http.limits.watch * self._rng.uniform(1.0, 1.5)))
        return seconds, self._clock.monotonic() + seconds

    def _read(self, kind: type[R], line: bytes, version: str) -> tuple[Event[R] | None, str]:
        """The event of a line (None for a bookmark) and where the watch is after it. ``Expired``, ``Unavailable``."""
        try:
            news = msgspec.json.decode(line, type=_Line)
            if news.type == "BOOKMARK":
                return None, msgspec.json.decode(news.object, type=_Bookmark).metadata.resource_version
            if news.type == "ERROR":
                status = msgspec.json.decode(news.object, type=Status)
                raise self._refused(kind.PLURAL, Refusal(status.code, status))
        except msgspec.DecodeError as e:
            said = "what cannot be read" if kind.BY_NAME else repr(line[:200])
            raise Unavailable(f"API server {self._http.server}: a watch said {said}: {e}") from e
        obj = self._decode(kind, news.object)
        version = obj.metadata.resource_version
        match news.type:
            case "ADDED":
                return Event("added", obj, version), version
            case "MODIFIED":
                return Event("modified", obj, version), version
            case "DELETED":
                return Event("deleted", obj, version), version
        raise Unavailable(f"API server {self._http.server}: a watch said {news.type}, which is nothing known")

    async def _check_version(self, kind: type[Resource], version: str, where: Mapping[str, str] | None) -> None:
        """``Expired`` if the API server has not come to that version yet. Versions are numbers that grow (Kubernetes,
        "Resource versions", comparable since 1.35, and numbers of etcd's writes before)."""
        present = version
        if version.isascii() and version.isdigit():
            # Any object will do, and a name may be all that we have a right to. Other selections would have to be
            # searched for.
            path, selection = _selection(kind, {k: v for k, v in (where or {}).items() if k.startswith("metadata.")})
            try:
                answer = await self._http.call("GET", path, query={**selection, "limit": "1"})
            except Refusal as e:
                raise self._refused(kind.PLURAL, e) from e
            present = self._decode_page(kind, answer).metadata.resource_version
        else:
            raise Expired(f"{kind.PLURAL}: version {version!r} is not of this store: list again")
        if present.isdigit() and int(version) > int(present):
            raise Expired(f"{kind.PLURAL}: version {version} is yet to come, the store is at {present}: list again")

    # -- what it answers ------------------------------------------------------------------------------------------

    def _decode(self, kind: type[R], body: bytes | msgspec.Raw) -> R:
        try:
            return kubewire.decode(kind, body)
        except msgspec.DecodeError as e:
            raise self._not_read(kind, e) from e

    def _decode_page(self, kind: type[R], body: bytes) -> kubewire.Page[R]:
        try:
            return kubewire.decode_page(kind, body)
        except msgspec.DecodeError as e:
            raise self._not_read(kind, e) from e

    def _not_read(self, kind: type[Resource], why: Exception) -> Unavailable:
        return Unavailable(
            f"API server {self._http.server}: it has {kind.PLURAL} that cannot be read ({why}): apply manifests/crds "
            f"of this release"
        )

    def _refused(self, what: str, refusal: Refusal) -> StoreError:
        """What a refusal means for ``what`` (an object, or a kind's plural)."""
        status = refusal.status
        text = status.message or status.reason
        match refusal.code:
            case 404 if status.details.kind == Namespace.PLURAL and not what.startswith(Namespace.kind()):
                return NotFound(f"{what}: there is no namespace {status.details.name}: make it first")
            case 404 if status.reason == "NotFound" and status.details.name:
                return NotFound(f"{what} does not exist")
            case 404:
                return Unavailable(f"API server {self._http.server} knows no {what}: apply manifests/crds ({text})")
            case 409 if status.reason == "AlreadyExists":
                return AlreadyExists(f"{what} exists already: change it, or delete it first")
            case 409 if re.search(r'UID in object meta: "?$', text):
                # How it refuses to write what is not there, with the uid that it should have.
                return NotFound(f"{what} does not exist")
            case 409:
                uid = "another uid: it was deleted and created again; " if "UID in precondition" in text else ""
                return Conflict(f"{what} is not what this was decided on: {uid}{text}")
            case 410:
                return Expired(f"{what}: {text}: list again")
            case 403 | 422 if NOT_YET.search(text):
                return Unavailable(f"API server {self._http.server} cannot judge {what} yet: {text}")
            case 400 | 422:
                return Invalid(what, _problems(status))
            case 403 if " cannot " not in text:
                # Admission says no with 403 too; RBAC names the user and what he cannot do.
                return Invalid(what, _problems(status))
            case 403:
                remedy = (
                    "our processes' rights are manifests/rbac.yaml of this release, a person's are the administrator's"
                )
                return Unavailable(f"API server {self._http.server}: {text}: {remedy} to give")
        return Unavailable(f"API server {self._http.server}: {what}: {refusal.code} {text}")


# -- from objects to what is sent ----------------------------------------------------------------------------------


def _is_ours(kind: type[Resource]) -> bool:
    return kind.API == GROUP


def _path(kind: type[Resource], namespace: str = "") -> str:
    """Where the objects of a namespace are; of all namespaces with "", or where the kind has none."""
    root = f"/apis/{kind.API}" if "/" in kind.API else f"/api/{kind.API}"
    return f"{root}/namespaces/{quote(namespace, safe='')}/{kind.PLURAL}" if namespace else f"{root}/{kind.PLURAL}"


def _object_path(kind: type[Resource], key: str) -> str:
    namespace, name = split_key(kind, key)
    return f"{_path(kind, namespace)}/{quote(name, safe='')}"


def _selection(kind: type[Resource], where: Mapping[str, str] | None) -> tuple[str, dict[str, str]]:
    """Path and query of a list or watch. A namespace goes into the path, so that a right to that namespace is enough.
    Field selectors know three characters that must be escaped (apimachinery, fields.EscapeValue)."""
    where = where or {}
    namespace = where.get("metadata.namespace", "")
    fields = {field: value for field, value in where.items() if not (namespace and field == "metadata.namespace")}
    escaped = ((field, re.sub(r"([\\,=])", r"\\\1", value)) for field, value in fields.items())
    selector = ",".join(f"{field}={value}" for field, value in escaped)
    return _path(kind, namespace), {"fieldSelector": selector} if selector else {}


def _watching(version: str, seconds: int) -> dict[str, str]:
    return {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": version,
        "timeoutSeconds": str(seconds),
    }


def _typed(obj: R) -> R:
    """A copy with every field of the type that the model says; a struct's constructor checks none."""
    try:
        return msgspec.json.decode(msgspec.json.encode(obj), type=type(obj))
    except (msgspec.MsgspecError, TypeError) as e:
        raise Invalid(type(obj).__name__, [Problem("object", repr(obj)[:200], str(e))]) from e


def _body(obj: Resource) -> dict[str, Any]:
    """What a write of the main resource sends: no status, and of the metadata what is ours."""
    body = kubewire.encode(_typed(obj))
    body.pop("status", None)
    body["metadata"] = {key: value for key, value in body["metadata"].items() if key in _WRITTEN}
    return body


def _decided(obj: Resource) -> None:
    if not obj.metadata.resource_version:
        remedy = "give the version that was read: without it a change by somebody else would be undone"
        raise Invalid(title(obj), [Problem("metadata.resourceVersion", "", remedy)])


def _empty(kind: type[Resource]) -> dict[str, None]:
    """Every field of the kind's status, as nothing."""
    (status,) = (f.default for f in msgspec.structs.fields(kind) if f.name == "status")
    return {f.encode_name: None for f in msgspec.structs.fields(type(status))}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch (RFC 7386) that makes ``new`` of ``old``. A map that is left out is an empty one: said as null it
    would take along what the model does not know of it."""
    patch: dict[str, Any] = {}
    for key in old.keys() | new.keys():
        before, value = old.get(key), new.get(key)
        if isinstance(before, dict) or isinstance(value, dict):
            below = _difference(before or {}, value or {})
            if below:
                patch[key] = below
        elif before != value:
            patch[key] = value
    return patch


# -- from refusals to problems --------------------------------------------------------------------------------------

# As apimachinery's field.Error prints it: the value as JSON, or left out where it is a whole object.
_VALUE = re.compile(
    r'(?:Invalid|Unsupported) value: (?:(?:"(?P<text>(?:\\.|[^"\\])*)"|(?P<other>-?[0-9.]+|true|false|null)): )?'
    r"(?P<why>.*)",
    re.DOTALL,
)


def _problems(status: Status) -> list[Problem]:
    found = []
    for cause in status.details.causes:
        said = _VALUE.fullmatch(cause.message)
        if said is None:
            found.append(Problem(cause.field, None, cause.message))
        else:
            value = said["text"] if said["text"] is not None else said["other"]
            found.append(Problem(cause.field, value, said["why"]))
    return found or [Problem("object", None, status.message or status.reason)]
