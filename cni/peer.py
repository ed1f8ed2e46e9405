"""Who is at the other end of a unix socket."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Final

_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid


def is_visible(connection: socket.socket) -> bool:
    """Whether who listens is a process that we can see: of this container, if we are in one (unix(7), SO_PEERCRED: of
    another pid namespace the pid is 0)."""
    pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(pid)


def answers(path: Path, *, limit: float = 1.0) -> bool:
    """Whether somebody takes connections at this path, within ``limit`` seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True
