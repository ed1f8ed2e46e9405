"""One node of a cluster: a machine of its own as far as containerd and kubelet can tell.

What an ordinary lab's node does itself is left to them: Underlay comes as pods of its manifests, and the lab's pods are
Pods, made on the API server and bound to the node.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.cluster import config, images
from lab.cluster.api import Api, Wire, container_of
from lab.errors import LabError
from lab.folder import Folder, remove_cgroups
from lab.kube.plane import GO, ClusterError, Plane
from lab.machine import PATH, state_of
from lab.net import Net
from lab.processes import Daemon, children_of, outcome
from lab.runtime import Sandbox
from lab.topology import Node
from lab.wire import KubePart, NodeState
from store.clock import Clock

_LOOK_EVERY: Final = 0.05
_LIMIT: Final = 60.0
#: Of the reference set: containerd takes the first for itself, the other is for hostPort.
_PLUGINS: Final = (Path("/usr/lib/cni/loopback"), Path("/usr/lib/cni/portmap"))


class KubeMachine:
    """``run()`` keeps containerd and kubelet up while the machine is on; ``unpacked`` has the images that it has."""

    def __init__(
        self, net: Net, clock: Clock, folder: Folder, node: Node, plane: Plane, api: Api, unpacked: Path
    ) -> None:
        self.node = node
        self._net, self._clock, self._plane, self._api = net, clock, plane, api
        self._home = folder.member(node.name)
        for part in (*config.FOLDERS.values(), "proc", "log", "static"):
            (self._home / part).mkdir(parents=True, exist_ok=True)
        (self._home / "containerd.toml").write_text(config.containerd(self._home))
        default = subprocess.run(["ctr", "oci", "spec"], capture_output=True, check=True, text=True, timeout=60).stdout
        (self._home / config.SPEC).write_text(config.runtime_spec(self._home, default))
        (self._home / "kubelet.json").write_text(config.kubelet(plane.ca, self._home / "static"))
        images.link(unpacked, self._home / "containerd")
        for plugin in _PLUGINS:
            shutil.copy2(plugin, self._home / "bin" / plugin.name)
        self.environment = {"KUBECONFIG": str(plane.kubelet(node.name))}
        #: The name of the Node that its kubelet makes.
        self.name = node.name
        self._holder: asyncio.subprocess.Process | None = None
        self._wanted, self._unwanted, self._booted, self._ended = (asyncio.Event() for _ in range(4))
        self._wanted.set()
        self._pid = 0
        self._daemons: dict[KubePart, Daemon] = {}
        self._sandboxes: dict[str, Sandbox] = {}
        #: Of each of our pods, which container it ran in last.
        self._containers: dict[str, str] = {}
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
        while True:
            await self._wanted.wait()
            await self._boot()
            try:
                async with asyncio.TaskGroup() as group:
                    parts = [group.create_task(daemon.run()) for daemon in self._daemons.values()]
                    parts += [group.create_task(self._find_again(pod)) for pod in self._sandboxes]
                    self._booted.set()
                    await self._unwanted.wait()
                    for part in parts:
                        part.cancel()
            finally:
                self._booted.clear()
                if self._holder and self._holder.returncode is None:
                    # The first of a process namespace ends when all others there have (pid_namespaces(7)).
                    os.kill(self._pid, signal.SIGKILL)
            if self._holder:
                await self._holder.wait()
            self._ended.set()

    async def switch_off(self) -> None:
        """Ends all that runs in it, as when its power goes; returns when that is gone. What its kernel has is not part
        of it. Raises LabError if it is off."""
        if not self.on:
            raise LabError(f"{self.node.name} is off, or is just being switched on or off")
        for pod in self._sandboxes:
            self._net.remove(pod)
        self._ended.clear()
        self._wanted.clear()
        self._unwanted.set()
        await self._ended.wait()
        remove_cgroups(self._home)

    @property
    def on(self) -> bool:
        return self._booted.is_set()

    def refuse_on(self) -> None:
        """Raises LabError if it is on, or being switched on or off."""
        if self._wanted.is_set() or not self._ended.is_set():
            raise LabError(f"{self.node.name} is on already, or is just being switched off")

    async def switch_on(self) -> None:
        """Boots it, with a new boot id; returns when its kubelet was started. Raises LabError if it is on."""
        self.refuse_on()
        self._unwanted.clear()
        self._wanted.set()
        await self._booted.wait()

    async def rename(self, name: str) -> None:
        """Has its kubelet end and start again for a Node of that name; one that is off starts so. LabError."""
        if name == self.name:
            raise LabError(f"{self.node.name} is called so already")
        try:
            self._plane.admit(name)
        except ClusterError as e:
            raise LabError(str(e)) from e
        self.name = name
        self.environment = {"KUBECONFIG": str(self._plane.kubelet(name))}
        daemon = self._daemons.get("kubelet")
        if self.on and daemon:
            daemon.argv = self.inside(*self._kubelet())
            problem = await self._command("hostname", name)
            if problem:
                raise LabError(f"hostname {name} on {self.node.name}: {problem}")
            daemon.kill(signal.SIGTERM)

    async def add(self, pod: str) -> Sandbox:
        """Makes a Pod of that name on this node; returns when it runs. Raises LabError, StoreError."""
        if pod in self._sandboxes or pod in self._busy:
            raise LabError(f"{pod} is there already")
        self._busy.add(pod)
        try:
            await self._api.create_pod(pod, self.name, image=config.SANDBOX_IMAGE)
            sandbox = self._take(pod, await self._api.running_pod(pod, limit=_LIMIT))
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
            del self._sandboxes[pod], self._containers[pod]
        finally:
            self._busy.discard(pod)

    def state(self, blocks: tuple[str, ...]) -> NodeState:
        return state_of(self.node, blocks, self._sandboxes.values(), self._daemons)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _take(self, pod: str, found: Wire) -> Sandbox:
        """Makes a member of the lab of a Pod that runs."""
        addresses = tuple(ip["ip"] for ip in found["status"]["podIPs"])
        self._net.take(pod, self._namespace(pod))
        self._sandboxes[pod] = sandbox = Sandbox(pod, found["metadata"]["uid"], addresses, {})
        self._containers[pod] = container_of(found)
        return sandbox

    async def _find_again(self, pod: str) -> None:
        """After a boot: once the kubelet has it run again, or it is no more."""
        while True:
            found = await self._api.again(pod, self._containers[pod], self._sandboxes[pod].container)
            if found is None:
                del self._sandboxes[pod], self._containers[pod]
                return
            if found:
                self._take(pod, found)
                return
            await self._clock.sleep(_LOOK_EVERY)

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
                config.holder(self._home, self.name, up),
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
        (self._pid,) = children_of(holder.pid)
        self._daemons = {
            "containerd": self._daemon("containerd", ["containerd", "--config", str(self._home / "containerd.toml")]),
            "kubelet": self._daemon("kubelet", self._kubelet()),
        }

    def _kubelet(self) -> list[str]:
        return [
            str(self._plane.nodes.programs.kubelet if self._plane.nodes else ""),
            f"--config={self._home / 'kubelet.json'}",
            f"--kubeconfig={self._plane.kubelet(self.name)}",
            f"--hostname-override={self.name}",
            f"--node-ip={','.join(self.node.addresses)}",
            "--root-dir=/var/lib/kubelet",
            "--cert-dir=/var/lib/kubelet/pki",
        ]

    def _daemon(self, name: str, argv: Sequence[str]) -> Daemon:
        return Daemon(
            self._net,
            self._clock,
            member=self.node.name,
            name=name,
            argv=self.inside(*argv),
            environment={"PATH": PATH, "HOME": "/"} | GO,
            log=self._home / "log" / f"{name}.log",
            behind=True,
        )

    async def _command(self, *words: str) -> str:
        """What was wrong with a command at the node's console; "" if nothing."""
        code, said = await outcome(self.inside(*words), {"PATH": PATH}, enter=self._net.enter(self.node.name))
        return (said.strip() or f"ended with {code}") if code else ""

    def _namespace(self, pod: str) -> Path:
        """The network namespace of a Pod: of a process whose root has the Pod's name for its host's."""
        for pid in _descendants(self._pid):
            try:
                if Path(f"/proc/{pid}/root/etc/hostname").read_text().strip() == pod:
                    return Path(f"/proc/{pid}/ns/net")
            except OSError:
                continue  # it has ended, or has no such file
        raise LabError(f"no process of {pod} is on {self.node.name}")


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children_of(waiting.pop())
        found += below
        waiting += below
    return found
