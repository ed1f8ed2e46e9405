"""Puts the plugin on the machine, as a runtime's folder watchers need it: each file appears whole or not at all.

containerd ignores the creation of files in its configuration folder and notices renames within it only, and takes a
half-written conflist for a broken node: a temporary file with another suffix in the same folder, then a rename.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from cni.errors import CNIError
from cni.message import ANSWER, ANSWER_MAGIC, REQUEST, REQUEST_MAGIC
from cni.server import SOCKET

#: The plugin's name: the binary's, and ``type`` in the conflist.
PLUGIN: Final = "underlay"
#: Sorts before what other CNI installers leave: a runtime takes the first.
CONFLIST: Final = "10-underlay.conflist"


class InstallError(CNIError):
    """The plugin cannot be put there; what was there before is untouched."""


def conflist(
    *, name: str = "underlay", version: str = "1.0.0", mtu: int = 0, chain: tuple[Mapping[str, Any], ...] = ()
) -> dict[str, Any]:
    """A network configuration list with us first and ``chain`` (portmap, bandwidth...) behind.

    1.0.0 is what every runtime in use takes: containerd 1.6 refuses results in 1.1.0.
    """
    ours: dict[str, Any] = {"type": PLUGIN}
    if mtu:
        ours["mtu"] = mtu
    return {"cniVersion": version, "name": name, "plugins": [ours, *chain]}


def install(
    shim: Path,
    bin_dir: Path,
    conf_dir: Path,
    *,
    run: Path | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Installs ``shim`` (the built binary, or shim.py) as ``bin_dir``/underlay, then the conflist in ``conf_dir``.

    Where ``run`` is given the conflist appears only when the server behind ``run``/cni.sock answers: from then on the
    runtime calls us. Installing the same again changes nothing. Returns the paths of both. Raises InstallError.
    """
    try:
        program = shim.read_bytes()
        for folder in (bin_dir, conf_dir):
            folder.mkdir(parents=True, exist_ok=True)
        binary = bin_dir / PLUGIN
        put(binary, program, mode=0o755)
        if run is not None and not answers(run):
            raise InstallError(f"no server answers on {run / SOCKET}: start underlay-cni, then install again")
        text = msgspec.json.format(msgspec.json.encode(configuration or conflist()), indent=2) + b"\n"
        target = conf_dir / CONFLIST
        put(target, text, mode=0o644)
    except OSError as e:
        raise InstallError(f"the plugin cannot be installed: {e}") from e
    return binary, target


def put(path: Path, data: bytes, *, mode: int) -> bool:
    """Makes ``path`` hold ``data``, in one step; says whether it had to. Raises OSError."""
    try:
        if path.read_bytes() == data and path.stat().st_mode & 0o7777 == mode:
            return False
    except FileNotFoundError:
        pass
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def answers(run: Path, *, limit: float = 1.0) -> bool:
    """Whether a server answers a VERSION on ``run``/cni.sock within ``limit`` seconds."""
    environment = b"CNI_COMMAND=VERSION\0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(str(run / SOCKET))
            connection.sendall(REQUEST.pack(REQUEST_MAGIC, len(environment), 0) + environment)
            head = connection.recv(ANSWER.size, socket.MSG_WAITALL)
            return len(head) == ANSWER.size and ANSWER.unpack(head)[0] == ANSWER_MAGIC
        except (OSError, struct.error):
            return False
