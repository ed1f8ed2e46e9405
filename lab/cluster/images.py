"""What containerd makes of the images that all nodes have: unpacked once a machine, not once a node.

It lies in ``~/.cache/underlay``, under a name that changes with all that goes into it. A node's own containerd begins
with its records, and with links to what they speak of: layers and blobs, which containerd never writes to again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.errors import LabError
from lab.machine import PATH
from lab.processes import outcome
from store.clock import Clock

#: Where containerd has its records; its content, each blob a file; its layers, each a folder.
_RECORDS: Final = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
_PARTS: Final = ("io.containerd.content.v1.content/blobs/sha256", "io.containerd.snapshotter.v1.overlayfs/snapshots")
_CONTAINERD: Final = Path("/usr/bin/containerd")
_NAME: Final = "images-"
#: Seconds after its last use in which another may still be for it.
_KEPT: Final = 3600.0
_LIMIT: Final = 120.0
_LOOK_EVERY: Final = 0.05


async def unpacked(cache: Path, images: Sequence[Path], clock: Clock) -> tuple[Path, int]:
    """The folder with these images, and a descriptor: as long as that is open the folder stays. Raises LabError,
    OSError."""
    folder = _folder(cache, images)
    while (fd := _hold(folder)) is None:
        with tempfile.TemporaryDirectory(prefix=f".{_NAME}", dir=cache) as made:
            root = Path(made) / "root"
            await _import(root, images, clock)
            with contextlib.suppress(OSError):  # somebody else was faster
                root.rename(folder)
    os.utime(folder)
    _sweep(folder)
    return folder, fd


def link(folder: Path, root: Path) -> None:
    """Has a containerd with that ``root``, which has never run, begin with what is unpacked there. Raises OSError."""
    for name in _RECORDS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / name, root / name)
    for name in _PARTS:
        (root / name).mkdir(parents=True, exist_ok=True)
        for part in (folder / name).iterdir():
            (root / name / part.name).symlink_to(part)


def _folder(cache: Path, images: Sequence[Path]) -> Path:
    """Named by the digests of the images and by the containerd that unpacks them; makes ``cache``. Raises OSError."""
    cache.mkdir(parents=True, exist_ok=True)
    found = _CONTAINERD.stat()
    digest = hashlib.sha256(f"{found.st_size} {found.st_mtime_ns}".encode())
    for path in images:
        with tarfile.open(path) as tar:
            index = tar.extractfile("index.json")
            digest.update(index.read() if index else b"")
    return cache / f"{_NAME}{digest.hexdigest()[:12]}"


def _hold(folder: Path, how: int = fcntl.LOCK_SH) -> int | None:
    """A descriptor with its lock; None if it is not there, or somebody's who does not share it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # it is on its way out
    os.close(fd)
    return None


def _sweep(used: Path) -> None:
    """Removes what no lab has, and none had for a while: each change of ours is another image, and a lab that was
    killed while it unpacked leaves half of one."""
    for path in [*used.parent.glob(f"{_NAME}*"), *used.parent.glob(f".{_NAME}*")]:
        with contextlib.suppress(FileNotFoundError):
            if path == used or time.time() - path.stat().st_mtime < _KEPT:
                continue
            fd = _hold(path, fcntl.LOCK_EX)
            if fd is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)


async def _import(root: Path, images: Sequence[Path], clock: Clock) -> None:
    """By a containerd that has nothing else to do."""
    home = root.parent
    address, log = home / "containerd.sock", home / "containerd.log"
    (home / "containerd.toml").write_text(
        f'version = 2\nroot = "{root}"\nstate = "{home / "state"}"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\n  address = "{address}"\n[ttrpc]\n  address = "{address}.ttrpc"\n'
        f'[plugins."io.containerd.internal.v1.opt"]\n  path = "{home / "opt"}"\n'
    )
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            str(_CONTAINERD),
            f"--config={home / 'containerd.toml'}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={"PATH": PATH},
        )
    try:
        end = clock.monotonic() + _LIMIT
        for image in images:
            words = ["ctr", "-a", str(address), "-n", "k8s.io", "images", "import", str(image)]
            while (said := await outcome(words, {"PATH": PATH}))[0]:
                if process.returncode is not None or clock.monotonic() > end:
                    raise LabError(f"containerd does not take {image}: {said[1].strip()}\n{log.read_text()[-500:]}")
                await clock.sleep(_LOOK_EVERY)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
