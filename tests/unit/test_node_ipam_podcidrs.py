"""Pools whose blocks are the Nodes' podCIDRs, as kube-controller-manager hands them out."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import Exhausted, WrongPool
from ipam.ledger import Ledger, Phase
from ipam.node import Request
from ipam.pool import Pools, candidates
from store.base import mutate
from store.model import (
    BLOCK_LIMIT,
    FINALIZER_OWNER,
    IPAMBlock,
    IPAMBlockSpec,
    IPPool,
    Meta,
    Node,
    NodeSpec,
    block_name,
    within_of,
)
from tests.ipam_fakes import Rig, attachment, play, pool, run, waited

FOUR = pool("four", "10.244.0.0/16", use_pod_cidrs=True)
SIX = pool("six", "fd00:10:244::/48", use_pod_cidrs=True)


def node(*pod_cidrs: str, name: str = "node-1") -> Node:
    return Node(metadata=Meta(name=name), spec=NodeSpec(pod_cidrs=pod_cidrs))


async def assign(rig: Rig, *pod_cidrs: str) -> None:
    """What the controller-manager does some time after the Node was made."""
    await mutate(rig.store, Node, "node-1", lambda n: msgspec.structs.replace(n, spec=NodeSpec(pod_cidrs=pod_cidrs)))


def types(rig: Rig) -> list[str]:
    return [c.type for c in rig.ipam.conditions()]


def test_the_blocks_are_the_nodes_podcidrs_and_nothing_else_differs(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert await rig.own_blocks() == ["10.244.3.0/24", "fd00:10:244:3::/64"]
        lease = await rig.add(1)
        assert [a.rpartition(end)[0] for a, end in zip(lease.addresses, (".", "::"), strict=True)] == [
            "10.244.3",
            "fd00:10:244:3",
        ]
        await rig.clock.advance(1)
        assert set(await rig.mirror()) == set(lease.addresses)
        assert types(rig) == []
        block = await rig.store.get(IPAMBlock, block_name("fd00:10:244:3::/64"))
        assert (block.status.used, block.status.free) == (1, BLOCK_LIMIT - 1)
        assert block.metadata.finalizers == (FINALIZER_OWNER,)
        assert [o.name for o in block.metadata.owner_references] == ["node-1"]

    run(tmp_path, test, node("10.244.3.0/24", "fd00:10:244:3::/64"), FOUR, SIX)


def test_a_node_without_podcidr_says_what_to_do_and_begins_when_it_has_one(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert types(rig) == ["NoPodCIDR"]
        for text in (rig.ipam.conditions()[0].message, rig.ipam.refusal()):
            assert "node-1 has no podCIDR inside 10.244.0.0/16" in text
            assert "--allocate-node-cidrs=true" in text
            assert "--cluster-cidr=10.244.0.0/16" in text
        with pytest.raises(Exhausted, match="--allocate-node-cidrs=true"):
            await waited(rig, rig.add(1))
        await assign(rig, "10.244.3.0/24")
        await rig.clock.advance(0.5)
        assert rig.phases() == {"10.244.3.0/24": Phase.READY}
        assert types(rig) == []
        assert rig.ipam.refusal() == ""
        await rig.add(2)

    run(tmp_path, test, node("192.168.0.0/24"), FOUR)


def test_with_no_node_there_is_no_podcidr(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert types(rig) == ["NoPodCIDR"]

    run(tmp_path, test, FOUR)


def test_another_family_hands_out_though_this_one_has_no_podcidr_but_a_pod_needs_both(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert types(rig) == ["NoPodCIDR"]
        with pytest.raises(Exhausted, match="IPPool six hands out"):
            await waited(rig, rig.add(1))
        assert "IPPool six" in rig.ipam.refusal()

    run(tmp_path, test, node("10.244.3.0/24"), FOUR, SIX)


def test_a_full_podcidr_is_as_many_as_there_is_and_nobody_loops(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        for i in range(15):
            await rig.add(i)
        await rig.clock.advance(10)
        assert types(rig) == []  # one is free, and there are no more to come
        await rig.add(15)
        await rig.clock.advance(1)
        assert types(rig) == ["PoolExhausted"]
        with pytest.raises(Exhausted, match=r"no free address for node node-1, and no other podCIDR \(10.244.3.0/28"):
            await waited(rig, rig.add("more"))
        version, asked = (await rig.store.list(IPAMBlock)).version, rig.kernel.asked.copy()
        await rig.clock.advance(120)
        assert (await rig.store.list(IPAMBlock)).version == version
        assert rig.kernel.asked.get("blackholes") == asked.get("blackholes")
        rig.delete(3)
        await rig.clock.advance(40)
        assert types(rig) == []
        assert (await rig.add("again")).addresses

    run(tmp_path, test, node("10.244.3.0/28"), FOUR)


def test_both_podcidrs_of_one_pool_are_used_the_second_ahead_of_need(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        assert await rig.own_blocks() == ["10.244.3.0/30"]
        for i in range(8):
            await waited(rig, rig.add(i))
        assert await rig.own_blocks() == ["10.244.3.0/30", "10.244.9.0/30"]

    run(tmp_path, test, node("10.244.3.0/30", "10.244.9.0/30"), FOUR)


def test_a_large_podcidr_costs_what_it_hands_out(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        taken = [(await rig.ipam.take(Request(attachment(i)))).addresses[0] for i in range(BLOCK_LIMIT)]
        first = int(ip_address("fd00:10:244:3::"))
        assert sorted(int(ip_address(a)) - first for a in taken) == list(range(BLOCK_LIMIT))
        with pytest.raises(Exhausted):
            await waited(rig, rig.ipam.take(Request(attachment("more"))))

    run(tmp_path, test, node("fd00:10:244:3::/64"), SIX)


def test_it_is_kept_while_the_node_has_it_and_given_back_with_its_pool(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        for i in range(8):
            await waited(rig, rig.add(i))
        for i in range(8):
            rig.delete(i)
        await rig.clock.advance(300)
        assert rig.phases() == {"10.244.3.0/30": Phase.READY, "10.244.4.0/30": Phase.READY}
        await mutate(rig.store, IPPool, "four", _disabled)
        await rig.clock.advance(60)
        assert rig.phases() == {}

    run(tmp_path, test, node("10.244.3.0/30", "10.244.4.0/30"), FOUR)


def _disabled(p: IPPool) -> IPPool:
    return msgspec.structs.replace(p, spec=msgspec.structs.replace(p.spec, disabled=True))


def test_a_pool_that_only_others_ask_for_keeps_it_too(tmp_path: Path) -> None:
    """By name alone, so it is claimed at first use."""

    async def test(rig: Rig) -> None:
        assert await rig.own_blocks() == []
        lease = await waited(rig, rig.add(1, pools=("manual",)))
        assert lease.addresses[0].startswith("10.244.3.")
        rig.delete(1)
        await rig.clock.advance(300)
        assert await rig.own_blocks() == ["10.244.3.0/24"]

    manual = pool("manual", "10.244.0.0/16", use_pod_cidrs=True, assignment_mode="Manual")
    run(tmp_path, test, node("10.244.3.0/24"), manual)


def test_a_block_that_is_no_podcidr_of_the_node_any_more_goes_once_it_is_empty(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        await assign(rig, "10.244.8.0/24")
        await rig.clock.advance(60)
        assert set(await rig.own_blocks()) == {"10.244.3.0/24", "10.244.8.0/24"}
        for _ in range(120):
            await rig.clock.advance(0.1)
            assert rig.phases()["10.244.3.0/24"] is Phase.READY, "nobody tries to give back what is in use"
        assert rig.ipam.lease(attachment(1)) == lease
        assert (await rig.add(2)).addresses[0].startswith("10.244.8.")
        rig.delete(1)
        await rig.clock.advance(60)
        assert await rig.own_blocks() == ["10.244.8.0/24"]

    run(tmp_path, test, node("10.244.3.0/24"), FOUR)


def test_the_new_podcidr_is_claimed_on_demand_though_the_old_one_has_room(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await waited(rig, rig.add(1, pools=("manual",)))
        await assign(rig, "10.244.8.0/24")
        await rig.clock.advance(1)
        lease = await waited(rig, rig.add(2, pools=("manual",)))
        assert lease.addresses[0].startswith("10.244.8.")

    manual = pool("manual", "10.244.0.0/16", use_pod_cidrs=True, assignment_mode="Manual")
    run(tmp_path, test, node("10.244.3.0/24"), manual)


def test_a_podcidr_that_is_still_anothers_block_waits_for_it(tmp_path: Path) -> None:
    """A Node is gone, and its podCIDR is the next Node's, while its pods live on."""

    async def main() -> None:
        rig = Rig(tmp_path)
        cidr = "10.244.3.0/24"
        meta = Meta(name=block_name(cidr), finalizers=(FINALIZER_OWNER,))
        spec = IPAMBlockSpec(cidr=cidr, pool="four", node="gone", within=within_of(cidr))
        await rig.create(node(cidr), FOUR)
        await rig.store.create(IPAMBlock(metadata=meta, spec=spec))
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.up()
        with pytest.raises(Exhausted, match=r"10.244.3.0/24 belongs to node gone"):
            await waited(rig, rig.add(1))
        assert types(rig) == ["PoolExhausted"]
        await rig.clock.advance(590)
        assert (await rig.store.get(IPAMBlock, block_name(cidr))).spec.node == "gone"
        await rig.clock.advance(60)
        assert (await rig.store.get(IPAMBlock, block_name(cidr))).spec.node == "node-1"
        assert types(rig) == []
        await rig.add(2)
        await rig.down()

    play(main())


