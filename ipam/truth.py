"""What is handed out, found out at start: the union of journal, mirror and the kernel's pod routes (R3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from ipam.journal import Bound, Ended, GivenBack, History, Opened, Record, Taken
from ipam.ledger import UNKNOWN, Ledger
from ipam.model import Attachment, Lease
from store.model import Allocation, IPAMBlock

log = logging.getLogger(__name__)


def mirrored(blocks: Iterable[IPAMBlock], boot_id: str) -> dict[Attachment, list[Allocation]]:
    """What the blocks' status says of this boot, by attachment. Another boot's pods died with it."""
    found: dict[Attachment, list[Allocation]] = {}
    for block in blocks:
        writer = block.status.writer
        if writer is None or writer.boot_id != boot_id:
            continue
        for a in block.status.allocations:
            if a.container != UNKNOWN:
                found.setdefault(Attachment(a.network, a.container, a.interface), []).append(a)
    return found


def add_mirrored(
    ledger: Ledger,
    found: Mapping[Attachment, list[Allocation]],
    history: History,
    links: Mapping[int, str],
    link_name: Callable[[Attachment], str],
) -> tuple[Lease, ...]:
    """Takes over what only the mirror knows: the journal was lost, or the line in it. The journal is the newer of the
    two, so what it says of an attachment or an address goes before. Returns the leases added."""
    indices = {name: index for index, name in links.items()}
    told = {*history.leases, *(record.attachment for record in history.freed)}
    added = []
    for attachment, allocations in found.items():
        if attachment in told:
            continue
        name = link_name(attachment)
        behind = ledger.strays_behind(name)
        addresses = {a.address for a in allocations} | set(behind)
        others = {ledger.owner(a) for a in addresses if a not in behind} - {None, attachment}
        if others:
            log.warning("%s has %s in the mirror only; by now it is another's", attachment, ", ".join(addresses))
            continue
        for address in behind:
            ledger.end_stray(address, None)
        lease = Lease(
            attachment,
            allocations[0].pod,
            tuple(sorted(addresses, key=lambda a: (":" in a, a))),
            index=indices.get(name, 0),
            since=allocations[0].since,
        )
        ledger.put(lease)
        log.warning("%s: %s is in the mirror and not in the journal", attachment, ", ".join(lease.addresses))
        added.append(lease)
    return tuple(added)


def records(ledger: Ledger, netns: int, deleted: Mapping[Attachment, float]) -> Iterable[Record]:
    """A journal that says what memory says: what rests, which attachments were deleted, which blocks were given back,
    what is leased."""
    yield Opened(netns)
    for uid in ledger.ended:
        yield Ended(uid)
    for attachment, at in deleted.items():
        yield GivenBack(attachment, at)
    for address, since in ledger.rested().items():
        yield GivenBack(Attachment(UNKNOWN, UNKNOWN, UNKNOWN), since, (address,), swept=True)
    for lease in ledger.leases.values():
        yield taken(lease, ledger)
        if lease.index:
            yield Bound(lease.attachment, lease.index)


def taken(lease: Lease, ledger: Ledger) -> Taken:
    """The record of a lease, with the uids of its blocks as they are known."""
    found = (ledger.find(address) for address in lease.addresses)
    uids = tuple(place[0].obj.metadata.uid if place else "" for place in found)
    return Taken(lease.attachment, lease.addresses, uids, lease.pod, lease.since, lease.pod_uid)
