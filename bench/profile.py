"""Where the time of an ADD and of a DEL goes: medians of many calls, one after another.

The server is our own one with a clock at each part (``bench.profiled``), which costs it some 3 %. With ``against``,
another working copy is measured in turn with this one: before and after, in one run.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

from bench.plugins import PAUSE, POOL4, POOL6, ROOT, SHIM, BenchError, Plugin, underlay
from lab.net import Net

ROUNDS, CHUNK, WARM_UP = 300, 20, 10
HERE, THERE = "here", "there"
START, END, REST, WHOLE = "start of the shim, until its request is there", "answer, end of the shim", "rest", "in all"


def figures(
    folder: Path,
    say: Callable[[str], None],
    *,
    against: Path | None = None,
    rounds: int = ROUNDS,
    shim: Path = SHIM,
    pools: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Tells the tables; ``profile.ADD.p50_ms`` and its kin, and ratios to ``against``. BenchError, SpawnError."""
    trees = {HERE: ROOT} | ({THERE: against.resolve()} if against else {})
    shims = {HERE: shim, THERE: (against or ROOT) / "build" / "underlay-shim"}
    for name in trees:
        if not shims[name].exists():
            raise BenchError(f"{shims[name]} is missing: make shim")
    net = Net(folder)
    try:
        plugins = {}
        for name, tree in trees.items():
            program = ("-P", str(Path(__file__).with_name("profiled.py")), str(folder / f"{name}.log"))
            home, wanted = f"node-{name}", pools or {"pods-v4": POOL4, "pods-v6": POOL6}
            plugins[name] = underlay(net, home, folder / name, wanted, shim=shims[name], tree=tree, program=program)
        say(f"cni: profile of {rounds} rounds{f', in turn with {against}' if against else ''}")
        calls = _calls(net, plugins, rounds)
        records = {name: _records(folder / f"{name}.log") for name in plugins}
    finally:
        net.close()
    found: dict[str, float] = {}
    for command in ("ADD", "DEL"):
        parts = {name: split(calls[name, command], records[name][command]) for name in plugins}
        say(f"{command}, microseconds\n{table(parts)}\n")
        found[f"profile.{command.lower()}.p50_ms"] = parts[HERE][WHOLE] / 1000
        if against:
            found[f"profile.{command.lower()}.p50.vs_against"] = parts[HERE][WHOLE] / parts[THERE][WHOLE]
    return found


def _calls(net: Net, plugins: Mapping[str, Plugin], rounds: int) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """When each call began and ended, after the first ones."""
    calls: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    total = WARM_UP + rounds
    for first in range(0, total, CHUNK):
        chunk = range(first, min(first + CHUNK, total))
        pods = {(name, i): f"{name}-{i}" for i in chunk for name in plugins}
        for pod in pods.values():
            net.add(pod)
        time.sleep(PAUSE)
        for i in chunk:
            order = list(plugins) if i % 2 else list(reversed(plugins))
            for command in ("ADD", "DEL"):
                for name in order:
                    plugin, pod = plugins[name], pods[name, i]
                    begin = time.monotonic_ns()
                    seconds = plugin.run(command, pod)
                    calls[name, command].append((begin, begin + round(seconds * 1e9)))
                    if command == "DEL":
                        plugin.until_gone([plugin.node_end(pod)])
        for pod in pods.values():
            net.remove(pod)
        time.sleep(PAUSE)
    return calls


def _records(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        found[record["command"]].append(record)
    return found


def split(calls: list[tuple[int, int]], records: list[dict[str, Any]]) -> dict[str, float]:
    """Medians in microseconds, in the order in which the parts end; REST is what the server did besides its parts. A
    median is each part's own: their sum is not WHOLE."""
    if len(calls) != len(records):
        raise BenchError(f"{len(calls)} calls were made and {len(records)} timed")
    timed = list(zip(calls, records, strict=True))[WARM_UP:]
    inner = dict.fromkeys(name for _, record in timed for name in record["parts"])
    parts: dict[str, list[float]] = defaultdict(list)
    for (begin, end), record in timed:
        parts[START].append(record["began"] - begin)
        for name in inner:
            parts[name].append(record["parts"].get(name, 0))
        parts[REST].append(record["ended"] - record["began"] - sum(record["parts"].values()))
        parts[END].append(end - record["ended"])
        parts[WHOLE].append(end - begin)
    return {name: median(took) / 1000 for name, took in parts.items()}


def table(parts: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each part, with its share; and beside it that of the other working copy."""
    names = [*dict.fromkeys(name for each in parts.values() for name in each if name != WHOLE), WHOLE]
    lines = []
    for name in names:
        here = parts[HERE].get(name, 0.0)
        line = [name, f"{here:.0f}", f"{100 * here / parts[HERE][WHOLE]:.0f} %"]
        if THERE in parts:
            line.append(f"{parts[THERE].get(name, 0.0):.0f}")
        lines.append(line)
    headers = ["part", HERE, "share", THERE][: 3 + (THERE in parts)]
    aligned = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers=headers, tablefmt="plain", disable_numparse=True, colalign=aligned)
