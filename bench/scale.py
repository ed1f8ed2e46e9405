"""How cost grows with the cluster: thousands of simulated nodes (``bench.fleet``) claim on one real API server.

The cluster grows from stage to stage, so the figures of a stage are those of the nodes that joined it since the one
before: what a node costs in a cluster of about that size. Requests are those of the API server's own audit log. As a
node's watches stay open as long as it lives, and one machine cannot hold those of thousands, ``WIDTH`` nodes live at a
time; what a node costs at rest is measured apart, on nodes that stay.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec

from agent.view import View
from bench import fanout
from bench.fleet import SimulatedNode, node_name, open_store, register, token
from bench.process import cpu_seconds, resident_mb
from bench.sockets import raise_limit
from ipam.model import Settings
from lab.kube.audit import Asked, count
from lab.kube.build import find
from lab.kube.cluster import Cluster
from lab.kube.installed import AGENT, CNI, NAMESPACE, install
from lab.kube.plane import write_kubeconfig
from store.base import Store
from store.clock import SystemClock
from store.kubehttp import Limits
from store.model import BGPConfiguration, BGPConfigurationSpec, IPAMBlock, IPPool, IPPoolSpec, Meta

#: Nodes in the cluster at the end of each stage.
STAGES = (10, 100, 1000, 5000)
PODS = 20
#: 16,384 blocks of 64 addresses.
POOL = "10.128.0.0/12"
#: Nodes that live at a time.
WIDTH = 48
#: Seconds that a node stays after its watches began, so that their requests are counted.
LINGER = 0.5
#: At rest: how many nodes, how many times faster than in life, and for how many seconds.
RESTING, FASTER, REST = 100, 20, 90.0
AGENT_PROGRAM = str(Path(sys.executable).parent / "underlay-agent")
AGENT_LIMIT = 60.0
CLOCK = SystemClock()
API = "kube-apiserver"


class BenchError(Exception):
    """What was measured is not as it must be."""


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """What joining cost: ``nodes`` of them, in ``seconds``. ``requests`` are theirs; CPU is in seconds."""

    nodes: int
    pods: int
    seconds: float
    requests: tuple[Asked, ...]
    api_cpu: float
    etcd_cpu: float
    api_mb: float

    @property
    def conflicts(self) -> int:
        """Creates that met a block of another node."""
        return sum(asked.verb == "create" and asked.code == 409 for asked in self.requests)

    def figures(self, name: str) -> dict[str, float]:
        requests = self.requests
        return {
            f"scale.{name}.seconds": self.seconds,
            f"scale.{name}.requests_per_node": len(requests) / self.nodes,
            f"scale.{name}.writes_per_node": sum(asked.writes for asked in requests) / self.nodes,
            f"scale.{name}.conflicts": self.conflicts,
            f"scale.{name}.refused": sum(asked.code >= 400 for asked in requests) - self.conflicts,
            f"scale.{name}.api_cpu_ms_per_node": 1000 * self.api_cpu / self.nodes,
            f"scale.{name}.etcd_cpu_ms_per_node": 1000 * self.etcd_cpu / self.nodes,
            f"scale.{name}.api_mb": self.api_mb,
        }


def figures(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """``scale.*``. NotHere where there is no API server, BenchError if an address was given twice."""
    raise_limit()
    programs = find()
    folder.mkdir(parents=True)
    with install(folder / "kube", programs, audit=True) as installed:
        return measure(installed.cluster, folder, say)


def measure(
    cluster: Cluster,
    folder: Path,
    say: Callable[[str], None],
    *,
    stages: Sequence[int] = STAGES,
    resting: int = RESTING,
    faster: float = FASTER,
    rest: float = REST,
    watchers: int = fanout.WATCHERS,
    writes: int = fanout.WRITES,
    agents: bool = True,
) -> dict[str, float]:
    """The same on a cluster that is up, with our manifests applied and an audit log, and no nodes of this bench."""
    found = asyncio.run(_measure(cluster, folder, say, stages, resting, faster, rest, agents))
    return found | asyncio.run(fanout.figures(cluster, say, watchers=watchers, writes=writes))


async def _measure(
    cluster: Cluster,
    folder: Path,
    say: Callable[[str], None],
    stages: Sequence[int],
    resting: int,
    faster: float,
    rest: float,
    agents: bool,
) -> dict[str, float]:
    people = open_store(cluster, cluster.admin_token, CLOCK)
    try:
        await people.create(IPPool(metadata=Meta(name="pods"), spec=IPPoolSpec(cidr=POOL)))
        mesh = BGPConfigurationSpec(node_to_node_mesh_enabled=False)
        configuration = await people.create(BGPConfiguration(metadata=Meta(name="default"), spec=mesh))
        found: dict[str, float] = {}
        given: dict[str, str] = {}
        have = 0
        for size in stages:
            say(f"scale: {size - have} nodes join {have}, {PODS} pods each")
            growth = await _grow(cluster, folder, range(have, size), given)
            found |= growth.figures(f"nodes{size}")
            say(f"scale: {growth.seconds:.0f} s; {_by_kind(growth)}")
            have = size
            found[f"scale.nodes{size}.duplicates"] = check((await people.list(IPAMBlock)).items, given)
            if agents:
                found[f"scale.nodes{size}.agent_mb"] = _agent(cluster, folder / f"agent-{size}")
                if size == 100:
                    on = msgspec.structs.replace(configuration, spec=BGPConfigurationSpec())
                    configuration = await people.update(on)
                    found[f"scale.nodes{size}.agent_mesh_mb"] = _agent(cluster, folder / f"mesh-{size}")
                    off = msgspec.structs.replace(configuration, spec=mesh)
                    configuration = await people.update(off)
        resting = min(resting, have)
        say(f"scale: {resting} nodes at rest, {faster:g} times faster than in life, for {rest:.0f} s")
        found |= await _rest(cluster, folder, resting, faster, rest)
    finally:
        await people.close()
    if any(value for name, value in found.items() if name.endswith(".duplicates")):
        raise BenchError("an address was handed out twice, or is not in the store as it was handed out")
    return found


# -- nodes that join ----------------------------------------------------------------------------------------------


async def _grow(cluster: Cluster, folder: Path, numbers: Iterable[int], given: dict[str, str]) -> Growth:
    """Lets the nodes join, and notes in ``given`` to which pod each address went."""
    numbers = list(numbers)
    tokens = []
    for number in numbers:
        register(cluster, number)
        tokens.append(token(cluster, CNI, number))
    places = asyncio.Semaphore(WIDTH)

    async def join(number: int, bearer: str) -> None:
        async with places:
            node = SimulatedNode(node_name(number), open_store(cluster, bearer, CLOCK), folder / "nodes", CLOCK)
            try:
                await node.up()
                await node.add(PODS)
                await node.at_rest()
                await asyncio.sleep(LINGER)
            finally:
                await node.down()
            for pod, addresses in node.pods.items():
                for address in addresses:
                    if given.setdefault(address, pod) != pod:
                        raise BenchError(f"{address} was given to {given[address]} and to {pod}")

    began, stamp = time.perf_counter(), time.time()
    api, etcd = cluster.pid(API), cluster.pid("etcd")
    before = cpu_seconds(api), cpu_seconds(etcd)
    async with asyncio.TaskGroup() as group:
        for number, bearer in zip(numbers, tokens, strict=True):
            group.create_task(join(number, bearer))
    return Growth(
        nodes=len(numbers),
        pods=len(numbers) * PODS,
        seconds=time.perf_counter() - began,
        requests=_of(cluster, CNI, stamp),
        api_cpu=cpu_seconds(api) - before[0],
        etcd_cpu=cpu_seconds(etcd) - before[1],
        api_mb=resident_mb(api),
    )


def check(blocks: Iterable[IPAMBlock], given: dict[str, str]) -> int:
    """How many addresses are not exactly once in the store, in a block that they are in, for the pod that has them; and
    how many blocks overlap another."""
    blocks = sorted(blocks, key=lambda b: ip_network(b.spec.cidr))
    wrong, last, seen = 0, -1, dict(given)
    for block in blocks:
        network = ip_network(block.spec.cidr)
        wrong += int(network.network_address) <= last
        last = max(last, int(network.broadcast_address))
        for allocation in block.status.allocations:
            mine = seen.pop(allocation.address, "") == allocation.container
            wrong += not (mine and ip_address(allocation.address) in network)
            wrong += allocation.container.rpartition("-")[0] != block.spec.node
    return wrong + len(seen)


def _of(cluster: Cluster, account: str, since: float) -> tuple[Asked, ...]:
    user = f"system:serviceaccount:{NAMESPACE}:{account}"
    return tuple(asked for asked in cluster.audit_log.requests(since) if asked.user == user)


def _by_kind(growth: Growth) -> str:
    counts: Counter[tuple[str, ...]] = count(growth.requests, "verb", "resource", "subresource", "code")
    return ", ".join(f"{n / growth.nodes:.2f} {' '.join(filter(None, what))}" for what, n in counts.most_common())


# -- nodes at rest --------------------------------------------------------------------------------------------------


async def _rest(cluster: Cluster, folder: Path, nodes: int, faster: float, seconds: float) -> dict[str, float]:
    """Nodes that are up and have nothing to do; what comes every few minutes comes ``faster``, and is told as in life.
    Of the agents there is what follows the store."""
    limits = msgspec.structs.replace(Limits(), watch=Limits().watch / faster)
    settings = msgspec.structs.replace(Settings(), recheck=Settings().recheck / faster)
    servers: list[SimulatedNode] = []
    views: list[asyncio.Task[None]] = []
    stores: list[Store] = []
    before = resident_mb(cluster.pid(API))
    try:
        for number in range(nodes):
            name = node_name(number)
            store = open_store(cluster, token(cluster, CNI, number), CLOCK, limits)
            servers.append(SimulatedNode(name, store, folder / "nodes", CLOCK, settings))
            stores.append(open_store(cluster, token(cluster, AGENT, number), CLOCK, limits))
            view = View(stores[-1], name, CLOCK, folder / f"{name}.json", lambda: None)
            await servers[-1].up()
            views.append(asyncio.create_task(view.run()))
        await asyncio.gather(*(server.at_rest() for server in servers))
        # Until the watches, which began together, have spread.
        await asyncio.sleep(2 * limits.watch)
        stamp, cpu, began = time.time(), cpu_seconds(cluster.pid(API)), time.perf_counter()
        await asyncio.sleep(seconds)
        minutes = (time.perf_counter() - began) * faster / 60
        used = cpu_seconds(cluster.pid(API)) - cpu
        asked = {account: len(_of(cluster, account, stamp)) for account in (CNI, AGENT)}
        after = resident_mb(cluster.pid(API))
    finally:
        for view_task in views:
            view_task.cancel()
        await asyncio.gather(*views, return_exceptions=True)
        for server in servers:
            await server.down()
        for each in stores:
            await each.close()
    return {
        "scale.rest.nodes": nodes,
        "scale.rest.cni.requests_per_node_minute": asked[CNI] / nodes / minutes,
        "scale.rest.agent.requests_per_node_minute": asked[AGENT] / nodes / minutes,
        "scale.rest.api_cpu_ms_per_node_minute": 1000 * used / nodes / minutes,
        "scale.rest.api_kb_per_node": 1024 * (after - before) / nodes,
    }


# -- the agent ------------------------------------------------------------------------------------------------------


def _agent(cluster: Cluster, folder: Path) -> float:
    """MB of a real agent on the first node, once it has seen the store and drawn its plan; no speaker runs."""
    folder.mkdir(parents=True)
    kubeconfig = folder / "kubeconfig"
    write_kubeconfig(kubeconfig, cluster.url, cluster.ca, token=token(cluster, AGENT, 0))
    argv = [AGENT_PROGRAM, "--node", node_name(0), "--store", f"kube:{kubeconfig}"]
    argv += ["--run", str(folder / "run"), "--state", str(folder / "state")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(os.environ))
    try:
        end = time.monotonic() + AGENT_LIMIT
        while not (folder / "state" / "snapshot.json").exists():
            if process.poll() is not None or time.monotonic() > end:
                raise BenchError(f"underlay-agent is not up:\n{(folder / 'log').read_text()}")
            time.sleep(0.05)
        time.sleep(3)
        return resident_mb(process.pid)
    finally:
        process.terminate()
        process.wait(10)
