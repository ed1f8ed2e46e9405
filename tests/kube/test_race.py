"""64 nodes race for 32 free blocks, and die at random: no block has two owners, none is lost, no address is held twice.

Each node has the rights of its own pod, its journal and its kernel, and lives through all rounds. In a round each asks
for addresses, all at once; a part of the nodes is killed, at a named step or in the middle of a request, and started
again. Then a model is held against store, servers and journals, the pods go, and every block is to come free.
``UNDERLAY_ROUNDS`` says how many rounds (200 were played), ``UNDERLAY_SEED`` which.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ipam import journal, keeper
from ipam.errors import IPAMError
from ipam.ledger import Phase
from ipam.model import Attachment, Lease
from ipam.node import Request, Settings
from lab.kube.installed import CNI, Installed, node, pod_token
from lab.kube.plane import write_kubeconfig
from store.base import Event, Listing
from store.clock import SystemClock
from store.errors import StoreError
from store.informer import Informer
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.model import IPAMBlock, R
from tests.ipam_fakes import Rig, link_name
from tests.ipam_fakes import pool as a_pool

NODES, BLOCKS = 64, 32
ROUNDS = int(os.environ.get("UNDERLAY_ROUNDS", "2"))
SEED = int(os.environ.get("UNDERLAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
#: Nodes that are killed in a round.
KILLS = 16
STEPS = ("journal-written", "block-created", "block-marked", "block-deleted", "mirrored")
#: Those that come when a block is given back.
LATE = ("block-marked", "block-deleted")
#: Seconds of real time in which the blocks of a round are taken, and in which all of them are free again.
COME, GO = 30.0, 60.0
CLOCK = SystemClock()
SETTINGS = Settings(
    rest=0.05,
    batch=0.05,
    blackhole_limit=0.3,
    poll=0.05,
    withdrawn=0.05,
    take_limit=0.6,
    backoff_min=0.1,
    backoff_max=5.0,  # who found no free block storms no API server
    store_limit=20.0,
)


class Killed(BaseException):
    pass


class Mortal:
    """A node's store, which a dead node cannot ask any more. What it had asked is carried out or not, as it happens."""

    def __init__(self, store: KubeStore) -> None:
        self.store = store
        self.dead = False

    def _live(self) -> KubeStore:
        if self.dead:
            raise Killed
        return self.store

    async def get(self, kind: type[R], key: str) -> R:
        return await self._live().get(kind, key)

    async def list(self, kind: type[R], *, where: Mapping[str, str] | None = None) -> Listing[R]:
        return await self._live().list(kind, where=where)

    def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        return self._live().watch(kind, since=since, where=where)

    async def create(self, obj: R) -> R:
        return await self._live().create(obj)

    async def update(self, obj: R) -> R:
        return await self._live().update(obj)

    async def update_status(self, obj: R) -> R:
        return await self._live().update_status(obj)

    async def delete(self, kind: type[R], key: str, *, uid: str = "", resource_version: str = "") -> None:
        await self._live().delete(kind, key, uid=uid, resource_version=resource_version)


