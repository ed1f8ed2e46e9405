"""What a pod costs in a real cluster, with Underlay and with Debian's ptp and host-local: two clusters side by side, in
which pods start and end at once, in turn.

Each has two nodes behind a ToR, with kubelet, containerd and runc. Underlay's is as anybody installs it, dual-stack,
with sessions to the ToR; the other's nodes have a conflist, a range of IPv4 addresses each, and the ToR a static route
to it. That a pod of one node reaches a pod of the other is seen in both before anything is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from bench.burst import Pods
from bench.plugins import PLUGINS, BenchError
from bench.stats import Times
from lab.cluster import needs
from lab.errors import LabError
from lab.folder import Folder
from lab.kube.audit import Asked, AuditLog, count
from lab.kube.build import NotHere, find
from lab.kube.installed import NAMESPACE
from lab.oob import CONTROL_PLANE
from store.clock import SystemClock
from store.kubeaccess import from_kubeconfig
from store.kubehttp import Http, Limits

NODES: Final = ("node-1", "node-2")
TOR: Final = "tor-1"
#: Pods on each node (a kubelet takes 110, and three of them are ours), and bursts of each cluster.
PODS, ROUNDS = 100, 2
#: Seconds at rest of which requests are counted.
REST = 120.0
#: Seconds for a burst on a machine that does something else too, and after it until what it asked for is in the log.
LIMIT, AFTER = 900.0, 3.0
US, PTP = "cluster", "cluster.ptp"
CLOCK = SystemClock()

_LAB: Final = str(Path(sys.executable).parent / "underlay-lab")
_UP_LIMIT: Final = 600.0
_PARTS: Final = ("sum", "count")
_METRICS: Final = ("/bin/busybox", "wget", "-q", "-O-", "http://127.0.0.1:1338/v1/metrics")
#: containerd's own clocks (1.6: pkg/cri/server/metrics.go): around the network's plugins, loopback's among them, and
#: around what runc does.
_CLOCKS: Final = {
    "add": ("network_plugin_operations_duration_seconds_seconds", 'operation_type="set_up_pod"'),
    "del": ("network_plugin_operations_duration_seconds_seconds", 'operation_type="tear_down_pod"'),
    "sandbox": ("sandbox_runtime_create_seconds", ""),
    "container_create": ("container_create_seconds", ""),
    "container_start": ("container_start_seconds", ""),
}


class Side:
    """One cluster, by the folder of its lab."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.folder = name, Folder(path)
        self.audit = AuditLog(self.folder.member(CONTROL_PLANE) / "audit.log")

    def up(self) -> None:
        """With Underlay, as its manifests have it. Raises BenchError."""
        self.lab("up", "--cluster", "--racks", "1", "--nodes", str(len(NODES)), "--pods", "1")

    def up_with_ptp(self) -> None:
        """With the reference plugins. Raises BenchError."""
        self.lab("up", "--cluster", "--bare", "--racks", "1", "--nodes", str(len(NODES)), "--pods", "1")
        for number, node in enumerate(self._nodes(), 1):
            home, subnet = self.folder.member(node["name"]), f"10.244.{number}.0/24"
            for plugin in ("ptp", "host-local"):
                shutil.copy2(PLUGINS / plugin, home / "bin" / plugin)
            ipam = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]}
            plugins = [{"type": "ptp", "ipMasq": False, "ipam": ipam}]
            conflist = {"cniVersion": "1.0.0", "name": "ptp", "plugins": plugins}
            (home / "net.d" / "10-ptp.conflist").write_text(json.dumps(conflist))
            self.lab("exec", TOR, "ip", "route", "add", subnet, "via", node["addresses"][0])
        for number, _ in enumerate(NODES, 1):
            self._until_pod_runs(f"pod-{number}-1")
        # Not the lab's matrix: its pods are to have both families.
        (one, *_), (other, *_) = ([pod["addresses"][0] for pod in n["pods"]] for n in self._nodes())
        for pod, address in (("pod-1-1", other), ("pod-2-1", one)):
            self.lab("exec", pod, "/bin/busybox", "ping", "-c", "3", address)

    def down(self) -> None:
        self.lab("down", check=False)

    def lab(self, *words: str, check: bool = True) -> str:
        """``underlay-lab``: what it prints. Raises BenchError."""
        argv = [_LAB, words[0], *([] if words[0] != "pod" else words[1:2]), "--dir", str(self.folder.path)]
        argv += words[2:] if words[0] == "pod" else words[1:]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_UP_LIMIT)
        if check and done.returncode != 0:
            raise BenchError(
                f"underlay-lab {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def asked(self, since: float, until: float) -> list[Asked]:
        """What all of Underlay asked the API server for meanwhile (seconds since the epoch)."""
        ours = f"system:serviceaccount:{NAMESPACE}:"
        return [r for r in self.audit.requests(since) if r.user.startswith(ours) and r.at < until]

    def clocks(self) -> dict[str, tuple[float, int]]:
        """Seconds that containerd of all nodes has spent in each of its parts, and how often. Raises BenchError."""
        said = [self.lab("exec", node, *_METRICS) for node in NODES]
        return {name: read_clock("\n".join(said), *clock) for name, clock in _CLOCKS.items()}

    def _nodes(self) -> list[Any]:
        nodes: list[Any] = json.loads(self.lab("status", "-o", "json"))["nodes"]
        return nodes

    def _until_pod_runs(self, pod: str) -> None:
        """The node is Ready some seconds after it has a conflist; a pod that is there waits for that."""
        end = time.monotonic() + _UP_LIMIT
        while True:
            try:
                self.lab("pod", "add", pod)
                return
            except BenchError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)


