"""Two nodes that are linked to the same two ToRs: ``node-u`` runs our agent and speaker, ``node-b`` runs BIRD in their
place. The ToRs run BIRD; behind both is a machine, ``far``, that stands for the rest of the network.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from lab.net import Net
from lab.routers import bird_argv, birdc
from store.clock import SystemClock
from store.model import (
    BGPConfiguration,
    BGPConfigurationSpec,
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

POOL: Final = "10.64.0.0/10"
#: Where the far machine is; both ToRs announce it.
FAR, FAR_ADDRESS = "10.127.255.192/26", "10.127.255.193"
TORS: Final = ("tor-a", "tor-b")
#: Which node's links are 10.N.0.0/16.
NODES: Final = {"node-u": 1, "node-b": 2}
NODE_AS, TOR_AS = 65100, 65001
LIMIT: Final = 60.0
_BIN: Final = Path(sys.executable).parent


class BenchError(Exception):
    """What was waited for did not come."""


class Rack:
    """The routers in their namespaces, started. ``folder`` takes their files; ``table`` is what ``load`` announces."""

    def __init__(self, net: Net, folder: Path, table: Iterator[str]) -> None:
        self.net, self._folder = net, folder
        (folder / "table.conf").parent.mkdir(parents=True, exist_ok=True)
        (folder / "table.conf").write_text("".join(f"route {prefix} blackhole;\n" for prefix in table))
        self._store = f"sqlite:{folder / 'store.db'}"
        self._blocks = dict.fromkeys(NODES, 0)
        self._wire()
        for number, tor in enumerate(TORS, 1):
            self._bird(tor, self._tor(number))
        self._bird("node-b", self._node_b())
        asyncio.run(self._fill())
        run = ["--run", str(folder / "run")]
        net.spawn("node-u", [str(_BIN / "underlay-speaker"), *run], log=folder / "speaker.log")
        words = ["--node", "node-u", "--store", self._store, "--state", str(folder / "state")]
        net.spawn("node-u", [str(_BIN / "underlay-agent"), *run, *words], log=folder / "agent.log")
        for node in NODES:
            self.until(lambda node=node: self.hops(node) == 2, f"{node} has both ways to {FAR}")

    def next_block(self, node: str) -> str:
        """A block of the node's that nobody has announced yet."""
        self._blocks[node] += 1
        return f"10.{100 + NODES[node]}.{self._blocks[node]}.0/26"

    def announce(self, node: str, cidr: str) -> None:
        """The wish that the block be announced, as each of the two is told: in the store; as a route in the kernel."""
        if node == "node-b":
            self.net.ip(node, [f"route add blackhole {cidr} proto static"])
            return
        asyncio.run(self._create(IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=_block(cidr))))

    def load(self, node: str, *, on: bool) -> None:
        """Has the first ToR announce the whole table to the node, or withdraw it."""
        control = self._folder / TORS[0] / "bird.ctl"
        word = "enable" if on else "disable"
        self.net.run(TORS[0], ["birdc", "-s", str(control), word, f"table_{node[-1]}"])

    def link(self, node: str, tor: str, *, up: bool) -> None:
        """Gives the link its carrier, or takes it, at the ToR's end; returns before it is done."""
        self.net.spawn(tor, ["ip", "link", "set", "dev", node, "up" if up else "down"])

    def hops(self, node: str) -> int:
        """How many next hops the node's kernel has to the far machine."""
        found = json.loads(self.net.run(node, ["ip", "-j", "route", "show", FAR]).stdout or "[]")
        return len(found[0].get("nexthops", [0])) if found else 0

    def until(self, done: Callable[[], bool], what: str, *, every: float = 0.05) -> None:
        """Raises BenchError after ``LIMIT`` seconds."""
        end = time.monotonic() + LIMIT
        while not done():
            if time.monotonic() > end:
                raise BenchError(f"after {LIMIT:.0f} s still not: {what}; logs are in {self._folder}")
            time.sleep(every)

    def said(self, tor: str, *words: str) -> str:
        return birdc(self.net, tor, self._folder / tor, *words)

    # -- building ---------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        net = self.net
        for name in (*NODES, *TORS, "far"):
            net.add(name, forwarding=True)
        net.address("far", "lo", [f"{FAR_ADDRESS}/32"])
        for number, tor in enumerate(TORS, 1):
            for node, place in NODES.items():
                net.link(tor, node, node, tor)
                net.address(tor, node, [f"10.{place}.{number}.0/31"])
                net.address(node, tor, [f"10.{place}.{number}.1/31"])
            net.link(tor, "far", "far", tor)
            net.address(tor, "far", [f"10.9.{number}.0/31"])
            net.address("far", tor, [f"10.9.{number}.1/31"])
        for node in NODES:
            net.sysctl(node, {"net.ipv4.fib_multipath_hash_policy": "1"})

    def _bird(self, name: str, text: str) -> None:
        folder = self._folder / name
        folder.mkdir()
        (folder / "bird.conf").write_text(f"log stderr all;\nprotocol device {{ scan time 1; }}\n{text}")
        self.net.spawn(name, bird_argv(folder), log=folder / "bird.log")

    def _tor(self, number: int) -> str:
        session = "hold time 9; connect retry time 1; error wait time 1, 1; connect delay time 0; check link yes;"
        lines = [
            f"router id 10.9.{number}.0;",
            'protocol kernel { ipv4 { import none; export where source = RTS_BGP || proto = "ways"; }; }',
            f"protocol static ways {{ ipv4; route {FAR} via 10.9.{number}.1; }}",
        ]
        for node, place in NODES.items():
            table = f"table_{node[-1]}"
            lines += [
                f"protocol static {table} {{ ipv4; disabled yes;",
                f'include "{self._folder}/table.conf";',  # at the beginning of a line, or it is no include
                "}",
                f"protocol bgp {node.replace('-', '_')} {{",
                f"  local 10.{place}.{number}.0 as {TOR_AS}; neighbor 10.{place}.{number}.1 as {NODE_AS};",
                f"  {session} {'passive yes;' if node == 'node-u' else ''}",
                f'  ipv4 {{ import all; export where proto = "ways" || proto = "{table}"; next hop self; }};',
                "}",
            ]
        return "\n".join(lines) + "\n"

    def _node_b(self) -> str:
        lines = [
            "router id 10.2.1.1;",
            "protocol kernel { learn; merge paths on limit 16; scan time 60;",
            "  ipv4 { import where krt_source = 4; export where source = RTS_BGP; }; }",
        ]
        for number, _ in enumerate(TORS, 1):
            lines += [
                f"protocol bgp tor_{number} {{",
                f"  local 10.2.{number}.1 as {NODE_AS}; neighbor 10.2.{number}.0 as {TOR_AS};",
                "  hold time 9; connect retry time 1; error wait time 1, 1; connect delay time 0; check link yes;",
                "  ipv4 { import all; export where source = RTS_INHERIT; next hop self; };",
                "}",
            ]
        return "\n".join(lines) + "\n"

    async def _fill(self) -> None:
        store = open_store(self._store, clock=SystemClock())
        try:
            node = await store.create(Node(metadata=Meta(name="node-u")))
            address = NodeAddress(type="InternalIP", address="10.1.1.1")
            await store.update_status(Node(metadata=node.metadata, status=NodeStatus(addresses=(address,))))
            spec = BGPConfigurationSpec(as_number=NODE_AS, node_to_node_mesh_enabled=False)
            await store.create(BGPConfiguration(metadata=Meta(name="default"), spec=spec))
            await store.create(IPPool(metadata=Meta(name="pods"), spec=IPPoolSpec(cidr=POOL, block_size=26)))
            for number, tor in enumerate(TORS, 1):
                peer = BGPPeerSpec(peer_ip=f"10.1.{number}.0", as_number=TOR_AS, max_prefixes=200_000)
                await store.create(BGPPeer(metadata=Meta(name=tor), spec=peer))
        finally:
            await store.close()

    async def _create(self, block: IPAMBlock) -> None:
        store = open_store(self._store, clock=SystemClock())
        try:
            await store.create(block)
        finally:
            await store.close()


def _block(cidr: str) -> IPAMBlockSpec:
    return IPAMBlockSpec(cidr=cidr, pool="pods", node="node-u")
