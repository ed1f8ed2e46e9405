"""The lab's own Kubernetes: etcd, API server and controller-manager, and Underlay installed there as an operator would.

They are members of the lab like BIRD: started again when they end, gone with it.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from lab import oob
from lab.errors import LabError
from lab.folder import Folder
from lab.kube import installed
from lab.kube.build import NotHere, Programs
from lab.kube.plane import GO, NAMES, ClusterError, Plane, write_kubeconfig
from lab.kubelets import ACCOUNTS, Credentials, Kubelets
from lab.machine import PATH, Stores
from lab.net import Net
from lab.processes import Daemon
from lab.relay import relay
from lab.topology import Node
from lab.wire import Program
from store.clock import Clock
from store.errors import StoreError, Unavailable
from store.kube import KubeStore
from store.kubeaccess import Access, FixedToken
from store.kubehttp import Http, Limits, Refusal

#: Ends of an API server that never was ready, after which it is not waited for any longer: etcd may be slower.
_ENDS: Final = 5
_LOOK_EVERY: Final = 0.05
_TAIL: Final = 3000
_APPLY: Final = "application/apply-patch+yaml"
_CRD: Final = "CustomResourceDefinition"


class Control:
    """An API server of the lab's own, and whatever runs beside it. ``listener`` is a socket of the namespace that
    people's shells are in; it leads to the API server, at ``address`` in the lab."""

    def __init__(
        self, net: Net, clock: Clock, folder: Folder, plane: Plane, listener: socket.socket, *, address: str
    ) -> None:
        self._net, self._clock, self._folder, self._listener = net, clock, folder, listener
        self._home, self._address = plane.folder, address
        self.plane = plane
        self._access = Access(server=plane.url, ca=plane.ca, tokens=FixedToken(plane.admin_token))
        self._http = Http(self._access, clock, random.Random(), Limits())
        self.daemons: dict[Program, Daemon] = {}

    @property
    def store_url(self) -> str:
        """The store of an operator whose shell is outside of the lab."""
        return f"kube:{self._folder.path / 'admin.kubeconfig'}"

    @property
    def environment(self) -> dict[str, str]:
        """What the tools of an operator need to know who is inside of the lab."""
        return {"UNDERLAY_STORE": f"kube:{self._inside}", "KUBECONFIG": str(self._inside)}

    def store(self) -> KubeStore:
        """As administrator: what a person would fill by hand. To be closed by the caller."""
        return KubeStore(self._access, self._clock)

    def prepare(self) -> None:
        """Makes keys and the operator's kubeconfigs: one for shells on this machine, one for those inside. Raises
        LabError."""
        try:
            self.plane.prepare(names=f"{NAMES},IP:{self._address}")
        except (NotHere, ClusterError) as e:
            raise LabError(str(e)) from e
        host, port = self._listener.getsockname()
        token = self.plane.admin_token
        write_kubeconfig(self._folder.path / "admin.kubeconfig", f"https://{host}:{port}", self.plane.ca, token=token)
        write_kubeconfig(self._inside, self.plane.url, self.plane.ca, token=token)

    async def ready(self, *, limit: float) -> None:
        """Returns when the API server says that it is ready. Raises LabError."""
        end = self._clock.monotonic() + limit
        while True:
            try:
                await self._http.call("GET", "/readyz")
            except StoreError as e:
                restarts = self.daemons["kube-apiserver"].state().restarts
                if self._clock.monotonic() > end or restarts >= _ENDS:
                    log = self._log("kube-apiserver")
                    tail = log.read_text(errors="replace")[-_TAIL:]
                    raise LabError(f"the API server is not ready, {restarts} restarts: {e}\n{log}:\n{tail}") from e
            else:
                return
            await self._clock.sleep(_LOOK_EVERY)

    async def _lead(self) -> None:
        """Lets people's shells in, until it is cancelled."""
        await relay(self._listener, self._address, self.plane.ports.api)

    @property
    def _inside(self) -> Path:
        return self._home / "admin.kubeconfig"

    def _log(self, name: str) -> Path:
        return self._home / f"{name}.log"

    def _daemon(self, name: Program, argv: list[str]) -> Daemon:
        return Daemon(
            self._net,
            self._clock,
            member=oob.CONTROL_PLANE,
            name=name,
            argv=argv,
            environment={"PATH": PATH, "HOME": "/"} | GO,
            log=self._log(name),
        )