class Burst(msgspec.Struct, kw_only=True):
    """What one side did in one burst: seconds of each pod. ``means`` are seconds of a call, by containerd's clocks;
    ``asked`` by what was done."""

    start: Times = Times(())
    end: Times = Times(())
    means: dict[str, float] = {}
    asked: dict[str, list[Asked]] = {}


def figures(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """``cluster.*``. NotHere where this machine cannot run a cluster; BenchError, BurstError."""
    try:
        find()
        needs.options(bare=True)
    except LabError as e:
        raise NotHere(str(e)) from e
    if not (PLUGINS / "ptp").exists():
        raise BenchError(f"{PLUGINS / 'ptp'} is missing: apt-get install containernetworking-plugins")
    folder.mkdir(parents=True)
    ours, theirs = Side(US, folder / "underlay"), Side(PTP, folder / "ptp")
    try:
        say("cluster: two nodes with Underlay, and two with ptp and host-local")
        ours.up()
        theirs.up_with_ptp()
        return measure(ours, theirs, say)
    finally:
        for side in (ours, theirs):
            side.down()


def measure(
    ours: Side,
    theirs: Side,
    say: Callable[[str], None],
    *,
    pods: int = PODS,
    rounds: int = ROUNDS,
    rest: float = REST,
) -> dict[str, float]:
    """The same on clusters that are up."""
    bursts: dict[str, list[Burst]] = defaultdict(list)
    for number in range(rounds):
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            say(f"cluster: {pods} pods at once on each of {len(NODES)} nodes: {side.folder.path.name}")
            one = asyncio.run(_burst(side, pods, number))
            say(f"cluster: Running p50 {one.start.p50:.1f} s, p99 {one.start.p99:.1f}; gone p50 {one.end.p50:.1f} s")
            for what, requests in one.asked.items():
                say(f"cluster: {what}: {len(requests)} requests of Underlay: {told(requests)}")
            bursts[side.name].append(one)
    say(f"cluster: {rest:.0f} s at rest")
    began = time.time()
    time.sleep(rest)
    resting = ours.asked(began, began + rest)
    say(f"cluster: at rest: {len(resting)} requests: {told(resting)}")
    found: dict[str, float] = {}
    for name, each in bursts.items():
        found |= _of_one(name, each)
    for verb in ("start", "end"):
        for part in ("p50", "p99", "most"):
            pairs = zip(bursts[US], bursts[PTP], strict=True)
            found[f"{US}.{verb}.{part}.vs_ptp"] = median(
                _part(getattr(us, verb), part) / _part(getattr(them, verb), part) for us, them in pairs
            )
        asked = [len(one.asked[verb]) for one in bursts[US]]
        found[f"{US}.{verb}.requests_per_pod"] = median(asked) / (pods * len(NODES))
    found[f"{US}.rest.requests_per_node_minute"] = len(resting) / len(NODES) / rest * 60
    return found


def told(requests: Iterable[Asked]) -> str:
    """By account, verb, resource and answer, the most frequent first."""
    counts = count(requests, "user", "verb", "resource", "subresource", "code")
    return ", ".join(
        f"{n} {' '.join(filter(None, (user.rpartition(':')[2], *what)))}" for (user, *what), n in counts.most_common()
    )


async def _burst(side: Side, size: int, number: int) -> Burst:
    access = from_kubeconfig([side.folder.path / "admin.kubeconfig"])
    http = Http(access, CLOCK, random.Random(), Limits(request=LIMIT, patience=LIMIT))
    pods = Pods(http, CLOCK, "burst")
    wanted = {f"burst-{number}-{node}-{i}": node for i in range(size) for node in NODES}
    asked: dict[str, list[Asked]] = {}
    try:
        await pods.begin(limit=60)
        before, began = side.clocks(), time.time()
        start = Times(tuple((await pods.start(wanted, limit=LIMIT)).values()))
        await CLOCK.sleep(AFTER)
        asked["start"] = side.asked(began, time.time())
        began = time.time()
        end = Times(tuple((await pods.delete(wanted, limit=LIMIT)).values()))
        await CLOCK.sleep(AFTER)
        asked["end"] = side.asked(began, time.time())
        means = {name: _mean(before[name], after) for name, after in side.clocks().items()}
    finally:
        await pods.end()
        await http.close()
    return Burst(start=start, end=end, means=means, asked=asked)


def read_clock(text: str, name: str, label: str) -> tuple[float, int]:
    """Seconds and calls of a histogram of containerd's, over the metrics of all nodes in ``text``. BenchError if it is
    not there: a containerd that calls it otherwise."""
    labels = re.escape(f"{{{label}}}") if label else r"(?:{[^}]*})?"
    found = [re.findall(rf"^containerd_cri_{name}_{part}{labels} (\S+)$", text, re.MULTILINE) for part in _PARTS]
    if f"containerd_cri_{name}_bucket" not in text:
        raise BenchError(f"containerd has no clock {name}: this bench reads those of 1.6 and 1.7")
    return sum(map(float, found[0])), sum(map(int, found[1]))


def _mean(before: tuple[float, int], after: tuple[float, int]) -> float:
    """Raises BenchError if nothing was counted meanwhile: there is no such mean."""
    calls = after[1] - before[1]
    if not calls:
        raise BenchError("containerd counted no call of a part that every pod goes through")
    return (after[0] - before[0]) / calls


def _of_one(name: str, bursts: Sequence[Burst]) -> dict[str, float]:
    found: dict[str, float] = {}
    for verb in ("start", "end"):
        for part in ("p50", "p99", "most"):
            found[f"{name}.{verb}.{part}_s"] = median(_part(getattr(one, verb), part) for one in bursts)
    for clock in _CLOCKS:
        found[f"{name}.{clock}.mean_ms"] = 1000 * median(one.means[clock] for one in bursts)
    found[f"{name}.add.share"] = median(one.means["add"] / one.start.p50 for one in bursts)
    return found


def _part(times: Times, part: str) -> float:
    return max(times.values) if part == "most" else times.p50 if part == "p50" else times.p99
