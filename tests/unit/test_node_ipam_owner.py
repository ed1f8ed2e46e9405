"""Whose a block is (R5): owner and finalizer, marked blocks, Nodes that come and go, blocks that others took."""

from __future__ import annotations

import contextlib
from ipaddress import ip_network
from pathlib import Path

import msgspec
import pytest

from ipam.errors import NotReady
from ipam.ledger import Phase
from ipam.model import Settings
from store.errors import Invalid, NotFound, Problem
from store.model import (
    FINALIZER_OWNER,
    IPAMBlock,
    IPAMBlockSpec,
    IPPool,
    IPPoolSpec,
    Meta,
    Node,
    OwnerReference,
    R,
    block_name,
)
from tests.ipam_fakes import V4, Rig, attachment, play, pool, run, waited

SMALL = pool("small", "10.1.0.0/24", 28)  # 16 blocks of 16
NODE = Node(metadata=Meta(name="node-1"))


async def block(rig: Rig, cidr: str) -> IPAMBlock:
    return await rig.store.get(IPAMBlock, block_name(cidr))


async def owner(rig: Rig) -> tuple[OwnerReference, ...]:
    node = await rig.store.get(Node, rig.node)
    return (OwnerReference(api_version="v1", kind="Node", name=rig.node, uid=node.metadata.uid),)


async def the_only(rig: Rig) -> str:
    """Lets a second pass, and returns the CIDR of the only block."""
    await rig.clock.advance(1)
    (view,) = rig.ipam.blocks()
    return view.cidr


# -- owner and finalizer ---------------------------------------------------------------------------------------------


