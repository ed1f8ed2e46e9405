"""The relay's table: what each peer is to be told, kept on disk so that it outlives agent and speaker (R14).

Standard library only: the relay imports it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
MAX_ROUTES = 200_000

_ADDRESS = re.compile(r"[0-9a-fA-F:.]{2,45}")
_PREFIX = re.compile(r"[0-9a-fA-F:.]{2,45}/[0-9]{1,3}")
_COMMUNITY = re.compile(r"[0-9]{1,10}:[0-9]{1,10}|no-export|no-advertise|no-peer|graceful-shutdown|blackhole")
_LARGE = re.compile(r"[0-9]{1,10}:[0-9]{1,10}:[0-9]{1,10}")
_ATTRIBUTES = re.compile(r"next-hop [0-9a-fA-F:.]{2,45}[0-9a-z:\[\] -]*")

#: ExaBGP's names for what RFC 8326, RFC 7999 and RFC 3765 define; numbers are what it parses in every version.
_WELL_KNOWN = {"graceful-shutdown": "65535:0", "blackhole": "65535:666", "no-peer": "65535:65284"}

Routes = Mapping[str, Mapping[str, str]]


class TableError(Exception):
    """A table was refused, or the file cannot be used; the message says which route or what about the file."""


class Table(NamedTuple):
    """Peer -> prefix -> attributes in ExaBGP's words (``next-hop 10.0.0.1 med 7``)."""

    generation: int
    routes: Routes
    #: (peer, prefix) pairs that left the table, not reported withdrawn: a peer in graceful restart may hold them.
    retired: tuple[tuple[str, str], ...] = ()


def parse(generation: Any, rows: Any) -> Table:
    """A table as the agent sends it: rows of (peer, prefix, next hop, MED or null, communities, large communities), and
    the AS_PATH where it is not the usual one.

    Raises TableError and names the first bad row: what passes ends in commands for ExaBGP, so nothing but addresses,
    numbers and known words does.
    """
    if not isinstance(generation, int) or not isinstance(rows, list):
        raise TableError("a table is a generation (a number) and a list of rows")
    if len(rows) > MAX_ROUTES:
        raise TableError(f"a table of {len(rows)} routes is over the limit of {MAX_ROUTES}: announce aggregates")
    routes: dict[str, dict[str, str]] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) not in (6, 7):
            raise TableError(
                f"row {row!r}: expected peer, prefix, next hop, MED, communities, large communities, perhaps an AS_PATH"
            )
        peer, prefix, next_hop, med, communities, large = row[:6]
        if not (_full(_ADDRESS, peer) and _full(_PREFIX, prefix) and _full(_ADDRESS, next_hop)):
            raise TableError(f"row {row!r}: peer and next hop are addresses, prefix has a length")
        if (":" in prefix) != (":" in next_hop):
            raise TableError(f"row {row!r}: the next hop must be of the prefix's family (exabgp.md, fault 13)")
        routes.setdefault(peer, {})[prefix] = _text(row, next_hop, med, communities, large, row[6:])
    return Table(generation, routes)


def _text(row: object, next_hop: str, med: Any, communities: Any, large: Any, paths: list[Any]) -> str:
    words = ["next-hop", next_hop]
    for path in paths:
        if not isinstance(path, list) or not path or not all(type(n) is int and 0 < n < 2**32 for n in path):
            raise TableError(f"row {row!r}: AS_PATH is a list of AS numbers")
        words += ["as-path", "[", *map(str, path), "]"]
    if med is not None:
        if not isinstance(med, int) or not 0 <= med < 2**32:
            raise TableError(f"row {row!r}: MED is a number below 2^32, or null")
        words += ["med", str(med)]
    for name, shape, values in (("community", _COMMUNITY, communities), ("large-community", _LARGE, large)):
        if not isinstance(values, list) or not all(_full(shape, v) for v in values):
            raise TableError(f"row {row!r}: {name} is a list of texts as 65000:1 or 65000:1:2")
        if values:
            words += [name, "[", *(_WELL_KNOWN.get(v, v) for v in sorted(set(values))), "]"]
    return " ".join(words)


def _full(shape: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and shape.fullmatch(value) is not None


def save(path: Path, table: Table) -> None:
    """Writes it whole or not at all: to a temporary file, then rename. Raises OSError, and the old file stays."""
    body = _body(table)
    data = {"version": VERSION, "checksum": hashlib.sha256(body).hexdigest(), "table": json.loads(body)}
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(json.dumps(data).encode())
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def load(path: Path) -> Table | None:
    """The last table saved, None if there never was one. Raises TableError if the file is damaged: then nobody knows
    what we announced, and no End-of-RIB may be sent before the agent gives a table."""
    try:
        data = json.loads(path.read_bytes())
        version, checksum, content = data["version"], data["checksum"], data["table"]
        rows = content["routes"]
        table = Table(content["generation"], _grouped(rows), tuple((p, x) for p, x in content["retired"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise TableError(f"{path} cannot be read ({e}): nothing is announced until the agent gives a table") from e
    if version != VERSION or hashlib.sha256(_body(table)).hexdigest() != checksum:
        raise TableError(f"{path} is damaged (version or checksum): nothing is announced until the agent gives a table")
    return table


def _grouped(rows: Iterable[tuple[str, str, str]]) -> Routes:
    routes: dict[str, dict[str, str]] = {}
    for peer, prefix, attributes in rows:
        if not (_full(_ADDRESS, peer) and _full(_PREFIX, prefix) and _full(_ATTRIBUTES, attributes)):
            raise ValueError(f"bad route {prefix!r}")
        routes.setdefault(peer, {})[prefix] = attributes
    return routes


def _body(table: Table) -> bytes:
    rows = sorted((peer, prefix, text) for peer, routes in table.routes.items() for prefix, text in routes.items())
    content = {"generation": table.generation, "routes": rows, "retired": sorted(table.retired)}
    return json.dumps(content, sort_keys=True).encode()
