"""How a drill is run: packets are counted on every path before, during and after, and what was done is taken back."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from typing import Any, Final, Protocol

import msgspec

from lab.drilled import PathLoss, Report
from lab.errors import LabError, NetError
from lab.pinger import Member, Path, Told
from lab.pings import pinging
from lab.story import Story
from lab.topology import Topology, Use, node_of_pod
from lab.visitor import Visitor
from lab.wire import ProcessState
from store.base import Store
from store.clock import Clock
from store.errors import StoreError

_WITHIN: Final = 120.0
_LOOK_EVERY: Final = 0.1
_log = logging.getLogger(__name__)

Step = Callable[[str], AbstractContextManager[None]]
Ping = Callable[[Sequence[Member], Sequence[tuple[int, int]], float], AbstractAsyncContextManager["Counter"]]
Connections = frozenset[tuple[str, int, int]]


class Site(Protocol):
    """What a drill may do to a lab, and see of it: ``lab.building.Lab``."""

    @property
    def topology(self) -> Topology: ...
    @property
    def store(self) -> Store: ...
    def members(self) -> tuple[Member, ...]: ...
    def kill(self, member: str, part: Any, number: int, restart_after: float) -> None: ...
    def processes(self, member: str) -> Mapping[Any, ProcessState]: ...
    def cable(self, a: str, b: str, *, up: bool) -> None: ...
    def use(self, router: str, how: Use) -> None: ...
    def shut(self, router: str, *, on: bool) -> None: ...
    def power(self, member: str, *, on: bool) -> None: ...
    def pods(self, node: str) -> frozenset[str]: ...
    def blocks(self, node: str) -> frozenset[str]: ...
    def routed(self, node: str, blocks: frozenset[str]) -> bool: ...
    def mute(self, member: str, *, on: bool) -> None: ...
    def ways(self, member: str) -> frozenset[str]: ...
    def visitor(self) -> Visitor: ...
    def connections(self, node: str) -> Connections: ...
    def ask_agent(self, node: str) -> Callable[[], bool]: ...
    async def unrest(self) -> str: ...
    async def pod_add(self, name: str) -> Any: ...
    async def pod_del(self, name: str) -> None: ...
    async def command(self, node: str, *words: str) -> str: ...


class Counter(Protocol):
    """``lab.pings.Pings``."""

    async def tell(self) -> Told: ...
    async def release(self, members: Sequence[str]) -> Told: ...
    async def finish(self) -> Told: ...


class Scene:
    """Where a drill plays. ``node`` is the one that it is about, unless it is about others; what it takes away is gone
    for ``away`` seconds."""

    def __init__(
        self, site: Site, clock: Clock, pings: Counter, step: Step, *, later: AsyncExitStack, away: float
    ) -> None:
        self.site, self.clock, self.step, self.away = site, clock, step, away
        self.node = site.topology.nodes[0].name
        self.released: list[Path] = []
        self._pings = pings
        self._later = later
        self._peers = {node.name: _peers(site.connections(node.name)) for node in site.topology.nodes}

    def afterwards(self, undo: Callable[[], Awaitable[object]]) -> None:
        """To be called when the steps are over, however they end; the last one first."""
        self._later.push_async_callback(undo)

    async def stay(self) -> None:
        """For as long as things are away."""
        await self.clock.sleep(self.away)

    async def restart(self, node: str, *parts: str, signal: int, away: float) -> None:
        """Ends these processes of a node at once; returns when all of them do their work again."""
        before = self.site.processes(node)
        connections = self.site.connections(node)
        for part in parts:
            self.site.kill(node, part, signal, away)
        for part in parts:
            await self.restarted(node, part, before[part].restarts)
        if "exabgp" in parts:
            await self.until(lambda: self._again(node, connections), f"{node} does not have its sessions again")

    async def restarted(self, node: str, part: str, restarts: int) -> None:
        """Returns when the process has been started more than so many times again; an agent, when it does its work."""
        await self.until(lambda: self._newer(node, part, restarts), f"{part} of {node} is not back")
        if part == "agent":
            await self.understood(node)

    async def understood(self, node: str) -> None:
        """Returns when the node's agent has looked at everything again, and up to a second has passed in which it may
        do what follows from what it saw."""
        await self.until(self.site.ask_agent(node), f"the agent of {node} does not do its work")
        await self.clock.sleep(min(1.0, self.away))

    def peers(self, node: str) -> frozenset[str]:
        """With whom the node has a session."""
        return _peers(self.site.connections(node))

    def anew(self, node: str, old: Connections) -> bool:
        """Whether one of the node's connections is newer than ``old``."""
        return not self.site.connections(node) <= old

    async def reconnected(self, node: str) -> None:
        """Returns when the node has as many sessions, to the same peers, as when the drill began."""
        await self.until(lambda: self._again(node, frozenset()), f"{node} does not have its sessions again")

    async def until(self, true: Callable[[], bool], problem: str, *, limit: float = _WITHIN) -> None:
        """Raises LabError with the problem when that is not so after ``limit`` seconds."""
        end = self.clock.monotonic() + limit
        while not true():
            if self.clock.monotonic() > end:
                raise LabError(f"{problem} after {limit:.0f} s")
            await self.clock.sleep(_LOOK_EVERY)

    async def release(self, members: Iterable[str]) -> None:
        """Ends the counting on paths to and from these, for good."""
        self.released += (await self._pings.release(tuple(members))).paths

    async def calm(self, seconds: float, *, limit: float = _WITHIN) -> str:
        """Returns "" when for so many seconds all was as it is to be and nothing was lost; or after ``limit`` seconds
        what is not."""
        since = self.clock.monotonic()
        end = since + limit
        lost = -1
        while True:
            unrest = await self.site.unrest() or self._disconnected()
            told = await self._pings.tell()
            unrest = unrest or _silent(told)
            now = self.clock.monotonic()
            losing = sum(path.tally.lost for path in told.paths)
            if unrest or losing != lost:
                since = now
            if now - since >= seconds:
                return ""
            if now > end:
                return unrest or "packets are lost on and on"
            lost = losing
            await self.clock.sleep(_LOOK_EVERY * 5)

    def _newer(self, member: str, part: str, restarts: int) -> bool:
        process = self.site.processes(member)[part]
        return process.state == "running" and process.restarts > restarts

    def _again(self, node: str, old: Connections) -> bool:
        now = self.site.connections(node)
        return not now & old and _peers(now) >= self._peers[node]

    def _disconnected(self) -> str:
        for node, peers in self._peers.items():
            gone = peers - _peers(self.site.connections(node))
            if gone:
                return f"{node} has no session with {', '.join(sorted(gone))}"
        return ""


