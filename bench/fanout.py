"""What those who watch blocks cost at each write of one.

A node watches its own blocks by ``spec.node``. The API server has no index of custom resources by such a field, so it
shows each write of a block to every such watch of the cluster, to be compared there; this is the part of a write that
grows with the cluster. Two watches a node: CNI server and agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from bench.fleet import node_name, open_store, token
from bench.process import cpu_seconds
from lab.kube.cluster import Cluster
from lab.kube.installed import CNI
from store.clock import SystemClock
from store.kube import KubeStore
from store.model import Allocation, IPAMBlock, IPAMBlockSpec, Meta, block_name, within_of

WATCHERS, WRITES = 1000, 300
#: Inside the pool that the caller has made.
BLOCK = "10.143.255.192/26"
#: Seconds until watches that have just begun cost nothing more.
QUIET = 2.0
#: Watches that begin at a time.
WIDTH = 25
CLOCK = SystemClock()


async def figures(
    cluster: Cluster, say: Callable[[str], None], *, watchers: int = WATCHERS, writes: int = WRITES
) -> dict[str, float]:
    """``scale.write.*``: CPU time of the API server for one write of a block with 20 addresses: ms with no such watch,
    and microseconds more for each. The first Node of ``bench.fleet`` is there, and its server is not."""
    store = open_store(cluster, token(cluster, CNI, 0), CLOCK)
    spec = IPAMBlockSpec(cidr=BLOCK, pool="pods", node=node_name(0), within=within_of(BLOCK))
    block = await store.create(IPAMBlock(metadata=Meta(name=block_name(BLOCK)), spec=spec))
    watching: list[asyncio.Task[None]] = []
    try:
        say(f"scale: {writes} writes of a block, with no watch and with {watchers}")
        block, alone = await _cost(cluster, store, block, writes)
        for first in range(0, watchers, WIDTH):
            begun = [asyncio.Event() for _ in range(first, min(first + WIDTH, watchers))]
            watching += [asyncio.create_task(_watch(store, f"other-{first + i}", e)) for i, e in enumerate(begun)]
            await asyncio.gather(*(event.wait() for event in begun))
        block, watched = await _cost(cluster, store, block, writes)
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await store.delete(IPAMBlock, block.name)
        await store.close()
    return {
        "scale.write.api_cpu_ms": 1000 * alone,
        "scale.write.api_cpu_us_per_watch": 1e6 * (watched - alone) / watchers,
    }


async def _watch(store: KubeStore, node: str, begun: asyncio.Event) -> None:
    async for event in store.watch(IPAMBlock, where={"spec.node": node}):
        if event.type == "synced":
            begun.set()


async def _cost(cluster: Cluster, store: KubeStore, block: IPAMBlock, writes: int) -> tuple[IPAMBlock, float]:
    """The block as it is then, and the seconds of the API server's CPU that each write took."""
    await asyncio.sleep(QUIET)
    pid = cluster.pid("kube-apiserver")
    before = cpu_seconds(pid)
    for number in range(writes):
        block = await store.update_status(_filled(block, number))
    return block, (cpu_seconds(pid) - before) / writes


def _filled(block: IPAMBlock, number: int) -> IPAMBlock:
    """Twenty addresses are held, each by another pod than before."""
    allocations = tuple(
        Allocation(
            address=f"10.143.255.{192 + i}",
            network="underlay",
            container=f"{number:032x}{i:032x}",
            interface="eth0",
            pod=f"default/pod-{number}-{i}",
            since="2026-01-01T00:00:00Z",
        )
        for i in range(20)
    )
    status = msgspec.structs.replace(block.status, allocations=allocations, used=20, free=44)
    return msgspec.structs.replace(block, status=status)