class Runner:
    """One node: its server as a task, which is torn down as SIGKILL would, and started again."""

    def __init__(self, rig: Rig, store: Mortal) -> None:
        self.rig = rig
        self.store = store
        self.die_at = ""
        self.deaths: Counter[str] = Counter()
        self._calls: set[asyncio.Task[Lease]] = set()
        rig.step = self._step

    @property
    def name(self) -> str:
        return self.rig.node

    def _step(self, name: str) -> None:
        if name == self.die_at and not self.store.dead:
            self.deaths[name] += 1
            self.store.dead = True
        if self.store.dead:
            raise Killed

    async def take(self, container: str) -> Lease:
        """An ADD, which dies with the server."""
        if self.store.dead:
            raise Killed
        call = asyncio.create_task(self._take(Attachment("pods", container, "eth0")))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        await asyncio.wait((call,))
        if call.cancelled():
            raise Killed
        return call.result()

    async def _take(self, which: Attachment) -> Lease:
        lease = await self.rig.ipam.take(Request(which, pod=f"default/{which.container}", pools=("race",)))
        return self.rig.ipam.bind(which, self.rig.kernel.wire(link_name(which), lease.addresses))

    async def up(self) -> None:
        self.store.dead, self.die_at = False, ""
        await self.rig.up(run=False)
        self.rig._running = asyncio.create_task(self.rig.ipam.run())

    async def kill(self) -> None:
        """Now, whatever is under way."""
        if not self.store.dead:
            self.deaths["any moment"] += 1
        self.store.dead = True
        running = self.rig._running
        if running is None:
            return  # between two lives
        tasks = (*self._calls, running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.rig.down()

    def check_alive(self) -> None:
        if self.rig._running is not None and not self.store.dead:
            self.rig.check_alive()


class Race:
    def __init__(self, people: KubeStore, runners: list[Runner], rng: random.Random) -> None:
        self.people = people
        self.runners = runners
        self.rng = rng
        #: What was answered and not deleted since: address -> node and container.
        self.held: dict[str, tuple[str, str]] = {}
        self.leases: dict[str, Lease] = {}
        self.won = 0
        self._over = False
        self._kernels = Informer(people, IPAMBlock, CLOCK, on_change=self._blackholes)

    async def run(self) -> None:
        """The part of all agents that writes to the kernels."""
        await self._kernels.run()

    def _blackholes(self) -> None:
        cidrs: dict[str, set[str]] = {}
        for block in self._kernels.items.values():
            if not (block.status.releasing or block.metadata.deletion_timestamp):
                cidrs.setdefault(block.spec.node, set()).add(block.spec.cidr)
        for runner in self.runners:
            runner.rig.kernel.set_blackholes(cidrs.get(runner.name, set()))

    async def round(self, number: int) -> None:
        self._over = False
        killed = {runner.name: self.rng.choice((*STEPS, "")) for runner in self.rng.sample(self.runners, KILLS)}
        order = self.rng.sample(self.runners, len(self.runners))
        async with asyncio.timeout(3 * COME), asyncio.TaskGroup() as group:
            for runner in order:
                group.create_task(self._add(runner, f"{runner.name}-{number}"))
                if (step := killed.get(runner.name)) is not None and step not in LATE:
                    group.create_task(self._die(runner, step, self.rng.randrange(BLOCKS), self.rng.random() / 10))
            group.create_task(self._end())
        self.won += len(self.leases)
        await self._whole()
        self._over = False
        async with asyncio.timeout(2 * GO), asyncio.TaskGroup() as group:
            for runner in order:
                if (step := killed.get(runner.name)) in LATE:
                    group.create_task(self._die(runner, str(step), 0, self.rng.random() / 10))
            await self._go()
            self._over = True

    async def _end(self) -> None:
        """The race is over when no block is left."""
        end = CLOCK.monotonic() + COME
        while len(self.leases) < BLOCKS and CLOCK.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self._over = True

    async def _add(self, runner: Runner, container: str) -> None:
        """An ADD, tried again as a kubelet does; its answer is written down."""
        while not self._over:
            try:
                lease = await runner.take(container)
            except (IPAMError, Killed):
                await asyncio.sleep(0.05)
                continue
            for address in lease.addresses:
                holder = self.held.setdefault(address, (runner.name, container))
                assert holder == (runner.name, container), f"{address}: {holder} and {runner.name} {container}"
            self.leases[container] = lease
            return

    async def _die(self, runner: Runner, step: str, answers: int, pause: float) -> None:
        """At the step, if the server comes to it; or when so many ADDs of the round are answered; or at its end."""
        runner.die_at = step
        while not (runner.store.dead or self._over or (not step and len(self.leases) >= answers)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await runner.kill()
        await asyncio.sleep(pause)
        await runner.up()

    # -- the model --------------------------------------------------------------------------------------------------

    async def _whole(self) -> None:
        """While the pods live. What is on its way between a server and the store is waited for."""
        await self._until_none(self._problem)

    async def _until_none(self, look: Callable[[], Awaitable[str]]) -> None:
        end = CLOCK.monotonic() + GO
        while problem := await look():
            self._check_alive(problem)
            assert CLOCK.monotonic() < end, f"after {GO:g} s: {problem}"
            await asyncio.sleep(0.1)

    async def _problem(self) -> str:
        blocks = {b.spec.cidr: b for b in (await self.people.list(IPAMBlock)).items}
        owners: dict[str, str] = {}
        for runner in self.runners:
            for own in runner.rig.ipam._ledger.blocks.values():
                other = owners.setdefault(own.cidr, runner.name)
                assert other == runner.name, f"block {own.cidr} has two owners: {other} and {runner.name}"
                if own.phase is not Phase.DELETING and own.cidr not in blocks:
                    return f"{own.cidr} of {runner.name} is not in the store"
            for cidr in runner.rig.ipam._claims.pending:
                owners.setdefault(cidr, runner.name)
        for cidr, block in blocks.items():
            if owners.get(cidr, block.spec.node) != block.spec.node:
                return f"{cidr} is of {block.spec.node} in the store, and {owners[cidr]} has it"
            if cidr not in owners and not block.metadata.deletion_timestamp:
                return f"{cidr} of {block.spec.node} is known to nobody"
        mirrored = {a.address: (b.spec.node, a.container) for b in blocks.values() for a in b.status.allocations}
        for address, holder in self.held.items():
            if mirrored.get(address) != holder:
                return f"{address} of {holder} is mirrored as {mirrored.get(address)}"
        for runner in self.runners:
            told = journal.read(runner.rig._journal.path).leases
            live = runner.rig.kernel.live()
            for container, lease in self.leases.items():
                if self.held[lease.addresses[0]][0] == runner.name:
                    found = told.get(lease.attachment)
                    assert found is not None, f"{container} is not in the journal of {runner.name}"
                    assert found.addresses == lease.addresses
                    assert all(address in live for address in lease.addresses)
                    block = next(c for c in blocks if ip_address(lease.addresses[0]) in ip_network(c))
                    assert blocks[block].spec.node == runner.name
        return ""

    async def _go(self) -> None:
        """All pods go, the forgotten ones too; then all blocks come free."""
        for runner in self.runners:
            for lease in runner.rig.ipam.leases():
                runner.rig.kernel.unwire(link_name(lease.attachment))
                runner.rig.ipam.give_back(lease.attachment)
        self.held.clear()
        self.leases.clear()
        await self._until_none(self._taken)

    async def _taken(self) -> str:
        blocks = (await self.people.list(IPAMBlock)).items
        return ", ".join(f"{b.spec.cidr} of {b.spec.node} is not free" for b in blocks)

    def _check_alive(self, why: str) -> None:
        for runner in self.runners:
            try:
                runner.check_alive()
            except Exception as e:
                raise AssertionError(f"{runner.name} has ended ({e}), and {why}") from e


@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_64_nodes_race_for_32_blocks(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keeper, "IDLE", 0.3)
    rng = random.Random(SEED)
    cluster = installed.cluster
    names = [f"node-{i}" for i in range(1, NODES + 1)]
    for name in names[2:]:
        cluster.request("POST", "/api/v1/nodes", node(name))

    def open_store(name: str) -> KubeStore:
        path = tmp_path / f"{name}.kubeconfig"
        token = installed.tokens.get((CNI, name)) or pod_token(cluster, CNI, name)
        write_kubeconfig(path, cluster.url, cluster.ca, token=token)
        return KubeStore(from_kubeconfig([path]), CLOCK)

    async def main() -> None:
        people = KubeStore(from_kubeconfig([cluster.kubeconfig()]), CLOCK)
        stores = [open_store(name) for name in names]
        runners = []
        for name, store in zip(names, stores, strict=True):
            mortal = Mortal(store)
            rig = Rig(tmp_path, node=name, store=mortal, clock=CLOCK, settings=SETTINGS)  # type: ignore[arg-type]
            runners.append(Runner(rig, mortal))
        race = Race(people, runners, rng)
        agents = asyncio.create_task(race.run())
        try:
            await people.create(a_pool("race", "10.9.0.0/25", 30, assignment_mode="Manual"))
            await asyncio.gather(*(runner.up() for runner in runners))
            for number in range(ROUNDS):
                began = CLOCK.monotonic()
                try:
                    await race.round(number)
                except BaseException:
                    print(f"round {number}: UNDERLAY_SEED={SEED} UNDERLAY_ROUNDS={number + 1} plays it again")
                    raise
                if ROUNDS > 10:
                    with capsys.disabled():
                        print(f"round {number}: {CLOCK.monotonic() - began:.1f} s, {race.won} ADDs so far", flush=True)
        finally:
            agents.cancel()
            for runner in runners:
                with suppress(StoreError):
                    await runner.kill()
            await asyncio.gather(agents, return_exceptions=True)
            for store in (people, *stores):
                await store.close()
        deaths = sum((runner.deaths for runner in runners), Counter())
        print(f"{ROUNDS} rounds, seed {SEED}: {race.won} ADDs, deaths {dict(deaths)}")
        assert race.won >= ROUNDS * BLOCKS // 2, "they hardly raced"
        assert sum(deaths.values()) >= ROUNDS * KILLS

    asyncio.run(main())