Steps = Callable[[Scene], Awaitable[None]]


class Struck(msgspec.Struct, frozen=True):
    """The nodes that a drill does something to, and what to call them."""

    name: str
    nodes: tuple[str, ...]


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """``planned``: no path may lose a packet. ``struck``: which nodes of a topology it does something to. ``refusal``:
    why it cannot be done in a topology, or ""."""

    name: str
    sentence: str
    planned: bool
    struck: Callable[[Topology], Struck]
    steps: Steps
    refusal: Callable[[Topology], str] = lambda topology: ""


class Play:
    """One drill under way: its story, and in the end its report."""

    def __init__(self, drill: Drill, story: Story) -> None:
        self.name = drill.name
        self.story = story
        self.report: Report | None = None
        self._drill = drill

    async def run(self, site: Site, clock: Clock, *, rate: float, away: float, calm: float) -> None:
        """Raises nothing: the story ends with what went wrong."""
        try:
            self.report = await run(self._drill, site, clock, self.story.step, rate=rate, away=away, calm=calm)
        except (LabError, NetError, StoreError) as e:
            self.story.end("failed", str(e))
        except Exception as e:
            _log.exception("a fault of the drill's own")
            self.story.end("failed", f"a fault of the drill's own: {e!r}: see lab.log")
        else:
            self.story.end("done")


