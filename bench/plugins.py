"""Serial ADD and DEL: Underlay through its shim, against Debian's ptp with host-local, in one run.

Both get one IPv4 address, fresh namespaces of their own, and the machine to themselves: after each DEL there is a pause
in which links that are removed in the background are gone. Each round runs both, in alternating order, so that
whatever the machine does meanwhile meets both. The server is a real one with a SQLite store; no agent runs, so the one
block is large enough for all rounds. A second server hands out both families, for the figure of a dual-stack ADD.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from bench.spawn import Call, timed
from bench.stats import Times
from cni import install
from lab.net import Net
from store.clock import SystemClock
from store.model import IPPool, IPPoolSpec, Meta, Node, NodeAddress, NodeStatus
from store.open import open_store

SHIM = Path(__file__).parents[1] / "build" / "underlay-shim"
PLUGINS = Path("/usr/lib/cni")
ROUNDS = 200
WARM_UP = 5
#: Longer than the kernel takes to remove a veth (20 to 30 ms).
PAUSE = 0.05
START_LIMIT = 10.0


class BenchError(Exception):
    """What is to be measured is not there, or did not start."""


class Plugin:
    """A way to attach a namespace, called as a runtime calls it from within the namespace ``home``."""

    def __init__(
        self, net: Net, home: str, binary: Path, config: Mapping[str, object], folder: Path, **env: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._net = net
        self._home = home
        self._argv = [str(binary)]
        self._env = {"CNI_IFNAME": "eth0", "CNI_PATH": str(PLUGINS), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env}
        self._config = folder / "config.json"
        self._config.write_text(json.dumps(config))
        self._out = folder / "out.json"

    def run(self, command: str, pod: str) -> float:
        """Seconds that one ADD or DEL of this pod took."""
        with self._net.inside(self._home):
            return timed(self._argv, self._environment(command, pod), stdin=self._config, stdout=self._out)

    def start(self, command: str, pod: str) -> Call:
        """The same beside others."""
        out = self._out.with_name(f"{pod}.{command}.json")
        with self._net.inside(self._home):
            return Call(self._argv, self._environment(command, pod), stdin=self._config, stdout=out)

    def _environment(self, command: str, pod: str) -> dict[str, str]:
        call = {"CNI_COMMAND": command, "CNI_CONTAINERID": pod, "CNI_NETNS": str(self._net.path(pod))}
        return {**self._env, **call}


def figures(folder: Path, say: Callable[[str], None], *, rounds: int = ROUNDS) -> dict[str, float]:
    """``cni.*`` and ``ptp.*``; milliseconds where the name says so, ratios else. Raises BenchError, SpawnError."""
    for needed, remedy in ((SHIM, "make shim"), (PLUGINS / "ptp", "apt-get install containernetworking-plugins")):
        if not needed.exists():
            raise BenchError(f"{needed} is missing: {remedy}")
    net = Net(folder)
    try:
        say(f"cni: {rounds} rounds of ADD and DEL, Underlay and ptp in turn")
        return _measure(net, folder, rounds)
    finally:
        net.close()


def _measure(net: Net, folder: Path, rounds: int) -> dict[str, float]:
    single = _underlay(net, "node-1", folder / "u4", {"pods-v4": "10.200.0.0/16"})
    dual = _underlay(net, "node-2", folder / "u46", {"pods-v4": "10.200.0.0/16", "pods-v6": "fd00:200::/64"})
    ptp = _ptp(net, "node-3", folder / "ptp")
    plugins = {"cni": single, "ptp": ptp, "dual": dual}
    adds: dict[str, list[float]] = {name: [] for name in plugins}
    dels: dict[str, list[float]] = {name: [] for name in plugins}
    spawns: list[float] = []
    for i in range(WARM_UP + rounds):
        order = list(plugins) if i % 2 else list(reversed(plugins))
        for name in order:
            net.add(f"{name}-{i}")
        time.sleep(PAUSE)
        for name in order:
            adds[name].append(plugins[name].run("ADD", f"{name}-{i}"))
        for name in order:
            dels[name].append(plugins[name].run("DEL", f"{name}-{i}"))
            time.sleep(PAUSE)
        spawns.append(timed(["/bin/true"], {}, stdin=Path(os.devnull), stdout=folder / "out"))
        for name in order:
            net.remove(f"{name}-{i}")
    add = {name: Times(tuple(times[WARM_UP:])) for name, times in adds.items()}
    delete = {name: Times(tuple(times[WARM_UP:])) for name, times in dels.items()}
    return {
        "cni.add.p50.vs_ptp": add["cni"].p50 / add["ptp"].p50,
        "cni.add.p99.vs_p50": add["cni"].p99 / add["cni"].p50,
        "cni.del.reply.vs_ptp": delete["cni"].p50 / delete["ptp"].p50,
        "cni.add.p50_ms": 1000 * add["cni"].p50,
        "cni.add.p99_ms": 1000 * add["cni"].p99,
        "cni.del.reply.p50_ms": 1000 * delete["cni"].p50,
        "cni.add.dual.p50_ms": 1000 * add["dual"].p50,
        "cni.del.dual.reply.p50_ms": 1000 * delete["dual"].p50,
        "ptp.add.p50_ms": 1000 * add["ptp"].p50,
        "ptp.add.p99_ms": 1000 * add["ptp"].p99,
        "ptp.del.p50_ms": 1000 * delete["ptp"].p50,
        "spawn.true.p50_ms": 1000 * Times(tuple(spawns[WARM_UP:])).p50,
    }


def _underlay(net: Net, home: str, folder: Path, pools: Mapping[str, str]) -> Plugin:
    """A namespace with a server of ours that is ready to hand out."""
    folder.mkdir(parents=True)
    store, run = f"sqlite:{folder}/store.db", folder / "run"
    asyncio.run(_fill(store, home, pools))
    net.add(home, forwarding=True)
    process = net.spawn(
        home,
        [str(Path(sys.executable).parent / "underlay-cni"), "--node", home, "--store", store, "--run", str(run)],
        log=folder / "log",
    )
    end = time.monotonic() + START_LIMIT
    while not install.answers(run):
        if process.poll() is not None or time.monotonic() > end:
            raise BenchError(f"underlay-cni does not answer:\n{(folder / 'log').read_text()}")
        time.sleep(0.02)
    config = {"cniVersion": "1.0.0", "name": "underlay", "type": "underlay"}
    return Plugin(net, home, SHIM, config, folder, UNDERLAY_RUN=str(run))


def _ptp(net: Net, home: str, folder: Path) -> Plugin:
    net.add(home, forwarding=True)
    ipam = {"type": "host-local", "ranges": [[{"subnet": "10.201.0.0/16"}]], "dataDir": str(folder / "host-local")}
    config = {"cniVersion": "1.0.0", "name": "ptp", "type": "ptp", "ipMasq": False, "ipam": ipam}
    return Plugin(net, home, PLUGINS / "ptp", config, folder)


async def _fill(url: str, node: str, pools: Mapping[str, str]) -> None:
    store = open_store(url, clock=SystemClock())
    try:
        made = await store.create(Node(metadata=Meta(name=node)))
        address = NodeAddress(type="InternalIP", address="192.0.2.1")
        await store.update_status(msgspec.structs.replace(made, status=NodeStatus(addresses=(address,))))
        for name, cidr in pools.items():
            size = 20 if "." in cidr else 116
            await store.create(IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr, block_size=size)))
    finally:
        await store.close()
