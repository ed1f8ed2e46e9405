"""Whole nodes on one L2 segment: a store, and in each node's namespace the real speaker, the real agent and a pod; and
a router on the same segment that plays the ToR."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from cni.marks import GATEWAY4, LINK_MAC, METRIC_PODS, PROTO_IMPORTS, PROTO_PODS
from lab.net import Net
from store.base import Store, mutate
from store.clock import SystemClock
from store.errors import NotFound
from store.model import (
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPNodeStatus,
    BGPPeer,
    BGPPeerSpec,
    IPAMBlock,
    IPAMBlockSpec,
    IPPool,
    IPPoolSpec,
    Meta,
    Node,
    NodeAddress,
    NodeStatus,
    block_name,
)
from store.open import open_store
from tests.bgp.routers import TOR_AS, await_zebra, connections, let_root_run_frr
from tests.conftest import eventually

T = TypeVar("T")
NODES_AS = 64512
TOR4, TOR6 = "10.0.0.254", "fd00::fe"
_AGENT = "import sys; from agent.daemon import main; sys.exit(main())"


def addresses(number: int) -> tuple[str, str]:
    """The node's own."""
    return f"10.0.0.{number}", f"fd00::{number:x}"


def blocks(number: int) -> tuple[str, str]:
    return f"10.244.{number}.0/26", f"fd00:10:244:{number:x}::/122"


def pod(number: int) -> tuple[str, str]:
    return f"10.244.{number}.5", f"fd00:10:244:{number:x}::5"


