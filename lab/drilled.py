"""What a drill found, as values and as text. Pure.

A path is an ordered pair in one family: from a pod to a pod, or from a node itself to a pod of another node. Packets
go one way, so a loss has a direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from lab.topology import node_of_pod

_WITHIN = "within a node"
#: Paths that are named one by one.
_NAMED = 5


class PathLoss(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds. ``gap`` is the longest time from the sending of a lost packet to the sending of the next that
    arrived, ``at`` is when that was, after the drill began. ``unsent`` packets were never sent, as the machine was
    busy. ``problem`` says what was wrong with packets that came and count as lost."""

    sender: str
    receiver: str
    family: int
    sent: int
    unsent: int
    lost: int
    gaps: int
    gap: float
    at: float
    problem: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``struck`` are the nodes that the drill does something to, ``name_struck`` what to call them. Of a planned drill
    no path may lose a packet, of another one those between other nodes. ``unrest`` says what was not again as before
    in the end; ``late`` and ``dropped`` are the measure's own faults: seconds, and packets that are among the lost."""

    drill: str
    topology: str
    planned: bool
    struck: tuple[str, ...]
    name_struck: str
    seconds: float
    paths: tuple[PathLoss, ...]
    unrest: str = ""
    late: float = 0.0
    dropped: int = 0

    @property
    def sent(self) -> int:
        return sum(path.sent for path in self.paths)

    @property
    def lost(self) -> int:
        return sum(path.lost for path in self.paths)

    @property
    def wrongly_lost(self) -> int:
        """Packets lost where nothing is to be lost."""
        return sum(path.lost for path in self.paths if self.planned or not self.concerned(path))

    @property
    def good(self) -> bool:
        return not self.wrongly_lost and not self.unrest and all(path.sent for path in self.paths)

    def concerned(self, path: PathLoss) -> bool:
        return not {node_of(path.sender), node_of(path.receiver)}.isdisjoint(self.struck)


class Group(msgspec.Struct, frozen=True):
    name: str
    paths: tuple[PathLoss, ...]

    def lost(self, family: int) -> int:
        return sum(path.lost for path in self.paths if path.family == family)

    def gap(self, family: int) -> float:
        return max((path.gap for path in self.paths if path.family == family), default=0.0)


def node_of(member: str) -> str:
    return member if member.startswith("node-") else node_of_pod(member)


def groups(report: Report) -> tuple[Group, ...]:
    """The paths by how they lie to what was struck; groups without a path are left out."""
    found: dict[str, list[PathLoss]] = {name: [] for name in _names(report)}
    for path in report.paths:
        found[_group(path, report)].append(path)
    return tuple(Group(name, tuple(paths)) for name, paths in found.items() if paths)


def text(report: Report, *, each: bool = False) -> str:
    """A table of the groups, or of each path, and the verdict as the last line."""
    rows: list[Sequence[str]] = [("paths", "", "sent", "IPv4 lost", "longest", "IPv6 lost", "longest")]
    for group in groups(report):
        rows.append(_row(group.name, group))
        if each:
            pairs: dict[tuple[str, str], list[PathLoss]] = {}
            for path in group.paths:
                pairs.setdefault((path.sender, path.receiver), []).append(path)
            rows += [_row(f"  {a} to {b}", Group("", tuple(paths))) for (a, b), paths in pairs.items()]
    return "\n".join([*_aligned(rows), *_notes(report), verdict(report)])


def verdict(report: Report) -> str:
    """One line: the drill, what was lost, and whether that is as it must be."""
    said = f"{report.drill}: {report.lost} of {report.sent} packets lost in {report.seconds:.0f} s"
    if report.wrongly_lost and report.planned:
        return f"{said}: FAILED, none was to be lost"
    if report.wrongly_lost:
        return f"{said}: FAILED, {report.wrongly_lost} of them where {report.name_struck} had no part"
    if report.unrest:
        return f"{said}: FAILED, in the end {report.unrest}"
    if not report.good:
        return f"{said}: FAILED, some path was not measured"
    if report.planned:
        return f"{said}: good"
    return f"{said}, none where {report.name_struck} had no part; longest {_seconds(longest(report))}"


def longest(report: Report) -> float:
    return max((path.gap for path in report.paths), default=0.0)


def markdown(reports: Sequence[Report]) -> str:
    """A table with a row a drill, for docs/drills.md."""
    lines = ["| drill | topology | packets sent | lost | longest | where |", "|---|---|---:|---:|---:|---|"]
    for report in reports:
        hit = [f"{g.name}: {g.lost(4) + g.lost(6)}" for g in groups(report) if g.lost(4) + g.lost(6)]
        name = f"`{report.drill}`" if report.good else f"`{report.drill}` (FAILED)"
        lines.append(
            f"| {name} | {report.topology} | {report.sent} | {report.lost} | {_seconds(longest(report))} "
            f"| {'; '.join(hit)} |"
        )
    return "\n".join(lines)


def _names(report: Report) -> Iterator[str]:
    name = report.name_struck
    yield _WITHIN
    yield f"from {name}"
    yield f"to {name}"
    yield f"between {name}" if len(report.struck) > 1 else ""
    yield "between the others" if report.struck else "between nodes"


def _group(path: PathLoss, report: Report) -> str:
    a, b = node_of(path.sender), node_of(path.receiver)
    names = tuple(_names(report))
    if a == b:
        return names[0]
    match a in report.struck, b in report.struck:
        case True, True:
            return names[3]
        case True, False:
            return names[1]
        case False, True:
            return names[2]
    return names[4]


def _row(name: str, group: Group) -> tuple[str, ...]:
    return (
        name,
        str(len(group.paths)),
        str(sum(path.sent for path in group.paths)),
        str(group.lost(4)),
        _seconds(group.gap(4)),
        str(group.lost(6)),
        _seconds(group.gap(6)),
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()


def _notes(report: Report) -> Iterator[str]:
    unsent = sum(path.unsent for path in report.paths)
    if unsent:
        yield (
            f"{unsent} packets were not sent: this machine was busy (late by up to {report.late * 1000:.0f} ms); the "
            "others tell of the rest of the time"
        )
    if report.dropped:
        yield f"{report.dropped} of the lost are the drill's own: its queues were full, as this machine was busy"
    strange = (p for p in report.paths if p.problem or (p.lost and (report.planned or not report.concerned(p))))
    worst = sorted(strange, key=lambda path: -path.lost)
    for path in worst[:_NAMED]:
        way = f"{path.sender} > {path.receiver}, IPv{path.family}"
        times = (
            f"{path.lost} in {path.gaps} gap{'s' * (path.gaps != 1)}, the longest {path.gap:.2f} s at {path.at:.2f} s"
        )
        yield f"lost: {way}: {times}" + (f" ({path.problem})" if path.problem else "")
