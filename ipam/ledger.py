"""What this node has in memory: its blocks, the leases in them, and live routes that nobody claims. No I/O.

Every address of ours is in one ``Block``; a lease is held in the blocks of its addresses. What has no block (yet) is
remembered all the same, and held as soon as its block is adopted: so nothing that lives is ever handed out again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_network

from ipam.block import Block, Held, parsed
from ipam.model import Attachment, BlockView, Lease, News
from ipam.pool import Count
from store.model import Condition, IPAMBlock

#: Network and container of an address that only its route tells of.
UNKNOWN = "unknown"
#: Blocks given back that are remembered.
ENDED = 1024


class Phase(enum.Enum):
    """Where an own block is in its life (R4). Only a READY one hands out."""

    NEW = "new"  # ours, its blackhole not seen yet
    READY = "ready"
    RELEASING = "releasing"  # empty; the agent is to withdraw it (R9); can still go back to NEW
    DELETING = "deleting"  # the delete is under way: no way back
    MARKED = "marked"  # being deleted by somebody (R5): nothing is added, the mirror goes on
    LOST = "lost"  # another node's by now: what it holds stays held, nothing is added


class Own:
    """One block of this node: the object as last seen, its addresses, and where it is in its life."""

    def __init__(self, obj: IPAMBlock, block: Block[Attachment], phase: Phase, now: float) -> None:
        self.obj = obj
        self.block = block
        self.phase = phase
        self.since = now  # monotonic, of the phase
        self.gone_at: float | None = None  # RELEASING: since when the blackhole is seen to be gone
        self.barred = ""  # RELEASING: why it is not taken back
        self.written = False  # this process has written its status
        self.void_boots: set[str] = set()  # boots whose entries were there before we wrote

    @property
    def cidr(self) -> str:
        return self.obj.spec.cidr

    @property
    def pool(self) -> str:
        return self.obj.spec.pool

    def enter(self, phase: Phase, now: float) -> None:
        self.phase, self.since, self.gone_at, self.barred = phase, now, None, ""


class Ledger:
    """``changed`` is called with each block whose status is no longer what its mirror says, ``tell`` with what an
    operator should hear of."""

    def __init__(
        self, *, rest: float, changed: Callable[[Own], None], tell: Callable[[News], None] = lambda _: None
    ) -> None:
        self._rest = rest
        self.changed = changed
        self.tell = tell
        self._reserved: tuple[str, ...] = ()
        self._pools: dict[str, list[Own]] = {}
        self._rested: dict[str, float] = {}  # address -> since when, for blocks that come later (again)
        self._index: dict[tuple[int, int, int], Own] = {}  # (IP version, host bits, the bits before them)
        self._shifts: dict[int, set[int]] = {4: set(), 6: set()}
        self.blocks: dict[str, Own] = {}
        self.leases: dict[Attachment, Lease] = {}
        #: Addresses with a live pod route and no lease, and who stands in for their owner.
        self.strays: dict[str, Attachment] = {}
        self.conditions: dict[str, Condition] = {}
        #: Uids of blocks that this node gave back in this boot, oldest first.
        self.ended: dict[str, None] = {}

    # -- blocks -------------------------------------------------------------------------------------------------------

    def adopt(self, obj: IPAMBlock, phase: Phase, now: float) -> Own:
        """Takes up a block; what is known to live in it is held from the beginning."""
        self.ended.pop(obj.metadata.uid, None)
        own = Own(obj, Block(obj.spec.cidr, rest=self._rest), phase, now)
        own.block.reserve(self._reserved)
        self.blocks[own.cidr] = own
        self._pools.setdefault(own.pool, []).append(own)
        key = _key(own.cidr)
        self._index[key] = own
        self._shifts[key[0]].add(key[1])
        for lease in self.leases.values():
            for address in lease.addresses:
                self._hold_in(own, address, lease.attachment)
        for address, owner in self.strays.items():
            self._hold_in(own, address, owner)
        for address, since in self._rested.items():
            offset = own.block.offset(address)
            if offset is not None and offset not in own.block.owners:
                own.block.release(offset, since)
        self.changed(own)
        return own

    def note_ended(self, uid: str) -> None:
        """The block is no more ours, whatever a store says that is restored from a backup."""
        self.ended[uid] = None
        while len(self.ended) > ENDED:
            del self.ended[next(iter(self.ended))]

    def drop(self, own: Own) -> None:
        del self.blocks[own.cidr]
        self._pools[own.pool].remove(own)
        del self._index[_key(own.cidr)]

    def find(self, address: str) -> tuple[Own, int] | None:
        """The own block that hands out the address, and its offset there."""
        version, number = parsed(address)
        for shift in self._shifts[version]:
            own = self._index.get((version, shift, number >> shift))
            if own is not None and (offset := number & ((1 << shift) - 1)) < own.block.size:
                return own, offset
        return None

    def of_pool(self, pool: str) -> list[Own]:
        return self._pools.get(pool, [])

    def pools(self) -> Iterator[str]:
        return (name for name, blocks in self._pools.items() if blocks)

    def reserve(self, cidrs: Iterable[str]) -> None:
        self._reserved = tuple(cidrs)
        for own in self.blocks.values():
            own.block.reserve(self._reserved)
            self.changed(own)

    def views(self) -> tuple[BlockView, ...]:
        return tuple(
            BlockView(own.cidr, own.pool, own.block.used, own.block.free, own.phase.value)
            for own in self.blocks.values()
        )

    # -- leases -------------------------------------------------------------------------------------------------------

    def owner(self, address: str) -> Attachment | None:
        """Who has the address, as far as it is in an own block."""
        found = self.find(address)
        return found[0].block.owners.get(found[1]) if found else None

    def put(self, lease: Lease) -> None:
        """Adds or replaces a lease. ``Held`` if one of its addresses has another owner; nothing is changed then."""
        found = [place for address in lease.addresses if (place := self.find(address))]
        for own, offset in found:
            owner = own.block.owners.get(offset)
            if owner is not None and owner != lease.attachment:
                raise Held(owner)
        self.leases[lease.attachment] = lease
        for own, offset in found:
            own.block.hold(offset, lease.attachment)
            self.changed(own)

    def remove(self, attachment: Attachment, now: float) -> Lease | None:
        """Ends a lease; its addresses rest from ``now`` on."""
        lease = self.leases.pop(attachment, None)
        for address in lease.addresses if lease else ():
            self.rest(address, now)
        return lease

    def rest(self, address: str, since: float) -> None:
        """Nobody's any more, since then."""
        self._rested.pop(address, None)
        self._rested[address] = since
        while self._rested and since - next(iter(self._rested.values())) >= self._rest:
            del self._rested[next(iter(self._rested))]
        found = self.find(address)
        if found:
            own, offset = found
            own.block.release(offset, since)
            self.changed(own)

    def rested(self) -> Mapping[str, float]:
        """Addresses given back lately, and since when they rest."""
        return self._rested

    # -- strays -------------------------------------------------------------------------------------------------------

    def add_stray(self, address: str, link: str) -> None:
        """A live route whose lease is not known: the address is held for who has that link, or until the route goes."""
        owner = Attachment(UNKNOWN, UNKNOWN, link or UNKNOWN)
        self.strays[address] = owner
        found = self.find(address)
        if found:
            self._hold_in(found[0], address, owner)
            self.changed(found[0])

    def end_stray(self, address: str, since: float | None) -> None:
        """It rests from ``since`` on; None: it is free at once, for its owner has come back."""
        del self.strays[address]
        if since is not None:
            self.rest(address, since)
        elif found := self.find(address):
            found[0].block.release(found[1], None)
            self.changed(found[0])

    def strays_behind(self, link: str) -> tuple[str, ...]:
        """Addresses that are routed to the link of this name."""
        return tuple(a for a, owner in self.strays.items() if owner.interface == link) if self.strays else ()

    def homeless(self) -> dict[str, str]:
        """Addresses in use that are in no own block, and who has each, for people."""
        used = {a: lease.pod or str(lease.attachment) for lease in self.leases.values() for a in lease.addresses}
        used |= {address: f"link {owner.interface}" for address, owner in self.strays.items()}
        return {address: who for address, who in used.items() if self.find(address) is None}

    # -- conditions ---------------------------------------------------------------------------------------------------

    def say(self, kind: str, reason: str, message: str, now: str) -> None:
        """Sets the condition of that type; every block carries them. ``now`` is a time stamp; the same one again keeps
        its time."""
        present = self.conditions.get(kind)
        if present is None or (present.reason, present.message) != (reason, message):
            condition = Condition(type=kind, status="True", reason=reason, message=message, last_transition_time=now)
            self.conditions[kind] = condition
            self._all_changed()
            self.tell(of_condition(condition))

    def unsay(self, kind: str) -> None:
        condition = self.conditions.pop(kind, None)
        if condition:
            self._all_changed()
            self.tell(News(kind, condition.reason, f"over: {condition.message}", normal=True))

    def _all_changed(self) -> None:
        for own in self.blocks.values():
            self.changed(own)

    def _hold_in(self, own: Own, address: str, owner: Attachment) -> None:
        offset = own.block.offset(address)
        if offset is not None and offset not in own.block.owners:
            own.block.hold(offset, owner)


def count(own: Own, now: float) -> Count:
    return Count(own.block.used, own.block.free, idle=not own.block.used and not own.block.resting(now))


def of_condition(condition: Condition) -> News:
    return News(condition.type, condition.reason, condition.message)


def _key(cidr: str) -> tuple[int, int, int]:
    network = ip_network(cidr)
    shift = network.max_prefixlen - network.prefixlen
    return network.version, shift, int(network.network_address) >> shift
