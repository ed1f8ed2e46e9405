"""A child that removes doomed links, so that nobody waits for it.

Removing a veth keeps its caller in the kernel for some 20 ms (RCU), but holds the lock that other requests need
(RTNL) only for a fraction: in a process of its own it delays no ADD. The child is forked before there is an event loop,
shares our memory, and ends with us, however we end: then its end of the socket pair is closed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import NoReturn, Self

from cni import podnet
from cni.errors import CNIError
from cni.netlink import Netlink, NetlinkError


class ReaperError(CNIError):
    """The child could not remove the doomed links, or is gone; they stay doomed, and a later attempt takes them."""


class Reaper:
    """The parent's end. To be made before any event loop and thread, in the node's network namespace."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _child(theirs)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def reap(self, *, limit: float = 10.0) -> None:
        """Removes every link that is doomed now; returns when they are gone. One call at a time. Raises ReaperError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit):
                await loop.sock_sendall(self._socket, b"reap")
                answer = await loop.sock_recv(self._socket, 4096)
        except TimeoutError as e:
            # A late answer would be taken for that of the next order.
            os.kill(self.pid, signal.SIGKILL)
            self.close()
            raise ReaperError(f"the reaper gave no answer for {limit} s") from e
        except OSError as e:
            raise ReaperError(f"the reaper is gone: {e}") from e
        if answer != b"ok":
            raise ReaperError(answer.decode(errors="replace") or "the reaper is gone")

    def close(self) -> None:
        """Ends the child and waits for it: it closes at once, or after the removal that it is at."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            os.waitpid(self.pid, 0)


def _child(orders: socket.socket) -> NoReturn:
    # The parent's end decides when: a signal to the whole group must not end the child before its last order.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    code = 1
    try:
        with Netlink() as node:
            while orders.recv(64):
                try:
                    podnet.reap(node)
                except NetlinkError as e:
                    orders.send(f"doomed links cannot be removed: {e}".encode())
                else:
                    orders.send(b"ok")
        code = 0
    except OSError as e:
        print(f"reaper: {e}", file=sys.stderr)
    finally:
        os._exit(code)
