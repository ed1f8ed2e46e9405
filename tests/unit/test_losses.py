"""The account of one path: what is lost, how long a gap is, and when packets are due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lab.losses import Gap, Losses, Tally, Timetable

GRACE = 1.0


def told(*sent: tuple[float, float | None], settled: float = 1000.0) -> Tally:
    """The tally after packets that were sent and arrived (or not) at these times."""
    losses = Losses(GRACE)
    events: list[tuple[float, int, int]] = []
    for number, (at, there) in enumerate(sent):
        events.append((at, 0, number))
        if there is not None:
            events.append((there, 1, number))
    for at, what, number in sorted(events):
        losses.settle(at)
        if what:
            losses.arrived(number, at)
        else:
            assert losses.sent(at) == number
    losses.settle(settled)
    return losses.tally()


def test_nothing_lost() -> None:
    assert told((0, 0.1), (1, 1.1), (2, 2.1)) == Tally(sent=3, lost=0, gaps=0, longest=None, open=False)


def test_a_gap_lasts_from_the_first_lost_to_the_next_that_arrived() -> None:
    found = told((0, 0.1), (0.5, None), (1, None), (1.5, 1.6), (2, 2.1))
    assert found == Tally(sent=5, lost=2, gaps=1, longest=Gap(0.5, 1.0, 2), open=False)


def test_the_longest_of_two_gaps_is_told() -> None:
    found = told((0, None), (1, 1.1), (2, None), (3, None), (4, 4.1), (5, None), (6, 6.1))
    assert found == Tally(sent=7, lost=4, gaps=3, longest=Gap(2, 2.0, 2), open=False)


def test_a_gap_without_an_end_is_open_and_lasts_to_the_last_that_was_sent() -> None:
    assert told((0, 0.1), (1, None), (4, None)) == Tally(sent=3, lost=2, gaps=1, longest=Gap(1, 3.0, 2), open=True)


def test_what_comes_after_the_grace_is_lost_whoever_settles_when() -> None:
    losses = Losses(GRACE)
    number = losses.sent(10.0)
    losses.arrived(number, 11.0)  # before anybody settled
    losses.settle(11.0)
    assert losses.tally().lost == 1
    assert told((10.0, 10.99)).lost == 0


def test_what_comes_twice_or_was_never_sent_counts_for_nothing() -> None:
    losses = Losses(GRACE)
    for number in (0, 5):
        losses.arrived(number, 0.0)
    losses.sent(1.0)
    losses.sent(1.1)
    for number in (1, 1, 0, 0, 1):
        losses.arrived(number, 1.2)
    assert losses.tally() == Tally(sent=2, lost=0, gaps=0, longest=None, open=False)


def test_what_is_waited_for_is_neither_sent_nor_lost_yet() -> None:
    losses = Losses(GRACE)
    losses.sent(1.0)
    losses.settle(1.5)
    assert losses.tally() == Tally(sent=0, lost=0, gaps=0, longest=None, open=False)


packets = st.lists(
    st.tuples(st.integers(1, 40), st.none() | st.integers(0, 250)), max_size=60
)  # hundredths: since the one before; under way


@given(packets)
def test_it_is_what_one_finds_by_hand(rows: list[tuple[int, int | None]]) -> None:
    """Whatever comes late, early, in disorder: the same as from the whole list at once."""
    at, sent = 0, []
    for step, way in rows:
        at += step
        sent.append((at / 100, None if way is None else (at + way) / 100))
    fate = [there is not None and there - begin < GRACE for begin, there in sent]
    gaps: list[tuple[float, float, int]] = []
    for number, ((begin, _), good) in enumerate(zip(sent, fate, strict=True)):
        if not good and (number == 0 or fate[number - 1]):
            gaps.append((begin, begin, 0))
        if not good:
            gaps[-1] = (gaps[-1][0], begin, gaps[-1][2] + 1)
        elif number and not fate[number - 1]:
            gaps[-1] = (gaps[-1][0], begin, gaps[-1][2])
    found = told(*sent)
    assert (found.sent, found.lost, found.gaps) == (len(sent), fate.count(False), len(gaps))
    assert found.open == bool(fate and not fate[-1])
    assert (found.longest.seconds if found.longest else 0.0) == max((b - a for a, b, _ in gaps), default=0.0)


@given(st.integers(1, 300), st.floats(0.001, 0.1))
def test_it_never_holds_more_than_a_grace(count: int, period: float) -> None:
    losses = Losses(GRACE)
    for number in range(count):
        losses.settle(number * period)
        losses.sent(number * period)
        assert len(losses._waiting) <= GRACE / period + 2


def test_deadlines_are_absolute_and_lateness_is_seen() -> None:
    times = Timetable(100.0, 0.01, 2)
    assert list(times.due(99.9)) == []
    assert list(times.due(100.0)) == [(0, True)]
    assert times.next == 100.005
    assert list(times.due(100.012)) == [(1, True), (0, True)]
    assert round(times.late, 6) == 0.007
    # The next is due when it would have been without that.
    assert round(times.next, 6) == 100.015


def test_what_is_a_period_late_is_passed_over() -> None:
    times = Timetable(0.0, 0.01, 2)
    found = list(times.due(0.032))
    assert found == [(0, False), (1, False), (0, False), (1, False), (0, False), (1, True), (0, True)]
    assert times.late == 0.032


@given(st.lists(st.floats(0, 0.05), max_size=50), st.integers(1, 10))
def test_each_slice_comes_once_a_period_however_late(steps: list[float], slices: int) -> None:
    times, now, given_out = Timetable(0.0, 0.01, slices), 0.0, []
    for step in steps:
        now += step
        given_out += [place for place, _ in times.due(now)]
    assert given_out == [number % slices for number in range(len(given_out))]
    assert not given_out or len(given_out) in (int(now / (0.01 / slices)) + n for n in (0, 1, 2))