@pytest.mark.parametrize("cidr", ["10.244.0.0/18", "10.244.3.64/26"])
def test_a_block_of_an_older_pool_that_overlaps_it_is_seen(tmp_path: Path, cidr: str) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        old = "10.244.3.64/26"
        spec = IPAMBlockSpec(cidr=old, pool="before", node="node-2", within=within_of(old))
        await rig.store.create(IPAMBlock(metadata=Meta(name=block_name(old)), spec=spec))
        mine = "10.244.0.0/20" if cidr.endswith("/18") else "10.244.3.0/24"
        await rig.create(node(mine), FOUR)
        await rig.up()
        assert "10.244.3.64/26 of node node-2" in rig.ipam.conditions()[0].message
        assert await rig.own_blocks() == []
        await rig.down()

    play(main())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.244.9.1", r"not among the first 4096 of this Node's \(10.244.3.0/24\)"),
        ("fd00:10:244:3::1000", r"not among the first 4096 of this Node's \(fd00:10:244:3::/64\)"),
    ],
)
def test_a_fixed_address_that_no_podcidr_of_the_node_hands_out_is_refused(
    tmp_path: Path, address: str, words: str
) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(WrongPool, match=words):
            await rig.add(1, addresses=(address,))
        lease = await waited(rig, rig.add(2, addresses=("10.244.3.7", "fd00:10:244:3::fff")))
        assert lease.addresses == ("10.244.3.7", "fd00:10:244:3::fff")

    run(tmp_path, test, node("10.244.3.0/24", "fd00:10:244:3::/64"), FOUR, SIX)


