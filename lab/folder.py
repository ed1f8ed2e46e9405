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
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from lab.errors import LabError

_MARK: Final = ".underlay-lab"
_CGROUPS: Final = Path("/sys/fs/cgroup")
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
    """The folder of who says none: one a user."""
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
                _remove_cgroups(folder)
                shutil.rmtree(folder.path)
            finally:
                os.close(fd)
            return True
        if time.monotonic() > end:
            raise LabError(f"{folder.path}: its lab did not end within {limit:.0f} s: see {folder.log}")
        time.sleep(0.02)
    return False


def _remove_cgroups(folder: Folder) -> None:
    """Of the containers that a cluster of this folder had; their processes are gone. They lie among those of any other
    containerd, by their ids; version 1 has a tree for each controller, version 2 is one tree."""
    ids = {path.name for path in folder.path.glob("node-*/containerd/io.containerd.grpc.v1.cri/*/*")}
    parents = [*_CGROUPS.glob("k8s.io"), *_CGROUPS.glob("*/k8s.io")] if ids else []
    for parent in parents:
        for path in parent.iterdir():
            if path.name in ids:
                path.rmdir()
        with contextlib.suppress(OSError):  # somebody else's are there
            parent.rmdir()


def _owned(path: Path) -> None:
    if not (path / _MARK).exists() and any(path.iterdir()):
        raise LabError(f"{path}: holds other things than a lab: choose an empty folder with --dir")


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
