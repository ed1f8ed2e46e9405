"""Which pools a node and a request use, which block to try next, when to claim and when to give back. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, cast

import msgspec

from ipam.block import merge
from ipam.errors import NotReady, WrongPool
from ipam.model import Family, Request
from store import selector
from store.model import BLOCK_LIMIT, IPPool
from store.validate import block_size

FAMILIES: tuple[Family, ...] = (4, 6)


class Want(msgspec.Struct, frozen=True):
    """One address that a request asks for: this ``address``, or any (empty) of the pools, in their order."""

    pools: tuple[str, ...]
    address: str = ""


class Pools:
    """The pools as one node sees them. ``labels`` and ``pod_cidrs`` are the Node's."""

    def __init__(
        self, pools: Iterable[IPPool] = (), labels: Mapping[str, str] | None = None, pod_cidrs: Iterable[str] = ()
    ) -> None:
        self.all: Mapping[str, IPPool] = {p.name: p for p in sorted(pools, key=lambda p: p.name)}
        canonical = [str(ip_network(cidr, strict=False)) for cidr in pod_cidrs]
        #: For each pool that uses podCIDRs, this Node's inside it: all the blocks that it can have of that pool.
        self.pod_cidrs: Mapping[str, tuple[str, ...]] = {
            p.name: tuple(cidr for cidr in canonical if within(cidr, p.spec.cidr))
            for p in self.all.values()
            if p.spec.use_pod_cidrs
        }
        #: Names of the pools that this node takes from without being asked, per family.
        self.automatic: Mapping[Family, tuple[str, ...]] = {
            family: tuple(
                p.name for p in self.all.values() if family_of(p.spec.cidr) == family and _automatic(p, labels or {})
            )
            for family in FAMILIES
        }
        #: Pools whose blocks are single addresses: claimed on demand, never ahead.
        self.single = frozenset(
            p.name for p in self.all.values() if block_size(p) == ip_network(p.spec.cidr).max_prefixlen
        )
        #: Pools of which a block is claimed before it is needed.
        self.ahead = tuple(n for names in self.automatic.values() for n in names if n not in self.single)
        self._default = tuple(Want(names) for names in self.automatic.values() if names)

    def serves(self, name: str) -> bool:
        """New addresses may come from this pool: it is there and not disabled."""
        return name in self.all and not self.all[name].spec.disabled

    def is_automatic(self, name: str) -> bool:
        return any(name in names for names in self.automatic.values())

    def of(self, address: str) -> IPPool | None:
        """The pool that the address is in; pools don't overlap. ValueError if it is no address."""
        ip = ip_address(address)
        return next((p for p in self.all.values() if ip in ip_network(p.spec.cidr)), None)

    def has(self, pool: str, cidr: str) -> bool:
        """A block of the pool that this node may hand out of: with podCIDRs, one that is the Node's today."""
        return pool not in self.pod_cidrs or cidr in self.pod_cidrs[pool]

    def block_at(self, pool: IPPool, address: str) -> str:
        """The CIDR of the pool's block that the address is in; "" if no podCIDR of this Node hands it out."""
        size = block_size(pool)
        if size is None:
            return next((cidr for cidr in self.pod_cidrs[pool.name] if _hands_out(cidr, address)), "")
        return str(ip_network(f"{address}/{size}", strict=False))

    def wants(self, request: Request) -> tuple[Want, ...]:
        """One ``Want`` for each address that the request is to get, IPv4 first.

        Addresses that the pod chose are all that it gets. Pools that it chose replace the automatic ones of their
        family, whatever their ``nodeSelector`` says: the annotation is the stronger word. WrongPool; NotReady if
        there is no pool at all.
        """
        if request.addresses:
            return tuple(self._fixed(request))
        if not request.pools and self._default:
            return self._default
        chosen = [self._chosen(name) for name in request.pools]
        wants = []
        for family in FAMILIES:
            names = tuple(p.name for p in chosen if family_of(p.spec.cidr) == family) or self.automatic[family]
            if names:
                wants.append(Want(names))
        if not wants:
            raise NotReady("no pool is for this node: create an IPPool whose nodeSelector matches it, or enable one")
        return tuple(wants)

    def _fixed(self, request: Request) -> Iterator[Want]:
        families = []
        for address in sorted(request.addresses, key=lambda a: ":" in a):
            try:
                pool = self.of(address)
            except ValueError:
                raise WrongPool(f"{address!r} is no IP address: write one, as 10.244.0.7 or fd00::7") from None
            if pool is None:
                raise WrongPool(f"address {address} is in no IPPool: choose one inside {self._names()}")
            if not self.serves(pool.name):
                raise WrongPool(f"address {address} is in IPPool {pool.name}, which is disabled: choose another")
            if request.pools and pool not in [self._chosen(name) for name in request.pools]:
                raise WrongPool(f"address {address} is not in the chosen pools ({', '.join(request.pools)})")
            if not self.block_at(pool, address):
                mine = ", ".join(self.pod_cidrs[pool.name]) or "none"
                raise WrongPool(
                    f"address {address} is of IPPool {pool.name}, whose blocks are the Nodes' podCIDRs, and not among "
                    f"the first {BLOCK_LIMIT} of this Node's ({mine}): choose one of those, or run the pod elsewhere"
                )
            families.append(family_of(address))
            yield Want((pool.name,), str(ip_address(address)))
        if len(set(families)) != len(families):
            raise WrongPool(f"{', '.join(request.addresses)}: choose one address of a family at most")

    def check_family(self, names: Iterable[str], family: Family) -> None:
        """WrongPool if one of these is no pool of that family that serves."""
        for pool in map(self._chosen, names):
            if family_of(pool.spec.cidr) != family:
                raise WrongPool(f"IPPool {pool.name} is no IPv{family} pool ({pool.spec.cidr}): choose another")

    def _chosen(self, text: str) -> IPPool:
        pool = self.all.get(text) or next((p for p in self.all.values() if p.spec.cidr == text), None)
        if pool is None:
            raise WrongPool(f"there is no IPPool {text!r}: there are {self._names()}")
        if pool.spec.disabled:
            raise WrongPool(f"IPPool {pool.name} is disabled: choose another, or enable it")
        return pool

    def _names(self) -> str:
        return ", ".join(f"{p.name} ({p.spec.cidr})" for p in self.all.values()) or "none"


