"""One node of a cluster: a machine of its own as far as containerd and kubelet can tell.

What an ordinary lab's node does itself is left to them: Underlay comes as pods of its manifests, and the lab's pods are
Pods, made on the API server and bound to the node.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.cluster import config
from lab.cluster.api import Api
from lab.errors import LabError
from lab.folder import Folder
from lab.kube.plane import Plane
from lab.machine import PATH
from lab.net import Net
from lab.processes import Daemon
from lab.runtime import Sandbox
from lab.topology import Node, pod_number, rack_name
from lab.wire import KubePart, NodeState, PodState
from store.clock import Clock

_LOOK_EVERY: Final = 0.05
_LIMIT: Final = 60.0
#: Of the reference set: containerd takes the first for itself, the other is for hostPort.
_PLUGINS: Final = (Path("/usr/lib/cni/loopback"), Path("/usr/lib/cni/portmap"))


class KubeMachine:
    """``run()`` keeps containerd and kubelet up; ``ready()`` returns when the Node is Ready. ``images`` are tars."""

    def __init__(
        self, net: Net, clock: Clock, folder: Folder, node: Node, plane: Plane, api: Api, images: Sequence[Path]
    ) -> None:
        self.node = node
        self._net, self._clock, self._plane, self._api = net, clock, plane, api
        self._images = tuple(images)
        self._home = folder.member(node.name)
        for part in (*config.FOLDERS.values(), "proc", "log"):
            (self._home / part).mkdir(parents=True, exist_ok=True)
        (self._home / "containerd.toml").write_text(config.containerd(self._home))
        (self._home / "kubelet.json").write_text(config.kubelet(plane.ca))
        for plugin in _PLUGINS:
            shutil.copy2(plugin, self._home / "bin" / plugin.name)
        self.environment = {"KUBECONFIG": str(plane.kubelet(node.name))}
        self._holder: asyncio.subprocess.Process | None = None
        self._booted = asyncio.Event()
        self._pid = 0
        self._daemons: dict[KubePart, Daemon] = {}
        self._sandboxes: dict[str, Sandbox] = {}
        self._busy: set[str] = set()

    @property
    def daemons(self) -> dict[KubePart, Daemon]:
        return self._daemons

    @property
    def sandboxes(self) -> dict[str, Sandbox]:
        return dict(self._sandboxes)

    def inside(self, *words: str) -> list[str]:
        """The command line that runs a command as if at the node's console (its network is the caller's to enter)."""
        return ["nsenter", f"--target={self._pid}", "--mount", "--root", "--uts", "--pid", *words]

    async def run(self) -> None:
        """Until it is cancelled: the kernel then ends whatever is in the node."""
        await self._boot()
        self._booted.set()
        try:
            async with asyncio.TaskGroup() as group:
                for daemon in self._daemons.values():
                    group.create_task(daemon.run())
        finally:
            if self._holder and self._holder.returncode is None:
                self._holder.kill()

    async def load(self, *, limit: float) -> None:
        """Returns when containerd has the images. Raises LabError."""
        await self._booted.wait()
        end = self._clock.monotonic() + limit
        for tar in self._images:
            while True:
                problem = await self._command("ctr", "-a", config.SOCKET, "-n", "k8s.io", "images", "import", str(tar))
                if not problem:
                    break
                if self._clock.monotonic() > end:
                    raise LabError(f"containerd of {self.node.name} does not take {tar}: {problem}")
                await self._clock.sleep(_LOOK_EVERY)

    async def add(self, pod: str) -> Sandbox:
        """Makes a Pod of that name on this node; returns when it runs. Raises LabError, StoreError."""
        if pod in self._sandboxes or pod in self._busy:
            raise LabError(f"{pod} is there already")
        self._busy.add(pod)
        try:
            await self._api.create_pod(pod, self.node.name, image=config.SANDBOX_IMAGE)
            found = await self._api.running_pod(pod, limit=_LIMIT)
            addresses = tuple(ip["ip"] for ip in found["status"]["podIPs"])
            self._sandboxes[pod] = sandbox = Sandbox(pod, found["metadata"]["uid"], addresses, {})
            self._net.take(pod, self._namespace(pod))
        finally:
            self._busy.discard(pod)
        return sandbox

    async def delete(self, pod: str) -> None:
        """Deletes the Pod; returns when it is gone. Raises LabError, StoreError."""
        if pod not in self._sandboxes or pod in self._busy:
            raise LabError(f"{pod} is not there")
        self._busy.add(pod)
        try:
            self._net.remove(pod)
            await self._api.delete_pod(pod, limit=_LIMIT)
            del self._sandboxes[pod]
        finally:
            self._busy.discard(pod)

    def state(self, blocks: tuple[str, ...]) -> NodeState:
        pods = sorted(self._sandboxes.values(), key=lambda s: pod_number(s.pod))
        return NodeState(
            name=self.node.name,
            rack=rack_name(self.node.rack),
            asn=self.node.asn,
            addresses=self.node.addresses,
            blocks=blocks,
            pods=tuple(PodState(name=s.pod, addresses=s.addresses) for s in pods),
            processes={part: daemon.state() for part, daemon in self._daemons.items()},
        )

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _boot(self) -> None:
        """The node's first process, and its daemons."""
        up = self._home / "up"
        up.unlink(missing_ok=True)
        for path, text in config.files(self._home, str(uuid.uuid4())).items():
            path.write_text(text)
        words = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        with (self._home / "log" / "console.log").open("ab") as log:
            self._holder = holder = await asyncio.create_subprocess_exec(
                *words,
                config.holder(self._home, self.node.name, up),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH},
                start_new_session=True,
                preexec_fn=self._net.enter(self.node.name),
            )
        end = self._clock.monotonic() + _LIMIT
        while not up.exists():
            if holder.returncode is not None or self._clock.monotonic() > end:
                raise LabError(f"{self.node.name} does not boot: {(self._home / 'log/console.log').read_text()[-500:]}")
            await self._clock.sleep(_LOOK_EVERY)
        (self._pid,) = (int(pid) for pid in _children(holder.pid))
        kubelet = [
            str(self._plane.nodes.programs.kubelet if self._plane.nodes else ""),
            f"--config={self._home / 'kubelet.json'}",
            f"--kubeconfig={self._plane.kubelet(self.node.name)}",
            f"--hostname-override={self.node.name}",
            f"--node-ip={','.join(self.node.addresses)}",
            "--root-dir=/var/lib/kubelet",
            "--cert-dir=/var/lib/kubelet/pki",
        ]
        self._daemons = {
            "containerd": self._daemon("containerd", ["containerd", "--config", str(self._home / "containerd.toml")]),
            "kubelet": self._daemon("kubelet", kubelet),
        }

    def _daemon(self, name: str, argv: Sequence[str]) -> Daemon:
        return Daemon(
            self._net,
            self._clock,
            member=self.node.name,
            name=name,
            argv=self.inside(*argv),
            environment={"PATH": PATH, "HOME": "/"},
            log=self._home / "log" / f"{name}.log",
        )

    async def _command(self, *words: str) -> str:
        """What was wrong with a command at the node's console; "" if nothing."""
        process = await asyncio.create_subprocess_exec(
            *self.inside(*words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": PATH},
            preexec_fn=self._net.enter(self.node.name),
        )
        said = (await process.communicate())[0].decode(errors="replace").strip()
        return "" if process.returncode == 0 else said or f"ended with {process.returncode}"

    def _namespace(self, pod: str) -> Path:
        """The network namespace of a Pod: of a process whose root has the Pod's name for its host's."""
        for pid in _descendants(self._pid):
            try:
                if Path(f"/proc/{pid}/root/etc/hostname").read_text().strip() == pod:
                    return Path(f"/proc/{pid}/ns/net")
            except OSError:
                continue  # it has ended, or has no such file
        raise LabError(f"no process of {pod} is on {self.node.name}")


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = [int(child) for child in _children(waiting.pop())]
        found += below
        waiting += below
    return found
