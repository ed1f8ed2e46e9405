"""The pinger in real namespaces: it counts what is lost, in which direction and for how long, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from lab.net import Net
from lab.pinger import Member, Path, Told
from lab.pings import Pings, pinging
from tests.conftest import usable

ADDRESSES = {"a": ("192.0.2.1", "2001:db8::1"), "b": ("192.0.2.2", "2001:db8::2")}
BOTH_WAYS = ((0, 1), (1, 0))


@pytest.fixture
def members(net: Net) -> list[Member]:
    for name in ADDRESSES:
        net.add(name)
    net.link("a", "b", "b", "a")
    for name, port in (("a", "b"), ("b", "a")):
        v4, v6 = ADDRESSES[name]
        net.address(name, port, [f"{v4}/24", f"{v6}/64"])
    usable(net, *ADDRESSES)
    return [Member(name, str(net.path(name)), addresses) for name, addresses in ADDRESSES.items()]


def play(members: list[Member], story: Callable[[Pings], Awaitable[Told]]) -> Told:
    async def run() -> Told:
        async with pinging(members, BOTH_WAYS, 100) as pings:
            return await story(pings)

    return asyncio.run(run())


def find(told: Told, sender: str, family: int) -> Path:
    return next(path for path in told.paths if (path.sender, path.family) == (sender, family))


async def sent(pings: Pings, count: int) -> None:
    """Returns when every path has had so many more judged."""
    before = {(p.sender, p.family): p.tally.sent for p in (await pings.tell()).paths}
    async with asyncio.timeout(60):
        while True:
            if all(p.tally.sent - before[p.sender, p.family] >= count for p in (await pings.tell()).paths):
                return
            await asyncio.sleep(0.05)


def test_nothing_is_lost_where_nothing_happens(members: list[Member]) -> None:
    async def story(pings: Pings) -> Told:
        await sent(pings, 50)
        return await pings.finish()

    told = play(members, story)
    assert len(told.paths) == 4
    for path in told.paths:
        assert path.tally.sent >= 50
        assert (path.tally.lost, path.tally.longest, path.tally.open, path.problem) == (0, None, False, "")
    assert told.dropped == 0


def test_a_loss_has_a_direction_a_family_and_a_length(net: Net, members: list[Member]) -> None:
    async def story(pings: Pings) -> Told:
        await sent(pings, 20)
        net.ip("a", ["route add blackhole 192.0.2.2/32"])
        await sent(pings, 60)
        assert find(await pings.tell(), "a", 4).tally.open
        net.ip("a", ["route del blackhole 192.0.2.2/32"])
        await sent(pings, 20)
        return await pings.finish()

    told = play(members, story)
    hurt = find(told, "a", 4)
    assert hurt.tally.lost >= 40
    assert hurt.tally.gaps == 1
    assert hurt.tally.longest is not None
    # Its packets were due every 10 ms.
    assert hurt.tally.longest.seconds >= hurt.tally.lost * 0.01 * 0.9
    assert not hurt.tally.open
    assert hurt.problem.startswith("sending:")
    assert [find(told, *key).tally.lost for key in (("a", 6), ("b", 4), ("b", 6))] == [0, 0, 0]


def test_a_wrong_source_does_not_count_as_arrived(net: Net, members: list[Member]) -> None:
    net.ip("a", ["addr add 192.0.2.77/24 dev b", "route add 192.0.2.2/32 dev b src 192.0.2.77"])

    async def story(pings: Pings) -> Told:
        await sent(pings, 20)
        return await pings.finish()

    told = play(members, story)
    assert find(told, "a", 4).problem == "was seen as 192.0.2.77, is 192.0.2.1"
    assert find(told, "a", 4).tally.lost == find(told, "a", 4).tally.sent
    assert find(told, "b", 4).tally.lost == 0


def test_a_member_that_is_released_can_end_and_costs_nothing(net: Net, members: list[Member]) -> None:
    net.add("c")
    net.link("c", "a", "a", "c")
    net.address("c", "a", ["198.51.100.3/24"])
    net.address("a", "c", ["198.51.100.1/24"])
    net.ip("c", ["route add 192.0.2.0/24 via 198.51.100.1"])
    third = Member("c", str(net.path("c")), ("198.51.100.3",))

    async def run() -> tuple[Told, Told]:
        async with pinging([*members, third], [*BOTH_WAYS, (2, 0)], 100) as pings:
            await asyncio.sleep(0.2)
            ended = await pings.release(["c"])
            net.ip("c", ["link del dev a"])
            await sent(pings, 20)
            return ended, await pings.finish()

    ended, told = asyncio.run(run())
    # It has one family, and so one path.
    assert [(path.sender, path.receiver, path.family, path.tally.lost) for path in ended.paths] == [("c", "a", 4, 0)]
    assert ended.paths[0].tally.sent > 5
    assert {path.sender for path in told.paths} == {"a", "b"}
    assert sum(path.tally.lost for path in told.paths) == 0
