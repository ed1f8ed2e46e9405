"""One node of the lab: its folders, its three daemons, its container runtime, its pods."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from cni import install
from lab.errors import LabError
from lab.folder import Folder
from lab.net import Net
from lab.processes import Daemon
from lab.runtime import Runtime, Sandbox
from lab.topology import Node, pod_number, rack_name
from lab.wire import KubePart, NodeState, Part, PodState
from store.clock import Clock

_LOOK_EVERY: Final = 0.02
_BIN: Final = Path(sys.executable).parent
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Stores(msgspec.Struct, frozen=True, kw_only=True):
    """The URL of the store as each process is to be given it, and as an operator's tools are."""

    cni: str
    agent: str
    operator: str


class Machine:
    """``run()`` keeps the daemons up; ``ready()`` returns when pods can be attached."""

    def __init__(
        self, net: Net, clock: Clock, folder: Folder, node: Node, *, stores: Stores, new_id: Callable[[], str]
    ) -> None:
        self.node, self.name = node, node.name
        self._net = net
        self._clock = clock
        home = folder.member(node.name)
        self._folders = {part: home / part for part in ("run", "state", "net.d", "bin", "log")}
        for path in self._folders.values():
            path.mkdir(parents=True)
        self._runtime = Runtime(
            net,
            clock,
            node=node.name,
            conflist=self._conflist,
            plugins=self._folders["bin"],
            environment={"PATH": PATH, "UNDERLAY_RUN": str(self._run)},
            new_id=new_id,
        )
        #: What a tool of ours needs to know to speak of this node.
        self.environment = {"UNDERLAY_RUN": str(self._run), "UNDERLAY_STORE": stores.operator}
        self._daemons = {part: self._daemon(part, argv) for part, argv in self._commands(stores).items()}
        self._sandboxes: dict[str, Sandbox] = {}
        self._busy: set[str] = set()

    @property
    def daemons(self) -> dict[Part, Daemon]:
        return self._daemons

    @property
    def sandboxes(self) -> dict[str, Sandbox]:
        return dict(self._sandboxes)

    def inside(self, *words: str) -> list[str]:
        """The command line that runs a command there, once its network is entered: it is on our machine."""
        return list(words)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for daemon in self._daemons.values():
                group.create_task(daemon.run())

    async def ready(self, *, limit: float) -> None:
        """Returns when the CNI server answers and the plugin is installed, as a node turns Ready. Raises LabError
        after ``limit`` seconds, CNIError if the plugin cannot be installed."""
        end = self._clock.monotonic() + limit
        while not install.answers(self._run):
            if self._clock.monotonic() > end:
                raise LabError(f"the CNI server of {self.node.name} does not answer after {limit:.0f} s")
            await self._clock.sleep(_LOOK_EVERY)
        install.install(_shim(), self._folders["bin"], self._folders["net.d"])

    async def add(self, pod: str) -> Sandbox:
        """Makes the pod's namespace and attaches it. Raises LabError."""
        if pod in self._sandboxes or pod in self._busy:
            raise LabError(f"{pod} is there already")
        self._busy.add(pod)
        try:
            self._net.add(pod)
            try:
                self._sandboxes[pod] = sandbox = await self._runtime.attach(pod)
            except BaseException:
                self._net.remove(pod)
                raise
        finally:
            self._busy.discard(pod)
        return sandbox

    async def delete(self, pod: str) -> None:
        """Detaches the pod and ends its namespace. Raises LabError."""
        if pod not in self._sandboxes or pod in self._busy:
            raise LabError(f"{pod} is not there")
        self._busy.add(pod)
        try:
            await self._runtime.detach(self._sandboxes[pod])
            del self._sandboxes[pod]
            self._net.remove(pod)
        finally:
            self._busy.discard(pod)

    def state(self, blocks: tuple[str, ...]) -> NodeState:
        return state_of(self.node, blocks, self._sandboxes.values(), self._daemons)

    @property
    def _run(self) -> Path:
        return self._folders["run"]

    @property
    def _conflist(self) -> Path:
        return self._folders["net.d"] / install.CONFLIST

    def _commands(self, stores: Stores) -> dict[Part, list[str]]:
        shared = ["--node", self.node.name, "--run", str(self._run)]
        return {
            "cni": [
                str(_BIN / "underlay-cni"),
                *shared,
                "--store",
                stores.cni,
                "--metrics",
                str(self._run / "metrics.sock"),
            ],
            "agent": [
                str(_BIN / "underlay-agent"),
                *shared,
                "--store",
                stores.agent,
                "--state",
                str(self._folders["state"]),
            ],
            "exabgp": [str(_BIN / "underlay-speaker"), "--run", str(self._run)],
        }

    def _daemon(self, part: Part, argv: list[str]) -> Daemon:
        return Daemon(
            self._net,
            self._clock,
            member=self.node.name,
            name=part,
            argv=argv,
            environment={"PATH": PATH, "HOME": "/", "LANG": "C.UTF-8"} | _log_level(),
            log=self._folders["log"] / f"{part}.log",
        )


def state_of(
    node: Node,
    blocks: tuple[str, ...],
    sandboxes: Iterable[Sandbox],
    daemons: Mapping[Part, Daemon] | Mapping[KubePart, Daemon],
) -> NodeState:
    """As people are shown the node."""
    pods = sorted(sandboxes, key=lambda s: pod_number(s.pod))
    return NodeState(
        name=node.name,
        rack=rack_name(node.rack),
        asn=node.asn,
        addresses=node.addresses,
        blocks=blocks,
        pods=tuple(PodState(name=s.pod, addresses=s.addresses) for s in pods),
        processes={part: daemon.state() for part, daemon in daemons.items()},
    )


def _shim() -> Path:
    """The program that ``make shim`` builds, in the tree that this file is in. Raises LabError."""
    path = Path(__file__).resolve().parent.parent / "build" / "underlay-shim"
    if not path.exists():
        raise LabError(f"{path} is not built: make shim")
    return path


def _log_level() -> dict[str, str]:
    return {"UNDERLAY_LOG": os.environ["UNDERLAY_LOG"]} if "UNDERLAY_LOG" in os.environ else {}
