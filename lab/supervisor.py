"""The process that owns a lab: it builds it, keeps its daemons up, and answers the command.

It runs in mount, network and process namespaces of its own (``lab.cli`` starts it through unshare(1)), below a small
init. When either ends, the kernel ends everything else: no process, namespace, link or mount can outlive it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from lab.building import Kube, Lab
from lab.errors import LabError, NetError
from lab.folder import Folder
from lab.kube.build import NodePrograms, Programs
from lab.processes import kill_all_others
from lab.topology import Shape, Topology, TopologyError
from lab.wire import (
    Answer,
    Cable,
    Done,
    Down,
    Drill,
    Failed,
    Follow,
    Kill,
    Matrix,
    Ping,
    PodAdd,
    PodDel,
    Rename,
    Request,
    Status,
    Step,
    Switch,
    Visit,
    Where,
)
from store.clock import SystemClock
from store.errors import StoreError

_LINE = 1 << 20
_log = logging.getLogger(__name__)


class Supervisor:
    """Serves one lab at ``folder.socket`` until it is told to end."""

    def __init__(self, lab: Lab, folder: Folder) -> None:
        self._lab = lab
        self._folder = folder
        self._end = asyncio.Event()

    async def run(self) -> None:
        """Builds and serves; returns when ``Down`` or SIGTERM came, raises what made the lab impossible to serve."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._end.set)
        server = await asyncio.start_unix_server(self._serve, self._folder.socket, limit=_LINE)
        self._folder.socket.chmod(0o600)
        async with server, asyncio.TaskGroup() as group:
            life = group.create_task(self._lab.run())
            await self._end.wait()
            life.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if not line:
                return  # it only looked whether somebody is there
            async for answer in self._answers(line, reader):
                writer.write(msgspec.json.encode(answer) + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError) as e:
            _log.info("a command went away: %s", e)
        finally:
            writer.close()

    async def _answers(self, line: bytes, reader: asyncio.StreamReader) -> AsyncIterator[Answer]:
        try:
            request = msgspec.json.decode(line, type=Request)
            if isinstance(request, Follow):
                async for step in self._lab.steps():
                    yield step
                yield Done()
            elif isinstance(request, Drill):
                play = self._lab.drill(request.name, rate=request.rate, away=request.away, calm=request.calm)
                async for step in play.story.follow():
                    yield step
                yield Done(msgspec.to_builtins(play.report))
            elif isinstance(request, Ping):
                async with self._lab.pings(request.rate) as count:
                    yield Step("packets on every path", 0)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(request.seconds or None):
                            await reader.read()
                    report = await count()
                yield Done(msgspec.to_builtins(report))
            else:
                yield Done(msgspec.to_builtins(await self._carry_out(request)))
        except (LabError, NetError, StoreError, TopologyError, msgspec.DecodeError) as e:
            yield Failed(str(e))
        except Exception as e:
            _log.exception("a fault of the lab's own, at %r", line)
            yield Failed(f"a fault of the lab's own: {e!r}: see {self._folder.log}")

    async def _carry_out(self, request: Request) -> object:
        lab = self._lab
        match request:
            case Status():
                return await lab.state()
            case Matrix(limit):
                return await lab.measure(limit)
            case PodAdd(name):
                return await lab.pod_add(name)
            case PodDel(name):
                await lab.pod_del(name)
            case Kill(member, part, number, after):
                lab.kill(member, part, number, after)
            case Switch(node, on):
                await lab.switch(node, on=on)
            case Rename(node, name):
                await lab.rename(node, name)
            case Visit(come):
                await lab.visit(come=come)
            case Cable(a, b, up):
                lab.cable(a, b, up=up)
            case Where(name):
                return lab.where(name)
            case Down():
                self._end.set()
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.supervisor", description="Started by underlay-lab up.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", required=True, help="what was asked for, as JSON")
    parser.add_argument("--programs", type=Path, help="folder of etcd, kube-apiserver and kube-controller-manager")
    parser.add_argument("--listener", type=int, help="descriptor of the socket that leads to the API server")
    parser.add_argument("--of-nodes", type=Path, help="folder of kubelet, kube-scheduler, kubectl...: a whole cluster")
    parser.add_argument("--image", type=Path, help="of Underlay, for the nodes of a cluster")
    parser.add_argument("--bare", action="store_true", help="install nothing in the cluster")
    parser.add_argument("--installer", choices=["kubeadm", "k3s"], help="who says which addresses pods have")
    said = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    if os.getpid() == 1:
        _be_init()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    _watch_children()
    try:
        shape = msgspec.json.decode(said.shape, type=Shape)
        topology = Topology.build(**msgspec.structs.asdict(shape))
        asyncio.run(_live(Folder(said.folder), topology, said))
    finally:
        kill_all_others()


async def _live(folder: Folder, topology: Topology, said: argparse.Namespace) -> None:
    await Supervisor(_lab(folder, topology, said), folder).run()


def _lab(folder: Folder, topology: Topology, said: argparse.Namespace) -> Lab:
    if not said.programs:
        return Lab(folder, topology, SystemClock())
    programs, listener = Programs(said.programs, "given"), socket.socket(fileno=said.listener)
    if not said.of_nodes:
        return Lab(folder, topology, SystemClock(), Kube(programs, listener))
    # They need the client of the API server, which a lab on a file does not.
    from lab.cluster.lab import ClusterLab, Parts

    parts = Parts(
        programs, NodePrograms(said.of_nodes), said.image, listener, install=not said.bare, installer=said.installer
    )
    return ClusterLab(folder, topology, SystemClock(), parts)


def _be_init() -> None:
    """Goes on in a child, and stays behind as the init of this process namespace: reaps orphans, ends with the child
    (pid_namespaces(7): then the kernel ends everyone else)."""
    child = os.fork()
    if child == 0:
        return
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _watch_children() -> None:
    """Ends of children come through pidfds: a thread each, Python 3.11's way, would be in the way of setns."""
    if sys.version_info < (3, 12):
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


if __name__ == "__main__":
    main()
