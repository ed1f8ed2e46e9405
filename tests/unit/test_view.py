"""The agent's view of the store: complete or not at all, local, and on disk for the day the store is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent import lastgood
from agent.plan import Cluster
from agent.status import StatusWriter
from agent.view import View
from store.base import Store
from store.clock import Clock, SystemClock
from store.errors import Unavailable
from store.memory import MemoryStore
from store.model import (
    ANNOTATION_ASN,
    BGPConfiguration,
    BGPFilter,
    BGPNodeStatus,
    BGPNodeStatusStatus,
    BGPPassword,
    BGPPeer,
    IPPool,
    Meta,
    Node,
    OwnerReference,
    Secret,
    SecretKeyRef,
)
from tests.agent_fakes import bgp_filter, bgp_peer, block, configuration, node, of_node, pool


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(bounded())


@asynccontextmanager
async def viewing(store: Store, path: Path, patience: float = 5.0, clock: Clock | None = None) -> AsyncIterator[View]:
    view = View(store, "node-1", clock or SystemClock(), path, lambda: None, patience=patience)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(view.run())
        try:
            yield view
        finally:
            running.cancel()


async def until(view: View, probe: Callable[[Cluster], object]) -> Cluster:
    while True:
        found = view.cluster()
        if found is not None and probe(found):
            return found
        await asyncio.sleep(0.01)


async def filled(mesh: bool = False) -> MemoryStore:
    store = MemoryStore(SystemClock())
    for obj in (node(), node("node-2", "10.0.9.9"), pool("10.244.0.0/16", "pool"), bgp_peer("tor", "10.0.1.0")):
        await store.create(obj)
    await store.create(configuration(node_to_node_mesh_enabled=mesh))
    await store.create(block("10.244.1.0/26"))
    foreign = block("10.244.2.0/26")
    await store.create(replace(foreign, spec=replace(foreign.spec, node="node-2")))
    return store


def test_it_sees_what_is_this_node_s_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled()
        async with viewing(store, tmp_path / "snapshot.json") as view:
            seen = await until(view, lambda c: True)
            assert seen.node is not None
            assert seen.node.name == "node-1"
            assert [b.spec.cidr for b in seen.blocks] == ["10.244.1.0/26"]
            assert seen.nodes == ()
            assert seen.live

    run(main())


def test_other_nodes_are_watched_while_the_mesh_is_on(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled(mesh=True)
        async with viewing(store, tmp_path / "snapshot.json") as view:
            assert [n.name for n in (await until(view, lambda c: True)).nodes] == ["node-2"]
            await store.create(node("node-3", "10.0.9.8"))
            await until(view, lambda c: len(c.nodes) == 2)
            current = await store.get(type(configuration()), "default")
            await store.update(replace(current, spec=configuration().spec))
            await until(view, lambda c: c.nodes == ())

    run(main())


def test_a_block_that_another_node_took_is_seen_by_asking(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled()
        async with viewing(store, tmp_path / "snapshot.json") as view:
            await until(view, lambda c: True)
            view.question(frozenset({"10.244.2.0/26", "10.244.3.0/26"}))
            assert (await until(view, lambda c: c.taken)).taken == {"10.244.2.0/26"}

    run(main())


class Away(MemoryStore):
    """A store that nobody reaches."""

    async def watch(self, *_: object, **__: object):  # type: ignore[no-untyped-def, override]
        raise Unavailable("away")
        yield


def test_without_the_store_it_starts_from_disk_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"

    async def main() -> None:
        async with viewing(await filled(), path) as view:
            before = await until(view, lambda c: path.exists())
        async with viewing(Away(SystemClock()), path, patience=0.05) as view:
            after = await until(view, lambda c: True)
        assert not after.live
        assert (after.node, after.peers, after.pools) == (before.node, before.peers, before.pools)
        assert [b.spec for b in after.blocks] == [b.spec for b in before.blocks]

    run(main())


@pytest.mark.parametrize("spoil", [lambda t: t[:-9], lambda t: t.replace(b"10.244.1.0", b"10.244.7.0"), lambda t: b""])
def test_a_spoilt_file_is_not_believed_and_stays(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "snapshot.json"
    lastgood.save(path, [block("10.244.1.0/26"), node()])
    assert lastgood.load(path) == (block("10.244.1.0/26"), node())
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    with pytest.raises(lastgood.Unreadable, match=r"snapshot\.json"):
        lastgood.load(path)
    assert path.read_bytes() == spoilt

    async def main() -> None:
        async with viewing(Away(SystemClock()), path, patience=0.05) as view:
            await asyncio.sleep(0.3)  # nothing is to come of it
            assert view.cluster() is None

    run(main())


class Later(SystemClock):
    """Time passes when a test says so, too."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.passed


