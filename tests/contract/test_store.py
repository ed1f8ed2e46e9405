"""What every store promises, said once and held against each backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

import store.sqlite
from store.base import Event, Store, mutate
from store.clock import SystemClock
from store.errors import AlreadyExists, Conflict, Expired, Invalid, NotFound, Unavailable
from store.local import BATCH
from store.memory import MemoryStore
from store.model import (
    LABEL_SERVICE,
    BGPConfiguration,
    BGPConfigurationSpec,
    Endpoint,
    EndpointConditions,
    EndpointSlice,
    EventSeries,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    KubeEvent,
    Meta,
    Namespace,
    Node,
    NodeAddress,
    NodeStatus,
    ObjectReference,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Resource,
    Secret,
    block_name,
)
from store.open import open_store
from store.sqlite import SqliteStore

Test = Callable[[Store], Awaitable[None]]
Run = Callable[[Test], None]
Plant = Callable[[Store, Pod], Awaitable[Pod]]

#: Small, so that a test can outrun it.
HISTORY = 40


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    if request.param == "memory":
        return lambda: MemoryStore(SystemClock(), history=HISTORY)
    return lambda: SqliteStore(tmp_path / "store.db", SystemClock(), history=HISTORY)


@pytest.fixture
def run(make: Callable[[], Store]) -> Iterator[Run]:
    def run(test: Test) -> None:
        async def main() -> None:
            store = make()
            try:
                async with asyncio.timeout(60):
                    await test(store)
            finally:
                await store.close()

        asyncio.run(main())

    yield run


@pytest.fixture
def plant() -> Plant:
    """Creates a pod; an API server wants more of one than we read, and has to be asked otherwise."""
    return lambda store, pod: store.create(pod)


def pool(name: str, cidr: str, **spec: Any) -> IPPool:
    return IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr, **spec))


def block(cidr: str, node: str = "node-1", **meta: Any) -> IPAMBlock:
    return IPAMBlock(
        metadata=Meta(name=block_name(cidr), **meta), spec=IPAMBlockSpec(cidr=cidr, pool="pool", node=node)
    )


def changed(obj: Any, **spec: Any) -> Any:
    return msgspec.structs.replace(obj, spec=msgspec.structs.replace(obj.spec, **spec))


def remade(obj: Any, **meta: Any) -> Any:
    return msgspec.structs.replace(obj, metadata=msgspec.structs.replace(obj.metadata, **meta))


def with_status(obj: Any, status: Any) -> Any:
    return msgspec.structs.replace(obj, status=status)


async def take(events: AsyncGenerator[Event[Any], None], count: int) -> list[tuple[str, str]]:
    async with asyncio.timeout(60):
        found = [await anext(events) for _ in range(count)]
    return [(e.type, e.object.name if e.object is not None else "") for e in found]


async def silent(events: AsyncGenerator[Event[Any], None], store: Store, sentinel: Resource) -> None:
    """Nothing is pending: the next thing that the watch tells is the sentinel, created now."""
    await store.create(sentinel)
    assert await take(events, 1) == [("added", sentinel.name)]


# -- reading and writing ------------------------------------------------------------------------------------------


def test_create_stamps_and_get_returns_the_same(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(pool("a", "10.0.0.0/16", block_size=28))
        assert made.metadata.uid
        assert made.metadata.resource_version
        assert made.metadata.generation == 1
        assert made.metadata.creation_timestamp.endswith("Z")
        assert made.spec.block_size == 28
        assert await store.get(IPPool, "a") == made

    run(test)


def test_create_drops_status_and_the_stamps_that_an_object_brings(run: Run) -> None:
    async def test(store: Store) -> None:
        wanted = with_status(block("10.0.0.0/26"), IPAMBlockStatus(used=3))
        made = await store.create(remade(wanted, uid="mine", generation=9, deletion_timestamp="2000-01-01T00:00:00Z"))
        assert made.status == IPAMBlockStatus()
        assert made.metadata.uid != "mine"
        assert (made.metadata.generation, made.metadata.deletion_timestamp) == (1, "")

    run(test)


def test_create_refuses_a_taken_name_a_version_and_what_is_invalid(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(pool("a", "10.0.0.0/16"))
        with pytest.raises(AlreadyExists, match="IPPool a"):
            await store.create(pool("a", "10.1.0.0/16"))
        with pytest.raises(Invalid, match="resourceVersion"):
            await store.create(remade(pool("b", "10.1.0.0/16"), resource_version="1"))
        with pytest.raises(Invalid, match=r"spec\.cidr"):
            await store.create(pool("b", "10.1.0.1/16"))
        assert (await store.list(IPPool)).items == (made,)

    run(test)


def test_a_field_of_the_wrong_type_is_refused_before_it_is_stored(run: Run) -> None:
    async def test(store: Store) -> None:
        with pytest.raises(Invalid, match="blockSize"):
            await store.create(pool("a", "10.0.0.0/16", block_size="26"))
        assert (await store.list(IPPool)).items == ()

    run(test)


def test_overlapping_pools_are_refused(run: Run) -> None:
    async def test(store: Store) -> None:
        await store.create(pool("a", "10.0.0.0/16"))
        for cidr in ("10.0.128.0/17", "10.0.0.0/16", "10.0.0.0/8"):
            with pytest.raises(Invalid, match="overlaps IPPool a"):
                await store.create(pool("b", cidr))
        await store.create(pool("b", "10.1.0.0/16"))
        await store.create(pool("c", "fd00::/48"))

    run(test)


def test_a_block_is_one_of_its_pools(run: Run) -> None:
    async def test(store: Store) -> None:
        await store.create(pool("pool", "10.0.0.0/16", block_size=26))
        await store.create(block("10.0.0.64/26"))
        with pytest.raises(Invalid, match="not inside its pool"):
            await store.create(block("10.1.0.0/26"))
        with pytest.raises(Invalid, match="are /26"):
            await store.create(block("10.0.1.0/28"))

    run(test)


def test_list_is_ordered_and_selects(run: Run) -> None:
    async def test(store: Store) -> None:
        for cidr, node in (("10.0.0.64/26", "node-2"), ("10.0.0.0/26", "node-1"), ("10.0.0.128/26", "node-1")):
            await store.create(block(cidr, node))
        names = [b.name for b in (await store.list(IPAMBlock)).items]
        assert names == sorted(names)
        assert len(names) == 3
        mine = (await store.list(IPAMBlock, where={"spec.node": "node-1"})).items
        assert [b.spec.cidr for b in mine] == ["10.0.0.0/26", "10.0.0.128/26"]
        (one,) = (await store.list(IPAMBlock, where={"metadata.name": "10-0-0-64-26", "spec.node": "node-2"})).items
        assert one.spec.node == "node-2"
        with pytest.raises(Invalid, match=r"spec\.cidr"):
            await store.list(IPAMBlock, where={"spec.cidr": "10.0.0.0/26"})

    run(test)


def test_an_empty_field_selects_the_objects_that_lack_it(run: Run) -> None:
    async def test(store: Store) -> None:
        bare, whole = block("10.0.0.0/26"), block("10.0.16.0/26")
        await store.create(bare)
        await store.create(
            msgspec.structs.replace(whole, spec=msgspec.structs.replace(whole.spec, within="10.0.16.0/20"))
        )
        for within, expected in (("", "10.0.0.0/26"), ("10.0.16.0/20", "10.0.16.0/26")):
            (one,) = (await store.list(IPAMBlock, where={"spec.within": within})).items
            assert one.spec.cidr == expected

    run(test)


def test_what_is_not_there_is_not_found(run: Run) -> None:
    async def test(store: Store) -> None:
        with pytest.raises(NotFound, match="IPPool a"):
            await store.get(IPPool, "a")
        with pytest.raises(NotFound):
            await store.delete(IPPool, "a")
        made = await store.create(pool("a", "10.0.0.0/16"))
        await store.delete(IPPool, "a")
        with pytest.raises(NotFound):
            await store.update(made)
        with pytest.raises(NotFound):
            await store.get(IPPool, "a")

    run(test)


def test_kinds_do_not_share_names(run: Run) -> None:
    async def test(store: Store) -> None:
        await store.create(pool("default", "10.0.0.0/16"))
        await store.create(BGPConfiguration(metadata=Meta(name="default"), spec=BGPConfigurationSpec(as_number=65001)))
        await store.delete(IPPool, "default")
        assert (await store.get(BGPConfiguration, "default")).spec.as_number == 65001

    run(test)


# -- concurrency --------------------------------------------------------------------------------------------------


def test_update_needs_the_version_that_it_was_decided_on(run: Run) -> None:
    async def test(store: Store) -> None:
        first = await store.create(pool("a", "10.0.0.0/16"))
        with pytest.raises(Invalid, match="resourceVersion"):
            await store.update(remade(first, resource_version=""))
        second = await store.update(changed(first, disabled=True))
        assert second.metadata.resource_version != first.metadata.resource_version
        with pytest.raises(Conflict, match="IPPool a"):
            await store.update(changed(first, node_selector="has(rack)"))
        with pytest.raises(Conflict, match="uid"):
            await store.update(remade(second, uid="another"))
        assert await store.get(IPPool, "a") == second

    run(test)


def test_update_of_an_object_that_was_made_again_conflicts(run: Run) -> None:
    async def test(store: Store) -> None:
        old = await store.create(pool("a", "10.0.0.0/16"))
        await store.delete(IPPool, "a")
        await store.create(pool("a", "10.0.0.0/16"))
        with pytest.raises(Conflict):
            await store.update(changed(old, disabled=True))

    run(test)


def test_update_leaves_status_and_update_status_leaves_the_rest(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(Node(metadata=Meta(name="node-1", labels={"rack": "r1"})))
        status = NodeStatus(addresses=(NodeAddress(type="InternalIP", address="10.0.0.1"),))
        reported = await store.update_status(remade(with_status(made, status), labels={"rack": "r2"}))
        assert reported.status == status
        assert reported.metadata.labels == {"rack": "r1"}
        assert reported.metadata.generation == 1
        labelled = await store.update(remade(with_status(reported, NodeStatus()), labels={"rack": "r3"}))
        assert labelled.status == status
        assert labelled.metadata.labels == {"rack": "r3"}
        assert labelled.metadata.generation == 1
        cordoned = await store.update(changed(labelled, unschedulable=True))
        assert cordoned.metadata.generation == 2
        assert await store.get(Node, "node-1") == cordoned

    run(test)


def test_a_kind_without_status_has_none_to_update(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(pool("a", "10.0.0.0/16"))
        with pytest.raises(Invalid, match="no status"):
            await store.update_status(made)

    run(test)


def test_an_equal_update_changes_nothing(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block("10.0.0.0/26"))
        async with aclosing(store.watch(IPAMBlock)) as events:
            assert await take(events, 2) == [("added", made.name), ("synced", "")]
            assert await store.update(made) == made
            assert await store.update_status(made) == made
            assert (await store.list(IPAMBlock)).version == made.metadata.resource_version
            await silent(events, store, block("10.0.0.64/26"))

    run(test)


def test_immutable_fields_stay(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(pool("pool", "10.0.0.0/16"))
        for change in ({"cidr": "10.0.0.0/17"}, {"block_size": 27}):
            with pytest.raises(Invalid, match="as long as the pool lives"):
                await store.update(changed(made, **change))
        claimed = await store.create(block("10.0.0.0/26"))
        with pytest.raises(Invalid, match="as long as the block lives"):
            await store.update(changed(claimed, node="node-2"))
        assert await store.get(IPPool, "pool") == made
        assert await store.get(IPAMBlock, claimed.name) == claimed

    run(test)


def test_mutate_reads_again_until_its_change_is_in(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block("10.0.0.0/26"))

        async def count() -> None:
            def one_more(b: IPAMBlock) -> IPAMBlock:
                return with_status(b, msgspec.structs.replace(b.status, used=b.status.used + 1))

            await mutate(store, IPAMBlock, made.name, one_more, status=True)

        await asyncio.gather(*(count() for _ in range(10)))
        assert (await store.get(IPAMBlock, made.name)).status.used == 10
        same = await mutate(store, IPAMBlock, made.name, lambda _: None)
        assert same.status.used == 10

    run(test)


def test_one_of_many_creates_wins(run: Run) -> None:
    async def test(store: Store) -> None:
        results = await asyncio.gather(
            *(store.create(block("10.0.0.0/26", f"node-{i}")) for i in range(8)), return_exceptions=True
        )
        winners = [r for r in results if isinstance(r, IPAMBlock)]
        assert len(winners) == 1
        assert all(isinstance(r, AlreadyExists) for r in results if r is not winners[0])
        assert await store.get(IPAMBlock, "10-0-0-0-26") == winners[0]

    run(test)


# -- deleting -----------------------------------------------------------------------------------------------------


def test_delete_holds_to_its_preconditions(run: Run) -> None:
    async def test(store: Store) -> None:
        first = await store.create(pool("a", "10.0.0.0/16"))
        second = await store.update(changed(first, disabled=True))
        with pytest.raises(Conflict):
            await store.delete(IPPool, "a", resource_version=first.metadata.resource_version)
        with pytest.raises(Conflict):
            await store.delete(IPPool, "a", uid="another")
        assert await store.get(IPPool, "a") == second
        await store.delete(IPPool, "a", uid=second.metadata.uid, resource_version=second.metadata.resource_version)
        assert (await store.list(IPPool)).items == ()

    run(test)


def test_an_object_with_finalizers_is_marked_and_goes_with_the_last(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block("10.0.0.0/26", finalizers=("underlay.network/owner", "example.org/other")))
        async with aclosing(store.watch(IPAMBlock)) as events:
            await take(events, 2)
            await store.delete(IPAMBlock, made.name)
            marked = await store.get(IPAMBlock, made.name)
            assert marked.metadata.deletion_timestamp
            assert marked.metadata.generation == 2
            with pytest.raises(AlreadyExists):
                await store.create(block("10.0.0.0/26"))
            await store.delete(IPAMBlock, made.name)
            assert await store.get(IPAMBlock, made.name) == marked
            with pytest.raises(Invalid, match="being deleted"):
                await store.update(remade(marked, finalizers=(*marked.metadata.finalizers, "example.org/late")))
            written = await store.update_status(with_status(marked, IPAMBlockStatus(used=1)))
            fewer = await store.update(remade(written, finalizers=("underlay.network/owner",), deletion_timestamp=""))
            assert fewer.metadata.deletion_timestamp == marked.metadata.deletion_timestamp
            await store.update(remade(fewer, finalizers=()))
            with pytest.raises(NotFound):
                await store.get(IPAMBlock, made.name)
            await store.create(block("10.0.0.0/26"))
            kinds = [kind for kind, _ in await take(events, 5)]
            assert kinds == ["modified", "modified", "modified", "deleted", "added"]

    run(test)


def test_removing_the_last_finalizer_of_an_unmarked_object_keeps_it(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block("10.0.0.0/26", finalizers=("underlay.network/owner",)))
        kept = await store.update(remade(made, finalizers=()))
        assert await store.get(IPAMBlock, made.name) == kept

    run(test)


# -- watching -----------------------------------------------------------------------------------------------------


def test_watch_tells_the_present_and_then_every_change_in_order(run: Run) -> None:
    async def test(store: Store) -> None:
        one = await store.create(pool("one", "10.1.0.0/16"))
        await store.create(pool("two", "10.2.0.0/16"))
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 3) == [("added", "one"), ("added", "two"), ("synced", "")]
            await store.create(BGPConfiguration(metadata=Meta(name="default")))
            one = await store.update(changed(one, disabled=True))
            await store.update(changed(one, disabled=False))
            await store.create(pool("three", "10.3.0.0/16"))
            await store.delete(IPPool, "one")
            assert await take(events, 4) == [
                ("modified", "one"),
                ("modified", "one"),
                ("added", "three"),
                ("deleted", "one"),
            ]
            await silent(events, store, pool("four", "10.4.0.0/16"))

    run(test)


def test_an_event_carries_the_object_and_its_version(run: Run) -> None:
    async def test(store: Store) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert (await anext(events)).type == "synced"
            made = await store.create(pool("a", "10.0.0.0/16"))
            event = await anext(events)
            assert event == Event("added", made, made.metadata.resource_version)
            await store.delete(IPPool, "a")
            event = await anext(events)
            assert (event.type, event.object and event.object.spec) == ("deleted", made.spec)
            assert int(event.version) > int(made.metadata.resource_version)

    run(test)


def test_watch_wakes_up_while_it_waits(run: Run) -> None:
    async def test(store: Store) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            await take(events, 1)
            waiting = asyncio.create_task(take(events, 1))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await store.create(pool("a", "10.0.0.0/16"))
            async with asyncio.timeout(60):
                assert await waiting == [("added", "a")]

    run(test)


def test_watch_resumes_after_any_event(run: Run) -> None:
    async def test(store: Store) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            versions = [(await anext(events)).version]
            for i in range(5):
                await store.create(pool(f"p{i}", f"10.{i}.0.0/16"))
                versions.append((await anext(events)).version)
        for i, version in enumerate(versions[:-1]):
            async with aclosing(store.watch(IPPool, since=version)) as resumed:
                assert await take(resumed, 5 - i) == [("added", f"p{n}") for n in range(i, 5)]

    run(test)


def test_a_list_version_can_be_watched_from(run: Run) -> None:
    async def test(store: Store) -> None:
        await store.create(pool("a", "10.0.0.0/16"))
        listing = await store.list(IPPool)
        await store.create(pool("b", "10.1.0.0/16"))
        async with aclosing(store.watch(IPPool, since=listing.version)) as events:
            assert await take(events, 1) == [("added", "b")]

    run(test)


def test_an_event_of_the_initial_state_cannot_be_resumed_half_way(run: Run) -> None:
    async def test(store: Store) -> None:
        await store.create(pool("a", "10.0.0.0/16"))
        await store.create(pool("b", "10.1.0.0/16"))
        async with aclosing(store.watch(IPPool)) as events:
            first = await anext(events)
        async with aclosing(store.watch(IPPool, since=first.version)) as events:
            assert await take(events, 3) == [("added", "a"), ("added", "b"), ("synced", "")]

    run(test)


@pytest.mark.parametrize("version", ["99999999999999", "nonsense", "-1"])
def test_a_version_that_is_not_of_this_store_is_expired(run: Run, version: str) -> None:
    async def test(store: Store) -> None:
        await store.create(pool("a", "10.0.0.0/16"))
        with pytest.raises(Expired):
            await anext(store.watch(IPPool, since=version))

    run(test)


def test_a_version_that_is_too_old_is_expired(run: Run) -> None:
    async def test(store: Store) -> None:
        old = (await store.list(IPPool)).version
        made = await store.create(block("10.0.0.0/26"))
        for used in range(HISTORY - 1):
            made = await store.update_status(with_status(made, IPAMBlockStatus(used=used + 1)))
        async with aclosing(store.watch(IPAMBlock, since=old)) as events:
            assert len(await take(events, HISTORY)) == HISTORY
        await store.update_status(with_status(made, IPAMBlockStatus()))
        with pytest.raises(Expired):
            await anext(store.watch(IPAMBlock, since=old))

    run(test)


def test_a_slow_watcher_falls_out_and_an_idle_one_does_not(run: Run) -> None:
    async def test(store: Store) -> None:
        async with aclosing(store.watch(IPAMBlock)) as slow, aclosing(store.watch(IPPool)) as idle:
            await take(slow, 1)
            await take(idle, 1)
            waiting = asyncio.create_task(take(idle, 1))
            made = await store.create(block("10.0.0.0/26"))
            for used in range(HISTORY + 5):
                made = await store.update_status(with_status(made, IPAMBlockStatus(used=used + 1)))
                await asyncio.sleep(0)
            with pytest.raises(Expired):
                await take(slow, 1)
            await store.create(pool("a", "10.9.0.0/16"))
            assert await waiting == [("added", "a")]

    run(test)


def test_watch_selects(run: Run) -> None:
    async def test(store: Store) -> None:
        await store.create(block("10.0.0.0/26", "node-1"))
        await store.create(block("10.0.0.64/26", "node-2"))
        async with aclosing(store.watch(IPAMBlock, where={"spec.node": "node-1"})) as events:
            assert await take(events, 2) == [("added", "10-0-0-0-26"), ("synced", "")]
            await store.create(block("10.0.0.128/26", "node-2"))
            await store.delete(IPAMBlock, "10-0-0-64-26")
            await store.delete(IPAMBlock, "10-0-0-0-26")
            assert await take(events, 1) == [("deleted", "10-0-0-0-26")]
            await silent(events, store, block("10.0.0.192/26", "node-1"))
        with pytest.raises(Invalid):
            await anext(store.watch(IPAMBlock, where={"status.used": "1"}))
        with pytest.raises(Invalid):
            await anext(store.watch(IPAMBlock, since="1", where={"status.used": "1"}))

    run(test)


@pytest.mark.parametrize("backend", ["memory", "sqlite"])
def test_a_watch_that_is_far_behind_catches_up_without_being_woken(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.sqlite, "LOOK_EVERY", 600.0)
    count = BATCH * 2 + 10

    async def main() -> None:
        ours: Store = MemoryStore(SystemClock())
        if backend == "sqlite":
            ours = SqliteStore(tmp_path / "store.db", SystemClock())
        async with aclosing(ours.watch(IPAMBlock)) as events:
            await take(events, 1)
            for i in range(count):
                await ours.create(block(f"10.{i // 256}.{i % 256}.0/26"))
            # One look finds BATCH of them; the rest must come without another write.
            assert len(await take(events, count)) == count
        await ours.close()

    asyncio.run(main())


def test_watchers_do_not_disturb_each_other(run: Run) -> None:
    async def test(store: Store) -> None:
        watches = [store.watch(IPPool) for _ in range(10)]
        for watch in watches:
            await take(watch, 1)
        waiting = [asyncio.create_task(take(watch, 20)) for watch in watches]
        waiting[0].cancel()
        for i in range(20):
            await store.create(pool(f"p{i:02}", f"10.{i}.0.0/16"))
            await asyncio.sleep(0)
        wanted = [("added", f"p{i:02}") for i in range(20)]
        assert await asyncio.gather(*waiting[1:]) == [wanted] * 9
        for watch in watches:
            await watch.aclose()

    run(test)


def test_a_closed_store_says_so_to_calls_and_watches(run: Run) -> None:
    async def test(store: Store) -> None:
        events = store.watch(IPPool)
        await take(events, 1)
        waiting = asyncio.create_task(take(events, 1))
        await asyncio.sleep(0.01)
        await store.close()
        with pytest.raises(Unavailable, match="closed"):
            async with asyncio.timeout(60):
                await waiting
        with pytest.raises(Unavailable, match="closed"):
            await store.get(IPPool, "a")
        await store.close()

    run(test)


# -- namespaces ---------------------------------------------------------------------------------------------------


def endpoints(namespace: str, name: str, *addresses: str, **meta: Any) -> EndpointSlice:
    return EndpointSlice(
        metadata=Meta(name=name, namespace=namespace, labels={LABEL_SERVICE: "web"}, **meta),
        address_type="IPv4",
        endpoints=tuple(
            Endpoint(addresses=(a,), node_name="node-1", conditions=EndpointConditions(ready=i == 0))
            for i, a in enumerate(addresses)
        ),
    )


def pod(namespace: str, name: str, node: str = "node-1", **spec: Any) -> Pod:
    return Pod(metadata=Meta(name=name, namespace=namespace), spec=PodSpec(node_name=node, **spec))


async def make_namespaces(store: Store) -> None:
    for name in ("bank", "shop"):
        await store.create(Namespace(metadata=Meta(name=name, annotations={"example.org/of": name})))


def test_one_name_in_two_namespaces_is_two_objects(run: Run) -> None:
    async def test(store: Store) -> None:
        await make_namespaces(store)
        ours = await store.create(endpoints("shop", "web", "10.0.0.1", "10.0.0.2"))
        theirs = await store.create(endpoints("bank", "web"))
        assert (ours.key, ours.metadata.generation) == ("shop/web", 1)
        assert await store.get(EndpointSlice, "shop/web") == ours
        assert await store.get(EndpointSlice, "bank/web") == theirs
        assert [e.conditions.ready for e in ours.endpoints] == [True, False]
        with pytest.raises(AlreadyExists, match="EndpointSlice shop/web"):
            await store.create(endpoints("shop", "web"))
        with pytest.raises(NotFound, match="EndpointSlice shop/api"):
            await store.get(EndpointSlice, "shop/api")
        relabelled = await mutate(store, EndpointSlice, "shop/web", lambda e: remade(e, labels={"a": "b"}))
        assert (relabelled.metadata.labels, relabelled.endpoints) == ({"a": "b"}, ours.endpoints)
        await store.delete(EndpointSlice, "shop/web", uid=ours.metadata.uid)
        with pytest.raises(NotFound):
            await store.delete(EndpointSlice, "shop/web")
        assert await store.get(EndpointSlice, "bank/web") == theirs

    run(test)


def test_a_key_has_a_namespace_where_the_kind_has_them_and_none_elsewhere(run: Run) -> None:
    async def test(store: Store) -> None:
        for key in ("web", "/web", "shop/", "a/shop/web", ""):
            with pytest.raises(Invalid, match="write namespace/name: a EndpointSlice lives in a namespace"):
                await store.get(EndpointSlice, key)
            with pytest.raises(Invalid, match="write namespace/name"):
                await store.delete(EndpointSlice, key)
        for key in ("shop/a", ""):
            with pytest.raises(Invalid, match="write the name alone: a IPPool belongs to the whole cluster"):
                await store.get(IPPool, key)
            with pytest.raises(Invalid, match="write the name alone"):
                await store.delete(IPPool, key)
        with pytest.raises(Invalid, match=r"metadata\.namespace: '': say in which namespace"):
            await store.create(endpoints("", "web"))
        with pytest.raises(Invalid, match=r"metadata\.namespace: 'shop': leave it out"):
            await store.create(remade(pool("a", "10.0.0.0/16"), namespace="shop"))

    run(test)


def test_list_and_watch_select_a_namespace(run: Run) -> None:
    async def test(store: Store) -> None:
        await make_namespaces(store)
        for namespace, name in (("shop", "b"), ("shop", "a"), ("bank", "c")):
            await store.create(endpoints(namespace, name))
        every = [e.key for e in (await store.list(EndpointSlice)).items if e.metadata.namespace != "default"]
        assert every == ["bank/c", "shop/a", "shop/b"]
        where = {"metadata.namespace": "shop"}
        listing = await store.list(EndpointSlice, where=where)
        assert [e.key for e in listing.items] == ["shop/a", "shop/b"]
        (one,) = (await store.list(EndpointSlice, where={**where, "metadata.name": "b"})).items
        assert one.key == "shop/b"
        for nowhere in ("street", ""):
            assert (await store.list(EndpointSlice, where={"metadata.namespace": nowhere})).items == ()
        with pytest.raises(Invalid, match=r"metadata\.namespace"):
            await store.list(IPPool, where=where)
        async with (
            aclosing(store.watch(EndpointSlice, where=where)) as fresh,
            aclosing(store.watch(EndpointSlice, where=where, since=listing.version)) as resumed,
        ):
            assert await take(fresh, 3) == [("added", "a"), ("added", "b"), ("synced", "")]
            await store.create(endpoints("bank", "d"))
            await store.delete(EndpointSlice, "bank/c")
            await store.delete(EndpointSlice, "shop/a")
            for events in (fresh, resumed):
                assert await take(events, 1) == [("deleted", "a")]
            await silent(fresh, store, endpoints("shop", "e"))

    run(test)


def test_the_pods_of_a_node_can_be_listed_and_watched(run: Run, plant: Plant) -> None:
    async def test(store: Store) -> None:
        await make_namespaces(store)
        mine = await plant(store, pod("shop", "web", host_network=True))
        await plant(store, pod("bank", "web", node="node-2"))
        await plant(store, pod("bank", "late", node=""))
        where = {"spec.nodeName": "node-1"}
        assert (await store.list(Pod, where=where)).items == (mine,)
        assert mine.spec == PodSpec(node_name="node-1", host_network=True)
        (none,) = (await store.list(Pod, where={"spec.nodeName": ""})).items
        assert none.key == "bank/late"
        async with aclosing(store.watch(Pod, where=where)) as events:
            assert await take(events, 2) == [("added", "web"), ("synced", "")]
            status = PodStatus(phase="Running", pod_ip="10.0.0.1", pod_ips=(PodIP(ip="10.0.0.1"), PodIP(ip="fd00::1")))
            running = await store.update_status(with_status(mine, status))
            assert running.status == status
            assert await anext(events) == Event("modified", running, running.metadata.resource_version)
            await plant(store, pod("shop", "two", node="node-2"))
            await plant(store, pod("shop", "one"))
            assert await take(events, 1) == [("added", "one")]
        with pytest.raises(Invalid, match=r"status\.podIP"):
            await store.list(Pod, where={"status.podIP": "10.0.0.1"})

    run(test)


def test_a_secret_is_read_by_name_only_and_never_shown(run: Run) -> None:
    async def test(store: Store) -> None:
        await make_namespaces(store)
        made = await store.create(
            Secret(
                metadata=Meta(name="tor", namespace="shop", annotations={"example.org/copy": "hunter2"}),
                data={"password": b"hunter2\xff"},
            )
        )
        assert made.data == {"password": b"hunter2\xff"}
        assert await store.get(Secret, "shop/tor") == made
        for wrong in (None, {"metadata.namespace": "shop"}, {"metadata.name": "tor"}, {"metadata.namespace": ""}):
            with pytest.raises(Invalid, match="secrets are read one by one, never all together"):
                await store.list(Secret, where=wrong)
            with pytest.raises(Invalid, match="read one by one"):
                await anext(store.watch(Secret, where=wrong))
        where = {"metadata.namespace": "shop", "metadata.name": "tor"}
        assert (await store.list(Secret, where=where)).items == (made,)
        async with aclosing(store.watch(Secret, where=where)) as events:
            assert await take(events, 2) == [("added", "tor"), ("synced", "")]
            await store.create(Secret(metadata=Meta(name="other", namespace="shop")))
            changed = await store.update(msgspec.structs.replace(made, data={"password": b"swordfish"}))
            event = await anext(events)
            assert event == Event("modified", changed, changed.metadata.resource_version)
        wrong_type: Any = msgspec.structs.replace(changed, data={"password": "hunter2!"})
        with pytest.raises(Invalid) as refused:
            await store.update(wrong_type)
        shown = f"{made!r} {made} {event!r} {refused.value} {refused.value.problems}"
        assert "tor" in shown
        assert not any(word in shown for word in ("hunter2", "swordfish", "aHVudGVyMv8=", "c3dvcmRmaXNo"))

    run(test)


def test_an_event_is_said_once_and_then_only_counted(run: Run) -> None:
    async def test(store: Store) -> None:
        await make_namespaces(store)
        wanted = KubeEvent(
            metadata=Meta(name="web.1", namespace="shop"),
            event_time="2026-01-01T00:00:00.000000Z",
            reporting_controller="underlay.network/cni",
            reporting_instance="node-1",
            action="Add",
            reason="NoAddress",
            regarding=ObjectReference(kind="Pod", namespace="shop", name="web"),
            note="no pool has a free address",
            type="Warning",
        )
        made = await store.create(wanted)
        assert made == remade(
            wanted,
            uid=made.metadata.uid,
            resource_version=made.metadata.resource_version,
            creation_timestamp=made.metadata.creation_timestamp,
            generation=made.metadata.generation,
        )
        series = EventSeries(count=2, last_observed_time="2026-01-01T00:01:00.000000Z")
        again = await store.update(msgspec.structs.replace(made, series=series))
        assert (await store.get(KubeEvent, "shop/web.1")).series == again.series == series
        for change in ({"note": "other"}, {"reason": "Other"}, {"type": "Normal"}):
            with pytest.raises(Invalid):
                await store.update(msgspec.structs.replace(again, **change))
        for wrong in (
            {"event_time": ""},
            {"reporting_controller": ""},
            {"reporting_instance": ""},
            {"action": ""},
            {"reason": "x" * 129},
            {"note": "x" * 1025},
            {"type": "Bad"},
            {"series": EventSeries(count=1, last_observed_time="2026-01-01T00:01:00.000000Z")},
            {"regarding": ObjectReference(kind="Node", name="node-1")},
        ):
            with pytest.raises(Invalid):
                await store.create(msgspec.structs.replace(remade(wanted, name="wrong"), **wrong))

    run(test)


# -- URLs ---------------------------------------------------------------------------------------------------------


def test_open_store_by_url(tmp_path: Path) -> None:
    async def main() -> None:
        for url in ("memory:", f"sqlite:{tmp_path}/store.db"):
            store = open_store(url, clock=SystemClock())
            await store.create(pool("a", "10.0.0.0/16"))
            await store.close()
        again = open_store(f"sqlite:{tmp_path}/store.db", clock=SystemClock())
        assert (await again.get(IPPool, "a")).spec.cidr == "10.0.0.0/16"
        await again.close()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["", "sqlite:", "memory:x", "/path/store.db", "etcd://host", "sqlite"])
def test_open_store_refuses_another_url(url: str) -> None:
    with pytest.raises(Unavailable, match="write sqlite:"):
        open_store(url, clock=SystemClock())
