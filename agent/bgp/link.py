"""The relay's end of relay.sock: one agent, strangers kept out, a slow agent told everything again. Standard library
only. The words are in ``wire``.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.bgp import wire
from agent.bgp.helper import CHUNK, log

#: Connections that have not said who they are: how many, for how many seconds, and how many bytes each may say.
STRANGERS, STRANGER_TIME, STRANGER_LINE = 8, 5.0, 4096


@dataclass(eq=False)
class Client:
    """A connection; ``greeted`` makes it the agent's."""

    socket: socket.socket
    since: float
    greeted: bool = False
    buffer: bytearray = field(default_factory=bytearray)
    queue: deque[bytes] = field(default_factory=deque)
    queued: int = 0
    number: int = 0
    #: Lines were dropped because it was slow: it is told everything again once it has taken what is queued.
    overflowed: bool = False


class Link:
    """``limit``: bytes that the agent may be behind. ``greet`` tells a new agent, or one that fell behind, all there is
    to know; ``request`` takes what the agent asks and raises ValueError, KeyError or TypeError if it is not a request;
    ``left`` is called when there is no agent any more."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        limit: int,
        *,
        greet: Callable[[], None],
        request: Callable[[dict[str, Any]], None],
        left: Callable[[], None],
    ) -> None:
        self._selector, self._limit = selector, limit
        self._greet, self._handle, self._left = greet, request, left
        self._clients: dict[int, Client] = {}
        self._agent: Client | None = None

    def listen(self, path: Path) -> None:
        """Takes the name over from a relay before this one. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(STRANGERS)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def tell(self, kind: str, payload: object) -> None:
        """To the agent, if there is one."""
        if self._agent is not None:
            self._send(self._agent, kind, wire.pack(payload))

    def pass_on(self, kind: str, payload: bytes) -> None:
        """The same for what is bytes already."""
        if self._agent is not None:
            self._send(self._agent, kind, payload)

    @property
    def room(self) -> bool:
        """There is an agent, and it is not far behind: more can be told it that could wait."""
        return self._agent is not None and not self._agent.overflowed and self._agent.queued < self._limit // 2

    def tend(self, now: float) -> None:
        """Sends strangers away that say nothing, and greets an agent again that fell behind."""
        for client in list(self._clients.values()):
            if not client.greeted and now - client.since > STRANGER_TIME:
                self._drop(client, "said nothing")
        if self._agent is not None and self._agent.overflowed and not self._agent.queue:
            self._agent.overflowed = False
            self._greet()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            client = Client(connection, time.monotonic())
            self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(client))
            strangers = [c for c in self._clients.values() if not c.greeted]
            if len(strangers) > STRANGERS:
                self._drop(strangers[0], "too many connections")

    def _serve(self, client: Client) -> None:
        """Readable, or writable again."""
        self._flush(client)
        if client.socket.fileno() not in self._clients:
            return
        try:
            data = client.socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as e:
            self._drop(client, str(e))
            return
        client.buffer += data
        while (end := client.buffer.find(b"\n")) >= 0:
            line = bytes(client.buffer[:end])
            del client.buffer[: end + 1]
            try:
                self._request(client, json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                if not client.greeted:
                    self._drop(client, f"not a request: {line[:60]!r}")
                    return
                self.tell(wire.KIND_ERROR, {"problem": f"not a request: {line[:60]!r} ({e})"})
        if not data or len(client.buffer) > (wire.MAX_LINE if client.greeted else STRANGER_LINE):
            self._drop(client, "closed" if not data else "line too long")

    def _request(self, client: Client, request: dict[str, Any]) -> None:
        if request["do"] == "hello":
            if request["version"] != wire.VERSION:
                raise ValueError(f"version {request['version']!r}, this relay speaks {wire.VERSION}")
            if self._agent is not None and self._agent is not client:
                self._drop(self._agent, "another agent came")
            client.greeted, self._agent = True, client
            self._greet()
        elif client.greeted:
            self._handle(request)
        else:
            raise ValueError("hello comes first")

    def _send(self, client: Client, kind: str, payload: bytes) -> None:
        if client.overflowed:
            return
        line = wire.frame(client.number, kind, payload)
        if client.queued and client.queued + len(line) > self._limit:
            log(f"the agent is {client.queued} bytes behind: it will be told everything again")
            client.overflowed = True
            return
        client.number += 1
        client.queue.append(line)
        client.queued += len(line)
        self._flush(client)

    def _flush(self, client: Client) -> None:
        while client.queue:
            try:
                done = client.socket.send(client.queue[0])
            except BlockingIOError:
                break
            except OSError as e:
                self._drop(client, str(e))
                return
            client.queued -= done
            if done < len(client.queue[0]):
                client.queue[0] = client.queue[0][done:]
            else:
                client.queue.popleft()
        if client.socket.fileno() in self._clients:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.queue else 0)
            self._selector.modify(client.socket, events, lambda: self._serve(client))

    def _drop(self, client: Client, reason: str) -> None:
        if self._clients.pop(client.socket.fileno(), None) is None:
            return
        self._selector.unregister(client.socket)
        client.socket.close()
        if client is self._agent:
            self._agent = None
            self._left()
        log(f"{'the agent' if client.greeted else 'a stranger'} is gone: {reason}")
