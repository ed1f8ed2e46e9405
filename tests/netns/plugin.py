"""A node with its CNI server, and a runtime that calls the shim: what the plugin's tests share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lab.net import Net
from store.base import mutate
from store.clock import SystemClock
from store.errors import AlreadyExists
from store.model import IPAMBlock, IPPool, IPPoolSpec, Meta, R
from store.open import open_store
from tests.conftest import eventually

ROOT = Path(__file__).resolve().parents[2]
NODE = "node-1"
POOL4, POOL6 = "10.244.0.0/16", "fd00:10:244::/48"


class Answer:
    """What the shim did: exit code and what it printed, as JSON if it is."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        self.code = done.returncode
        self.text = done.stdout.decode()
        self.json: dict[str, Any] = json.loads(self.text) if self.text.strip() else {}
        assert done.stderr == b"", done.stderr

    @property
    def addresses(self) -> list[str]:
        return [ip["address"] for ip in self.json["ips"]]


class Plugin:
    """One node (a namespace), its store, run directory and server; ``call`` is the runtime."""

    def __init__(self, net: Net, folder: Path, shim: Path, pools: Iterable[str] = (POOL4, POOL6)) -> None:
        self.net = net
        self.folder = folder
        self.shim = shim
        self.run = folder / "run"
        self.run.mkdir()
        #: The server's store, and that of people.
        self.store = self.people = f"sqlite:{folder / 'store.db'}"
        (folder / "boot_id").write_text("boot-1\n")
        self.log = folder / "cni.log"
        #: While it is there, every dump that the server asks for is interrupted.
        self.interrupted = folder / "interrupted"
        self.program = ROOT / "tests/netns/faulty_cni.py"
        #: Times of ipam's that differ from the test server's own.
        self.settings: dict[str, float] = {}
        net.add(NODE)
        for i, cidr in enumerate(pools):
            self.create(IPPool(metadata=Meta(name=f"pool-{i}"), spec=IPPoolSpec(cidr=cidr)))

    # -- the server ------------------------------------------------------------------------------------------------

    def spawn(self, step: str = "none", *, where: str = NODE) -> subprocess.Popen[bytes]:
        flags = ["--node", NODE, "--store", self.store, "--run", self.run, "--boot-id", self.folder / "boot_id"]
        program = [sys.executable, self.program, step, *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "UNDERLAY_TEST_INTERRUPTED": str(self.interrupted)}
        env["UNDERLAY_TEST_SETTINGS"] = json.dumps(self.settings)
        return self.net.spawn(where, [str(a) for a in program], log=self.log, cwd=ROOT, env=env)

    def start(self, step: str = "none") -> subprocess.Popen[bytes]:
        """Returns when it serves and hands out."""
        process = self.spawn(step)
        eventually(lambda: self.answers() or self._died(process))
        eventually(lambda: self.call("STATUS", conf=self.conf("1.1.0")).code == 0)
        self.server = process
        return process

    def answers(self) -> bool:
        return self.call("STATUS", conf=self.conf("1.1.0")).json.get("msg") != "no server"

    def _died(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, self.log.read_text()
        return False

    # -- the runtime -----------------------------------------------------------------------------------------------

    def conf(self, version: str = "1.0.0", **more: Any) -> dict[str, Any]:
        return {"cniVersion": version, "name": "underlay", "type": "underlay", **more}

    def environment(self, verb: str, container: str, pod: str | None, **more: str) -> dict[str, str]:
        env = {
            "PATH": os.environ["PATH"],
            "UNDERLAY_RUN": str(self.run),
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": f"K8S_POD_NAME={pod};IgnoreUnknown=1;X=1;K8S_POD_NAMESPACE=default",
        }
        if pod is not None:
            env["CNI_NETNS"] = str(self.net.path(pod)) if pod else ""
        return {**env, **more}

    def call(
        self,
        verb: str,
        container: str = "c1",
        pod: str | None = None,
        conf: Mapping[str, Any] | bytes | None = None,
        **more: str,
    ) -> Answer:
        """Executes the shim. ``pod`` "" gives an empty CNI_NETNS, None gives none."""
        text = conf if isinstance(conf, bytes) else json.dumps(self.conf() if conf is None else conf).encode()
        env = self.environment(verb, container, pod, **more)
        return Answer(subprocess.run([self.shim], input=text, env=env, capture_output=True, timeout=60, check=False))

    def popen(self, verb: str, container: str, pod: str) -> subprocess.Popen[bytes]:
        """Starts the shim and does not wait."""
        started = subprocess.Popen(
            [self.shim],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(verb, container, pod),
        )
        assert started.stdin is not None
        started.stdin.write(json.dumps(self.conf()).encode())
        started.stdin.close()
        started.stdin = None
        return started

    # -- what is there -----------------------------------------------------------------------------------------------

    def create(self, obj: R) -> R:
        async def run() -> R:
            store = open_store(self.people, clock=SystemClock())
            try:
                return await store.create(obj)
            finally:
                await store.close()

        return asyncio.run(run())

    def status(self, kind: type[R], name: str, status: dict[str, Any]) -> None:
        """What another process says in the status of an object, which is made if need be."""

        async def run() -> None:
            store = open_store(self.people, clock=SystemClock())
            try:
                body = {"kind": kind.kind(), "metadata": {"name": name}, "status": status}
                wanted = msgspec.convert(body, kind)
                with contextlib.suppress(AlreadyExists):
                    await store.create(wanted)
                await mutate(store, kind, name, lambda o: msgspec.structs.replace(o, status=wanted.status), status=True)
            finally:
                await store.close()

        asyncio.run(run())

    def blocks(self) -> tuple[IPAMBlock, ...]:
        async def run() -> tuple[IPAMBlock, ...]:
            store = open_store(self.people, clock=SystemClock())
            try:
                return (await store.list(IPAMBlock)).items
            finally:
                await store.close()

        return asyncio.run(run())

    def allocated(self) -> set[str]:
        return {a.address for block in self.blocks() for a in block.status.allocations}

    def links(self) -> list[str]:
        """Host veths, doomed ones too."""
        shown = json.loads(self.net.run(NODE, ["ip", "-j", "link"]).stdout)
        return [link["ifname"] for link in shown if link["ifname"].startswith("ul")]

    def routes(self) -> set[str]:
        found = set()
        for family in ("-4", "-6"):
            shown = json.loads(self.net.run(NODE, ["ip", "-j", family, "route", "show", "proto", "141"]).stdout or "[]")
            found |= {route["dst"] for route in shown}
        return found

    def routed(self) -> set[str]:
        """Addresses of pods, as the kernel's routes have them."""
        return {route.partition("/")[0] for route in self.routes()}

    def nothing_left(self) -> bool:
        assert not self.links()
        assert not self.routes()
        assert not self.allocated()
        return True


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A shim waits 5 s for a server, and looks once more then: stopped, it waits for as long as one takes to start."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
