"""Ways to attach a namespace: Underlay with a server of its own, and the reference plugins that do the same."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.spawn import Call, Flood, flood, timed
from cni import install, rtnl
from cni.netlink import Netlink
from lab.net import Net
from store.clock import SystemClock
from store.model import IPPool, IPPoolSpec, Meta, Node, NodeAddress, NodeStatus
from store.open import open_store

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "build" / "underlay-shim"
PLUGINS = Path("/usr/lib/cni")
#: Longer than the kernel takes to remove a veth (20 to 30 ms).
PAUSE = 0.05
START_LIMIT, GONE_LIMIT = 10.0, 10.0
POOL4, POOL6 = "10.200.0.0/16", "fd00:200::/64"
#: Where the reference plugins' pods are.
SUBNET = "10.201.0.0/16"


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
        self._env = {"CNI_IFNAME": "eth0", "CNI_PATH": str(binary.parent), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        self._env |= env
        self._config = folder / "config.json"
        self._config.write_text(json.dumps(config))
        self._folder = folder

    def run(self, command: str, pod: str) -> float:
        """Seconds that one ADD or DEL of this pod took."""
        with self._net.inside(self._home):
            out = self._out(command, pod)
            return timed(self._argv, self._environment(command, pod), stdin=self._config, stdout=out)

    def start(self, command: str, pod: str) -> Call:
        """The same beside others."""
        with self._net.inside(self._home):
            out = self._out(command, pod)
            return Call(self._argv, self._environment(command, pod), stdin=self._config, stdout=out)

    def flood(self, command: str, pods: Iterable[str], *, width: int) -> Flood:
        """The same for many, ``width`` at once."""
        calls = [(self._environment(command, pod), self._out(command, pod)) for pod in pods]
        with self._net.inside(self._home):
            return flood(self._argv, calls, stdin=self._config, width=width)

    def node_end(self, pod: str) -> str:
        """The node's end of its veth, by the answer to the ADD. For those that were added with ``run``."""
        interfaces = json.loads(self._out("ADD", pod).read_bytes())["interfaces"]
        return str(next(i["name"] for i in interfaces if i["name"].startswith(("ul", "veth"))))

    def until_gone(self, links: Sequence[str]) -> None:
        """Returns when the node has none of these links. Raises BenchError if one stays."""
        with self._net.inside(self._home):
            netlink = Netlink()
        end = time.monotonic() + GONE_LIMIT
        with netlink:
            for link in links:
                while rtnl.find(netlink, link):
                    if time.monotonic() > end:
                        raise BenchError(f"{link} is still there {GONE_LIMIT:g} s after its DEL")
                    time.sleep(0.0005)

    def _environment(self, command: str, pod: str) -> dict[str, str]:
        call = {"CNI_COMMAND": command, "CNI_CONTAINERID": pod, "CNI_NETNS": str(self._net.path(pod))}
        return {**self._env, **call}

    def _out(self, command: str, pod: str) -> Path:
        return self._folder / f"{pod}.{command}.json"


# -- Underlay -------------------------------------------------------------------------------------------------------


def underlay(
    net: Net,
    home: str,
    folder: Path,
    pools: Mapping[str, str],
    *,
    shim: Path = SHIM,
    tree: Path = ROOT,
    program: Sequence[str] = ("-m", "cni.daemon"),
) -> Plugin:
    """A namespace with a server of ours that is ready to hand out, its code from ``tree``. No agent runs, so the one
    block of each pool is large enough for everything. BenchError."""
    folder.mkdir(parents=True)
    store, run = f"sqlite:{folder}/store.db", folder / "run"
    asyncio.run(_fill(store, home, pools))
    if home not in net.names:
        net.add(home, forwarding=True)
    argv = [sys.executable, *program, "--node", home, "--store", store, "--run", str(run), "--log", "WARNING"]
    process = net.spawn(home, argv, log=folder / "log", cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})
    end = time.monotonic() + START_LIMIT
    while not install.answers(run):
        if process.poll() is not None or time.monotonic() > end:
            raise BenchError(f"underlay-cni does not answer:\n{(folder / 'log').read_text()}")
        time.sleep(0.02)
    config = {"cniVersion": "1.0.0", "name": "underlay", "type": "underlay"}
    return Plugin(net, home, shim, config, folder, UNDERLAY_RUN=str(run))


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


# -- the reference plugins --------------------------------------------------------------------------------------------


def ptp(net: Net, home: str, folder: Path, programs: Path = PLUGINS) -> Plugin:
    """A veth pair and a route, with host-local."""
    return _reference(net, home, folder, programs / "ptp", {"ipMasq": False})


def bridge(net: Net, home: str, folder: Path, programs: Path = PLUGINS) -> Plugin:
    """A veth pair in a bridge that is the pods' gateway, with host-local."""
    return _reference(net, home, folder, programs / "bridge", {"bridge": "cni0", "isGateway": True, "ipMasq": False})


def _reference(net: Net, home: str, folder: Path, binary: Path, more: Mapping[str, object]) -> Plugin:
    if home not in net.names:
        net.add(home, forwarding=True)
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": SUBNET}]],
        "routes": [{"dst": "0.0.0.0/0"}],  # as Underlay's pods have one
        "dataDir": str(folder / "host-local"),
    }
    config = {"cniVersion": "1.0.0", "name": binary.name, "type": binary.name, **more, "ipam": ipam}
    return Plugin(net, home, binary, config, folder)
