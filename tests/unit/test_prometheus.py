"""The text that Prometheus reads (its exposition format, version 0.0.4)."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.prometheus import Family, Histogram, Sample, render

#: A sample line, as the format's grammar has it.
LINE = re.compile(
    r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{[a-zA-Z_][a-zA-Z0-9_]*="(\\\\|\\n|\\"|[^"\\\n])*"'
    r'(,[a-zA-Z_][a-zA-Z0-9_]*="(\\\\|\\n|\\"|[^"\\\n])*")*\})? (\+Inf|-?[0-9.]+(e[-+]?[0-9]+)?)'
)


def text(*families: Family) -> str:
    return render(families).decode()


def test_a_family_has_help_type_and_samples() -> None:
    family = Family("a_total", "counter", "How many.", (Sample(3, {"pool": "v4"}), Sample(0.25)))
    assert text(family) == '# HELP a_total How many.\n# TYPE a_total counter\na_total{pool="v4"} 3\na_total 0.25\n'


def test_a_family_without_samples_is_told_of_all_the_same() -> None:
    assert text(Family("a", "gauge", "h", ())) == "# HELP a h\n# TYPE a gauge\n"


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_whatever_a_label_holds_a_sample_is_one_line_of_the_grammar(label: str, value: float) -> None:
    lines = text(Family("a", "gauge", f"h {label}", (Sample(value, {"l": label}),))).rstrip("\n").split("\n")
    assert len(lines) == 3
    assert LINE.fullmatch(lines[2]), lines[2]
    assert float(lines[2].rpartition(" ")[2]) == pytest.approx(value)


def test_a_label_is_quoted_so_that_it_can_be_read_back() -> None:
    assert r'{l="a\"b\\c\nd"}' in text(Family("a", "gauge", "h", (Sample(1, {"l": 'a"b\\c\nd'}),)))


@given(st.lists(st.floats(min_value=0, max_value=20, allow_nan=False)))
def test_buckets_add_up_and_end_with_all(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0))
    for value in values:
        histogram.observe(value)
    *buckets, total, count = histogram.samples({"verb": "ADD"})
    assert [(b.labels["le"], b.value) for b in buckets] == [
        ("0.1", sum(v <= 0.1 for v in values)),
        ("1", sum(v <= 1 for v in values)),
        ("+Inf", len(values)),
    ]
    assert (count.suffix, count.value) == ("_count", len(values))
    assert total.value == pytest.approx(sum(values))
