"""Taking a node out of the routes (RFC 8326): first every announcement carries GRACEFUL_SHUTDOWN, by which peers take
any other way, and when that has settled the blocks are withdrawn. Pure.

A block in which pods live stays announced until the last of them is gone (R14), unless people insist. What is withdrawn
stays so: a node that is drained announces nothing new but blocks that pods live in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from agent.bgp.model import Announcement
from agent.fib import KernelState
from agent.plan.model import Notes, Snapshot, some
from agent.prefix import PrefixSet
from agent.rib import GRACEFUL_SHUTDOWN
from cni.marks import PROTO_PODS
from store.model import ANNOTATION_DRAIN, Node

#: Seconds from the report that an announcement with the community was sent to its withdrawal (R9).
DRAIN_SETTLE: Final = 5.0

ASKED, INSISTED, SHUTDOWN = "asked", "insisted", "shutdown"


def why_drained(node: Node | None, notes: Notes) -> str:
    """``ASKED`` or ``INSISTED`` by the Node's annotation; ``SHUTDOWN``: the kubelet says that the machine goes down
    (kubelet's graceful node shutdown: pkg/kubelet/nodestatus/setters.go). "": neither."""
    text = node.metadata.annotations.get(ANNOTATION_DRAIN, "") if node else ""
    if text in ("yes", "force"):
        return INSISTED if text == "force" else ASKED
    if text:
        notes.add("DrainNotUsable", f"{ANNOTATION_DRAIN}: {text!r}: yes or force; the node is not drained")
    if node and any(c.type == "Ready" and "node is shutting down" in c.message for c in node.status.conditions):
        return SHUTDOWN
    return ""


def drain(
    announcements: Iterable[Announcement], why: str, snapshot: Snapshot, notes: Notes
) -> tuple[list[Announcement], tuple[float, ...]]:
    """These announcements as a node makes them that is drained for this reason (``why_drained``; "": it is not), and
    the moments at which time alone changes that."""
    given = list(announcements)
    if not why:
        return given, ()
    pods = pods_in({a.prefix for a in given}, snapshot.kernel)
    going = {prefix for prefix, count in pods.items() if not count or why == INSISTED}
    ends = {prefix: _withdrawal(prefix, snapshot) for prefix in going}
    gone = {prefix for prefix, at in ends.items() if at is not None and at <= snapshot.now}
    left = [_marked(a) for a in given if a.prefix not in gone]
    said = [f"{p} stays until its last pod is gone: {n} live in it" for p, n in sorted(pods.items()) if p not in going]
    waiting = sorted(going - gone)
    said += [f"{len(waiting)} blocks are withdrawn when peers had time to take other ways"] if waiting else []
    reason = "the machine goes down" if why == SHUTDOWN else "asked for"
    if left:
        notes.add("RoutesDraining", f"{reason}: {'; '.join(some(said))}")
    else:
        notes.add("RoutesDrained", f"{reason}: nothing is announced")
    return left, tuple(at for prefix, at in ends.items() if prefix not in gone and at is not None)


def _marked(announcement: Announcement) -> Announcement:
    return replace(announcement, communities=tuple(sorted({*announcement.communities, GRACEFUL_SHUTDOWN})))


def _withdrawal(prefix: str, snapshot: Snapshot) -> float | None:
    """When the block is to be withdrawn: 5 s after the last peer that has it was told; None: it is not known yet. A
    peer that has it although it is not in the table is being told that it is gone."""
    speaker = snapshot.speaker
    told = [speaker.confirmed_at.get(pair) for pair in speaker.sent & speaker.table if pair[1] == prefix]
    known = [at for at in told if at is not None]
    if len(known) < len(told):
        return None
    return max(known) + DRAIN_SETTLE if known else snapshot.now


def pods_in(prefixes: Iterable[str], kernel: KernelState) -> dict[str, int]:
    """How many addresses of each block have a pod's route."""
    blocks = {prefix: PrefixSet([prefix]) for prefix in prefixes}
    found = dict.fromkeys(blocks, 0)
    for route, protocol, _ in kernel.routes:
        if protocol == PROTO_PODS:
            for prefix, block in blocks.items():
                found[prefix] += block.covers_address(route.partition("/")[0])
    return found
