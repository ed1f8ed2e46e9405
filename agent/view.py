"""What the store says of this node, kept up to date: the Cluster part of each Snapshot.

Watches stay local: this node's blocks and Node object, pools, BGPConfiguration, BGPPeers, BGPFilters; the other nodes
only while the mesh is on, or a BGPPeer has a peerSelector, and then the BGPNodeStatus of those whose Node does not say
where they are reached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from agent import lastgood
from agent.config import NAMESPACE
from agent.metrics import Followed
from agent.plan import Cluster
from agent.plan.sessions import mesh_enabled
from agent.secrets import Secrets
from store.base import Store
from store.clock import Clock
from store.errors import NotFound, StoreError
from store.informer import Informer
from store.model import (
    DETECTED,
    BGPConfiguration,
    BGPFilter,
    BGPNodeStatus,
    BGPNodeStatusStatus,
    BGPPeer,
    IPAMBlock,
    IPAMBlockStatus,
    IPPool,
    Node,
    Resource,
    block_name,
)
from store.validate import validate
from store.waiting import until

log = logging.getLogger(__name__)

#: Seconds that the store is waited for at the start before the last good view is used.
PATIENCE: Final = 5.0
#: Seconds between two writes of the last good view at least, and until one that failed is tried again.
_SAVE_EVERY: Final = 1.0
_SAVE_AGAIN: Final = 30.0
#: Seconds for which nothing is seen in a pool that was deleted, until it no longer stands: longer than a node that is
#: cut off is away, mostly.
_POOL_LEFT: Final = 3600.0
#: Seconds until the owner of a block that is no longer ours is asked for again.
_ASK_EVERY: Final = 30.0

T = TypeVar("T", bound=Resource)


class View:
    """``cluster`` is the store's last complete word. ``on_change`` is called on the event loop whenever it may differ.

    ``path`` is where the last good view is kept (``snapshot.json``): passwords never are. ``namespace`` is that of the
    Secrets that BGPPeers name.
    """

    def __init__(
        self,
        store: Store,
        node: str,
        clock: Clock,
        path: Path,
        on_change: Callable[[], None],
        *,
        patience: float = PATIENCE,
        namespace: str = NAMESPACE,
    ) -> None:
        self._store, self._node, self._clock, self._path = store, node, clock, path
        self._on_change, self._patience = on_change, patience

        def follow(kind: type[T], **where: str) -> Informer[T]:
            fields = {name.replace("_", "."): value for name, value in where.items()}
            return Informer(store, kind, clock, fields or None, on_change=self._moved)

        self._own_node = follow(Node, metadata_name=node)
        self._blocks = follow(IPAMBlock, spec_node=node)
        self._configurations = follow(BGPConfiguration)
        self._peers = follow(BGPPeer)
        self._filters = follow(BGPFilter)
        self._pools = follow(IPPool)
        self._nodes = follow(Node)
        self._statuses = follow(BGPNodeStatus, status_addressSource=DETECTED)
        self._secrets = Secrets(store, namespace, clock, self._moved)
        self._cluster: Cluster | None = None
        self._kept: tuple[lastgood.Kept, ...] = ()
        self._good: dict[tuple[str, str], Resource] = {}
        self._left: dict[str, float] = {}  # deleted pools: when something was last seen in each
        self._inhabited: frozenset[str] = frozenset()
        self._taken: frozenset[str] = frozenset()
        self._questioned: frozenset[str] = frozenset()
        self._nodes_wanted = asyncio.Event()
        self._unsaved = asyncio.Event()
        self._whole = False
        self._asked = asyncio.Event()

    def cluster(self) -> Cluster | None:
        """The last complete view; None as long as there is none, not even on disk."""
        return self._cluster

    def node_uid(self) -> str:
        """Of our Node, as the store told it last; "" while there is none."""
        node = self._own_node.items.get(self._node)
        return node.metadata.uid if node else ""

    def question(self, cidrs: frozenset[str]) -> None:
        """Blocks that we hold and that the store no longer says are ours: who owns them is asked, uncached (R14)."""
        if cidrs != self._questioned:
            self._questioned = cidrs
            self._asked.set()

    def inhabit(self, pools: frozenset[str]) -> None:
        """The deleted pools that something lives in, here or elsewhere: its pods live on (R14), so each stands until it
        has been empty for long."""
        now, before = self._clock.monotonic(), self._inhabited
        self._left |= dict.fromkeys(pools & self._left.keys(), now)
        forgotten = [name for name, seen in self._left.items() if now - seen >= _POOL_LEFT]
        for name in forgotten:
            del self._left[name], self._good[IPPool.kind(), name]
        self._inhabited = frozenset(pools & self._left.keys())
        if forgotten or self._inhabited != before:
            self._moved()

    def followed(self) -> tuple[Followed, ...]:
        """How well each kind is followed."""
        informers = self._needed()
        kinds = {"own_node" if i is self._own_node else i.kind.PLURAL: (i.synced, i.behind) for i in informers}
        kinds["secrets"] = self._secrets.followed()
        return tuple(Followed(kind, *how) for kind, how in kinds.items())

    def last_good(self) -> tuple[float | None, bool]:
        """Seconds since the last good view was written (None: there is none), and whether it has all that is known."""
        try:
            written = self._path.stat().st_mtime
        except OSError:
            return None, False
        return max(0.0, datetime.fromisoformat(self._clock.now()).timestamp() - written), self._whole

    async def run(self) -> None:
        """Follows the store until cancelled."""
        self._remember()
        async with asyncio.TaskGroup() as tasks:
            for informer in self._always():
                tasks.create_task(informer.run())
            tasks.create_task(self._secrets.run())
            tasks.create_task(self._follow_nodes())
            tasks.create_task(self._fall_back())
            tasks.create_task(self._keep())
            tasks.create_task(self._ask_owners())

    def _moved(self) -> None:
        configuration = self._configurations.items.get("default")
        selected = any(peer.spec.peer_selector for peer in self._peers.items.values())
        if self._configurations.synced and (selected or mesh_enabled(configuration)):
            self._nodes_wanted.set()
        else:
            self._nodes_wanted.clear()
        if self._complete():
            self._cluster = self._read()
            self._whole = False
            self._unsaved.set()
        self._on_change()

    def _always(self) -> list[Informer[Any]]:
        bgp: list[Informer[Any]] = [self._configurations, self._peers, self._filters]
        return [self._own_node, self._blocks, *bgp, self._pools]

    def _complete(self) -> bool:
        return all(informer.synced for informer in self._needed())

    def _needed(self) -> list[Informer[Any]]:
        others: list[Informer[Any]] = [self._nodes, self._statuses]
        return self._always() + (others if self._nodes_wanted.is_set() else [])

    def _read(self) -> Cluster:
        with_nodes = self._nodes_wanted.is_set()
        standing: dict[str, str] = {}
        configurations = {c.name: c for c in self._sane(self._configurations.items.values(), standing)}
        default = configurations.pop("default", None)
        filters = {f.name: f for f in self._sane(self._filters.items.values(), standing)}
        peers = tuple(self._sane(self._peers.items.values(), standing, also=self._without_filter))
        self._keep_filters(peers, filters, standing)
        passwords = [p.spec.password for p in peers] + [default.spec.node_mesh_password if default else None]
        self._secrets.want(frozenset(p.secret_key_ref.name for p in passwords if p))
        return Cluster(
            node=self._this_node(standing),
            nodes=tuple(n for n in self._nodes.items.values() if n.name != self._node) if with_nodes else (),
            statuses=tuple(s for s in self._statuses.items.values() if s.name != self._node) if with_nodes else (),
            configuration=default,
            node_configurations=tuple(configurations.values()),
            peers=peers,
            filters=tuple(filters.values()),
            secrets=self._secrets.present(),
            pools=(*self._sane(self._pools.items.values(), standing), *self._deleted_pools(standing)),
            deleted_pools=frozenset(self._left),
            blocks=tuple(self._blocks.items.values()),
            taken=self._taken,
            standing=standing,
        )

    def _this_node(self, standing: dict[str, str]) -> Node | None:
        """A Node that was deleted stands, too: blocks and sessions are brought to their end under its last word."""
        key = (Node.kind(), self._node)
        node = self._own_node.items.get(self._node)
        if node is not None:
            self._good[key] = node
            return node
        good = self._good.get(key)
        if not isinstance(good, Node):
            return None
        standing[f"Node {self._node}"] = "it was deleted"
        return good

    def _deleted_pools(self, standing: dict[str, str]) -> Iterator[IPPool]:
        """Those that still count for what is let in and announced."""
        gone = [p for p in self._good.values() if isinstance(p, IPPool) and p.name not in self._pools.items]
        now = self._clock.monotonic()
        self._left = {pool.name: self._left.get(pool.name, now) for pool in gone}
        for pool in gone:
            if pool.name in self._inhabited:
                standing[f"IPPool {pool.name}"] = "it was deleted, and pods live in it"
            yield pool

    def _sane(
        self, objects: Iterable[T], standing: dict[str, str], *, also: Callable[[T], str] = lambda _: ""
    ) -> Iterator[T]:
        """R13: an object that cannot be used stands as it last could be, which ``standing`` is told; one that never
        could is the plan's to name. ``also`` says what else is wrong with one."""
        for obj in objects:
            key = (obj.kind(), obj.name)
            problems = validate(obj)
            problem = str(problems[0]) if problems else also(obj)
            if not problem:
                self._good[key] = obj
            good: Any = self._good.get(key, obj)
            if good is not obj:
                standing[f"{obj.kind()} {obj.name}"] = problem
            yield good

    def _without_filter(self, peer: BGPPeer) -> str:
        """Which filters of the peer are nowhere to be had, in words; "" if none."""
        missing = [name for name in peer.spec.filters if (BGPFilter.kind(), name) not in self._good]
        return f"there is no usable BGPFilter {', '.join(missing)}" if missing else ""

    def _keep_filters(self, peers: Iterable[BGPPeer], filters: dict[str, BGPFilter], standing: dict[str, str]) -> None:
        """A filter that was deleted stands as long as a peer names it; others that are gone are forgotten."""
        named = {name for peer in peers for name in peer.spec.filters}
        for key in [key for key in self._good if key[0] == BGPFilter.kind() and key[1] not in filters]:
            good = self._good[key]
            if key[1] in named and isinstance(good, BGPFilter):
                filters[good.name] = good
                standing[f"BGPFilter {good.name}"] = "it was deleted, and a BGPPeer names it"
            else:
                del self._good[key]

    def _remember(self) -> None:
        """What could be used before the agent was started."""
        try:
            self._kept = lastgood.load(self._path)
        except (lastgood.Unreadable, OSError) as e:
            log.warning("%s", e)
        self._good |= {
            (o.kind(), o.name): o
            for o in self._kept
            if (isinstance(o, BGPPeer | BGPFilter | IPPool) and not validate(o))
            or (isinstance(o, Node) and o.name == self._node)
        }

    async def _follow_nodes(self) -> None:
        """Watches the other nodes as long as the mesh is on, or a BGPPeer selects peers among them."""
        while True:
            await self._nodes_wanted.wait()
            running = {asyncio.create_task(informer.run()) for informer in (self._nodes, self._statuses)}
            try:
                ended: set[asyncio.Task[None]] = set()
                while self._nodes_wanted.is_set() and not ended:
                    ended, _ = await asyncio.wait(running, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _fall_back(self) -> None:
        """R14: starts from the last good view if the store does not answer in time."""
        await self._clock.sleep(self._patience)
        if self._cluster is not None:
            return
        kept = self._kept
        if not kept:
            return
        log.warning("the store has not answered in %g s: starting from the last good view", self._patience)
        nodes = [o for o in kept if isinstance(o, Node)]
        self._cluster = Cluster(
            node=next((n for n in nodes if n.name == self._node), None),
            nodes=tuple(n for n in nodes if n.name != self._node),
            statuses=tuple(o for o in kept if isinstance(o, BGPNodeStatus)),
            configuration=next((o for o in kept if isinstance(o, BGPConfiguration) and o.name == "default"), None),
            node_configurations=tuple(
                o for o in kept if isinstance(o, BGPConfiguration) and o.name.startswith("node.")
            ),
            peers=tuple(o for o in kept if isinstance(o, BGPPeer)),
            filters=tuple(o for o in kept if isinstance(o, BGPFilter)),
            pools=tuple(o for o in kept if isinstance(o, IPPool)),
            blocks=tuple(o for o in kept if isinstance(o, IPAMBlock)),
            live=False,
        )
        self._on_change()

    async def _keep(self) -> None:
        """Writes the last good view, not more often than once a second, and only when it differs."""
        written: list[lastgood.Kept] = []
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            cluster, pause = self._cluster, _SAVE_EVERY
            if cluster is not None and cluster.live:
                objects = _objects(cluster)
                try:
                    if objects != written:
                        lastgood.save(self._path, objects)
                        written = objects
                    self._whole = True
                except OSError as e:
                    log.warning("the last good view is not kept, will try again: %s", e)
                    self._unsaved.set()
                    pause = _SAVE_AGAIN
            await self._clock.sleep(pause)

    async def _ask_owners(self) -> None:
        while True:
            await until(self._clock, self._asked, _ASK_EVERY if self._questioned else None)
            self._asked.clear()
            taken = set()
            for cidr in sorted(self._questioned):
                if await self._is_taken(cidr):
                    taken.add(cidr)
            if frozenset(taken) != self._taken:
                self._taken = frozenset(taken)
                self._moved()

    async def _is_taken(self, cidr: str) -> bool:
        """Whether another node is seen to own the block; not to know is not to see."""
        try:
            block = await self._store.get(IPAMBlock, block_name(cidr))
        except NotFound:
            return False
        except StoreError as e:
            log.info("who owns %s is not known: %s", cidr, e)
            return cidr in self._taken
        return block.spec.node != self._node


def _objects(cluster: Cluster) -> list[lastgood.Kept]:
    """What is worth keeping; the allocations are not: they change all the time, and the kernel has the routes."""
    single = (cluster.node, cluster.configuration)
    return [
        *(o for o in single if o is not None),
        *cluster.nodes,
        *(_addresses_alone(s) for s in cluster.statuses),
        *cluster.node_configurations,
        *cluster.peers,
        *cluster.filters,
        *cluster.pools,
        *(_without_allocations(b) for b in cluster.blocks),
    ]


def _addresses_alone(status: BGPNodeStatus) -> BGPNodeStatus:
    said = BGPNodeStatusStatus(addresses=status.status.addresses, address_source=status.status.address_source)
    return BGPNodeStatus(metadata=replace(status.metadata, resource_version=""), status=said)


def _without_allocations(block: IPAMBlock) -> IPAMBlock:
    return IPAMBlock(
        metadata=replace(block.metadata, resource_version=""),
        spec=block.spec,
        status=IPAMBlockStatus(releasing=block.status.releasing),
    )
