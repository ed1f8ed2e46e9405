"""What befalls nodes with live pods, on a real API server: people delete what the pods live in, the store is put back
from a backup, another cluster has the same pool, a node is cut off. Pods are undisturbed, no address is in use twice,
and what is wrong is said.

Nodes are servers with the rights of their pods and a kernel of their own; what one announces the others have a route
to, as over BGP. Time moves by ``Life.pass_time`` where it takes longer than a test may.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from ipam.errors import IPAMError, NotReady
from ipam.ledger import Phase
from ipam.model import ForeignRoute, Lease, Settings
from lab.kube.installed import AGENT, CNI, Installed
from store.base import Event, Listing
from store.clock import SystemClock
from store.errors import StoreError, Unavailable
from store.informer import Informer
from store.kube import KubeStore
from store.memory import MemoryStore
from store.model import IPAMBlock, IPPool, Meta, Node, R, block_name
from tests.ipam_fakes import Rig, attachment
from tests.ipam_fakes import pool as a_pool
from tests.kube.world import CLOCK, COLLECTED, World

pytestmark = pytest.mark.timeout(360)

UNDERLAYCTL = Path(sys.executable).parent / "underlayctl"
SETTINGS = Settings(rest=1.0, withdrawn=0.2, blackhole_limit=0.3, backoff_max=0.5)
SMALL = a_pool("small", "10.1.0.0/24", 28)


class Shifted(SystemClock):
    """Real time, and what was put on top of it: who sleeps then wakes when it is due."""

    def __init__(self) -> None:
        self._more = 0.0
        self._moved = asyncio.Event()

    def monotonic(self) -> float:
        return time.monotonic() + self._more

    async def sleep(self, seconds: float) -> None:
        end = self.monotonic() + max(seconds, 0)
        while (left := end - self.monotonic()) > 0:
            moved = asyncio.ensure_future(self._moved.wait())
            try:
                await asyncio.wait((moved,), timeout=left)
            finally:
                moved.cancel()

    async def put_on(self, seconds: float) -> None:
        self._more += seconds
        self._moved.set()
        self._moved = asyncio.Event()
        await asyncio.sleep(0.04)  # for the requests that this sets off


class Cable:
    """A store that can be unplugged."""

    def __init__(self, store: KubeStore) -> None:
        self.store = store
        self.cut = False

    def _live(self) -> KubeStore:
        if self.cut:
            raise Unavailable("the cable is cut")
        return self.store

    async def get(self, kind: type[R], key: str) -> R:
        return await self._live().get(kind, key)

    async def list(self, kind: type[R], *, where: Mapping[str, str] | None = None) -> Listing[R]:
        return await self._live().list(kind, where=where)

    async def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        async with aclosing(self._live().watch(kind, since=since, where=where)) as events:
            async for event in events:
                self._live()
                yield event

    async def create(self, obj: R) -> R:
        return await self._live().create(obj)

    async def update(self, obj: R) -> R:
        return await self._live().update(obj)

    async def update_status(self, obj: R) -> R:
        return await self._live().update_status(obj)

    async def delete(self, kind: type[R], key: str, *, uid: str = "", resource_version: str = "") -> None:
        await self._live().delete(kind, key, uid=uid, resource_version=resource_version)

    async def close(self) -> None:
        await self.store.close()


class Life(World):
    """``pods`` are those that live: name -> its node and what it was given."""

    def __init__(self, installed: Installed, folder: Path) -> None:
        super().__init__(installed, folder)
        self.clock = Shifted()
        self.pods: dict[str, tuple[Rig, Lease]] = {}
        self.cables: dict[str, tuple[Cable, Cable]] = {}
        self.heard: dict[str, set[str]] = {}  # node -> reasons of the Events that its server had made
        self.silent: set[str] = set()  # nodes that announce nothing and hear nothing
        self._tasks.append(asyncio.create_task(self._fabric()))

    async def node(self, name: str, settings: Settings = SETTINGS) -> Rig:
        cables = Cable(self.store(CNI, name)), Cable(self.store(AGENT, name))
        self.cables[name] = cables
        rig = Rig(self._folder, node=name, store=cables[0], clock=self.clock, settings=settings)  # type: ignore[arg-type]
        heard = self.heard.setdefault(name, set())
        rig.tell = lambda news: heard.add(news.reason)
        self.rigs.append(rig)
        self.agents[name] = seen = Informer(cables[1], IPAMBlock, CLOCK, {"spec.node": name})
        self._tasks.append(asyncio.create_task(seen.run()))
        self._hear()  # its sessions are up, as those of a node that joined a while ago
        await self.up(rig)
        return rig

    def plug(self, name: str, *, cut: bool) -> None:
        for cable in self.cables[name]:
            cable.cut = cut

    async def _fabric(self) -> None:
        while True:
            self._hear()
            await asyncio.sleep(0.05)

    def _hear(self) -> None:
        """Each node has a route to what another one announces."""
        speaking = {rig.node: rig for rig in self.rigs if rig.node not in self.silent}
        said = {name: rig.kernel.blackholes() for name, rig in speaking.items()}
        for name, rig in speaking.items():
            rig.kernel.foreign = {
                ForeignRoute(cidr, via=other, protocol=143)
                for other, cidrs in said.items()
                for cidr in cidrs
                if other != name and cidr not in rig.kernel.blackholes()
            }

    async def heard_of_all(self) -> None:
        """Until no node is about to claim, and all have routes to what there is: two that claim one block of two stores
        before either can hear of the other are beyond anybody's power."""

        async def quiet() -> bool:
            owns = [own for rig in self.rigs for own in rig.ipam._ledger.blocks.values()]
            short = any(rig.ipam._keeper.is_short(name) for rig in self.rigs for name in rig.ipam._keeper.pools.ahead)
            return not short and all(own.phase is Phase.READY for own in owns)

        await self.until(quiet)
        self._hear()

    # -- pods

    async def add(self, rig: Rig, name: str, **request: object) -> Lease:
        """An ADD, tried again as a kubelet does."""
        async with asyncio.timeout(60):
            while True:
                try:
                    lease = await rig.add(name, **request)
                    break
                except IPAMError:
                    await asyncio.sleep(0.1)
        self.pods[name] = rig, lease
        self.undisturbed()
        return lease

    def delete(self, name: str) -> None:
        rig, _ = self.pods.pop(name)
        rig.delete(name)

    def undisturbed(self) -> None:
        """Every pod has what it was given, is announced by its node, and no address is in use twice."""
        seen: dict[str, str] = {}
        for rig in self.rigs:
            for address, link in rig.kernel.live().items():
                assert address not in seen, f"{address} is live on {seen[address]} and on {rig.node} ({link})"
                seen[address] = rig.node
        for name, (rig, lease) in self.pods.items():
            assert rig.ipam.lease(attachment(name)) == lease, name
            for address in lease.addresses:
                assert seen[address] == rig.node
                own = rig.ipam._ledger.find(address)
                assert own is not None, f"{address} of {name} is in no block of {rig.node}"

    async def pass_time(self, seconds: float, step: float = 10.0) -> None:
        for _ in range(int(seconds / step)):
            await self.clock.put_on(step)
            self.undisturbed()

    # -- what is said

    async def underlayctl(self, *words: str) -> tuple[int, str]:
        """An operator's command: exit code, and what it printed."""
        environment = os.environ | {"UNDERLAY_STORE": f"kube:{self.cluster.kubeconfig()}"}
        process = await asyncio.create_subprocess_exec(
            UNDERLAYCTL, *words, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, said.decode()

    async def findings(self) -> dict[str, list[dict[str, Any]]]:
        """What ``ipam check`` finds, by kind."""
        code, said = await self.underlayctl("ipam", "check", "-o", "json")
        found: dict[str, list[dict[str, Any]]] = {}
        for finding in json.loads(said[said.index("{") :])["findings"]:
            found.setdefault(finding["kind"], []).append(finding)
        assert code == (1 if found else 0), said
        return found

    async def until(self, probe: Callable[[], Awaitable[object]], limit: float = 60) -> None:
        """Until the probe says yes; pods are undisturbed meanwhile."""
        async with asyncio.timeout(limit):
            while True:
                self.undisturbed()
                try:
                    if await probe():
                        return
                except StoreError:
                    pass  # the API server is not back yet
                await asyncio.sleep(0.1)

    async def owned(self) -> bool:
        """The store says of each pod's address what is so."""
        blocks = (await self.people.list(IPAMBlock)).items
        told = {a.address: (b.spec.node, a.container) for b in blocks for a in b.status.allocations}
        want = {a: (rig.node, f"c{name}") for name, (rig, lease) in self.pods.items() for a in lease.addresses}
        return told == want


def live(installed: Installed, folder: Path, story: Callable[[Life], Awaitable[None]], *pools: IPPool) -> None:
    async def main() -> None:
        async with asyncio.timeout(280):
            life = Life(installed, folder)
            try:
                for pool in pools:
                    await life.people.create(pool)
                await story(life)
                life.undisturbed()
                for rig in life.rigs:
                    rig.check_alive()
            finally:
                await life.close()

    asyncio.run(main())


def conditions(rig: Rig) -> dict[str, str]:
    return {c.type: c.message for c in rig.ipam.conditions()}


def test_what_people_delete_under_live_pods(installed: Installed, tmp_path: Path) -> None:
    """The Node, which comes again; a block; the pool, which comes again with another block size."""

    async def story(life: Life) -> None:
        one, two = await life.node("node-1"), await life.node("node-2")
        for i in range(3):
            await life.add(one, f"1{i}")
            await life.add(two, f"2{i}")
        await life.until(life.owned)
        assert await life.findings() == {}

        (old,) = await one.own_blocks()
        await life.people.delete(Node, "node-1")

        async def marked() -> bool:
            block = await life.block(old)
            return bool(block and block.metadata.deletion_timestamp) and one.phases()[old] is Phase.MARKED

        await life.until(marked, COLLECTED)
        assert old in {f["address"] for f in (await life.findings())["BlockOfNoNode"]}
        with pytest.raises(NotReady, match="there is no Node node-1"):
            await one.add("while-gone")
        await life.people.create(Node(metadata=Meta(name="node-1")))
        await life.add(one, "back")
        await life.until(life.owned)
        assert await life.findings() == {}

        (other,) = await two.own_blocks()
        await life.people.delete(IPAMBlock, block_name(other))

        async def other_marked() -> bool:
            return two.phases()[other] is Phase.MARKED

        await life.until(other_marked)
        assert "BlockMarked" in life.heard["node-1"] & life.heard["node-2"]
        lease = await life.add(two, "other-block")
        assert ip_address(lease.addresses[0]) not in ip_network(other)
        await life.until(life.owned)

        await life.people.delete(IPPool, "small")
        await life.people.create(a_pool("small", "10.1.0.0/24", 29))
        for i in range(20):
            await life.add(two, f"new-size{i}")
        await life.until(life.owned)
        found = await life.findings()
        assert {f["address"] for f in found.pop("BlockSizeDiffers")} >= {old, other}
        assert found == {}

        for name in tuple(life.pods):
            life.delete(name)

        # A node keeps one block, perhaps one of the old size: what the finding says is done.
        async def small() -> bool:
            blocks = (await life.people.list(IPAMBlock)).items
            large = [b for b in blocks if not b.spec.cidr.endswith("/29")]
            for block in large:
                if not block.metadata.deletion_timestamp:
                    await life.people.delete(IPAMBlock, block.name)
            return not large

        await life.until(small)
        assert await life.findings() == {}

    live(installed, tmp_path, story, SMALL)


def test_etcd_put_back_from_an_hour_ago(installed: Installed, tmp_path: Path) -> None:
    """Since the backup: a block changed hands, others were claimed, pods came and went."""
    cluster = installed.cluster

    async def story(life: Life) -> None:
        one, two = await life.node("node-1"), await life.node("node-2")
        await life.add(one, "old")
        await life.add(one, "moves", addresses=("10.8.0.7",))
        await life.until(life.owned)
        await asyncio.to_thread(cluster.kill, "etcd")
        shutil.copytree(cluster.folder / "etcd", tmp_path / "backup")
        cluster.start_etcd()

        life.delete("moves")

        async def given_back() -> bool:
            return await life.block("10.8.0.7/32") is None

        await life.until(given_back)
        await life.add(two, "moved", addresses=("10.8.0.7",))
        for i in range(30):
            await life.add(one, f"1{i}")
            await life.add(two, f"2{i}")
        await life.until(life.owned)
        await life.pass_time(3600, 30)

        for name in ("kube-apiserver", "etcd"):
            cluster.kill(name)
        shutil.rmtree(cluster.folder / "etcd")
        (tmp_path / "backup").rename(cluster.folder / "etcd")
        cluster.start_etcd()
        cluster.start_apiserver(wait=False)

        async def serves() -> bool:
            return bool((await life.people.list(IPPool)).items)

        await life.until(serves, 60)
        assert not await life.owned()
        await life.pass_time(330)
        with pytest.raises(IPAMError):
            await one.add("thief", addresses=("10.8.0.7",))
        for _ in range(20):
            await life.pass_time(20)
            if await life.owned():
                break
        await life.until(life.owned)
        assert "BlockRestored" in life.heard["node-1"]
        assert conditions(one) == conditions(two) == {}
        await life.add(one, "after1")
        await life.add(two, "after2")
        await life.until(life.owned)
        assert await life.findings() == {}

    live(installed, tmp_path, story, SMALL, a_pool("single", "10.8.0.0/24", 32))


def test_a_second_cluster_on_the_same_pool(installed: Installed, tmp_path: Path) -> None:
    """It has a store of its own, its nodes the same fabric. Its first nodes come first."""

    async def story(life: Life) -> None:
        stranger = Rig(
            tmp_path,
            node="stranger",
            store=MemoryStore(life.clock),
            clock=life.clock,
            settings=SETTINGS,  # type: ignore[arg-type]
        )
        await stranger.create(SMALL)
        life.rigs.append(stranger)
        await stranger.up(run=False)
        stranger._running = asyncio.create_task(stranger.ipam.run())
        stranger._agent = asyncio.create_task(stranger._agent_loop())
        for i in range(120):
            await life.add(stranger, f"theirs{i}")
        await life.heard_of_all()

        rig = await life.node("node-1")
        for i in range(60):
            await life.add(rig, f"ours{i}")
        assert "another cluster" in conditions(rig)["ForeignRoute"]
        assert "via stranger" in conditions(rig)["ForeignRoute"]
        assert "ForeignRoute" in life.heard["node-1"]

        async def found() -> bool:
            return any("ForeignRoute" in f["what"] for f in (await life.findings()).get("ConditionHolds", ()))

        await life.until(found)
        # And the first cluster hears of the second as soon as it grows.
        await life.heard_of_all()
        for i in range(40):
            await life.add(stranger, f"more{i}")
        life.undisturbed()

        async def over() -> bool:
            await life.clock.put_on(30)
            return "ForeignRoute" not in conditions(rig)

        life.silent.add("stranger")
        for name in [n for n, (r, _) in life.pods.items() if r is stranger]:
            life.delete(name)
        await life.until(over)

    live(installed, tmp_path, story, SMALL)


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "silent"])
def test_a_node_that_is_cut_off_and_whose_node_is_deleted(
    installed: Installed, tmp_path: Path, announced: bool
) -> None:
    """Its blocks are nobody's for 10 min, and as long as there is a route to them. Where there is none they are
    another's after that; then the node says so, and ``ipam check``."""

    async def story(life: Life) -> None:
        one, two = await life.node("node-1"), await life.node("node-2")
        lease = await life.add(two, "cut-off")
        (left,) = await two.own_blocks()
        await life.until(life.owned)
        life.plug("node-2", cut=True)
        if not announced:
            life.silent.add("node-2")
        await life.people.delete(Node, "node-2")

        async def marked() -> bool:
            block = await life.block(left)
            return block is not None and bool(block.metadata.deletion_timestamp)

        await life.until(marked, COLLECTED)
        for i in range(16):
            await life.add(one, f"1{i}")  # their pool has two blocks: from here on node-1 wants the other
        began = life.clock.monotonic()
        while life.clock.monotonic() < began + 580:
            await life.pass_time(20)
            block = await life.block(left)
            assert block is not None
            assert block.spec.node == "node-2"
        assert "PoolExhausted" in conditions(one)

        async def taken() -> bool:
            block = await life.block(left)
            return block is not None and block.spec.node == "node-1"

        for _ in range(12):
            await life.pass_time(10)
            if await taken():
                break
        assert await taken() is not announced
        # It comes back, whoever has its block by now.
        await life.people.create(Node(metadata=Meta(name="node-2")))
        life.plug("node-2", cut=False)
        life.silent.clear()
        if announced:
            await life.pass_time(60)
            await life.until(life.owned)
            assert conditions(two).keys() <= {"PoolExhausted"}
            return
        async with asyncio.timeout(60):
            while "BlockLost" not in conditions(two):
                await life.pass_time(20)
        assert left in conditions(two)["BlockLost"]
        assert {"BlockLost", "AddressLost"} <= life.heard["node-2"]
        assert left in two.ipam.problem(lease.attachment)  # what CHECK says
        with pytest.raises(IPAMError):
            await two.add("no-more")
        # A block of its own lets it speak to who looks from elsewhere.
        await life.people.create(a_pool("more", "10.3.0.0/24", 28))

        async def said() -> bool:
            await life.clock.put_on(5)
            return any(left in f["what"] for f in (await life.findings()).get("ConditionHolds", ()))

        await life.until(said)

    live(installed, tmp_path, story, a_pool("small", "10.1.0.0/27", 28))


def test_a_dead_nodes_block_is_released_by_command(installed: Installed, tmp_path: Path) -> None:
    async def story(life: Life) -> None:
        one, two = await life.node("node-1"), await life.node("node-2")
        await life.add(two, "dies")
        (left,) = await two.own_blocks()
        await life.until(life.owned)
        code, said = await life.underlayctl("ipam", "release", "--block", left, "--yes")
        assert code == 1, said
        assert "node-2" in said

        life.plug("node-2", cut=True)
        life.silent.add("node-2")
        two.kernel.reboot()
        del life.pods["dies"]
        await life.people.delete(Node, "node-2")
        code, said = await life.underlayctl("ipam", "release", "--block", left, "--yes")
        assert code == 0, said
        for i in range(20):
            await life.add(one, f"1{i}")
        assert left in await one.own_blocks()
        assert life.clock.monotonic() - time.monotonic() < 1, "no time had to pass"
        assert await life.findings() == {}

    live(installed, tmp_path, story, a_pool("small", "10.1.0.0/27", 28))
