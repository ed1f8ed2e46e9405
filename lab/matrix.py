"""Who reaches whom, as values and as text. Pure.

A path is an ordered pair of pods in one family. It is answered when the receiver saw the sender's own address as the
source, its answer came back, and came from the receiver's own address.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from lab.topology import node_of_pod

#: Up to so many pods each has a row of its own; beyond, a row is a node.
ROWS = 24


class Pod(msgspec.Struct, frozen=True):
    """Who takes part, with its addresses (at most one a family)."""

    name: str
    addresses: tuple[str, ...]

    def address(self, family: int) -> str:
        return next((a for a in self.addresses if (":" in a) == (family == 6)), "")


class Path(msgspec.Struct, frozen=True):
    """Probes from one pod to another in one family. ``problem`` says what was wrong with an answer that came."""

    sender: str
    receiver: str
    family: int
    sent: int
    answered: int
    problem: str = ""

    @property
    def good(self) -> bool:
        return self.answered > 0 and not self.problem


class Report(msgspec.Struct, frozen=True):
    nodes: int
    pods: tuple[Pod, ...]
    paths: tuple[Path, ...]

    @property
    def answered(self) -> int:
        return sum(path.good for path in self.paths)

    @property
    def lost(self) -> int:
        """Probes without an answer."""
        return sum(path.sent - path.answered for path in self.paths)

    @property
    def good(self) -> bool:
        return self.answered == len(self.paths) and self.lost == 0


def summary(report: Report) -> str:
    return (
        f"lab: {len(report.pods)} pods on {report.nodes} nodes, {report.answered}/{len(report.paths)} paths answered "
        f"(IPv4 and IPv6), {report.lost} lost"
    )


def table(report: Report) -> str:
    """Senders down, receivers across: ● both families, 4 or 6 that one alone, ✗ neither. Below, what was wrong."""
    if not report.paths:
        return "nobody to reach: a path needs two pods"
    group = (lambda pod: pod) if len(report.pods) <= ROWS else node_of_pod
    cells: dict[tuple[str, str], dict[int, list[bool]]] = {}
    for path in report.paths:
        cell = cells.setdefault((group(path.sender), group(path.receiver)), {4: [], 6: []})
        cell[path.family].append(path.good and path.answered == path.sent)
    names = list(dict.fromkeys(group(pod.name) for pod in report.pods))
    return "\n".join([*_rows(names, cells), *_problems(report.paths)])


def _rows(names: list[str], cells: dict[tuple[str, str], dict[int, list[bool]]]) -> Iterator[str]:
    corner = "from / to"
    margin = max(len(corner), *(len(name) for name in names))
    short = [name.partition("-")[2] for name in names]
    widths = [max(len(s), 1) for s in short]
    yield f"{corner:<{margin}}  " + " ".join(s.center(w) for s, w in zip(short, widths, strict=True))
    for sender in names:
        marks = (_mark(cells.get((sender, receiver))) for receiver in names)
        yield f"{sender:<{margin}}  " + " ".join(m.center(w) for m, w in zip(marks, widths, strict=True)).rstrip()


def _mark(cell: dict[int, list[bool]] | None) -> str:
    if cell is None:
        return "·"
    v4, v6 = all(cell[4]), all(cell[6])
    return "●" if v4 and v6 else "4" if v4 else "6" if v6 else "✗"


def _problems(paths: Iterable[Path], *, limit: int = 8) -> Iterator[str]:
    bad = [path for path in paths if path.problem or path.answered < path.sent]
    for path in bad[:limit]:
        lost = f"{path.sent - path.answered} of {path.sent} lost"
        yield f"  {path.sender} to {path.receiver}, IPv{path.family}: {path.problem or lost}"
    if len(bad) > limit:
        yield f"  and {len(bad) - limit} more"
