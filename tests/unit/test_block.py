"""ipam/block.py: next-fit, rests, reservations, counts; held against a plain model."""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ipam.block import REST, Block, Held
from store.model import BLOCK_LIMIT

CIDRS = ["10.0.0.64/26", "fd00::40/122", "10.0.0.7/32", "fd00::7/128", "10.0.0.0/30", "fd00::/112", "fd00::/64"]


def take(block: Block[Any], owner: object, now: float = 0, *, resting: bool = False) -> int | None:
    offset = block.choose(now, resting=resting)
    if offset is not None:
        block.hold(offset, owner)
    return offset


@pytest.mark.parametrize("cidr", CIDRS)
def test_every_address_is_usable_and_none_twice(cidr: str) -> None:
    block: Block[str] = Block(cidr)
    n = min(block.size, 64)
    taken = [take(block, f"o{i}") for i in range(n)]
    assert taken == list(range(n))
    assert block.used == n
    assert block.free == block.size - n
    if n == block.size:
        assert take(block, "more") is None
        assert take(block, "more", resting=True) is None


def test_addresses_and_offsets_are_each_others_inverse() -> None:
    block: Block[str] = Block("fd00:10:244::40/122")
    assert block.address(0) == "fd00:10:244::40"
    assert block.address(63) == "fd00:10:244::7f"
    assert block.offset("fd00:10:244:0::7f") == 63
    assert block.offset("fd00:10:244::80") is None
    assert block.offset("fd00:10:244::3f") is None
    assert block.offset("10.0.0.1") is None


def test_next_fit_goes_on_behind_the_last_one_and_comes_round() -> None:
    block: Block[str] = Block("10.0.0.0/29")
    for i in range(4):
        take(block, f"o{i}")
    block.release(1, None)
    assert [take(block, f"n{i}") for i in range(5)] == [4, 5, 6, 7, 1]


def test_a_freed_address_rests_its_30_seconds_and_no_longer() -> None:
    block: Block[str] = Block("10.0.0.0/31")
    take(block, "a")
    take(block, "b")
    block.release(0, 100.0)
    assert block.choose(100.0 + REST - 0.001) is None
    assert block.choose(100.0 + REST) == 0
    assert block.free == 1


def test_a_resting_address_is_taken_only_if_asked_for_the_longest_rested_first() -> None:
    block: Block[str] = Block("10.0.0.0/30")
    for i in range(4):
        take(block, f"o{i}")
    block.release(2, 10.0)
    block.release(0, 11.0)
    assert block.choose(12.0) is None
    assert [take(block, "x", 12.0, resting=True), take(block, "y", 12.0, resting=True)] == [2, 0]
    assert block.resting(12.0) == 0


def test_resting_again_begins_anew() -> None:
    block: Block[str] = Block("10.0.0.0/32")
    take(block, "a")
    block.release(0, 10.0)
    take(block, "b", 11.0, resting=True)
    block.release(0, 20.0)
    assert block.choose(10.0 + REST) is None
    assert block.choose(20.0 + REST) == 0


def test_hold_refuses_a_second_owner_and_repeats_for_the_same() -> None:
    block: Block[str] = Block("10.0.0.0/30")
    block.hold(2, "a")
    block.hold(2, "a")
    with pytest.raises(Held) as e:
        block.hold(2, "b")
    assert e.value.args == ("a",)
    assert block.owners == {2: "a"}
    with pytest.raises(ValueError, match="outside"):
        block.hold(4, "a")


def test_reserved_addresses_are_skipped_but_can_be_held_by_name() -> None:
    block: Block[str] = Block("10.0.0.0/29")
    block.reserve(["10.0.0.0/30", "10.0.0.3", "10.0.0.6/32", "fd00::/64", "192.168.0.0/16"])
    assert block.free == 3
    assert [take(block, f"o{i}") for i in range(4)] == [4, 5, 7, None]
    block.hold(0, "fixed")
    assert (block.used, block.free) == (4, 0)
    block.release(0, 5.0)
    assert block.free == 0
    assert block.choose(5.0, resting=True) is None
    block.reserve([])
    assert block.free == 5


def test_reserving_what_is_held_takes_nothing_away() -> None:
    block: Block[str] = Block("10.0.0.0/30")
    take(block, "a")
    block.reserve(["10.0.0.0/31"])
    assert (block.used, block.free) == (1, 2)
    block.release(0, None)
    assert (block.used, block.free) == (0, 2)


