"""No fresh block is used while a route of somebody else's leads to it (R5): given back, said, and let alone."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ipam.errors import Exhausted
from ipam.ledger import Phase
from ipam.model import ForeignRoute
from store.memory import MemoryStore
from store.model import IPAMBlock, IPAMBlockSpec, Meta, block_name
from tests.ipam_fakes import FakeClock, Rig, play, pool, waited

FOUR = pool("four", "10.1.0.0/26", 28)  # 4 blocks of 16
CIDRS = [f"10.1.0.{i}/28" for i in (0, 16, 32, 48)]


class Counting(MemoryStore):
    """Counts what changes blocks."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.creates = 0

    async def create(self, obj):  # type: ignore[no-untyped-def]
        self.creates += isinstance(obj, IPAMBlock)
        return await super().create(obj)


def rig_at(tmp_path: Path) -> Rig:
    clock = FakeClock()
    return Rig(tmp_path, clock=clock, store=Counting(clock))


def foreign(*prefixes: str) -> set[ForeignRoute]:
    return {ForeignRoute(prefix, "192.0.2.1", "up1", 143) for prefix in prefixes}


def said(rig: Rig, kind: str = "ForeignRoute") -> str:
    return next((c.message for c in rig.ipam.conditions() if c.type == kind), "")


async def first_choice(tmp_path: Path) -> str:
    """The block that node-1 tries first."""
    rig = Rig(tmp_path / "first")
    await rig.create(FOUR)
    await rig.up()
    (cidr,) = await rig.own_blocks()
    await rig.down()
    return cidr


@pytest.mark.parametrize("part", ["whole", "one address"])
def test_a_block_that_a_foreign_route_leads_to_is_given_back_and_the_next_one_used(tmp_path: Path, part: str) -> None:
    async def main() -> None:
        first = await first_choice(tmp_path)
        route = first if part == "whole" else f"{ip_network(first)[5]}/32"
        rig = rig_at(tmp_path)
        rig.kernel.foreign = foreign(route)
        await rig.create(FOUR)
        await rig.up()
        (used,) = await rig.own_blocks()
        assert used != first
        lease = await rig.add(1)
        assert ip_address(lease.addresses[0]) in ip_network(used)
        for words in (first, route, "192.0.2.1", "up1", "another cluster"):
            assert words in said(rig)
        await rig.clock.advance(1)
        block = await rig.store.get(IPAMBlock, block_name(used))
        assert [c.type for c in block.status.conditions] == ["ForeignRoute"]
        rig.kernel.broken = True
        rig.kernel.foreign.clear()
        await rig.clock.advance(65)
        assert said(rig), "nothing can be known while the kernel cannot be read"
        rig.kernel.broken = False
        await rig.clock.advance(35)
        assert not said(rig)
        await rig.down()

    play(main())


def test_routes_around_a_block_say_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        first = await first_choice(tmp_path)
        rig = rig_at(tmp_path)
        rig.kernel.foreign = foreign("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/26", str(ip_network(first).supernet()))
        await rig.create(FOUR)
        await rig.up()
        assert await rig.own_blocks() == [first]
        assert rig.ipam.conditions() == ()
        await rig.down()

    play(main())


def test_with_foreign_routes_everywhere_nothing_is_used_and_little_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        rig = rig_at(tmp_path)
        rig.kernel.foreign = foreign(*CIDRS)
        await rig.create(FOUR)
        await rig.up()
        with pytest.raises(Exhausted, match=r"has a route to it that is not ours"):
            await waited(rig, rig.add(1))
        await rig.clock.advance(600)
        assert await rig.own_blocks() == []
        assert said(rig)
        assert rig.store.creates == 1, "one block says all of the pool"
        assert rig.kernel.asked["foreign_routes"] < 600 / 5
        rig.kernel.foreign.clear()
        await rig.clock.advance(45)
        await rig.add(1)
        assert rig.ipam.conditions() == ()
        await rig.down()

    play(main())


