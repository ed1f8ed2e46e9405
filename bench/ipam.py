"""Addresses on a real API server: what it is asked for a burst of pods, and what an ADD notices of its absence.

The node is this namespace, where the API server listens on loopback: agent and CNI server are those that a node has,
each with the token of its pod there; no speaker runs. Pods are namespaces, and each call is the shim's.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.plugins import PAUSE, SHIM, BenchError, Plugin
from bench.stats import Times
from cni import install
from lab.kube.build import find
from lab.kube.installed import AGENT, CNI, Installed
from lab.kube.installed import install as install_cluster
from lab.kube.plane import write_kubeconfig
from lab.net import Net
from store.clock import SystemClock
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.model import IPAMBlock, IPPool, IPPoolSpec, Meta

NODE = "node-1"
API = "kube-apiserver"
#: Pairs of blocks, one with the API server and one without, and ADDs (each with its DEL) in a block.
PAIRS, ROUNDS = 7, 20
BURST, BURSTS = 100, 3
LIMIT = 60.0
#: Seconds after the last pod is in the store in which a claim ahead would come.
AFTER = 2.0
CLOCK = SystemClock()


def figures(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """``ipam.*``. NotHere where there is no API server; BenchError, SpawnError."""
    if not SHIM.exists():
        raise BenchError(f"{SHIM} is missing: make shim")
    programs = find()
    folder.mkdir(parents=True)
    with install_cluster(folder / "kube", programs, audit=True) as installed:
        return measure(installed, folder, say)


def measure(
    installed: Installed,
    folder: Path,
    say: Callable[[str], None],
    *,
    shim: Path = SHIM,
    pairs: int = PAIRS,
    rounds: int = ROUNDS,
    burst: int = BURST,
    bursts: int = BURSTS,
) -> dict[str, float]:
    """The same on a cluster that is up, in this process's network namespace, with an audit log."""
    asyncio.run(_create(installed, IPPool(metadata=Meta(name="pods"), spec=IPPoolSpec(cidr="10.204.0.0/16"))))
    net = Net(folder)
    net.adopt(NODE)
    try:
        with _node(net, installed, folder, shim) as plugin:
            say(f"ipam: {bursts} bursts of {burst} ADDs")
            found = asyncio.run(_bursts(net, installed, plugin, burst, bursts))
            say(f"ipam: {pairs} times {rounds} ADDs with the API server, and without")
            return found | _away(net, installed, plugin, pairs, rounds)
    finally:
        for number in (141, 142):
            net.run(NODE, ["ip", "route", "flush", "proto", str(number)], check=False)
        net.close()


# -- a burst ------------------------------------------------------------------------------------------------------


async def _bursts(net: Net, installed: Installed, plugin: Plugin, size: int, times: int) -> dict[str, float]:
    people = KubeStore(from_kubeconfig([installed.cluster.kubeconfig()]), CLOCK)
    seen: dict[str, float] = {}  # container -> when another client's watch showed it

    async def follow() -> None:
        async for event in people.watch(IPAMBlock):
            if event.object is not None:
                for allocation in event.object.status.allocations:
                    seen.setdefault(allocation.container, time.monotonic())

    watching = asyncio.create_task(follow())
    writes: list[float] = []
    delays: list[float] = []
    seconds: list[float] = []
    try:
        await _free_blocks(people)
        for number in range(times):
            pods = [f"burst-{number}-{i}" for i in range(size)]
            for pod in pods:
                net.add(pod)
            began, since = time.time(), time.monotonic()
            # One after another as fast as they start: each runs while the others do.
            calls = [plugin.start("ADD", pod) for pod in pods]
            answered = dict(zip(pods, await asyncio.gather(*(call.ended() for call in calls)), strict=True))
            seconds.append(max(answered.values()) - since)
            await _until(lambda pods=pods: all(pod in seen for pod in pods))  # type: ignore[misc]
            await asyncio.sleep(AFTER)
            writes.append(_writes(installed, began))
            delays += [seen[pod] - answered[pod] for pod in pods]
            for pod in pods:
                plugin.run("DEL", pod)
                net.remove(pod)
            await _until_empty(people)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await people.close()
    waited = Times(tuple(delays))
    return {
        "ipam.writes_per_100_adds": 100 * Times(tuple(writes)).p50 / size,
        "ipam.writes_per_100_adds.max": 100 * max(writes) / size,
        "ipam.visible_p50_ms": 1000 * waited.p50,
        "ipam.visible_p99_ms": 1000 * waited.p99,
        "ipam.burst_adds_per_second": size / Times(tuple(seconds)).p50,
    }