def test_a_restart_and_a_lost_block_find_what_lives_there(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        await rig.clock.advance(1)
        await rig.restart()
        assert rig.phases() == {"10.244.3.0/24": Phase.READY}
        await rig.down()
        await rig.wipe("10.244.3.0/24")
        await rig.up()
        assert await rig.own_blocks() == ["10.244.3.0/24"]
        await rig.clock.advance(1)
        assert set(await rig.mirror()) == set(lease.addresses)
        assert (await rig.add(2)).addresses != lease.addresses

    run(tmp_path, test, node("10.244.3.0/24"), FOUR)


def test_what_lives_in_a_podcidr_that_the_node_has_no_more_is_said_until_it_has_it_again(tmp_path: Path) -> None:
    """The Node was made anew, and the block went with the old one while no server ran."""

    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        await rig.clock.advance(1)
        await rig.down()
        await rig.wipe("10.244.3.0/24")
        await assign(rig, "10.244.7.0/24")
        await rig.up()
        other = await waited(rig, rig.add(2))
        assert other.addresses[0].startswith("10.244.7.")
        for _ in range(4):
            assert types(rig) == ["BlockLost"]
            message = rig.ipam.conditions()[0].message
            assert message.startswith(f"{lease.addresses[0]} (default/p1), in no podCIDR of this Node (10.244.7.0/24)")
            assert rig.ipam.problem(attachment(1)) == message
            assert rig.ipam.problem(attachment(2)) == ""
            await rig.clock.advance(10)
        (block,) = (await rig.store.list(IPAMBlock)).items
        assert [c.type for c in block.status.conditions] == ["BlockLost"]
        await assign(rig, "10.244.7.0/24", "10.244.3.0/24")
        await rig.clock.advance(20)
        assert types(rig) == []
        assert set(await rig.mirror()) == {*lease.addresses, *other.addresses}

    run(tmp_path, test, node("10.244.3.0/24"), FOUR)


def test_beside_an_ordinary_pool_either_serves(tmp_path: Path) -> None:
    """Pools of one family are tried in their order, so a full podCIDR overflows into the other pool."""

    async def test(rig: Rig) -> None:
        leases = [await waited(rig, rig.add(i)) for i in range(6)]
        assert sum(lease.addresses[0].startswith("10.244.3.") for lease in leases) == 4
        assert sum(lease.addresses[0].startswith("10.9.") for lease in leases) == 2

    run(tmp_path, test, node("10.244.3.0/30"), FOUR, pool("zz", "10.9.0.0/24", 28))


# -- pure ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(("10.244.3.0/24", "10.245.0.0/24", "fd00:10:244:3::/64", "fd00:0010:244:4::/64"))),
    st.integers(0, BLOCK_LIMIT * 2),
)
def test_each_pool_has_the_podcidrs_inside_it_and_hands_out_their_first_addresses(
    cidrs: list[str], offset: int
) -> None:
    pools = Pools([FOUR, SIX, pool("own", "10.245.0.0/16")], {}, cidrs)
    assert pools.pod_cidrs.keys() == {"four", "six"}
    for name, mine in pools.pod_cidrs.items():
        wanted = [str(ip_network(c)) for c in cidrs if ip_network(c).version == (4 if name == "four" else 6)]
        assert list(mine) == [c for c in wanted if not c.startswith("10.245")]
        assert list(candidates(pools.all[name], "node-1")) == []
        for cidr in mine:
            network = ip_network(cidr)
            address = str(type(network.network_address)(int(network.network_address) + offset))
            inside = offset < min(BLOCK_LIMIT, network.num_addresses)
            assert pools.block_at(pools.all[name], address) == (cidr if inside else "")


def test_the_ledger_knows_no_address_beyond_what_a_block_hands_out() -> None:
    ledger = Ledger(rest=30.0, changed=lambda _: None)
    cidr = "fd00:10:244:3::/64"
    spec = IPAMBlockSpec(cidr=cidr, pool="six", node="node-1")
    own = ledger.adopt(IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=spec), Phase.READY, 0.0)
    assert ledger.find("fd00:10:244:3::fff") == (own, BLOCK_LIMIT - 1)
    assert ledger.find("fd00:10:244:3::1000") is None


def test_what_one_podcidr_hands_out_is_no_single_address_pool() -> None:
    assert Pools([FOUR], {}, ["10.244.0.1/32"]).single == frozenset()
