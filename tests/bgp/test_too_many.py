"""A ToR that announces more than it should: it is removed, memory stays bounded, the others stay up.

With UNDERLAY_LARGE the tables are full ones (300,000 routes), and the sizes are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp import routers
from tests.bgp.conftest import run, until
from tests.bgp.raw import AS_PATH, Raw, attribute, next_hop, nlri, origin, sequence, update
from tests.bgp.routers import TOR_AS
from tests.bgp.worlds import World
from tests.conftest import eventually

LARGE = bool(os.environ.get("UNDERLAY_LARGE"))
COUNT, MAXIMUM = (300_000, 100_000) if LARGE else (20_000, 5_000)


def many(count: int) -> list[str]:
    return [f"{16 + i // 65536}.{i // 256 % 256}.{i % 256}.0/24" for i in range(count)]


def peak(pid: int) -> int:
    """The most memory that it ever had resident, in MB (proc_pid_status(5), VmHWM)."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) >> 10


def now(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) >> 10


class Sizes:
    """Of agent, ExaBGP and relay, in MB."""

    def __init__(self, world: World) -> None:
        assert world.agent.process is not None
        assert world.agent.speaker is not None
        speaker = world.agent.speaker.pid
        children = Path(f"/proc/{speaker}/task/{speaker}/children").read_text().split()
        self._pids = {"agent": world.agent.process.pid, "ExaBGP": speaker, "relay": int(children[0])}

    def peaks(self) -> dict[str, int]:
        return {name: peak(pid) for name, pid in self._pids.items()}

    def now(self) -> dict[str, int]:
        return {name: now(pid) for name, pid in self._pids.items()}


def test_a_peer_with_too_many_routes_is_removed(net: Net, tmp_path: Path) -> None:
    world = World(net, tmp_path, max_prefixes=MAXIMUM)
    world.start()
    sizes = Sizes(world)
    before = sizes.now()
    bad = routers.Bird(net, tmp_path)
    started = time.monotonic()
    bad.start(many(COUNT))

    def removed() -> bool:
        session = world.told("tor-4")
        assert session.state == "Idle"
        assert f"{MAXIMUM} are allowed" in session.reason
        assert "Established" not in bad.ask("show", "protocols", "node4")
        return True

    eventually(removed, limit=120 if LARGE else 60)
    took = time.monotonic() - started
    assert "MaxPrefixesExceeded" in world.conditions()
    eventually(lambda: "Established" in bad.ask("show", "protocols", "node6"))
    assert "node6: Received" not in (bad.folder / "log").read_text(), "it is another peer, and did nothing"
    peaks = sizes.peaks()
    print(f"{COUNT} routes, maximum {MAXIMUM}: removed in {took:.1f} s; MB before {before}, at most {peaks}")
    assert peaks["ExaBGP"] < 200
    assert peaks["relay"] < 120
    assert peaks["agent"] < 250
    world.sound()


def test_few_routes_that_say_too_much_are_too_many(net: Net, tmp_path: Path) -> None:
    """Each with a path of its own as long as a message lets it be: what is told is bounded, not only how often."""
    world = World(net, tmp_path)
    world.start()
    sizes = Sizes(world)
    before = sizes.now()
    bad = Raw(net)
    # 4 for each of the 100,000 prefixes that may come: some hundred routes are enough.
    routes = [
        update(origin() + attribute(AS_PATH, b"".join(part)) + next_hop(), nlri(f"16.{i // 256}.{i % 256}.0/24"))
        for i in range(450)
        for part in [[sequence(TOR_AS, *(1000 + i + n for n in range(244)))] * 4]
    ]

    async def main() -> None:
        async with bad.running():
            await until(lambda: bad.up)
            with contextlib.suppress(OSError):
                await bad.say(*routes)
            removed = lambda: "AS numbers and communities received" in world.told("tor-4").reason  # noqa: E731
            await asyncio.to_thread(lambda: eventually(removed))
            await until(lambda: not bad.up)

    run(main(), 120)
    print(f"MB before {before}, at most {sizes.peaks()}")
    assert sizes.peaks()["agent"] < 150
    world.sound()


@pytest.mark.parametrize("install", [False, True], ids=["outside-of-pools", "installed"])
def test_a_full_table_where_it_is_wanted(net: Net, tmp_path: Path, install: bool) -> None:
    """maxPrefixes raised for it: what it costs."""
    changes = {"import_cidrs": ("16.0.0.0/5",)} if install else {}
    world = World(net, tmp_path, max_prefixes=400_000, **changes)
    world.start()
    sizes = Sizes(world)
    before = sizes.now()
    bad = routers.Bird(net, tmp_path)
    started = time.monotonic()
    bad.start(many(COUNT))

    def received() -> bool:
        session = world.told("tor-4")
        assert session.received == COUNT
        assert session.accepted == (COUNT if install else 0)
        return True

    eventually(received, limit=240, every=1)
    heard = time.monotonic() - started
    if install:
        eventually(lambda: len(world.imports()) == COUNT + 2, limit=240, every=2)
    took = time.monotonic() - started
    print(f"{COUNT} routes: received in {heard:.1f} s, whole in {took:.1f} s; MB before {before},")
    print(f"at most {sizes.peaks()}, after {sizes.now()}")
    world.sound()
