"""A clock, a kernel and a node to test ipam with: time passes by ``advance`` only, links come by ``wire`` only."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from ipam.dead import let_go
from ipam.errors import KernelUnavailable
from ipam.journal import Journal
from ipam.ledger import Phase
from ipam.model import ForeignRoute, News
from ipam.node import Attachment, Lease, NodeIPAM, Request, Settings
from ipam.pool import within as is_within
from store.base import Store
from store.errors import NotFound
from store.memory import MemoryStore
from store.model import IPAMBlock, IPPool, IPPoolSpec, IPReservation, IPReservationSpec, Meta, Node, block_name

#: Passes of the event loop at most, for those that never come to rest.
PASSES = 40


class FakeClock:
    def __init__(self) -> None:
        self._now = 1000.0
        self._timers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    def monotonic(self) -> float:
        return self._now

    def now(self) -> str:
        at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._now)
        return at.strftime("%Y-%m-%dT%H:%M:%SZ")

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._timers, (self._now + max(seconds, 0), next(self._count), future))
        await future

    async def advance(self, seconds: float) -> None:
        """Lets that much time pass; every sleeper wakes at its own moment."""
        end = self._now + seconds
        await settle()
        while self._timers and self._timers[0][0] <= end:
            at, _, future = heapq.heappop(self._timers)
            if not future.done():
                self._now = max(self._now, at)
                future.set_result(None)
                await settle()
        self._now = end
        await settle()


async def settle() -> None:
    """Lets everything that can run run."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    for _ in range(PASSES):
        await asyncio.sleep(0)
        if not ready:
            return


class FakeKernel:
    """Links and routes of one network namespace. Strict: one address has one route, a link has one name."""

    def __init__(self, netns: int = 4026531840) -> None:
        self._netns = netns
        self._links: dict[int, str] = {}
        self._routes: dict[str, int] = {}
        self._blackholes: set[str] = set()
        self.foreign: set[ForeignRoute] = set()
        self._index = itertools.count(10)
        self.hidden: set[str] = set()  # names that a dump leaves out
        self.broken = False
        self.asked: dict[str, int] = {}
        self.moved = asyncio.Event()  # of those who wait for the next change; each change has a new one laid out

    # -- KernelView

    def netns(self) -> int:
        self._ask("netns")
        return self._netns

    def links(self) -> Mapping[int, str]:
        self._ask("links")
        return {i: n for i, n in self._links.items() if n not in self.hidden}

    def link(self, index: int, name: str) -> bool:
        self._ask("link")
        return index in self._links or name in self._links.values()

    def pod_routes(self) -> Mapping[str, int]:
        self._ask("pod_routes")
        return dict(self._routes)

    def blackholes(self) -> frozenset[str]:
        self._ask("blackholes")
        return frozenset(self._blackholes)

    def foreign_routes(self, within: str) -> tuple[ForeignRoute, ...]:
        self._ask("foreign_routes")
        return tuple(route for route in self.foreign if is_within(route.prefix, within))

    # -- the hands of the CNI server and the agent

    def wire(self, name: str, addresses: tuple[str, ...]) -> int:
        """The link and its routes. An address that has a route already is handed out twice."""
        for address in addresses:
            present = self._routes.get(address)
            if present is not None and self._links[present] != name:
                raise AssertionError(f"{address} is live on {self._links[present]}, and now goes to {name}")
        index = next((i for i, n in self._links.items() if n == name), 0) or next(self._index)
        self._links[index] = name
        self._routes.update(dict.fromkeys(addresses, index))
        self.ring()
        return index

    def unwire(self, name: str) -> None:
        for index in [i for i, n in self._links.items() if n == name]:
            del self._links[index]
            self._routes = {a: i for a, i in self._routes.items() if i != index}
        self.ring()

    def live(self) -> dict[str, str]:
        return {address: self._links[index] for address, index in self._routes.items()}

    def set_blackholes(self, cidrs: set[str]) -> None:
        if self._blackholes != cidrs:
            self._blackholes = set(cidrs)
            self.ring()

    def move_to(self, netns: int) -> None:
        self._netns = netns

    def reboot(self) -> None:
        self._links.clear()
        self._routes.clear()
        self._blackholes.clear()
        self.ring()

    def ring(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    def _ask(self, what: str) -> None:
        self.asked[what] = self.asked.get(what, 0) + 1
        if self.broken:
            raise KernelUnavailable(f"{what}: the dump was interrupted again and again")


def link_name(attachment: Attachment) -> str:
    text = f"{attachment.container}/{attachment.interface}"
    return "ul" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def attachment(number: int | str, network: str = "pods") -> Attachment:
    return Attachment(network, f"c{number}", "eth0")


def pool(name: str, cidr: str, size: int = 0, **spec: object) -> IPPool:
    return IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr, block_size=size, **spec))  # type: ignore[arg-type]


def reservation(name: str, *cidrs: str) -> IPReservation:
    return IPReservation(metadata=Meta(name=name), spec=IPReservationSpec(reserved_cidrs=cidrs))


V4 = pool("v4", "10.244.0.0/16")
V6 = pool("v6", "fd00:10:244::/48")


