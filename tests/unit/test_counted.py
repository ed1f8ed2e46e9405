"""A store that counts: it changes nothing, and knows an answer from none."""

from __future__ import annotations

import contextlib

import pytest

from store.counted import CountedStore
from store.errors import AlreadyExists, NotFound, Unavailable
from store.memory import MemoryStore
from store.model import IPPool
from tests.ipam_fakes import V4, FakeClock, play


def test_requests_are_counted_by_verb_and_a_no_is_an_answer() -> None:
    async def story() -> None:
        store = CountedStore(MemoryStore(FakeClock()))
        made = await store.create(V4)
        with pytest.raises(AlreadyExists):
            await store.create(V4)
        assert await store.get(IPPool, "v4") == made
        assert (await store.list(IPPool, where={"metadata.name": "v4"})).items == (made,)
        assert await store.update(made) == made
        await store.delete(IPPool, "v4", uid=made.metadata.uid)
        with pytest.raises(NotFound):
            await store.get(IPPool, "v4")
        assert store.requests == {"create": 2, "get": 2, "list": 1, "update": 1, "delete": 1}
        assert store.failures == {}

    play(story())


def test_no_answer_is_a_failure() -> None:
    async def story() -> None:
        memory = MemoryStore(FakeClock())
        store = CountedStore(memory)
        async with contextlib.aclosing(store.watch(IPPool)) as events:
            event = await anext(events)
            assert event.type == "synced"
            memory.fail_with("it is away")
            with pytest.raises(Unavailable):
                await anext(events)
        with pytest.raises(Unavailable):
            await store.list(IPPool)
        assert store.requests == {"watch": 1, "list": 1}
        assert store.failures == {"watch": 1, "list": 1}

    play(story())


def test_a_watch_that_is_closed_closes_the_one_below() -> None:
    closed = []

    class Memory(MemoryStore):
        async def watch(self, *args, **more):  # type: ignore[no-untyped-def, override]
            try:
                async for event in super().watch(*args, **more):
                    yield event
            finally:
                closed.append(True)

    async def story() -> None:
        async with contextlib.aclosing(CountedStore(Memory(FakeClock())).watch(IPPool)) as events:
            await anext(events)
        assert closed == [True]

    play(story())
