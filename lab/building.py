"""The lab as one object: built step by step, then changed by what the command asks."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from cni.errors import CNIError, first_of
from cni.marks import PROTO_IMPORTS
from lab import connections, drill, drilled, drilling, oob, rack, routers, topology
from lab.drilling import Connections, Play
from lab.errors import LabError, NetError
from lab.folder import Folder
from lab.kube.build import Programs
from lab.machine import PATH, Machine, Stores
from lab.matrix import Pod, Report
from lab.net import Net
from lab.objects import objects
from lab.pinger import Member
from lab.pings import pinging
from lab.probe import Prober
from lab.processes import Daemon, outcome
from lab.runtime import Sandbox
from lab.story import Story
from lab.topology import Link, Router, Topology, Use, node_of_pod, pod_number, rack_name
from lab.visitor import NAME as VISITOR
from lab.visitor import Visitor
from lab.wire import (
    AnyPart,
    LinkState,
    NodeState,
    Place,
    PodState,
    ProcessState,
    Program,
    RouterPart,
    RouterState,
    State,
    Step,
)
from store.base import Store
from store.clock import Clock
from store.errors import StoreError, Unavailable
from store.model import BGPNodeStatus, IPAMBlock, Node, Resource
from store.open import open_store

if TYPE_CHECKING:
    from lab.control import ControlPlane

#: ADD and DEL calls under way at once in the whole lab.
_AT_ONCE: Final = 16
_READY_WITHIN: Final = 60.0
_API_READY_WITHIN: Final = 120.0
_CONVERGED_WITHIN: Final = 60.0
_LOOK_EVERY: Final = 0.05
#: Nobody has this address (RFC 5737), and nothing comes after this metric.
_NOWHERE: Final = "192.0.2.77/32"
_LAST: Final = 4_000_000_000
_STATES: Final = {"under way": "building", "done": "up", "failed": "failed"}
_log = logging.getLogger(__name__)


class Kube(msgspec.Struct, frozen=True):
    """For a lab whose store is an API server of its own: its programs, and the socket that people reach it by."""

    programs: Programs
    listener: socket.socket


class Operated(Protocol):
    """An API server of the lab's own, as an operator sees it."""

    @property
    def store_url(self) -> str: ...
    @property
    def environment(self) -> dict[str, str]: ...
    @property
    def daemons(self) -> dict[Program, Daemon]: ...


class Machines(Protocol):
    """A node of the lab: ``lab.machine.Machine``, or one of a cluster. ``name`` is its Node's."""

    @property
    def node(self) -> topology.Node: ...
    @property
    def name(self) -> str: ...
    @property
    def environment(self) -> dict[str, str]: ...
    @property
    def daemons(self) -> Mapping[Any, Daemon]: ...
    @property
    def sandboxes(self) -> dict[str, Sandbox]: ...
    def inside(self, *words: str) -> list[str]: ...
    async def add(self, pod: str) -> Sandbox: ...
    async def delete(self, pod: str) -> None: ...
    def state(self, blocks: tuple[str, ...]) -> NodeState: ...


