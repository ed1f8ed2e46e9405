"""docs/fields.md: every field of every kind, what becomes of it, and a test that shows it."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest

from cni import choice
from store import model
from store.foreign import FOREIGN_KINDS, LEFT_OUT, UNSERVED
from store.model import GROUP, KINDS, BGPFilter, Meta, Node, Resource

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/fields.md"
OURS = [kind for kind in KINDS if kind.API == GROUP]
#: What stands under a heading of its own.
SECTIONS: dict[str, type[msgspec.Struct]] = {k.kind(): k for k in (*OURS, Node)} | {"Metadata": Meta}


def leaves(kind: object, path: str) -> Iterator[str]:
    """The wire paths of everything below, as ``spec.communities[].name``; a list of plain values is its own name."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for one in typing.get_args(kind):
            if one is not type(None):
                yield from leaves(one, path)
    elif origin is tuple:
        for below in leaves(typing.get_args(kind)[0], f"{path}[]"):
            yield below.removesuffix("[]")
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        for field in msgspec.structs.fields(kind):
            if (kind, field.name) != (kind, "metadata"):
                yield from leaves(hints[field.name], f"{path}.{field.encode_name}" if path else field.encode_name)
    else:
        yield path


def written(path: str) -> Iterator[str]:
    """How the page writes a path: the four lists of a BGPFilter have one set of rules."""
    rule = re.fullmatch(r"(spec\.(?:im|ex)portV[46])\[\]\.(.*)", path)
    yield from (rule[1], f"rule.{rule[2]}") if rule else (path,)


def expected(section: str) -> set[str]:
    """What the table of this section must have: the fields that are served, and those of which something is said."""
    kind = SECTIONS[section]
    paths = list(leaves(kind, "metadata" if kind is Meta else ""))
    root = Resource if kind is Meta else kind
    if issubclass(root, Resource):
        paths += [*LEFT_OUT.get(root, ()), *UNSERVED.get(root, ())]
    return {name for path in paths for name in written(path)}


@cache
def tables() -> dict[str, list[list[str]]]:
    """Heading -> the cells of each row of its table."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    found = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        rows = [re.split(r" \| ", line.strip("| ")) for line in body.splitlines() if line.startswith("| ")]
        found[heading] = rows[1:]
    return found


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_kind_of_ours_has_a_table() -> None:
    assert SECTIONS.keys() <= tables().keys()
    assert {kind.kind() for kind in OURS} <= SECTIONS.keys()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_row_and_no_other(section: str) -> None:
    told = [name for row in tables()[section] for name in words(row[0])]
    assert len(told) == len(set(told)), "a field stands there twice"
    assert set(told) == expected(section)


def test_every_annotation_has_a_row_and_no_other() -> None:
    ours = {value for name, value in vars(model).items() if name.startswith("ANNOTATION_") and isinstance(value, str)}
    ours |= set(model.ANNOTATION_ADDRESS.values())
    prefixes = (choice.OURS, choice.CALICOS)
    ours |= {prefix + name for prefix in prefixes for name in ("ipv4pools", "ipv6pools", "ipAddrs")}
    assert {name for row in tables()["Annotations"] for name in words(row[0])} == ours


def test_every_kind_that_is_refused_is_named() -> None:
    text = PAGE.read_text().split("## Kinds of Calico's that are refused")[1]
    assert {name for name in words(text) if "/" not in name} == set(FOREIGN_KINDS)


ROWS = [pytest.param(heading, row, id=f"{heading} {row[0][:60]}") for heading, rows in tables().items() for row in rows]


@pytest.mark.parametrize(("heading", "row"), ROWS)
def test_every_row_says_all_and_names_a_test_that_there_is(heading: str, row: list[str]) -> None:
    assert len(row) == 4, "field, what we do, what Calico does, tested in"
    assert all(cell.strip() for cell in row)
    named = words(row[3])
    assert named, "no test is named"
    for name in named:
        path, _, test = name.partition("::")
        assert is_there(path, test), f"there is no {name}"


@cache
def source(path: str) -> str:
    file = ROOT / path
    return file.read_text() if file.is_file() else ""


def is_there(path: str, test: str) -> bool:
    return re.search(rf"^def {re.escape(test)}\(", source(path), re.MULTILINE) is not None


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_named_test_s_file_speaks_of_the_field(heading: str) -> None:
    """A table that names any test would prove nothing."""
    snake = {f.encode_name: f.name for s in structs() for f in msgspec.structs.fields(s)}
    silent = set()
    for row in tables()[heading]:
        texts = [source(name.partition("::")[0]) for name in words(row[3])]
        for field in words(row[0]):
            last = field.rpartition(".")[2]
            names = {last, snake.get(last, last)}
            # tests/unit/test_foreign.py walks store/foreign.py itself, and a table that is held to be whole.
            held = "tests/unit/test_foreign.py" in row[3]
            if not held and not any(re.search(rf"\b{re.escape(n)}\b", text) for n in names for text in texts):
                silent.add(field)
    assert silent == set()


def structs() -> Iterator[type[msgspec.Struct]]:
    yield from (s for s in vars(model).values() if isinstance(s, type) and issubclass(s, msgspec.Struct))


def test_the_checks_are_able_to_fail() -> None:
    assert "rule.cidr" in expected("BGPFilter")
    assert "spec.importV6" in expected("BGPFilter")
    assert "spec.communities[].name" in expected("BGPConfiguration")
    assert "metadata.ownerReferences[].uid" in expected("Metadata")
    assert BGPFilter in OURS
    assert not is_there("tests/unit/test_fields.py", "test_of_nothing")
    assert not is_there("tests/unit/test_nothing.py", "test_of_nothing")