def test_a_reservation_wider_than_the_block_leaves_nothing() -> None:
    block: Block[str] = Block("10.0.0.64/26")
    block.reserve(["10.0.0.0/16"])
    assert block.free == 0
    assert block.choose(0) is None


@pytest.mark.parametrize("cidr", ["fd00::/116", "fd00::/112", "fd00::/64", "10.0.0.0/20", "10.0.0.0/16"])
def test_a_large_block_hands_out_its_first_addresses_only(cidr: str) -> None:
    block: Block[int] = Block(cidr)
    first = cidr.partition("/")[0]
    block.reserve([f"{first}/127" if ":" in first else f"{first}/31"])
    assert (block.size, block.free) == (BLOCK_LIMIT, BLOCK_LIMIT - 2)
    last = block.address(BLOCK_LIMIT - 1)
    assert block.offset(last) == BLOCK_LIMIT - 1
    assert block.offset(str(ip_address(last) + 1)) is None
    with pytest.raises(ValueError, match="outside"):
        block.hold(BLOCK_LIMIT, -1)
    began = time.perf_counter()
    for i in range(BLOCK_LIMIT - 2):
        assert take(block, i) == i + 2
    # Generous: it takes some 20 ms; walking the block would be minutes (/112) or for ever (/64).
    assert time.perf_counter() - began < 5
    assert (block.choose(0), block.free) == (None, 0)
    block.release(4000, None)
    assert block.choose(0) == 4000


class Against(RuleBasedStateMachine):
    """A /28 beside a model that is a dict and a walk."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Block[str] = Block("10.0.0.16/28")
        self.held: dict[int, str] = {}
        self.rest: dict[int, float] = {}
        self.reserved: set[int] = set()
        self.last = -1
        self.now = 0.0
        self.n = 0

    def asleep(self) -> dict[int, float]:
        return {o: t for o, t in self.rest.items() if self.now - t < REST}

    @rule()
    def take(self) -> None:
        order = [(self.last + 1 + i) % 16 if self.last < 15 else i for i in range(16)]
        free = [o for o in order if o not in self.held and o not in self.asleep() and o not in self.reserved]
        got = self.block.choose(self.now)
        assert got == (free[0] if free else None)
        if got is not None:
            self.hold(got)

    @rule()
    def take_resting(self) -> None:
        asleep = [o for o in self.asleep() if o not in self.reserved]
        got = self.block.choose(self.now, resting=True)
        assert (got is None) == (not asleep)
        if got is not None:
            assert self.rest[got] == min(self.rest[o] for o in asleep)
            self.hold(got)

    @rule(offset=st.integers(0, 15))
    def hold_by_name(self, offset: int) -> None:
        if offset in self.held:
            with pytest.raises(Held):
                self.block.hold(offset, "another")
        else:
            self.hold(offset)

    def hold(self, offset: int) -> None:
        self.n += 1
        self.block.hold(offset, f"o{self.n}")
        self.held[offset] = f"o{self.n}"
        self.rest.pop(offset, None)
        self.last = offset

    @rule(offset=st.integers(0, 15), rest=st.booleans())
    def release(self, offset: int, rest: bool) -> None:
        if offset in self.held:
            self.block.release(offset, self.now if rest else None)
            del self.held[offset]
            if rest:
                self.rest[offset] = self.now

    @rule(seconds=st.sampled_from([0.5, 10.0, 29.0, 30.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(parts=st.lists(st.tuples(st.integers(0, 15), st.sampled_from([32, 31, 30])), max_size=3))
    def reserve(self, parts: list[tuple[int, int]]) -> None:
        starts = [(first & -(1 << (32 - length)), length) for first, length in parts]
        self.block.reserve([f"10.0.0.{16 + first}/{length}" for first, length in starts])
        self.reserved = {first + i for first, length in starts for i in range(1 << (32 - length))}

    @invariant()
    def counts(self) -> None:
        assert dict(self.block.owners) == self.held
        assert self.block.free == sum(1 for o in range(16) if o not in self.held and o not in self.reserved)
        assert self.block.resting(self.now) == len(self.asleep())


TestAgainstAModel = Against.TestCase


@given(st.sets(st.integers(0, 63)), st.integers(0, 63))
def test_the_first_gap_is_the_first_gap(busy: set[int], last: int) -> None:
    block: Block[int] = Block("10.0.0.0/26")
    for offset in busy:
        block.hold(offset, offset)
    if last in busy:
        block.release(last, None)
        block.hold(last, last)
        order = [*range(last + 1, 64), *range(64)]
        assert block.choose(0) == next((o for o in order if o not in busy), None)
