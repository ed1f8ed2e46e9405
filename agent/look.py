"""What people see of BGP on a node: its peers, what they told and what became of it, what they are told or not. Pure.

Made on demand from what the loop holds; nothing is worked out for it beforehand. The structs are the wire to
``underlayctl bgp``, as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Final

import msgspec

from agent.bgp.history import History
from agent.bgp.model import Announcement, Change, Received, SpeakerState
from agent.bgp.notification import reason_in_words
from agent.fib import KernelState
from agent.plan import Plan
from agent.rib import Fate, Peer, Rib
from cni.marks import METRIC_FALLBACK, METRIC_IMPORTS, PROTO_IMPORTS
from store.model import BGPNodeStatusStatus, SessionStatus

#: Rows of an answer, unless somebody asks for more.
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
    next_hop: str = ""
    communities: tuple[str, ...] = ()
    as_path: tuple[int, ...] = ()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of rows is filled. ``more``: rows that were left off."""

    node: str
    peers: tuple[PeerPage, ...] = ()
    routes: tuple[RoutePage, ...] = ()
    advertised: tuple[AdvertisedPage, ...] = ()
    more: int = 0


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """``peer``: by name or address; ``prefix``: this very one; "" for all."""

    peer: str = ""
    prefix: str = ""
    limit: int = LIMIT


def asked(query: Mapping[str, str]) -> Asked:
    """What a query's values ask for. Raises ValueError for a limit that is no number."""
    limit = query.get("limit", str(LIMIT))
    if not (limit.isascii() and limit.isdigit()):
        raise ValueError(f"limit={limit}: write a number of rows")
    return Asked(peer=query.get("peer", ""), prefix=query.get("prefix", ""), limit=int(limit))


def peers(node: str, status: BGPNodeStatusStatus, rib: Rib, history: History, question: Asked) -> Answer:
    """The peers, with what their sessions agreed on, and what became of them."""
    rows = [
        _peer(session, rib, history)
        for session in status.sessions
        if question.peer in ("", session.peer, session.address)
    ]
    return Answer(node=node, peers=tuple(rows[: question.limit]), more=max(0, len(rows) - question.limit))


def routes(node: str, plan: Plan, rib: Rib, kernel: KernelState, question: Asked, *, best: bool) -> Answer:
    """Everything that peers told and what became of it; ``best``: of prefixes that are let in alone."""
    chosen = [p for p in plan.peers if question.peer in ("", p.name, p.address)]
    told = {prefix for peer in chosen for prefix in _told(rib, peer)}
    prefixes = [question.prefix] if question.prefix else sorted(told)
    if best:
        prefixes = [prefix for prefix in prefixes if prefix in plan.selection.best]
    names = {p.address: p.name for p in chosen}
    rows: Iterator[RoutePage] = (
        _route(names[fate.peer], prefix, fate, kernel)
        for prefix in prefixes
        for fate in rib.explain(prefix)
        if fate.peer in names
    )
    shown = tuple(islice(rows, question.limit))
    whole = sum(prefix in _told(rib, peer) for peer in chosen for prefix in prefixes)
    return Answer(node=node, routes=shown, more=whole - len(shown))


def advertised(node: str, plan: Plan, speaker: SpeakerState, question: Asked) -> Answer:
    """What each peer is told, and what it is not, and why."""
    names = {p.address: p.name for p in plan.peers}
    rows = sorted(_advertised(names, plan, speaker), key=lambda row: (row.peer, row.prefix))
    addresses = {p.name: p.address for p in plan.peers}
    rows = [
        row
        for row in rows
        if question.peer in ("", row.peer, addresses.get(row.peer, "")) and question.prefix in ("", row.prefix)
    ]
    return Answer(node=node, advertised=tuple(rows[: question.limit]), more=max(0, len(rows) - question.limit))


def _told(rib: Rib, peer: Peer) -> Mapping[str, Received]:
    known = rib.peers.get(peer.address)
    return known.routes if known else {}


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
    metric = METRIC_FALLBACK if prefix.endswith("/0") else METRIC_IMPORTS
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
        in_kernel=(prefix, PROTO_IMPORTS, metric) in kernel.routes,
    )


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
