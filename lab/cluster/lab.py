"""A lab whose nodes are a real cluster's. Underlay is put there as a user does it: ``kubectl apply -k manifests/``."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final

import msgspec

from lab import busybox, rack
from lab.building import Kube, Lab
from lab.cluster import config, fabric
from lab.cluster.control import ClusterPlane
from lab.cluster.machine import KubeMachine
from lab.folder import Folder
from lab.kube.build import NodePrograms, Programs
from lab.objects import objects
from lab.topology import Topology
from store.base import Store
from store.clock import Clock
from store.files import dump_yaml
from store.model import Node

MANIFESTS: Final = Path(__file__).resolve().parents[2] / "manifests"
#: Pools and peers of the rack, in the lab's folder: what an operator applies after the manifests.
FABRIC: Final = "fabric.yaml"
_API_WITHIN: Final = 120.0
_NODES_WITHIN: Final = 120.0
_IMAGES_WITHIN: Final = 120.0


class Parts(msgspec.Struct, frozen=True):
    """What a cluster is made of: programs, the image of Underlay, the socket that people reach the API server by; and
    whether Underlay is to be installed, or left to whoever asks."""

    programs: Programs
    of_nodes: NodePrograms
    image: Path
    listener: socket.socket
    install: bool


class ClusterLab(Lab):
    """As ``Lab``. Without ``install`` it is up when the nodes have joined: not Ready, as they have no network."""

    def __init__(self, folder: Folder, topology: Topology, clock: Clock, parts: Parts) -> None:
        self._parts = parts
        super().__init__(folder, topology, clock)

    def _open_store(self, kube: Kube | None) -> Store:
        parts = self._parts
        self._cluster = ClusterPlane(
            self._net,
            self._clock,
            self._folder,
            parts.programs,
            parts.of_nodes,
            self._topology.nodes,
            parts.listener,
        )
        self._api = self._cluster
        return self._cluster.store()

    async def _build(self, group: asyncio.TaskGroup) -> None:
        topology, step, cluster = self._topology, self._story.step, self._cluster
        with step("keys, and an image for pods"):
            cluster.prepare()
            sandbox = self._folder.path / "busybox.tar"
            busybox.write(sandbox, config.SANDBOX_IMAGE)
            wishes = (obj for obj in objects(topology) if not isinstance(obj, Node))
            (self._folder.path / FABRIC).write_text(dump_yaml(wishes))
        with step(f"namespaces for {self._census()}; {len(topology.links)} links"):
            rack.build(self._net, topology)
            fabric.plug(self._net, topology)
        group.create_task(cluster.run())
        self._start_routers(group)
        with step("etcd, API server, controller-manager and scheduler"):
            await cluster.ready(limit=_API_WITHIN)
        with step("containerd and kubelet on each node, with their images"):
            machines = [
                KubeMachine(
                    self._net,
                    self._clock,
                    self._folder,
                    node,
                    cluster.plane,
                    cluster.api,
                    [sandbox, self._parts.image],
                )
                for node in topology.nodes
            ]
            for machine in machines:
                self._machines[machine.node.name] = machine
                group.create_task(machine.run())
            await asyncio.gather(*(machine.load(limit=_IMAGES_WITHIN) for machine in machines))
            await self._nodes(ready=False)
            await self._mark_nodes()
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
        """Labels and AS number, as an operator sets them: kubelets make the Nodes."""
        for obj in objects(self._topology):
            if isinstance(obj, Node):
                meta = obj.metadata
                await self._cluster.api.mark_node(
                    obj.name, labels=dict(meta.labels), annotations=dict(meta.annotations)
                )

    async def _fill_store(self) -> None:
        async with asyncio.TaskGroup() as group:
            for obj in objects(self._topology):
                if not isinstance(obj, Node):
                    group.create_task(self._fill(obj))
