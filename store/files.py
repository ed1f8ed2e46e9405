"""Resources as people write them: YAML or JSON, several documents, lists, Calico's files as they are.

Strict, because a field that is silently ignored is an outage later: an unknown field is refused with the nearest known
name, a Calico field that is not served is refused when it is set to something that would matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

import msgspec
import yaml

from store.errors import Invalid, Problem
from store.foreign import FOREIGN_KINDS, LEFT_OUT, UNSERVED
from store.model import (
    CALICO_GROUP,
    KINDS,
    BGPConfiguration,
    BGPFilter,
    BGPPeer,
    IPAMConfiguration,
    IPPool,
    IPReservation,
    Resource,
    Secret,
    to_wire,
    without_nulls,
)
from store.validate import validate

#: Bytes of one file.
MAX_SIZE = 4 << 20
#: Values in one file, aliases followed: 4 MiB of YAML can say 2^30 of them.
MAX_VALUES = 500_000
MAX_DEPTH = 40

#: Stands for a value of a Secret. It is no base64, so nothing takes it for one.
NOT_SHOWN = "(not shown)"

_BY_KIND: Mapping[str, type[Resource]] = {kind.kind(): kind for kind in KINDS}
_CALICO_KINDS: tuple[type[Resource], ...] = (
    *(IPPool, IPReservation, IPAMConfiguration),
    *(BGPConfiguration, BGPPeer, BGPFilter),
)


def load(
    text: str | bytes,
    *,
    source: str = "standard input",
    namespace: str = "",
    note: Callable[[str], None] | None = None,
) -> tuple[Resource, ...]:
    """The resources of a file, in its order; () for an empty one. ``source`` is what messages call it; ``namespace`` is
    the only one that may be written to, where one is given. What should have one and says none gets it, or ``default``.

    ``Invalid`` holds all problems of all documents at once, each with document, item and path.
    ``note`` is called with a sentence for each field that was left out because it means nothing here.
    """
    reader = _Reader(note or (lambda _: None), namespace)
    try:
        for number, document in enumerate(_documents(text), 1):
            reader.document(document, f"document {number}")
    except _Unreadable as e:
        raise Invalid(source, [*reader.problems, e.problem]) from e
    if reader.problems:
        raise Invalid(source, reader.problems)
    return tuple(reader.found)


def dump_yaml(objects: Iterable[Resource]) -> str:
    """One document an object, with the keys in the order of people's files."""
    return yaml.dump_all(
        [_shown(obj) for obj in objects], Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True
    )


def dump_json(objects: Sequence[Resource], *, always_list: bool = False) -> str:
    """One object as itself, any other number as a ``List``, as kubectl does."""
    wire = [_shown(obj) for obj in objects]
    one = len(wire) == 1 and not always_list
    return json.dumps(wire[0] if one else {"apiVersion": "v1", "kind": "List", "items": wire}, indent=2) + "\n"


def _shown(obj: Resource) -> dict[str, Any]:
    """What of an object people may see. Written so that nobody can apply it: a Secret would lose its values."""
    wire = to_wire(obj)
    if isinstance(obj, Secret):
        wire["data"] = dict.fromkeys(obj.data, NOT_SHOWN)
        wire["metadata"].pop("annotations", None)
    return wire


# -- from text to plain values -------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """The text is no YAML or JSON, or past a limit: what follows cannot be looked at."""

    def __init__(self, where: str, value: object, remedy: str) -> None:
        self.problem = Problem(where, value, remedy)
        super().__init__(str(self.problem))


def _documents(text: str | bytes) -> Iterator[Any]:
    raw = text.encode() if isinstance(text, str) else text
    if len(raw) > MAX_SIZE:
        raise _Unreadable("size", len(raw), f"a file has at most {MAX_SIZE} bytes: split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise _Unreadable(f"byte {e.start + 1}", raw[e.start : e.start + 4], "write the file in UTF-8") from e
    try:
        yield from _json(text) or yaml.load_all(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "text"
        raise _Unreadable(where, _line(text, mark.line) if mark else "", f"no YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise _Unreadable("text", "", f"no YAML: {e}") from e
    except (ValueError, LookupError) as e:
        raise _Unreadable("text", "", f"a value that is not what its tag or its digits say: {e}") from e
    except RecursionError as e:
        raise _Unreadable("nesting", "", f"values lie at most {MAX_DEPTH} deep") from e


def _json(text: str) -> tuple[Any, ...]:
    """The one document of a JSON file, or () where it is none: what begins with a brace may still be YAML's flow style,
    and YAML says then what is wrong."""
    if text.lstrip()[:1] != "{":
        return ()
    try:
        return (json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant),)
    except json.JSONDecodeError:
        return ()


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number].strip()[:80] if number < len(lines) else ""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Unreadable(key, value, "the key stands there twice: which one is meant?")
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise _Unreadable("number", name, "write a number that JSON has")


# The C loader where PyYAML was built with it: ten times as fast.
_BaseLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Loader(_BaseLoader):  # type: ignore[misc]  # chosen at run time
    """Safe YAML in which a key stands once, and only what YAML 1.1 and 1.2 both call so is a number or a boolean:
    ``on``, ``12:30`` (sixty-based in YAML 1.1), ``1e3`` and time stamps stay text."""

    yaml_implicit_resolvers: Mapping[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is text: put it in quotes", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice: which one is meant?", key.start_mark
                )
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))


