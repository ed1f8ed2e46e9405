"""What is made of many times. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple


class Times(NamedTuple):
    """Seconds, in the order in which they were measured."""

    values: tuple[float, ...]

    @property
    def p50(self) -> float:
        return median(self.values)

    @property
    def p99(self) -> float:
        return percentile(self.values, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest value that at least ``percent`` of all do not exceed."""
    ranked = sorted(values)
    rank = -(-len(ranked) * percent // 100)
    return ranked[max(0, int(rank) - 1)]
