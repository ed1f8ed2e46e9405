"""NodeIPAM servers of several nodes on a real API server, each with its pod's token, and an operator beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path

from msgspec.structs import replace

from ipam.errors import IPAMError
from ipam.model import Lease, Settings
from lab.kube.installed import AGENT, CNI, Installed, pod_token
from lab.kube.plane import write_kubeconfig, write_secret
from store.clock import SystemClock
from store.errors import NotFound
from store.informer import Informer
from store.kube import KubeStore
from store.kubeaccess import Tokens, from_kubeconfig
from store.kubehttp import Limits
from store.model import IPAMBlock, IPPool, block_name
from tests.ipam_fakes import Rig

#: As in production, only faster.
SETTINGS = Settings(
    rest=0.3,
    withdrawn=0.2,
    blackhole_limit=0.3,
    backoff_max=0.5,
    grace=3.0,
    absence_look=0.2,
    absence_gap=12.0,  # a look comes with every claim that finds nothing, 5 s apart at rest
    recheck=2.0,
    node_needed=True,
)
#: Seconds in which Kubernetes' garbage collector deletes what a Node owned: at once, or in its next round; and where an
#: API server was killed before, when the collector's watches, which wait up to a minute then, are back.
COLLECTED = 120.0
CLOCK = SystemClock()


class World:
    """``people`` is an operator's store. Each node has a server and an agent that run, with the tokens of their pods in
    files that may change; ``agents`` is what the agents see of their nodes' blocks. ``asked`` has the moment of each
    request of an account on a node, answered or not."""

    def __init__(self, installed: Installed, folder: Path, limits: Limits | None = None) -> None:
        self.cluster = installed.cluster
        self.people = KubeStore(from_kubeconfig([self.cluster.kubeconfig()]), CLOCK)
        self.rigs: list[Rig] = []
        self.agents: dict[str, Informer[IPAMBlock]] = {}
        self.asked: dict[tuple[str, str], list[float]] = {}
        self._installed = installed
        self._folder = folder
        self._limits = limits
        self._tasks: list[asyncio.Task[None]] = []
        self._stores = [self.people]

    async def node(self, name: str, settings: Settings = SETTINGS) -> Rig:
        store = self.store(CNI, name)
        rig = Rig(self._folder, node=name, store=store, clock=CLOCK, settings=settings)  # type: ignore[arg-type]
        self.rigs.append(rig)
        seen = Informer(self.store(AGENT, name), IPAMBlock, CLOCK, {"spec.node": name})
        self.agents[name] = seen
        self._tasks.append(asyncio.create_task(seen.run()))
        await self.up(rig)
        return rig

    async def up(self, rig: Rig) -> None:
        """Starts a node's server, and the part of its agent that writes to the kernel."""
        await rig.up(run=False)
        rig._running = asyncio.create_task(rig.ipam.run())
        rig._agent = asyncio.create_task(_agent(rig, self.agents[rig.node]))

    def store(self, account: str, node: str) -> KubeStore:
        """As the account's pod on the node has it."""
        token = self._installed.tokens.get((account, node)) or pod_token(self.cluster, account, node)
        self.renew(account, node, token)
        kubeconfig = self._folder / f"{account}-{node}.kubeconfig"
        write_kubeconfig(kubeconfig, self.cluster.url, self.cluster.ca, token_file=self._token_file(account, node))
        access = from_kubeconfig([kubeconfig])
        counted = _Counted(access.tokens, self.asked.setdefault((account, node), []))
        store = KubeStore(replace(access, tokens=counted), CLOCK, limits=self._limits)
        self._stores.append(store)
        return store

    def renew(self, account: str, node: str, token: str) -> None:
        """What the kubelet does to a pod's token file."""
        write_secret(self._token_file(account, node), token)

    def token(self, account: str, node: str) -> str:
        return self._token_file(account, node).read_text()

    async def close(self) -> None:
        for rig in self.rigs:
            await rig.down()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for store in self._stores:
            await store.close()

    async def block(self, cidr: str) -> IPAMBlock | None:
        try:
            return await self.people.get(IPAMBlock, block_name(cidr))
        except NotFound:
            return None

    def _token_file(self, account: str, node: str) -> Path:
        return self._folder / f"{account}-{node}.token"


class _Counted:
    """Credentials, which are asked for before each request."""

    def __init__(self, tokens: Tokens, times: list[float]) -> None:
        self._tokens = tokens
        self._times = times

    async def token(self, *, fresh: bool = False) -> str:
        self._times.append(CLOCK.monotonic())
        return await self._tokens.token(fresh=fresh)


async def _agent(rig: Rig, blocks: Informer[IPAMBlock]) -> None:
    """A blackhole for each own block that is not on its way out; for a new one only while no foreign route leads there
    (docs/decisions/0010). A block with live pods keeps its blackhole whatever the store says, and what was seen last
    stands while the API server is away (R14)."""

    def lives(cidr: str) -> bool:
        return any(ip_address(address) in ip_network(cidr) for address in rig.kernel.live())

    while True:
        if blocks.synced:
            present = rig.kernel.blackholes()
            wanted = {cidr for cidr in present if lives(cidr)}
            for block in blocks.items.values():
                cidr = block.spec.cidr
                ends = block.status.releasing or bool(block.metadata.deletion_timestamp)
                foreign = cidr not in present and rig.kernel.foreign_routes(cidr)
                if lives(cidr) or not (ends or foreign):
                    wanted.add(cidr)
            rig.kernel.set_blackholes(wanted)
        await asyncio.sleep(0.05)


def run(
    installed: Installed,
    folder: Path,
    story: Callable[[World], Awaitable[None]],
    *pools: IPPool,
    limits: Limits | None = None,
    limit: float = 90,
) -> None:
    """Plays the story with these pools in the store, for at most ``limit`` seconds, and looks that every server lived
    on."""

    @asynccontextmanager
    async def world() -> AsyncIterator[World]:
        made = World(installed, folder, limits)
        try:
            for pool in pools:
                await made.people.create(pool)
            yield made
        finally:
            await made.close()

    async def main() -> None:
        async with asyncio.timeout(limit), world() as made:
            await story(made)
            for rig in made.rigs:
                rig.check_alive()

    asyncio.run(main())


async def soon(probe: Callable[[], Awaitable[object]], limit: float = 60) -> None:
    async with asyncio.timeout(limit):
        while not await probe():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.05)


async def adds(rig: Rig, names: list[str]) -> list[Lease]:
    """ADDs one after another, each tried again as a kubelet does."""
    leases = []
    for name in names:
        async with asyncio.timeout(60):
            while True:
                try:
                    leases.append(await rig.add(name))
                    break
                except IPAMError:
                    await asyncio.sleep(0.1)
    return leases