class Lab:
    """``run()`` builds it and keeps its daemons up until it is cancelled; every other method may be called meanwhile.

    What cannot be done raises LabError (or NetError, StoreError, TopologyError of what it stands on).
    """

    def __init__(self, folder: Folder, topology: Topology, clock: Clock, kube: Kube | None = None) -> None:
        self._folder = folder
        self._topology = topology
        self._clock = clock
        self._story = Story(clock)
        self._net = Net(folder.path)
        self._control: ControlPlane | None = None
        #: ``_control``, or a cluster's.
        self._api: Operated | None = None
        self._store = self._open_store(kube)
        #: As the store had them last.
        self._known: dict[str, tuple[str, ...]] = {}
        self._prober = Prober(self._net)
        self._machines: dict[str, Machines] = {}
        self._routers: dict[str, dict[RouterPart, Daemon]] = {}
        self._cut: set[Link] = set()
        self._group: asyncio.TaskGroup | None = None
        self._play: Play | None = None
        self._visitor: Visitor | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
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
                    self._story.end("done")
        finally:
            await self._store.close()

    def steps(self) -> AsyncIterator[Step]:
        """Each step of the building from the first, as it happens. Raises LabError if it failed."""
        return self._story.follow()

    async def state(self) -> State:
        blocks = await self._blocks() if self._machines else {}
        return State(
            state=_STATES[self._story.state],
            dir=str(self._folder.path),
            store=self._api.store_url if self._api else self._folder.store_url,
            shape=self._topology.shape,
            switches=self._topology.switches,
            control_plane={name: d.state() for name, d in self._api.daemons.items()} if self._api else {},
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
        if self._control:
            self._control.kubelets.attached(machine.node.name, sandbox)
        return PodState(name=sandbox.pod, addresses=sandbox.addresses)

    async def pod_del(self, name: str) -> None:
        machine = self._machine(node_of_pod(name))
        async with self._turns:
            await machine.delete(name)
        if self._control:
            self._control.kubelets.detached(name)

    def kill(self, member: str, part: AnyPart, number: int, restart_after: float) -> None:
        daemons = self._daemons(member)
        daemon = daemons.get(part)
        if daemon is None:
            raise LabError(f"{member} has no {part}; it has: {', '.join(daemons)}")
        daemon.kill(number, restart_after=restart_after)

    def drill(self, name: str, *, rate: float, away: float, calm: float) -> Play:
        """Begins it; it goes on to its end, whoever listens. One at a time: two would count each other's losses."""
        if self._group is None or self._story.state != "done":
            raise LabError(f"the lab is not up, it is {_STATES[self._story.state]}")
        if self._play and self._play.story.state == "under way":
            raise LabError(f"{self._play.name} is under way: one drill at a time")
        self._play = play = Play(drill.find(name), Story(self._clock))
        self._group.create_task(play.run(self, self._clock, rate=rate, away=away, calm=calm))
        return play

    @asynccontextmanager
    async def pings(self, rate: float) -> AsyncIterator[Callable[[], Awaitable[drilled.Report]]]:
        """Sends packets along every path while the block runs, unless it asks before for what became of them. Nothing
        of them is to be lost."""
        members = self.members()
        begin = self._clock.monotonic()
        async with pinging(members, drilling.pairs(members), rate) as pings:

            async def count() -> drilled.Report:
                told = await pings.finish()
                return drilling.watched("ping", self._topology, told, begin=begin, end=self._clock.monotonic())

            yield count

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

    async def visit(self, *, come: bool) -> None:
        """A ToR comes to the segment of a mesh, and stays until it is told to go."""
        if not self._topology.shape.mesh:
            raise LabError(f"{VISITOR} comes to the segment of a mesh (up --mesh): racks have ToRs of their own")
        if self._topology.shape.ipv6_only:
            raise LabError(f"{VISITOR} speaks both families: it does not come where there is IPv6 alone")
        if come:
            visitor = self.visitor()
            visitor.come()
            self._visitor = visitor
            return
        if self._visitor is None:
            raise LabError(f"{VISITOR} is not there: underlay-lab visitor come")
        await self._visitor.go()
        self._visitor = None

    async def switch(self, node: str, *, on: bool) -> None:
        """Switches the machine of a node off, or on again."""
        raise LabError(f"{node} cannot be switched off: only the nodes of a cluster are machines (up --cluster)")

    async def rename(self, node: str, name: str) -> None:
        """Has the kubelet of a machine start anew for a Node of another name."""
        raise LabError(f"{node} has no kubelet: only the nodes of a cluster have one (up --cluster)")

    def where(self, name: str) -> Place:
        """How to get into the namespace of a node, pod, router or switch."""
        if name not in self._net.names:
            raise LabError(f"nothing here is called {name}; there are: {', '.join(self._net.names)}")
        machine = self._machines.get(name)
        through = machine.inside() if machine else []
        return Place(netns=str(self._net.path(name)), environment=self._environment(name), through=tuple(through))

    # -- for drills ------------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        return self._topology

    @property
    def store(self) -> Store:
        return self._store

    def members(self) -> tuple[Member, ...]:
        """Every pod and node, with its addresses."""
        found = [(pod.name, pod.addresses) for pod in self._pods()]
        found += [(node.name, node.addresses) for node in self._topology.nodes]
        return tuple(Member(name, str(self._net.path(name)), addresses) for name, addresses in found)

    def processes(self, member: str) -> dict[Any, ProcessState]:
        return {part: daemon.state() for part, daemon in self._daemons(member).items()}

    def connections(self, node: str) -> Connections:
        """BGP's, of a node."""
        return connections.established(self._net, node)

    def ask_agent(self, node: str) -> Callable[[], bool]:
        """Puts a route into the node's kernel that its agent takes away once it has looked at everything (R8); it is
        of the agent's number, and leads nowhere from nowhere. The answer tells whether it is gone."""
        self._net.ip(node, [f"route replace blackhole {_NOWHERE} proto {PROTO_IMPORTS} metric {_LAST}"])
        return lambda: _NOWHERE not in rack.routes(self._net, node, protocol=PROTO_IMPORTS)

    def use(self, router: str, how: Use) -> None:
        """Changes how a router is to be used."""
        routers.use(self._net, self._topology, self._router_of(router), self._folder.member(router), how)

    def shut(self, router: str, *, on: bool) -> None:
        """Has a router shut its sessions, or have them again."""
        routers.shut(self._net, self._topology, self._router_of(router), self._folder.member(router), on=on)

    def power(self, member: str, *, on: bool) -> None:
        """Takes the carrier from all links of a router or node at once, or gives it back."""
        rack.power(self._net, self._topology, member, on=on)
        links = {link for link in self._topology.links if member in (link.upper.name, link.lower.name)}
        self._cut = self._cut - links if on else self._cut | links

    def pods(self, node: str) -> frozenset[str]:
        return frozenset(self._machine(node).sandboxes)

    def blocks(self, node: str) -> frozenset[str]:
        """Of the node, as the store had them last."""
        return frozenset(self._known.get(node, ()))

    def routed(self, node: str, blocks: frozenset[str]) -> bool:
        """Whether a node has a route to one of these blocks from its peers."""
        return bool(blocks & rack.routes(self._net, node, protocol=PROTO_IMPORTS))

    def mute(self, member: str, *, on: bool) -> None:
        """Has a router or node hang: its ports have their carrier, and nothing leaves them. Or ends that."""
        rack.mute(self._net, self._topology, member, on=on)

    def ways(self, member: str) -> frozenset[str]:
        """The ports of a node or router that its routes to blocks lead through; a port is called as who is there."""
        wanted = frozenset(block for own in self._known.values() for block in own)
        protocol = PROTO_IMPORTS if member in self._machines else routers.PROTOCOL[self._topology.shape.tor]
        return rack.ways(self._net, member, wanted, protocol=protocol)

    def visitor(self) -> Visitor:
        """A ToR that is not there yet, for the segment of a mesh."""
        if VISITOR in self._net.names:
            raise LabError(f"{VISITOR} is there already")
        return Visitor(self._net, self._clock, self._topology, self._folder.member(VISITOR))

    async def command(self, node: str, *words: str) -> str:
        """What a command of a person at the node prints. Raises LabError if it fails."""
        environment = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "LANG": "C.UTF-8"} | self._environment(node)
        code, said = await outcome(words, environment, enter=self._net.enter(node))
        if code:
            raise LabError(f"{' '.join(words)} on {node}: {said.strip()}")
        return said

    async def unrest(self) -> str:
        """What is not as it is to be when everything works: "" when nothing is."""
        for link in self._cut:
            return f"the link between {link.lower.name} and {link.upper.name} is cut"
        for member in (*self._routers, *self._machines):
            for part, process in self.processes(member).items():
                if process.state != "running":
                    return f"{part} of {member} is down"
        problem = self._gap(await self._blocks())
        if problem:
            return problem
        for status in (await self._store.list(BGPNodeStatus)).items:
            for session in status.status.sessions:
                if session.state != "Established":
                    return f"{status.metadata.name} has no session with {session.address}: {session.reason}"
        return ""

    # -- building ------------------------------------------------------------------------------------------------

    def _open_store(self, kube: Kube | None) -> Store:
        if kube is None:
            return open_store(self._folder.store_url, clock=self._clock)
        # It needs the client of the API server, which a lab on a file does not.
        from lab.control import ControlPlane

        self._api = self._control = ControlPlane(self._net, self._clock, self._folder, kube.programs, kube.listener)
        return self._control.store()

    async def _build(self, group: asyncio.TaskGroup) -> None:
        topology, step = self._topology, self._story.step
        if self._control:
            with step("management network and keys"):
                self._control.prepare()
            # It starts while the rack is built.
            group.create_task(self._control.run())
        with step(f"namespaces for {self._census()}; {len(topology.links)} links"):
            rack.build(self._net, topology)
            if self._control:
                oob.plug(self._net, topology.nodes)
        self._start_routers(group)
        if self._control:
            with step("etcd and API server"):
                await self._control.ready(limit=_API_READY_WITHIN)
            with step("custom resources, rights and policies"):
                await self._control.install(limit=_READY_WITHIN)
        with step("store, pools and peers"):
            await self._fill_store()
        with step(f"CNI server, agent and ExaBGP on {_count(len(topology.nodes), 'node')}"):
            stores = await self._stores()
            machines = []
            for node in topology.nodes:
                self._machines[node.name] = machine = Machine(
                    self._net,
                    self._clock,
                    self._folder,
                    node,
                    stores=stores[node.name],
                    new_id=lambda: secrets.token_hex(32),
                )
                machines.append(machine)
                group.create_task(machine.run())
            for machine in machines:
                await machine.ready(limit=_READY_WITHIN)
        pods = [pod for node in topology.nodes for pod in node.pods]
        with step(f"{_count(len(pods), 'pod')}, attached through the shim"):
            await self._add_pods()
            if self._control:
                await self._control.kubelets.settled(limit=_READY_WITHIN)
        await self._see_routes()

    def _start_routers(self, group: asyncio.TaskGroup) -> None:
        topology = self._topology
        if not topology.routers:
            return
        with self._story.step(f"{routers.NAME[topology.shape.tor]} on {_count(len(topology.routers), 'router')}"):
            for router in topology.routers:
                self._routers[router.name] = daemons = self._router(router)
                for daemon in daemons.values():
                    group.create_task(daemon.run())

    async def _add_pods(self) -> None:
        async with asyncio.TaskGroup() as adds:
            for node in self._topology.nodes:
                for pod in node.pods:
                    adds.create_task(self.pod_add(pod))

    async def _see_routes(self) -> None:
        with self._story.step("routes: every block known to every router and node"):
            problem = await self._converge(_CONVERGED_WITHIN)
            if problem:
                raise LabError(f"after {_CONVERGED_WITHIN:.0f} s {problem}")

    async def _fill_store(self) -> None:
        async with asyncio.TaskGroup() as group:
            for obj in objects(self._topology):
                group.create_task(self._fill(obj))

    async def _fill(self, obj: Resource) -> None:
        async with self._turns:
            created = await self._store.create(obj)
            if isinstance(created, Node) and isinstance(obj, Node):
                await self._store.update_status(msgspec.structs.replace(created, status=obj.status))

    async def _stores(self) -> dict[str, Stores]:
        """By node, the store as its processes are to be given it."""
        nodes = self._topology.nodes
        if self._control:
            found = await asyncio.gather(*(self._control.admit(node) for node in nodes))
            return {node.name: stores for node, stores in zip(nodes, found, strict=True)}
        url = self._folder.store_url
        return {node.name: Stores(cni=url, agent=url, operator=url) for node in nodes}

    def _census(self) -> str:
        topology = self._topology
        kinds = (("spine", topology.spines), ("ToR", topology.tors), ("switch", topology.switches))
        return ", ".join(_count(len(members), what) for what, members in (*kinds, ("node", topology.nodes)) if members)

    def _router(self, router: Router) -> dict[RouterPart, Daemon]:
        programs = routers.prepare(self._topology, router, self._folder.member(router.name))
        return {
            program.name: Daemon(
                self._net,
                self._clock,
                member=router.name,
                name=program.name,
                argv=program.argv,
                environment={"PATH": PATH},
                log=program.log,
                after=program.after,
            )
            for program in programs
        }

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
        names = [router.name for router in self._topology.routers]
        gap = rack.missing(self._net, names, everything, protocol=routers.PROTOCOL[self._topology.shape.tor])
        for name in self._machines:
            gap = gap or rack.missing(self._net, [name], everything - set(blocks[name]), protocol=PROTO_IMPORTS)
        return f"{gap[0]} has no route to {gap[1]}" if gap else ""

    # -- looking ---------------------------------------------------------------------------------------------------

    async def _blocks(self) -> dict[str, tuple[str, ...]]:
        """Blocks by machine, or by node where none is called so; without those that are being given back. While the API
        server is away: as they were last."""
        found: dict[str, tuple[str, ...]] = {}
        try:
            blocks = (await self._store.list(IPAMBlock)).items
        except Unavailable as e:
            if self._api is None:
                raise
            _log.info("blocks as they were last: %s", e)
            return self._known
        machines = {machine.name: name for name, machine in self._machines.items()}
        for block in blocks:
            if not block.status.releasing and not block.metadata.deletion_timestamp:
                owner = machines.get(block.spec.node, block.spec.node)
                found[owner] = (*found.get(owner, ()), block.spec.cidr)
        self._known = found
        return found

    def _pods(self) -> list[Pod]:
        sandboxes = [s for machine in self._machines.values() for s in machine.sandboxes.values()]
        return [Pod(s.pod, s.addresses) for s in sorted(sandboxes, key=lambda s: pod_number(s.pod))]

    def _router_state(self, router: Router) -> RouterState:
        return RouterState(
            name=router.name,
            rack=rack_name(router.rack),
            asn=router.asn,
            processes={part: daemon.state() for part, daemon in self._routers.get(router.name, {}).items()},
        )

    def _router_of(self, name: str) -> Router:
        for router in self._topology.routers:
            if router.name == name:
                return router
        raise LabError(f"no router is called {name}")

    def _machine(self, name: str) -> Machines:
        if name not in self._machines:
            raise LabError(f"no node is called {name}; nodes are: {', '.join(self._machines) or 'not there yet'}")
        return self._machines[name]

    def _daemons(self, member: str) -> Mapping[Any, Daemon]:
        if self._api and member == oob.CONTROL_PLANE:
            return self._api.daemons
        return self._routers.get(member) or self._machine(member).daemons

    def _environment(self, name: str) -> dict[str, str]:
        if name in self._routers or (name == VISITOR and self._topology.shape.mesh):
            return routers.environment(self._topology.shape.tor, self._folder.member(name))
        if self._api and name == oob.CONTROL_PLANE:
            return self._api.environment
        if name in self._machines:
            return {"UNDERLAY_NODE": self._machines[name].name} | self._machines[name].environment
        return {}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
