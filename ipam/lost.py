"""What lives here and is not ours to use any more: in a block of another node, or where no block can be (R5).

It stays as it is and is handed out to nobody else here; the condition ``BlockLost`` and CHECK of its pods say so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network

from ipam.ledger import Ledger
from store.clock import Clock
from store.model import IPAMBlock

log = logging.getLogger(__name__)

#: Addresses that a message names; of others it says how many there are.
NAMED = 3
_REMEDY = "live here: delete those pods"


class Lost:
    """A place is a block's CIDR, or an address that no block can have."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._why: dict[str, str] = {}  # by place: what lives there, and what to do

    def add(self, places: Iterable[str], why: str) -> None:
        if why not in self._why.values():
            log.error("%s", why)
        self._why.update(dict.fromkeys(places, why))
        self._say()

    def found(self, place: str) -> None:
        """It is ours again, or nothing lives there any more."""
        if self._why.pop(place, None):
            self._say()

    def at(self, address: str) -> str:
        """Why the address is no longer this node's to use; empty if it is."""
        ip = ip_address(address)
        return next((why for place, why in self._why.items() if ip in ip_network(place)), "")

    def without_block(self) -> tuple[str, ...]:
        """Places that are in no block of this node, not even in a lost one."""
        return tuple(place for place in self._why if place not in self._ledger.blocks)

    def forget(self) -> None:
        """Of places without block, those where nothing lives any more."""
        empty = self.without_block()
        homeless = [ip_address(address) for address in self._ledger.homeless()] if empty else []
        for place in empty:
            if not any(ip in ip_network(place) for ip in homeless):
                self.found(place)

    def _say(self) -> None:
        if not self._why:
            self._ledger.unsay("BlockLost")
            return
        message = "; ".join(dict.fromkeys(self._why.values()))
        self._ledger.say("BlockLost", "NotOurs", message, self._clock.now())


# -- words -----------------------------------------------------------------------------------------------------------


def of_other(obj: IPAMBlock, living: str) -> str:
    """Another node has the block in which these live."""
    theirs = f"block {obj.spec.cidr} belongs to node {obj.spec.node} by now"
    return f"{theirs}, and {living} of it {_REMEDY}, or that other block"


def refused(cidr: str, living: str, why: Exception) -> str:
    """The block is gone, and the store takes it no more."""
    return f"block {cidr} was deleted, cannot be created again ({why}), and {living} of it {_REMEDY}"


def of_no_pool(living: str) -> str:
    return f"{living}, in no IPPool, {_REMEDY}, or create that pool again"


def of_no_pod_cidr(living: str, mine: Iterable[str]) -> str:
    has = ", ".join(mine) or "none"
    return f"{living}, in no podCIDR of this Node ({has}), {_REMEDY}: another node may have that podCIDR by now"


def some(users: Mapping[str, str]) -> str:
    """Addresses and who has each, the first few."""
    more = len(users) - NAMED
    return ", ".join(_first(users)) + (f" and {more} more" if more > 0 else "")


def _first(users: Mapping[str, str]) -> Iterator[str]:
    return (f"{address} ({who})" for address, who in list(users.items())[:NAMED])
