"""What a plan is made of, what it is, and what people are told of it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from agent.bgp.model import Announcement, Family, Session, SpeakerState
from agent.detect import Method
from agent.fib import KernelState, Route, RouteKey
from agent.rib import Peer, Rib, Selection
from store.model import BGPConfiguration, BGPFilter, BGPNodeStatus, BGPPeer, Condition, IPAMBlock, IPPool, Node, Secret
from store.validate import validate


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What the store says, as far as this node is concerned."""

    node: Node | None = None
    #: The others; only where the mesh is on, or a BGPPeer has a peerSelector.
    nodes: tuple[Node, ...] = ()
    #: What those say of themselves whose Node does not say where they are reached.
    statuses: tuple[BGPNodeStatus, ...] = ()
    configuration: BGPConfiguration | None = None
    #: Those of one node each, ``node.NAME``.
    node_configurations: tuple[BGPConfiguration, ...] = ()
    peers: tuple[BGPPeer, ...] = ()
    filters: tuple[BGPFilter, ...] = ()
    #: The Secrets that BGPPeers name, as far as they are there.
    secrets: tuple[Secret, ...] = ()
    pools: tuple[IPPool, ...] = ()
    #: Names of those of the pools that were deleted, and stand as long as something lives in them.
    deleted_pools: frozenset[str] = frozenset()
    #: This node's own blocks.
    blocks: tuple[IPAMBlock, ...] = ()
    #: CIDRs that were this node's blocks, and that another node was seen to own.
    taken: frozenset[str] = frozenset()
    #: What stands here as it last could be used, as ``BGPPeer tor-1``, and what is wrong with it now (R13).
    standing: Mapping[str, str] = {}
    #: Whether the store itself said it (False: it is the last good view, from disk).
    live: bool = True


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan is made of. ``rib`` is asked, never changed. ``now`` is monotonic, in seconds."""

    node: str
    now: float
    cluster: Cluster
    kernel: KernelState
    speaker: SpeakerState
    rib: Rib
    #: (container id, interface) -> the name of its veth.
    link_name: Callable[[str, str], str]
    #: Pod addresses whose route was already missing before, and since when.
    missing: Mapping[str, float] = {}
    #: Peers of a mesh that was switched off whose sessions this node could already do without, and since when.
    ready: Mapping[str, float] = {}
    #: Why the cluster has no pool, as far as that is known.
    why_no_pool: str = ""
    #: How this node's addresses are found, by IP version; where nothing is said its Node says it.
    methods: Mapping[int, Method] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is wanted. Each member is a whole set, not a change."""

    routes: Mapping[RouteKey, Route]
    #: (route protocol, family) of ours whose unwanted routes may go: every source of theirs has reported (R8).
    deletable: frozenset[tuple[int, Family]]
    sysctls: Mapping[str, str]
    #: None: unknown, the speaker keeps what it has.
    sessions: frozenset[Session] | None
    announcements: frozenset[Announcement] | None
    peers: tuple[Peer, ...]
    conditions: tuple[Condition, ...]
    selection: Selection
    local_as: int = 0
    router_id: str = ""
    #: Where this node is reached, and whether others have to be told.
    addresses: tuple[str, ...] = ()
    detected: bool = False
    #: Pod addresses whose route is missing.
    missing: frozenset[str] = frozenset()
    #: Peers of a mesh that was switched off whose sessions this node can do without.
    ready: frozenset[str] = frozenset()
    #: What peers are not told, as (peer, prefix, why): a pool or an export filter keeps it back, or it is not ready.
    withheld: tuple[tuple[str, str, str], ...] = ()
    #: The deleted pools that have a block of ours in them, or a route that came in.
    inhabited: frozenset[str] = frozenset()
    #: Whether the machine goes down, and something is announced still.
    going_down: bool = False
    #: When time alone will make the plan another one.
    wake_at: float | None = None


class Notes:
    """What people should know: messages by condition type."""

    def __init__(self) -> None:
        self._messages: dict[str, list[str]] = {}

    def add(self, kind: str, message: str) -> None:
        self._messages.setdefault(kind, []).append(message)

    def conditions(self) -> tuple[Condition, ...]:
        return tuple(
            Condition(type=kind, status="True", reason=kind, message="; ".join(some(sorted(messages))))
            for kind, messages in sorted(self._messages.items())
        )


def usable(obj: BGPPeer | BGPFilter | BGPConfiguration | IPPool, notes: Notes) -> bool:
    """R13: what cannot be read takes down only itself."""
    problems = validate(obj)
    if problems:
        notes.add("ObjectNotUsable", f"{obj.kind()} {obj.name}: {problems[0]}")
    return not problems


def some(messages: list[str], limit: int = 8) -> list[str]:
    return messages if len(messages) <= limit else [*messages[:limit], f"and {len(messages) - limit} more"]
