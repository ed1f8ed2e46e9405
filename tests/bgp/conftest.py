"""A node's speaker against a real router: what the tests of this folder share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.bgp import conf, speaker
from agent.bgp.driver import Driver
from agent.bgp.model import Announcement, EndOfRib, Event, Session, SessionChanges, SessionDown, SessionUp
from lab.net import Net
from store.clock import SystemClock
from tests.bgp import routers
from tests.conftest import eventually

BOTH = ("ipv4 unicast", "ipv6 unicast")
ROOT = Path(__file__).resolve().parents[2]


def session(family: str = "4", **changes: Any) -> Session:
    local, peer = (routers.NODE4, routers.TOR4) if family == "4" else (routers.NODE6, routers.TOR6)
    values: dict[str, Any] = {
        "name": f"tor-{family}",
        "address": peer,
        "local_address": local,
        "local_as": routers.NODE_AS,
        "peer_as": routers.TOR_AS,
        "router_id": routers.NODE4,
        "families": BOTH,
    }
    return Session(**{**values, **changes})


SESSIONS = frozenset({session("4"), session("6")})


def announce(prefix: str, **changes: Any) -> Announcement:
    """A prefix to the peer of its own family."""
    six = ":" in prefix
    values: dict[str, Any] = {
        "peer": routers.TOR6 if six else routers.TOR4,
        "prefix": prefix,
        "next_hop": routers.NODE6 if six else routers.NODE4,
    }
    return Announcement(**{**values, **changes})


def blocks(count: int, **changes: Any) -> frozenset[Announcement]:
    """``count`` blocks, every other one IPv6."""
    four = [
        announce(f"10.{244 + i // 1024}.{i // 4 % 256}.{i % 4 * 64}/26", **changes) for i in range((count + 1) // 2)
    ]
    six = [announce(f"fd00:10:244:{i + 1:x}::/122", **changes) for i in range(count // 2)]
    return frozenset(four + six)


class Node:
    """The node's side: its run folder, its speaker process, as a supervisor would keep it."""

    def __init__(self, net: Net, folder: Path, name: str = "node") -> None:
        self._net, self._name = net, name
        self.folder = folder / "run" / "speaker"
        self.options: tuple[str, ...] = ()
        self.process: Any = None
        self.changes: list[Event] = []

    @property
    def log(self) -> Path:
        """What the speaker prints, which is what the relay says."""
        return self.folder.parent.parent / "speaker.log"

    def start(self) -> None:
        speaker.prepare(self.folder, *self.options)
        argv = [sys.executable, "-P", "-m", "agent.bgp.speaker", "--run", str(self.folder.parent)]
        self.process = self._net.spawn(self._name, argv, log=self.log)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.process.pid, how)
        self.process.wait()

    def relay(self) -> int:
        """The relay's pid."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        # A child that has not yet become the relay is still called as ExaBGP is.
        return next(int(c) for c in children if b"-ISEs" in Path(f"/proc/{c}/cmdline").read_bytes())

    def write_conf(self, sessions: frozenset[Session]) -> None:
        """What a driver would have left."""
        speaker.prepare(self.folder, *self.options)
        command = speaker.relay_command(self.folder, *self.options)
        (self.folder / "exabgp.conf").write_text(conf.render(sessions, command))

    @contextlib.asynccontextmanager
    async def driver(self) -> AsyncIterator[tuple[Driver, list[Event]]]:
        """A driver, as the agent runs it, and the events it gave; those for people are in ``changes``."""
        events: list[Event] = []

        def sink(event: Event) -> None:
            (self.changes if isinstance(event, SessionChanges) else events).append(event)

        driver = Driver(self.folder, SystemClock(), sink, relay_options=self.options)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(driver.run())
            try:
                yield driver, events
            finally:
                running.cancel()


class Witness:
    """``ip monitor route`` in the router's namespace: every route of ours that its kernel gains or loses."""

    def __init__(self, net: Net, log: Path) -> None:
        self._log = log
        self._old = 0
        net.spawn("tor", ["ip", "monitor", "route"], log=log)

        def listens() -> bool:
            net.ip("tor", ["route add blackhole 192.0.2.0/32", "route del blackhole 192.0.2.0/32"])
            return "192.0.2.0" in log.read_text()

        eventually(listens)

    async def begin(self, prefixes: Iterable[str]) -> None:
        """From here on; after it has seen each of these arrive, which shows that it sees."""
        await until(lambda: all(f"{p} " in self._log.read_text() for p in prefixes))
        self._old = len(self._ours())

    def seen(self) -> list[str]:
        return self._ours()[self._old :]

    def _ours(self) -> list[str]:
        return [line for line in self._log.read_text().splitlines() if "10.24" in line or "fd00:10:" in line]


def ended(events: Iterable[Event]) -> set[tuple[str, str]]:
    """Peer and family of the End-of-RIBs that came in the sessions that are up."""
    found: set[tuple[str, str]] = set()
    for event in events:
        if isinstance(event, EndOfRib):
            found.add((event.peer, event.family))
        elif isinstance(event, SessionUp | SessionDown):
            found = {pair for pair in found if pair[0] != event.peer}
    return found


async def until(probe: Callable[[], Any], *, limit: float = 60, every: float = 0.05) -> Any:
    """``eventually``, with the driver running in between."""
    loop = asyncio.get_running_loop()
    end = loop.time() + limit
    while True:
        try:
            value = probe()
            if value:
                return value
            problem: AssertionError | None = None
        except AssertionError as e:
            problem = e
        if loop.time() > end:
            raise problem or AssertionError(f"still {value!r} after {limit} s")
        await asyncio.sleep(every)


def run(main: Awaitable[None], limit: float = 150) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(limit):
            await main

    asyncio.run(bounded())


@pytest.fixture(params=["bird", "frr"])
def router(request: pytest.FixtureRequest, net: Net, tmp_path: Path) -> routers.Router:
    """Each kind of router, not started."""
    routers.wire(net)
    return routers.KINDS[request.param](net, tmp_path)


@pytest.fixture
def bird(net: Net, tmp_path: Path) -> routers.Router:
    routers.wire(net)
    return routers.Bird(net, tmp_path)


@pytest.fixture
def node(net: Net, tmp_path: Path) -> Node:
    return Node(net, tmp_path)


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path) -> Iterator[None]:
    """What agent and speaker of a node in this folder said, where a test fails."""
    yield
    for log in (tmp_path / "agent.log", tmp_path / "speaker.log", tmp_path / "run" / "speaker" / "exabgp.log"):
        if log.exists():
            print(f"--- {log.name}\n{log.read_text()[-6000:]}")


@pytest.fixture
def without(node: Node, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has ExaBGP run a relay that lacks a care (careless.py) in the place of ours."""

    def choose(care: str) -> None:
        monkeypatch.setattr(speaker, "RELAY", Path(__file__).with_name("careless.py"))
        node.options = (*node.options, "--without", care)

    return choose