def _automatic(pool: IPPool, labels: Mapping[str, str]) -> bool:
    spec = pool.spec
    usable = not spec.disabled and spec.assignment_mode == "Automatic" and "Workload" in spec.allowed_uses
    return usable and selector.parse(spec.node_selector).matches(labels)


def family_of(text: str) -> Family:
    """Of an address or prefix in text."""
    return 6 if ":" in text else 4


# -- blocks of a pool ---------------------------------------------------------------------------------------------


def candidates(pool: IPPool, node: str, reserved: Iterable[str] = ()) -> Iterator[str]:
    """The CIDRs of the pool's blocks, once each, from one on that depends on node and pool (R4): nodes begin far
    apart, each begins at the same place after a restart, and meets its neighbours' blocks only when the pool is full.
    Blocks that are reserved as a whole are left out. Of a pool that uses podCIDRs there are none to look for.
    """
    network = ip_network(pool.spec.cidr)
    length = block_size(pool)
    if length is None:
        return
    count = 1 << (length - network.prefixlen)
    size = 1 << (network.max_prefixlen - length)
    base = int(network.network_address)
    make = type(network.network_address)
    jumps = _whole_blocks(base, size, (ip_network(r) for r in reserved if family_of(r) == network.version))
    digest = hashlib.blake2b(f"{node}\0{pool.name}".encode(), digest_size=16).digest()
    start = int.from_bytes(digest, "big") % count
    for first, end in ((start, count), (0, start)):
        i = first
        while i < end:
            jump = next((last for begin, last in jumps if begin <= i <= last), None)
            if jump is None:
                yield f"{make(base + i * size)}/{length}"
            i = i + 1 if jump is None else jump + 1


def is_candidate(pool: IPPool, cidr: str, reserved: Iterable[str] = ()) -> bool:
    """The CIDR is a block of the pool as it is today, and no reservation covers it."""
    right = within(cidr, pool.spec.cidr) and ip_network(cidr).prefixlen == block_size(pool)
    return right and not any(within(cidr, r) for r in reserved)


def _whole_blocks(base: int, size: int, networks: Iterable[IPv4Network | IPv6Network]) -> tuple[tuple[int, int], ...]:
    """Which blocks, as ranges of their numbers, the networks cover from end to end."""
    covered = merge([(int(n.network_address) - base, int(n.broadcast_address) - base) for n in networks])
    blocks = ((-(-first // size), (last + 1) // size - 1) for first, last in covered)
    return tuple((begin, last) for begin, last in blocks if begin <= last)


def _hands_out(cidr: str, address: str) -> bool:
    network, ip = ip_network(cidr), ip_address(address)
    return ip in network and int(ip) - int(network.network_address) < BLOCK_LIMIT


def overlap(one: str, other: str) -> bool:
    a, b = ip_network(one), ip_network(other)
    return a.version == b.version and bool(cast(Any, a).overlaps(b))


def within(inner: str, outer: str) -> bool:
    a, b = ip_network(inner), ip_network(outer)
    return a.version == b.version and bool(cast(Any, a).subnet_of(b))


# -- how many blocks ----------------------------------------------------------------------------------------------


class Count(msgspec.Struct, frozen=True):
    """One block's addresses, reserved ones left out. ``idle``: nobody holds one, and none is resting."""

    used: int
    free: int
    idle: bool = False


def claim_ahead(*, used: int, free: int) -> bool:
    """A node claims its next block of a pool when less than a quarter of its addresses there are free (R4); so also
    the first."""
    return free * 4 < free + used or not free


def surplus(blocks: Sequence[Count], *, keep: int) -> tuple[int, ...]:
    """Which blocks of a pool to give back (R4), as indices: idle ones, the last claimed first, as long as without them
    at least half of the addresses is free and ``keep`` blocks are left."""
    left = dict(enumerate(blocks))
    given = []
    for i in reversed(range(len(blocks))):
        others = [c for j, c in left.items() if j != i]
        free, used = sum(c.free for c in others), sum(c.used for c in others)
        if blocks[i].idle and len(others) >= keep and free * 2 >= free + used:
            del left[i]
            given.append(i)
    return tuple(given)