class ControlPlane(Control):
    def __init__(self, net: Net, clock: Clock, folder: Folder, programs: Programs, listener: socket.socket) -> None:
        plane = Plane(
            programs=programs,
            folder=folder.member(oob.CONTROL_PLANE),
            admin_token=secrets.token_urlsafe(32),
            manager_token=secrets.token_urlsafe(32),
            address=oob.SERVER,
        )
        super().__init__(net, clock, folder, plane, listener, address=oob.SERVER)
        self._installed = asyncio.Event()
        self.kubelets = Kubelets(self._http, clock, plane)
        self.daemons = {
            "etcd": self._daemon("etcd", plane.etcd()),
            "kube-apiserver": self._daemon("kube-apiserver", plane.apiserver()),
            "kube-controller-manager": self._daemon("kube-controller-manager", plane.controller_manager()),
        }

    def prepare(self) -> None:
        """Makes the network, too. Raises LabError, NetError."""
        oob.build(self._net)
        super().prepare()

    async def run(self) -> None:
        """Keeps all of it up until it is cancelled; ``prepare`` has been called."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._lead())
                group.create_task(self.kubelets.run())
                group.create_task(self.daemons["etcd"].run())
                group.create_task(self.daemons["kube-apiserver"].run())
                # Its garbage collector looks for new kinds every 30 s only, so it comes after ours are there.
                await self._installed.wait()
                group.create_task(self.daemons["kube-controller-manager"].run())
        finally:
            await self._http.close()

    async def install(self, *, limit: float) -> None:
        """Applies what an operator does: custom resources, rights, policies. Raises StoreError; LabError if the
        resources are not served after ``limit`` seconds."""
        documents = installed.documents()
        first = [d for d in documents if d["kind"] in (_CRD, "Namespace")]
        await self._apply(first)
        end = self._clock.monotonic() + limit
        for document in first:
            if document["kind"] == _CRD:
                await self._served(document, end)
        await self._apply([d for d in documents if d not in first])
        self._installed.set()

    async def admit(self, node: Node) -> Stores:
        """Makes the Pods of our processes on the node; which store each is to be given, so that it has no right but its
        own. Raises StoreError."""
        home = self._folder.member(node.name) / "credentials"
        credentials = {part: Credentials(home / part) for part in ACCOUNTS}
        await self.kubelets.admit(node.name, credentials)
        return Stores(
            cni=f"kube:{credentials['cni'].kubeconfig}",
            agent=f"kube:{credentials['agent'].kubeconfig}",
            operator=self.environment["UNDERLAY_STORE"],
        )

    async def _apply(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Server-side apply, all at once."""
        versions = {document["apiVersion"] for document in documents}
        names = {version: await self._resources(version) for version in versions}
        async with asyncio.TaskGroup() as group:
            for document in documents:
                resource = names[document["apiVersion"]][document["kind"]]
                meta = document["metadata"]
                space = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
                path = f"{_root(document['apiVersion'])}{space}/{resource}/{meta['name']}"
                query = {"fieldManager": "underlay-lab", "force": "true"}
                group.create_task(self._http.call("PATCH", path, query=query, body=document, content_type=_APPLY))

    async def _resources(self, version: str) -> dict[str, str]:
        """The plural of each kind, as the API server has them."""
        answer = msgspec.json.decode(await self._http.call("GET", _root(version)))
        return {r["kind"]: r["name"] for r in answer["resources"] if "/" not in r["name"]}

    async def _served(self, crd: Mapping[str, Any], end: float) -> None:
        spec = crd["spec"]
        path = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
        while True:
            try:
                await self._http.call("GET", path, query={"limit": "1"})
            except (Refusal, Unavailable) as e:
                if self._clock.monotonic() > end:
                    raise LabError(f"{crd['metadata']['name']} is not served: {e}") from e
            else:
                return
            await self._clock.sleep(_LOOK_EVERY)


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"
