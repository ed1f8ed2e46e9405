"""What people should know of a plan: its conditions. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agent.adjrib import family_of
from agent.bgp.model import Session
from agent.fib import KernelState
from agent.plan.model import Cluster, Notes, Snapshot, some
from agent.rib import Peer, Refusal, Rib, Selection, count_refusals


def note_standing(cluster: Cluster, notes: Notes) -> None:
    """R13: what cannot be used any more stands as it last could be."""
    for what, why in cluster.standing.items():
        notes.add("ObjectNotUsable", f"{what}: {why}; it stands as it last could be used")


def note_no_pool(snapshot: Snapshot, notes: Notes) -> None:
    """Without a pool no pod has an address; why there is none is known to whoever would have made the first ones."""
    if snapshot.why_no_pool and snapshot.cluster.live and not snapshot.cluster.pools:
        notes.add("NoPool", snapshot.why_no_pool)


def note_speaker(snapshot: Snapshot, sessions: Iterable[Session], notes: Notes) -> None:
    """Sessions that are refused, and peers that would drop our routes when the speaker restarts (R14)."""
    if not snapshot.cluster.live:
        notes.add(
            "StoreUnreachable", "the store cannot be reached: working from the last good view; nothing is deleted"
        )
    if not snapshot.speaker.known:
        notes.add("SpeakerUnreachable", "the speaker has not told its table: is underlay-speaker running?")
    for (peer, prefix), why in sorted(snapshot.speaker.unsendable.items()):
        notes.add("NotAnnounced", f"{prefix} to {peer}: {why}")
    for session in sessions:
        if session.address in snapshot.speaker.refused:
            notes.add("SessionRefused", f"{session.name}: {snapshot.speaker.refused[session.address]}")
        known = snapshot.rib.peers.get(session.address)
        if known and known.up and not known.helper:
            message = f"{session.name}: a restart of the speaker loses packets; switch graceful restart on at the peer"
            notes.add("GracefulRestartNotNegotiated", message)


#: Refusals that are worth a look; the others are what the policy is for.
_TELLING: Final = (
    Refusal.InvalidPrefix,
    Refusal.FirstASNotPeer,
    Refusal.OwnOriginator,
    Refusal.OwnClusterList,
    Refusal.NextHopInvalid,
    Refusal.NextHopFamily,
    Refusal.NextHopIsSelf,
)


def note_refused_routes(peers: Iterable[Peer], selection: Selection, notes: Notes) -> None:
    for peer in peers:
        counts = count_refusals(selection.refused.get(peer.address, {}))
        if not counts:
            continue
        for refusal, count in counts.items():
            if refusal is Refusal.NextHopNotOnLink:
                notes.add("NextHopNotOnLink", f"{peer.name}: {count} prefixes: {refusal.value}")
            elif refusal in _TELLING:
                notes.add("RoutesRefused", f"{peer.name}: {count} prefixes, {refusal.name}: {refusal.value}")


def note_own_blocks(peers: Iterable[Peer], selection: Selection, rib: Rib, notes: Notes) -> None:
    """Somebody else announces what is in a block that is in use here. Our own announcement that comes back (where
    numAllowedLocalASNumbers lets it) has our AS in its path."""
    for peer in peers:
        prefixes = sorted(
            prefix
            for prefix, why in selection.refused.get(peer.address, {}).items()
            if why is Refusal.OwnBlock
            and peer.local_as not in rib.peers[peer.address].routes[prefix].attributes.as_path
        )
        if prefixes:
            notes.add(
                "ForeignRoute",
                f"{peer.name} announces {', '.join(some(prefixes))}, in a block of this node: refused, but pods of "
                f"that block are perhaps not reached from elsewhere; another cluster with a pool here, or a node that "
                f"the store knows no more, is to be given other addresses",
            )


def note_forwarding(kernel: KernelState, blocks: Iterable[str], notes: Notes) -> None:
    """A node that does not forward has pods that nobody reaches."""
    families = {family_of(cidr) for cidr in blocks}
    for family, key in (("ipv4 unicast", "net.ipv4.ip_forward"), ("ipv6 unicast", "net.ipv6.conf.all.forwarding")):
        if family in families and kernel.sysctls.get(key) == "0":
            notes.add("ForwardingOff", f"{key} is 0: pods are reached by this node alone; set it to 1")
