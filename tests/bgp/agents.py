"""A node of its own in a namespace: a SQLite store, the real speaker, the real agent, the real kernel."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from lab.net import Net
from store.base import Store
from store.clock import SystemClock
from store.errors import NotFound
from store.model import (
    ANNOTATION_ASN,
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
from tests.bgp import routers

T = TypeVar("T")
OWN4, OWN6 = "10.244.1.0/26", "fd00:10:244::40/122"


def peers(**changes: Any) -> dict[str, BGPPeerSpec]:
    """A BGPPeer of each family to the router of ``routers.wire``."""
    both = (("tor-4", routers.TOR4), ("tor-6", routers.TOR6))
    values = {"as_number": routers.TOR_AS, "node": "node-1", **changes}
    return {name: BGPPeerSpec(peer_ip=address, **values) for name, address in both}


class Agent:
    """Store, speaker and agent of ``node-1`` in the namespace ``node``, which is there already."""

    def __init__(
        self,
        net: Net,
        folder: Path,
        *,
        peers: Mapping[str, BGPPeerSpec],
        addresses: Sequence[str] = (routers.NODE4, routers.NODE6),
        blocks: Sequence[str] = (OWN4, OWN6),
    ) -> None:
        self.net, self.folder = net, folder
        self._peers, self._addresses, self._blocks = peers, addresses, blocks
        self.url = f"sqlite:{folder / 'store.db'}"
        self.process: subprocess.Popen[bytes] | None = None
        self.speaker: subprocess.Popen[bytes] | None = None
        self.store(self._fill)

    def store(self, act: Callable[[Store], Awaitable[T]]) -> T:
        async def once() -> T:
            opened = open_store(self.url, clock=SystemClock())
            try:
                return await act(opened)
            finally:
                await opened.close()

        return asyncio.run(once())

    async def _fill(self, store: Store) -> None:
        node = Node(metadata=Meta(name="node-1", annotations={ANNOTATION_ASN: str(routers.NODE_AS)}))
        made = await store.create(node)
        addresses = tuple(NodeAddress(type="InternalIP", address=a) for a in self._addresses)
        await store.update_status(replace(made, status=NodeStatus(addresses=addresses)))
        await store.create(
            BGPConfiguration(metadata=Meta(name="default"), spec=BGPConfigurationSpec(node_to_node_mesh_enabled=False))
        )
        await store.create(IPPool(metadata=Meta(name="v4"), spec=IPPoolSpec(cidr="10.244.0.0/16")))
        await store.create(IPPool(metadata=Meta(name="v6"), spec=IPPoolSpec(cidr="fd00:10:244::/48")))
        for name, spec in self._peers.items():
            await store.create(BGPPeer(metadata=Meta(name=name), spec=spec))
        for cidr in self._blocks:
            await store.create(block(cidr))

    def start_speaker(self) -> None:
        argv = [sys.executable, "-P", "-m", "agent.bgp.speaker", "--run", str(self.folder / "run")]
        self.speaker = self.net.spawn("node", argv, log=self.folder / "speaker.log")

    def start(self) -> None:
        argv = [sys.executable, "-P", "-c", "import sys; from agent.daemon import main; sys.exit(main())"]
        argv += ["--node", "node-1", "--store", self.url]
        argv += ["--run", str(self.folder / "run"), "--state", str(self.folder / "state")]
        self.process = self.net.spawn("node", argv, log=self.folder / "agent.log")

    def stop(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        os.kill(self.process.pid, number)
        return self.process.wait(timeout=60)

    def claim(self, cidr: str) -> None:
        """One more block."""
        self.store(lambda store: store.create(block(cidr)))

    def routes(self) -> list[str]:
        lines: list[str] = []
        for family in ("-4", "-6"):
            out = self.net.run("node", ["ip", family, "route", "show", "table", "main"]).stdout
            lines += (re.sub(r"\s+", " ", line).strip() for line in out.splitlines())
        return sorted(line for line in lines if "proto 14" in line)

    def status(self) -> BGPNodeStatus | None:
        try:
            return self.store(lambda store: store.get(BGPNodeStatus, "node-1"))
        except NotFound:
            return None


def block(cidr: str) -> IPAMBlock:
    pool = "v6" if ":" in cidr else "v4"
    return IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=IPAMBlockSpec(cidr=cidr, pool=pool, node="node-1"))
