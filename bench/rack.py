"""The lab of four nodes: how long it takes to come up, and what the three processes of a node weigh in it.

A process weighs what it has resident, and what its children (the relay, the reaper) have for themselves alone; what
they share with it counts once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

LAB = str(Path(sys.executable).parent / "underlay-lab")
UP_LIMIT = 180.0
PARTS = ("cni", "agent", "exabgp")


class BenchError(Exception):
    """The lab did not come up; the message has what it printed."""


def figures(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """``lab.nodes4.up_s`` and ``memory.*_mb``, medians over the nodes. Raises BenchError."""
    say("lab: four nodes up, then what they weigh")
    where = ["--dir", str(folder / "lab")]
    try:
        begin = time.perf_counter()
        done = _lab("up", *where, "--racks", "2", "--nodes", "2", check=False)
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            raise BenchError(f"underlay-lab up ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        nodes = json.loads(_lab("status", *where, "-o", "json").stdout)["nodes"]
        weights = [
            {part: _weight(where, node["name"], node["processes"][part]["pid"]) for part in PARTS} for node in nodes
        ]
    finally:
        _lab("down", *where, check=False)
    middle = {part: median(weight[part] for weight in weights) for part in PARTS}
    return {
        "lab.nodes4.up_s": seconds,
        **{f"memory.{part}_mb": middle[part] / 1024 for part in PARTS},
        "memory.total_mb": sum(middle.values()) / 1024,
    }


def _weight(where: list[str], node: str, pid: int) -> int:
    """KiB of the process and of what only its children have."""
    weight = kib(_read(where, node, pid, "smaps_rollup"), "Rss")
    left = _children(where, node, pid)
    while left:
        child = left.pop()
        weight += kib(_read(where, node, child, "smaps_rollup"), "Private_Clean|Private_Dirty")
        left += _children(where, node, child)
    return weight


def _children(where: list[str], node: str, pid: int) -> list[int]:
    return [int(word) for word in _read(where, node, pid, f"task/{pid}/children").split()]


def _read(where: list[str], node: str, pid: int, file: str) -> str:
    """A file of /proc, where the lab's own process numbers count."""
    return _lab("exec", *where, node, "cat", f"/proc/{pid}/{file}").stdout


def kib(text: str, fields: str) -> int:
    """The sum of these fields (a regular expression) in a file of proc(5), in KiB."""
    return sum(int(kib) for kib in re.findall(rf"^(?:{fields}):\s+(\d+) kB$", text, flags=re.MULTILINE))


def _lab(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LAB, *words], capture_output=True, text=True, check=False, timeout=UP_LIMIT)
    if check and done.returncode != 0:
        raise BenchError(f"underlay-lab {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    return done
