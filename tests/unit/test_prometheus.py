"""The text that Prometheus reads (its exposition format, version 0.0.4)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.metrics import Calls, State, families
from cni.prometheus import Family, Histogram, Sample, labelled, one, render
from ipam.model import BlockView, Figures
from tests.promtext import LINE, check
from tests.promtext import value as value_of


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


def test_what_takes_time_is_observed_however_it_ends() -> None:
    histogram, times = Histogram((1.0,)), iter((10.0, 10.5, 20.0, 22.0))
    with histogram.timing(lambda: next(times)):
        pass
    with pytest.raises(ZeroDivisionError), histogram.timing(lambda: next(times)):
        raise ZeroDivisionError
    *_, total, count = histogram.samples({})
    assert (total.value, count.value) == (2.5, 2)


def test_the_cni_servers_page_is_well_formed() -> None:
    calls = Calls()
    calls.observe("ADD", 0, 0.002)
    calls.observe("TEA", 4, 0.1)
    calls.journal.observe(0.00002)
    state = State(
        blocks=(BlockView("10.244.0.0/26", "pool-0", 3, 61, "ready"), BlockView("fd00::/122", "pool-1", 3, 61, "new")),
        conditions=frozenset({"PoolExhausted"}),
        figures=Figures(3, 400, 0.1),
        ready=True,
        source_check=True,
        source_check_drops=2,
        store_requests={"get": 1},
        store_failures={},
        events_written=1,
        events_dropped=0,
        resident=1 << 25,
    )
    found = check(render((*calls.families(), *families(state))))
    assert value_of(found, "underlay_cni_calls_total", verb="other", code="4") == 1
    assert value_of(found, "underlay_ipam_journal_write_seconds_bucket", le="0.0001") == 1
    assert value_of(found, "underlay_ipam_addresses", pool="pool-1", family="ipv6", state="free") == 61


@pytest.mark.parametrize(
    ("families_", "why"),
    [
        ((one("a", "counter", "H.", 1),), "is a counter"),
        ((one("a_total", "gauge", "H.", 1),), "is a gauge"),
        ((one("a", "gauge", "H.", 1), one("a", "gauge", "H.", 1)), "twice"),
        ((one("a", "gauge", "no sentence", 1),), "sentence"),
        ((labelled("a", "gauge", "H.", "bad-label", {"x": 1}),), "no sample"),
        ((Family("a", "gauge", "H.", (Sample(1, suffix="_x"),)),), "stands in a"),
        ((Family("a", "histogram", "H.", (Sample(1, {"le": "+Inf"}, "_bucket"), Sample(2, {}, "_count"))),), "last"),
    ],
)
def test_the_check_of_a_page_is_able_to_fail(families_: tuple[Family, ...], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check(render(families_))
