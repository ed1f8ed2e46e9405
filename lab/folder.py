"""Where a lab keeps everything that it has on disk, and who may have it.

A folder belongs to whoever holds its lock (flock on the folder itself). The command takes the lock and hands it to the
supervisor, so it is held from before the first file until the last process of the lab is gone, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from lab.errors import LabError

_MARK: Final = ".underlay-lab"
#: Folders of the machine that were made for this lab's nodes, in the lab's own folder.
_MADE: Final = "made"
_CGROUPS: Final = Path("/sys/fs/cgroup")
#: Seconds after which a cgroup has the process that it was made for, if it will ever.
_ABANDONED: Final = 120.0
#: sun_path is 108 bytes (unix(7)), and the longest socket is FOLDER/node-NNNN/run/speaker/relay.sock.
_LONGEST: Final = 108 - len("/node-5760/run/speaker/relay.sock") - 8


class Folder(msgspec.Struct, frozen=True):
    path: Path

    @property
    def socket(self) -> Path:
        return self.path / "lab.sock"

    @property
    def log(self) -> Path:
        return self.path / "lab.log"

    @property
    def store_url(self) -> str:
        return f"sqlite:{self.path / 'store.db'}"

    def member(self, name: str) -> Path:
        """The folder of one node or router."""
        return self.path / name


def default(environment: Mapping[str, str], uid: int) -> Folder:
    """The folder of who says none: ``UNDERLAY_LAB``, else one a user."""
    if environment.get("UNDERLAY_LAB"):
        return Folder(Path(environment["UNDERLAY_LAB"]).resolve())
    if uid == 0 and os.access("/run", os.W_OK):
        return Folder(Path("/run/underlay-lab"))
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK):
        return Folder(Path(runtime) / "underlay-lab")
    return Folder(Path(f"/tmp/underlay-lab-{uid}"))


def claim(folder: Folder) -> int | None:
    """Makes the folder, or empties what a lab that is gone left there. Returns the descriptor that holds its lock, or
    None if somebody holds it. Raises LabError for a folder that is not a lab's, or cannot be one."""
    path = folder.path
    if len(os.fsencode(path)) > _LONGEST:
        raise LabError(f"{path}: unix sockets lie in it, so at most {_LONGEST} bytes: choose another with --dir")
    if set(" ;") & set(str(path)):
        raise LabError(f"{path}: ExaBGP cannot run a path with a space or semicolon: choose another with --dir")
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = lock(folder)
        if fd is None:
            return None
        _owned(path)
        _empty(path)
        (path / _MARK).touch()
    except OSError as e:
        raise LabError(f"{path}: {e.strerror}: choose another folder with --dir") from e
    return fd


def lock(folder: Folder) -> int | None:
    """The descriptor that holds the folder's lock; None if it is held, or there is no folder."""
    try:
        fd = os.open(folder.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed the folder meanwhile: then this is the lock of nothing.
        if os.fstat(fd).st_nlink > 0 and os.path.samestat(os.fstat(fd), folder.path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        os.close(fd)
        return None
    os.close(fd)
    return None


def remove(folder: Folder, *, limit: float = 10) -> bool:
    """Removes the folder once nobody holds it; True if there was one. Raises LabError if it is held for ``limit``
    seconds, or is not a lab's."""
    end = time.monotonic() + limit
    while folder.path.exists():
        fd = lock(folder)
        if fd is not None:
            try:
                _owned(folder.path)
                _leave_machine(folder.path)
                shutil.rmtree(folder.path)
            finally:
                os.close(fd)
            return True
        if time.monotonic() > end:
            raise LabError(f"{folder.path}: its lab did not end within {limit:.0f} s: see {folder.log}")
        time.sleep(0.02)
    return False


def make_on_machine(folder: Folder, places: Iterable[str]) -> list[int]:
    """Makes folders of the machine that nodes mount their own over, and notes which were not there: ``remove`` takes
    those away. Returns descriptors by which other labs see that somebody has them: to be kept. Raises OSError."""
    held = []
    for place in map(Path, places):
        missing = [path for path in (*reversed(place.parents), place) if not path.exists()]
        with (folder.path / _MADE).open("a") as made:
            made.writelines(f"{path}\n" for path in missing)
        place.mkdir(parents=True, exist_ok=True)
        held.append(os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        fcntl.flock(held[-1], fcntl.LOCK_SH)
    return held


def _leave_machine(path: Path) -> None:
    """Takes away what a cluster's nodes had outside of the lab's folder, which is this: their cgroups, and folders that
    were made for them. One that another lab has, too, stays, as that one's mounts would end with it (umount(2)); one
    that somebody has put something into, too."""
    for node in path.glob("node-*"):
        remove_cgroups(node)
    with contextlib.suppress(FileNotFoundError):
        for place in map(Path, reversed((path / _MADE).read_text().splitlines())):
            with contextlib.suppress(OSError):
                fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    place.rmdir()
                finally:
                    os.close(fd)


def remove_cgroups(node: Path) -> None:
    """Of the containers that the node of a cluster with this folder had; their processes are gone. They lie among those
    of any other containerd, by their ids; version 1 has a tree for each controller, version 2 is one tree. A containerd
    that was killed may forget a container and leave its cgroup: what has been empty for long is nobody's."""
    ids = {path.name for path in node.glob("containerd/io.containerd.grpc.v1.cri/*/*")}
    parents = [*_CGROUPS.glob("k8s.io"), *_CGROUPS.glob("*/k8s.io")] if ids else []
    for parent in parents:
        for name in ids:
            with contextlib.suppress(FileNotFoundError):
                (parent / name).rmdir()
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            for path in filter(_is_abandoned, parent.iterdir()):
                with contextlib.suppress(OSError):
                    path.rmdir()
        with contextlib.suppress(OSError):  # somebody else's are there
            parent.rmdir()


def _is_abandoned(cgroup: Path) -> bool:
    """One that was made a while ago, for a container that has long begun, and holds no process."""
    try:
        return time.time() - cgroup.stat().st_mtime > _ABANDONED and not (cgroup / "cgroup.procs").read_text()
    except OSError:
        return False


def _owned(path: Path) -> None:
    if not (path / _MARK).exists() and any(path.iterdir()):
        raise LabError(f"{path}: holds other things than a lab: choose an empty folder with --dir")


def _empty(path: Path) -> None:
    _leave_machine(path)
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
