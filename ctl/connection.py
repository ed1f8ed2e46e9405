"""HTTP to a process of ours on this machine, which answers at a unix socket or at an address of loopback."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path


class Connection(http.client.HTTPConnection):
    """``where`` is the path of a unix socket, or HOST:PORT; ``limit`` in seconds, for each read and write."""

    def __init__(self, where: Path | str, limit: float) -> None:
        super().__init__("node", timeout=limit)
        self._where = where

    def connect(self) -> None:
        if isinstance(self._where, str):
            host, _, port = self._where.rpartition(":")
            self.sock = socket.create_connection((host.strip("[]"), int(port)), self.timeout)
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._where))
