"""What the agent says of itself in its BGPNodeStatus. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from agent.bgp.history import History
from agent.bgp.model import SpeakerState
from agent.plan import Plan
from agent.rib import Peer, Rib
from store.model import DETECTED, BGPNodeStatusStatus, Condition, SessionStatus


def report(
    plan: Plan,
    rib: Rib,
    speaker: SpeakerState,
    history: History,
    conditions: Iterable[Condition],
    before: BGPNodeStatusStatus,
    now: str,
) -> BGPNodeStatusStatus:
    """The status, with the plan's conditions and ``conditions``. A session or condition that is as it was ``before``
    keeps its stamp; others get ``now`` (RFC 3339)."""
    sessions = {s.address: s for s in before.sessions}
    stamps = {c.type: c.last_transition_time for c in before.conditions}
    found: dict[str, Condition] = {}
    for condition in (*plan.conditions, *conditions):
        known = found.get(condition.type)
        if known is not None:
            condition = replace(condition, message=f"{known.message}; {condition.message}")
        found[condition.type] = replace(condition, last_transition_time=stamps.get(condition.type) or now)
    return BGPNodeStatusStatus(
        as_number=plan.local_as,
        router_id=plan.router_id,
        addresses=plan.addresses,
        address_source=DETECTED if plan.detected else "",
        sessions=tuple(_session(p, plan, rib, speaker, history, sessions, now) for p in plan.peers),
        conditions=tuple(found[kind] for kind in sorted(found)),
    )


def _session(
    peer: Peer,
    plan: Plan,
    rib: Rib,
    speaker: SpeakerState,
    history: History,
    before: Mapping[str, SessionStatus],
    now: str,
) -> SessionStatus:
    known, address = rib.peers.get(peer.address), peer.address
    received = len(known.routes) if known else 0
    refusal = speaker.refused.get(address, "")
    exceeded = rib.exceeded(peer)
    if known and known.up:
        state, reason = "Established", ""
    elif exceeded:
        state, reason = "Idle", exceeded
    elif refusal:
        state, reason = "Idle", refusal
    else:
        # Without a speaker the history ends before the session does.
        reason = history.why_down(address) if speaker.known else ""
        state, reason = "Connecting", reason or (known.reason if known else "")
    last = before.get(address)
    return SessionStatus(
        peer=peer.name,
        address=address,
        as_number=peer.peer_as,
        state=state,
        since=last.since if last and last.state == state else now,
        received=received,
        accepted=received - len(plan.selection.refused.get(address, {})),
        wanted=sum(a.peer == address for a in plan.announcements or ()),
        sent=sum(to == address for to, _ in speaker.confirmed),
        graceful_restart=bool(known and known.up and known.helper),
        reason=reason,
    )