class Segment:
    """Numbers name the nodes: node 1 is ``node-01``, at 10.0.0.1 and fd00::1."""

    def __init__(self, net: Net, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.url = f"sqlite:{folder / 'store.db'}"
        self.speakers: dict[int, subprocess.Popen[bytes]] = {}
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        net.add("switch")
        net.ip("switch", ["link add br0 type bridge", "link set br0 up"])
        self.store(self._pools)

    # -- the store

    def store(self, act: Callable[[Store], Awaitable[T]]) -> T:
        async def once() -> T:
            opened = open_store(self.url, clock=SystemClock())
            try:
                return await act(opened)
            finally:
                await opened.close()

        return asyncio.run(once())

    async def _pools(self, store: Store) -> None:
        await store.create(IPPool(metadata=Meta(name="v4"), spec=IPPoolSpec(cidr="10.244.0.0/16")))
        await store.create(IPPool(metadata=Meta(name="v6"), spec=IPPoolSpec(cidr="fd00:10:244::/48")))

    def mesh(self, *, on: bool) -> None:
        async def act(store: Store) -> None:
            spec = BGPConfigurationSpec(node_to_node_mesh_enabled=on)
            try:
                await mutate(store, BGPConfiguration, "default", lambda c: replace(c, spec=spec))
            except NotFound:
                await store.create(BGPConfiguration(metadata=Meta(name="default"), spec=spec))

        self.store(act)

    def delete_pool(self, pool: str) -> None:
        self.store(lambda store: store.delete(IPPool, pool))

    def peer_with_tor(self) -> None:
        """One AS holds all nodes, so each hears its own number in the others' paths."""

        async def act(store: Store) -> None:
            for name, address in (("tor-4", TOR4), ("tor-6", TOR6)):
                spec = BGPPeerSpec(peer_ip=address, as_number=TOR_AS, num_allowed_local_as_numbers=1)
                await store.create(BGPPeer(metadata=Meta(name=name), spec=spec))

        self.store(act)

    def status(self, number: int) -> BGPNodeStatus | None:
        try:
            return self.store(lambda store: store.get(BGPNodeStatus, name(number)))
        except NotFound:
            return None

    def conditions(self, number: int) -> dict[str, str]:
        status = self.status(number)
        return {c.type: c.message for c in status.status.conditions} if status else {}

    # -- nodes

    def attach(self, member: str, cidrs: Iterable[str]) -> None:
        """A namespace with ``eth0`` on the segment."""
        self.net.add(member, forwarding=True)
        self.net.link(member, "eth0", "switch", member)
        self.net.ip("switch", [f"link set {member} master br0"])
        self.net.address(member, "eth0", cidrs)

    def add(self, number: int, *, with_pod: bool = False, reported: int = 2) -> None:
        """The machine, its Node object with so many of its addresses, and its blocks. Nothing runs there yet."""
        four, six = addresses(number)
        self.attach(name(number), (f"{four}/24", f"{six}/64"))
        if with_pod:
            self._add_pod(number)
        self.store(lambda store: _create(store, number, reported))

    def _add_pod(self, number: int) -> None:
        member, inside, (four, six) = name(number), f"pod-{number}", pod(number)
        self.net.add(inside)
        self.net.link(member, "pod0", inside, "eth0")
        self.net.address(member, "pod0", ["fe80::1/64"])
        self.net.ip(member, [f"link set pod0 address {LINK_MAC}"])
        self.net.address(inside, "eth0", [f"{four}/32", f"{six}/128"])
        self.net.ip(
            inside,
            [
                f"neigh add {GATEWAY4} lladdr {LINK_MAC} dev eth0 nud permanent",
                f"route add {GATEWAY4} dev eth0 scope link",
                f"route add default via {GATEWAY4} dev eth0 src {four}",
                "route add default via fe80::1 dev eth0",
            ],
        )
        mark = f"dev pod0 proto {PROTO_PODS} metric {METRIC_PODS}"
        self.net.ip(member, [f"route add {four}/32 {mark}", f"route add {six}/128 {mark}"])

    def start(self, number: int) -> None:
        self.start_speaker(number)
        self.start_agent(number)

    def start_speaker(self, number: int) -> None:
        argv = [sys.executable, "-P", "-m", "agent.bgp.speaker", "--run", str(self.home(number) / "run")]
        self.speakers[number] = self.net.spawn(name(number), argv, log=self.home(number) / "speaker.log")

    def start_agent(self, number: int) -> None:
        home = self.home(number)
        argv = [sys.executable, "-P", "-c", _AGENT, "--node", name(number), "--store", self.url]
        argv += ["--run", str(home / "run"), "--state", str(home / "state")]
        self.agents[number] = self.net.spawn(name(number), argv, log=home / "agent.log")

    def home(self, number: int) -> Path:
        folder = self.folder / name(number)
        folder.mkdir(exist_ok=True)
        return folder

    def end(self, processes: dict[int, subprocess.Popen[bytes]], number: int, how: int = signal.SIGTERM) -> None:
        """That node's agent, or speaker."""
        process = processes.pop(number)
        os.kill(process.pid, how)
        process.wait(timeout=60)

    def stop(self, number: int) -> None:
        """The node goes: its processes and its Node object. Its blocks stay in the store."""
        for processes in (self.agents, self.speakers):
            self.end(processes, number)
        self.store(lambda store: store.delete(Node, name(number)))

    # -- what is seen

    def imports(self, number: int) -> dict[str, tuple[str, ...]]:
        """Prefix -> gateways of what the node's kernel has from peers."""
        found: dict[str, tuple[str, ...]] = {}
        for family in ("-4", "-6"):
            shown = self.net.run(name(number), ["ip", family, "-j", "route", "show", "proto", str(PROTO_IMPORTS)])
            for route in json.loads(shown.stdout or "[]"):
                hops = route.get("nexthops") or [route]
                found[route["dst"]] = tuple(sorted(hop.get("gateway", "") for hop in hops))
        return found

    def meshed(self, numbers: Iterable[int]) -> bool:
        """Whether each of them has a route to every block of the others, straight to its node, and no other."""
        numbers = tuple(numbers)
        return all(self.imports(n) == straight(n, numbers) for n in numbers)

    def connections(self, number: int) -> set[str]:
        """The node's BGP connections, as the kernel names them: a session that flapped has another port."""
        return set(connections(self.net, name(number)))

    def log(self, number: int) -> str:
        """What ExaBGP wrote."""
        return (self.home(number) / "run/speaker/exabgp.log").read_text()


def name(number: int) -> str:
    return f"node-{number:02d}"


def straight(number: int, numbers: Iterable[int]) -> dict[str, tuple[str, ...]]:
    """What that node's kernel has in a mesh of these."""
    return {
        block: (gateway,)
        for other in numbers
        if other != number
        for block, gateway in zip(blocks(other), addresses(other), strict=True)
    }


async def _create(store: Store, number: int, reported: int) -> None:
    made = await store.create(Node(metadata=Meta(name=name(number))))
    internal = tuple(NodeAddress(type="InternalIP", address=a) for a in addresses(number)[:reported])
    await store.update_status(replace(made, status=NodeStatus(addresses=internal)))
    for cidr in blocks(number):
        pool = "v6" if ":" in cidr else "v4"
        spec = IPAMBlockSpec(cidr=cidr, pool=pool, node=name(number))
        await store.create(IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=spec))


# -- the ToR ----------------------------------------------------------------------------------------------------------


def start_tor(segment: Segment, kind: str) -> subprocess.Popen[bytes]:
    """A router that takes whoever connects, and has packets between the nodes go through itself."""
    segment.attach("tor", (f"{TOR4}/24", f"{TOR6}/64"))
    # Or it would tell nodes, which may heed it, to send straight to each other.
    segment.net.sysctl("tor", {f"net.ipv4.conf.{name}.send_redirects": "0" for name in ("all", "eth0")})
    folder = segment.folder / "tor"
    folder.mkdir()
    return {"bird": _bird, "frr": _frr}[kind](segment.net, folder)


