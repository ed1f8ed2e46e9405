"""From the mesh to ToRs: which sessions of a mesh that was switched off stay, until neither end needs them. Pure.

A node that can do without the other's routes says so in its own announcements there: GRACEFUL_SHUTDOWN (RFC 8326), by
which the other takes every other path first. A session ends when both ends have said it (decision 18).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from msgspec.structs import replace

from agent.adjrib import AdjRibIn
from agent.bgp.model import Announcement, Family
from agent.plan.identity import Identity
from agent.plan.model import Notes, Snapshot, some
from agent.plan.sessions import Peering, mesh_enabled, mesh_peering
from agent.prefix import PrefixSet, is_prefix, parse
from agent.rib import GRACEFUL_SHUTDOWN, Peer, Refusal, Selection

#: Seconds for which a node must have been able to do without a session before it says so: its ToR has told others by
#: then what it heard of us.
SETTLE: Final = 1.0
#: Seconds from a ToR's coming up until what it does not tell of is taken to be reached by a default route of the node.
UNTOLD: Final = 60.0
#: Seconds that a session outlives the mesh where no BGPPeer takes its place: one may stand further down in the file.
ALONE: Final = 10.0


class Parting(NamedTuple):
    """What becomes of the sessions that stayed so far. Members are addresses of peers, but for ``wake_at``."""

    #: To be given up: neither end needs them.
    gone: frozenset[str] = frozenset()
    #: What is announced there says that this end can do without.
    marked: frozenset[str] = frozenset()
    #: This end can do without, whether it says so yet or not.
    ready: frozenset[str] = frozenset()
    #: Moments at which time alone changes this.
    wake_at: tuple[float, ...] = ()

    def apply(self, announcements: Iterable[Announcement]) -> list[Announcement]:
        """These announcements as they are to be made."""
        return [
            replace(a, communities=tuple(sorted({*a.communities, GRACEFUL_SHUTDOWN}))) if a.peer in self.marked else a
            for a in announcements
            if a.peer not in self.gone
        ]


def staying(me: Identity, snapshot: Snapshot, peered: Container[str]) -> list[Peering]:
    """The sessions of a mesh that was switched off and that are not over yet, as they are. ``peered`` are the addresses
    that BGPPeers have to themselves."""
    if mesh_enabled(snapshot.cluster.configuration):
        return []
    speaker = snapshot.speaker
    return [
        mesh_peering(session, me, snapshot)
        for session in sorted(speaker.sessions)
        if session.mesh
        and session.address not in peered
        and (speaker.inherited or snapshot.rib.awaited(session.address, snapshot.now))
    ]


def part(
    leaving: Iterable[Peering],
    tors: Sequence[Peering],
    families: Container[Family],
    announced: Iterable[Announcement],
    selection: Selection,
    snapshot: Snapshot,
    notes: Notes,
) -> Parting:
    """Which of the sessions that are ``leaving`` go now. ``tors`` are the sessions of BGPPeers, ``families`` those that
    any BGPPeer of this node is for, ``announced`` what is announced."""
    told = {a.peer for a in announced}
    gone, marked, ready, wake_at = set(), set(), set(), []
    covers: dict[Family, Cover] = {}
    for _, peer, _ in leaving:
        (family,) = peer.families
        known = snapshot.rib.peers.get(peer.address)
        delay, why = ALONE, "no BGPPeer takes its place"
        if family in families:
            if family not in covers:
                covers[family] = Cover(family, tors, selection, snapshot)
            delay, why = SETTLE, covers[family].lacking(peer, known)
        if family not in families or not why:
            ready.add(peer.address)
            due = snapshot.ready.get(peer.address, snapshot.now) + delay
            if snapshot.now < due:
                wake_at.append(due)
                why = why or "its routes have just come by BGPPeers"
            elif family not in families or _other_end_is_ready(known, peer.address in told):
                gone.add(peer.address)
                continue
            else:
                marked.add(peer.address)
                why = "the other node is not ready: see there"
        notes.add("MeshLeaving", f"{peer.name} ({peer.address}) stays: {why}")
    wake_at += [cover.patience_ends for cover in covers.values()]
    return Parting(frozenset(gone), frozenset(marked), frozenset(ready), tuple(wake_at))


def _other_end_is_ready(known: AdjRibIn | None, we_announce: bool) -> bool:
    """It says so in all that it announces, or the session is down. One that announces nothing cannot say so: it ends
    the session itself when it hears it of us."""
    if known is None or not known.up:
        return True
    if not known.routes:
        return not we_announce
    return all(GRACEFUL_SHUTDOWN in route.attributes.communities for route in known.routes.values())


class Cover:
    """What the BGPPeers of one family lead to, as far as they are up and have told all that they have."""

    def __init__(self, family: Family, tors: Iterable[Peering], selection: Selection, snapshot: Snapshot) -> None:
        rib, now = snapshot.rib, snapshot.now
        self._family, self._rib, self._now, self._refused = family, rib, now, selection.refused
        self._tors: list[tuple[Peer, AdjRibIn]] = [
            (peer, known)
            for _, peer, _ in tors
            if family in peer.families
            and (known := rib.peers.get(peer.address)) is not None
            and known.up
            and known.reported(family, now)
        ]
        #: When what no BGPPeer tells of will be taken to be reached otherwise.
        self.patience_ends = min((known.since for _, known in self._tors), default=now - UNTOLD) + UNTOLD

    def lacking(self, mesh: Peer, known: AdjRibIn | None) -> str:
        """Why this node still needs that session of the mesh, in words; "" if it does not."""
        if not self._tors:
            return "no BGPPeer of this node is up and has told all its routes"
        if known is None:
            return ""
        if known.up and not known.reported(self._family, self._now):
            return "it has not told all its routes"
        refused = self._refused.get(mesh.address, {})
        used = sorted(prefix for prefix in known.routes if prefix not in refused and not self._leads_to(prefix))
        refusals = [f"{prefix} is refused of {why}" for prefix in used if (why := self._refusal(prefix))]
        if refusals:
            return ", ".join(some(refusals, 2))
        return f"no BGPPeer tells of {', '.join(some(used, 2))}" if used and self._now < self.patience_ends else ""

    def _leads_to(self, prefix: str) -> bool:
        exactly = any(prefix in known.routes and not self._refuses(peer, prefix) for peer, known in self._tors)
        return exactly or self._around.covers(parse(prefix))

    def _refusal(self, prefix: str) -> str:
        """A ToR tells of it, and it does not come in; what a filter rejects is meant to be reached otherwise."""
        for peer, known in self._tors:
            why = self._refused.get(peer.address, {}).get(prefix) if prefix in known.routes else None
            if why not in (None, Refusal.RejectedByFilter):
                return f"{peer.name}: {why.value}"
        return ""

    def _refuses(self, peer: Peer, prefix: str) -> bool:
        return prefix in self._refused.get(peer.address, {})

    @cached_property
    def _around(self) -> PrefixSet:
        return PrefixSet(
            prefix
            for peer, known in self._tors
            for prefix in known.routes
            if is_prefix(prefix) and not self._refuses(peer, prefix)
        )
