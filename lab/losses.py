"""What became of the packets of one path, and when the next are due. Pure.

Packets are numbered in the order of their sending, and judged in that order: one that did not arrive within the grace
is lost. A gap is an unbroken row of lost packets; it lasts from the sending of its first to the sending of the next
packet that arrived. Times are seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec


class Gap(msgspec.Struct, frozen=True):
    """``at``: when the first of the lost was sent."""

    at: float
    seconds: float
    lost: int


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """``sent`` counts what has been judged. ``open``: the last one judged was lost, and ``longest`` may grow."""

    sent: int
    lost: int
    gaps: int
    longest: Gap | None
    open: bool


class Losses:
    """The ledger of one path. It holds no more than the packets of one grace."""

    __slots__ = ("_arrived", "_base", "_early", "_gap", "_gaps", "_grace", "_longest", "_lost", "_waiting")

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._base = 0
        #: When each packet from number ``_base`` on was sent.
        self._waiting: deque[float] = deque()
        #: Numbers that arrived while an older one is waited for.
        self._early: set[int] = set()
        self._arrived = self._lost = self._gaps = 0
        self._gap: Gap | None = None
        self._longest: Gap | None = None

    def sent(self, at: float) -> int:
        """A packet leaves; returns its number."""
        self._waiting.append(at)
        return self._base + len(self._waiting) - 1

    def arrived(self, number: int, at: float) -> None:
        """It was there at ``at``, or before. What comes twice, too late or was never sent changes nothing."""
        place = number - self._base
        if not 0 <= place < len(self._waiting) or at - self._waiting[place] >= self._grace:
            return
        if place:
            self._early.add(number)
            return
        self._come()
        while self._early and self._base in self._early:
            self._come()

    def settle(self, now: float) -> None:
        """Judges what was sent a grace ago. All that came before ``now`` must have been told."""
        while self._waiting:
            if self._base in self._early:
                self._come()
            elif now - self._waiting[0] >= self._grace:
                self._miss()
            else:
                return

    def tally(self) -> Tally:
        longest = self._longest
        if self._gap and (longest is None or self._gap.seconds > longest.seconds):
            longest = self._gap
        return Tally(
            sent=self._arrived + self._lost,
            lost=self._lost,
            gaps=self._gaps,
            longest=longest,
            open=self._gap is not None,
        )

    def _come(self) -> None:
        at = self._waiting.popleft()
        self._early.discard(self._base)
        self._base += 1
        self._arrived += 1
        if self._gap:
            gap = Gap(self._gap.at, at - self._gap.at, self._gap.lost)
            if self._longest is None or gap.seconds > self._longest.seconds:
                self._longest = gap
            self._gap = None

    def _miss(self) -> None:
        at = self._waiting.popleft()
        self._base += 1
        self._lost += 1
        if self._gap is None:
            self._gaps += 1
            self._gap = Gap(at, 0.0, 1)
        else:
            self._gap = Gap(self._gap.at, at - self._gap.at, self._gap.lost + 1)


class Timetable:
    """Each period has ``slices`` equal parts, and each of them something that is due at its begin. Deadlines are
    absolute: being late once does not make the next one late. What is a whole period late is passed over."""

    def __init__(self, start: float, period: float, slices: int) -> None:
        self._start = start
        self._slices = slices
        self._each = period / slices
        self._next = 0
        #: How late the worst one was, in seconds, passed over or not.
        self.late = 0.0

    def due(self, now: float) -> Iterator[tuple[int, bool]]:
        """Each slice that is due by ``now`` and was not given before, in order; False with one that is passed over."""
        while (at := self.next) <= now:
            self.late = max(self.late, now - at)
            yield self._next % self._slices, now - at < self._each * self._slices
            self._next += 1

    @property
    def next(self) -> float:
        """When the next one is due."""
        return self._start + self._next * self._each
