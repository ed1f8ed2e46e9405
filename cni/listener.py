"""The socket that shims call, with the queue in which calls wait for a server that is on its way up."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final

from cni.errors import CNIError
from cni.message import SOCKET

#: Calls that wait at once; the kernel cuts it to net.core.somaxconn.
BACKLOG: Final = 1024


class ListenerError(CNIError):
    """The socket cannot be had; the message says whose it is and what to do."""


class Listener:
    """``directory``/cni.sock. Who closes it opens it again; it never takes away a socket that is not its own."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / SOCKET
        self._socket: socket.socket | None = None
        self._inode = 0

    def __str__(self) -> str:
        return str(self._path)

    def open(self) -> socket.socket:
        """The socket, opened unless it is. To be called with the lock held (``cni.lock``): what is at the path then
        belonged to a server that was killed. Raises ListenerError."""
        if self._socket:
            return self._socket
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self._path))
            except (FileNotFoundError, ConnectionRefusedError):
                return self._bind()
            except OSError as e:
                raise ListenerError(f"{self._path} cannot be looked at: {e}") from e
        raise ListenerError(f"{self._path}: somebody answers there who does not hold our lock; end that process")

    def queue(self) -> None:
        """Opens it where there is none any more, though the lock is not ours yet: the server that worked takes no more
        calls, and those that come while it ends the ones under way wait here. Raises ListenerError."""
        if not self._socket and not self._path.exists():
            self._bind()

    def close(self) -> None:
        """From here on callers wait for the next one: the shim tries again for 5 s."""
        if self._socket:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()

    def _bind(self) -> socket.socket:
        """Binds under a name of our own and renames: callers meet the old socket or the new one, never none."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        mine = self._path.with_name(f".{SOCKET}.{os.getpid()}")
        try:
            mine.unlink(missing_ok=True)
            previous = os.umask(0o177)
            try:
                listener.bind(str(mine))
            finally:
                os.umask(previous)
            self._inode = mine.stat().st_ino
            listener.listen(BACKLOG)
            mine.replace(self._path)
        except OSError as e:
            listener.close()
            raise ListenerError(f"{self._path} cannot be made: {e}") from e
        self._socket = listener
        return listener
