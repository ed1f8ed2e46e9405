"""One block: which of its addresses are held, resting, reserved or free. Pure: time comes in as an argument.

An address is an *offset* in here, 0 for the block's first. Every offset is usable, the first and the last too, as in
Calico: a block is a route, not a link, so it has no network or broadcast address. Of a block with more than
``BLOCK_LIMIT`` addresses (a podCIDR, which may be a /64) only the first ones are the block's here: others are neither
handed out nor known.

    free     nobody's; taken next-fit, that is the first one after the address taken last, round and round (R6)
    held     by one owner
    resting  given back less than ``REST`` seconds ago: packets for the old owner may still be under way, so it is taken
             only when nothing is free
    reserved never taken automatically (IPReservation); may be held by who asks for it by name

Nothing here is as large as the block, only as large as what was handed out, so a /64 costs no more than a /122.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from store.model import BLOCK_LIMIT

Owner = TypeVar("Owner")

#: Seconds that a freed address rests (R6).
REST: Final = 30.0


class Held(Exception):
    """The address has another owner; the argument is that owner."""


class Block(Generic[Owner]):
    """The addresses of one block. ``cidr`` is canonical text; ``rest`` in seconds of the clock that ``now`` is from."""

    def __init__(self, cidr: str, *, rest: float = REST) -> None:
        network = ip_network(cidr)
        self.cidr = cidr
        self.network: IPv4Network | IPv6Network = network
        self.size = min(network.num_addresses, BLOCK_LIMIT)
        self._base = int(network.network_address)
        self._rest = rest
        self._owners: dict[int, Owner] = {}
        self._resting: dict[int, float] = {}  # offset -> when it was given back, oldest first
        self._busy: list[int] = []  # offsets held or resting, ascending
        self._reserved: tuple[tuple[int, int], ...] = ()  # (first, last), ascending, apart from each other
        self._reserved_free = 0  # reserved offsets that nobody holds
        self._next = 0  # where the search for the next free offset begins

    # -- names ----------------------------------------------------------------------------------------------------

    def address(self, offset: int) -> str:
        return str(self.network[offset])

    def offset(self, address: str) -> int | None:
        """The address's offset; None outside of this block, or beyond ``size``. ValueError if it is no address."""
        version, number = parsed(address)
        offset = number - self._base
        return offset if version == self.network.version and 0 <= offset < self.size else None

    # -- taking and giving back ---------------------------------------------------------------------------------------

    def choose(self, now: float, *, resting: bool = False) -> int | None:
        """The offset to take next, or None; nothing is changed. With ``resting`` the one that has rested longest."""
        self._wake(now)
        if resting:
            return next((o for o in self._resting if self._reservation(o) is None), None)
        found = self._first_free(self._next)
        return self._first_free(0) if found is None and self._next else found

    def hold(self, offset: int, owner: Owner) -> None:
        """Makes ``owner`` the holder, whether the offset is free, resting or reserved. ``Held`` by another."""
        if not 0 <= offset < self.size:
            raise ValueError(f"offset {offset} is outside of {self.cidr}")
        present = self._owners.get(offset)
        if present is not None:
            if present != owner:
                raise Held(present)
            return
        if offset in self._resting:
            del self._resting[offset]
        else:
            insort(self._busy, offset)
        self._owners[offset] = owner
        self._next = offset + 1
        if self._reservation(offset) is not None:
            self._reserved_free -= 1

    def release(self, offset: int, since: float | None) -> None:
        """Takes it from its holder (if any) and lets it rest from ``since`` on; None: free at once."""
        if self._owners.pop(offset, None) is not None and self._reservation(offset) is not None:
            self._reserved_free += 1
        known = _position(self._busy, offset)
        if since is None:
            self._resting.pop(offset, None)
            if known is not None:
                del self._busy[known]
        else:
            self._resting.pop(offset, None)  # so that it goes to the end: the order is that of giving back
            self._resting[offset] = since
            if known is None:
                insort(self._busy, offset)

    def reserve(self, cidrs: Iterable[str]) -> None:
        """The whole set of reserved prefixes or addresses; those outside of this block don't matter. Who holds a
        reserved address already keeps it."""
        ranges = []
        for text in cidrs:
            network = ip_network(text)
            if network.version != self.network.version:
                continue
            first = max(int(network.network_address) - self._base, 0)
            last = min(int(network.broadcast_address) - self._base, self.size - 1)
            if first <= last:
                ranges.append((first, last))
        self._reserved = merge(ranges)
        self._reserved_free = sum(last - first + 1 for first, last in self._reserved)
        self._reserved_free -= sum(self._reservation(o) is not None for o in self._owners)

    # -- counts -------------------------------------------------------------------------------------------------------

    @property
    def owners(self) -> Mapping[int, Owner]:
        """Who holds what; a view that moves with the block."""
        return MappingProxyType(self._owners)

    @property
    def used(self) -> int:
        return len(self._owners)

    @property
    def free(self) -> int:
        """Offsets that can still be taken automatically, resting ones too: they are free soon, or when need be."""
        return self.size - len(self._owners) - self._reserved_free

    def resting(self, now: float) -> int:
        self._wake(now)
        return len(self._resting)

    # -- search -------------------------------------------------------------------------------------------------------

    def _wake(self, now: float) -> None:
        """Whoever has rested long enough is free."""
        while self._resting:
            offset, since = next(iter(self._resting.items()))
            if now - since < self._rest:
                return
            self.release(offset, None)

    def _first_free(self, start: int) -> int | None:
        """The first offset from ``start`` on that is neither busy nor reserved."""
        offset = self._first_gap(start)
        while offset < self.size:
            reservation = self._reservation(offset)
            if reservation is None:
                return offset
            offset = self._first_gap(reservation[1] + 1)
        return None

    def _first_gap(self, start: int) -> int:
        """The first offset from ``start`` on that is not busy: as ``_busy`` ascends, a run of busy offsets is where
        the list keeps step with counting, and the end of that run is found by halving."""
        begin = bisect_left(self._busy, start)
        if begin == len(self._busy) or self._busy[begin] != start:
            return start
        rest = range(len(self._busy) - begin)
        return start + bisect_left(rest, True, key=lambda i: self._busy[begin + i] != start + i)

    def _reservation(self, offset: int) -> tuple[int, int] | None:
        """The reserved range that the offset is in."""
        if not self._reserved:
            return None
        i = bisect_left(self._reserved, offset, key=lambda r: r[1])
        return self._reserved[i] if i < len(self._reserved) and self._reserved[i][0] <= offset else None


def _position(ascending: list[int], value: int) -> int | None:
    i = bisect_left(ascending, value)
    return i if i < len(ascending) and ascending[i] == value else None


@lru_cache(maxsize=4096)
def parsed(address: str) -> tuple[int, int]:
    """IP version and number. Each address is looked up many times from its taking to its end. ValueError if it is
    none."""
    ip = ip_address(address)
    return ip.version, int(ip)


def merge(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same numbers as ranges (first, last) that ascend and neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)
