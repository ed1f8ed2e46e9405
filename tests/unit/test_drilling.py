"""How a drill is run: begun only on a whole lab, taken back whatever happens, over when all is as before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from lab.drilled import Report
from lab.drilling import Drill, Scene, Struck, run
from lab.errors import LabError
from lab.losses import Gap, Tally
from lab.pinger import Member, Path, Told
from lab.topology import Topology

MAP = Topology.build(racks=1, nodes=2, pods=1)


class Clock:
    """Sleeping is what makes time pass."""

    def __init__(self) -> None:
        self.time = 100.0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> str:
        raise AssertionError("a drill has no use for the wall clock")

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)


class Rack:
    """A site, and the counter over it. ``trouble`` is what is wrong, and loses packets."""

    topology = MAP

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.trouble = ""
        self.lost = 0
        self.done: list[str] = []
        self.released: tuple[str, ...] = ()
        self.counting = False

    def members(self) -> tuple[Member, ...]:
        return tuple(Member(f"pod-{n}-1", f"/{n}", ("192.0.2.1",)) for n in (1, 2))

    def connections(self, node: str) -> frozenset[tuple[str, int, int]]:
        return frozenset() if self.trouble == "no session" else frozenset({("192.0.2.9", 1, 179)})

    async def unrest(self) -> str:
        return self.trouble

    def cable(self, a: str, b: str, *, up: bool) -> None:
        self.done.append("mend" if up else "cut")
        self.trouble = "" if up else "cut"

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a drill of this test does nothing with {name}")

    @asynccontextmanager
    async def ping(
        self, members: Sequence[Member], pairs: Sequence[tuple[int, int]], rate: float
    ) -> AsyncIterator[Rack]:
        assert (len(members), list(pairs), rate) == (2, [(0, 1), (1, 0)], 50)
        self.counting = True
        yield self
        self.counting = False

    async def tell(self) -> Told:
        assert self.counting
        if self.trouble:
            self.lost += 1
        gap = Gap(self.clock.time - 1, 0.5, self.lost) if self.lost else None
        tally = Tally(sent=100, lost=self.lost, gaps=1, longest=gap, open=bool(self.trouble))
        path = Path(sender="pod-1-1", receiver="pod-2-1", family=4, tally=tally, unsent=0, problem="")
        return Told(paths=() if "pod-1-1" in self.released else (path,), late=0.0, dropped=0)

    async def release(self, members: Sequence[str]) -> Told:
        told = await self.tell()
        self.released = tuple(members)
        return told

    finish = tell


def play(rack: Rack, steps: Any, *, planned: bool = True, refusal: str = "") -> tuple[Report, list[str]]:
    told: list[str] = []

    @contextmanager
    def step(text: str) -> Iterator[None]:
        told.append(text)
        yield

    drill = Drill(
        name="x",
        sentence="X.",
        planned=planned,
        struck=lambda t: Struck("node-1", ("node-1",)),
        steps=steps,
        refusal=lambda t: refusal,
    )
    report = asyncio.run(run(drill, rack, rack.clock, step, rate=50, away=3, calm=2, ping=rack.ping))  # type: ignore[arg-type]
    return report, told


@pytest.fixture
def rack() -> Rack:
    return Rack(Clock())


async def nothing(scene: Scene) -> None:
    with scene.step("nothing"):
        await scene.stay()


async def cut(scene: Scene) -> None:
    async def mend() -> None:
        scene.site.cable("a", "b", up=True)

    scene.afterwards(mend)
    scene.site.cable("a", "b", up=False)
    await scene.stay()
    await scene.calm(1, limit=2)


def test_what_loses_nothing_is_good(rack: Rack) -> None:
    begin = rack.clock.time
    report, told = play(rack, nothing)
    assert report.good
    assert told == ["packets on every path", "nothing", "until all is as before"]
    assert rack.clock.time - begin == pytest.approx(1.5 + 3 + 2, abs=1)
    assert not rack.counting


def test_what_is_lost_is_reported_and_taken_back(rack: Rack) -> None:
    report, _ = play(rack, cut)
    assert rack.done == ["cut", "mend"]
    assert report.lost > 0
    assert not report.good
    assert report.unrest == ""
    # When, is counted from the first step on.
    assert 0 < report.paths[0].at < 20


def test_a_step_that_fails_is_taken_back(rack: Rack) -> None:
    async def steps(scene: Scene) -> None:
        await cut(scene)
        await scene.until(lambda: False, "it is not so", limit=1)

    with pytest.raises(LabError, match="it is not so after 1 s"):
        play(rack, steps)
    assert rack.done == ["cut", "mend"]


@pytest.mark.parametrize(("trouble", "why"), [("agent of node-1 is down", "is down"), ("no session", "no session")])
def test_it_is_not_begun_where_something_is_wrong(rack: Rack, trouble: str, why: str) -> None:
    rack.trouble = trouble
    with pytest.raises(LabError, match=f"not begun, as .*{why}"):
        play(rack, cut)
    assert rack.done == []


def test_it_is_not_begun_where_it_makes_no_sense(rack: Rack) -> None:
    with pytest.raises(LabError, match="x: there is no ToR"):
        play(rack, cut, refusal="there is no ToR")
    assert rack.done == []


def test_what_stays_wrong_is_no_success(rack: Rack) -> None:
    async def steps(scene: Scene) -> None:
        scene.site.cable("a", "b", up=False)

    report, _ = play(rack, steps, planned=False)
    assert report.unrest == "cut"
    assert not report.good


def test_paths_of_what_ends_are_counted_until_then(rack: Rack) -> None:
    async def steps(scene: Scene) -> None:
        await scene.release(["pod-1-1"])
        rack.lost = 99  # what comes after is nobody's loss

    report, _ = play(rack, steps)
    assert [(path.sender, path.sent, path.lost) for path in report.paths] == [("pod-1-1", 100, 0)]
