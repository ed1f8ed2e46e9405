"""Sysctls that we change, and what they were before: kept in the run directory, so that an uninstall can put them back.

The kernel forgets them at a reboot, as the run directory is forgotten. One file a sysctl, named by its dotted name.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

import msgspec

log = logging.getLogger(__name__)

#: In the run directory.
FOLDER: Final = "sysctls"


class Former(msgspec.Struct, frozen=True):
    """A sysctl that we changed in this boot: its value before the first time, and what we wrote last."""

    key: str
    before: str
    ours: str


def path(key: str, root: Path) -> Path:
    """Where a dotted name is found; ``/`` in it is a dot in an interface's name, as sysctl(8) has it."""
    return root.joinpath(*(part.replace("/", ".") for part in key.split(".")))


def change(key: str, value: str, root: Path, record: Path | None = None) -> None:
    """Writes the value; what was there before is kept in the folder ``record``, unless it is the same. Where it cannot
    be kept, the log says so, and no more. Raises OSError if the kernel refuses."""
    where = path(key, root)
    if record is not None:
        try:
            _keep(key, where.read_text().strip(), value, record)
        except OSError as e:
            log.warning("what %s was before cannot be kept, so an uninstall will not put it back: %s", key, e)
    where.write_text(value)


def changed(record: Path) -> tuple[Former, ...]:
    """All that is kept there, by name. A file that is none of ours is left out. Raises OSError."""
    found = []
    for file in sorted(record.iterdir()) if record.is_dir() else ():
        values = file.read_text().splitlines()
        if not file.name.startswith(".") and len(values) == 2:
            found.append(Former(unquote(file.name), *values))
    return tuple(found)


def forget(key: str, record: Path) -> None:
    """Raises OSError."""
    _file(key, record).unlink(missing_ok=True)


def _keep(key: str, before: str, value: str, record: Path) -> None:
    """The first value of all stays: what we find later is our own."""
    if before == value:
        return
    record.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = _file(key, record)
    with contextlib.suppress(FileNotFoundError):
        before = file.read_text().splitlines()[0]
    temporary = record / f".{file.name}.{os.getpid()}"
    temporary.write_text(f"{before}\n{value}\n")
    temporary.replace(file)


def _file(key: str, record: Path) -> Path:
    return record / quote(key, safe="")
