"""A cluster's control plane: etcd, API server, controller-manager and scheduler, and what an operator types there."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from pathlib import Path
from typing import Final

from lab.cluster import fabric
from lab.cluster.api import Api
from lab.errors import LabError
from lab.folder import Folder
from lab.kube.build import NodePrograms, NotHere, Programs
from lab.kube.plane import NAMES, ClusterError, Nodes, Plane, Ports, write_kubeconfig
from lab.machine import PATH
from lab.net import Net
from lab.oob import CONTROL_PLANE
from lab.processes import Daemon
from lab.relay import relay
from lab.topology import Node
from lab.wire import Program
from store.clock import Clock
from store.errors import StoreError
from store.kube import KubeStore
from store.kubeaccess import Access, FixedToken
from store.kubehttp import Http, Limits

#: Where the API server listens: nothing translates the service's port.
_PORT: Final = 443
_CONTROLLERS: Final = ("*", "-node-ipam-controller", "-cloud-node-lifecycle-controller", "-service-lb-controller")
_LOOK_EVERY: Final = 0.05
_TAIL: Final = 3000


class ClusterPlane:
    """``listener`` is a socket of the namespace that people's shells are in; it leads to the API server."""

    def __init__(
        self,
        net: Net,
        clock: Clock,
        folder: Folder,
        programs: Programs,
        of_nodes: NodePrograms,
        nodes: tuple[Node, ...],
        listener: socket.socket,
    ) -> None:
        self._net, self._clock, self._folder, self._listener = net, clock, folder, listener
        self._home = folder.member(CONTROL_PLANE)
        self._kubectl = of_nodes.kubectl
        self.plane = Plane(
            programs=programs,
            folder=self._home,
            admin_token=secrets.token_urlsafe(32),
            manager_token=secrets.token_urlsafe(32),
            address=fabric.SERVICE,
            ports=Ports(api=_PORT),
            nodes=Nodes(
                programs=of_nodes,
                scheduler_token=secrets.token_urlsafe(32),
                tokens={node.name: secrets.token_urlsafe(32) for node in nodes},
            ),
        )
        self._access = Access(server=self.plane.url, ca=self.plane.ca, tokens=FixedToken(self.plane.admin_token))
        self._http = Http(self._access, clock, random.Random(), Limits())
        self.api = Api(self._http, clock)
        plane = self.plane
        commands: dict[Program, list[str]] = {
            "etcd": plane.etcd(),
            "kube-apiserver": plane.apiserver(),
            "kube-controller-manager": plane.controller_manager(_CONTROLLERS),
            "kube-scheduler": plane.scheduler(),
        }
        self.daemons: dict[Program, Daemon] = {name: self._daemon(name, argv) for name, argv in commands.items()}

    @property
    def store_url(self) -> str:
        """The store of an operator whose shell is outside of the lab."""
        return f"kube:{self._folder.path / 'admin.kubeconfig'}"

    @property
    def environment(self) -> dict[str, str]:
        """What the tools of an operator need to know who is inside of the lab."""
        path = f"{self._kubectl.parent}:{PATH}"
        return {"UNDERLAY_STORE": f"kube:{self._inside}", "KUBECONFIG": str(self._inside), "PATH": path}

    def store(self) -> KubeStore:
        """As administrator. To be closed by the caller."""
        return KubeStore(self._access, self._clock)

    def prepare(self) -> None:
        """Makes keys and the operator's kubeconfigs. Raises LabError."""
        try:
            self.plane.prepare(names=f"{NAMES},IP:{fabric.SERVICE}")
        except (NotHere, ClusterError) as e:
            raise LabError(str(e)) from e
        host, port = self._listener.getsockname()
        token = self.plane.admin_token
        write_kubeconfig(self._folder.path / "admin.kubeconfig", f"https://{host}:{port}", self.plane.ca, token=token)
        write_kubeconfig(self._inside, self.plane.url, self.plane.ca, token=token)

    async def run(self) -> None:
        """Keeps all of it up until it is cancelled; ``prepare`` has been called, and the fabric is there."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(relay(self._listener, fabric.SERVICE, _PORT))
                for daemon in self.daemons.values():
                    group.create_task(daemon.run())
        finally:
            await self._http.close()

    async def ready(self, *, limit: float) -> None:
        """Returns when the API server says that it is ready. Raises LabError."""
        end = self._clock.monotonic() + limit
        while True:
            try:
                await self._http.call("GET", "/readyz")
            except StoreError as e:
                if self._clock.monotonic() > end:
                    log = self._home / "kube-apiserver.log"
                    raise LabError(
                        f"the API server is not ready: {e}\n{log.read_text(errors='replace')[-_TAIL:]}"
                    ) from e
            else:
                return
            await self._clock.sleep(_LOOK_EVERY)

    async def kubectl(self, *words: str, limit: float = 120) -> str:
        """What kubectl prints, as an operator. Raises LabError if it fails."""
        process = await asyncio.create_subprocess_exec(
            str(self._kubectl),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": PATH, "KUBECONFIG": str(self._inside), "HOME": str(self._home)},
        )
        try:
            async with asyncio.timeout(limit):
                said = (await process.communicate())[0].decode(errors="replace")
        except TimeoutError as e:
            raise LabError(f"kubectl {' '.join(words)}: no end after {limit:.0f} s") from e
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            raise LabError(f"kubectl {' '.join(words)}: {said.strip()}")
        return said

    @property
    def _inside(self) -> Path:
        return self._home / "admin.kubeconfig"

    def _daemon(self, name: Program, argv: list[str]) -> Daemon:
        return Daemon(
            self._net,
            self._clock,
            member=CONTROL_PLANE,
            name=name,
            argv=argv,
            environment={"PATH": PATH, "HOME": "/"},
            log=self._home / f"{name}.log",
        )
