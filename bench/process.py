"""What a process of this machine has used: time on a CPU, and memory (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path

from bench.rack import kib

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of the process since its start."""
    return _ticks(Path(f"/proc/{pid}/stat").read_text()) / _TICKS


def resident_mb(pid: int) -> float:
    """What it has resident now."""
    return kib(Path(f"/proc/{pid}/smaps_rollup").read_text(), "Rss") / 1024


def _ticks(stat: str) -> int:
    """The second field is the program's name, which may have blanks and brackets in it."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
