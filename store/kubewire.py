"""How objects look on the API server, where that differs from the model: a block's allocations. Pure.

The model has a list of allocations; on the API server they are one line of text each, by address, because a full block
is written often: the API server spends 4.6 ms on such a write and 10 on a list of objects (docs/decisions/0008). The
address as key also makes it unique by itself.

    status:
      allocations:
        10.244.3.65: pods 4ee6a1... eth0 default/web-0 2026-01-01T00:00:00Z
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Generic, cast

import msgspec
from msgspec import field

from store.base import T
from store.errors import Invalid, Problem
from store.model import (
    Allocation,
    Condition,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    Meta,
    Resource,
    Writer,
    to_wire,
    without_nulls,
)

#: Stands for a part that is not known.
_NOTHING = "-"
#: What one line is, for the API server to check (RE2).
LINE_PATTERN = "^[^ ]+ [^ ]+ [^ ]+ [^ ]+ [^ ]+$"
_PARTS = ("network", "container", "interface", "pod", "since")


class _BlockStatus(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """``IPAMBlockStatus`` with its allocations as the API server has them."""

    allocations: dict[str, str] = field(default_factory=dict)
    used: int = 0
    free: int = 0
    releasing: bool = False
    writer: Writer | None = None
    conditions: tuple[Condition, ...] = ()


class _Block(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="IPAMBlock"):
    metadata: Meta
    spec: IPAMBlockSpec
    status: _BlockStatus = _BlockStatus()


class _ListMeta(msgspec.Struct, frozen=True, rename={"resource_version": "resourceVersion", "more": "continue"}):
    resource_version: str = ""
    more: str = ""


class Page(msgspec.Struct, Generic[T], frozen=True):
    """Part of a list; ``metadata.more`` asks for the next part."""

    items: tuple[T, ...]
    metadata: _ListMeta


def encode(obj: Resource) -> dict[str, Any]:
    """The object as the API server has it, as plain JSON types. ``Invalid`` if it cannot be said there."""
    body = to_wire(obj)
    if isinstance(obj, IPAMBlock) and body.get("status"):
        problems = list(_unsayable(obj.status.allocations))
        if problems:
            raise Invalid(f"IPAMBlock {obj.name}", problems)
        # kubectl prints the two counts, also when they are 0.
        body["status"] |= {"used": obj.status.used, "free": obj.status.free}
        if obj.status.allocations:
            body["status"]["allocations"] = lines(obj.status.allocations)
    return body


def lines(allocations: Iterable[Allocation]) -> dict[str, str]:
    """Each allocation as a line of text, by its address."""
    return {a.address: " ".join(getattr(a, part) or _NOTHING for part in _PARTS) for a in allocations}


def decode(kind: type[T], body: bytes | msgspec.Raw) -> T:
    """An object of the API server. ``msgspec.ValidationError`` if it is none of this kind."""
    return _model(kind, _typed(_wire_type(kind), body))


def decode_page(kind: type[T], body: bytes) -> Page[T]:
    """A list's answer. ``msgspec.ValidationError``."""
    page = _typed(_page_type(kind), body)
    if kind is not IPAMBlock:
        return cast("Page[T]", page)
    return Page(tuple(_model(kind, item) for item in page.items), page.metadata)


def _typed(kind: Any, body: bytes | msgspec.Raw) -> Any:
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError:
        # Few objects have a null, so only they pay for being looked through.
        return msgspec.convert(without_nulls(msgspec.json.decode(body)), kind)


def _unsayable(allocations: Iterable[Allocation]) -> Iterable[Problem]:
    seen: set[str] = set()
    for i, allocation in enumerate(allocations):
        if allocation.address in seen:
            remedy = "it is handed out twice: an address has one pod"
            yield Problem(f"status.allocations[{i}].address", allocation.address, remedy)
        seen.add(allocation.address)
        for part in _PARTS:
            value = getattr(allocation, part)
            if any(character.isspace() for character in value) or value == _NOTHING:
                yield Problem(f"status.allocations[{i}].{part}", value, "write it without white space, and not as '-'")


def _model(kind: type[T], wire: Any) -> T:
    if not isinstance(wire, _Block):
        return cast(T, wire)
    status = wire.status
    block = IPAMBlock(
        metadata=wire.metadata,
        spec=wire.spec,
        status=IPAMBlockStatus(
            allocations=_allocations(status.allocations),
            used=status.used,
            free=status.free,
            releasing=status.releasing,
            writer=status.writer,
            conditions=status.conditions,
        ),
    )
    return cast(T, block)


def _allocations(texts: Mapping[str, str]) -> tuple[Allocation, ...]:
    """In order of address, as their owner writes them: the API server gives keys in order of text, and an owner that
    finds another order than its own would write again."""
    found = []
    for address in sorted(texts, key=_number):
        text = texts[address]
        parts = text.split(" ")
        if len(parts) != len(_PARTS):
            raise msgspec.ValidationError(f"status.allocations[{address}]: {text!r} has not {len(_PARTS)} parts")
        known = {name: part for name, part in zip(_PARTS, parts, strict=True) if part != _NOTHING}
        found.append(Allocation(address=address, **{"network": "", "container": "", "interface": "", **known}))
    return tuple(found)


def _number(address: str) -> int:
    try:
        return int(ip_address(address))
    except ValueError as e:
        raise msgspec.ValidationError(f"status.allocations: {e}") from e


def _wire_type(kind: type[Resource]) -> Any:
    return _Block if kind is IPAMBlock else kind


@lru_cache(maxsize=64)
def _page_type(kind: type[Resource]) -> Any:
    page: Any = Page  # a type made at run time says nothing to a type checker
    return page[_wire_type(kind)]


@lru_cache(maxsize=64)
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)
