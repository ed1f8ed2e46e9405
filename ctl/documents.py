"""Files of objects: read, checked as a whole, then written one by one.

Nothing is written before every document of every file has passed: alone, beside the others, and beside what the
store has. What another writer does in between is the store's to refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click
import msgspec

from ctl import edit
from ctl.failures import OK, REFUSED, UNAVAILABLE, Failure, Usage, explain
from ctl.kinds import UnknownKind, find_kind, key_of, reference, reference_to
from store.base import Store
from store.errors import Invalid, NotFound, Problem, StoreError, Unavailable
from store.model import Resource
from store.validate import BESIDE, validate, validate_against

Mode = Literal["apply", "create", "replace"]


class Document(msgspec.Struct, frozen=True):
    """One object and where it stands: ``pools.yaml: object 2 (IPPool pods)``."""

    where: str
    object: Resource


def read_all(files: Sequence[str], namespace: str = "") -> list[Document]:
    """The objects of all files (``-`` is stdin) in order; ``namespace`` as in ``store.files.load``. Fields that mean
    nothing here are named on stderr.
    Raises Failure with a line for each problem of each file, Usage for a file that cannot be read."""
    from store.files import load

    documents: list[Document] = []
    lines: list[str] = []
    for file in files:
        name = _name(file)
        raw = read_file(file)
        try:
            objects = load(
                raw,
                source=name,
                namespace=namespace,
                note=lambda text, name=name: click.echo(f"note: {name}: {text}", err=True),  # type: ignore[misc]
            )
        except Invalid as e:
            lines += explain(e, name)
            continue
        documents += [Document(f"{name}: object {i} ({o.kind()} {o.key})", o) for i, o in enumerate(objects, 1)]
    if lines:
        raise Failure(lines)
    if not documents:
        raise Failure([f"no object in {', '.join(map(_name, files))}"])
    return documents


def read_file(name: str) -> bytes:
    """The file's bytes; ``-`` is stdin. Raises Usage."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as e:
        raise Usage([f"{name}: cannot be read: {e.strerror}"]) from None


def _name(file: str) -> str:
    return "stdin" if file == "-" else file


async def write_all(store: Store, documents: Sequence[Document], mode: Mode, *, dry_run: bool) -> int:
    """Checks all, then writes each and prints what became of it. Raises Failure, with nothing written, if any is
    refused; a refusal that comes later is said on stderr, the rest is still tried, and the exit code is 1."""
    lines = await _objections(store, documents, mode)
    if lines:
        raise Failure(lines)
    write = {"apply": edit.apply, "create": edit.create, "replace": edit.replace}[mode]
    code = OK
    for document in documents:
        try:
            verb = await write(store, document.object, dry_run=dry_run)
        except StoreError as e:
            code = _report(e, document.where, code)
            if isinstance(e, Unavailable):
                break
            continue
        click.echo(f"{reference(document.object)} {verb}{' (dry run)' if dry_run else ''}")
    return code


async def delete_all(
    store: Store, targets: Sequence[tuple[type[Resource], str]], *, ignore_not_found: bool, force: bool
) -> int:
    """Deletes each and prints so; what cannot be deleted is said on stderr and makes the exit code 1."""
    code = OK
    for kind, key in targets:
        try:
            await edit.delete(store, kind, key, force=force)
        except NotFound:
            if not ignore_not_found:
                click.echo(f"underlayctl: {reference_to(kind, key)}: not found", err=True)
                code = REFUSED
        except StoreError as e:
            code = _report(e, "" if isinstance(e, edit.InUse) else reference_to(kind, key), code)
            if isinstance(e, Unavailable):
                break
        else:
            click.echo(f"{reference_to(kind, key)} deleted")
    return code


def to_delete(
    kind: str | None, names: Sequence[str], files: Sequence[str], namespace: str
) -> list[tuple[type[Resource], str]]:
    """Kind and key of what a command line of ``delete`` names, by kind and name or by files. Raises Usage, Failure."""
    if files:
        if kind:
            raise Usage(["KIND NAME and -f are two ways to say what to delete: use one"])
        return [(type(d.object), d.object.key) for d in read_all(files, namespace)]
    if not kind or not names:
        raise Usage(["say what to delete: KIND NAME..., or -f FILE"])
    try:
        found = find_kind(kind)
    except UnknownKind as e:
        raise Usage([str(e)]) from None
    return [(found, key_of(found, name, namespace)) for name in dict.fromkeys(names)]


async def _objections(store: Store, documents: Sequence[Document], mode: Mode) -> list[str]:
    """A line for each reason not to begin."""
    lines: list[str] = []
    beside: dict[type[Resource], dict[str, Resource]] = {}
    first: dict[str, Document] = {}
    for document in documents:
        obj = document.object
        twin = first.setdefault(reference(obj), document)
        if twin is not document:
            lines.append(f"{document.where}: it is {twin.where} already: name an object once")
    for document in documents:
        obj = document.object
        try:
            current = await store.get(type(obj), obj.key)
        except NotFound:
            current = None
        if current is None and mode == "replace":
            lines.append(f"{document.where}: it does not exist: 'apply' or 'create' makes it")
            continue
        if current is not None and mode == "create":
            lines.append(f"{document.where}: it exists already: 'apply' or 'replace' changes it")
            continue
        problems = _new_problems(obj, current)
        kind = BESIDE.get(type(obj))
        if kind is not None:
            if kind not in beside:
                there = {o.name: o for o in (await store.list(kind)).items}
                beside[kind] = {**there, **{d.object.name: d.object for d in documents if type(d.object) is kind}}
            problems += validate_against(obj, beside[kind].values())
        lines += [f"{document.where}: {problem}" for problem in problems]
    return lines


def _new_problems(obj: Resource, current: Resource | None) -> list[Problem]:
    """What is wrong with the object, but for what was wrong with the current one already (as the store has it)."""
    known = validate(current) if current is not None else ()
    return [p for p in validate(obj, old=current) if p not in known]


def _report(error: StoreError, where: str, code: int) -> int:
    for line in explain(error, where):
        click.echo(f"underlayctl: {line}", err=True)
    return UNAVAILABLE if isinstance(error, Unavailable) else max(code, REFUSED)
