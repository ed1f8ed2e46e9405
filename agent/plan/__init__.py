"""The plan: from all that store, kernel, peers and speaker say to all that is wanted of them. Pure.

``plan`` reads one ``Snapshot`` and returns one ``Plan``; nothing is remembered between two. Order (R9) comes of that: a
block is announced only once its blackhole *is seen* in the kernel, and loses its blackhole only once its withdrawal *is
seen* to be sent. Each module decides one part: ``identity``, ``sessions``, ``exports`` (blocks and announcements),
``imports``, ``pods``, ``leaving`` (a mesh that was switched off), ``draining``, and ``notes`` what people should know.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from agent.adjrib import FAMILIES, family_of
from agent.bgp.model import Family
from agent.fib import Route, RouteKey
from agent.plan.draining import SHUTDOWN, drain, why_drained
from agent.plan.exports import (
    NO_BLACKHOLE,
    SETTLE,
    advertisements,
    announce,
    blackhole,
    fresh_blocks,
    routed_elsewhere,
    standing_blocks,
    still_announced,
)
from agent.plan.identity import Identity, identify
from agent.plan.imports import import_policy, imports, inhabited, uplink_sysctls, uplinks, ways_to_peers
from agent.plan.leaving import part, staying
from agent.plan.model import Cluster, Notes, Plan, Snapshot, usable
from agent.plan.notes import (
    note_forwarding,
    note_no_pool,
    note_own_blocks,
    note_refused_routes,
    note_speaker,
    note_standing,
)
from agent.plan.pods import REPAIR_AFTER, missing_pod_routes, overdue
from agent.plan.sessions import below_maximum, mesh_sessions, peer_sessions
from agent.rib import Peer
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS

__all__ = ["Cluster", "Plan", "Snapshot", "plan"]


def plan(snapshot: Snapshot) -> Plan:
    """The whole plan for this snapshot. Equal snapshots give equal plans."""
    notes = Notes()
    kernel, cluster = snapshot.kernel, snapshot.cluster
    me = identify(snapshot, notes)
    pools = [pool for pool in cluster.pools if usable(pool, notes)]

    peered = peer_sessions(me, snapshot, notes) if me.local_as else {}
    tors = [peering for peering in peered.values() if peering is not None]
    meshed = mesh_sessions(me, snapshot, peered, notes) if me.local_as else []
    leaving = staying(me, snapshot, peered) if me.local_as else []
    wanted = [*tors, *meshed, *leaving]
    peers = tuple(sorted((peering.peer for peering in wanted), key=lambda p: p.address))
    peerings = [peering for peering in wanted if below_maximum(peering.peer, snapshot.rib, notes)]

    held = {prefix for prefix, protocol, _ in kernel.routes if protocol == PROTO_BLOCKS}
    standing = standing_blocks(snapshot, held)
    fresh = fresh_blocks(standing - held, snapshot)
    known = (standing - fresh) | {cidr for cidr in held - standing if still_announced(cidr, snapshot)}
    # R9: install, then announce.
    exported, withheld = announce(standing & held, peerings, pools, advertisements(cluster, me.name, notes))
    why = why_drained(cluster.node, notes)
    announcements, due = drain(exported, why, snapshot, notes)
    gone = {(a.peer, a.prefix) for a in exported} - {(a.peer, a.prefix) for a in announcements}
    withheld += [(peer, prefix, "the node is drained") for peer, prefix in gone]
    on_the_wire = {a.prefix for a in announcements} | {prefix for _, prefix in snapshot.speaker.sent}

    policy = import_policy(me, peers, pools, known, snapshot)
    selection = snapshot.rib.select(policy)
    parting = part(leaving, tors, {family_of(a) for a in peered}, announcements, selection, snapshot, notes)
    if parting.gone:
        peers = tuple(peer for peer in peers if peer.address not in parting.gone)
        selection = snapshot.rib.select(replace(policy, peers=peers))
    sessions = [peering.session for peering in peerings if peering.peer.address not in parting.gone]
    # R5: what others announce stays in the kernel, where the CNI server sees it, and the block has no blackhole.
    foreign = routed_elsewhere(fresh, selection, notes)
    blackholes = known | (fresh - foreign)
    withheld += [
        ("", cidr, "somebody else's route is in it: ForeignRoute" if cidr in foreign else NO_BLACKHOLE)
        for cidr in standing - held
    ]
    missing = missing_pod_routes(snapshot)

    routes: dict[RouteKey, Route] = {}
    for route in (
        *(blackhole(cidr) for cidr in blackholes),
        *(route for address, route in missing.items() if overdue(address, snapshot)),
        *imports(selection, me, kernel.links),
        # Last: what a peer says of the way to itself does not count where a BGPPeer says it.
        *ways_to_peers(peers, me, known, kernel, notes),
    ):
        routes[route.key] = route

    note_no_pool(snapshot, notes)
    note_standing(cluster, notes)
    note_speaker(snapshot, sessions, notes)
    note_refused_routes(peers, selection, notes)
    note_own_blocks(peers, selection, snapshot.rib, notes)
    note_forwarding(kernel, standing, notes)
    return Plan(
        routes=routes,
        deletable=deletable(snapshot, me, peers),
        sysctls=uplink_sysctls(uplinks(routes.values(), peers), kernel),
        sessions=frozenset(sessions) if me.local_as else None,
        # What is withdrawn already only the speaker knows: until it says so, it keeps what it has.
        announcements=frozenset(parting.apply(announcements))
        if me.local_as and not (why and not snapshot.speaker.known)
        else None,
        peers=peers,
        conditions=notes.conditions(),
        selection=selection,
        local_as=me.local_as,
        router_id=me.router_id,
        addresses=tuple(me.addresses[family] for family in FAMILIES if family in me.addresses),
        detected=me.detected,
        missing=frozenset(missing),
        ready=parting.ready,
        withheld=tuple(sorted(withheld)),
        inhabited=inhabited(cluster, known, selection),
        going_down=why == SHUTDOWN and any(a.prefix in on_the_wire for a in exported),
        wake_at=wake_at(snapshot, held - standing, missing, (*parting.wake_at, *due)),
    )


def deletable(snapshot: Snapshot, me: Identity, peers: Iterable[Peer]) -> frozenset[tuple[int, Family]]:
    """R8: nothing is deleted before every source has reported once. For blocks the sources are the store and the
    speaker; for imports also each peer of the family. Pod routes are the CNI server's to delete (R10)."""
    if not (snapshot.cluster.live and snapshot.speaker.known):
        return frozenset()
    blocks = {(PROTO_BLOCKS, family) for family in FAMILIES}
    if not me.local_as:
        return frozenset(blocks)
    peers = tuple(peers)
    return frozenset(blocks) | {
        (PROTO_IMPORTS, family)
        for family in FAMILIES
        if all(snapshot.rib.reported(p, family, snapshot.now) for p in peers if family in p.families)
    }


def wake_at(snapshot: Snapshot, going: Iterable[str], missing: Iterable[str], others: Iterable[float]) -> float | None:
    """The first moment from now on at which time alone changes the plan."""
    at = [snapshot.rib.deadline(snapshot.now), *others]
    at += [t + SETTLE for cidr in going if (t := snapshot.speaker.withdrawn_at.get(cidr)) is not None]
    at += [snapshot.missing.get(address, snapshot.now) + REPAIR_AFTER for address in missing]
    return min((t for t in at if t is not None and t > snapshot.now), default=None)
