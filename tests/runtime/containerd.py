"""A containerd in a network namespace of a test, on a machine of its own as far as it can tell.

A holder process is the first of mount, process and UTS namespaces, with a /run of their own. All that containerd starts
lives there, so all of it ends with the holder, and the holder with the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from cni import netns
from lab.net import Net
from tests.conftest import eventually
from tests.runtime import cri, sid

#: The one image of these tests: busybox.
IMAGE: Final = "underlay.test/busybox:1"

_CONFIG: Final = """
version = 2
root = "{root}"
state = "/run/containerd/state"
oom_score = 0
[grpc]
  address = "/run/containerd/containerd.sock"
[ttrpc]
  address = "/run/containerd/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{conf}"
"""

_CONFIG3: Final = """
version = 3
root = "{root}"
state = "/run/containerd/state"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{image}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{bin}"]
    conf_dir = "{conf}"
"""


class Release(NamedTuple):
    """A containerd and the plugins of its time: what is installed, or a folder that packages were unpacked in."""

    root: Path
    config: str
    #: The newest conflist that it takes.
    cni: str


RELEASES: Final = {
    "1.6": Release(Path("/"), _CONFIG, "1.0.0"),
    "2": Release(sid.folder(), _CONFIG3, "1.1.0"),
}

#: Version 1 has a folder for each controller, version 2 is one tree.
_CGROUPS: Final = Path("/sys/fs/cgroup")
_CGROUP: Final = "underlay-test"

_HOLDER: Final = """
mount -t tmpfs lib /var/lib && mount -t tmpfs run /run && mkdir /run/containerd /run/netns /run/underlay &&
mount --bind "$1" /run/underlay && hostname "$2" && : >"$3" || exit 1
trap '' CHLD
exec sleep 2147483647
"""

#: Stands before the shim: notes what the runtime calls, and holds ADDs back while a file says so.
_WITNESS: Final = """#!/bin/sh
live=$(test -n "$CNI_NETNS" && test -e "$CNI_NETNS" && echo live)
echo "$CNI_COMMAND $CNI_CONTAINERID ${{CNI_NETNS:--}} $live" >>{calls}
while [ "$CNI_COMMAND" = ADD ] && [ -e {hold} ]; do sleep 0.02; done
exec {shim}
"""


class Starting:
    """A pod whose sandbox is being made."""

    def __init__(self, pending: cri.Pending) -> None:
        self._pending = pending

    def sandbox(self) -> str:
        """Its id, when it is there. Raises CRIError."""
        return cri.text(self._pending.result()[1])


class Containerd:
    """``name`` is the member of ``net`` that it runs in, ``run`` the folder of that node's CNI server."""

    def __init__(self, net: Net, name: str, home: Path, run: Path, release: Release = RELEASES["1.6"]) -> None:
        self.release = release
        self.net, self.name, self.home = net, name, home
        home.mkdir()
        self.bin, self.conf, self.root = home / "bin", home / "net.d", home / "root"
        self.log = home / "containerd.log"
        self._calls = home / "calls"
        self._calls.touch()
        #: While it is there, ADDs do not get to our plugin.
        self.hold = home / "hold"
        self._cgroup = f"{_CGROUP}-{os.getpid()}-{name}"
        config = release.config.format(root=self.root, image=IMAGE, bin=self.bin, conf=self.conf)
        (home / "config.toml").write_text(config)
        up = home / "up"
        words = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._outer = net.spawn(
            name, [*words, "sh", "-c", _HOLDER, "holder", str(run), name, str(up)], log=home / "holder.log"
        )
        eventually(up.exists)
        (self._holder,) = _children(self._outer.pid)
        self._process: subprocess.Popen[bytes] | None = None
        self.cri = cri.CRI(f"/proc/{self._holder}/root/run/containerd/containerd.sock")

    # -- the plugin ------------------------------------------------------------------------------------------------

    def install(self, shim: Path, run: Path) -> None:
        """As a user's installer does, once the server answers; and what others have put there."""
        witness = self.home / "witness"
        witness.write_text(_WITNESS.format(calls=self._calls, hold=self.hold, shim=shim))
        witness.chmod(0o755)
        self.bin.mkdir()
        self.conf.mkdir()
        flags = {"--shim": witness, "--bin": self.bin, "--conf": self.conf, "--run": run}
        argv = [sys.executable, "-m", "cni.installer", *(str(word) for pair in flags.items() for word in pair)]
        self.net.run(self.name, argv)
        for plugin in ("loopback", "portmap"):
            shutil.copy2(self.release.root / "usr/lib/cni" / plugin, self.bin / plugin)

    def calls(self, container: str = "") -> list[tuple[str, str, bool]]:
        """What the runtime called: verb, CNI_NETNS ("" if none), and whether that was there."""
        found = [line.split(" ") for line in self._calls.read_text().splitlines()]
        return [
            (verb, "" if path == "-" else path, live == "live")
            for verb, of, path, live in found
            if container in ("", of)
        ]

    def called(self, verb: str) -> list[str]:
        """Container ids of the calls of that verb."""
        return [line.split(" ")[1] for line in self._calls.read_text().splitlines() if line.startswith(f"{verb} ")]

    def forget(self) -> None:
        """The calls so far."""
        self._calls.write_text("")

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when the CRI answers."""
        argv = [str(self._program("containerd")), "--config", str(self.home / "config.toml")]
        # It looks for its shim there.
        path = f"{self._program('containerd').parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._process = self.net.spawn(self.name, self._inside(argv), log=self.log, env={**os.environ, "PATH": path})
        eventually(self._answers)

    def load(self, tar: Path) -> None:
        ctr = [str(self._program("ctr")), "-a", "/run/containerd/containerd.sock", "-n", "k8s.io"]
        self.net.run(self.name, self._inside([*ctr, "images", "import", str(tar)]))

    def ready(self) -> None:
        """Waits until it has taken up the conflist."""

        def probe() -> bool:
            assert self.cri.network_ready() == ""
            return True

        eventually(probe)

    def kill(self) -> None:
        """SIGKILL to containerd alone: pods, and plugins under way, go on."""
        assert self._process is not None
        for pid in _children(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait(60)

    def close(self) -> None:
        """Ends everything in it."""
        self._outer.kill()
        self._outer.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._holder, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{self._holder}").exists())
        _remove_cgroups()

    # -- pods ------------------------------------------------------------------------------------------------------

    def pod(self, name: str, **more: Any) -> dict[int, cri.Value]:
        return cri.pod(name, cgroup=f"/{self._cgroup}", **more)

    def run(self, name: str, limit: float = 60, **more: Any) -> str:
        """A pod's sandbox."""
        return self.cri.run(self.pod(name, **more), limit)

    def begin(self, name: str, limit: float = 60, **more: Any) -> Starting:
        """The same, without waiting."""
        return Starting(self.cri.begin("RunPodSandbox", {1: self.pod(name, **more)}, limit))

    def program(self, sandbox: str, pod: str, name: str, command: Sequence[str]) -> str:
        """A container in the pod ``pod``, whose sandbox is given: its id."""
        return self.cri.start_container(sandbox, self.pod(pod), name, IMAGE, list(command))

    def end(self, sandbox: str) -> None:
        self.cri.stop(sandbox)
        self.cri.remove(sandbox)

    def inside_pod(self, sandbox: str, argv: Sequence[str]) -> str:
        """What a program of this machine prints in the pod's network namespace."""
        return self.net.run(self.name, ["nsenter", f"--net={self._netns(sandbox)}", *argv]).stdout

    def fetch(self, sandbox: str, address: str, port: int = 80) -> str:
        """What a web server answers to the pod; "" if there is none."""
        fd = os.open(self._netns(sandbox), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with netns.inside(fd):
                return fetch(address, port)
        finally:
            os.close(fd)

    def _netns(self, sandbox: str) -> Path:
        """Its namespace, by a path that leads there from outside."""
        path = next(path for verb, path, _ in self.calls(sandbox) if verb == "ADD")
        return Path(f"/proc/{self._holder}/root{path}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()[-4000:]
        try:
            return bool(self.cri.version())
        except (OSError, cri.CRIError):
            return False

    def _program(self, name: str) -> Path:
        return self.release.root / "usr/bin" / name

    def _inside(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self._holder), "--mount", "--root", "--uts", "--pid", *argv]


def fetch(address: str, port: int = 80) -> str:
    """What a web server answers to us; "" if there is none."""
    try:
        with socket.create_connection((address, port), timeout=2) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    except OSError:
        return ""


def _remove_cgroups() -> None:
    """Those of nodes that have ended, also of a test run that was killed; one that is in use is busy."""
    for top in [*_CGROUPS.glob(f"{_CGROUP}-*"), *_CGROUPS.glob(f"*/{_CGROUP}-*")]:
        pid = int(top.name.removeprefix(f"{_CGROUP}-").partition("-")[0])
        if pid == os.getpid() or not Path(f"/proc/{pid}").exists():
            for folder in sorted([top, *top.glob("**/")], reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
