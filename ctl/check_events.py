"""``ipam check``: what CNI servers say of themselves in Events, for a node without a block has no status to say it in
(docs/decisions/0011). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from ctl.finding import Finding
from ipam.model import CONDITIONS, CONTROLLER, Settings
from store.model import KubeEvent

#: Seconds. A condition that holds is told again every ``retell`` seconds; what was told longer ago does not hold, or
#: there is no server any more. Two minutes for clocks that differ, and for a store that was away.
FRESH: Final = Settings().retell + 120.0


def is_condition(event: KubeEvent) -> bool:
    """Whether it says that a condition of a node's addresses begins, holds or is over."""
    about = event.regarding
    return (
        event.reporting_controller == CONTROLLER
        and event.reason in CONDITIONS
        and about is not None
        and about.kind == "Node"
    )


def compare_events(
    events: Iterable[KubeEvent], said: frozenset[str], nodes: frozenset[str] | None, now: str
) -> Iterator[Finding]:
    """A finding for each condition that a node said last, and lately. ``said`` are nodes whose blocks say all that
    holds, ``nodes`` all that there are (None: not known)."""
    last: dict[tuple[str, str], KubeEvent] = {}
    for event in events:
        if not is_condition(event):
            continue
        assert event.regarding is not None
        key = (event.regarding.name, event.reason)
        before = last.get(key)
        if before is None or _at(event) >= _at(before):
            last[key] = event
    for (node, kind), event in last.items():
        fresh = (datetime.fromisoformat(now) - _at(event)).total_seconds() <= FRESH
        if event.type == "Warning" and fresh and node not in said and (nodes is None or node in nodes):
            yield condition_holds(node, kind, event.action, event.note)


def condition_holds(node: str, kind: str, reason: str, message: str) -> Finding:
    """What a server says of itself, wherever it says so."""
    return Finding(
        "ConditionHolds",
        f"node/{node}",
        "",
        (node,),
        f"{kind} ({reason}): {message}",
        f"do what the message says; {kind} is in docs/troubleshooting.md",
    )


def _at(event: KubeEvent) -> datetime:
    """When it was said last."""
    return datetime.fromisoformat(event.series.last_observed_time if event.series else event.event_time)
