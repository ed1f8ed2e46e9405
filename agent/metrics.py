"""What the agent tells Prometheus. Pure: it counts, and puts figures that others have into families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from agent.adjrib import family_of
from agent.delta import Failure, Operation
from agent.health import Seen
from agent.rib import Rib, count_refusals
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from cni.prometheus import Family, Histogram, Kind, Sample, labelled, of_store, one
from store.model import BGPNodeStatusStatus, SessionStatus

PROTOCOLS: Final = {PROTO_PODS: "pods", PROTO_BLOCKS: "blocks", PROTO_IMPORTS: "imports"}
_OPERATIONS: Final = [kind.__name__ for kind in Operation.__args__]


class Figures:
    """What the loop counts since the agent's start. ``turned``: when it last came round, or began (monotonic)."""

    def __init__(self, now: float) -> None:
        self.turned = now
        self.passes = 0
        self.plan_times = Histogram()
        self.apply_times = Histogram()
        self.operations: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def applied(self, operations: Sequence[Operation], failures: Sequence[Failure]) -> None:
        """What was asked of the kernel in one go, and what it refused."""
        self.operations.update(type(operation).__name__ for operation in operations)
        self.failures.update(type(failure.operation).__name__ for failure in failures)


class Followed(msgspec.Struct, frozen=True):
    """How well one kind is followed. ``behind``: seconds for which the copy may be out of date, 0 while it is not."""

    kind: str
    synced: bool
    behind: float


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What is so at the moment of a scrape. ``now`` is monotonic, in seconds."""

    now: float
    ready: bool
    #: The view is the store's own word, and not the last good one.
    live: bool
    figures: Figures
    status: BGPNodeStatusStatus
    seen: Seen | None
    rib: Rib
    followed: tuple[Followed, ...]
    #: Seconds since the last good view was written; None: there is none. And whether it has all that is known.
    last_good_age: float | None
    last_good_whole: bool
    store_requests: Mapping[str, int]
    store_failures: Mapping[str, int]
    status_writes: int
    status_failures: int
    relay_connections: int
    resident: int


def families(state: State) -> Iterable[Family]:
    """The families of a scrape."""
    yield from _loop(state)
    yield from _kernel(state)
    yield from _store(state)
    yield from _bgp(state)
    yield one("process_resident_memory_bytes", "gauge", "Resident memory of this process.", state.resident)


def _loop(state: State) -> Iterable[Family]:
    figures = state.figures
    yield one("underlay_agent_ready", "gauge", "1 while GET /readyz answers 200.", state.ready)
    yield one("underlay_agent_passes_total", "counter", "Passes: snapshot, plan, changes.", figures.passes)
    yield one(
        "underlay_agent_turn_age_seconds",
        "gauge",
        "Since the loop last came round; it does every 30 s, woken or not.",
        max(0.0, state.now - figures.turned),
    )
    yield Family(
        "underlay_agent_plan_seconds", "histogram", "From a snapshot to its plan.", figures.plan_times.samples({})
    )
    yield Family(
        "underlay_agent_apply_seconds",
        "histogram",
        "The kernel's changes of a pass that has any.",
        figures.apply_times.samples({}),
    )
    conditions = {condition.type: 1.0 for condition in state.status.conditions}
    yield labelled(
        "underlay_agent_condition", "gauge", "1 while the condition holds; absent otherwise.", "type", conditions
    )


def _kernel(state: State) -> Iterable[Family]:
    figures, kernel = state.figures, state.seen.kernel if state.seen else None
    for name, text, counts in (
        ("operations", "Changes asked of the kernel, by kind.", figures.operations),
        ("failures", "Changes that the kernel refused, by kind; each is tried again.", figures.failures),
    ):
        by_kind = {kind: float(counts[kind]) for kind in _OPERATIONS}
        yield labelled(f"underlay_agent_kernel_{name}_total", "counter", text, "operation", by_kind)
    routes = Counter((protocol, family_of(prefix)[:4]) for prefix, protocol, _ in (kernel.routes if kernel else ()))
    yield Family(
        "underlay_agent_routes",
        "gauge",
        "Routes of ours in the kernel, by whose they are and family.",
        tuple(
            Sample(routes[number, family], {"protocol": name, "family": family})
            for number, name in PROTOCOLS.items()
            for family in ("ipv4", "ipv6")
        ),
    )
    yield one("underlay_agent_nexthop_groups", "gauge", "Nexthop groups of ours.", len(kernel.groups) if kernel else 0)


def _store(state: State) -> Iterable[Family]:
    yield one("underlay_agent_view_live", "gauge", "0: working from the last good view of the store.", state.live)
    yield labelled(
        "underlay_agent_informer_synced",
        "gauge",
        "1 once all objects of the kind have been read.",
        "kind",
        {followed.kind: float(followed.synced) for followed in state.followed},
    )
    yield labelled(
        "underlay_agent_informer_behind_seconds",
        "gauge",
        "For how long the kind has not been followed; 0 while it is.",
        "kind",
        {followed.kind: followed.behind for followed in state.followed},
    )
    yield Family(
        "underlay_agent_last_good_age_seconds",
        "gauge",
        "Since the last good view was written to disk; it is when it changes.",
        () if state.last_good_age is None else (Sample(state.last_good_age),),
    )
    yield one(
        "underlay_agent_last_good_whole", "gauge", "1 while the disk has all that is known.", state.last_good_whole
    )
    yield one("underlay_agent_status_writes_total", "counter", "Writes of BGPNodeStatus.", state.status_writes)
    yield one("underlay_agent_status_failures_total", "counter", "Writes that failed.", state.status_failures)
    yield from of_store(state.store_requests, state.store_failures)


def _bgp(state: State) -> Iterable[Family]:
    sessions = state.status.sessions
    known = bool(state.seen and state.seen.speaker.known)
    yield one("underlay_bgp_speaker_known", "gauge", "1 while the speaker has told what it announces.", known)
    yield one(
        "underlay_bgp_relay_connections_total", "counter", "Connections made to the relay.", state.relay_connections
    )
    yield one("underlay_bgp_sessions_wanted", "gauge", "Sessions that this node is to have.", len(sessions))

    def each(name: str, kind: Kind, text: str, values: Iterable[float]) -> Family:
        samples = (Sample(value, _labels(s)) for s, value in zip(sessions, values, strict=True))
        return Family(name, kind, text, tuple(samples))

    peers = [state.rib.peers.get(s.address) for s in sessions]
    yield each(
        "underlay_bgp_session_up", "gauge", "1 while the session is up.", (s.state == "Established" for s in sessions)
    )
    yield each(
        "underlay_bgp_session_age_seconds",
        "gauge",
        "Since the session last came up or went down.",
        (max(0.0, state.now - p.since) if p else 0.0 for p in peers),
    )
    yield each(
        "underlay_bgp_session_downs_total",
        "counter",
        "How often the session went down.",
        (p.downs if p else 0 for p in peers),
    )
    yield each(
        "underlay_bgp_session_graceful_restart",
        "gauge",
        "1 if the peer keeps our routes while our speaker restarts.",
        (s.graceful_restart for s in sessions),
    )
    yield each("underlay_bgp_prefixes_received", "gauge", "Prefixes received.", (s.received for s in sessions))
    yield each("underlay_bgp_prefixes_accepted", "gauge", "Prefixes let in.", (s.accepted for s in sessions))
    yield Family(
        "underlay_bgp_prefixes_refused", "gauge", "Prefixes not let in, by reason.", tuple(_refused(state, sessions))
    )
    yield each("underlay_bgp_prefixes_wanted", "gauge", "Prefixes wanted at the peer.", (s.wanted for s in sessions))
    yield each(
        "underlay_bgp_prefixes_sent", "gauge", "Prefixes reported as sent to the peer.", (s.sent for s in sessions)
    )


def _refused(state: State, sessions: Iterable[SessionStatus]) -> Iterable[Sample]:
    refused = state.seen.plan.selection.refused if state.seen else {}
    for session in sessions:
        for reason, count in count_refusals(refused.get(session.address, {})).items():
            yield Sample(count, {**_labels(session), "reason": reason.name})


def _labels(session: SessionStatus) -> dict[str, str]:
    return {"peer": session.peer, "address": session.address}
