"""Namespaces by system call: what the standard library has only from Python 3.12 on.

All of it acts on the calling thread, and is meant for single-threaded processes. See namespaces(7), setns(2).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWNET: Final = 0x40000000
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 2
PR_SET_PDEATHSIG: Final = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _call("unshare", flags)


def setns(fd: int, kind: int = CLONE_NEWNET) -> None:
    """setns(2): the calling thread enters the namespace that ``fd`` refers to. Raises OSError."""
    _call("setns", fd, kind)


def mount(source: str, target: Path, kind: str = "", flags: int = 0) -> None:
    """mount(2) without options. Raises OSError."""
    _call("mount", source.encode(), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), None)


def unmount(target: Path) -> None:
    """umount2(2), lazily. Raises OSError."""
    _call("umount2", os.fsencode(target), MNT_DETACH)


def die_with_parent(signal: int) -> None:
    """The calling process gets ``signal`` when its parent's thread ends: prctl(2), PR_SET_PDEATHSIG."""
    _call("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal), 0, 0, 0)


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """Runs the block in the network namespace of ``fd``, then comes back; no await may stand inside."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd)
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


def create(path: Path) -> None:
    """Makes a network namespace and pins it at ``path`` (a new file), as ``ip netns add`` does. Raises OSError."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        try:
            pin(path)
        finally:
            setns(home)
    finally:
        os.close(home)


def pin(path: Path) -> None:
    """Pins the namespace that we are in at ``path`` (a new file). Raises OSError."""
    path.touch(exist_ok=False)
    try:
        mount("/proc/thread-self/ns/net", path, flags=MS_BIND)
    except OSError:
        path.unlink()
        raise


def remove(path: Path) -> None:
    """Unpins the namespace at ``path``; the kernel ends it when the last process and descriptor are gone."""
    unmount(path)
    path.unlink()


def inode(fd: int) -> int:
    """The number that tells one network namespace from another (namespaces(7)); valid while it lives."""
    return os.fstat(fd).st_ino