def test_a_pool_that_was_deleted_stands_as_long_as_something_lives_in_it(tmp_path: Path) -> None:
    """Its pods live on: with the pool, the routes to them would go on all nodes."""
    path, clock = tmp_path / "snapshot.json", Later()

    async def main() -> None:
        store = await filled()
        async with viewing(store, path, clock=clock) as view:
            before = await until(view, lambda c: c.pools)
            assert before.deleted_pools == frozenset()
            await store.delete(IPPool, "pool")
            after = await until(view, lambda c: c.deleted_pools)
            assert (after.pools, after.deleted_pools, after.standing) == (before.pools, {"pool"}, {})
            view.inhabit(frozenset({"pool"}))
            after = await until(view, lambda c: c.standing)
            assert after.standing == {"IPPool pool": "it was deleted, and pods live in it"}
            await until(view, lambda c: [o for o in lastgood.load(path) if isinstance(o, IPPool)] == [*before.pools])
        # Another agent takes over; and what is in the pool ends.
        async with viewing(store, path, clock=clock) as view:
            assert (await until(view, lambda c: True)).pools == before.pools
            for passed, pools in ((3000, {"pool"}), (3000, set()), (500, set())):
                clock.passed += passed
                view.inhabit(frozenset(pools))
                assert (await until(view, lambda c: True)).pools == before.pools, "a node may be cut off"
            assert (await until(view, lambda c: True)).standing == {}
            clock.passed += 200
            view.inhabit(frozenset())
            after = await until(view, lambda c: not c.pools)
            assert after.deleted_pools == frozenset()
            await until(view, lambda c: not [o for o in lastgood.load(path) if isinstance(o, IPPool)])
        async with viewing(store, path, clock=clock) as view:
            assert (await until(view, lambda c: True)).pools == ()

    run(main())


