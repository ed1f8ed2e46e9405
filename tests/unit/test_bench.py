"""The arithmetic of the figures, and that a program that fails is no figure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import rack
from bench.spawn import SpawnError, timed
from bench.stats import Times, percentile


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (50, 50), (50.5, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_the_nearest_rank(percent: float, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


def test_percentile_of_one_value() -> None:
    assert percentile([7.0], 99) == 7.0
    assert Times((7.0,)).p50 == Times((7.0,)).p99 == 7.0


def test_a_program_is_timed_with_what_it_reads_and_prints(tmp_path: Path) -> None:
    said, out = tmp_path / "in", tmp_path / "out"
    said.write_text("hello")
    assert 0 < timed(["/bin/cat"], {}, stdin=said, stdout=out) < 10
    assert out.read_text() == "hello"


def test_a_program_that_fails_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="ended with 3: why"):
        timed(["/bin/sh", "-c", "echo why; exit 3"], {}, stdin=Path(os.devnull), stdout=tmp_path / "out")


def test_memory_is_read_from_smaps() -> None:
    text = (
        "Rss:        2048 kB\nPss:    1 kB\nPrivate_Clean:    4 kB\nPrivate_Dirty:      8 kB\nPrivate_Hugetlb: 1 kB\n"
    )
    assert rack.kib(text, "Rss") == 2048
    assert rack.kib(text, "Private_Clean|Private_Dirty") == 12
