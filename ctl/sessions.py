"""``node status``: what a node's agent says of its sessions, as a page for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ctl.tables import Table
from ctl.words import age, yes
from store.model import BGPNodeStatus, IPAMBlock, SessionStatus

_TITLES = (
    "PEER",
    "ADDRESS",
    "AS",
    "STATE",
    "SINCE",
    "RECEIVED",
    "ACCEPTED",
    "WANTED",
    "SENT",
    "GRACEFUL-RESTART",
    "REASON",
)


def headline(status: BGPNodeStatus) -> str:
    """``node-1: AS 65101, router id 10.0.1.0, 2 of 2 sessions established``."""
    said = status.status
    up = sum(1 for s in said.sessions if s.state == "Established")
    parts = [f"AS {said.as_number}"] if said.as_number else []
    parts += [f"router id {said.router_id}"] if said.router_id else []
    parts += [f"{up} of {len(said.sessions)} sessions established" if said.sessions else "no session wanted"]
    return f"{status.name}: {', '.join(parts)}"


def sessions_table(status: BGPNodeStatus, *, now: str) -> Table:
    return Table(_TITLES, tuple(_row(s, now) for s in status.status.sessions))


def conditions(status: BGPNodeStatus | None, blocks: Sequence[IPAMBlock] = ()) -> list[str]:
    """One line for each condition that holds, of the node's agent and of its blocks (where each block repeats it): its
    type, reason and message, and since when."""
    said = status.status.conditions if status else ()
    lines = []
    for c in dict.fromkeys((*said, *(c for block in blocks for c in block.status.conditions))):
        if c.status == "False":
            continue
        reason = f"({c.reason})" if c.reason not in ("", c.type) else ""
        words = " ".join(part for part in (reason, c.message) if part)
        doubt = " (not known for sure)" if c.status == "Unknown" else ""
        since = f" [since {c.last_transition_time}]" if c.last_transition_time else ""
        lines.append(f"{c.type}{doubt}: {words}{since}" if words else f"{c.type}{doubt}{since}")
    return lines


def _row(s: SessionStatus, now: str) -> tuple[str, ...]:
    return (
        s.peer,
        s.address,
        str(s.as_number),
        s.state,
        age(s.since, now),
        str(s.received),
        str(s.accepted),
        str(s.wanted),
        str(s.sent),
        yes(s.graceful_restart) if s.state == "Established" else "",
        s.reason,
    )