def test_a_block_names_its_node_as_owner_and_carries_our_finalizer(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        meta = (await block(rig, await the_only(rig))).metadata
        assert meta.owner_references == await owner(rig)
        assert meta.finalizers == (FINALIZER_OWNER,)
        assert meta.labels == {"app.kubernetes.io/managed-by": "underlay-cni"}

    run(tmp_path, test, SMALL, NODE)


def test_a_block_claimed_with_no_node_gets_its_owner_once_there_is_one(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        cidr = await the_only(rig)
        assert (await block(rig, cidr)).metadata.owner_references == ()
        await rig.store.create(NODE)
        await rig.clock.advance(1)
        assert (await block(rig, cidr)).metadata.owner_references == await owner(rig)

    run(tmp_path, test, SMALL)


def test_a_block_of_an_older_release_is_tied_at_the_start_and_others_marks_on_it_stay(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(SMALL, NODE)
        spec = IPAMBlockSpec(cidr="10.1.0.32/28", pool="small", node="node-1")
        foreign = OwnerReference(api_version="v1", kind="ConfigMap", name="x", uid="1")
        meta = Meta(name=block_name(spec.cidr), finalizers=("example.com/hold",), owner_references=(foreign,))
        await rig.store.create(IPAMBlock(metadata=meta, spec=spec))
        await rig.up()
        await rig.clock.advance(1)
        seen = (await block(rig, spec.cidr)).metadata
        assert seen.finalizers == ("example.com/hold", FINALIZER_OWNER)
        assert seen.owner_references == (foreign, *await owner(rig))
        version = (await rig.store.list(IPAMBlock)).version
        await rig.restart()
        await rig.clock.advance(310)
        assert (await block(rig, spec.cidr)).metadata.finalizers == seen.finalizers
        assert int((await rig.store.list(IPAMBlock)).version) - int(version) <= 1, "the restarted writer, once"
        await rig.down()

    play(main())


def test_a_node_that_was_deleted_claims_nothing_until_it_is_back(tmp_path: Path) -> None:
    """Nothing would mark a block without an owner when the machine goes, too."""

    async def test(rig: Rig) -> None:
        cidr = await the_only(rig)
        await rig.store.delete(Node, rig.node)
        await rig.store.delete(IPAMBlock, block_name(cidr))  # as the garbage collector does
        await rig.clock.advance(60)
        assert await rig.own_blocks() == [], "the marked one is gone, and no other came"
        with pytest.raises(NotReady, match="there is no Node node-1, so no block is claimed"):
            await waited(rig, rig.add(1))
        assert await rig.own_blocks() == []
        await rig.store.create(NODE)
        await rig.clock.advance(1)
        assert (await rig.add(1)).addresses
        for found in (await rig.store.list(IPAMBlock)).items:
            assert found.metadata.owner_references == await owner(rig)

    run(tmp_path, test, SMALL, NODE)


def test_a_node_that_is_deleted_unseen_claims_nothing(tmp_path: Path) -> None:
    """The watch has not told yet, and the block needs its owner now."""

    async def test(rig: Rig) -> None:
        await rig.add(1)
        watched = rig.ipam._keeper.see_node
        rig.ipam._keeper.see_node = lambda uid: watched(uid) if uid else None  # type: ignore[method-assign]
        before = await rig.own_blocks()
        await rig.store.delete(Node, rig.node)
        refused = 0
        for number in range(2, 40):
            try:
                await waited(rig, rig.add(number))
            except NotReady as e:
                assert "there is no Node node-1" in str(e)
                refused += 1
        assert refused
        assert await rig.own_blocks() == before

    run(tmp_path, test, SMALL, NODE)


def test_where_a_node_is_needed_none_is_claimed_before_there_is_one(tmp_path: Path) -> None:
    """In Kubernetes: also by a server that was started while its Node was gone."""

    async def main() -> None:
        rig = Rig(tmp_path, settings=Settings(node_needed=True))
        await rig.create(SMALL)
        await rig.up()
        await rig.clock.advance(30)
        assert await rig.own_blocks() == []
        assert rig.ipam.conditions() == ()
        with pytest.raises(NotReady, match="there is no Node node-1"):
            await waited(rig, rig.add(1))
        await rig.store.create(NODE)
        await rig.clock.advance(1)
        assert (await rig.add(1)).addresses
        assert (await block(rig, await the_only(rig))).metadata.owner_references == await owner(rig)
        await rig.down()

    play(main())


def test_a_node_that_is_back_claims_ahead(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        cidr = await the_only(rig)
        await rig.store.delete(Node, rig.node)
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.clock.advance(60)
        await rig.store.create(NODE)
        await rig.clock.advance(1)
        assert await the_only(rig) != ""

    run(tmp_path, test, SMALL, NODE)


# -- marked blocks ---------------------------------------------------------------------------------------------------


def test_a_marked_block_stays_until_its_last_pod_is_gone_and_withdrawn(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        cidr = await the_only(rig)
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.clock.advance(600)
        assert rig.phases()[cidr] is Phase.MARKED
        assert (await rig.mirror())[lease.addresses[0]] == "c1"
        for i in range(20):
            assert (await waited(rig, rig.add(f"n{i}"))).addresses[0] not in _of(cidr)
        rig.delete(1)
        await rig.clock.advance(29)
        assert cidr in await rig.own_blocks(), "the last address still rests"
        rig.agent = False
        rig.kernel.set_blackholes(set(rig.phases()))
        await rig.clock.advance(60)
        assert cidr in await rig.own_blocks(), "it is still announced"
        rig.agent = True
        await rig.clock.advance(4.5)
        assert cidr in await rig.own_blocks()
        await rig.clock.advance(2)
        assert cidr not in await rig.own_blocks()
        assert cidr not in rig.phases()

    run(tmp_path, test, SMALL, NODE)


def _of(cidr: str) -> set[str]:
    return {str(address) for address in ip_network(cidr)}


def test_a_marked_block_with_nobody_in_it_goes_at_once(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        cidr = await the_only(rig)
        old = (await block(rig, cidr)).metadata.uid
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.clock.advance(7)
        with pytest.raises(NotFound):
            await block(rig, cidr)
        (new,) = await rig.own_blocks()  # the pool's next one, claimed ahead
        assert (await block(rig, new)).metadata.uid != old
        assert (await rig.add(1)).addresses

    run(tmp_path, test, SMALL, NODE)


@pytest.mark.parametrize("point", ["block-marked", "block-deleted", "block-created", "mirrored"])
def test_killed_while_a_block_ends_it_ends_all_the_same(tmp_path: Path, point: str) -> None:
    class Killed(BaseException):
        pass

    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(SMALL, NODE)
        await rig.up()
        await rig.add(1)
        cidr = await the_only(rig)
        rig.delete(1)
        await rig.clock.advance(31)
        spec = await rig.store.get(IPPool, "small")
        await rig.store.update(msgspec.structs.replace(spec, spec=msgspec.structs.replace(spec.spec, disabled=True)))

        def step(name: str) -> None:
            if name == point:
                raise Killed

        rig.step = step
        with contextlib.suppress(Killed, BaseExceptionGroup):
            await rig.clock.advance(20)
        rig.step = lambda _: None
        await rig.restart()
        await rig.clock.advance(20)
        assert cidr not in await rig.own_blocks()
        assert rig.ipam.blocks() == ()
        await rig.down()

    play(main())


def test_a_node_deleted_and_made_again_drains_its_old_blocks_and_claims_new_ones(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        old = await the_only(rig)
        await rig.store.delete(Node, "node-1")
        await rig.collect()
        await rig.clock.advance(1)
        assert rig.phases()[old] is Phase.MARKED
        with pytest.raises(NotReady, match="no Node node-1"):  # there is no owner to name
            await waited(rig, rig.add(2))
        assert rig.ipam.lease(attachment(1)) == lease
        await rig.store.create(NODE)
        await rig.clock.advance(1)
        other = await rig.add(2)
        await rig.collect()
        (new,) = (view.cidr for view in rig.ipam.blocks() if view.cidr != old)
        assert other.addresses[0] in _of(new)
        assert (await block(rig, new)).metadata.owner_references == await owner(rig)
        assert not (await block(rig, new)).metadata.deletion_timestamp
        rig.delete(1)
        await rig.clock.advance(50)
        assert await rig.own_blocks() == [new]

    run(tmp_path, test, SMALL, NODE)


def test_a_marked_block_is_known_after_a_restart_and_after_a_boot(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        old = await the_only(rig)
        await rig.store.delete(IPAMBlock, block_name(old))
        await rig.restart()
        assert rig.phases()[old] is Phase.MARKED
        assert (await waited(rig, rig.add(2))).addresses[0] not in _of(old)
        assert rig.ipam.lease(attachment(1)) == lease
        await rig.reboot()
        await rig.clock.advance(8)
        assert old not in await rig.own_blocks(), "its pods died with the machine"

    run(tmp_path, test, SMALL, NODE)


def test_a_block_that_others_hold_by_a_finalizer_is_let_go_of_and_forgotten(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        cidr = await the_only(rig)
        seen = await block(rig, cidr)
        held = msgspec.structs.replace(seen.metadata, finalizers=(*seen.metadata.finalizers, "example.com/hold"))
        await rig.store.update(msgspec.structs.replace(seen, metadata=held))
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.clock.advance(8)
        assert (await block(rig, cidr)).metadata.finalizers == ("example.com/hold",)
        assert cidr not in rig.phases()
        await rig.restart()
        await rig.clock.advance(310)
        assert cidr not in rig.phases()

    run(tmp_path, test, SMALL, NODE)


# -- blocks that somebody else took ------------------------------------------------------------------------------------


async def steal(rig: Rig, cidr: str, name: str = "small") -> None:
    await rig.wipe(cidr)
    spec = IPAMBlockSpec(cidr=cidr, pool=name, node="node-2")
    await rig.store.create(IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=spec))


def test_what_lives_in_a_block_of_another_node_is_a_problem_until_it_is_gone(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.add(1)
        cidr = await the_only(rig)
        assert rig.ipam.problem(attachment(1)) == ""
        await steal(rig, cidr)
        await rig.clock.advance(6)
        assert rig.phases()[cidr] is Phase.LOST
        assert "belongs to node node-2 by now" in rig.ipam.problem(attachment(1))
        await waited(rig, rig.add(2))
        assert rig.ipam.problem(attachment(2)) == ""
        assert [c.type for c in rig.ipam.conditions()] == ["BlockLost"]
        await rig.restart()
        assert "belongs to node node-2 by now" in rig.ipam.problem(attachment(1))
        assert rig.phases()[cidr] is Phase.LOST
        rig.delete(1)
        await rig.clock.advance(6)
        assert rig.ipam.conditions() == ()
        assert cidr not in rig.phases()

    run(tmp_path, test, SMALL, NODE)


def test_a_lost_block_is_taken_back_when_the_other_has_left_it(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        cidr = await the_only(rig)
        await steal(rig, cidr)
        await rig.clock.advance(6)
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.clock.advance(301)
        assert (await block(rig, cidr)).spec.node == "node-1"
        assert rig.ipam.problem(attachment(1)) == ""
        assert rig.ipam.conditions() == ()
        assert (await rig.mirror())[lease.addresses[0]] == "c1"

    run(tmp_path, test, SMALL, NODE)


def test_a_pool_made_again_with_another_size_disturbs_nobody(tmp_path: Path) -> None:
    """A block of the old size that is lost then cannot be made again: that is said, and nothing else stands still."""

    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        cidr = await the_only(rig)
        await rig.store.delete(IPPool, "small")
        await rig.store.create(IPPool(metadata=Meta(name="small"), spec=IPPoolSpec(cidr="10.1.0.0/24", block_size=29)))
        await rig.clock.advance(1)
        assert rig.ipam.lease(attachment(1)) == lease
        await rig.wipe(cidr)
        await rig.clock.advance(1)
        assert rig.phases()[cidr] is Phase.LOST
        assert "cannot be created again" in rig.ipam.problem(attachment(1))
        other = await waited(rig, rig.add(2))
        assert other.addresses[0] not in _of(cidr)

    run(tmp_path, test, SMALL, NODE)


def test_what_lives_in_a_block_that_no_store_takes_any_more_is_said_until_it_is_taken_again(tmp_path: Path) -> None:
    """Not only in the moment of the start: by a policy, say, that a block of another pool stands in the way of."""

    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        cidr = await the_only(rig)
        await rig.down()
        await rig.wipe(cidr)
        create, refusing = rig.memory.create, True

        async def refuse(obj: R) -> R:
            if isinstance(obj, IPAMBlock) and obj.spec.cidr == cidr and refusing:
                raise Invalid(f"IPAMBlock {obj.name}", [Problem("spec.cidr", cidr, "it overlaps another")])
            return await create(obj)

        rig.memory.create = refuse  # type: ignore[method-assign]
        await rig.up()
        for _ in range(4):
            condition = next(c for c in rig.ipam.conditions() if c.type == "BlockLost")
            assert f"block {cidr} was deleted, cannot be created again" in condition.message
            assert f"{lease.addresses[0]} (default/p1) of it live here: delete those pods" in condition.message
            assert rig.ipam.problem(attachment(1)) == condition.message
            await rig.clock.advance(10)
        refusing = False
        await rig.clock.advance(20)
        assert rig.ipam.conditions() == ()
        assert rig.ipam.problem(attachment(1)) == ""
        assert (await rig.mirror())[lease.addresses[0]] == "c1"

    run(tmp_path, test, SMALL, NODE)


@pytest.mark.parametrize("back", [True, False])
def test_what_lives_in_no_pool_is_said_until_there_is_one_or_it_is_gone(tmp_path: Path, back: bool) -> None:
    async def test(rig: Rig) -> None:
        leases = [await rig.add(i) for i in range(5)]
        cidr = await the_only(rig)
        await rig.down()
        await rig.wipe(cidr)
        await rig.store.delete(IPPool, "small")
        await rig.up()
        (condition,) = rig.ipam.conditions()
        assert condition.type == "BlockLost"
        named = ", ".join(f"{lease.addresses[0]} (default/p{i})" for i, lease in enumerate(leases[:3]))
        assert condition.message.startswith(f"{named} and 2 more, in no IPPool, live here")
        assert all("create that pool again" in rig.ipam.problem(attachment(i)) for i in range(5))
        assert await rig.own_blocks() == []
        if back:
            await rig.store.create(SMALL)
            await rig.clock.advance(20)
            assert sorted(await rig.mirror()) == sorted(lease.addresses[0] for lease in leases)
        else:
            for i in range(5):
                rig.delete(i)
            await rig.clock.advance(10)
        assert rig.ipam.conditions() == ()

    run(tmp_path, test, SMALL, NODE)


def test_a_mirror_restored_from_a_backup_is_written_again_within_5_minutes(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.clock.advance(1)
        (view,) = rig.ipam.blocks()
        before = await block(rig, view.cidr)
        await rig.add(1)
        await rig.clock.advance(1)
        rig.memory._objects[IPAMBlock][block_name(view.cidr)] = before  # no event tells of it
        assert await rig.mirror() == {}
        await rig.clock.advance(301)
        assert set((await rig.mirror()).values()) == {"c1"}

    run(tmp_path, test, V4, NODE)
