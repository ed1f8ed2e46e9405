"""A lab whose nodes are a real cluster's. Underlay is put there as a user does it: ``kubectl apply -k manifests/``."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final

import msgspec

from lab import busybox, gobuild, rack
from lab.building import Kube, Lab
from lab.cluster import config, fabric, images, installer
from lab.cluster.control import ClusterPlane
from lab.cluster.machine import KubeMachine
from lab.folder import Folder, make_on_machine
from lab.kube.build import NodePrograms, Programs
from lab.objects import objects
from lab.topology import Topology
from lab.wire import Installer
from store.base import Store
from store.clock import Clock
from store.files import dump_yaml
from store.model import IPPool, Node, Resource

MANIFESTS: Final = Path(__file__).resolve().parents[2] / "manifests"
#: Pools and peers of the rack, in the lab's folder: what an operator applies after the manifests.
FABRIC: Final = "fabric.yaml"
_API_WITHIN: Final = 120.0
_NODES_WITHIN: Final = 120.0


class Parts(msgspec.Struct, frozen=True):
    """What a cluster is made of: programs, the image of Underlay, the socket that people reach the API server by; and
    whether Underlay is to be installed, or left to whoever asks; who says which addresses pods have, in place of pools
    of the lab's own."""

    programs: Programs
    of_nodes: NodePrograms
    image: Path
    listener: socket.socket
    install: bool
    installer: Installer | None = None


class ClusterLab(Lab):
    """As ``Lab``. Without ``install`` it is up when the nodes have joined: not Ready, as they have no network."""

    def __init__(self, folder: Folder, topology: Topology, clock: Clock, parts: Parts) -> None:
        self._parts = parts
        self._held: list[int] = []  # as long as we live
        super().__init__(folder, topology, clock)

    def _open_store(self, kube: Kube | None) -> Store:
        parts = self._parts
        self._cluster = ClusterPlane(
            self._net,
            self._clock,
            self._folder,
            parts.programs,
            parts.of_nodes,
            self._topology,
            parts.listener,
            installer.flags(self._topology) if parts.installer else (),
        )
        self._api = self._cluster
        return self._cluster.store()

    async def switch(self, node: str, *, on: bool) -> None:
        machine = self._kube_machine(node)
        if not on:
            await machine.switch_off()
            rack.switch_off(self._net, self._topology, machine.node)
            return
        machine.refuse_on()
        rack.switch_on(self._net, self._topology, machine.node)
        fabric.lead(self._net, self._topology, machine.node)
        await machine.switch_on()
        await self._mark_node(node)

    async def rename(self, node: str, name: str) -> None:
        machine = self._kube_machine(node)
        await machine.rename(name)
        if machine.on:
            await self._mark_node(node)

    def _kube_machine(self, name: str) -> KubeMachine:
        machine = self._machine(name)
        assert isinstance(machine, KubeMachine)
        return machine

    async def _build(self, group: asyncio.TaskGroup) -> None:
        topology, step, cluster = self._topology, self._story.step, self._cluster
        with step("keys, and an image for pods"):
            cluster.prepare()
            self._held = make_on_machine(self._folder, config.FOLDERS)
            sandbox = self._folder.path / "busybox.tar"
            busybox.write(sandbox, config.SANDBOX_IMAGE)
            (self._folder.path / FABRIC).write_text(dump_yaml(self._wishes()))
        with step(f"namespaces for {self._census()}; {len(topology.links)} links"):
            rack.build(self._net, topology)
            fabric.plug(self._net, topology)
        group.create_task(cluster.run())
        self._start_routers(group)
        with step("etcd, API server, controller-manager and scheduler"):
            await cluster.ready(limit=_API_WITHIN)
        with step("containerd and kubelet on each node, with their images"):
            unpacked, fd = await images.unpacked(gobuild.root(), [sandbox, self._parts.image], self._clock)
            self._held.append(fd)
            for node in topology.nodes:
                machine = KubeMachine(self._net, self._clock, self._folder, node, cluster.plane, cluster.api, unpacked)
                self._machines[node.name] = machine
                group.create_task(machine.run())
            await self._nodes(ready=False)
            await self._mark_nodes()
        if self._parts.installer == "kubeadm":
            with step("kubeadm's configuration"):
                await cluster.kubeadm_config()
        if not self._parts.install:
            return
        with step("kubectl apply -k manifests/"):
            await cluster.kubectl("apply", "-k", str(MANIFESTS))
        with step("pools and peers"):
            await self._fill_store()
        with step("nodes Ready"):
            await self._nodes(ready=True)
        with step(f"{sum(len(node.pods) for node in topology.nodes)} pods"):
            await self._add_pods()
        await self._see_routes()

    async def _nodes(self, *, ready: bool) -> None:
        names = [node.name for node in self._topology.nodes]
        await asyncio.gather(*(self._cluster.api.registered(n, limit=_NODES_WITHIN, ready=ready) for n in names))

    async def _mark_nodes(self) -> None:
        for name in self._machines:
            await self._mark_node(name)

    async def _mark_node(self, machine: str) -> None:
        """Labels and AS number, as an operator sets them: kubelets make the Nodes."""
        name = self._machines[machine].name
        await self._cluster.api.registered(name, limit=_NODES_WITHIN, ready=False)
        meta = next(o.metadata for o in objects(self._topology) if isinstance(o, Node) and o.name == machine)
        await self._cluster.api.mark_node(name, labels=dict(meta.labels), annotations=dict(meta.annotations))

    async def _fill_store(self) -> None:
        async with asyncio.TaskGroup() as group:
            for obj in self._wishes():
                group.create_task(self._fill(obj))

    def _wishes(self) -> list[Resource]:
        """What is applied after the manifests."""
        left_out = (Node, IPPool) if self._parts.installer else (Node,)
        return [obj for obj in objects(self._topology) if not isinstance(obj, left_out)]
