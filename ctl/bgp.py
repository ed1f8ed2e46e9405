"""``underlayctl bgp``: what the agent of this node sees: peers, what they told, what they are told, what differs.

The agent answers at ``agent.sock`` in its run directory (``agent/look.py`` says what). Of other nodes there is what
their agents wrote into the store: sessions and numbers.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import click

from ctl.connection import Connection
from ctl.failures import OK, REFUSED, Failure
from ctl.words import age
from store.base import Store
from store.model import BGPNodeStatus, Node

_LIMIT: Final = 30.0
Row = Mapping[str, Any]


def show(
    what: str, run: Path, *, now: str, output: str = "", peer: str = "", prefix: str = "", limit: int = 1000
) -> int:
    """Prints ``peers``, ``routes``, ``received`` or ``advertised``, for people or, with ``output`` ``json``, as the
    agent says it. Raises Failure if the agent does not answer."""
    answer = ask_all(run, what, peer=peer, prefix=prefix, limit=limit)
    if output == "json":
        click.echo(json.dumps(answer, indent=2))
        return OK
    for line in PAGES[what](answer, now):
        click.echo(line)
    if answer.get("more"):
        click.echo(f"{answer['more']} more {'peers' if what == 'peers' else 'prefixes'}: --limit, --peer or --prefix")
    return OK


def ask_all(run: Path, what: str, *, peer: str, prefix: str, limit: int) -> dict[str, Any]:
    """The agent's answers as one of ``limit`` rows at most. An agent answers a thousand at a time, so that it goes on
    with its work in between. Raises Failure."""
    whole = ask(run, what, peer=peer, prefix=prefix, limit=limit)
    rows: list[Any] = whole[what if what in ("peers", "advertised") else "routes"]
    while whole["more"] and rows and what != "peers" and len(rows) < limit:
        part = ask(run, what, peer=peer, prefix=prefix, limit=limit - len(rows), after=rows[-1]["prefix"])
        found = part[what if what == "advertised" else "routes"]
        if len(rows) + len(found) > limit:
            break
        rows += found
        whole["more"] = part["more"]
    return whole


def show_diff(run: Path, *, output: str = "") -> int:
    """Prints what differs: blocks that a peer is to have and was not told, or has and is not to have, and prefixes that
    are let in and not in the kernel. 1 if anything does. Raises Failure if the agent does not answer."""
    answer = ask(run, "diff")
    rows = answer["differences"]
    if output == "json":
        click.echo(json.dumps(answer, indent=2))
    elif rows:
        titles = ("WHERE", "PREFIX", "DIFFERS", "WHY")
        for line in _lines(titles, ((r["where"], r["prefix"], r["differs"], r["why"]) for r in rows)):
            click.echo(line)
        if answer["more"]:
            click.echo(f"{answer['more']} more")
    else:
        click.echo(f"nothing differs: {answer['announcements']} announcements, {answer['prefixes']} prefixes let in")
    return REFUSED if rows else OK


async def show_diff_of(store: Store, node: str, *, output: str = "") -> int:
    """The same by what agents last wrote into the store, in numbers: of one node, or of all ("")."""
    found = {s.name: s.status for s in (await store.list(BGPNodeStatus)).items}
    if node and node not in found:
        raise Failure([f"node {node}: its agent has said nothing yet: is there such a node, and does its agent run?"])
    silent = {n.name for n in (await store.list(Node)).items} - found.keys() if not node else set()
    rows = [
        {"node": name, "peer": s.peer, "state": s.state, "wanted": s.wanted, "sent": s.sent, "why": s.reason}
        for name, status in sorted(found.items())
        if node in ("", name)
        for s in status.sessions
        if s.state != "Established" or s.wanted != s.sent
    ]
    if output == "json":
        click.echo(json.dumps({"differences": rows, "silent": sorted(silent)}, indent=2))
    elif rows:
        titles = ("NODE", "PEER", "STATE", "WANTED", "SENT", "WHY")
        for line in _lines(titles, (tuple(map(str, row.values())) for row in rows)):
            click.echo(line)
    elif not silent:
        click.echo("nothing differs, as far as the store knows")
    if output != "json":
        for name in sorted(silent):
            click.echo(f"{name}: its agent has not said anything yet: is it running?")
        if rows:
            click.echo("which prefixes, and why: underlayctl bgp diff on that node")
    return REFUSED if rows or silent else OK


def ask(run: Path, what: str, **query: object) -> dict[str, Any]:
    """The agent's answer. Raises Failure, which says what to do."""
    path = run / "agent.sock"
    words = urlencode({key: value for key, value in query.items() if value not in ("", None)})
    connection = Connection(path, _LIMIT)
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


# -- pages ---------------------------------------------------------------------------------------------------------


def _peers(answer: Row, now: str) -> Iterable[str]:
    for page in answer["peers"]:
        status = page["status"]
        since = age(status.get("since", ""), now)
        head = f"{status['peer']}  {status['address']}  AS {status.get('asNumber', 0)}  {status['state']}"
        yield f"{head} for {since}" if since else head
        if status["state"] != "Established":
            yield f"  why: {status.get('reason') or 'nothing was heard of it'}"
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
