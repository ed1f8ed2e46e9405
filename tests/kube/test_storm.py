"""Bad days of the API server, while pods come and go: nothing is lost, nothing is hammered, no ADD waits for it.

Nothing here is told when the API server is away but by its own silence; what it says in each fault is scripted in
``test_faults.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from ctl import look
from ipam import journal
from ipam.errors import IPAMError
from ipam.ledger import Phase
from ipam.model import Lease, Settings
from lab.kube.audit import count
from lab.kube.installed import CNI, NAMESPACE, Installed, pod_token
from store.errors import StoreError
from store.informer import Informer
from store.kubehttp import Limits
from store.model import Meta, Node
from tests.ipam_fakes import Rig, pool, reservation
from tests.kube.world import CLOCK, World, run, soon

API, ETCD = "kube-apiserver", "etcd"
NODES = ("node-1", "node-2", "node-3")
#: As in production, only faster.
LIMITS = Limits(connect=1, request=1.5, silence=2.5, watch=2, patience=1)
SETTINGS = Settings(
    rest=0.3,
    withdrawn=0.2,
    blackhole_limit=0.3,
    sweep=1.0,
    recheck=2.0,
    store_limit=2.0,
    take_limit=2.0,
    backoff_max=1.0,
)
#: Requests a second of one server, answered or not. A loop that nothing holds back asks 250 to 1,000 times a second: an
#: answer takes 1 to 4 ms, a refused connection less. Ours are eight (five informers, mirror, keeper, ownership). After
#: a fault each pauses for 0.1 s, then longer, and a try is two requests. So a second in which all of them begin to fail
#: has 8 * 2 * 4 (at 0, 0.1, 0.3 and 0.7 s), and the mean is far below.
MOST, MEAN = 64, 20


class Kubelet:
    """Adds pods and deletes them, in waves, so that blocks are claimed and given back under way."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.pods: dict[str, Lease] = {}
        self.added = self.refused = 0
        self._rng = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            wanted = self._rng.choice((2, 8, 30))
            for _ in range(60):
                if stop.is_set():
                    return
                if len(self.pods) < wanted:
                    await self._add(f"{self.rig.node}-{self.added + self.refused}")
                elif self.pods:
                    name = self._rng.choice(sorted(self.pods))
                    del self.pods[name]
                    assert self.rig.delete(name) is not None
                await asyncio.sleep(self._rng.uniform(0, 0.04))

    async def _add(self, name: str) -> None:
        try:
            # With an address free it asks nobody and waits for nothing, whatever the API server does.
            lease = at_once(self.rig.add(name)) if self._ready() else await self.rig.add(name)
        except IPAMError as e:
            assert not self._ready(), f"{self._ready()} addresses are free, and yet: {e}"
            self.refused += 1
            await asyncio.sleep(0.1)
        else:
            self.pods[name] = lease
            self.added += 1

    def _ready(self) -> int:
        return sum(view.free for view in self.rig.ipam.blocks() if view.phase == Phase.READY)


