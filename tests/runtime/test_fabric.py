"""Two machines with containerd, each behind a ToR of its own: pods started through the CRI reach each other."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.install import answers
from cni.marks import LINK_PREFIX, PROTO_IMPORTS, PROTO_PODS
from ipam import journal
from lab import rack, routers
from lab.net import Net
from lab.objects import objects
from lab.topology import Topology
from store.base import Store
from store.clock import SystemClock
from store.model import IPAMBlock, Node
from store.open import open_store
from tests.conftest import eventually
from tests.runtime.containerd import Containerd

MAP = Topology.build(racks=2, nodes=1, pods=0, spines=1)
BIN = Path(sys.executable).parent


class Fabric:
    """Spine, ToRs, and two nodes with everything that runs on one."""

    def __init__(self, folder: Path, shim: Path, tar: Path) -> None:
        self.net = Net(folder)
        self.folder = folder
        self._url = f"sqlite:{folder / 'store.db'}"
        self.machines: dict[str, Containerd] = {}
        rack.build(self.net, MAP)
        for router in MAP.routers:
            routers.start(self.net, MAP, router, folder / router.name)
        asyncio.run(self._fill())
        for node in MAP.nodes:
            run, state = self.run(node.name), folder / node.name / "state"
            for path in (run, state):
                path.mkdir(parents=True)
            shared = ["--node", node.name, "--store", self._url, "--run", str(run)]
            for argv in (
                ["underlay-cni", *shared],
                ["underlay-agent", *shared, "--state", str(state)],
                ["underlay-speaker", "--run", str(run)],
            ):
                log = folder / node.name / f"{argv[0]}.log"
                self.net.spawn(node.name, [str(BIN / argv[0]), *argv[1:]], log=log, cwd=folder)
        for node in MAP.nodes:
            run = self.run(node.name)
            eventually(lambda run=run: answers(run))
            machine = self.machines[node.name] = Containerd(self.net, node.name, folder / node.name / "containerd", run)
            machine.install(shim, run)
            machine.start()
            machine.load(tar)
            machine.ready()

    def run(self, node: str) -> Path:
        return self.folder / node / "run"

    async def _fill(self) -> None:
        store = open_store(self._url, clock=SystemClock())
        try:
            for obj in objects(MAP):
                made = await store.create(obj)
                if isinstance(made, Node) and isinstance(obj, Node):
                    await store.update_status(Node(metadata=made.metadata, spec=made.spec, status=obj.status))
        finally:
            await store.close()

    def blocks(self) -> tuple[IPAMBlock, ...]:
        async def run() -> tuple[IPAMBlock, ...]:
            store: Store = open_store(self._url, clock=SystemClock())
            try:
                return (await store.list(IPAMBlock)).items
            finally:
                await store.close()

        return asyncio.run(run())

    def converged(self) -> bool:
        """Every block is in the kernel of every ToR and of the other node."""
        blocks = {name: frozenset(b.spec.cidr for b in self.blocks() if b.spec.node == name) for name in self.machines}
        assert all(len(own) == 2 for own in blocks.values()), blocks
        everything = frozenset[str]().union(*blocks.values())
        gap = rack.missing(self.net, [r.name for r in MAP.routers], everything, protocol="bird")
        for name, own in blocks.items():
            gap = gap or rack.missing(self.net, [name], everything - own, protocol=PROTO_IMPORTS)
        assert not gap, gap
        return True

    def clean(self) -> bool:
        """Nothing is left of any pod, on either node."""
        for name, machine in self.machines.items():
            assert not machine.cri.sandboxes()
            assert not rack.routes(self.net, name, protocol=PROTO_PODS)
            links = json.loads(self.net.run(name, ["ip", "-j", "link"]).stdout)
            assert not [link["ifname"] for link in links if link["ifname"].startswith(LINK_PREFIX)]
            assert not journal.read(next(self.run(name).glob("journal-*"))).leases
        assert not [a for block in self.blocks() for a in block.status.allocations]
        return True

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        self.net.close()


@pytest.fixture
def fabric(busybox_tar: Path, tmp_path: Path, shim_c: Path) -> Iterator[Fabric]:
    made = Fabric(tmp_path, shim_c, busybox_tar)
    try:
        yield made
    finally:
        for log in tmp_path.glob("node-*/*.log"):
            print(f"--- {log}\n{log.read_text()[-3000:]}")
        made.close()


def test_pods_on_two_machines_reach_each_other_until_they_end(fabric: Fabric) -> None:
    eventually(fabric.converged)
    one, two = fabric.machines.values()
    under_way = [(machine, machine.begin(f"pod-{n}")) for machine in (one, two) for n in (1, 2)]
    pods = [(machine, starting.sandbox()) for machine, starting in under_way]
    for machine, sandbox in pods:
        machine.program(sandbox, f"pod-{1 + pods.index((machine, sandbox)) % 2}", "www", ["httpd", "-f", "-h", "/www"])
    for here, client in pods:
        for there, server in pods:
            if here is not there:
                addresses = there.cri.addresses(server)
                assert len(addresses) == 2
                for address in addresses:
                    here.inside_pod(client, ["ping", "-c", "1", "-W", "2", address])
                    eventually(lambda a=address, m=here, c=client: m.fetch(c, a).endswith("hello\n"))
    for machine, sandbox in pods:
        machine.end(sandbox)
        verbs = [(verb, bool(path)) for verb, path, _ in machine.calls(sandbox)]
        assert verbs == [("ADD", True), ("DEL", True), ("DEL", False)]
    eventually(fabric.clean)