def _bird(net: Net, folder: Path) -> subprocess.Popen[bytes]:
    sessions = "".join(
        f"protocol bgp n{family} {{\n  local {local} as {TOR_AS};\n  neighbor range {subnet} as {NODES_AS};\n"
        f'  dynamic name "node{family}_";\n  graceful restart on;\n  hold time 9;\n'
        f"  ipv{family} {{ import all; export where source = RTS_BGP; next hop self; }};\n}}\n"
        for family, local, subnet in (("4", TOR4, "10.0.0.0/24"), ("6", TOR6, "fd00::/64"))
    )
    config = folder / "bird.conf"
    config.write_text(
        f"log stderr all;\nrouter id {TOR4};\nprotocol device {{ scan time 1; }}\n"
        "protocol kernel { ipv4 { export where source = RTS_BGP; import none; }; }\n"
        "protocol kernel { ipv6 { export where source = RTS_BGP; import none; }; }\n"
        f"protocol direct {{ ipv4; ipv6; }}\n{sessions}"
    )
    return net.spawn("tor", ["bird", "-f", "-c", str(config), "-s", str(folder / "bird.ctl")], log=folder / "log")


def _frr(net: Net, folder: Path) -> subprocess.Popen[bytes]:
    lines = [f"log file {folder / 'frr.log'}", f"router bgp {TOR_AS}", f" bgp router-id {TOR4}"]
    lines += [" no bgp ebgp-requires-policy", " no bgp default ipv4-unicast", " bgp graceful-restart"]
    for family, subnet in (("4", "10.0.0.0/24"), ("6", "fd00::/64")):
        lines += [f" neighbor N{family} peer-group", f" neighbor N{family} remote-as {NODES_AS}"]
        lines += [f" neighbor N{family} timers 3 9", f" neighbor N{family} advertisement-interval 0"]
        lines += [f" bgp listen range {subnet} peer-group N{family}"]
    for family in "46":
        lines += [f" address-family ipv{family} unicast", f"  neighbor N{family} activate"]
        lines += [f"  neighbor N{family} next-hop-self", " exit-address-family"]
    let_root_run_frr(folder)
    config, zebra = folder / "frr.conf", folder / "zebra.conf"
    config.write_text("\n".join(lines) + "\n")
    zebra.write_text("")
    common = ["--vty_socket", str(folder), "-z", str(folder / "zserv"), "-u", "root", "-g", "root"]

    def spawn(daemon: str, config: Path, *words: str) -> subprocess.Popen[bytes]:
        argv = [f"/usr/lib/frr/{daemon}", "-f", str(config), "-i", str(folder / f"{daemon}.pid"), *words]
        return net.spawn("tor", [*argv, *common], log=folder / "log")

    spawn("zebra", zebra)
    await_zebra(folder / "zserv")
    return spawn("bgpd", config, "-p", "179", "-l", TOR4, "-l", TOR6)


# -- pings ------------------------------------------------------------------------------------------------------------


class Pings:
    """A hundred packets a second from each pod to every other, both families. Which were lost is told by their numbers:
    one that was on its way at the end is none."""

    def __init__(self, segment: Segment, numbers: Iterable[int]) -> None:
        numbers = tuple(numbers)
        self._running: dict[tuple[int, str], tuple[subprocess.Popen[bytes], Path]] = {}
        for here in numbers:
            for there in numbers:
                for target in pod(there) if there != here else ():
                    log = segment.folder / f"ping-{here}-{target.replace(':', '-')}"
                    process = segment.net.spawn(f"pod-{here}", ["ping", "-n", "-i", "0.01", target], log=log)
                    self._running[here, target] = process, log

    def go_on(self) -> None:
        """Returns when each way has had another fifty answers."""
        before = self._answers()
        eventually(lambda: all(n > before[way] + 50 for way, n in self._answers().items()))

    def _answers(self) -> dict[tuple[int, str], int]:
        return {way: len(_numbers(log)) for way, (_, log) in self._running.items()}

    def stop(self) -> dict[tuple[int, str], list[int]]:
        """Way -> numbers of the packets lost, of those ways that lost any."""
        lost = {}
        for way, (process, log) in self._running.items():
            os.kill(process.pid, signal.SIGINT)
            process.wait(timeout=60)
            seen = _numbers(log)
            missing = sorted(set(range(1, max(seen, default=0))) - seen)
            if missing or not seen:
                lost[way] = missing
        return lost


def _numbers(log: Path) -> set[int]:
    return {int(n) for n in re.findall(r"icmp_seq=(\d+) ttl=", log.read_text())}
