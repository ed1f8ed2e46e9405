"""Whether the agent is alive, and whether what is wanted of it is in place. Pure; times are of one monotonic clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from agent.adjrib import UNKNOWN_PATIENCE
from agent.bgp.model import SpeakerState
from agent.fib import KernelState
from agent.plan import Plan
from agent.rib import Peer, Rib

#: Seconds after which a loop that has not come round is taken to hang: two of ``agent.reconcile.FULL_PASS``.
TURN_LIMIT: Final = 60.0


class Seen(msgspec.Struct, frozen=True):
    """What the last pass read and wanted. ``plan`` has no routes: they are in the kernel, and cost memory."""

    plan: Plan
    kernel: KernelState
    speaker: SpeakerState


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What the verdicts are made of. ``turned``: when the loop last came round, or began."""

    now: float
    turned: float
    #: There is a view of the store, if only from disk.
    viewed: bool
    #: Why the kernel cannot be read or changed; "" if it can.
    kernel_error: str
    #: None: nothing has been planned yet.
    seen: Seen | None
    rib: Rib


def unhealthy(state: State) -> str:
    """Why the agent should be started anew; "" if it need not be. Whatever only others can mend is no reason."""
    idle = state.now - state.turned
    return f"the loop has not come round for {idle:.0f} s: {TURN_LIMIT:.0f} are the limit" if idle > TURN_LIMIT else ""


def unready(state: State) -> str:
    """What is not in place yet; "" once a plan is applied and each session wanted is up, or has had its time.

    A session has had its time when it has been down, or was never up, for its ``maxRestartTime``, 120 s at most, or
    when its peer was removed for sending too much: a dead ToR holds nobody up for longer.
    """
    problem = unfit(state)
    if problem or state.seen is None:
        return problem
    plan = state.seen.plan
    if plan.sessions and not state.seen.speaker.known:
        return "the speaker has not told its table: is underlay-speaker running?"
    waiting = [
        f"{peer.name} ({peer.address}) is waited for, {due - state.now:.0f} s more"
        for peer, due in _down(state)
        if due > state.now
    ]
    return "; ".join(waiting)


def unfit(state: State) -> str:
    """What of ``unready`` is this agent's own, whatever speaker and peers do. A session that goes down later is no
    news of an agent: a speaker's upgrade would make every agent unready."""
    if not state.viewed:
        return "the store has not answered yet, and there is no last good view on disk"
    if state.kernel_error:
        return f"the kernel is not as planned: {state.kernel_error}"
    if state.seen is None:
        return "no plan has been applied yet"
    plan = state.seen.plan
    if plan.sessions is None:
        notes = [c.message for c in plan.conditions if c.type == "NodeNotUsable"]
        return f"which sessions there are to be is not known: {'; '.join(notes)}"
    return ""


def without(state: State) -> str:
    """Sessions that have had their time and are not up, in words; "" if all are."""
    return "; ".join(f"without {peer.name} ({peer.address})" for peer, due in _down(state) if due <= state.now)


def _down(state: State) -> Iterator[tuple[Peer, float]]:
    """Peers whose session is not up, and until when each is waited for."""
    for peer in state.seen.plan.peers if state.seen else ():
        known = state.rib.peers.get(peer.address)
        if known is None or not known.up:
            since = known.since if known and not state.rib.exceeded(peer) else float("-inf")
            yield peer, since + min(peer.max_restart_time, UNKNOWN_PATIENCE)
