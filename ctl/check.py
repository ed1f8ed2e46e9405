"""``ipam check``: what is wrong with pools, blocks and addresses, from one look at all of them. Pure.

Each rule is a function from the look to findings; ``ctl.check_node`` has those that compare the store with one node,
``ctl.check_pods`` those that compare it with Kubernetes' pods, ``ctl.check_events`` those on what nodes say in Events.
A rule that needs what could not be read says nothing: the caller says that it could not be read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, TypeVar

import msgspec

from ctl.check_events import compare_events, condition_holds
from ctl.check_node import compare_node
from ctl.check_pods import compare_pods
from ctl.finding import Finding, Kind, Place, Range, View, ask_server, holder, number
from ctl.kinds import reference
from ipam.block import merge
from ipam.ledger import UNKNOWN
from store.model import BLOCK_LIMIT, IPAMBlock, IPAMBlockStatus, IPPool, IPReservation, release_wanted
from store.validate import block_size, validate

T = TypeVar("T")

#: Seconds; a block that is marked for deletion is to be gone by then, or its pods stand in the way.
MARKED_LONG: Final = 600.0
#: Seconds; by then a new block's owner has written its status.
SILENT_LONG: Final = 60.0


def findings(view: View, nodes: frozenset[str] = frozenset()) -> tuple[Finding, ...]:
    """Everything that is wrong, in a stable order; with ``nodes`` only what concerns their blocks. What is only on its
    way between node and store is among it: look again (``ctl.finding.SETTLE``)."""
    found = [f for rule in _RULES for f in rule(view)]
    if nodes:
        found = [f for f in found if nodes.intersection(f.nodes)]
    return tuple(sorted(found, key=lambda f: (f.kind, f.object, f.address, f.what)))


# -- pools and blocks ------------------------------------------------------------------------------------------------


def _refused(view: View) -> Iterator[Finding]:
    """Objects that no store takes today: written by an older release, or past every check."""
    objects: list[tuple[IPPool | IPAMBlock, tuple[str, ...]]] = [(p, ()) for p in view.pools or ()]
    # What is wrong in a status has rules of its own.
    objects += [(msgspec.structs.replace(b, status=IPAMBlockStatus()), (b.spec.node,)) for b in view.blocks]
    for obj, nodes in objects:
        problems = validate(obj)
        if problems:
            yield Finding(
                "ObjectRefused",
                reference(obj),
                obj.spec.cidr,
                nodes,
                "; ".join(f"{p.field}: {p.value!r}" for p in problems),
                "; ".join(p.remedy for p in problems),
            )


def _pools_overlap(view: View) -> Iterator[Finding]:
    for inner, outer in _overlaps([(r, p) for p in view.pools or () if (r := Range.of(p.spec.cidr))]):
        yield Finding(
            "PoolsOverlap",
            reference(inner),
            inner.spec.cidr,
            (),
            f"it overlaps {reference(outer)} ({outer.spec.cidr})",
            "delete one of the two: an address could be handed out from both",
        )


def _blocks_of_pools(view: View) -> Iterator[Finding]:
    """Blocks whose pool is gone, or is not what it was when they were cut from it."""
    if view.pools is None:
        return
    pools = {p.name: (p, Range.of(p.spec.cidr)) for p in view.pools}
    for place in _places(view):
        spec = place.block.spec
        pool, within = pools.get(spec.pool, (None, None))
        if pool is None:
            yield _of_block(
                place,
                "PoolMissing",
                f"there is no ippool/{spec.pool}",
                f"create ippool/{spec.pool} again as it was, or let the pods of this block go: its node then gives it "
                f"back",
            )
        elif within is None:
            continue  # that the pool is no pool has been said
        elif not within.holds(place.range):
            yield _of_block(
                place,
                "BlockOutsidePool",
                f"it is not inside ippool/{pool.name} ({pool.spec.cidr})",
                "the pool was made anew with another cidr: let the pods of this block go, then delete the block",
            )
        elif (size := block_size(pool)) is not None and spec.cidr.rpartition("/")[2] != str(size):
            yield _of_block(
                place,
                "BlockSizeDiffers",
                f"blocks of ippool/{pool.name} are /{size}",
                "the pool was made anew with another blockSize: let the pods of this block go, then delete the block",
            )


def _blocks_overlap(view: View) -> Iterator[Finding]:
    for inner, outer in _overlaps([(place.range, place.block) for place in _places(view)]):
        yield Finding(
            "BlocksOverlap",
            reference(inner),
            inner.spec.cidr,
            tuple(dict.fromkeys((inner.spec.node, outer.spec.node))),
            f"it is of {inner.spec.node}, and overlaps {reference(outer)} ({outer.spec.cidr}) of {outer.spec.node}",
            "let the pods of one of the two go, then delete that block",
        )


# -- blocks and their owners -----------------------------------------------------------------------------------------


def _owners(view: View) -> Iterator[Finding]:
    """Whether each block has an owner, and whether the owner looks after it."""
    for place in _places(view):
        block, node = place.block, place.node
        if not _lives(view, block):
            yield _of_block(
                place,
                "BlockOfNoNode",
                f"there is no node/{node}; {block.status.used} of the addresses are recorded as in use",
                f"if that machine is gone for good: underlayctl ipam release --block {block.spec.cidr}; if it runs, "
                f"let it register again",
            )
        elif _age(block.metadata.deletion_timestamp, view.now) > MARKED_LONG:
            yield _of_block(
                place,
                "BlockDeleting",
                f"it is marked for deletion since {block.metadata.deletion_timestamp}, and {node} still has it",
                f"let its pods on {node} go: the block goes with the last one; if {node} is gone for good, delete its "
                f"Node, then: underlayctl ipam release --block {block.spec.cidr}",
            )
        elif block.status.releasing and not block.metadata.deletion_timestamp:
            yield _of_block(
                place,
                "BlockReleasing",
                f"{node} wants to give it back, and does not come to an end",
                f"it waits for the agent of {node} to withdraw it: underlayctl node status {node}",
            )
        elif block.status.writer is None and _age(block.metadata.creation_timestamp, view.now) > SILENT_LONG:
            yield _of_block(
                place,
                "NotMirrored",
                f"{node} has never said what it handed out of it",
                ask_server(f"on {node}"),
            )


def _releases(view: View) -> Iterator[Finding]:
    for place in _places(view):
        wanted = release_wanted(place.block)
        if wanted and _lives(view, place.block):
            yield _of_block(
                place,
                "ReleasePending",
                f"{place.node} was asked to release {', '.join(wanted)}, and has not done it",
                ask_server(f"on {place.node}"),
            )


def _writers(view: View) -> Iterator[Finding]:
    """A server that starts writes all blocks of its node anew, so they have one writer soon."""
    by_node: dict[str, set[tuple[str, int]]] = {}
    for block in view.blocks:
        writer = block.status.writer
        if writer is not None and _lives(view, block):
            by_node.setdefault(block.spec.node, set()).add((writer.boot_id, writer.start))
    for node, writers in by_node.items():
        if len(writers) > 1:
            who = ", ".join(f"boot {boot} start {start}" for boot, start in sorted(writers))
            yield Finding(
                "WritersDiffer",
                f"node/{node}",
                "",
                (node,),
                f"its blocks were written by different CNI servers: {who}",
                f"two machines with the name {node}, or a server that cannot write all of its blocks: the log of "
                f"underlay-cni on {node} says which",
            )


def _conditions(view: View) -> Iterator[Finding]:
    """What the CNI server says of itself; it says so in each of its blocks."""
    said = {
        (block.spec.node, c.type, c.reason, c.message)
        for block in view.blocks
        for c in block.status.conditions
        if c.status == "True" and _lives(view, block)
    }
    for words in said:
        yield condition_holds(*words)


def _events(view: View) -> Iterator[Finding]:
    """The same of nodes that no block speaks for. Where one does, an Event may be of what is over by now."""
    written = frozenset(block.spec.node for block in view.blocks if block.status.writer is not None)
    yield from compare_events(view.events or (), written, view.nodes, view.now)


# -- addresses ---------------------------------------------------------------------------------------------------------


def _allocations(view: View) -> Iterator[Finding]:
    """Each address inside its block, of one holder; each holder with one address of a family."""
    held: dict[Range, str] = {}
    of_holder: dict[tuple[str, str, str, int], str] = {}
    for place in _places(view):
        for a in place.block.status.allocations:
            at = number(a.address)
            inside = at is not None and place.range.holds(at)
            if not inside:
                yield _of_address(
                    place,
                    "AllocationOutsideBlock",
                    a.address,
                    f"{holder(a)} on {place.node} has it, and it is not inside {place.block.spec.cidr}",
                    f"restart underlay-cni on {place.node}, which writes what it knows; if it stays, delete the pod",
                )
            who = f"{holder(a)} on {place.node}"
            if at is not None and at in held:
                yield _of_address(
                    place,
                    "AddressTwice",
                    a.address,
                    f"both {held[at]} and {who} have it",
                    "packets reach one of the two at best: delete one of the pods, or both",
                )
                continue
            if at is None or not inside:
                continue
            held[at] = who
            if a.container == UNKNOWN:
                yield _of_address(
                    place,
                    "HolderUnknown",
                    a.address,
                    f"a route of {place.node} leads to it (link {a.interface}), and no record says for whom",
                    f"it is handed out to nobody else; delete the pod behind that link on {place.node}, and it is free",
                )
                continue
            key = (a.network, a.container, a.interface, at.version)
            if key in of_holder:
                yield _of_address(
                    place,
                    "AttachmentTwice",
                    a.address,
                    f"{who} has {of_holder[key]} too, of the same family",
                    f"the pod uses one of the two: see which on {place.node}, then release the other: underlayctl ipam "
                    f"release --ip ADDRESS",
                )
            of_holder.setdefault(key, a.address)


def _counts(view: View) -> Iterator[Finding]:
    """``used`` and ``free`` against the allocations. A resting address is free (ipam.block)."""
    reserved = None if view.reservations is None else _Reserved(view.reservations)
    for place in _places(view):
        status = place.block.status
        if status.writer is None:
            continue
        used = len(status.allocations)
        free = status.free
        if reserved is not None:
            held = sum(1 for a in status.allocations if (at := number(a.address)) and reserved.covers(at))
            handed_out = place.range.first_ones(BLOCK_LIMIT)
            free = handed_out.size - used - (reserved.within(handed_out) - held)
        if (status.used, status.free) != (used, free):
            yield _of_block(
                place,
                "CountsDisagree",
                f"it says {status.used} used, {status.free} free; by allocations and reservations it is {used}, {free}",
                f"{place.node} counts anew at its next change of the block; if it stays, restart underlay-cni there",
            )


def _reserved_in_use(view: View) -> Iterator[Finding]:
    reserved = _Reserved(view.reservations or ())
    for place in _places(view):
        for a in place.block.status.allocations:
            at = number(a.address)
            if at is not None and reserved.covers(at):
                names = ", ".join(reserved.names(at))
                yield _of_address(
                    place,
                    "ReservedInUse",
                    a.address,
                    f"{holder(a)} on {place.node} has it, and {names} reserves it",
                    "delete the pod: the address is not handed out again; or change the reservation",
                )


class _Reserved:
    """What the reservations cover, quick to ask for every address of a cluster."""

    def __init__(self, reservations: Iterable[IPReservation]) -> None:
        self._named = [(r, reference(o)) for o in reservations for c in o.spec.reserved_cidrs if (r := Range.of(c))]
        self._ranges = {v: merge([(r.first, r.last) for r, _ in self._named if r.version == v]) for v in (4, 6)}

    def covers(self, at: Range) -> bool:
        ranges = self._ranges[at.version]
        i = bisect_left(ranges, at.first, key=lambda r: r[1])
        return i < len(ranges) and ranges[i][0] <= at.first

    def within(self, where: Range) -> int:
        """How many addresses of the range are reserved."""
        total = 0
        ranges = self._ranges[where.version]
        for first, last in ranges[bisect_left(ranges, where.first, key=lambda r: r[1]) :]:
            if first > where.last:
                break
            total += min(last, where.last) - max(first, where.first) + 1
        return total

    def names(self, at: Range) -> list[str]:
        return sorted({name for r, name in self._named if r.holds(at)})


def _pods(view: View) -> Iterator[Finding]:
    if view.pods is not None:
        yield from compare_pods(view.pods, list(_places(view)), view.pools, view.nodes, view.local)


def _local(view: View) -> Iterator[Finding]:
    if view.local is not None:
        yield from compare_node(view.local, list(_places(view)))


_RULES = (
    _refused,
    _pools_overlap,
    _blocks_of_pools,
    _blocks_overlap,
    _owners,
    _releases,
    _writers,
    _conditions,
    _events,
    _allocations,
    _counts,
    _reserved_in_use,
    _pods,
    _local,
)

# -- parts -------------------------------------------------------------------------------------------------------------


def _places(view: View) -> Iterator[Place]:
    """The blocks whose CIDR can be read; that one cannot is a finding of its own."""
    return (Place(block, at) for block in view.blocks if (at := Range.of(block.spec.cidr)))


def _lives(view: View, block: IPAMBlock) -> bool:
    """Whether its owner may still write it, as far as is known."""
    return view.nodes is None or block.spec.node in view.nodes


def _overlaps(objects: Sequence[tuple[Range, T]]) -> Iterator[tuple[T, T]]:
    """Pairs (inner, outer) that share addresses; of several that lie around one, the nearest. Two CIDRs never cross:
    one lies inside the other, or apart."""
    around: list[tuple[Range, T]] = []
    for at, obj in sorted(objects, key=lambda o: (o[0].version, o[0].first, -o[0].last)):
        while around and not around[-1][0].holds(at):
            around.pop()
        if around:
            yield obj, around[-1][1]
        around.append((at, obj))


def _of_block(place: Place, kind: Kind, what: str, remedy: str) -> Finding:
    return Finding(kind, reference(place.block), place.block.spec.cidr, (place.node,), what, remedy)


def _of_address(place: Place, kind: Kind, address: str, what: str, remedy: str) -> Finding:
    return Finding(kind, reference(place.block), address, (place.node,), what, remedy)


def _age(since: str, now: str) -> float:
    """Seconds; 0 without a beginning."""
    if not since:
        return 0.0
    return (datetime.fromisoformat(now) - datetime.fromisoformat(since)).total_seconds()
