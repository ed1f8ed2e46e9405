from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest

from store.base import Event, Store
from store.clock import SystemClock
from store.errors import Expired, Invalid
from store.informer import BACKOFF, Informer
from store.memory import MemoryStore
from store.model import IPAMBlock, IPAMBlockSpec, IPPool, IPPoolSpec, Meta, Pod, R, block_name


class QuickClock(SystemClock):
    """Sleeps no time, and remembers for how long it was asked to."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._more = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._more.set()
        await asyncio.sleep(0)

    async def has_slept(self, times: int) -> None:
        while len(self.slept) < times:
            self._more.clear()
            await self._more.wait()


class Watched(MemoryStore):
    """Remembers where each watch began, can end the running ones without an error (as an API server's time limit does),
    and can have the next ones expire."""

    def __init__(self) -> None:
        super().__init__(SystemClock())
        self.since: list[str | None] = []
        self.expire = 0
        self._end = asyncio.Event()

    def end_watches(self) -> None:
        self._end.set()
        self._end = asyncio.Event()

    async def watch(
        self, kind: type[R], *, since: str | None = None, where: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Event[R], None]:
        self.since.append(since)
        if self.expire:
            self.expire -= 1
            raise Expired("told to")
        events = super().watch(kind, since=since, where=where)
        end = self._end
        ending = asyncio.ensure_future(end.wait())
        coming = asyncio.ensure_future(anext(events))
        try:
            while True:
                await asyncio.wait((coming, ending), return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    return
                event = coming.result()
                coming = asyncio.ensure_future(anext(events))
                yield event
        finally:
            ending.cancel()
            coming.cancel()
            await asyncio.gather(ending, coming, return_exceptions=True)
            await events.aclose()


def pool(i: int, **spec: Any) -> IPPool:
    return IPPool(metadata=Meta(name=f"p{i}"), spec=IPPoolSpec(cidr=f"10.{i}.0.0/16", **spec))


def disabled(obj: IPPool, value: bool = True) -> IPPool:
    return msgspec.structs.replace(obj, spec=msgspec.structs.replace(obj.spec, disabled=value))


@asynccontextmanager
async def running(informer: Informer[Any]) -> AsyncIterator[Informer[Any]]:
    task = asyncio.create_task(informer.run())
    try:
        async with asyncio.timeout(60):
            yield informer
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(informer: Informer[Any], names: set[str]) -> None:
    while set(informer.items) != names or not informer.synced:
        await informer.changed(informer.generation)


async def until_error(informer: Informer[Any], there: bool) -> None:
    while bool(informer.error) is not there:
        await informer.changed(informer.generation)


def of(store: Store, clock: SystemClock | None = None, **options: Any) -> Informer[IPPool]:
    return Informer(store, IPPool, clock or QuickClock(), rng=random.Random(1), **options)


def test_it_lists_and_then_follows() -> None:
    async def main() -> None:
        store = MemoryStore(SystemClock())
        one = await store.create(pool(1))
        async with running(of(store)) as informer:
            assert (informer.synced, dict(informer.items)) == (False, {})
            await until(informer, {"p1"})
            await store.create(pool(2))
            await until(informer, {"p1", "p2"})
            changed = await store.update(disabled(one))
            await informer.changed(informer.generation)
            assert informer.items["p1"] == changed
            await store.delete(IPPool, "p1")
            await until(informer, {"p2"})
            assert informer.error == ""

    asyncio.run(main())


def test_it_keeps_objects_of_one_name_apart_by_their_namespaces() -> None:
    async def main() -> None:
        store = MemoryStore(SystemClock())
        for namespace in ("bank", "shop"):
            await store.create(Pod(metadata=Meta(name="web", namespace=namespace)))
        informer = Informer(store, Pod, QuickClock(), rng=random.Random(1))
        async with running(informer):
            await until(informer, {"bank/web", "shop/web"})
            await store.create(Pod(metadata=Meta(name="api", namespace="shop")))
            await until(informer, {"bank/web", "shop/web", "shop/api"})
            await store.delete(Pod, "bank/web")
            await until(informer, {"shop/web", "shop/api"})

    asyncio.run(main())


def test_it_shows_nothing_before_it_has_seen_everything() -> None:
    async def main() -> None:
        store = MemoryStore(SystemClock())
        for i in range(5):
            await store.create(pool(i))
        seen: list[tuple[bool, int]] = []
        informer = of(store, on_change=lambda: seen.append((informer.synced, len(informer.items))))
        async with running(informer):
            await until(informer, {f"p{i}" for i in range(5)})
        assert seen == [(True, 5)]

    asyncio.run(main())


def test_an_empty_store_is_synced_too() -> None:
    async def main() -> None:
        async with running(of(MemoryStore(SystemClock()))) as informer:
            await until(informer, set())

    asyncio.run(main())


def test_what_was_loaded_is_followed_without_another_reading() -> None:
    async def main() -> None:
        store, told = Watched(), []
        await store.create(pool(1))
        informer = of(store, on_change=lambda: told.append(1))
        await informer.load()
        assert (set(informer.items), informer.synced, told) == ({"p1"}, True, [])
        await store.create(pool(2))
        await store.delete(IPPool, "p1")
        async with running(informer):
            await until(informer, {"p2"})
        assert store.since == [None]

    asyncio.run(main())


def test_what_was_loaded_twice_is_followed_from_the_second_time() -> None:
    async def main() -> None:
        store = Watched()
        informer = of(store)
        await informer.load()
        store.expire = 1
        with pytest.raises(Expired):
            await informer.load()
        await store.create(pool(1))
        await informer.load()
        assert set(informer.items) == {"p1"}
        async with running(informer):
            await store.create(pool(2))
            await until(informer, {"p1", "p2"})
        assert store.since == [None] * 3

    asyncio.run(main())


def test_a_watch_that_ends_is_resumed_where_it_ended() -> None:
    async def main() -> None:
        store = Watched()
        async with running(of(store)) as informer:
            await until(informer, set())
            last = (await store.create(pool(1))).metadata.resource_version
            await until(informer, {"p1"})
            store.end_watches()
            await store.create(pool(2))
            await until(informer, {"p1", "p2"})
            assert store.since[:2] == [None, last]

    asyncio.run(main())


def test_a_watch_that_only_ends_is_not_begun_again_in_a_hurry() -> None:
    class Empty(MemoryStore):
        watches = 0

        async def watch(self, kind: Any, *, since: Any = None, where: Any = None) -> Any:
            self.watches += 1
            return
            yield

    async def main() -> None:
        store, clock = Empty(SystemClock()), QuickClock()
        async with running(of(store, clock)):
            await clock.has_slept(12)
        assert store.watches <= len(clock.slept) + 1
        assert all(s <= BACKOFF[1] for s in clock.slept)
        assert sum(clock.slept) > BACKOFF[1]

    asyncio.run(main())


def test_after_expired_it_reads_again_and_drops_only_what_is_gone() -> None:
    async def main() -> None:
        store = Watched()
        one = await store.create(pool(1))
        await store.create(pool(2))
        shown: list[frozenset[str]] = []
        informer = of(store, on_change=lambda: shown.append(frozenset(informer.items)))
        async with running(informer):
            await until(informer, {"p1", "p2"})
            shown.clear()
            # What happens from here on the watch does not hear of.
            store.expire = 1
            store.end_watches()
            await store.delete(IPPool, "p2")
            await store.update(disabled(one))
            await store.create(pool(3))
            await until(informer, {"p1", "p3"})
            assert informer.items["p1"].spec.disabled
            assert all("p1" in names for names in shown)
            assert store.since[-1] is None
            assert informer.error == ""

    asyncio.run(main())


def test_a_state_that_is_too_old_as_soon_as_it_is_read_is_not_read_in_a_hurry() -> None:
    """As of an API server that runs on when its etcd was put back: lists are of now, watches begin later."""

    class PutBack(MemoryStore):
        lists = 0

        async def watch(self, kind: Any, *, since: Any = None, where: Any = None) -> Any:
            self.lists += 1
            yield Event("added", pool(1), "")
            yield Event("synced", None, "5")
            raise Expired("version 5 is too old")

    async def main() -> None:
        store, clock = PutBack(SystemClock()), QuickClock()
        async with running(of(store, clock)) as informer:
            await clock.has_slept(12)
            assert set(informer.items) == {"p1"}
        assert store.lists <= len(clock.slept) + 1
        assert all(s <= BACKOFF[1] for s in clock.slept)
        assert sum(clock.slept) > BACKOFF[1]

    asyncio.run(main())


def test_a_history_that_ran_away_is_read_again() -> None:
    async def main() -> None:
        store = MemoryStore(SystemClock(), history=3)
        async with running(of(store)) as informer:
            await until(informer, set())
            for i in range(20):  # no turn for the informer in between
                await store.create(pool(i))
            await until(informer, {f"p{i}" for i in range(20)})

    asyncio.run(main())


def test_an_outage_keeps_the_last_state_and_says_why() -> None:
    async def main() -> None:
        store, clock = MemoryStore(SystemClock()), QuickClock()
        await store.create(pool(1))
        await store.create(pool(2))
        async with running(of(store, clock)) as informer:
            await until(informer, {"p1", "p2"})
            store.fail_with("the API server is being upgraded")
            await until_error(informer, True)
            assert informer.error == "ippools: the API server is being upgraded"
            assert (informer.synced, set(informer.items)) == (True, {"p1", "p2"})
            assert informer.behind > 0
            generation = informer.generation
            await clock.has_slept(15)
            assert informer.generation == generation, "the same error is no news"
            assert set(informer.items) == {"p1", "p2"}
            store.fail_with("")
            await store.delete(IPPool, "p1")
            await until_error(informer, False)
            await until(informer, {"p2"})
            assert informer.behind == 0

    asyncio.run(main())


def test_it_backs_off_with_jitter_to_a_limit_and_begins_anew_after_success() -> None:
    async def main() -> None:
        store, clock = MemoryStore(SystemClock()), QuickClock()
        store.fail_with("away")
        async with running(of(store, clock)) as informer:
            await clock.has_slept(12)
            bounds = [min(BACKOFF[0] * 2**i, BACKOFF[1]) for i in range(12)]
            for slept, bound in zip(clock.slept, bounds, strict=False):
                assert bound / 2 <= slept <= bound
            assert len({s / b for s, b in zip(clock.slept, bounds, strict=False)}) > 6
            assert not informer.synced
            assert informer.behind > 0
            store.fail_with("")
            await until(informer, set())
            assert informer.behind == 0
            clock.slept.clear()
            store.fail_with("away again")
            await until_error(informer, True)
            await clock.has_slept(1)
            assert clock.slept[0] <= BACKOFF[0]

    asyncio.run(main())


def test_it_follows_only_what_it_was_asked_for() -> None:
    def block(cidr: str, node: str) -> IPAMBlock:
        return IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=IPAMBlockSpec(cidr=cidr, pool="p", node=node))

    async def main() -> None:
        store = MemoryStore(SystemClock())
        await store.create(block("10.0.0.0/26", "node-1"))
        informer: Informer[IPAMBlock] = Informer(store, IPAMBlock, QuickClock(), {"spec.node": "node-1"})
        async with running(informer):
            await store.create(block("10.0.0.64/26", "node-2"))
            await store.create(block("10.0.0.128/26", "node-1"))
            await until(informer, {"10-0-0-0-26", "10-0-0-128-26"})

    asyncio.run(main())


def test_a_wrong_selection_ends_it() -> None:
    async def main() -> None:
        with pytest.raises(Invalid, match="select by"):
            await Informer(MemoryStore(SystemClock()), IPPool, QuickClock(), {"spec.cidr": "x"}).run()

    asyncio.run(main())


def test_none_of_many_waiters_misses_a_change() -> None:
    async def main() -> None:
        store = MemoryStore(SystemClock())
        async with running(of(store)) as informer:
            await until(informer, set())

            async def count(turns: int) -> int:
                """Looks up whenever there is news, and is away for a while in between."""
                seen = informer.generation
                while len(informer.items) < 30:
                    seen = await informer.changed(seen)
                    for _ in range(turns):
                        await asyncio.sleep(0)
                return len(informer.items)

            waiters = [asyncio.create_task(count(turns)) for turns in range(6)]
            await asyncio.sleep(0)
            for i in range(30):
                await store.create(pool(i))
                await asyncio.sleep(0)
            assert await asyncio.gather(*waiters) == [30] * 6

    asyncio.run(main())


def test_items_cannot_be_written() -> None:
    async def main() -> None:
        async with running(of(MemoryStore(SystemClock()))) as informer:
            with pytest.raises(TypeError):
                informer.items["p1"] = pool(1)  # type: ignore[index]

    asyncio.run(main())
