"""The values that ipam takes and gives, and what it asks of the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Protocol

import msgspec

Family = Literal[4, 6]

#: Who the Events of its server are from.
CONTROLLER: Final = "underlay.network/cni"
#: Every condition that NodeIPAM knows: each of its blocks says those that hold.
CONDITIONS: Final = (
    "BlockLost",
    "ForeignRoute",
    "JournalFailed",
    "NoPodCIDR",
    "PoolExhausted",
    "Superseded",
    "SweepStopped",
)


class Attachment(msgspec.Struct, frozen=True, order=True):
    """One interface of one sandbox in one network: the key of all that is handed out (CNI spec, "Attachment")."""

    network: str
    container: str
    interface: str

    def __str__(self) -> str:
        return f"{self.network}/{self.container}/{self.interface}"


class Request(msgspec.Struct, frozen=True):
    """What an ADD asks for. ``pools`` (names or CIDRs) and ``addresses`` are what the pod chose; empty: automatic.

    Pools are chosen per family: a family without a chosen pool stays automatic. ``addresses`` are given as they are,
    one a family at most, and then nothing else is. ``asked``: when the runtime asked (seconds, monotonic), if known.
    """

    attachment: Attachment
    pod: str = ""
    pools: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    pod_uid: str = ""
    asked: float | None = None


class Lease(msgspec.Struct, frozen=True):
    """What an attachment has: its addresses (IPv4 first), and the host veth's index (0: not wired yet)."""

    attachment: Attachment
    pod: str
    addresses: tuple[str, ...]
    index: int = 0
    since: str = ""
    pod_uid: str = ""


class BlockView(msgspec.Struct, frozen=True):
    """One block of this node, for people: ``free`` counts resting addresses too, not reserved ones."""

    cidr: str
    pool: str
    used: int
    free: int
    #: Where it is in its life: see ``ipam.ledger.Phase``.
    phase: str


class ForeignRoute(msgspec.Struct, frozen=True):
    """A route of the kernel that is none of our pods' or blocks': ``via`` a gateway, or "" for what is on the link."""

    prefix: str
    via: str = ""
    device: str = ""
    #: Who wrote it: see ``cni.marks``, and the kernel's rtnetlink.h for other numbers.
    protocol: int = 0

    def __str__(self) -> str:
        via, device = self.via and f" via {self.via}", self.device and f" dev {self.device}"
        return f"{self.prefix}{via}{device} (route protocol {self.protocol})"


class News(msgspec.Struct, frozen=True):
    """What an operator should find with this Node or, where ``pod`` (``namespace/name``) says so, with a pod.
    ``reason`` and ``action`` are CamelCase, ``note`` says what to do. ``normal``: nothing is wrong (any more)."""

    reason: str
    action: str
    note: str
    pod: str = ""
    pod_uid: str = ""
    normal: bool = False


class Figures(msgspec.Struct, frozen=True):
    """For metrics: how many leases, the journal's size, and how long (seconds) the oldest change waits for its write to
    the store."""

    leases: int
    journal_bytes: int
    mirror_lag: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds of the node's ``Clock``; each from the rule in brackets."""

    rest: float = 30.0  # a freed address (R6)
    batch: float = 0.15  # changes of a block gathered in one write; with the write itself under 200 ms (R2)
    blackhole_limit: float = 2.0  # a new block is used without its blackhole after this (R4)
    poll: float = 0.1  # looks at the kernel's blackholes, only while something is pending
    withdrawn: float = 5.0  # between blackhole gone and block deleted (R4)
    sweep: float = 30.0  # between two sweeps (R7)
    unwired: float = 120.0  # an address taken and never wired counts as leaked only after this
    retell: float = 600.0  # a condition that goes on is told again: the API server keeps an Event for an hour
    recheck: float = 300.0  # ownership read uncached (R5)
    take_limit: float = 5.0  # an ADD waits for a block that long
    store_limit: float = 10.0  # one call to the store, in real time
    start_limit: float = 4.0  # a start waits for the store that long, in real time: shims wait 5 s for a server
    backoff_min: float = 0.2
    backoff_max: float = 10.0
    remember_deleted: float = 300.0  # a DEL is remembered (R7): longer than any runtime waits for an ADD
    deleted_limit: int = 4096
    conflicts_before_list: int = 8  # (R4)
    creates_limit: int = 64  # creates of one claim at most
    max_blocks: int | None = None  # blocks of this node at most; None: as the IPAMConfiguration says
    node_needed: bool = False  # claims nothing without a Node of its name, which would delete it (R5)
    grace: float = 600.0  # a node's absence, after which others free its marked blocks (R5)
    absence_look: float = 30.0  # between two looks after absent owners, only while a pool has no free block
    lost_look: float = 15.0  # between two looks whether a block that another node has is to be had again
    foreign_look: float = 30.0  # between two looks whether a foreign route is still there (R5)
    absence_gap: float = 90.0  # looks that are further apart than this don't count as one absence


class KernelView(Protocol):
    """What ipam asks of the kernel; over netlink in cni/kernel.py. A dump that was interrupted (NLM_F_DUMP_INTR) is
    repeated inside. Each method raises KernelUnavailable if the answer cannot be had whole."""

    def netns(self) -> int:
        """The inode of the network namespace that we are in."""
        ...

    def links(self) -> Mapping[int, str]:
        """ifindex -> name of every host veth of ours (LINK_GROUP)."""
        ...

    def link(self, index: int, name: str) -> bool:
        """Asks for one link, by index and by name (index 0: by name alone): is there either?"""
        ...

    def pod_routes(self) -> Mapping[str, int]:
        """Address -> ifindex of every route with PROTO_PODS."""
        ...

    def blackholes(self) -> frozenset[str]:
        """CIDRs of blocks whose blackhole (PROTO_BLOCKS) is in the kernel."""
        ...

    def foreign_routes(self, within: str) -> tuple[ForeignRoute, ...]:
        """Routes equal to or inside the prefix, and addresses of the node itself in it, that are neither of our pods
        (PROTO_PODS) nor of our blocks (PROTO_BLOCKS)."""
        ...