class Rig:
    """One node on a store: its kernel, run directory and server, which can crash, restart and reboot."""

    def __init__(
        self,
        directory: Path,
        *,
        node: str = "node-1",
        store: Store | None = None,
        clock: FakeClock | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.directory = directory / node
        self.node = node
        self.clock = clock or FakeClock()
        self.store = store or MemoryStore(self.clock)
        self.kernel = FakeKernel()
        self.settings = settings or Settings()
        self.boot = 1
        self.starts = 0
        self.step: Callable[[str], None] = lambda _: None
        self.tell: Callable[[News], None] = lambda _: None
        self._agent_works = True
        self._running: asyncio.Task[None] | None = None
        self._agent: asyncio.Task[None] | None = None
        self.ipam: NodeIPAM

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    @property
    def agent(self) -> bool:
        """Whether the node's agent works."""
        return self._agent_works

    @agent.setter
    def agent(self, works: bool) -> None:
        self._agent_works = works
        self.kernel.ring()

    @property
    def memory(self) -> MemoryStore:
        assert isinstance(self.store, MemoryStore)
        return self.store

    async def create(self, *objects: IPPool | IPReservation | Node) -> None:
        for obj in objects:
            await self.store.create(obj)

    async def up(self, *, run: bool = True) -> NodeIPAM:
        """Starts the server, and the agent's part: blackholes that follow the blocks."""
        self.starts += 1
        journal = Journal(self.directory, self.boot_id, step=lambda name: self.step(name))
        self.ipam = NodeIPAM(
            node=self.node,
            store=self.store,
            journal=journal,
            kernel=self.kernel,
            clock=self.clock,
            boot_id=self.boot_id,
            start=self.starts,
            link_name=link_name,
            settings=self.settings,
            step=lambda name: self.step(name),
            tell=lambda news: self.tell(news),
        )
        self._journal = journal
        await self.ipam.start()
        if run:
            self._running = asyncio.create_task(self.ipam.run())
            self._agent = asyncio.create_task(self._agent_loop())
            await self.clock.advance(0.5)
        return self.ipam

    async def down(self) -> None:
        """kill -9: nothing is said or written any more."""
        for task in (self._running, self._agent):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._running = self._agent = None
        self._journal.close()

    async def restart(self) -> NodeIPAM:
        await self.down()
        return await self.up()

    async def reboot(self) -> NodeIPAM:
        await self.down()
        self.kernel.reboot()
        self.boot, self.starts = self.boot + 1, 0
        return await self.up()

    def check_alive(self) -> None:
        """The server has not ended by itself."""
        assert self._running is not None
        if self._running.done():
            self._running.result()
            raise AssertionError("run() has ended")

    async def add(self, number: int | str, **request: object) -> Lease:
        """An ADD from take to bind."""
        which = attachment(number)
        lease = await self.ipam.take(Request(which, pod=f"default/p{number}", **request))  # type: ignore[arg-type]
        return self.ipam.bind(which, self.kernel.wire(link_name(which), lease.addresses))

    def delete(self, number: int | str) -> Lease | None:
        self.kernel.unwire(link_name(attachment(number)))
        return self.ipam.give_back(attachment(number))

    async def sync_blackholes(self) -> None:
        """What the agent does in time: a blackhole for each own block that is not on its way out, or has live pods."""
        listing = await self.store.list(IPAMBlock, where={"spec.node": self.node})
        live = [ip_address(address) for address in self.kernel.live()]
        self.kernel.set_blackholes(
            {
                b.spec.cidr
                for b in listing.items
                if not (b.status.releasing or b.metadata.deletion_timestamp)
                or any(address in ip_network(b.spec.cidr) for address in live)
            }
        )

    async def mirror(self) -> dict[str, str]:
        """Address -> container, as the store tells it of this node's blocks."""
        listing = await self.store.list(IPAMBlock, where={"spec.node": self.node})
        return {a.address: a.container for b in listing.items for a in b.status.allocations}

    async def own_blocks(self) -> list[str]:
        listing = await self.store.list(IPAMBlock, where={"spec.node": self.node})
        return [b.spec.cidr for b in listing.items]

    async def wipe(self, cidr: str) -> None:
        """Takes a block from its owner in one go, as ``underlayctl ipam release --block --force`` does."""
        await self.store.delete(IPAMBlock, block_name(cidr))
        with contextlib.suppress(NotFound):
            await let_go(self.store, await self.store.get(IPAMBlock, block_name(cidr)))

    async def collect(self) -> None:
        """Kubernetes' garbage collector: deletes the blocks of this node whose owner has gone."""
        uids = {node.metadata.uid for node in (await self.store.list(Node)).items}
        for block in (await self.store.list(IPAMBlock, where={"spec.node": self.node})).items:
            owners = block.metadata.owner_references
            if owners and not uids.intersection(owner.uid for owner in owners):
                await self.store.delete(IPAMBlock, block.name)

    def phases(self) -> dict[str, Phase]:
        return {view.cidr: Phase(view.phase) for view in self.ipam.blocks()}

    async def _agent_loop(self) -> None:
        """Looks 0.05 s after something has moved."""
        while True:
            news = (self.memory._news, self.kernel.moved)  # taken before the look
            if self.agent and not self.memory._down:
                await self.sync_blackholes()
            waits = [asyncio.ensure_future(event.wait()) for event in news]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            await self.clock.sleep(0.05)


def run(directory: Path, test: Callable[[Rig], Awaitable[None]], *objects: IPPool | IPReservation | Node) -> None:
    """Runs ``test`` on a node that is up, with these objects in the store, and looks that its server lived on."""

    async def main() -> None:
        rig = Rig(directory)
        await rig.create(*objects)
        await rig.up()
        try:
            await test(rig)
            rig.check_alive()
        finally:
            await rig.down()

    play(main())


def play(story: Coroutine[Any, Any, None]) -> None:
    """Runs it; the limit is for a story that waits on a clock that nobody moves."""
    asyncio.run(asyncio.wait_for(story, 150))


async def waited(rig: Rig, add: Awaitable[Lease], seconds: float = 6) -> Lease:
    """What an ADD that has to wait comes to, in that much time."""
    task = asyncio.ensure_future(add)
    for _ in range(int(seconds / 0.1)):
        if task.done():
            break
        await rig.clock.advance(0.1)
    await settle()
    assert task.done(), "the ADD has no limit"
    return await task
