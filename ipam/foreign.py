"""Places of our pools that somebody else uses: a route that is not ours leads there (R5, docs/decisions/0010).

That one node of the cluster routes to another's block is the rule, so a route alone says nothing. It says something of
a block that was free in the store: then it is another cluster's, or a node's that the store knows no more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from ipaddress import ip_network

from ipam.errors import Exhausted, KernelUnavailable
from ipam.model import ForeignRoute, KernelView
from ipam.pool import family_of, overlap
from store.model import IPPool
from store.validate import block_size

log = logging.getLogger(__name__)

#: Places remembered; one of a pool is enough to keep away from all.
PLACES = 8


class InUseElsewhere(Exhausted):
    """The block was free in the store, and is given back: a foreign route leads there."""


class Foreign:
    """``found`` has what is known, by CIDR of the block: a sentence that says what leads there and what to do."""

    def __init__(self, kernel: KernelView) -> None:
        self._kernel = kernel
        self.found: dict[str, str] = {}

    def problem(self, cidr: str) -> str:
        """Why a block that the store has for us must not be used; empty if nothing leads there. Where the kernel cannot
        be read whole, what was known before: a block is looked at again before its first address."""
        try:
            return self.look(cidr)
        except KernelUnavailable as e:
            log.warning("block %s is not looked at for foreign routes: %s", cidr, e)
            return self.found.get(cidr, "")

    def look(self, cidr: str) -> str:
        """The same. KernelUnavailable."""
        routes = self._kernel.foreign_routes(cidr)
        if not routes:
            self.found.pop(cidr, None)
            return ""
        if cidr not in self.found and len(self.found) >= PLACES:
            self.found.pop(next(iter(self.found)))
        self.found[cidr] = problem = in_words(cidr, routes)
        return problem

    def leads_to(self, cidr: str) -> bool:
        """Whether a route leads there, be it another node's of this cluster. KernelUnavailable."""
        return bool(self._kernel.foreign_routes(cidr))

    def places(self, pool: IPPool) -> frozenset[str]:
        """Blocks of the pool that routes lead to, if it is known to be shared with somebody; else none: what other
        nodes of this cluster have is found out by the create, at less cost."""
        size = block_size(pool)
        if size is None or not any(overlap(cidr, pool.spec.cidr) for cidr in self.found):
            return frozenset()
        try:
            routes = self._kernel.foreign_routes(pool.spec.cidr)
        except KernelUnavailable as e:
            log.warning("blocks of pool %s are tried in spite of foreign routes there: %s", pool.name, e)
            return frozenset()
        networks = (ip_network(route.prefix) for route in routes)
        # A larger one contains blocks: it may be an aggregate, and is nobody's claim to them.
        return frozenset(str(n.supernet(new_prefix=size)) for n in networks if n.prefixlen >= size)

    def of(self, pool: IPPool) -> str:
        """What is known of the pool, for who finds no block in it."""
        return "; ".join(problem for cidr, problem in self.found.items() if overlap(cidr, pool.spec.cidr))

    def message(self) -> str:
        """What is known, in a stable order."""
        return "; ".join(self.found[cidr] for cidr in sorted(self.found, key=lambda c: (family_of(c), c)))


def in_words(cidr: str, routes: Iterable[ForeignRoute]) -> str:
    first, *others = sorted(routes, key=lambda r: (r.prefix, r.via, r.device))
    more = f" and {len(others)} more" if others else ""
    return (
        f"block {cidr} is free in the store, and not used, as this node has a route to it that is not ours: "
        f"{first}{more}; if another cluster has a pool here, give one of the two another range; else end what writes "
        f"or announces that route"
    )
