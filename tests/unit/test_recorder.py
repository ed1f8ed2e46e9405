"""Events: one for one thing said about one object, counted when it is said again, never in anybody's way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from store.errors import Unavailable
from store.memory import MemoryStore
from store.model import KubeEvent, ObjectReference
from store.recorder import Recorder, Settings, node_reference, pod_reference
from tests.ipam_fakes import FakeClock, play

NODE = node_reference("node-1")
POD = pod_reference("shop/web-0", "uid-7")
SETTINGS = Settings(topics=4)


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.recorder = self.new()
        self._running: asyncio.Task[None] | None = None

    def new(self) -> Recorder:
        return Recorder(self.store, self.clock, controller="underlay.network/cni", instance="node-1", settings=SETTINGS)

    def say(self, note: str = "no block is left", reason: str = "PoolExhausted", **how: object) -> None:
        regarding = how.pop("regarding", NODE)
        assert isinstance(regarding, ObjectReference)
        self.recorder.say(regarding, reason, note, action="Claim", **how)  # type: ignore[arg-type]

    async def restart(self) -> None:
        await self.down()
        self.recorder = self.new()
        await self.up()

    async def up(self) -> None:
        self._running = asyncio.create_task(self.recorder.run())
        await self.clock.advance(0)

    async def down(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def events(self) -> list[KubeEvent]:
        return list((await self.store.list(KubeEvent)).items)

    async def counts(self) -> dict[str, int]:
        return {e.note: e.series.count if e.series else 1 for e in await self.events()}


def run(story: Callable[[Rig], Awaitable[None]]) -> None:
    async def main() -> None:
        rig = Rig()
        await rig.up()
        try:
            await story(rig)
        finally:
            await rig.down()

    play(main())


def test_what_is_said_is_found_where_kubectl_describe_looks() -> None:
    """For a Node by name and uid, where kubelet's uid is the name; for a Pod by namespace, name and uid."""

    async def story(rig: Rig) -> None:
        rig.say()
        rig.say("no address", "NoAddress", regarding=POD)
        await rig.clock.advance(1)
        on_node, on_pod = await rig.events()
        assert on_node.regarding == ObjectReference(api_version="v1", kind="Node", name="node-1", uid="node-1")
        assert (on_node.metadata.namespace, on_node.type, on_node.reason) == ("default", "Warning", "PoolExhausted")
        assert on_pod.regarding == ObjectReference(
            api_version="v1", kind="Pod", namespace="shop", name="web-0", uid="uid-7"
        )
        assert on_pod.metadata.namespace == "shop"
        assert (on_pod.reporting_controller, on_pod.reporting_instance) == ("underlay.network/cni", "node-1")

    run(story)


def test_the_same_again_is_counted_and_written_at_most_once_in_five_minutes() -> None:
    async def story(rig: Rig) -> None:
        for _ in range(100):
            rig.say()
            await rig.clock.advance(10)  # 1000 s in all
        (event,) = await rig.events()
        assert event.series is not None
        assert rig.recorder.written == 4
        await rig.clock.advance(SETTINGS.again)
        (event,) = await rig.events()
        assert event.series is not None
        assert event.series.count == 100
        assert event.series.last_observed_time > event.event_time

    run(story)


def test_other_words_are_another_event_at_most_once_a_minute_and_the_newest_wins() -> None:
    async def story(rig: Rig) -> None:
        for i in range(60):
            rig.say(f"{i} addresses are lost")
            await rig.clock.advance(1)
        await rig.clock.advance(60)
        assert await rig.counts() == {"0 addresses are lost": 1, "59 addresses are lost": 1}

    run(story)


def test_a_restart_goes_on_with_the_event_that_is_there() -> None:
    async def story(rig: Rig) -> None:
        rig.say()
        await rig.clock.advance(1)
        await rig.restart()
        rig.say()
        await rig.clock.advance(1)
        assert await rig.counts() == {"no block is left": 2}

    run(story)


def test_an_event_that_ran_out_is_written_anew() -> None:
    async def story(rig: Rig) -> None:
        rig.say()
        await rig.clock.advance(1)
        (event,) = await rig.events()
        await rig.store.delete(KubeEvent, event.key)
        rig.say()
        await rig.clock.advance(SETTINGS.again)
        assert await rig.counts() == {"no block is left": 1}

    run(story)