def test_a_pool_that_is_made_again_is_no_deleted_one(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled()
        async with viewing(store, tmp_path / "snapshot.json") as view:
            await until(view, lambda c: c.pools)
            await store.delete(IPPool, "pool")
            await until(view, lambda c: c.deleted_pools)
            view.inhabit(frozenset({"pool"}))
            again = await store.create(pool("10.244.0.0/16", "pool", disabled=True))
            after = await until(view, lambda c: not c.deleted_pools)
            assert (after.pools, after.standing) == ((again,), {})

    run(main())


class Quick(SystemClock):
    """Nobody waits long."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


def test_a_view_that_cannot_be_kept_is_kept_once_it_can_and_that_is_told(tmp_path: Path) -> None:
    """A disk that was full for a moment: nothing else changes in the store."""
    path = tmp_path / "gone" / "snapshot.json"

    async def main() -> None:
        async with viewing(await filled(), path, clock=Quick()) as view:
            await until(view, lambda c: True)
            await asyncio.sleep(0.1)
            assert view.last_good() == (None, False)
            path.parent.mkdir()
            await until(view, lambda c: view.last_good()[1])
            age, _ = view.last_good()
            assert age is not None
            assert age < 5

    run(main())


def test_how_well_each_kind_is_followed_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled(mesh=True)
        async with viewing(store, tmp_path / "snapshot.json", clock=Quick()) as view:
            await until(view, lambda c: True)
            told = {f.kind: f for f in view.followed()}
            kinds = {
                "bgpconfigurations",
                "bgpfilters",
                "bgpnodestatuses",
                "bgppeers",
                "ipamblocks",
                "ippools",
                "nodes",
                "own_node",
                "secrets",
            }
            assert told.keys() == kinds
            assert all(f.synced and f.behind == 0 for f in told.values())
            store.fail_with("away")
            await until(view, lambda c: any(f.behind > 0.05 for f in view.followed()))
            store.fail_with("")
            await until(view, lambda c: all(f.behind == 0 for f in view.followed()))

    run(main())


def test_no_file_is_no_view(tmp_path: Path) -> None:
    assert lastgood.load(tmp_path / "none") == ()


def test_an_object_that_became_unusable_stands_as_it_last_could_be(tmp_path: Path) -> None:
    """R13. A store refuses it; one that grew lax, or another version's object, must not take a session down."""
    view = View(MemoryStore(SystemClock()), "node-1", SystemClock(), tmp_path / "s", lambda: None)
    good, bad = bgp_peer("tor", "10.0.1.0"), bgp_peer("tor", "nonsense")
    standing: dict[str, str] = {}
    assert list(view._sane([good], standing)) == [good]
    assert standing == {}
    assert list(view._sane([bad], standing)) == [good]
    assert "spec.peerIP" in standing.pop("BGPPeer tor")
    never = bgp_peer("other", "nonsense")
    assert list(view._sane([never], standing)) == [never], "the plan names it"
    assert standing == {}


def test_a_deleted_filter_stands_as_long_as_a_peer_names_it_also_after_a_restart(tmp_path: Path) -> None:
    """R13: to fall back to no filter would let in, or announce, what the filter was there to keep away."""

    async def main() -> None:
        store, path = await filled(), tmp_path / "snapshot.json"
        deny, peer = bgp_filter("deny"), bgp_peer("filtered", "10.0.2.0", filters=("deny",))
        await store.create(deny)
        stored = await store.create(peer)
        async with viewing(store, path) as view:
            assert [f.name for f in (await until(view, lambda c: c.filters)).filters] == ["deny"]
            await store.delete(BGPFilter, "deny")
            after = await until(view, lambda c: c.standing)
            assert [f.spec for f in after.filters] == [deny.spec]
            assert after.standing == {"BGPFilter deny": "it was deleted, and a BGPPeer names it"}
            await until(view, lambda _: "deny" in path.read_text())
        async with viewing(store, path) as view:
            again = await until(view, lambda c: c.live)
            assert [f.spec for f in again.filters] == [deny.spec]
            # A peer that asks for another one that is not there goes on as it last could be.
            worse = replace(stored, spec=replace(stored.spec, filters=("deny", "typo")))
            stored = await store.update(worse)
            after = await until(view, lambda c: "BGPPeer filtered" in c.standing)
            assert "typo" in after.standing["BGPPeer filtered"]
            assert next(p for p in after.peers if p.name == "filtered").spec.filters == ("deny",)
            await store.create(bgp_filter("typo"))
            after = await until(view, lambda c: "BGPPeer filtered" not in c.standing)
            assert next(p for p in after.peers if p.name == "filtered").spec.filters == ("deny", "typo")
            # Once nobody names it, it is gone for good.
            stored = await store.update(replace(stored, spec=replace(stored.spec, filters=())))
            after = await until(view, lambda c: not c.standing)
            assert [f.name for f in after.filters] == ["typo"]

    run(main())


def test_a_deleted_node_stands_until_it_is_there_again_also_after_a_restart(tmp_path: Path) -> None:
    """R13, R5: its blocks are to be withdrawn, so it must still be known who the node is to its peers."""

    async def main() -> None:
        store, path = await filled(), tmp_path / "snapshot.json"
        async with viewing(store, path) as view:
            before = await until(view, lambda c: c.node)
            await store.delete(Node, "node-1")
            after = await until(view, lambda c: c.standing)
            assert after.node == before.node
            assert after.standing == {"Node node-1": "it was deleted"}
            await until(view, lambda _: path.exists())
        async with viewing(store, path) as view:
            again = await until(view, lambda c: c.live)
            assert again.node is not None
            assert before.node is not None
            assert again.node.status == before.node.status
            await store.create(node(asn="65123"))
            new = await until(view, lambda c: not c.standing)
            assert new.node is not None
            assert new.node.metadata.annotations[ANNOTATION_ASN] == "65123"

    run(main())


def test_a_password_is_followed_by_name_and_kept_on_no_disk(tmp_path: Path) -> None:
    async def main() -> None:
        store, path = await filled(), tmp_path / "snapshot.json"
        ref = BGPPassword(secret_key_ref=SecretKeyRef(name="tor", key="password"))
        await store.create(bgp_peer("secured", "10.0.2.0", password=ref))
        async with viewing(store, path) as view:
            assert (await until(view, lambda c: c.live)).secrets == ()
            place = Meta(name="tor", namespace="underlay-system")
            stored = await store.create(Secret(metadata=place, data={"password": b"hunter2"}))
            found = await until(view, lambda c: c.secrets)
            assert [s.data for s in found.secrets] == [{"password": b"hunter2"}]
            await store.update(replace(stored, data={"password": b"hunter3"}))
            await until(view, lambda c: [s.data for s in c.secrets] == [{"password": b"hunter3"}])
            await store.delete(Secret, "underlay-system/tor")
            await until(view, lambda c: not c.secrets)
            await until(view, lambda _: path.exists() and "secured" in path.read_text())
            assert "hunter" not in path.read_text()
            await store.create(Secret(metadata=place, data={"password": b"hunter4"}))
            await until(view, lambda c: c.secrets)
            peer = await store.get(BGPPeer, "secured")
            await store.update(replace(peer, spec=replace(peer.spec, password=None)))
            await until(view, lambda c: not c.secrets)

    run(main())


def test_other_nodes_are_followed_without_mesh_while_a_peer_selects_among_them(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled(mesh=False)
        async with viewing(store, tmp_path / "s") as view:
            assert (await until(view, lambda c: c.live)).nodes == ()
            await store.create(bgp_peer("rack", "", as_number=0, peer_selector="all()"))
            found = await until(view, lambda c: c.nodes)
            assert [n.name for n in found.nodes] == ["node-2"]
            await store.delete(BGPPeer, "rack")
            await until(view, lambda c: not c.nodes)

    run(main())


def test_configurations_of_nodes_are_told_apart_and_the_mesh_password_is_followed(tmp_path: Path) -> None:
    async def main() -> None:
        store, path = await filled(), tmp_path / "snapshot.json"
        await store.create(of_node("node-2", listen_port=1179))
        default = await store.get(BGPConfiguration, "default")
        ref = BGPPassword(secret_key_ref=SecretKeyRef(name="mesh", key="k"))
        await store.update(replace(default, spec=replace(default.spec, node_mesh_password=ref)))
        await store.create(Secret(metadata=Meta(name="mesh", namespace="underlay-system"), data={"k": b"hunter2"}))
        async with viewing(store, path) as view:
            found = await until(view, lambda c: c.secrets)
            assert found.configuration is not None
            assert found.configuration.name == "default"
            assert [c.name for c in found.node_configurations] == ["node.node-2"]
            await until(view, lambda _: path.exists() and "1179" in path.read_text())
        kept = lastgood.load(path)
        assert {o.name for o in kept if isinstance(o, BGPConfiguration)} == {"default", "node.node-2"}

    run(main())


async def told(store: Store, as_number: int) -> BGPNodeStatus:
    """The first status with this AS number."""
    async for event in store.watch(BGPNodeStatus):
        if event.object is not None and event.object.status.as_number == as_number:
            return event.object
    raise AssertionError("the watch ended")


async def written(writer: StatusWriter) -> None:
    """It has come to an end with what was offered."""
    while True:
        if writer.written:
            return
        await asyncio.sleep(0.01)


def test_status_is_written_once_and_only_when_it_differs(tmp_path: Path) -> None:
    async def main() -> None:
        store = await filled()
        writer = StatusWriter(store, "node-1", SystemClock())
        writer.own("1")
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(writer.run())
            writer.offer(BGPNodeStatusStatus(as_number=1))
            writer.offer(BGPNodeStatusStatus(as_number=2))
            first = await told(store, 2)
            writer.offer(BGPNodeStatusStatus(as_number=2))
            writer.offer(BGPNodeStatusStatus(as_number=3))
            last = await told(store, 3)
            assert last.metadata.uid == first.metadata.uid
            store.fail_with("away")
            writer.offer(BGPNodeStatusStatus(as_number=4))
            while True:
                if writer.failed:
                    break
                await asyncio.sleep(0.01)
            assert (writer.written, writer.failed) == (2, 1)
            running.cancel()

    run(main())


def test_a_status_has_its_node_for_owner_and_none_is_made_without_one() -> None:
    """Kubernetes deletes what has an owner with it, and what names one that is not there at once."""

    async def owner_is(store: Store, uid: str) -> BGPNodeStatus:
        async for event in store.watch(BGPNodeStatus):
            if event.type == "deleted" or event.object is None:
                continue
            if [(o.kind, o.name, o.uid) for o in event.object.metadata.owner_references] == [("Node", "node-1", uid)]:
                return event.object
        raise AssertionError("the watch ended")

    async def main() -> None:
        store = MemoryStore(SystemClock())
        writer = StatusWriter(store, "node-1", SystemClock())
        said = BGPNodeStatusStatus(as_number=1)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(writer.run())
            writer.offer(said)
            await written(writer)
            assert (await store.list(BGPNodeStatus)).items == ()
            writer.own("1")
            assert (await told(store, 1)).metadata.owner_references != ()
            first = await owner_is(store, "1")
            writer.own("")
            writer.own("2")
            second = await owner_is(store, "2")
            assert (second.metadata.uid, second.status) == (first.metadata.uid, said)
            # The garbage collector was faster.
            await store.delete(BGPNodeStatus, "node-1")
            writer.own("3")
            assert (await owner_is(store, "3")).metadata.uid != first.metadata.uid
            assert (await told(store, 1)).status == said
            running.cancel()

    run(main())


def test_a_status_of_an_older_release_gets_its_owner_and_keeps_the_others() -> None:
    async def main() -> None:
        store = MemoryStore(SystemClock())
        other = OwnerReference(api_version="v1", kind="ConfigMap", name="x", uid="7")
        await store.create(BGPNodeStatus(metadata=Meta(name="node-1", owner_references=(other,))))
        writer = StatusWriter(store, "node-1", SystemClock())
        writer.own("1")
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(writer.run())
            await written(writer)
            running.cancel()
        meta = (await store.get(BGPNodeStatus, "node-1")).metadata
        assert [o.name for o in meta.owner_references] == ["x", "node-1"]

    run(main())