# Aliases cannot blow up here (`_Reader` counts them), merges (`<<`) could; and a tag may name no constructor that the
# resources have no use for.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in _BaseLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("str", "int", "float", "bool", "null", "seq", "map")
}


def _resolve(tag: str, pattern: str, first: Iterable[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""])
_resolve("int", r"^[-+]?(?:0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$", "-+0123456789")
_resolve("float", r"^[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?$", "-+0123456789")


# Without resourceVersion: who replaces an object may mean it.
_FOREIGN_METADATA = ("uid", "generation", "creationTimestamp", "deletionTimestamp", "finalizers", "ownerReferences")


# -- from plain values to resources --------------------------------------------------------------------------------


class _Reader:
    """Gathers resources and problems over all documents of one file."""

    def __init__(self, note: Callable[[str], None], namespace: str) -> None:
        self.found: list[Resource] = []
        self.problems: list[Problem] = []
        self._note = note
        self._namespace = namespace
        self._values = 0
        self._where: dict[tuple[str, str], str] = {}

    def document(self, value: Any, where: str) -> None:
        self._measure(value, where, 0)
        if value is not None:
            self._object(without_nulls(value), where, "")

    def _object(self, value: Any, where: str, list_kind: str) -> None:
        if not isinstance(value, dict):
            self._problem(where, "", value, "a resource is a mapping with apiVersion, kind, metadata and spec")
            return
        kind = value.get("kind", list_kind)
        if isinstance(kind, str) and kind.endswith("List") and (kind == "List" or kind[:-4] in _BY_KIND):
            self._list(value, where, kind[:-4])
            return
        resource = self._kind(value, kind, where)
        if resource is None:
            return
        known = len(self.problems)
        self._read(value, kind, resource, where)
        if resource is Secret:
            self.problems[known:] = [Problem(p.field, NOT_SHOWN, p.remedy) for p in self.problems[known:]]

    def _read(self, value: dict[str, Any], kind: str, resource: type[Resource], where: str) -> None:
        named = value.get("metadata", {}).get("name", "") if isinstance(value.get("metadata"), dict) else ""
        where = f"{where} ({kind} {named})" if named else f"{where} ({kind})"
        known = len(self.problems)
        body = {k: v for k, v in value.items() if k not in ("apiVersion", "kind")}
        body = self._struct(body, resource, resource, where, "")
        if resource.NAMESPACED and isinstance(body.get("metadata"), dict):
            self._place(body["metadata"], where)
        try:
            obj = msgspec.convert({**body, "kind": kind}, resource)
        except msgspec.ValidationError as e:
            if len(self.problems) == known:
                self._problem(where, "", named, str(e))
            return
        if value["apiVersion"] == CALICO_GROUP:
            self._note_foreign(obj, value["metadata"], where)
        self.problems += [Problem(f"{where}: {p.field}", p.value, p.remedy) for p in validate(obj)]
        before = self._where.setdefault((kind, obj.key), where)
        if before != where:
            self._problem(where, "metadata.name", obj.name, f"it stands in {before} already: which one is meant?")
        self.found.append(obj)

    def _place(self, metadata: dict[str, Any], where: str) -> None:
        said = metadata.setdefault("namespace", self._namespace or "default")
        if self._namespace not in ("", said):
            self._problem(where, "metadata.namespace", said, f"write {self._namespace}, or leave out --namespace")

    def _note_foreign(self, obj: Resource, metadata: dict[str, Any], where: str) -> None:
        """What is known here and still says nothing when it comes from another system's store."""
        for name in _FOREIGN_METADATA:
            if name in metadata:
                self._note(f"{where}: metadata.{name} is left out: it is of the store that the file comes from")
        if isinstance(obj, IPPool) and "Tunnel" in obj.spec.allowed_uses:
            self._note(f"{where}: spec.allowedUses: Tunnel means nothing here: there is no tunnel")

    def _list(self, value: dict[str, Any], where: str, item_kind: str) -> None:
        items = value.get("items", [])
        if not isinstance(items, list):
            self._problem(where, "items", items, "write a list of resources")
            return
        for key in value.keys() - {"apiVersion", "kind", "metadata", "items"}:
            self._problem(where, key, value[key], "a list has apiVersion, kind, metadata and items")
        inherited = {"apiVersion": value["apiVersion"]} if item_kind and "apiVersion" in value else {}
        for i, item in enumerate(items, 1):
            nested = isinstance(item, dict) and str(item.get("kind", "")).endswith("List")
            if nested:
                self._problem(f"{where}, item {i}", "kind", item["kind"], "a list of lists: write its items")
                continue
            self._object({**inherited, **item} if isinstance(item, dict) else item, f"{where}, item {i}", item_kind)

    def _kind(self, value: dict[str, Any], kind: Any, where: str) -> type[Resource] | None:
        resource = _BY_KIND.get(kind) if isinstance(kind, str) else None
        if resource is None:
            served = ", ".join(sorted(_BY_KIND))
            why = FOREIGN_KINDS.get(kind) if isinstance(kind, str) else None
            self._problem(where, "kind", kind or "", why or f"{_meant(kind, _BY_KIND)}there are {served}")
            return None
        allowed = [resource.API, *([CALICO_GROUP] if resource in _CALICO_KINDS else [])]
        if value.get("apiVersion") not in allowed:
            name = f"{where} ({kind})"
            self._problem(name, "apiVersion", value.get("apiVersion", ""), f"write {' or '.join(allowed)}")
            return None
        return resource

    def _struct(self, value: Any, type_: Any, resource: type[Resource], where: str, path: str) -> Any:
        """``value`` without what is left out; each field is checked alone, so that all problems are told at once."""
        if not isinstance(value, dict):
            self._problem(where, path, value, "write a mapping of fields")
            return value
        fields = {f.encode_name: f for f in msgspec.structs.fields(type_)}
        result = {}
        for key, item in value.items():
            below = f"{path}.{key}" if path else str(key)
            if key in fields:
                result[key] = self._value(item, fields[key].type, resource, where, below)
            else:
                self._unknown(item, key, tuple(fields), resource, where, below)
        for name, field in fields.items():
            if field.required and name not in value:
                self._problem(where, f"{path}.{name}" if path else name, "", "it is missing")
        return result

    def _value(self, value: Any, type_: Any, resource: type[Resource], where: str, path: str) -> Any:
        container, arguments = get_origin(type_), get_args(type_)
        if container is tuple and isinstance(value, list):
            return [self._value(v, arguments[0], resource, where, f"{path}[{i}]") for i, v in enumerate(value)]
        if container is dict and isinstance(value, dict):
            return {k: self._value(v, arguments[1], resource, where, f"{path}[{k}]") for k, v in value.items()}
        for struct in (type_, *arguments):  # an optional struct is a union with None
            if container is not tuple and isinstance(struct, type) and issubclass(struct, msgspec.Struct):
                return self._struct(value, struct, resource, where, path)
        try:
            msgspec.convert(value, type_)
        except msgspec.ValidationError as e:
            self._problem(where, path, value, _expected(str(e), value, path))
        return value

    def _unknown(
        self, value: Any, key: str, fields: Sequence[str], resource: type[Resource], where: str, path: str
    ) -> None:
        general = re.sub(r"\[\d+\]", "[]", path)
        meaningless = LEFT_OUT.get(resource, {}).get(general) or LEFT_OUT[Resource].get(general)
        if meaningless is not None:
            self._note(f"{where}: {path} is left out: {meaningless}")
            return
        unserved = UNSERVED.get(resource, {}).get(general) or UNSERVED[Resource].get(general)
        if unserved is None:
            self._problem(
                where, path, value, f"there is no such field; {_meant(key, fields)}known are {', '.join(fields)}"
            )
        elif value in unserved.harmless:
            self._note(f"{where}: {path} is left out: {value!r} is what holds anyway")
        else:
            self._problem(where, path, value, unserved.why)

    def _measure(self, value: Any, where: str, depth: int) -> None:
        """Holds the limits before anything walks the values for good."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise _Unreadable(
                where, "", f"more than {MAX_VALUES} values (aliases count as what they stand for): split it"
            )
        if depth > MAX_DEPTH:
            raise _Unreadable(where, "", f"values lie at most {MAX_DEPTH} deep")
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._measure(item, where, depth + 1)

    def _problem(self, where: str, path: str, value: object, remedy: str) -> None:
        self.problems.append(Problem(f"{where}: {path}" if path else where, _short(value), remedy))


_WORDS: Mapping[str, str] = {
    "int": "a whole number",
    "str": "text (in quotes, if it looks like something else)",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
}


def _expected(message: str, value: Any, path: str) -> str:
    if path.endswith("asNumber") and isinstance(value, float | str):
        high, _, low = str(value).partition(".")
        if high.isdigit() and low.isdigit() and int(high) <= 65535 and int(low) <= 65535:
            return f"write {(int(high) << 16) + int(low)}: AS numbers are plain numbers here (RFC 5396, asplain)"
    found = re.match(r"Expected `([a-z]+)`", message)
    return f"write {_WORDS.get(found[1], found[1])}" if found else message


def _meant(word: object, known: Iterable[str]) -> str:
    """The nearest known word, as the beginning of a remedy; case is no distance."""
    by_lower = {k.lower(): k for k in known}
    near = get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.7)
    return f"did you mean {by_lower[near[0]]}? " if near else ""


def _short(value: object) -> object:
    return value if len(repr(value)) <= 120 else repr(value)[:117] + "..."