def test_one_that_somebody_else_changed_is_counted_on() -> None:
    async def story(rig: Rig) -> None:
        rig.say()
        await rig.clock.advance(1)
        other = rig.new()
        other.say(NODE, "PoolExhausted", "no block is left", action="Claim")
        task = asyncio.create_task(other.run())
        await rig.clock.advance(1)
        rig.say()
        await rig.clock.advance(SETTINGS.again)
        task.cancel()
        assert await rig.counts() == {"no block is left": 3}

    run(story)


def test_what_is_said_while_the_store_is_away_is_written_when_it_is_back() -> None:
    async def story(rig: Rig) -> None:
        rig.store.fail_with("it is away")
        rig.say()
        rig.say()
        await rig.clock.advance(100)
        rig.store.fail_with("")
        await rig.clock.advance(60)
        assert await rig.counts() == {"no block is left": 2}
        assert rig.recorder.dropped == 0

    run(story)


def test_while_the_store_is_away_memory_is_bounded_and_the_rest_is_counted_as_dropped() -> None:
    async def story(rig: Rig) -> None:
        rig.store.fail_with("it is away")
        for i in range(100):
            rig.say(reason=f"Reason{i}")
        assert rig.recorder.dropped == 96
        await rig.clock.advance(SETTINGS.keep + 120)
        assert rig.recorder.dropped == 100
        rig.store.fail_with("")
        await rig.clock.advance(120)
        assert await rig.events() == []

    run(story)


def test_what_is_refused_is_dropped_and_holds_up_nothing() -> None:
    async def story(rig: Rig) -> None:
        rig.say(reason="x" * 200)
        rig.say()
        await rig.clock.advance(1)
        assert [e.reason for e in await rig.events()] == ["PoolExhausted"]
        assert (rig.recorder.written, rig.recorder.dropped) == (1, 1)

    run(story)


def test_a_long_note_and_a_long_name_are_cut() -> None:
    async def story(rig: Rig) -> None:
        rig.say("ä" * 2000, regarding=pod_reference(f"shop/{'a' * 199}.{'b' * 53}", "u"))
        await rig.clock.advance(1)
        (event,) = await rig.events()
        assert len(event.note.encode()) <= 1024
        assert event.note.endswith("ä...")

    run(story)


def test_an_end_is_told_as_a_normal_event_beside_the_warning() -> None:
    async def story(rig: Rig) -> None:
        rig.say()
        await rig.clock.advance(1)
        rig.say("over", normal=True)
        await rig.clock.advance(SETTINGS.other)
        assert {(e.type, e.note) for e in await rig.events()} == {("Warning", "no block is left"), ("Normal", "over")}

    run(story)


def test_saying_needs_no_store_and_no_loop() -> None:
    """An ADD says why it failed in the time of a dictionary's update."""
    rig = Rig()
    rig.store.fail_with("it is away")
    rig.say()
    with pytest.raises(Unavailable):
        play(rig.events())


def test_a_store_of_ours_forgets_events_as_the_api_server_does_after_an_hour() -> None:
    async def story(rig: Rig) -> None:
        rig.say("first")
        rig.say("counted", reason="Other")
        await rig.clock.advance(3000)
        rig.say("counted", reason="Other")
        await rig.clock.advance(1000)
        rig.say("new")
        await rig.clock.advance(1)
        assert await rig.counts() == {"counted": 2, "new": 1}

    run(story)


def test_what_is_said_during_a_write_is_told_with_the_next() -> None:
    async def story(rig: Rig) -> None:
        create = rig.store.create

        async def interrupted(obj: KubeEvent) -> KubeEvent:
            rig.store.create = create  # type: ignore[method-assign]
            rig.say()
            return await create(obj)

        rig.store.create = interrupted  # type: ignore[method-assign, assignment]
        rig.say()
        await rig.clock.advance(SETTINGS.again - 1)
        assert await rig.counts() == {"no block is left": 1}
        await rig.clock.advance(2)
        assert await rig.counts() == {"no block is left": 2}

    run(story)