async def run(
    drill: Drill,
    site: Site,
    clock: Clock,
    step: Step,
    *,
    rate: float,
    away: float,
    calm: float,
    ping: Ping = pinging,
) -> Report:
    """Raises LabError if it cannot be done, or not to its end; what was done is taken back then, too."""
    refusal = drill.refusal(site.topology)
    if refusal:
        raise LabError(f"{drill.name}: {refusal}")
    members = site.members()
    begin = clock.monotonic()
    async with ping(members, pairs(members), rate) as pings:
        async with AsyncExitStack() as later:
            scene = Scene(site, clock, pings, step, later=later, away=away)
            with step("packets on every path"):
                unrest = await scene.calm(1.5, limit=20)
                if unrest:  # what it finds later would not be its own doing
                    raise LabError(f"{drill.name}: not begun, as {unrest}")
            start = clock.monotonic()
            await drill.steps(scene)
        with step("until all is as before"):
            unrest = await scene.calm(calm)
        told = await pings.finish()
    struck = drill.struck(site.topology)
    return Report(
        drill=drill.name,
        topology=name_of(site.topology),
        planned=drill.planned,
        struck=struck.nodes,
        name_struck=struck.name,
        seconds=clock.monotonic() - begin,
        paths=tuple(_loss(path, start) for path in (*scene.released, *told.paths)),
        unrest=unrest,
        late=told.late,
        dropped=told.dropped,
    )


def watched(name: str, topology: Topology, told: Told, *, begin: float, end: float) -> Report:
    """What the pings found where nothing is done that may lose one."""
    return Report(
        drill=name,
        topology=name_of(topology),
        planned=True,
        struck=(),
        name_struck="",
        seconds=end - begin,
        paths=tuple(_loss(path, begin) for path in told.paths),
        late=told.late,
        dropped=told.dropped,
    )


def pairs(members: Sequence[Member]) -> tuple[tuple[int, int], ...]:
    """Places of sender and receiver: every ordered pair of pods; and each node itself to the first pod of each other
    node."""
    first: dict[str, int] = {}
    pods = [(place, node_of_pod(m.name)) for place, m in enumerate(members) if m.name.startswith("pod-")]
    for place, node in pods:
        first.setdefault(node, place)
    found = [(a, b) for a, _ in pods for b, _ in pods if a != b]
    for place, member in enumerate(members):
        if member.name.startswith("node-"):
            found += [(place, pod) for node, pod in first.items() if node != member.name]
    return tuple(found)


def name_of(topology: Topology) -> str:
    """The topology in a word or two, for tables."""
    shape = topology.shape
    if shape.mesh:
        return "mesh"
    return f"{'dual' if shape.dual_tor else 'single'} ToR, {'FRR' if shape.tor == 'frr' else 'BIRD'}"


def _peers(connections: Connections) -> frozenset[str]:
    return frozenset(peer for peer, _, _ in connections)


def _silent(told: Told) -> str:
    for path in told.paths:
        if path.tally.open or not path.tally.sent:
            return f"packets from {path.sender} to {path.receiver} do not arrive, IPv{path.family}"
    return ""


def _loss(path: Path, start: float) -> PathLoss:
    tally = path.tally
    return PathLoss(
        sender=path.sender,
        receiver=path.receiver,
        family=path.family,
        sent=tally.sent,
        unsent=path.unsent,
        lost=tally.lost,
        gaps=tally.gaps,
        gap=tally.longest.seconds if tally.longest else 0.0,
        at=tally.longest.at - start if tally.longest else 0.0,
        problem=path.problem,
    )