def test_a_route_that_leads_to_another_node_by_now_is_foreign_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        first = await first_choice(tmp_path)
        rig = rig_at(tmp_path)
        rig.kernel.foreign = foreign(first)
        await rig.create(FOUR)
        await rig.up()
        assert said(rig)
        spec = IPAMBlockSpec(cidr=first, pool="four", node="node-2")
        await rig.store.create(IPAMBlock(metadata=Meta(name=block_name(first)), spec=spec))
        await rig.clock.advance(60)
        assert rig.ipam.conditions() == ()
        await rig.down()

    play(main())


@pytest.mark.parametrize("agent", [True, False], ids=["blackhole", "no agent"])
def test_a_route_that_comes_between_claim_and_first_use_has_the_block_withdrawn(tmp_path: Path, agent: bool) -> None:
    async def main() -> None:
        rig = rig_at(tmp_path)
        rig.agent = agent
        await rig.create(FOUR)
        claimed = await first_choice(tmp_path)

        def step(name: str) -> None:
            if name == "mirrored":
                rig.kernel.foreign = foreign(claimed)

        rig.agent = False
        rig.step = step
        await rig.up()
        rig.agent = agent
        await rig.clock.advance(2.5)
        assert rig.phases()[claimed] is Phase.RELEASING
        lease = await waited(rig, rig.add(1))
        assert ip_address(lease.addresses[0]) not in ip_network(claimed)
        await rig.clock.advance(10)
        assert claimed not in await rig.own_blocks()
        assert claimed in said(rig)
        await rig.down()

    play(main())


def test_what_is_in_use_stays_ours_whatever_routes_there_are(tmp_path: Path) -> None:
    async def main() -> None:
        rig = rig_at(tmp_path)
        await rig.create(FOUR)
        await rig.up()
        lease = await rig.add(1)
        (cidr,) = await rig.own_blocks()
        rig.kernel.foreign = foreign(cidr)
        await rig.restart()
        await rig.clock.advance(60)
        assert rig.phases() == {cidr: Phase.READY}
        assert rig.ipam.leases()[0].addresses == lease.addresses
        await rig.down()

    play(main())


def test_a_fixed_address_that_somebody_else_has_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        rig = rig_at(tmp_path)
        rig.kernel.foreign = foreign("10.8.0.7/32")
        await rig.create(pool("single", "10.8.0.0/24", 32))
        await rig.up()
        for i in range(20):
            with pytest.raises(Exhausted, match=r"10\.8\.0\.7/32 .*not ours"):
                await waited(rig, rig.add(f"x{i}", addresses=("10.8.0.7",)))
        assert (await waited(rig, rig.add("y", addresses=("10.8.0.8",)))).addresses == ("10.8.0.8",)
        await rig.down()

    play(main())


def test_a_dead_owner_that_is_still_routed_to_keeps_its_block(tmp_path: Path) -> None:
    """It is cut off from the store, and its pods live."""

    async def main() -> None:
        rig = rig_at(tmp_path)
        await rig.create(pool("two", "10.1.0.0/27", 28))
        meta = Meta(name=block_name("10.1.0.16/28"), finalizers=("underlay.network/owner",))
        spec = IPAMBlockSpec(cidr="10.1.0.16/28", pool="two", node="dead")
        await rig.store.create(IPAMBlock(metadata=meta, spec=spec))
        await rig.store.delete(IPAMBlock, meta.name)
        rig.kernel.foreign = foreign("10.1.0.16/28")
        await rig.up()
        for i in range(16):
            await waited(rig, rig.add(i))
        await rig.clock.advance(700)
        assert (await rig.store.get(IPAMBlock, meta.name)).spec.node == "dead"
        rig.kernel.foreign.clear()
        await rig.clock.advance(60)
        assert (await rig.store.get(IPAMBlock, meta.name)).spec.node == "node-1"
        await rig.down()

    play(main())


def test_a_kernel_that_cannot_be_read_lets_no_new_block_be_used(tmp_path: Path) -> None:
    async def main() -> None:
        rig = rig_at(tmp_path)
        await rig.create(FOUR)
        await rig.up(run=False)
        rig.kernel.broken = True
        await rig.clock.advance(10)
        await rig.ipam._keeper.step()
        assert Phase.READY not in rig.phases().values()
        rig.kernel.broken = False
        await rig.ipam._keeper.step()
        assert list(rig.phases().values()) == [Phase.READY]
        await rig.down()

    play(main())
