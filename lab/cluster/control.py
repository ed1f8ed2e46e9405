"""A cluster's control plane: etcd, API server, controller-manager and scheduler, and what an operator types there."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.cluster import fabric, installer
from lab.cluster.api import Api
from lab.control import Control
from lab.errors import LabError
from lab.folder import Folder
from lab.kube.build import NodePrograms, Programs, version
from lab.kube.plane import Nodes, Plane, Ports
from lab.machine import PATH
from lab.net import Net
from lab.oob import CONTROL_PLANE
from lab.processes import outcome
from lab.topology import Topology
from lab.wire import Program
from store.clock import Clock

#: Where the API server listens: nothing translates the service's port.
_PORT: Final = 443
_CONTROLLERS: Final = ("*", "-cloud-node-lifecycle-controller", "-service-lb-controller")
_NODE_IPAM: Final = "-node-ipam-controller"
#: Enough for every request of a test's cluster, and no burden to a lab that is left alone overnight.
_AUDIT_MB: Final = 64


def _controllers(flags: Sequence[str]) -> tuple[str, ...]:
    """All that work where there is no cloud; the one that hands out podCIDRs where it is told of which."""
    return _CONTROLLERS if flags else (*_CONTROLLERS, _NODE_IPAM)


class ClusterPlane(Control):
    def __init__(
        self,
        net: Net,
        clock: Clock,
        folder: Folder,
        programs: Programs,
        of_nodes: NodePrograms,
        topology: Topology,
        listener: socket.socket,
        manager_flags: Sequence[str] = (),
    ) -> None:
        plane = Plane(
            programs=programs,
            folder=folder.member(CONTROL_PLANE),
            admin_token=secrets.token_urlsafe(32),
            manager_token=secrets.token_urlsafe(32),
            address=fabric.service(topology),
            services=fabric.services(topology),
            endpoint=fabric.endpoint(topology),
            ports=Ports(api=_PORT),
            audit=_AUDIT_MB,
            nodes=Nodes(
                programs=of_nodes,
                scheduler_token=secrets.token_urlsafe(32),
                tokens={node.name: secrets.token_urlsafe(32) for node in topology.nodes},
            ),
        )
        super().__init__(net, clock, folder, plane, listener, address=fabric.service(topology))
        self._kubectl, self._kubeadm, self._topology = of_nodes.kubectl, of_nodes.kubeadm, topology
        self.api = Api(self._http, clock)
        commands: dict[Program, list[str]] = {
            "etcd": plane.etcd(),
            "kube-apiserver": plane.apiserver(),
            "kube-controller-manager": [*plane.controller_manager(_controllers(manager_flags)), *manager_flags],
            "kube-scheduler": plane.scheduler(),
        }
        self.daemons = {name: self._daemon(name, argv) for name, argv in commands.items()}

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "PATH": f"{self._kubectl.parent}:{PATH}"}

    async def run(self) -> None:
        """Keeps all of it up until it is cancelled; ``prepare`` has been called, and the fabric is there."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lead())
                for daemon in self.daemons.values():
                    group.create_task(daemon.run())
        finally:
            await self._http.close()

    async def kubectl(self, *words: str, limit: float = 120) -> str:
        """What kubectl prints, as an operator. Raises LabError if it fails."""
        return await self._tool(self._kubectl, words, limit=limit)

    async def _tool(self, program: Path, words: Sequence[str], *, limit: float) -> str:
        environment = {"PATH": PATH, "KUBECONFIG": str(self._inside), "HOME": str(self._home)}
        try:
            async with asyncio.timeout(limit):
                code, said = await outcome([str(program), *words], environment)
        except TimeoutError as e:
            raise LabError(f"{program.name} {' '.join(words)}: no end after {limit:.0f} s") from e
        if code:
            raise LabError(f"{program.name} {' '.join(words)}: {said.strip()}")
        return said

    async def kubeadm_config(self) -> None:
        """Has kubeadm itself leave its configuration, as at the end of ``kubeadm init``. The nodes have joined. Raises
        LabError."""
        file = self._home / "kubeadm.yaml"
        file.write_text(installer.kubeadm(self._topology, self.plane.endpoint, version()))
        words = ["init", "phase", "upload-config", "kubeadm", f"--config={file}", f"--kubeconfig={self._inside}"]
        await self._tool(self._kubeadm, words, limit=120)
