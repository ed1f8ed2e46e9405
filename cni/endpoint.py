"""Answers ``GET`` over HTTP for a few pages, at an address or a unix socket, and nothing else.

One request a connection, with limits in number, size and time. Whatever goes wrong here is told in the log and harms no
pod: an address that cannot be had is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

import msgspec

from cni.errors import CNIError
from store.clock import Clock

log = logging.getLogger(__name__)

TEXT: Final = "text/plain; charset=utf-8"
#: Seconds for a socket to be there.
_OPENS_WITHIN: Final = 2.0
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    500: "Internal Server Error",
    503: "Service Unavailable",
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


class Reply(msgspec.Struct, frozen=True):
    """What a page says; a ``body`` of text gets a line's end."""

    body: bytes | str
    content_type: str = TEXT
    code: int = 200


#: Makes a page out of the query's values by name (the last one counts); answers at once, on the event loop.
Page = Callable[[Mapping[str, str]], Reply]


class Asked(msgspec.Struct, frozen=True):
    """A request, as far as it matters here."""

    method: str
    path: str
    query: Mapping[str, str] = {}


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


def health(problem: str) -> Reply:
    """What a probe gets: 200, or 503 with the problem in words."""
    return Reply(problem, code=503) if problem else Reply("ok")


class Endpoint:
    """``pages``: path -> what makes the page there; looked up at each request. ``listening`` is set from then on."""

    def __init__(
        self, address: Address, pages: Mapping[str, Page], clock: Clock, settings: Settings | None = None
    ) -> None:
        self._address = address
        self._pages = pages
        self._clock = clock
        self._settings = settings or Settings()
        self._calls: set[asyncio.Task[None]] = set()
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Answers until cancelled."""
        while True:
            try:
                listener = _listen(self._address)
                server = await asyncio.start_server(self._connected, sock=listener, limit=self._settings.request_bytes)
                break
            except OSError as e:
                log.error("nothing can be asked at %s, will try again: %s", self._address, e.strerror or e)  # noqa: TRY400
                await self._clock.sleep(self._settings.retry)
        log.info("%s at %s", ", ".join(sorted(self._pages)), self._address)
        self.listening.set()
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
            log.info("who asked at %s went away: %s", self._address, str(e) or "no answer in time")
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._settings.limit / 2):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return _written(Reply("a request ends with an empty line", code=408))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = b""
        asked = read(head)
        if asked is None:
            return _written(Reply("this is no request; type: GET /metrics HTTP/1.0", code=400))
        page = self._pages.get(asked.path)
        if page is None:
            return _written(Reply(f"there are: {', '.join(sorted(self._pages))}", code=404))
        if asked.method != "GET":
            return _written(Reply(f"type: GET {asked.path}", code=405))
        try:
            return _written(page(asked.query))
        except Exception:
            log.exception("%s cannot be told, by a defect of ours", asked.path)
            return _written(Reply("a defect of ours: see the log of this process", code=500))


class Lasting:
    """An endpoint, if there is an ``address``, of a process that works by turns (``cni.lock``). It opens at the first
    ``tell`` and stays open as long as ``run`` does: while another process works, probes of ours hear that nothing is
    wrong here."""

    def __init__(self, address: Address | None, clock: Clock) -> None:
        self._pages: dict[str, Page] = {}
        self._endpoint = Endpoint(address, self._pages, clock) if address else None
        self._told = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        await self._told.wait()
        if self._endpoint:
            await self._endpoint.run()

    async def tell(self, pages: Mapping[str, Page]) -> None:
        """These are the pages from now on. Returns when they can be asked for, or the address is not to be had."""
        self._pages.clear()
        self._pages.update(pages)
        self._told.set()
        if self._endpoint:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OPENS_WITHIN):
                    await self._endpoint.listening.wait()

    def stand_by(self) -> None:
        """Another process works."""
        for path in self._pages:
            self._pages[path] = _stands_by


def _stands_by(_: Mapping[str, str]) -> Reply:
    return Reply("ok: stands by, a newer process works")


def read(head: bytes) -> Asked | None:
    """The request that a head is (RFC 9112, section 3); None if it is none."""
    line = head.split(b"\r\n", 1)[0]
    words = line.split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1.") or not line.isascii():
        return None
    method, target = words[0].decode(), words[1].decode()
    path, _, query = target.partition("?")
    return Asked(method, path, dict(parse_qsl(query, keep_blank_values=True)))


def _written(reply: Reply) -> bytes:
    data = f"{reply.body}\n".encode() if isinstance(reply.body, str) else reply.body
    allow = "Allow: GET\r\n" if reply.code == 405 else ""
    head = (
        f"HTTP/1.1 {reply.code} {_REASONS[reply.code]}\r\nContent-Type: {reply.content_type}\r\n"
        f"Content-Length: {len(data)}\r\n{allow}Connection: close\r\n\r\n"
    )
    return head.encode() + data


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _listen(address: Address) -> socket.socket:
    """A listening socket of ours there. OSError, also if somebody answers at that path already."""
    if not address.path:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with _closing_on_error(listener):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # In an upgrade the old process and the new one answer here, so that somebody always does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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
