"""Blocks, and what is announced of them (R9, R12). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final, NamedTuple

from agent import filters
from agent.adjrib import family_of
from agent.bgp.model import Announcement, Session
from agent.fib import KernelState, Route
from agent.plan.model import Cluster, Notes, Snapshot, usable
from agent.plan.sessions import Peering
from agent.prefix import PrefixSet, is_prefix, length_of, parse, subnet
from agent.rib import Selection
from cni.marks import METRIC_BLOCKS, PROTO_BLOCKS, PROTO_PODS
from store.model import IPAMBlock, IPPool

#: Seconds from the report of a withdrawal to the removal of the blackhole: packets under way have arrived (R9).
SETTLE: Final = 1.0


def standing_blocks(snapshot: Snapshot, held: set[str]) -> set[str]:
    """The blocks that are to be announced: our own that are not on their way out, and any with live pods (R14)."""
    blocks = [b for b in snapshot.cluster.blocks if is_prefix(b.spec.cidr)]
    own, leaving = {b.spec.cidr for b in blocks}, {b.spec.cidr for b in blocks if is_leaving(b)}
    if not snapshot.cluster.live:
        own |= held  # claimed since the view was written, perhaps
    in_question = (held | leaving) - (own - leaving)
    return (own - leaving) | (with_live_pods(in_question, snapshot.kernel) - snapshot.cluster.taken)


def fresh_blocks(cidrs: set[str], snapshot: Snapshot) -> set[str]:
    """Those of these blocks without blackhole that no pod of ours lives in and no peer was told of: newly claimed, or
    from before a boot, or from a backup of the store."""
    announced = {prefix for _, prefix in snapshot.speaker.sent}
    return cidrs - announced - with_live_pods(cidrs, snapshot.kernel)


def routed_elsewhere(fresh: set[str], selection: Selection, notes: Notes) -> set[str]:
    """Those of the new blocks that a peer's route is equal to or inside of: somebody else uses them (R5)."""
    if not fresh:
        return set()
    blocks, found = PrefixSet(fresh), set()
    for prefix, hops in selection.best.items():
        if blocks.covers(parse(prefix)):
            cidr = next(c for c in fresh if PrefixSet([c]).covers(parse(prefix)))
            found.add(cidr)
            notes.add(
                "ForeignRoute",
                f"{prefix} via {' and '.join(h.gateway for h in hops)} is in the new block {cidr}, which is neither "
                f"used nor announced until that route is gone: does another cluster have a pool here?",
            )
    return found


def is_leaving(block: IPAMBlock) -> bool:
    """The owner gives it back (R4), or somebody deleted it (R5)."""
    return block.status.releasing or bool(block.metadata.deletion_timestamp)


def with_live_pods(cidrs: set[str], kernel: KernelState) -> set[str]:
    """Those in which a pod has its route."""
    lengths = {(family_of(cidr), length_of(cidr)) for cidr in cidrs}
    populated = set()
    for prefix, protocol, _ in kernel.routes:
        if protocol == PROTO_PODS:
            address = prefix.partition("/")[0]
            populated |= {subnet(address, length) for family, length in lengths if family == family_of(address)}
    return cidrs & populated


def still_announced(cidr: str, snapshot: Snapshot) -> bool:
    """R9: withdrawn means that every peer that is up was told, and a second passed."""
    speaker = snapshot.speaker
    if not speaker.known or any(prefix == cidr for _, prefix in speaker.sent):
        return True
    at = speaker.withdrawn_at.get(cidr)
    return at is not None and snapshot.now < at + SETTLE


def blackhole(cidr: str) -> Route:
    """What is in no pod's route goes nowhere, instead of back to the ToR."""
    return Route(prefix=cidr, protocol=PROTO_BLOCKS, metric=METRIC_BLOCKS, kind="blackhole")


#: Peer ("": every one), prefix, and why the peer is not told.
Withheld = tuple[str, str, str]
#: R9: install, then announce.
NO_BLACKHOLE: Final = "its blackhole is not in the kernel yet"


class Advertisement(NamedTuple):
    """What every peer hears blocks inside a prefix with."""

    within: PrefixSet
    communities: tuple[str, ...]


def advertisements(cluster: Cluster, node: str, notes: Notes) -> list[Advertisement]:
    """The node's own prefixAdvertisements if it has any, else the cluster's; names become what they stand for."""
    own = [c for c in cluster.node_configurations if c.name == f"node.{node}"]
    for configuration in (*own, cluster.configuration):
        if configuration is None or not configuration.spec.prefix_advertisements or not usable(configuration, notes):
            continue
        named = {c.name: filters.canonical(c.value) for c in configuration.spec.communities}
        return [
            Advertisement(PrefixSet([one.cidr]), tuple(named.get(text, text) for text in one.communities))
            for one in configuration.spec.prefix_advertisements
        ]
    return []


def announce(
    blocks: set[str], peerings: Iterable[Peering], pools: Iterable[IPPool], advertised: Sequence[Advertisement] = ()
) -> tuple[list[Announcement], list[Withheld]]:
    """Each block to each peer of its family, next hop our end of the session; not those of disableBGPExport pools, nor
    what the peer's filters reject (R12)."""
    private = [(pool.name, PrefixSet([pool.spec.cidr])) for pool in pools if pool.spec.disable_bgp_export]
    exported = []
    for cidr in blocks:
        prefix = parse(cidr)
        given = (one.communities for one in advertised if one.within.covers(prefix))
        candidate = filters.Candidate(prefix, communities=tuple(chain.from_iterable(given)))
        exported.append((cidr, candidate, next((name for name, pool in private if pool.covers(prefix)), "")))
    found: list[Announcement] = []
    withheld: list[Withheld] = []
    for session, _, exports in peerings:
        for cidr, candidate, pool in exported:
            if family_of(cidr) not in session.families:
                continue
            rule = exports.decide(candidate)
            if pool:
                withheld.append((session.address, cidr, f"IPPool {pool} has disableBGPExport"))
            elif rule.accept:
                found.append(announcement(cidr, session, rule, candidate.communities))
            else:
                withheld.append((session.address, cidr, f"{rule.name} rejects it"))
    return found, withheld


def announcement(cidr: str, session: Session, rule: filters.Rule, given: Sequence[str] = ()) -> Announcement:
    """The block as this peer is to hear of it: with the communities ``given`` to all, and what the export rule adds."""
    communities, large = filters.split_communities((*given, *rule.add))
    # An AS_PATH that is said is sent as it is; an eBGP peer expects our AS first (RFC 4271, 5.1.2).
    own = (session.local_as,) if session.peer_as != session.local_as else ()
    return Announcement(
        peer=session.address,
        prefix=cidr,
        next_hop=session.local_address,
        communities=communities,
        large_communities=large,
        as_path=own + rule.prepend if rule.prepend else (),
    )