def _writes(installed: Installed, since: float) -> int:
    """What the node's CNI server wrote, by the API server's own log."""
    asked = installed.cluster.audit_log.requests(since)
    return sum(r.writes and r.node == NODE and r.user.endswith(f":{CNI}") for r in asked)


async def _free_blocks(people: KubeStore) -> None:
    await _eventually(people, lambda blocks: bool(blocks) and all(b.status.writer for b in blocks))


async def _until_empty(people: KubeStore) -> None:
    """No address is held by the store's word. A block may be on its way back: without a speaker it gets nowhere."""
    await _eventually(people, lambda blocks: not any(b.status.allocations for b in blocks))


async def _eventually(people: KubeStore, probe: Callable[[Sequence[IPAMBlock]], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not probe((await people.list(IPAMBlock)).items):  # noqa: ASYNC110 - nodes write there, not we
            await asyncio.sleep(0.1)


async def _until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not probe():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.02)


# -- with and without ------------------------------------------------------------------------------------------------


def _away(net: Net, installed: Installed, plugin: Plugin, pairs: int, rounds: int) -> dict[str, float]:
    """Blocks of ADD and DEL with the API server up and killed, in turn, so that whatever else the machine does meets
    both."""
    cluster = installed.cluster
    names = (f"pod-{i}" for i in itertools.count())
    adds: dict[str, list[float]] = {"up": [], "down": []}  # the median of each block
    dels: dict[str, list[float]] = {"up": [], "down": []}
    for pair in range(pairs):
        for state in ("up", "down") if pair % 2 else ("down", "up"):
            if state == "down":
                cluster.kill(API)
            time.sleep(1)
            add, delete = _block(net, plugin, names, rounds)
            adds[state].append(Times(tuple(add)).p50)
            dels[state].append(Times(tuple(delete)).p50)
            if state == "down":
                cluster.start_apiserver()
                asyncio.run(_caught_up(installed))
    return {
        "ipam.api_down.add.vs_up": paired(adds["down"], adds["up"]),
        "ipam.api_down.del.vs_up": paired(dels["down"], dels["up"]),
        "ipam.api_up.add.p50_ms": 1000 * median(adds["up"]),
        "ipam.api_down.add.p50_ms": 1000 * median(adds["down"]),
    }


def paired(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios of what was measured one after the other: what else the machine does changes slowly."""
    return median(a / b for a, b in zip(one, other, strict=True))


def _block(net: Net, plugin: Plugin, names: Iterator[str], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each ADD and of each DEL. The first pair is to warm up."""
    adds, dels = [], []
    for _ in range(rounds + 1):
        pod = next(names)
        net.add(pod)
        time.sleep(PAUSE)
        adds.append(plugin.run("ADD", pod))
        dels.append(plugin.run("DEL", pod))
        time.sleep(PAUSE)
        net.remove(pod)
    return adds[1:], dels[1:]


async def _caught_up(installed: Installed) -> None:
    """The CNI server has found its way back: a pod of the time without would be seen to go."""
    people = KubeStore(from_kubeconfig([installed.cluster.kubeconfig()]), CLOCK)
    try:
        await _until_empty(people)
    finally:
        await people.close()


# -- the node -------------------------------------------------------------------------------------------------------


async def _create(installed: Installed, pool: IPPool) -> None:
    people = KubeStore(from_kubeconfig([installed.cluster.kubeconfig()]), CLOCK)
    try:
        await people.create(pool)
    finally:
        await people.close()


@contextmanager
def _node(net: Net, installed: Installed, folder: Path, shim: Path) -> Iterator[Plugin]:
    """Agent and CNI server at work."""
    run, programs = folder / "run", Path(sys.executable).parent
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for account, more in ((AGENT, ["--state", str(folder / "state")]), (CNI, [])):
            kubeconfig = folder / f"{account}.kubeconfig"
            token = installed.tokens[account, NODE]
            write_kubeconfig(kubeconfig, installed.cluster.url, installed.cluster.ca, token=token)
            argv = [str(programs / account), "--node", NODE, "--store", f"kube:{kubeconfig}", "--run", str(run), *more]
            env = {**os.environ, "UNDERLAY_LOG": "WARNING"}
            processes.append(net.spawn(NODE, argv, log=folder / f"{account}.log", env=env))
        end = time.monotonic() + LIMIT
        while not install.answers(run):
            if processes[-1].poll() is not None or time.monotonic() > end:
                raise BenchError(f"underlay-cni does not answer:\n{(folder / f'{CNI}.log').read_text()}")
            time.sleep(0.02)
        config = {"cniVersion": "1.0.0", "name": "underlay", "type": "underlay"}
        yield Plugin(net, NODE, shim, config, folder / "plugin", UNDERLAY_RUN=str(run))
    finally:
        for process in processes:
            process.kill()
            process.wait()
