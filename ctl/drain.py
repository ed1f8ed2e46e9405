"""``node drain-routes``: takes a node out of the routes and back, and says how far that is.

The node's agent does it (R14): it is asked by an annotation on the Node, and answers in its BGPNodeStatus.
"""

from __future__ import annotations

from typing import Final

import click
from msgspec.structs import replace

from ctl.failures import OK, REFUSED, Failure
from store.base import Store, mutate
from store.clock import Clock
from store.errors import NotFound
from store.model import ANNOTATION_DRAIN, BGPNodeStatus, Node

_LOOK_EVERY: Final = 0.2
#: Seconds in which an agent that runs has said that it begins.
_ANSWER: Final = 10.0
DRAINING, DRAINED = "RoutesDraining", "RoutesDrained"


async def drain_routes(store: Store, clock: Clock, name: str, *, wait: float, force: bool, yes: bool) -> int:
    """0 once nothing is announced; 1 if something still is after ``wait`` seconds, with the reason. Raises Failure if
    there is no such Node, or people say no."""
    if force and not yes and not click.confirm(f"pods on {name} will not be reached any more: withdraw their blocks?"):
        raise Failure(["nothing is changed"])
    await _mark(store, name, "force" if force else "yes")
    said = ""
    end, answer = clock.monotonic() + wait, clock.monotonic() + _ANSWER
    while True:
        status = await _status(store, name)
        conditions = {c.type: c.message for c in status.status.conditions} if status else {}
        words = conditions.get(DRAINED) or conditions.get(DRAINING) or ""
        if words and words != said:
            click.echo(f"{name}: {words}")
            said = words
        if DRAINED in conditions:
            return OK
        now = clock.monotonic()
        if not said and now >= answer:
            raise Failure([f"the agent of {name} does not answer: it will begin when it runs; --undo takes that back"])
        if now >= end:
            click.echo(f"underlayctl: {name} still announces after {wait:g} s; it goes on; --undo ends it", err=True)
            return REFUSED
        await clock.sleep(_LOOK_EVERY)


async def undo(store: Store, clock: Clock, name: str, *, wait: float) -> int:
    """0 once all that is wanted is announced again. Raises Failure if there is no such Node."""
    await _mark(store, name, "")
    end = clock.monotonic() + wait
    while True:
        status = await _status(store, name)
        problem = _not_back(status)
        if not problem:
            click.echo(f"{name}: its blocks are announced as before")
            return OK
        if clock.monotonic() >= end:
            click.echo(f"underlayctl: {name}: after {wait:g} s {problem}", err=True)
            return REFUSED
        await clock.sleep(_LOOK_EVERY)


def _not_back(status: BGPNodeStatus | None) -> str:
    if status is None:
        return "its agent has said nothing"
    if any(c.type in (DRAINING, DRAINED) for c in status.status.conditions):
        return "its agent has not taken it back"
    behind = [s for s in status.status.sessions if s.state == "Established" and s.sent < s.wanted]
    return f"{behind[0].peer} has {behind[0].sent} of {behind[0].wanted} prefixes" if behind else ""


async def _mark(store: Store, name: str, value: str) -> None:
    def change(node: Node) -> Node | None:
        if node.metadata.annotations.get(ANNOTATION_DRAIN, "") == value:
            return None
        annotations = {k: v for k, v in node.metadata.annotations.items() if k != ANNOTATION_DRAIN}
        annotations |= {ANNOTATION_DRAIN: value} if value else {}
        return replace(node, metadata=replace(node.metadata, annotations=annotations))

    try:
        await mutate(store, Node, name, change)
    except NotFound as e:
        raise Failure([f"there is no Node {name}: underlayctl get nodes"]) from e


async def _status(store: Store, name: str) -> BGPNodeStatus | None:
    try:
        return await store.get(BGPNodeStatus, name)
    except NotFound:
        return None
