"""Simulated nodes of a large cluster, on a real API server.

Real is what talks to it: each node is a ``NodeIPAM`` with its journal, over a ``KubeStore`` with connections of its own
and the token of ``underlay-cni`` that is bound to its Node. Simulated is what does not: kernel, pods, and the agent
that puts in a blackhole, which is there as soon as the block is.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from cni.podnet import link_name
from ipam.journal import Journal
from ipam.model import Attachment, ForeignRoute, Request, Settings
from ipam.node import NodeIPAM
from lab.kube.cluster import Cluster
from lab.kube.installed import NAMESPACE
from store.base import Event
from store.clock import Clock
from store.counted import CountedStore
from store.kube import KubeStore
from store.kubeaccess import Access, FixedToken
from store.kubehttp import Limits
from store.model import R

#: Watches of a node's CNI server: pools, reservations, configuration, its Node, its blocks.
WATCHES = 5
#: Seconds for a node to come to rest, on a machine that does something else too.
REST_LIMIT = 300.0


def node_name(number: int) -> str:
    return f"node-{number:05d}"


def register(cluster: Cluster, number: int) -> None:
    """Makes the Node, as its kubelet does."""
    address = f"172.{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    body = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node_name(number)},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }
    cluster.request("POST", "/api/v1/nodes", body)


def token(cluster: Cluster, account: str, number: int) -> str:
    """Of the account's pod on that node."""
    return cluster.token(account, namespace=NAMESPACE, node=node_name(number))


def open_store(cluster: Cluster, bearer: str, clock: Clock, limits: Limits | None = None) -> KubeStore:
    access = Access(server=cluster.url, tokens=FixedToken(bearer), ca=cluster.ca)
    return KubeStore(access, clock, limits=limits)


class SimulatedNode:
    """``pods`` has what each of its pods was given."""

    def __init__(
        self, name: str, store: KubeStore, folder: Path, clock: Clock, settings: Settings | None = None
    ) -> None:
        self.name = name
        self.pods: dict[str, tuple[str, ...]] = {}
        self._store = _Followed(store)
        self._kernel = _Kernel()
        self._journal = Journal(folder / name, "boot", step=lambda _: None)
        self._clock = clock
        self._running: asyncio.Task[None] | None = None
        self.ipam = NodeIPAM(
            node=name,
            store=self._store,
            journal=self._journal,
            kernel=self._kernel,
            clock=clock,
            boot_id="boot",
            start=1,
            link_name=lambda attachment: link_name(attachment.container, attachment.interface),
            settings=settings,
        )
        self._kernel.ipam = self.ipam

    async def up(self) -> None:
        await self.ipam.start()
        self._running = asyncio.create_task(self.ipam.run())

    async def add(self, count: int) -> None:
        """That many pods, one after another. Raises what ADD raises."""
        for i in range(len(self.pods), len(self.pods) + count):
            attachment = Attachment("underlay", f"{self.name}-{i}", "eth0")
            lease = await self.ipam.take(Request(attachment, pod=f"default/{self.name}-{i}"))
            self.ipam.bind(attachment, self._kernel.wire(lease.addresses))
            self.pods[attachment.container] = lease.addresses

    async def at_rest(self) -> None:
        """All that it handed out is in the store, and all that it follows has come. Raises what ended it."""
        async with asyncio.timeout(REST_LIMIT):
            while self._store.followed < WATCHES or self.ipam.figures().mirror_lag:
                if self._running is not None and self._running.done():
                    self._running.result()
                await asyncio.sleep(0.05)

    async def down(self) -> None:
        """Gone without a word, as with kill -9."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._journal.close()
        await self._store.close()


class _Followed(CountedStore):
    """``followed`` counts the watches that have shown the whole state."""

    def __init__(self, store: KubeStore) -> None:
        super().__init__(store)
        self.followed = 0

    async def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        async for event in super().watch(kind, since=since, where=where):
            self.followed += event.type == "synced"
            yield event


class _Kernel:
    """What a kernel says on which nothing goes wrong, and whose agent is quick."""

    ipam: NodeIPAM

    def __init__(self) -> None:
        self._index = itertools.count(1)
        self._routes: dict[str, int] = {}

    def wire(self, addresses: tuple[str, ...]) -> int:
        index = next(self._index)
        self._routes.update(dict.fromkeys(addresses, index))
        return index

    def netns(self) -> int:
        return 1

    def links(self) -> Mapping[int, str]:
        return {index: f"ul{index}" for index in self._routes.values()}

    def link(self, index: int, name: str) -> bool:
        return index in self._routes.values()

    def pod_routes(self) -> Mapping[str, int]:
        return self._routes

    def blackholes(self) -> frozenset[str]:
        return frozenset(view.cidr for view in self.ipam.blocks())

    def foreign_routes(self, within: str) -> tuple[ForeignRoute, ...]:
        return ()
