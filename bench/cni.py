"""ADD and DEL: Underlay through its shim against the reference plugins, Debian's and the current release, in one run.

All get one IPv4 address (``underlay dual`` two), fresh namespaces, and the machine to themselves: what is removed in
the background after a DEL is gone before the next call. Every comparison is interleaved, in alternating order, so that
whatever the machine does meanwhile meets all. The server is a real one with a SQLite store; no agent runs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tabulate import tabulate

from bench import connect, plot, reference
from bench.plugins import PAUSE, PLUGINS, POOL4, POOL6, ROOT, SHIM, BenchError, Plugin, bridge, ptp, underlay
from bench.spawn import timed
from bench.stats import Times, percentile
from lab.gobuild import BuildFailed, NoGo
from lab.net import Net

US, DUAL, PTP, BRIDGE = "underlay", "underlay dual", "ptp", "bridge"
#: What comes after the names of the current release's plugins.
CURRENT = "current"
BUSY = "while True: sum(range(10000))"


class Size(NamedTuple):
    """How much is measured: serial rounds; at each width, batches of so many pods; pairs of idle and busy blocks of so
    many ADDs; pods that connect."""

    rounds: int = 200
    widths: tuple[int, ...] = (8, 32)
    batches: int = 4
    batch: int = 64
    blocks: int = 10
    block: int = 20
    connects: int = 200
    warm_up: int = 5


def figures(
    folder: Path,
    say: Callable[[str], None],
    *,
    size: Size = Size(),  # noqa: B008 - immutable
    shim: Path = SHIM,
    results: Path = ROOT / "build",
    current: Callable[[], Path] = reference.ensure,
) -> dict[str, float]:
    """``cni.*``, ``ptp*``, ``bridge*``; milliseconds where the name says so, ratios else. Writes
    cni.txt and cni.png into ``results``. BenchError, SpawnError."""
    for needed, remedy in ((shim, "make shim"), (PLUGINS / "ptp", "apt-get install containernetworking-plugins")):
        if not needed.exists():
            raise BenchError(f"{needed} is missing: {remedy}")
    net = Net(folder)
    try:
        bench = Bench(net, _plugins(net, folder, shim, current, say))
        say(f"cni: {size.rounds} rounds of ADD and DEL: {', '.join(bench.plugins)}, in turn")
        serial = bench.serial(size.rounds, size.warm_up)
        spawns = _spawn(folder, size.rounds)
        found = serial.figures() | {"spawn.true.p50_ms": 1000 * spawns.p50, "spawn.true.p99_ms": 1000 * spawns.p99}
        for width in size.widths:
            say(f"cni: {size.batches} times {size.batch} pods, {width} at once")
            found |= bench.parallel(width, size.batches, size.batch)
        say(f"cni: {size.blocks} times {size.block} ADDs beside a process that burns a core, and without")
        found |= bench.busy(size.blocks, size.block)
        say(f"cni: the first connection of {size.connects} pods")
        found |= connect.figures(net, folder / "connect", size.connects, shim)
    finally:
        net.close()
    table = serial.table()
    say(table)
    results.mkdir(exist_ok=True)
    (results / "cni.txt").write_text(table + "\n")
    (results / "cni.png").write_bytes(plot.png(serial.rows(), f"serial add and del, {size.rounds} each, ms"))
    return found


class Serial(NamedTuple):
    """Seconds of each call, by plugin. ``gone``: from the start of a DEL until its link is gone."""

    add: Mapping[str, Times]
    delete: Mapping[str, Times]
    gone: Mapping[str, Times]

    def figures(self) -> dict[str, float]:
        us, them = self.add[US], self.add[PTP]
        found = {
            "cni.add.p50.vs_ptp": us.p50 / them.p50,
            "cni.add.p99.vs_p50": us.p99 / us.p50,
            "cni.del.reply.vs_ptp": self.delete[US].p50 / self.delete[PTP].p50,
            "cni.del.gone.vs_ptp": self.gone[US].p50 / self.delete[PTP].p50,
            "cni.del.gone.p50_ms": 1000 * self.gone[US].p50,
            "cni.add.dual.p50_ms": 1000 * self.add[DUAL].p50,
            "cni.del.dual.reply.p50_ms": 1000 * self.delete[DUAL].p50,
        }
        ours = key(US)
        for name in self.add:
            if name == DUAL:
                continue
            reply = "del.reply" if name == US else "del"
            for what, times in (("add", self.add[name]), (reply, self.delete[name])):
                found[f"{key(name)}.{what}.p50_ms"] = 1000 * times.p50
                found[f"{key(name)}.{what}.p99_ms"] = 1000 * times.p99
            if name not in (US, PTP):
                found[f"{ours}.add.p50.vs_{key(name)}"] = us.p50 / self.add[name].p50
                found[f"{ours}.del.reply.vs_{key(name)}"] = self.delete[US].p50 / self.delete[name].p50
        return found

    def rows(self) -> dict[str, Times]:
        """By verb and plugin, as they are shown."""
        verbs = (("add", self.add), ("del", self.delete), ("gone", self.gone))
        return {f"{verb} {name}": found[name] for verb, found in verbs for name in self.add if name in found}

    def table(self) -> str:
        percents = (0, 10, 50, 90, 99, 100)
        lines = [
            (name, *(f"{1000 * percentile(times.values, p):.3g}" for p in percents))
            for name, times in self.rows().items()
        ]
        headers = ("ms", "least", "p10", "p50", "p90", "p99", "most")
        shown = tabulate(
            lines, headers=headers, tablefmt="plain", disable_numparse=True, colalign=("left", *["right"] * 6)
        )
        return f"{shown}\n\n{plot.text(self.rows())}"


class Bench:
    """Measures ``plugins``, by name, in pods of ``net``. Among them are US, PTP and, for ``serial``, DUAL."""

    def __init__(self, net: Net, plugins: Mapping[str, Plugin]) -> None:
        self.net = net
        self.plugins = plugins
        self._numbers = itertools.count()

    def serial(self, rounds: int, warm_up: int) -> Serial:
        """One ADD and one DEL of each plugin a round."""
        adds: dict[str, list[float]] = defaultdict(list)
        dels: dict[str, list[float]] = defaultdict(list)
        gone: dict[str, list[float]] = defaultdict(list)
        for chunk in _chunks(range(warm_up + rounds), 20):
            with self._pods([(name, i) for i in chunk for name in self.plugins]) as pods:
                for i in chunk:
                    order = list(self.plugins) if i % 2 else list(reversed(self.plugins))
                    for name in order:
                        adds[name].append(self.plugins[name].run("ADD", pods[name, i]))
                    for name in order:
                        reply, until = self._delete(name, pods[name, i])
                        dels[name].append(reply)
                        gone[name].append(until)

        def kept(found: Mapping[str, list[float]], names: Iterable[str] = self.plugins) -> dict[str, Times]:
            return {name: Times(tuple(found[name][warm_up:])) for name in names}

        return Serial(kept(adds), kept(dels), kept(gone, (US, DUAL)))

    def parallel(self, width: int, batches: int, batch: int) -> dict[str, float]:
        """Batches of pods, ``width`` calls at once, all ADDs and then all DELs; medians of the batches."""
        names = [name for name in self.plugins if name != DUAL and not name.startswith(BRIDGE)]
        rates: dict[tuple[str, str], list[float]] = defaultdict(list)
        times: list[float] = []
        for number in range(batches):
            for name in names if number % 2 else reversed(names):
                plugin = self.plugins[name]
                with self._pods([(name, i) for i in range(batch)]) as made:
                    pods = list(made.values())
                    added = plugin.flood("ADD", pods, width=width)
                    links = [plugin.node_end(pod) for pod in pods]
                    deleted = plugin.flood("DEL", pods, width=width)
                    plugin.until_gone(links)
                rates[name, "add"].append(batch / added.seconds)
                rates[name, "del"].append(batch / deleted.seconds)
                if name == US:
                    times += added.times
        ours, one = key(US), Times(tuple(times))
        found = {
            f"{ours}.add.parallel{width}.p50_ms": 1000 * one.p50,
            f"{ours}.add.parallel{width}.p99_ms": 1000 * one.p99,
        }
        for (name, verb), each in rates.items():
            found[f"{key(name)}.{verb}.parallel{width}.per_second"] = median(each)
            if name != US:
                found[f"{ours}.{verb}.parallel{width}.vs_{key(name)}"] = median(rates[US, verb]) / median(each)
        return found

    def busy(self, blocks: int, block: int) -> dict[str, float]:
        """Serial ADDs beside a Python process that burns a core, as an agent does that plans, and without it."""
        adds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * blocks):
            burning = number % 4 in (1, 2)
            with self._pods([(US, i) for i in range(block + 1)]) as pods:
                process = self.net.spawn(self.net.names[0], [sys.executable, "-c", BUSY]) if burning else None
                time.sleep(PAUSE)
                found = []
                for pod in pods.values():
                    found.append(self.plugins[US].run("ADD", pod))
                    self._delete(US, pod)
                adds[burning] += found[1:]
                if process is not None:
                    process.kill()
                    process.wait()
        idle, busy = Times(tuple(adds[False])), Times(tuple(adds[True]))
        return {
            "cni.add.p99.busy_agent.vs_idle": busy.p99 / idle.p99,
            "cni.add.p50.busy_agent.vs_idle": busy.p50 / idle.p50,
        }

    def _delete(self, name: str, pod: str) -> tuple[float, float]:
        """Seconds until the answer, and until the link is gone."""
        plugin = self.plugins[name]
        link = plugin.node_end(pod)
        begin = time.perf_counter()
        reply = plugin.run("DEL", pod)
        plugin.until_gone([link])
        return reply, time.perf_counter() - begin

    @contextmanager
    def _pods(self, wanted: Sequence[tuple[str, int]]) -> Iterator[dict[tuple[str, int], str]]:
        """Fresh namespaces for a while; containers of these names were never there before."""
        number = next(self._numbers)
        pods = {(name, i): f"{name.replace(' ', '-')}-{number}-{i}" for name, i in wanted}
        for pod in pods.values():
            self.net.add(pod)
        time.sleep(PAUSE)
        try:
            yield pods
        finally:
            for pod in pods.values():
                self.net.remove(pod)
            time.sleep(PAUSE)


def key(name: str) -> str:
    """How figures call a plugin."""
    return "cni" if name == US else name.replace(" ", "_")


def _plugins(
    net: Net, folder: Path, shim: Path, current: Callable[[], Path], say: Callable[[str], None]
) -> dict[str, Plugin]:
    made = {
        US: underlay(net, "node-1", folder / "u4", {"pods-v4": POOL4}, shim=shim),
        DUAL: underlay(net, "node-2", folder / "u46", {"pods-v4": POOL4, "pods-v6": POOL6}, shim=shim),
        PTP: ptp(net, "node-3", folder / "ptp"),
        BRIDGE: bridge(net, "node-4", folder / "bridge"),
    }
    try:
        programs = current()
    except (NoGo, BuildFailed, subprocess.TimeoutExpired) as e:
        say(f"cni: the reference plugins' current release is left out: {e}")
        return made
    return {
        **made,
        f"{PTP} {CURRENT}": ptp(net, "node-5", folder / "ptp-current", programs),
        f"{BRIDGE} {CURRENT}": bridge(net, "node-6", folder / "bridge-current", programs),
    }


def _spawn(folder: Path, rounds: int) -> Times:
    """What starting any program costs here."""
    out = folder / "out"
    return Times(tuple(timed(["/bin/true"], {}, stdin=Path(os.devnull), stdout=out) for _ in range(rounds)))


def _chunks(values: range, size: int) -> Iterator[range]:
    return (values[i : i + size] for i in range(0, len(values), size))
