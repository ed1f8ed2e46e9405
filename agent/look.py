"""What people see of BGP on a node: its peers, what they told and what became of it, what they are told or not. Pure.

Made on demand from what the loop holds; nothing is worked out for it beforehand. The structs are the wire to
``underlayctl bgp``, as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from heapq import nsmallest
from typing import Final

import msgspec

from agent.bgp.history import History
from agent.bgp.model import Announcement, Change, SpeakerState
from agent.bgp.notification import reason_in_words
from agent.delta import AddRoute, Failure, ReplaceRoute, explain
from agent.fib import KernelState
from agent.plan import Plan
from agent.prefix import covering
from agent.rib import Fate, Rib
from cni.marks import METRIC_FALLBACK, METRIC_IMPORTS, PROTO_IMPORTS
from store.model import BGPNodeStatusStatus, SessionStatus

#: Rows of an answer at most: a table of 100,000 prefixes is asked for in many answers, and the loop goes on between.
LIMIT: Final = 1000


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a session. ``at`` and ``last`` are RFC 3339."""

    state: str
    at: str
    last: str
    times: int
    why: str


class PeerPage(msgspec.Struct, frozen=True, kw_only=True):
    """``status`` is as in the BGPNodeStatus; what was agreed on is empty while there is no session."""

    status: SessionStatus
    families: tuple[str, ...] = ()
    #: Families whose routes outlive a restart of the peer, and for how many seconds.
    graceful: tuple[str, ...] = ()
    restart_time: int = 0
    #: The peer keeps our routes while our speaker restarts.
    helper: bool = False
    hold_time: int = 0
    router_id: str = ""
    capabilities: tuple[str, ...] = ()
    history: tuple[Happened, ...] = ()


