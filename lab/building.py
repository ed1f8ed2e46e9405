"""The lab as one object: built step by step, then changed by what the command asks."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from cni.errors import CNIError, first_of
from cni.marks import PROTO_IMPORTS
from lab import rack
from lab.errors import LabError
from lab.folder import Folder
from lab.machine import PATH, Machine
from lab.matrix import Pod, Report
from lab.net import Net, NetError
from lab.objects import objects
from lab.probe import Prober
from lab.processes import Daemon
from lab.story import Story
from lab.topology import Link, Router, Topology, node_of_pod, pod_number, rack_name
from lab.wire import LinkState, Part, Place, PodState, RouterState, State, Step
from store.clock import Clock
from store.errors import StoreError
from store.model import IPAMBlock, Node
from store.open import open_store

#: ADD and DEL calls under way at once in the whole lab.
_AT_ONCE: Final = 16
_READY_WITHIN: Final = 60.0
_CONVERGED_WITHIN: Final = 60.0
_LOOK_EVERY: Final = 0.05
_log = logging.getLogger(__name__)


class Lab:
    """``run()`` builds it and keeps its daemons up until it is cancelled; every other method may be called meanwhile.

    What cannot be done raises LabError (or NetError, StoreError, TopologyError of what it stands on).
    """

    def __init__(self, folder: Folder, topology: Topology, clock: Clock) -> None:
        self._folder = folder
        self._topology = topology
        self._clock = clock
        self._story = Story(clock)
        self._net = Net(folder.path)
        self._store = open_store(folder.store_url, clock=clock)
        self._prober = Prober(self._net)
        self._machines: dict[str, Machine] = {}
        self._birds: dict[str, Daemon] = {}
        self._cut: set[Link] = set()
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                reason = ""
                try:
                    await self._build(group)
                except* (LabError, NetError, StoreError, CNIError, OSError) as e:
                    _log.exception("the lab could not be built")
                    reason = str(first_of(e))
                if reason:
                    logs = f"{self._folder.log} and {self._folder.path}/node-*/log"
                    self._story.end("failed", f"{reason}\nlogs: {logs}")
                else:
                    self._story.end("up")
        finally:
            await self._store.close()

    def steps(self) -> AsyncIterator[Step]:
        """Each step of the building from the first, as it happens. Raises LabError if it failed."""
        return self._story.follow()

    async def state(self) -> State:
        blocks = await self._blocks() if self._machines else {}
        return State(
            state=self._story.state,
            dir=str(self._folder.path),
            store=self._folder.store_url,
            shape=self._topology.shape,
            routers=tuple(self._router_state(router) for router in self._topology.routers),
            links=tuple(
                LinkState(a=link.upper.name, b=link.lower.name, up=link not in self._cut)
                for link in self._topology.links
            ),
            nodes=tuple(machine.state(blocks.get(name, ())) for name, machine in self._machines.items()),
        )

    async def measure(self, limit: float) -> Report:
        """Waits up to ``limit`` seconds until every route is everywhere, then asks every pod for every other."""
        problem = await self._converge(limit)
        if problem:
            _log.info("measured though %s", problem)
        return await self._prober.measure(self._pods(), nodes=len(self._topology.nodes))

    async def pod_add(self, name: str) -> PodState:
        machine = self._machine(node_of_pod(name))
        async with self._turns:
            sandbox = await machine.add(name)
        return PodState(name=sandbox.pod, addresses=sandbox.addresses)

    async def pod_del(self, name: str) -> None:
        machine = self._machine(node_of_pod(name))
        async with self._turns:
            await machine.delete(name)

    def kill(self, node: str, part: Part, number: int, restart_after: float) -> None:
        self._machine(node).daemons[part].kill(number, restart_after=restart_after)

    def cable(self, a: str, b: str, *, up: bool) -> None:
        """Cuts or mends the link between ``a`` and ``b``; it may be so already."""
        link = self._topology.link(a, b)
        if link is None:
            there = ", ".join(f"{link.upper.name} {link.lower.name}" for link in self._topology.links)
            raise LabError(f"no link between {a} and {b}; links are: {there}")
        if up:
            rack.mend(self._net, link)
            self._cut.discard(link)
        else:
            rack.cut(self._net, link)
            self._cut.add(link)

    def where(self, name: str) -> Place:
        """How to get into the namespace of a node, pod, ToR or spine."""
        if name not in self._net.names:
            raise LabError(f"nothing here is called {name}; there are: {', '.join(self._net.names)}")
        return Place(netns=str(self._net.path(name)), environment=self._environment(name))

    # -- building ------------------------------------------------------------------------------------------------

    async def _build(self, group: asyncio.TaskGroup) -> None:
        topology, step = self._topology, self._story.step
        counts = f"{_count(len(topology.spines), 'spine')}, {_count(len(topology.tors), 'ToR')}"
        with step(f"namespaces for {counts}, {_count(len(topology.nodes), 'node')}; {len(topology.links)} links"):
            rack.build(self._net, topology)
        with step("store, pools and peers"):
            await self._fill_store()
        with step(f"BIRD on {_count(len(topology.routers), 'router')}"):
            for router in topology.routers:
                self._birds[router.name] = bird = self._bird(router)
                group.create_task(bird.run())
        with step(f"CNI server, agent and ExaBGP on {_count(len(topology.nodes), 'node')}"):
            for node in topology.nodes:
                self._machines[node.name] = machine = Machine(
                    self._net, self._clock, self._folder, node, new_id=lambda: secrets.token_hex(32)
                )
                group.create_task(machine.run())
            for machine in self._machines.values():
                await machine.ready(limit=_READY_WITHIN)
        pods = [pod for node in topology.nodes for pod in node.pods]
        with step(f"{_count(len(pods), 'pod')}, attached through the shim"):
            async with asyncio.TaskGroup() as adds:
                for pod in pods:
                    adds.create_task(self.pod_add(pod))
        with step("routes: every block known to every router and node"):
            problem = await self._converge(_CONVERGED_WITHIN)
            if problem:
                raise LabError(f"after {_CONVERGED_WITHIN:.0f} s {problem}")

    async def _fill_store(self) -> None:
        for obj in objects(self._topology):
            created = await self._store.create(obj)
            if isinstance(created, Node) and isinstance(obj, Node):
                await self._store.update_status(msgspec.structs.replace(created, status=obj.status))

    def _bird(self, router: Router) -> Daemon:
        home = self._folder.member(router.name)
        rack.write_bird(self._topology, router, home)
        return Daemon(
            self._net,
            self._clock,
            member=router.name,
            name="bird",
            argv=rack.bird_argv(home),
            environment={"PATH": PATH},
            log=home / "bird.log",
        )

    async def _converge(self, limit: float) -> str:
        """Looks until each block is in the kernel of every router and of every other node. Returns "" then, or what is
        missing after ``limit`` seconds."""
        end = self._clock.monotonic() + limit
        while True:
            problem = self._gap(await self._blocks())
            if not problem or self._clock.monotonic() > end:
                return problem
            await self._clock.sleep(_LOOK_EVERY)

    def _gap(self, blocks: dict[str, tuple[str, ...]]) -> str:
        bare = [name for name in self._machines if not blocks.get(name)]
        if bare:
            return f"{bare[0]} has no block"
        everything = frozenset(block for own in blocks.values() for block in own)
        gap = rack.missing(self._net, [r.name for r in self._topology.routers], everything, protocol="bird")
        for name in self._machines:
            gap = gap or rack.missing(self._net, [name], everything - set(blocks[name]), protocol=PROTO_IMPORTS)
        return f"{gap[0]} has no route to {gap[1]}" if gap else ""

    # -- looking ---------------------------------------------------------------------------------------------------

    async def _blocks(self) -> dict[str, tuple[str, ...]]:
        """Blocks by node; without those that are being given back."""
        found: dict[str, tuple[str, ...]] = {}
        for block in (await self._store.list(IPAMBlock)).items:
            if not block.status.releasing and not block.metadata.deletion_timestamp:
                found[block.spec.node] = (*found.get(block.spec.node, ()), block.spec.cidr)
        return found

    def _pods(self) -> list[Pod]:
        sandboxes = [s for machine in self._machines.values() for s in machine.sandboxes.values()]
        return [Pod(s.pod, s.addresses) for s in sorted(sandboxes, key=lambda s: pod_number(s.pod))]

    def _router_state(self, router: Router) -> RouterState:
        bird = self._birds.get(router.name)
        return RouterState(
            name=router.name,
            rack=rack_name(router.rack) if router.rack else "",
            asn=router.asn,
            processes={"bird": bird.state()} if bird else {},
        )

    def _machine(self, name: str) -> Machine:
        if name not in self._machines:
            raise LabError(f"no node is called {name}; nodes are: {', '.join(self._machines) or 'not there yet'}")
        return self._machines[name]

    def _environment(self, name: str) -> dict[str, str]:
        if name in self._birds:
            return {"BIRD": str(self._folder.member(name) / "bird.ctl")}
        if name in self._machines:
            return {"UNDERLAY_NODE": name} | self._machines[name].environment
        return {}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
