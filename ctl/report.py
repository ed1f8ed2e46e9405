"""What ``ipam check`` found, as it is written, read again and shown. Pure."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from ctl.failures import Usage
from ctl.finding import Finding
from ctl.tables import Table

VERSION: Final = "underlay.network/ipam-check/v1"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``nodes`` is what was asked for (empty: all), ``local`` the node whose journal and kernel were asked ("": none).
    ``unseen`` has a line for each thing that could not be looked at: then ``findings`` may not be all."""

    version: Literal["underlay.network/ipam-check/v1"]
    at: str
    nodes: tuple[str, ...]
    local: str
    looked: tuple[str, ...]
    unseen: tuple[str, ...]
    findings: tuple[Finding, ...]


def write(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def read(text: bytes, source: str) -> Report:
    """The report that ``write`` wrote. Raises Usage, naming ``source``."""
    try:
        return msgspec.json.decode(text, type=Report)
    except msgspec.DecodeError as e:
        raise Usage([f"{source}: no report: {e}: write one with 'underlayctl ipam check -o json'"]) from None


def page(report: Report) -> Table:
    """A row for each finding."""
    rows = tuple((f.kind, f.object, f.address, f.what) for f in report.findings)
    return Table(("KIND", "OBJECT", "ADDRESS", "WHAT"), rows)


def remedies(report: Report) -> list[str]:
    """What to do, each once, with the kind that it is for."""
    return list(dict.fromkeys(f"{f.kind}: {f.remedy}" for f in report.findings))


def summary(report: Report) -> str:
    """The last line: how many findings in what."""
    number = len(report.findings)
    said = f"{number} finding{'' if number == 1 else 's'}" if number else "no finding" if report.unseen else "clean"
    said += f" about {', '.join(report.nodes)}" if report.nodes else ""
    return f"{said}: looked at {', '.join(report.looked) or 'nothing'}"