class RoutePage(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix as one peer told it. ``state``: ``best`` (it is used), ``worse``, ``refused``; ``why`` says by what."""

    peer: str
    prefix: str
    next_hop: str
    state: str
    why: str = ""
    as_path: tuple[int, ...] = ()
    origin: str = ""
    med: int = 0
    local_pref: int | None = None
    communities: tuple[str, ...] = ()
    #: Whether the kernel has a route to the prefix that is ours.
    in_kernel: bool = False


class AdvertisedPage(msgspec.Struct, frozen=True, kw_only=True):
    """A block at one peer. ``state``: ``sent``; ``not yet``; ``withheld`` (``why`` says by what); ``not wanted``: it
    was sent, and is to be withdrawn."""

    peer: str
    prefix: str
    state: str
    why: str = ""
    #: The speaker cannot say it: nobody meant it so.
    unsendable: bool = False
    next_hop: str = ""
    communities: tuple[str, ...] = ()
    as_path: tuple[int, ...] = ()


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What is not as wanted. ``where``: a peer, ``every peer`` or ``kernel``; ``differs``: ``not sent``, ``not
    announced``, ``not withdrawn`` or ``missing``."""

    where: str
    prefix: str
    differs: str
    why: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of rows is filled. ``more``: how many prefixes (or peers) were left off; ask for what is ``after`` the
    last one."""

    node: str
    peers: tuple[PeerPage, ...] = ()
    routes: tuple[RoutePage, ...] = ()
    advertised: tuple[AdvertisedPage, ...] = ()
    differences: tuple[Difference, ...] = ()
    #: What was compared for ``differences``: announcements, and prefixes that are let in.
    announcements: int = 0
    prefixes: int = 0
    more: int = 0


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """``peer``: by name or address; ``prefix``: an address or prefix, for itself and what covers it; "" for all.
    ``after``: only what comes behind this prefix, in the order of their texts."""

    peer: str = ""
    prefix: str = ""
    after: str = ""
    limit: int = LIMIT


def asked(query: Mapping[str, str]) -> Asked:
    """What a query's values ask for. Raises ValueError for a limit that is no number, or a prefix that is none."""
    limit = query.get("limit", str(LIMIT))
    if not (limit.isascii() and limit.isdigit()):
        raise ValueError(f"limit={limit}: write a number of rows")
    prefix = query.get("prefix", "")
    try:
        covering(prefix) if prefix else ()
    except ValueError as e:
        raise ValueError(f"prefix={prefix}: write an address or a prefix, as 10.244.3.0/26: {e}") from e
    limited = min(max(1, int(limit[:9])), LIMIT)
    return Asked(peer=query.get("peer", ""), prefix=prefix, after=query.get("after", ""), limit=limited)


def peers(node: str, status: BGPNodeStatusStatus, rib: Rib, history: History, question: Asked) -> Answer:
    """The peers, with what their sessions agreed on, and what became of them."""
    rows = [
        _peer(session, rib, history)
        for session in status.sessions
        if question.peer in ("", session.peer, session.address)
    ]
    return Answer(node=node, peers=tuple(rows[: question.limit]), more=max(0, len(rows) - question.limit))


def routes(node: str, plan: Plan, rib: Rib, kernel: KernelState, question: Asked, *, best: bool) -> Answer:
    """Everything that peers told and what became of it, in the order of the prefixes' texts; ``best``: of prefixes that
    are let in alone."""
    names = {p.address: p.name for p in plan.peers if question.peer in ("", p.name, p.address)}
    told = [known.routes for address in names if (known := rib.peers.get(address))]
    chosen: Iterable[str] = covering(question.prefix) if question.prefix else set().union(*told)
    left = [
        prefix
        for prefix in chosen
        if prefix > question.after
        and (not best or prefix in plan.selection.best)
        and any(prefix in routes for routes in told)
    ]
    rows: list[RoutePage] = []
    shown = 0
    for prefix in nsmallest(question.limit, left):
        of_prefix = [_route(names[f.peer], prefix, f, kernel) for f in rib.explain(prefix) if f.peer in names]
        if rows and len(rows) + len(of_prefix) > question.limit:
            break
        rows += of_prefix
        shown += 1
    return Answer(node=node, routes=tuple(rows), more=len(left) - shown)


def advertised(node: str, plan: Plan, speaker: SpeakerState, question: Asked) -> Answer:
    """What each peer is told, and what it is not, and why."""
    addresses = {p.name: p.address for p in plan.peers}
    prefixes = frozenset(covering(question.prefix)) if question.prefix else None
    by_prefix: dict[str, list[AdvertisedPage]] = {}
    for row in _advertised({p.address: p.name for p in plan.peers}, plan, speaker):
        if (
            question.peer in ("", row.peer, addresses.get(row.peer, ""))
            and (prefixes is None or row.prefix in prefixes)
            and row.prefix > question.after
        ):
            by_prefix.setdefault(row.prefix, []).append(row)
    rows: list[AdvertisedPage] = []
    shown = 0
    for prefix in sorted(by_prefix):
        if rows and len(rows) + len(by_prefix[prefix]) > question.limit:
            break
        rows += sorted(by_prefix[prefix], key=lambda row: row.peer)
        shown += 1
    return Answer(node=node, advertised=tuple(rows), more=len(by_prefix) - shown)


def diff(
    node: str,
    plan: Plan,
    status: BGPNodeStatusStatus,
    speaker: SpeakerState,
    kernel: KernelState,
    failures: Iterable[Failure],
    question: Asked,
) -> Answer:
    """What is wanted and not so, at peers and in the kernel; what pools and filters keep back is as wanted."""
    refused = {
        f.operation.route.prefix: explain(f)[1] for f in failures if isinstance(f.operation, AddRoute | ReplaceRoute)
    }
    missing = sorted(prefix for prefix in plan.selection.best if not _is_in(kernel, prefix))
    found = [
        *_differs_at_peers(plan, status, speaker, refused),
        *(Difference(where="kernel", prefix=p, differs="missing", why=refused.get(p, "not yet")) for p in missing),
    ]
    return Answer(
        node=node,
        differences=tuple(found[: question.limit]),
        announcements=len(plan.announcements or ()),
        prefixes=len(plan.selection.best),
        more=max(0, len(found) - question.limit),
    )


def _differs_at_peers(
    plan: Plan, status: BGPNodeStatusStatus, speaker: SpeakerState, refused: Mapping[str, str]
) -> Iterator[Difference]:
    down = {s.peer: s.reason or "nothing was heard of it" for s in status.sessions if s.state != "Established"}
    names = {p.address: p.name for p in plan.peers}
    for row in sorted(_advertised(names, plan, speaker), key=lambda row: (row.prefix, row.peer)):
        if row.state == "sent" or (row.state == "withheld" and row.peer and not row.unsendable):
            continue
        differs = {"not yet": "not sent", "not wanted": "not withdrawn"}.get(row.state, "not announced")
        why = f"the session is down: {down[row.peer]}" if row.peer in down else refused.get(row.prefix, row.why)
        yield Difference(where=row.peer or "every peer", prefix=row.prefix, differs=differs, why=why)


def _peer(session: SessionStatus, rib: Rib, history: History) -> PeerPage:
    known = rib.peers.get(session.address)
    happened = tuple(_happened(change) for change in history.of(session.address))
    if known is None or not known.up:
        return PeerPage(status=session, history=happened)
    agreed = known.capabilities
    words: list[str] = []
    if agreed:
        words += ["route refresh (enhanced)"] if agreed.enhanced else ["route refresh"] if agreed.refresh else []
        words += ["4-byte AS"] if agreed.asn4 else []
        words += [f"next hop {family}" for family in agreed.extended_next_hop]
    return PeerPage(
        status=session,
        families=known.families,
        graceful=known.graceful,
        restart_time=known.restart_time,
        helper=known.helper,
        hold_time=agreed.hold_time if agreed else 0,
        router_id=agreed.router_id if agreed else "",
        capabilities=tuple(words),
        history=happened,
    )


def _happened(change: Change) -> Happened:
    return Happened(
        state=change.state,
        at=_stamp(change.at),
        last=_stamp(change.last),
        times=change.times,
        why=reason_in_words(change.reason, change.notification),
    )


def _stamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _route(peer: str, prefix: str, fate: Fate, kernel: KernelState) -> RoutePage:
    attributes = fate.route.attributes
    return RoutePage(
        peer=peer,
        prefix=prefix,
        next_hop=fate.route.next_hop,
        state=fate.state,
        why=fate.why,
        as_path=attributes.as_path,
        origin=attributes.origin,
        med=attributes.med,
        local_pref=attributes.local_pref,
        communities=attributes.communities + attributes.large_communities,
        in_kernel=_is_in(kernel, prefix),
    )


def _is_in(kernel: KernelState, prefix: str) -> bool:
    metric = METRIC_FALLBACK if prefix.endswith("/0") else METRIC_IMPORTS
    return (prefix, PROTO_IMPORTS, metric) in kernel.routes


def _advertised(names: Mapping[str, str], plan: Plan, speaker: SpeakerState) -> Iterator[AdvertisedPage]:
    wanted: dict[tuple[str, str], Announcement] = {(a.peer, a.prefix): a for a in plan.announcements or ()}
    for (peer, prefix), a in wanted.items():
        why = speaker.unsendable.get((peer, prefix), "")
        sent = (peer, prefix) in speaker.confirmed
        state = "withheld" if why else "sent" if sent else "not yet"
        yield AdvertisedPage(
            peer=names.get(peer, peer),
            prefix=prefix,
            state=state,
            why=why,
            unsendable=bool(why),
            next_hop=a.next_hop,
            communities=a.communities + a.large_communities,
            as_path=a.as_path,
        )
    for peer, prefix, why in plan.withheld:
        if (peer, prefix) not in wanted:
            yield AdvertisedPage(peer=names.get(peer, peer), prefix=prefix, state="withheld", why=why)
    for peer, prefix in speaker.sent - wanted.keys():
        if peer in names:
            yield AdvertisedPage(peer=names[peer], prefix=prefix, state="not wanted", why="it is being withdrawn")
