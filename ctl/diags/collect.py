"""``underlayctl diags``: goes through all items of node and store, each with its limits, into one archive."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
import msgspec

from ctl.diags import cluster, node
from ctl.diags.box import Box, pack
from ctl.failures import OK, Failure
from store.base import Store
from store.clock import Clock
from store.errors import StoreError
from store.open import open_store

#: Seconds for one item of the store; a check of addresses looks a second time after some.
_ITEM: Final = 45.0


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """``url`` "": no store is named. ``limit``: seconds for all."""

    output: str
    url: str
    limit: float


def diags(asked: Asked, here: node.Here, clock: Clock, name: str) -> int:
    """Writes the archive to ``asked.output`` (``-``: stdout; "": a file here, called after ``name``) and says what is
    missing. Raises Failure if it cannot be written."""
    box = Box()
    end = clock.monotonic() + asked.limit
    if here.run.is_dir():
        for secret in node.secrets(here):
            box.know(secret)
        _of_node(box, here, lambda: end - clock.monotonic())
    else:
        box.miss("node", f"this machine is no node: there is no {here.run}; see --run")
    if asked.url.startswith("sqlite:") and not Path(asked.url.removeprefix("sqlite:")).exists():
        # To open it would make an empty one.
        box.miss("cluster", f"{asked.url}: there is no such file")
    else:
        asyncio.run(_of_store(box, asked.url, clock, end))
    files = box.files()
    data = pack(files, f"underlay-diags-{name}")
    target = asked.output or f"underlay-diags-{name}.tar.gz"
    missing = files["errors.txt"].splitlines()
    if target == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        _write(Path(target), data)
        click.echo(f"{target}: {len(files)} files, {len(data)} bytes; passwords, tokens and keys were left out")
    for line in missing:
        click.echo(f"missing: {line}", err=True)
    return OK


def _write(target: Path, data: bytes) -> None:
    """Its owner's alone to read: it says a lot of the network."""
    try:
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
    except OSError as e:
        raise Failure([f"{target}: {e.strerror}: name another file with --output"]) from e


def _of_node(box: Box, here: node.Here, left: Callable[[], float]) -> None:
    for part in node.parts(here):
        if left() <= 0:
            box.miss(part.path, "no time was left: give more with --limit")
            continue
        try:
            found = part.read()
        except Exception as e:  # whatever spoils one item, the others are wanted
            box.miss(part.path, f"{type(e).__name__}: {e}")
            continue
        _put(box, part.path, part.what, found, part.keep, part.harmless)


def _put(
    box: Box, path: str, what: str, found: object, keep: node.Keep = "head", harmless: tuple[str, ...] = ()
) -> None:
    if not isinstance(found, str):
        box.put_object(path, what, found, harmless=harmless)
        return
    try:
        # What is JSON by itself is gone through field by field.
        value = msgspec.json.decode(found) if found[:1] in ("{", "[") else None
    except msgspec.DecodeError:
        value = None
    if value is None:
        box.put(path, what, found, keep=keep)
    else:
        box.put_object(path, what, value, harmless=harmless)


async def _of_store(box: Box, url: str, clock: Clock, end: float) -> None:
    if not url:
        box.miss("cluster", "no store is named: give --store, or set UNDERLAY_STORE")
        return
    try:
        store: Store = open_store(url, clock=clock, agent="underlayctl")
    except StoreError as e:
        box.miss("cluster", e)
        return
    try:
        for part in cluster.of_store(store, clock):
            await _take(box, part, clock, end)
        if url.startswith("kube:"):
            async for part in cluster.of_api(url.removeprefix("kube:"), clock):
                await _take(box, part, clock, end)
    finally:
        await store.close()


async def _take(box: Box, part: cluster.Part, clock: Clock, end: float) -> None:
    try:
        async with asyncio.timeout(min(_ITEM, end - clock.monotonic())):
            found = await part.read()
    except TimeoutError:
        box.miss(part.path, "no answer in time: give more with --limit")
    except Exception as e:  # as above
        box.miss(part.path, f"{type(e).__name__}: {e}")
    else:
        _put(box, part.path, part.what, found)
