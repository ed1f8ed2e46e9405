"""ipam/pool.py: which pools, which block next, how many."""

from __future__ import annotations

import itertools
import subprocess
import sys
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import NotReady, WrongPool
from ipam.model import Attachment, Request
from ipam.pool import Count, Pools, Want, candidates, claim_ahead, overlap, surplus, within
from tests.ipam_fakes import V4, V6, pool

A = Attachment("pods", "c1", "eth0")


def wants(pools: Pools, *, names: tuple[str, ...] = (), addresses: tuple[str, ...] = ()) -> tuple[Want, ...]:
    return pools.wants(Request(A, pools=names, addresses=addresses))


def test_a_node_takes_from_enabled_automatic_pools_that_select_it_one_want_a_family() -> None:
    pools = Pools(
        [
            V6,
            pool("b", "10.2.0.0/16"),
            pool("a", "10.1.0.0/16", node_selector="rack == 'r1'"),
            pool("off", "10.3.0.0/16", disabled=True),
            pool("other", "10.4.0.0/16", node_selector="rack == 'r2'"),
            pool("manual", "10.5.0.0/16", assignment_mode="Manual"),
        ],
        {"rack": "r1"},
    )
    assert pools.automatic == {4: ("a", "b"), 6: ("v6",)}
    assert wants(pools) == (Want(("a", "b")), Want(("v6",)))
    assert [pools.serves(n) for n in ("a", "off", "other", "nowhere")] == [True, False, True, False]


def test_single_stack_wants_one_family_only() -> None:
    assert wants(Pools([V6])) == (Want(("v6",)),)


def test_chosen_pools_replace_the_automatic_ones_of_their_family_whatever_their_selector() -> None:
    special = pool("special", "10.9.0.0/24", node_selector="rack == 'elsewhere'", assignment_mode="Manual")
    pools = Pools([V4, V6, special])
    assert wants(pools, names=("special",)) == (Want(("special",)), Want(("v6",)))
    assert wants(pools, names=("10.9.0.0/24",)) == (Want(("special",)), Want(("v6",)))


def test_chosen_addresses_are_all_that_is_given() -> None:
    pools = Pools([V4, V6])
    assert wants(pools, addresses=("fd00:10:244:0::7", "10.244.0.7")) == (
        Want(("v4",), "10.244.0.7"),
        Want(("v6",), "fd00:10:244::7"),
    )
    assert wants(pools, addresses=("10.244.0.7",)) == (Want(("v4",), "10.244.0.7"),)


@pytest.mark.parametrize(
    ("names", "addresses", "words"),
    [
        (("nope",), (), "no IPPool 'nope'.*v4"),
        (("off",), (), "off is disabled"),
        ((), ("10.3.0.1",), "disabled"),
        ((), ("192.0.2.1",), "in no IPPool"),
        ((), ("10.244.0.300",), "no IP address"),
        ((), ("10.244.0.1", "10.244.0.2"), "one address of a family"),
        (("v6",), ("10.244.0.1",), "not in the chosen pools"),
    ],
)
def test_a_wrong_choice_is_refused_by_name(names: tuple[str, ...], addresses: tuple[str, ...], words: str) -> None:
    with pytest.raises(WrongPool, match=words):
        wants(Pools([V4, V6, pool("off", "10.3.0.0/16", disabled=True)]), names=names, addresses=addresses)


def test_no_pool_at_all_is_not_ready() -> None:
    with pytest.raises(NotReady, match="nodeSelector"):
        wants(Pools([pool("other", "10.4.0.0/16", node_selector="rack == 'r2'")], {"rack": "r1"}))


def test_pools_of_single_addresses_are_known_and_never_claimed_ahead() -> None:
    pools = Pools([V4, pool("fix4", "10.8.0.0/24", 32), pool("fix6", "fd08::/64", 128)])
    assert pools.single == {"fix4", "fix6"}
    assert pools.ahead == ("v4",)


@pytest.mark.parametrize(
    "p", [V4, pool("s", "10.0.0.0/24", 28), pool("t", "fd00::/120", 128), pool("u", "10.0.0.0/26")]
)
def test_candidates_are_all_blocks_of_the_pool_once_each(p: object) -> None:
    got = list(candidates(p, "node-1"))  # type: ignore[arg-type]
    network = ip_network(p.spec.cidr)  # type: ignore[attr-defined]
    size = ip_network(got[0]).prefixlen
    assert sorted(map(ip_network, got)) == list(network.subnets(new_prefix=size))


