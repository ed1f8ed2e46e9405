"""Answers ``GET /metrics`` over HTTP, at an address or a unix socket, and nothing else.

One request a connection, with limits in number, size and time. Whatever goes wrong here is told in the log and harms no
pod: an address that cannot be had is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec

from cni.errors import CNIError
from store.clock import Clock

log = logging.getLogger(__name__)

PATH: Final = "/metrics"
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    500: "Internal Server Error",
}


class AddressError(CNIError):
    """A text that is no address to answer at; the message says how one is written."""


class Address(msgspec.Struct, frozen=True):
    """Where to answer: a unix socket's ``path``, or ``host`` (an IP address) and ``port``."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, real ones but for ``retry``, as the callers' are."""

    connections: int = 8  # at once; more are closed
    request_bytes: int = 8 << 10
    limit: float = 5.0  # from the connection to the end of the answer
    retry: float = 30.0  # before an address that could not be had is tried again


def parse_address(text: str) -> Address:
    """``127.0.0.1:9464``, ``[::1]:9464``, or a path with a slash. AddressError."""
    if "/" in text:
        return Address(path=text)
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host.replace(":", "?")
    wanted = "write 127.0.0.1:9464, [::1]:9464, or a unix socket's path with a slash in it"
    if not (colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise AddressError(f"{text}: port {port!r} is none from 1 to 65535: {wanted}")
    try:
        return Address(host=str(ip_address(host)), port=int(port))
    except ValueError as e:
        raise AddressError(f"{text}: {e}: {wanted}") from e


class Endpoint:
    """``page`` makes what a scrape gets, ``content_type`` says what that is."""

    def __init__(
        self,
        address: Address,
        page: Callable[[], bytes],
        content_type: str,
        clock: Clock,
        settings: Settings | None = None,
    ) -> None:
        self._address = address
        self._page = page
        self._content_type = content_type
        self._clock = clock
        self._settings = settings or Settings()
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Answers until cancelled."""
        while True:
            try:
                listener = _listen(self._address)
                server = await asyncio.start_server(self._connected, sock=listener, limit=self._settings.request_bytes)
                break
            except OSError as e:
                log.error("no metrics at %s, will try again: %s", self._address, e.strerror or e)  # noqa: TRY400
                await self._clock.sleep(self._settings.retry)
        log.info("metrics at %s", self._address)
        try:
            async with server:
                await server.serve_forever()
        finally:
            if self._address.path:
                _unlink(self._address.path)
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._calls) >= self._settings.connections:
            writer.transport.abort()
            return
        call = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._settings.limit):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError) as e:
            log.info("who asked for metrics went away: %s", str(e) or "no answer in time")
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._settings.limit / 2):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return self._reply(408, "a request ends with an empty line")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return self._reply(400, f"this is no request; type: GET {PATH}")
        code = judge(head)
        if code != 200:
            return self._reply(code, f"type: GET {PATH}")
        try:
            page = self._page()
        except Exception:
            log.exception("the metrics cannot be told, by a defect of ours")
            return self._reply(500, "see the log of underlay-cni on this node")
        return self._reply(200, page, self._content_type)

    def _reply(self, code: int, body: bytes | str, content_type: str = "text/plain; charset=utf-8") -> bytes:
        data = f"{body}\n".encode() if isinstance(body, str) else body
        allow = "Allow: GET\r\n" if code == 405 else ""
        head = (
            f"HTTP/1.1 {code} {_REASONS[code]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\n"
            f"{allow}Connection: close\r\n\r\n"
        )
        return head.encode() + data


def judge(head: bytes) -> int:
    """The code to answer a request's head with: 200 if it asks for the metrics (RFC 9112, section 3)."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return 400
    method, target, _ = words
    if target.split(b"?", 1)[0] != PATH.encode():
        return 404
    return 200 if method == b"GET" else 405


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _listen(address: Address) -> socket.socket:
    """A listening socket of ours there. OSError, also if somebody answers at that path already."""
    if not address.path:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with _closing_on_error(listener):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address.host, address.port))
            listener.listen()
        return listener
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(FileNotFoundError):
        probe.settimeout(1)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            _unlink(address.path)  # of a server that was killed
        else:
            raise OSError("somebody answers there already")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _closing_on_error(listener):
        previous = os.umask(0o177)
        try:
            listener.bind(address.path)
        finally:
            os.umask(previous)
        listener.listen()
    return listener


@contextlib.contextmanager
def _closing_on_error(listener: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        listener.close()
        raise
