"""What the CNI server tells Prometheus. Pure: it counts, and puts figures that others have into families."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from cni.prometheus import Family, Histogram, Sample, labelled, of_store, one
from cni.spec import COMMANDS
from ipam.model import CONDITIONS, BlockView, Figures
from ipam.pool import family_of

#: Seconds: a journal lies in memory, and takes a record in some microseconds.
_JOURNAL: Final = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0)
_PHASES: Final = ("new", "ready", "releasing", "deleting", "marked", "lost")


class Calls:
    """Counts what shims asked, by verb and by the CNI code of the answer (0: success), and how long it took; and how
    long each write of the ``journal`` did."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, int], int] = {}
        self.journal = Histogram(_JOURNAL)
        self._times = {verb: Histogram() for verb in COMMANDS}

    def observe(self, verb: str, code: int, seconds: float) -> None:
        """One call that was answered. What is no verb counts as ``other``."""
        times = self._times.get(verb)
        if times is None:
            verb = "other"
        else:
            times.observe(seconds)
        key = (verb, code)
        self._codes[key] = self._codes.get(key, 0) + 1

    def families(self) -> Iterable[Family]:
        yield Family(
            "underlay_cni_calls_total",
            "counter",
            "Calls answered, by verb and CNI code (0: success).",
            tuple(
                Sample(count, {"verb": verb, "code": str(code)}) for (verb, code), count in sorted(self._codes.items())
            ),
        )
        yield Family(
            "underlay_cni_call_seconds",
            "histogram",
            "From the connection to the answer, by verb.",
            tuple(s for verb, times in self._times.items() for s in times.samples({"verb": verb})),
        )
        yield Family(
            "underlay_ipam_journal_write_seconds",
            "histogram",
            "One write of the journal, before which no address is used.",
            self.journal.samples({}),
        )


class State(msgspec.Struct, frozen=True):
    """What is so at the moment of a scrape. ``conditions`` has the types of those that hold."""

    blocks: tuple[BlockView, ...]
    conditions: frozenset[str]
    figures: Figures
    ready: bool
    source_check: bool
    source_check_drops: int
    store_requests: Mapping[str, int]
    store_failures: Mapping[str, int]
    events_written: int
    events_dropped: int
    resident: int


def families(state: State) -> Iterable[Family]:
    """The families of a scrape, but for ``Calls``'."""
    yield one("underlay_cni_ready", "gauge", "1 if new addresses are handed out.", state.ready)
    yield one(
        "underlay_cni_source_check", "gauge", "1 while the kernel drops what is not from its pod.", state.source_check
    )
    yield one(
        "underlay_cni_source_check_drops_total",
        "counter",
        "Packets that pods sent from addresses that are not theirs.",
        state.source_check_drops,
    )
    yield Family(
        "underlay_ipam_addresses",
        "gauge",
        "Addresses of this node's blocks, by pool and family.",
        tuple(_addresses(state.blocks)),
    )
    conditions = {kind: float(kind in state.conditions) for kind in CONDITIONS}
    phases = dict.fromkeys(_PHASES, 0)
    for block in state.blocks:
        phases[block.phase] += 1
    yield labelled("underlay_ipam_blocks", "gauge", "Blocks of this node, by phase.", "phase", phases)
    yield labelled("underlay_ipam_condition", "gauge", "1 while the condition holds.", "type", conditions)
    yield one("underlay_ipam_leases", "gauge", "Attachments that have addresses.", state.figures.leases)
    yield one("underlay_ipam_journal_bytes", "gauge", "Size of the journal.", state.figures.journal_bytes)
    yield one(
        "underlay_ipam_mirror_lag_seconds",
        "gauge",
        "Age of the oldest change that is not in the store yet.",
        state.figures.mirror_lag,
    )
    yield from of_store(state.store_requests, state.store_failures)
    yield one("underlay_events_written_total", "counter", "Writes of Events.", state.events_written)
    yield one("underlay_events_dropped_total", "counter", "Events that were not written.", state.events_dropped)
    yield one("process_resident_memory_bytes", "gauge", "Resident memory of this process.", state.resident)


def _addresses(blocks: Iterable[BlockView]) -> Iterable[Sample]:
    counts: dict[tuple[str, str], list[int]] = {}
    for block in blocks:
        found = counts.setdefault((block.pool, f"ipv{family_of(block.cidr)}"), [0, 0])
        found[0] += block.used
        found[1] += block.free
    for (pool, family), (used, free) in sorted(counts.items()):
        labels = {"pool": pool, "family": family}
        yield Sample(used, {**labels, "state": "used"})
        yield Sample(free, {**labels, "state": "free"})
