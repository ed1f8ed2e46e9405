"""``underlayctl bgp``: what the agent of this node sees: peers, what they told, what they are told, what differs.

The agent answers at ``agent.sock`` in its run directory (``agent/look.py`` says what); nothing of it is in the store.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import click

from ctl.failures import OK, REFUSED, Failure
from ctl.words import age

_LIMIT: Final = 30.0
Row = Mapping[str, Any]


def show(
    what: str, run: Path, *, now: str, output: str = "", peer: str = "", prefix: str = "", limit: int = 1000
) -> int:
    """Prints ``peers``, ``routes``, ``received`` or ``advertised``, for people or, with ``output`` ``json``, as the
    agent says it. Raises Failure if the agent does not answer."""
    answer = ask(run, what, peer=peer, prefix=prefix, limit=limit)
    if output == "json":
        click.echo(json.dumps(answer, indent=2))
        return OK
    for line in PAGES[what](answer, now):
        click.echo(line)
    if answer.get("more"):
        click.echo(f"{answer['more']} more: --limit, --peer or --prefix")
    return OK


def show_diff(run: Path, *, output: str = "") -> int:
    """Prints what differs: blocks that a peer is to have and was not told, or has and is not to have, and prefixes that
    are let in and not in the kernel. 1 if anything does."""
    advertised = ask(run, "advertised", limit=1_000_000)["advertised"]
    routes = ask(run, "routes", limit=1_000_000)["routes"]
    rows = [
        {"where": row["peer"] or "every peer", "prefix": row["prefix"], "differs": row["state"], "why": row["why"]}
        for row in advertised
        if row["state"] != "sent" and not _meant(row)
    ]
    missing = {row["prefix"] for row in routes if row["state"] == "best" and not row["in_kernel"]}
    rows += [{"where": "kernel", "prefix": p, "differs": "missing", "why": "see node status"} for p in sorted(missing)]
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        for line in _lines(("WHERE", "PREFIX", "DIFFERS", "WHY"), (tuple(row.values()) for row in rows)):
            click.echo(line)
    else:
        click.echo(f"nothing differs: {len(advertised)} announcements, {len(routes)} paths")
    return REFUSED if rows else OK


def _meant(row: Row) -> bool:
    """Kept back by what somebody configured."""
    return row["state"] == "withheld" and not row["why"].startswith("its blackhole")


def ask(run: Path, what: str, **query: object) -> dict[str, Any]:
    """The agent's answer. Raises Failure, which says what to do."""
    path = run / "agent.sock"
    words = urlencode({key: value for key, value in query.items() if value not in ("", None)})
    connection = _Unix(path)
    try:
        connection.request("GET", f"/bgp/{what}?{words}", headers={"Host": "agent"})
        answer = connection.getresponse()
        body = answer.read()
    except FileNotFoundError as e:
        raise Failure([f"there is no {path}: does underlay-agent run on this node, and is --run its directory?"]) from e
    except PermissionError as e:
        raise Failure([f"{path}: {e.strerror}: ask as root"]) from e
    except (OSError, http.client.HTTPException) as e:
        raise Failure([f"{path}: no answer ({e}): is underlay-agent running on this node?"]) from e
    finally:
        connection.close()
    if answer.status != 200:
        said = body.decode(errors="replace").strip()
        hint = ": is the agent older than this underlayctl?" if answer.status == 404 else ""
        raise Failure([f"the agent says {answer.status}: {said}{hint}"])
    found: dict[str, Any] = json.loads(body)
    return found


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=_LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


# -- pages ---------------------------------------------------------------------------------------------------------


def _peers(answer: Row, now: str) -> Iterable[str]:
    for page in answer["peers"]:
        status = page["status"]
        since = age(status.get("since", ""), now)
        head = f"{status['peer']}  {status['address']}  AS {status.get('asNumber', 0)}  {status['state']}"
        yield f"{head} for {since}" if since else head
        if status.get("reason"):
            yield f"  why: {status['reason']}"
        counts = [f"{name} {status.get(name, 0)}" for name in ("received", "accepted", "wanted", "sent")]
        yield f"  prefixes: {', '.join(counts)}"
        if page["families"]:
            families = ", ".join(page["families"])
            yield f"  families: {families}; hold time {page['hold_time']} s; router id {page['router_id']}"
            yield f"  capabilities: {', '.join(page['capabilities']) or 'none of ours'}"
            yield f"  graceful restart: {_graceful(page)}"
        for change in page["history"]:
            times = f" ({change['times']} times until {change['last']})" if change["times"] > 1 else ""
            yield f"  {change['at']}  {change['state']}{times}{': ' + change['why'] if change['why'] else ''}"
    if not answer["peers"]:
        yield "no such peer"


def _graceful(page: Row) -> str:
    ours = "the peer keeps our routes while our speaker restarts" if page["helper"] else "the peer drops our routes"
    theirs = ", ".join(page["graceful"])
    kept = f"; we keep its routes ({theirs}) for {page['restart_time']} s" if theirs else ""
    return ours + kept


def _routes(answer: Row, now: str) -> Iterable[str]:
    titles = ("PREFIX", "PEER", "NEXT-HOP", "STATE", "KERNEL", "AS-PATH", "MED", "COMMUNITIES", "WHY")
    rows = ((r["prefix"], r["peer"], r["next_hop"], r["state"], *_attributes(r)) for r in answer["routes"])
    return _lines(titles, rows)


def _attributes(row: Row) -> tuple[str, ...]:
    path, communities = (" ".join(map(str, row[key])) for key in ("as_path", "communities"))
    kernel = "yes" if row["in_kernel"] and row["state"] == "best" else ""
    return kernel, path, str(row["med"] or ""), communities, row["why"]


def _advertised(answer: Row, now: str) -> Iterable[str]:
    titles = ("PREFIX", "PEER", "STATE", "NEXT-HOP", "COMMUNITIES", "WHY")
    rows = (
        (r["prefix"], r["peer"] or "-", r["state"], r["next_hop"], " ".join(r["communities"]), r["why"])
        for r in answer["advertised"]
    )
    return _lines(titles, rows)


def _lines(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    found = [titles, *rows]
    widths = [max(len(row[column]) for row in found) for column in range(len(titles))]
    for row in found:
        yield "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


PAGES: Final[Mapping[str, Callable[[Row, str], Iterable[str]]]] = {
    "peers": _peers,
    "routes": _routes,
    "received": _routes,
    "advertised": _advertised,
}