def at_once(work: Coroutine[Any, Any, Lease]) -> Lease:
    """Its result, of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        lease: Lease = done.value
        return lease
    work.close()
    raise AssertionError("an ADD waited, and addresses were free")


async def people(world: World, stop: asyncio.Event) -> None:
    """Operators change their minds."""
    for i in itertools.count():
        for obj in (
            pool(f"wish-{i % 7}", f"10.{100 + i % 7}.0.0/16", disabled=True),
            reservation(f"r-{i % 5}", f"10.1.2.{i % 5}"),
        ):
            if stop.is_set():
                return
            try:
                if i % 3 == 2:
                    await world.people.delete(type(obj), obj.name)
                else:
                    await world.people.create(obj)
            except StoreError:  # it is there, it is not there, or nobody is
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.02)


async def ready(world: World) -> None:
    async def is_ready() -> bool:
        return await asyncio.to_thread(world.cluster.is_ready)

    await soon(is_ready, 60)


async def bad_day(world: World, evening: asyncio.Event, stop: asyncio.Event) -> None:
    """Ten kills of the API server, most of them before it was all there; etcd's; a stop longer than any limit of ours;
    tokens that are refused. It ends while the API server is away, so that nobody who comes later tells what it lost:
    people go home before (``evening``), as a reservation that comes or goes has every block written anew."""
    cluster, rng = world.cluster, random.Random(4)

    async def kill(*, again: float = 0) -> None:
        cluster.kill(API)
        await asyncio.sleep(rng.uniform(0, 0.3))
        cluster.start_apiserver(wait=False)
        if again:
            await asyncio.sleep(again)
        else:
            await ready(world)
            await asyncio.sleep(0.5)

    await asyncio.sleep(1)
    await kill()
    for _ in range(3):
        await kill(again=rng.uniform(0.3, 2.0))
    await kill()
    # node-1's token runs out before the kubelet renews it; node-2's goes with its pod.
    good = world.token(CNI, "node-1")
    world.renew(CNI, "node-1", "expired")
    cluster.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/{CNI}-node-2", {"gracePeriodSeconds": 0})
    await asyncio.sleep(1.5)
    world.renew(CNI, "node-1", good)
    world.renew(CNI, "node-2", pod_token(cluster, CNI, "node-2"))
    os.kill(cluster.pid(API), signal.SIGSTOP)
    await asyncio.sleep(LIMITS.silence + 0.3)
    os.kill(cluster.pid(API), signal.SIGCONT)
    await asyncio.sleep(0.5)
    for _ in range(2):
        await kill(again=rng.uniform(0.3, 2.0))
    cluster.kill(ETCD)
    await asyncio.sleep(1)
    cluster.start_etcd()
    await kill(again=rng.uniform(0.3, 2.0))
    evening.set()
    await kill()
    await asyncio.sleep(0.5)  # with the one in kill, longer than the pauses of those that follow the store
    cluster.kill(API)
    await asyncio.sleep(0.7)
    stop.set()
    await asyncio.sleep(0.5)
    cluster.start_apiserver(wait=False)
    await ready(world)


def informers(world: World) -> Iterator[tuple[str, Informer[Any]]]:
    for rig in world.rigs:
        watched = [v for v in vars(rig.ipam._watches).values() if isinstance(v, Informer)]
        assert len(watched) >= 4
        yield from ((rig.node, informer) for informer in (*watched, world.agents[rig.node]))


async def lost(world: World) -> dict[str, object]:
    """Where an informer's copy is not what the server has."""
    found: dict[str, object] = {}
    for node, informer in informers(world):
        there = {obj.name: obj for obj in (await world.people.list(informer._kind, where=informer._where)).items}
        if dict(informer.items) != there or informer.error:
            found[f"{node} {informer._kind.PLURAL}"] = (informer.error, dict(informer.items), there)
    return found


def test_a_bad_day_of_the_api_server_loses_nothing(installed: Installed, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.people.create(Node(metadata=Meta(name="node-3")))
        kubelets = [Kubelet(await world.node(name, SETTINGS), i) for i, name in enumerate(NODES)]
        cluster, evening, stop = world.cluster, asyncio.Event(), asyncio.Event()
        began, since = CLOCK.monotonic(), time.time()
        async with asyncio.TaskGroup() as group:
            for kubelet in kubelets:
                group.create_task(kubelet.run(stop))
            group.create_task(people(world, evening))
            await bad_day(world, evening, stop)
        took = CLOCK.monotonic() - began

        async def caught_up() -> bool:
            try:
                return not await lost(world) and all([await mirrors(rig) for rig in world.rigs])
            except StoreError:
                return False

        try:
            await soon(caught_up)
        except TimeoutError:
            behind = [rig.node for rig in world.rigs if not await mirrors(rig)]
            raise AssertionError(f"mirrors behind: {behind}; informers: {await lost(world)}") from None
        for kubelet in kubelets:
            rig = kubelet.rig
            leases = {lease.attachment: lease for lease in rig.ipam.leases()}
            assert leases == {lease.attachment: lease for lease in kubelet.pods.values()}
            assert dict(journal.read(rig._journal.path).leases) == leases
            assert sorted(rig.kernel.live()) == sorted(a for lease in leases.values() for a in lease.addresses)
        addresses = [a for kubelet in kubelets for lease in kubelet.pods.values() for a in lease.addresses]
        assert len(addresses) == len(set(addresses))
        report = await look.check(world.people, CLOCK)
        assert (report.findings, report.unseen) == ((), ())
        faults = count((r for r in cluster.audit_log.requests(since) if r.code >= 400), "code")
        print(f"\n{took:.1f} s; the API server said no with {dict(faults)}")
        for kubelet in kubelets:
            node = kubelet.rig.node
            times = [at for at in world.asked[CNI, node] if began <= at < began + took]
            mean, most = len(times) / took, busiest(times)
            print(f"{node}: {kubelet.added} ADDs, {kubelet.refused} refused; {mean:.1f} requests/s, at most {most}")
            assert mean <= MEAN
            assert most <= MOST

    run(installed, tmp_path, story, pool("storm", "10.1.0.0/20", 28), limits=LIMITS, limit=150)


async def mirrors(rig: Rig) -> bool:
    leases = {a: lease.attachment.container for lease in rig.ipam.leases() for a in lease.addresses}
    return await rig.mirror() == leases


def busiest(times: list[float]) -> int:
    """Requests in the busiest second."""
    return max(sum(1 for t in times[i:] if t < at + 1) for i, at in enumerate(times))
