"""What ``ipam check`` looks at, and what it says. Pure.

The form of a finding is a promise: scripts read it, and ``ipam release --from-report`` acts on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final, Literal, get_args

import msgspec

from ipam.model import Attachment
from store.model import Allocation, IPAMBlock, IPPool, IPReservation, KubeEvent, Pod, Writer

Kind = Literal[
    # pools and blocks
    "ObjectRefused",
    "PoolsOverlap",
    "PoolMissing",
    "BlockOutsidePool",
    "BlockSizeDiffers",
    "BlocksOverlap",
    # blocks and their owners
    "BlockOfNoNode",
    "BlockDeleting",
    "BlockReleasing",
    "ReleasePending",
    "NotMirrored",
    "WritersDiffer",
    "ConditionHolds",
    # addresses
    "AllocationOutsideBlock",
    "AddressTwice",
    "AttachmentTwice",
    "HolderUnknown",
    "CountsDisagree",
    "ReservedInUse",
    # addresses against Kubernetes' pods
    "PodGone",
    "PodAddressDiffers",
    "PodWithoutAllocation",
    "PodsShareAddress",
    # the store against the node that the check runs on
    "MirrorBehind",
    "RecordsDisagree",
    "AddressOfOtherNode",
    "RouteMissing",
    "RouteWithoutAllocation",
    "AllocationWithoutRoute",
    "JournalDamaged",
]
KINDS: Final[tuple[str, ...]] = get_args(Kind)

#: Seconds that something must last to be a finding: the mirror follows its node within 200 ms (R2), and the store's
#: kinds are read one after the other, so what a second look does not show was only on its way.
SETTLE: Final = 2.0
#: For what takes its time when all goes well: a release waits for the withdrawal, and 6 s more (R4, R9).
#: Kubelet tells what a sandbox has got, and that a pod is gone, when it comes to it.
PATIENCE: Final[Mapping[str, float]] = {
    "BlockReleasing": 20.0,
    "ReleasePending": 10.0,
    "PodGone": 30.0,
    "PodAddressDiffers": 30.0,
    "PodWithoutAllocation": 10.0,
}


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong. ``object`` is what it is about, as ``ipamblock/10-244-3-64-26``; ``address`` the address
    or range ("" where it is about none); ``nodes`` whose blocks it concerns. ``what`` says the same as long as the same
    is wrong."""

    kind: Kind
    object: str
    address: str
    nodes: tuple[str, ...]
    what: str
    remedy: str

    @property
    def key(self) -> tuple[str, str, str]:
        """The same wrong in another look."""
        return self.kind, self.object, self.address


class Local(msgspec.Struct, frozen=True):
    """What one node says itself: its journal, and its kernel. ``routes`` and ``linked`` are None where the kernel could
    not be asked."""

    node: str
    #: Boot and start of the CNI server whose journal this is; start 0: not known.
    writer: Writer
    #: By address, what the journal has as handed out.
    leases: Mapping[str, Attachment]
    #: Addresses with a pod route.
    routes: frozenset[str] | None = None
    #: Of the holders in journal and store, those whose link is there.
    linked: frozenset[Attachment] | None = None
    damage: tuple[str, ...] = ()


class View(msgspec.Struct, frozen=True):
    """One look. What could not be read is None, and no finding is made of it."""

    now: str
    blocks: tuple[IPAMBlock, ...]
    pools: tuple[IPPool, ...] | None = None
    reservations: tuple[IPReservation, ...] | None = None
    #: Names of the Nodes that there are.
    nodes: frozenset[str] | None = None
    local: Local | None = None
    #: Both read before the blocks: Kubernetes' pods, and what was said of Nodes.
    pods: tuple[Pod, ...] | None = None
    events: tuple[KubeEvent, ...] | None = None


class Range(msgspec.Struct, frozen=True):
    """A CIDR as numbers: quick to compare, for a cluster has thousands."""

    version: int
    first: int
    last: int

    @classmethod
    def of(cls, cidr: str) -> Range | None:
        """None if the text is no CIDR."""
        try:
            net = ip_network(cidr, strict=False)
        except ValueError:
            return None
        return cls(net.version, int(net.network_address), int(net.broadcast_address))

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    @property
    def text(self) -> str:
        """Its first address."""
        return str(IPv4Address(self.first) if self.version == 4 else IPv6Address(self.first))

    def first_ones(self, count: int) -> Range:
        """Its first addresses, ``count`` at most."""
        return Range(self.version, self.first, min(self.last, self.first + count - 1))

    def holds(self, other: Range) -> bool:
        return self.version == other.version and self.first <= other.first and other.last <= self.last


class Place(msgspec.Struct, frozen=True):
    """A block, and where it is."""

    block: IPAMBlock
    range: Range

    @property
    def node(self) -> str:
        return self.block.spec.node


class Finder:
    """Which blocks an address is in."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._index: dict[tuple[int, int, int], list[Place]] = {}
        self._shifts: Mapping[int, set[int]] = {4: set(), 6: set()}
        for place in places:
            shift = place.range.size.bit_length() - 1
            self._shifts[place.range.version].add(shift)
            self._index.setdefault((place.range.version, shift, place.range.first >> shift), []).append(place)

    def all(self, at: Range) -> list[Place]:
        return [
            place
            for shift in sorted(self._shifts[at.version])
            for place in self._index.get((at.version, shift, at.first >> shift), ())
        ]


@lru_cache(maxsize=1 << 18)  # each rule asks again, and a cluster has many
def number(address: str) -> Range | None:
    """An address as a range of one; None if the text is none."""
    try:
        ip = ip_address(address)
    except ValueError:
        return None
    return Range(ip.version, int(ip), int(ip))


def attachment_of(allocation: Allocation) -> Attachment:
    return Attachment(allocation.network, allocation.container, allocation.interface)


def ask_server(where: str) -> str:
    """What to do where a CNI server has not done or said something; ``where`` as ``on node-1``, ``here``."""
    return f"does underlay-cni run {where}, and does it reach the store? Its log says so"


def holder(allocation: Allocation) -> str:
    """Who has it, in words: pod and attachment."""
    who = str(attachment_of(allocation))
    return f"pod {allocation.pod} ({who})" if allocation.pod else who
