"""HTTP to one API server: requests that end, lines that go on, and what its answers mean for trying again.

Everything that is no answer (no connection, a time-out, a certificate, 401) is ``Unavailable``: to a node the API
server is away then, whatever the reason. Answers that refuse are ``Refusal``, for ``store.kube`` to read.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlencode

import aiohttp
import msgspec
import yarl
from msgspec import field

from store.clock import Clock
from store.errors import StoreError, Unavailable
from store.kubeaccess import Access

USER_AGENT = "underlay"
#: A line of a watch, or the whole of what refuses: more than etcd takes.
_LINE_LIMIT = 8 << 20
_READ_BUFFER = 256 << 10
#: Seconds that an idle connection is kept: the API server closes it after 90.
_KEEP = 60


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. ``silence``: how long a watch may say nothing (the API server sends a bookmark every minute).
    ``watch``: how long one is asked for. ``patience``: how long faults are met by trying again before they are told."""

    connect: float = 5
    request: float = 15
    silence: float = 150
    watch: float = 300
    patience: float = 5


class Cause(msgspec.Struct, frozen=True):
    field: str = ""
    message: str = ""


class Details(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    #: Plural of the kind that ``name`` is of.
    kind: str = ""
    causes: tuple[Cause, ...] = ()
    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """``metav1.Status``: what the API server says when it refuses."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: Details = field(default_factory=Details)


class Refusal(StoreError):
    """The API server answered, and the answer is no."""

    def __init__(self, code: int, status: Status) -> None:
        self.code = code
        self.status = status
        super().__init__(f"{code} {status.reason}: {status.message}")


class Backoff:
    """Jittered pauses that double, within one limit of seconds for all that goes wrong in a row."""

    def __init__(self, clock: Clock, rng: random.Random, limit: float) -> None:
        self._clock = clock
        self._rng = rng
        self._limit = limit
        self._since: float | None = None
        self._pause = 0.0

    def reset(self) -> None:
        self._since = None

    async def pause(self, at_least: float = 0) -> bool:
        """Waits, or returns False at once when the limit would be passed. ``at_least``: what the server asked for."""
        now = self._clock.monotonic()
        if self._since is None:
            self._since, self._pause = now, 0.1
        seconds = max(self._pause, at_least) * self._rng.uniform(1.0, 1.5)
        if now + seconds - self._since > self._limit:
            return False
        self._pause *= 2
        await self._clock.sleep(seconds)
        return True


class Http:
    """``access`` says where and as whom. To be made and closed on one event loop. ``agent`` is what the API server's
    audit log has as the client's name."""

    def __init__(
        self, access: Access, clock: Clock, rng: random.Random, limits: Limits, *, agent: str = USER_AGENT
    ) -> None:
        self._agent = agent
        self._access = access
        self._clock = clock
        self._rng = rng
        self.limits = limits
        self._session: aiohttp.ClientSession | None = None
        self._tls: ssl.SSLContext | None = None
        self._stamp: tuple[object, ...] = ()
        self._closed = False
        self._reading: set[aiohttp.ClientResponse] = set()

    @property
    def server(self) -> str:
        return self._access.server

    @property
    def closed(self) -> bool:
        return self._closed

    def backoff(self) -> Backoff:
        return Backoff(self._clock, self._rng, self.limits.patience)

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
    ) -> bytes:
        """One request and its answer. What the API server has put off (429, or 503 with Retry-After) is asked again,
        within ``limits.patience``. Refusal, Unavailable."""
        data = None if body is None else msgspec.json.encode(body)
        backoff = self.backoff()
        while True:
            try:
                with self._telling(f"{method} {path}"):
                    async with asyncio.timeout(self.limits.request):
                        async with self._answer(method, path, query or {}, data, content_type) as response:
                            return await response.read()
            except Refusal as e:
                put_off = e.code == 429 or (e.code == 503 and e.status.details.retry_after_seconds > 0)
                if not put_off or not await backoff.pause(e.status.details.retry_after_seconds):
                    raise

    @asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str]) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """An answer that is read line by line as it comes, until the server ends it. Refusal; Unavailable also after
        ``limits.silence`` without a byte."""
        with self._telling(f"GET {path}"):
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self.limits.request):
                    response = await stack.enter_async_context(
                        self._answer("GET", path, query, None, "application/json")
                    )
                self._reading.add(response)
                stack.callback(self._reading.discard, response)
                yield self._split(response.content)

    async def close(self) -> None:
        """Running calls and watches raise ``Unavailable``."""
        self._closed = True
        for response in self._reading:
            # aiohttp closes the connection, but lets who waits for a line wait on.
            response.content.set_exception(aiohttp.ClientConnectionError("closed"))
        if self._session is not None:
            await self._session.close()

    # -- parts ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, query: Mapping[str, str], data: bytes | None, content_type: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful answer, its body unread. Credentials that were refused are read again once."""
        for again in (True, False):
            try:
                async with await self._send(method, path, query, data, content_type, fresh=not again) as response:
                    if response.status == 401 and again:
                        continue
                    if response.status >= 400:
                        raise self._refusal(response.status, await response.content.read(_LINE_LIMIT), response.headers)
                    yield response
                    return
            except aiohttp.ClientSSLError as e:
                # The CA or our certificate may have been renewed since it was read.
                if not again or self._access.stamp() == self._stamp:
                    raise self._away(e) from e
                self._tls = None

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], data: bytes | None, content_type: str, *, fresh: bool
    ) -> aiohttp.ClientResponse:
        if self._closed:
            raise Unavailable("the store is closed")
        token = await self._access.tokens.token(fresh=fresh)
        if self._tls is None or (fresh and self._access.stamp() != self._stamp):
            self._stamp = self._access.stamp()
            self._tls = self._access.tls()
        if self._session is None:
            self._session = self._open()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if data is not None:
            headers["Content-Type"] = content_type
        text = f"{self._access.server}{path}" + (f"?{urlencode(query)}" if query else "")
        return await self._session.request(
            method,
            yarl.URL(text, encoded=True),
            data=data,
            headers=headers,
            ssl=self._tls,
            server_hostname=self._access.server_name or None,
            proxy=self._access.proxy or None,
            allow_redirects=False,
        )

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP, socket_factory=_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect),
            # The network is near, and the API server has better to do than to compress.
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": self._agent},
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_READ_BUFFER,
        )

    async def _split(self, content: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
        rest = b""
        while True:
            try:
                async with asyncio.timeout(self.limits.silence):
                    chunk = await content.readany()
            except TimeoutError:
                raise self._away(f"a watch that said nothing for {self.limits.silence} s") from None
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                if line:
                    yield line
            if len(rest) > _LINE_LIMIT:
                raise self._away(f"a line of more than {_LINE_LIMIT} bytes")

    def _refusal(self, code: int, body: bytes, headers: Mapping[str, str]) -> StoreError:
        try:
            status = msgspec.json.decode(body, type=Status)
        except msgspec.DecodeError:
            status = Status(message=body.decode(errors="replace").strip()[:500])
        if code == 401:
            return self._away("it does not accept our credentials (401)")
        after = headers.get("Retry-After", "")
        if after.isdigit() and not status.details.retry_after_seconds:
            details = msgspec.structs.replace(status.details, retry_after_seconds=int(after))
            status = msgspec.structs.replace(status, details=details)
        return Refusal(code, status)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Makes ``Unavailable`` of everything that kept an answer from us."""
        try:
            yield
        except aiohttp.ClientError as e:
            raise self._away(e) from e
        except TimeoutError:
            raise self._away(f"no answer to {what} within {self.limits.request} s") from None
        except OSError as e:
            raise self._away(e) from e

    def _away(self, why: object) -> Unavailable:
        if self._closed:
            return Unavailable("the store is closed")
        text = str(why) or type(why).__name__
        return Unavailable(f"API server {self._access.server}: {text}")


def _socket(address: Any) -> socket.socket:
    """A connection whose other end is gone without a word is found within half a minute, not in two hours."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    return made