def test_default_block_sizes_are_the_familys() -> None:
    assert next(candidates(V4, "n")).endswith("/26")
    assert next(candidates(V6, "n")).endswith("/122")
    assert Pools([V4]).block_at(V4, "10.244.3.100") == "10.244.3.64/26"
    assert Pools([V6]).block_at(V6, "fd00:10:244::55") == "fd00:10:244::40/122"


def test_candidates_go_on_in_a_row_from_a_place_of_the_node_and_pool() -> None:
    first = list(itertools.islice(candidates(V6, "node-1"), 3))
    numbers = [int(ip_network(c).network_address) for c in first]
    assert numbers[1] - numbers[0] == numbers[2] - numbers[1] == 64
    starts = {next(candidates(V4, f"node-{i}")) for i in range(50)}
    assert len(starts) > 40  # of 1024: a hash that is worth its name
    assert next(candidates(V4, "node-1")) != next(candidates(pool("w4", "10.244.0.0/16"), "node-1"))


def test_candidates_are_the_same_in_every_process() -> None:
    code = "from ipam.pool import *; from tests.ipam_fakes import V4; print(next(candidates(V4, 'node-1')))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {next(candidates(V4, "node-1")) + "\n"}


def test_blocks_reserved_as_a_whole_are_jumped_over_even_if_they_are_very_many() -> None:
    small = pool("s", "10.0.0.0/24", 26)
    assert set(candidates(small, "n", ["10.0.0.0/25", "10.0.0.128/27", "fd00::/8"])) == {
        "10.0.0.128/26",
        "10.0.0.192/26",
    }
    assert list(candidates(small, "n", ["10.0.0.0/8"])) == []
    # Half of a /48 are 2^73 blocks: to walk them takes for ever.
    half = candidates(V6, "node-1", ["fd00:10:244:8000::/49"])
    assert all(within(c, "fd00:10:244::/49") for c in itertools.islice(half, 1000))
    other = candidates(V6, "node-1", ["fd00:10:244::/49"])
    assert all(within(c, "fd00:10:244:8000::/49") for c in itertools.islice(other, 1000))


def test_two_reservations_that_touch_cover_a_block_together() -> None:
    assert "10.0.0.64/26" not in set(candidates(pool("s", "10.0.0.0/24"), "n", ["10.0.0.64/27", "10.0.0.96/27"]))


def test_overlap_and_within_keep_families_apart() -> None:
    assert overlap("10.0.0.0/24", "10.0.0.64/26")
    assert overlap("10.0.0.64/26", "10.0.0.0/24")
    assert not overlap("10.0.0.0/26", "10.0.0.64/26")
    assert not overlap("0.0.0.0/0", "::/0")
    assert within("10.0.0.64/26", "10.0.0.0/24")
    assert not within("10.0.0.0/24", "10.0.0.64/26")


@pytest.mark.parametrize(
    ("used", "free", "more"),
    [(0, 0, True), (0, 64, False), (48, 16, False), (49, 15, True), (64, 0, True), (63, 65, False)],
)
def test_claim_ahead_below_a_quarter(used: int, free: int, more: bool) -> None:
    assert claim_ahead(used=used, free=free) is more


EMPTY = Count(0, 64, idle=True)


@pytest.mark.parametrize(
    ("blocks", "keep", "given"),
    [
        ([EMPTY], 1, ()),
        ([EMPTY], 0, (0,)),
        ([EMPTY, EMPTY], 1, (1,)),
        ([EMPTY, EMPTY, EMPTY], 1, (2, 1)),
        ([Count(32, 32), EMPTY], 1, (1,)),
        ([Count(33, 31), EMPTY], 1, ()),
        ([Count(1, 63), Count(0, 64, idle=False)], 1, ()),  # something still rests in it
        ([EMPTY, Count(10, 54)], 1, (0,)),
        ([Count(64, 0), EMPTY, EMPTY], 1, (2,)),
    ],
)
def test_give_back_only_what_leaves_half_free(blocks: list[Count], keep: int, given: tuple[int, ...]) -> None:
    assert surplus(blocks, keep=keep) == given


@given(st.lists(st.tuples(st.integers(0, 64), st.booleans()), max_size=8))
def test_what_is_given_back_is_not_claimed_at_once_again(blocks: list[tuple[int, bool]]) -> None:
    counts = [Count(used, 64 - used, idle=idle and used == 0) for used, idle in blocks]
    given_back = surplus(counts, keep=1)
    left = [c for i, c in enumerate(counts) if i not in given_back]
    if given_back:
        assert not claim_ahead(used=sum(c.used for c in left), free=sum(c.free for c in left))
        assert all(counts[i].idle for i in given_back)
