"""Networks of real namespaces: the one way in which lab, tests and benches build them.

A ``Net`` owns its namespaces, the links between them and the processes it started there. It is made inside a private
mount namespace (``enter_sandbox``), so the kernel takes everything away when the process ends, also by SIGKILL.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cni import netns
from lab.errors import NetError

_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40
_FORWARDING: Final = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"}


def enter_sandbox() -> None:
    """Moves this process into mount and network namespaces of its own. To be called once, before any thread starts.

    Mounts made from here on are seen by this process and its children only, and go with the last of them. Raises
    OSError without CAP_SYS_ADMIN; ``unshare -Ur`` gives that to anybody.
    """
    netns.unshare(netns.CLONE_NEWNS | netns.CLONE_NEWNET)
    netns.mount("none", Path("/"), flags=netns.MS_REC | netns.MS_PRIVATE)
    _run(["ip", "link", "set", "lo", "up"])


class Net:
    """Namespaces by name, under one folder (``directory``/netns)."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / "netns"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._names: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def path(self, name: str) -> Path:
        """Where the namespace is pinned: what a runtime would hand to a CNI plugin as CNI_NETNS."""
        return self._folder / name

    def add(self, name: str, *, forwarding: bool = False) -> None:
        """Makes the namespace, its loopback up. ``forwarding`` makes a router of it, both families."""
        netns.create(self.path(name))
        self._names.append(name)
        with self.inside(name):
            _loopback_up()
        if forwarding:
            self.sysctl(name, _FORWARDING)

    def adopt(self, name: str) -> None:
        """Makes a member of the namespace that we are in, its loopback up."""
        netns.pin(self.path(name))
        self._names.append(name)
        _loopback_up()

    def take(self, name: str, namespace: Path) -> None:
        """Makes a member of a namespace that somebody else made, known by a file of it (/proc/PID/ns/net)."""
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with netns.inside(fd):
                netns.pin(self.path(name))
        finally:
            os.close(fd)
        self._names.append(name)

    def renew(self, name: str, ports: Sequence[str], *, forwarding: bool = False) -> None:
        """Puts a new namespace, as ``add`` makes it, in the place of one that is there. These interfaces come along,
        down and with nothing but their links; what else was in the old one ends once no process is in it."""
        new = self._folder / f".{name}"
        netns.create(new)
        try:
            self.ip(name, [f"link set dev {port} down netns {new}" for port in ports])
            netns.remove(self.path(name))
            self._names.remove(name)
            self.take(name, new)
        finally:
            netns.remove(new)
        with self.inside(name):
            _loopback_up()
        if forwarding:
            self.sysctl(name, _FORWARDING)

    def remove(self, name: str) -> None:
        """Unpins it; links that end in it go with it once no process of ours is in it."""
        netns.remove(self.path(name))
        self._names.remove(name)

    def link(self, a: str, port_a: str, b: str, port_b: str, *, mtu: int = 1500) -> None:
        """A veth pair, both ends up: interface ``port_a`` in ``a``, ``port_b`` in ``b``."""
        self.ip(a, [f"link add name {port_a} mtu {mtu} type veth peer name {port_b} mtu {mtu} netns {self.path(b)}"])
        for name, port in ((a, port_a), (b, port_b)):
            self.ip(name, [f"link set dev {port} up"])

    def address(self, name: str, port: str, addresses: Iterable[str]) -> None:
        """Puts addresses (with prefix length) on an interface; IPv6 without waiting for duplicate detection."""
        self.ip(name, [f"addr add {a} dev {port}" + (" nodad" if ":" in a else "") for a in addresses])

    def ip(self, name: str, commands: Iterable[str]) -> None:
        """Runs ``ip -batch`` with these lines in the namespace. Raises NetError."""
        self.run(name, ["ip", "-batch", "-"], stdin="\n".join(commands) + "\n")

    def sysctl(self, name: str, values: Mapping[str, str]) -> None:
        """Sets sysctls by their dotted names; an interface's dot in a name is written as ``/`` as sysctl(8) does."""
        with self.inside(name):
            for key, value in values.items():
                path = "/".join(part.replace("/", ".") for part in key.split("."))
                (Path("/proc/sys") / path).write_text(value)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Runs the block in the namespace; no await may stand inside. A socket made there stays there."""
        fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            with netns.inside(fd):
                yield
        finally:
            os.close(fd)

    def run(
        self, name: str, argv: Sequence[str], *, stdin: str = "", check: bool = True, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the namespace to its end. With ``check`` raises NetError on a non-zero exit."""
        return _run(self._within(name, argv), stdin=stdin, check=check, timeout=timeout)

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process in the namespace, in a process group of its own; it dies with us. Output goes to ``log``."""
        with log.open("ab") if log else Path(os.devnull).open("wb") as out:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=self.enter(name),
            )
        self._processes.append(process)
        return process

    def enter(self, name: str) -> Callable[[], None]:
        """What a child process runs before exec (``preexec_fn``) to be in the namespace and to die with its parent."""
        path = os.fsencode(self.path(name))

        def prepare() -> None:
            netns.die_with_parent(signal.SIGKILL)
            fd = os.open(path, os.O_RDONLY)
            netns.setns(fd)
            os.close(fd)

        return prepare

    def close(self) -> None:
        """Ends every process and namespace of this net."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in list(self._names):
            self.remove(name)

    def _within(self, name: str, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net={self.path(name)}", *argv]


def _loopback_up() -> None:
    """What ``ip link set lo up`` does (netdevice(7), SIOCSIFFLAGS), without a process: a lab makes many namespaces."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING))


def _run(
    argv: Sequence[str], *, stdin: str = "", check: bool = True, timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        printed = (done.stderr or done.stdout).strip()
        raise NetError(f"{' '.join(argv)} ended with {done.returncode}: {printed}\n{stdin}")
    return done
