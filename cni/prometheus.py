"""Prometheus' text format, version 0.0.4, as far as we speak it. Pure.

Its client library would cost the CNI server 3.1 MB resident (1.4 beside the API server's client), for what is a page
here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

import msgspec

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
Kind = Literal["gauge", "counter", "histogram"]

#: Seconds, upper bounds: an ADD takes half a millisecond, and waits for a block 5 s at most.
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Sample(msgspec.Struct, frozen=True):
    """One line: the family's name with ``suffix`` behind it, labels, and the value."""

    value: float
    labels: Mapping[str, str] = {}
    suffix: str = ""


class Family(msgspec.Struct, frozen=True):
    """What is measured under one name, and its lines."""

    name: str
    kind: Kind
    help: str
    samples: tuple[Sample, ...]


class Histogram:
    """How often a value fell below each of ``bounds`` (ascending). ``observe`` costs a microsecond."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @contextmanager
    def timing(self, monotonic: Callable[[], float]) -> Iterator[None]:
        """Observes how many seconds the block takes, however it ends."""
        begun = monotonic()
        try:
            yield
        finally:
            self.observe(monotonic() - begun)

    def samples(self, labels: Mapping[str, str]) -> tuple[Sample, ...]:
        """Buckets, which add up, then sum and count."""
        below, found = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            found.append(Sample(below, {**labels, "le": _number(bound)}, "_bucket"))
        return (*found, Sample(self._sum, labels, "_sum"), Sample(below, labels, "_count"))


def one(name: str, kind: Kind, text: str, value: float) -> Family:
    """A family of one sample without labels."""
    return Family(name, kind, text, (Sample(value),))


def labelled(name: str, kind: Kind, text: str, label: str, values: Mapping[str, float]) -> Family:
    """One sample for each value of the one ``label``."""
    return Family(name, kind, text, tuple(Sample(value, {label: key}) for key, value in sorted(values.items())))


def of_store(requests: Mapping[str, float], failures: Mapping[str, float]) -> tuple[Family, Family]:
    """What a process of ours asked its store for, by verb."""
    return (
        labelled("underlay_store_requests_total", "counter", "Requests, by verb.", "verb", requests),
        labelled(
            "underlay_store_failures_total",
            "counter",
            "Requests that the store did not answer, and watches that must begin anew, by verb.",
            "verb",
            failures,
        ),
    )


def render(families: Iterable[Family]) -> bytes:
    """The page that a scrape gets: each family with help and type, also one that has no sample at present."""
    lines: list[str] = []
    for family in families:
        lines += (f"# HELP {family.name} {_escaped(family.help)}", f"# TYPE {family.name} {family.kind}")
        lines += (f"{family.name}{s.suffix}{_labels(s.labels)} {_number(s.value)}" for s in family.samples)
    return "".join(f"{line}\n" for line in lines).encode()


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    inside = ",".join(f'{name}="{_quoted(value)}"' for name, value in labels.items())
    return f"{{{inside}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)
