"""``ipam check`` on a node: the store's record of it against its own journal and its kernel. Pure.

    journal  the owner's word, written before an address is used (R3)
    store    the owner's copy of it (R2)
    kernel   a route for each address that a pod has

An address that the three agree on is well. Of one that they don't agree on, one finding is made, the gravest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ctl.finding import Finder, Finding, Kind, Local, Place, Range, ask_server, attachment_of, holder, number
from ctl.kinds import reference
from ipam.ledger import UNKNOWN
from store.model import Allocation, IPAMBlock

_SERVER = ask_server("here")


def compare_node(local: Local, places: Sequence[Place]) -> Iterator[Finding]:
    """What is wrong between the blocks of ``local.node`` and what that node says itself. ``places`` are all blocks: an
    address of this node may lie in another's."""
    if local.damage:
        yield Finding(
            "JournalDamaged",
            f"node/{local.node}",
            "",
            (local.node,),
            "; ".join(local.damage),
            "the store and the kernel make up for it; restarting underlay-cni writes the journal anew",
        )
    where = Finder(places)
    behind = {p.block.name for p in places if p.node == local.node and _is_behind(p.block, local)}
    said: dict[Range, tuple[Place, Allocation]] = {}
    for place in places:
        if place.node != local.node:
            continue
        if place.block.name in behind:
            yield _behind(place, local)
            continue
        said.update((at, (place, a)) for a in place.block.status.allocations if (at := number(a.address)))
    texts = {at: text for text in (*local.leases, *(local.routes or ())) if (at := number(text))}
    texts |= {at: a.address for at, (_, a) in said.items()}
    for at, address in sorted(texts.items(), key=lambda item: (item[0].version, item[0].first)):
        found = where.all(at)
        own = next((p for p in found if p.node == local.node), None)
        if own is None and found:
            yield _foreign(found[0], local, address)
        else:
            yield from _compare(local, own, own is not None and own.block.name in behind, address, said.get(at))


def _compare(
    local: Local, own: Place | None, behind: bool, address: str, said: tuple[Place, Allocation] | None
) -> Iterator[Finding]:
    """One address, in an own block or in none; ``behind``: what the store says of it is not known."""
    node = local.node
    held = local.leases.get(address)
    allocation = said[1] if said else None
    routed = local.routes is None or address in local.routes
    subject = reference(own.block) if own else f"node/{node}"

    def finding(kind: Kind, what: str, remedy: str) -> Finding:
        return Finding(kind, subject, address, (node,), what, remedy)

    who = holder(allocation) if allocation else str(held)
    if not routed:
        owner = held or (attachment_of(allocation) if allocation else None)
        if local.linked is not None and owner in local.linked:
            yield finding(
                "RouteMissing",
                f"{who} has it and its link is there, but no route leads to it",
                f"the agent of {node} puts it back: does it run? underlayctl node status {node}",
            )
        else:
            yield finding(
                "AllocationWithoutRoute",
                f"{who} has it, and there is neither a link nor a route",
                f"{node} releases it by itself within a minute; if it stays: underlayctl ipam release --ip {address}",
            )
    elif held is None and allocation is None:
        yield finding(
            "RouteWithoutAllocation",
            "a pod route leads to it, and no record says for whom",
            f"underlay-cni of {node} finds it within a minute and keeps it from others: {_SERVER}",
        )
    elif held is None and allocation is not None and allocation.container != UNKNOWN:
        if local.routes is None:
            yield finding("MirrorBehind", f"the store gives it to {who}; the journal has it as given back", _SERVER)
        else:
            yield finding(
                "RecordsDisagree",
                f"the store gives it to {who}, a route leads to it, and the journal does not have it",
                f"restart underlay-cni on {node}: it takes up what store and kernel say",
            )
    elif held is not None and allocation is None and not behind:
        where = "the store does not" if own else "no block in the store holds it"
        yield finding("MirrorBehind", f"the journal gives it to {held}, {where}", _SERVER)
    elif held is not None and allocation is not None and held != attachment_of(allocation):
        yield finding(
            "RecordsDisagree",
            f"the journal gives it to {held}, the store to {who}",
            f"the journal is the owner's word: {_SERVER}",
        )


def _is_behind(block: IPAMBlock, local: Local) -> bool:
    """Somebody else than this node's server wrote the status, so it says nothing of what is handed out now."""
    writer = block.status.writer
    if writer is None or writer.boot_id != local.writer.boot_id:
        return writer is not None or _in_use(block, local)
    return local.writer.start != 0 and writer.start != local.writer.start


def _in_use(block: IPAMBlock, local: Local) -> bool:
    at = Range.of(block.spec.cidr)
    addresses = (number(text) for text in (*local.leases, *(local.routes or ())))
    return at is not None and any(a is not None and at.holds(a) for a in addresses)


def _behind(place: Place, local: Local) -> Finding:
    writer = place.block.status.writer
    by = f"boot {writer.boot_id} start {writer.start}" if writer else "nobody"
    here = f"boot {local.writer.boot_id}" + (f" start {local.writer.start}" if local.writer.start else "")
    return Finding(
        "MirrorBehind",
        reference(place.block),
        place.block.spec.cidr,
        (place.node,),
        f"its status was written by {by}; the server of {local.node} is {here}",
        f"{_SERVER}. If two machines have the name {local.node}, end one of the two",
    )


def _foreign(place: Place, local: Local, address: str) -> Finding:
    there = next((a for a in place.block.status.allocations if number(a.address) == number(address)), None)
    also = f", which has handed it out to {holder(there)}" if there else ""
    return Finding(
        "AddressOfOtherNode",
        reference(place.block),
        address,
        (local.node, place.node),
        f"{local.leases.get(address, 'a pod')} has it on {local.node}, and the block is of {place.node}{also}",
        f"delete that pod on {local.node}; find out who deleted the block while it was in use",
    )
