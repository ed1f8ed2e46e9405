"""Which blocks a node may claim: what overlaps (R1), what dead owners left behind (R5), how many at most."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.block import Block
from ipam.errors import Exhausted
from ipam.node import Settings
from store.base import Event, mutate
from store.errors import Unavailable
from store.memory import MemoryStore
from store.model import (
    FINALIZER_OWNER,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMConfiguration,
    IPAMConfigurationSpec,
    IPPool,
    IPPoolSpec,
    Meta,
    Node,
    R,
    block_name,
    within_of,
)
from store.validate import validate
from tests.ipam_fakes import FakeClock, Rig, play, pool, run, waited

TWO = pool("two", "10.1.0.0/27", 28)  # 2 blocks of 16


async def left_behind(rig: Rig, cidr: str, node: str = "dead", *finalizers: str) -> None:
    """A block of another node, marked for deletion."""
    meta = Meta(name=block_name(cidr), finalizers=finalizers or (FINALIZER_OWNER,))
    spec = IPAMBlockSpec(cidr=cidr, pool="two", node=node, within=within_of(cidr))
    await rig.store.create(IPAMBlock(metadata=meta, spec=spec))
    await rig.store.delete(IPAMBlock, block_name(cidr))


async def owner_of(rig: Rig, cidr: str) -> str:
    return (await rig.store.get(IPAMBlock, block_name(cidr))).spec.node


async def full_pool(rig: Rig, other: str) -> None:
    """The other block is marked, ours is used up, so that one more is wanted all the time."""
    await left_behind(rig, other)
    await rig.up()
    for i in range(14):
        await waited(rig, rig.add(i))


FIRST, SECOND = "10.1.0.0/28", "10.1.0.16/28"


@pytest.mark.parametrize("other", [FIRST, SECOND])
def test_a_dead_owners_marked_block_comes_free_after_the_grace_and_not_before(tmp_path: Path, other: str) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(TWO)
        await full_pool(rig, other)
        await rig.clock.advance(590)
        assert await owner_of(rig, other) == "dead"
        assert [c.type for c in rig.ipam.conditions()] == ["PoolExhausted"]
        await rig.clock.advance(60)
        assert await owner_of(rig, other) == "node-1"
        assert rig.ipam.conditions() == ()
        for i in range(14, 32):
            await waited(rig, rig.add(i))
        await rig.down()

    play(main())


def test_a_node_that_shows_up_in_between_starts_the_grace_anew(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(TWO)
        await full_pool(rig, SECOND)
        await rig.clock.advance(550)
        await rig.store.create(Node(metadata=Meta(name="dead")))
        await rig.clock.advance(700)
        assert await owner_of(rig, SECOND) == "dead"
        await rig.store.delete(Node, "dead")
        await rig.clock.advance(590)
        assert await owner_of(rig, SECOND) == "dead"
        await rig.clock.advance(60)
        assert await owner_of(rig, SECOND) == "node-1"
        await rig.down()

    play(main())


def test_what_a_node_has_not_seen_itself_does_not_count(tmp_path: Path) -> None:
    """Neither the time before its start, nor that between two needs."""

    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(TWO)
        await full_pool(rig, SECOND)
        await rig.clock.advance(500)
        await rig.restart()
        await rig.clock.advance(500)
        assert await owner_of(rig, SECOND) == "dead"
        for i in range(10):
            rig.delete(i)
        await rig.clock.advance(300)
        assert await owner_of(rig, SECOND) == "dead", "there is no need of it"
        for i in range(10):
            await waited(rig, rig.add(f"again{i}"))
        await rig.clock.advance(500)
        assert await owner_of(rig, SECOND) == "dead", "nobody looked for 300 s"
        await rig.clock.advance(150)
        assert await owner_of(rig, SECOND) == "node-1"
        await rig.down()

    play(main())


def test_a_block_that_others_hold_or_that_is_not_marked_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(pool("two", "10.1.0.0/26", 28))
        await left_behind(rig, "10.1.0.32/28", "dead", FINALIZER_OWNER, "example.com/hold")
        spec = IPAMBlockSpec(cidr="10.1.0.48/28", pool="two", node="dead")
        meta = Meta(name=block_name(spec.cidr), finalizers=(FINALIZER_OWNER,))
        await rig.store.create(IPAMBlock(metadata=meta, spec=spec))
        before = (await rig.store.list(IPAMBlock)).items
        await rig.up()
        for i in range(30):
            await waited(rig, rig.add(i))
        await rig.clock.advance(1500)
        after = {b.name: b for b in (await rig.store.list(IPAMBlock)).items}
        assert [after[b.name] for b in before] == list(before)
        await rig.down()

    play(main())


def test_a_fixed_address_that_a_dead_owner_holds_comes_free_too(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await left_behind(rig, "10.8.0.7/32")
        for i in range(90):
            with pytest.raises(Exhausted, match="belongs to node dead"):
                await waited(rig, rig.add(f"x{i}", addresses=("10.8.0.7",)))
            await rig.clock.advance(6.5)
        await rig.clock.advance(10)
        assert (await waited(rig, rig.add(1, addresses=("10.8.0.7",)))).addresses == ("10.8.0.7",)

    run(tmp_path, test, pool("two", "10.8.0.0/24", 32))


def test_no_look_at_other_nodes_while_there_are_free_blocks(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(pool("two", "10.1.0.0/24", 28))
        asked: list[str] = []
        get = rig.memory.get

        async def watched(kind, name):  # type: ignore[no-untyped-def]
            if kind is Node:
                asked.append(name)
            return await get(kind, name)

        rig.memory.get = watched  # type: ignore[method-assign]
        for i in range(8):
            await left_behind(rig, f"10.1.0.{16 * i}/28")
        await rig.up()
        for i in range(60):
            await waited(rig, rig.add(i))
        await rig.clock.advance(700)
        assert set(asked) == {"node-1"}
        await rig.down()

    play(main())


# -- overlaps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (pool("new", "10.1.0.0/24", 28), "10.1.0.64/26"),
        (pool("new", "10.1.0.0/24", 26), "10.1.0.64/28"),
        (pool("new", "10.1.0.0/24", 32), "10.1.0.64/26"),
        (pool("new", "fd01::/120", 124), "fd01::20/123"),
        (pool("new", "fd01::/120", 128), "fd01::80/121"),
    ],
)
def test_no_new_block_overlaps_one_that_outlived_its_pool(tmp_path: Path, new: IPPool, old: str) -> None:
    """And the others are used: what is in the way costs a pause, no more."""

    async def main() -> None:
        rig = Rig(tmp_path)
        spec = IPAMBlockSpec(cidr=old, pool="old", node="node-2", within=within_of(old))
        await rig.store.create(IPAMBlock(metadata=Meta(name=block_name(old)), spec=spec))
        await rig.create(new)
        await rig.up()
        taken = []
        for i in range(80):
            await rig.clock.advance(11)
            try:
                lease = await waited(rig, rig.add(i))
            except Exhausted:
                continue
            taken += lease.addresses
        assert len(taken) > 60
        assert not [a for a in taken if ip_address(a) in ip_network(old)]
        rig.check_alive()
        await rig.down()

    play(main())


def test_a_larger_block_is_found_where_it_hands_out(tmp_path: Path) -> None:
    """A /18 hands out of its first /20 alone."""

    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(pool("small", "10.1.0.0/24", 28))
        await rig.store.create(IPPool(metadata=Meta(name="large"), spec=IPPoolSpec(cidr="10.64.0.0/16", block_size=20)))
        spec = IPAMBlockSpec(cidr="10.1.0.0/18", pool="before", node="node-2", within=within_of("10.1.0.0/18"))
        await rig.store.create(IPAMBlock(metadata=Meta(name=block_name(spec.cidr)), spec=spec))
        await rig.up()
        assert "10.1.0.0/18 of node node-2" in rig.ipam.conditions()[0].message
        assert all(b.startswith("10.64.") for b in await rig.own_blocks())
        await rig.down()

    play(main())


@pytest.mark.parametrize(
    ("cidr", "within"),
    [
        ("10.244.3.64/26", "10.244.0.0/20"),
        ("10.244.31.1/32", "10.244.16.0/20"),
        ("10.244.16.0/20", "10.244.16.0/20"),
        ("10.244.0.0/16", "10.244.0.0/20"),
        ("fd00:10:244::1:40/122", "fd00:10:244::1:0/116"),
        ("fd00:10:244::/64", "fd00:10:244::/116"),
    ],
)
def test_what_a_block_is_within(cidr: str, within: str) -> None:
    assert within_of(cidr) == within
    spec = IPAMBlockSpec(cidr=cidr, pool="p", node="n", within=within)
    block = IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=spec)
    assert validate(block) == ()
    wrong = msgspec.structs.replace(block, spec=msgspec.structs.replace(spec, within="10.99.0.0/20"))
    assert [p.field for p in validate(wrong)] == ["spec.within"]


def prefixes(version: int) -> st.SearchStrategy[str]:
    """Where many of them overlap: around 10.0.0.0 and fd00::."""
    base, longest = (ip_address("10.0.0.0"), 32) if version == 4 else (ip_address("fd00::"), 128)
    return st.builds(
        lambda offset, length: str(ip_network(f"{base + offset}/{length}", strict=False)),
        st.integers(0, (1 << 20) - 1),
        st.integers(longest - 20, longest),
    )


@given(st.sampled_from((4, 6)).flatmap(lambda v: st.tuples(prefixes(v), prefixes(v))))
def test_blocks_that_hand_out_one_address_are_within_the_same(pair: tuple[str, str]) -> None:
    one, other = (Block[str](cidr) for cidr in pair)
    shared = any(other.offset(one.address(o)) is not None for o in (0, one.size - 1))
    shared = shared or one.offset(other.address(0)) is not None
    assert not shared or within_of(one.cidr) == within_of(other.cidr)


# -- how many --------------------------------------------------------------------------------------------------------


def test_a_node_has_no_more_blocks_than_it_may(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, settings=Settings(max_blocks=2))
        await rig.create(pool("small", "10.1.0.0/24", 28), pool("fixed", "10.2.0.0/24", 32, assignment_mode="Manual"))
        await rig.up()
        for i in range(32):
            await waited(rig, rig.add(i))
        with pytest.raises(Exhausted, match="has 2 blocks, and may have 2 "):
            await waited(rig, rig.add("more"))
        assert len(rig.ipam.blocks()) == 2
        assert "--max-blocks" in rig.ipam.conditions()[0].message
        fixed = await waited(rig, rig.add("fixed", addresses=("10.2.0.9",)))
        assert fixed.addresses == ("10.2.0.9",), "a fixed address is no block to count"
        await rig.down()

    play(main())


def limited(blocks: int) -> IPAMConfiguration:
    return IPAMConfiguration(metadata=Meta(name="default"), spec=IPAMConfigurationSpec(max_blocks_per_host=blocks))


def test_the_clusters_limit_holds_from_the_start_and_whenever_it_changes(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(pool("small", "10.1.0.0/24", 28))
        await rig.store.create(limited(1))
        await rig.up()
        for i in range(16):
            await waited(rig, rig.add(i))
        with pytest.raises(Exhausted, match=r"has 1 blocks, and may have 1 \(underlayctl ipam configure\)"):
            await waited(rig, rig.add("one more"))

        async def limit(blocks: int) -> None:
            def change(seen: IPAMConfiguration) -> IPAMConfiguration:
                return msgspec.structs.replace(seen, spec=limited(blocks).spec)

            await mutate(rig.store, IPAMConfiguration, "default", change)
            await rig.clock.advance(1)

        await limit(3)
        for i in range(16, 40):
            await waited(rig, rig.add(i))
        assert len(rig.ipam.blocks()) == 3
        assert not rig.ipam.conditions() or "may have 3" in rig.ipam.conditions()[0].message

        await limit(1)
        await rig.clock.advance(60)
        assert len(rig.ipam.blocks()) == 3, "nothing is taken away"
        for i in range(40, 48):
            await waited(rig, rig.add(i))
        with pytest.raises(Exhausted, match="has 3 blocks, and may have 1 "):
            await waited(rig, rig.add("beyond"))

        await rig.store.delete(IPAMConfiguration, "default")
        await rig.clock.advance(1)
        await waited(rig, rig.add("beyond"))
        assert len(rig.ipam.blocks()) > 3
        await rig.down()

    play(main())


def test_a_nodes_own_limit_stands_above_the_clusters(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path, settings=Settings(max_blocks=0))
        await rig.create(pool("small", "10.1.0.0/24", 28))
        await rig.store.create(limited(1))
        await rig.up()
        for i in range(33):
            await waited(rig, rig.add(i))
        assert len(rig.ipam.blocks()) >= 3
        await rig.down()

    play(main())


class WithoutConfigurations(MemoryStore):
    """As an API server on which one kind cannot be followed any more."""

    away = False

    async def watch(self, kind: type[R], **how: Any) -> AsyncGenerator[Event[R], None]:
        if self.away and kind is IPAMConfiguration:
            raise Unavailable("no ipamconfigurations: apply manifests/crds")
        async for event in super().watch(kind, **how):
            yield event


def test_a_limit_that_cannot_be_followed_holds_as_it_was_and_holds_up_no_pool(tmp_path: Path) -> None:
    async def main() -> None:
        clock = FakeClock()
        store = WithoutConfigurations(clock)
        rig = Rig(tmp_path, store=store, clock=clock)
        await store.create(limited(1))
        await rig.up(run=False)
        store.away = True
        rig._running = asyncio.create_task(rig.ipam.run())
        await rig.create(pool("late", "10.1.0.0/24", 28))
        await rig.clock.advance(1)
        for i in range(16):
            await waited(rig, rig.add(i))
        with pytest.raises(Exhausted, match="may have 1 "):
            await waited(rig, rig.add("more"))
        await rig.down()

    play(main())
