"""A peer made of a socket: it says whatever a test wants it to, byte by byte (RFC 4271, section 4).

``Raw`` is a correct BGP speaker as far as OPEN and KEEPALIVE go; what is sent besides is the test's. It runs in the
event loop of the test, its socket in a namespace of the test's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from typing import Final

from lab.net import Net
from tests.bgp.routers import TOR4, TOR_AS

OPEN, UPDATE, NOTIFICATION, KEEPALIVE, REFRESH = 1, 2, 3, 4, 5
_MARKER: Final = b"\xff" * 16

#: Attribute flags, and codes (IANA, "BGP Path Attributes").
OPTIONAL, TRANSITIVE, PARTIAL, EXTENDED = 0x80, 0x40, 0x20, 0x10
ORIGIN, AS_PATH, NEXT_HOP, MED, LOCAL_PREF, COMMUNITY = 1, 2, 3, 4, 5, 8
ORIGINATOR_ID, CLUSTER_LIST, MP_REACH, MP_UNREACH, LARGE_COMMUNITY = 9, 10, 14, 15, 32


def message(kind: int, body: bytes = b"", *, length: int | None = None) -> bytes:
    """With its header; ``length`` is what the header says if that is not the truth."""
    return _MARKER + struct.pack("!HB", 19 + len(body) if length is None else length, kind) + body


def attribute(code: int, value: bytes, flags: int = TRANSITIVE, *, length: int | None = None) -> bytes:
    said = len(value) if length is None else length
    if flags & EXTENDED or said > 255:
        return struct.pack("!BBH", flags | EXTENDED, code, said) + value
    return struct.pack("!BBB", flags, code, said) + value


def sequence(*numbers: int, kind: int = 2, count: int | None = None) -> bytes:
    """A segment of an AS_PATH of four-byte numbers."""
    return struct.pack("!BB", kind, len(numbers) if count is None else count) + b"".join(
        struct.pack("!I", n) for n in numbers
    )


def nlri(*prefixes: str) -> bytes:
    said = b""
    for text in prefixes:
        network = ipaddress.ip_network(text)
        said += bytes([network.prefixlen]) + network.network_address.packed[: (network.prefixlen + 7) // 8]
    return said


def origin(value: int = 0) -> bytes:
    return attribute(ORIGIN, bytes([value]))


def as_path(*numbers: int) -> bytes:
    return attribute(AS_PATH, sequence(*(numbers or (TOR_AS,))))


def next_hop(address: str = TOR4) -> bytes:
    return attribute(NEXT_HOP, ipaddress.ip_address(address).packed)


def communities(*values: str) -> bytes:
    pairs = (value.split(":") for value in values)
    return attribute(COMMUNITY, b"".join(struct.pack("!HH", int(a), int(b)) for a, b in pairs), OPTIONAL | TRANSITIVE)


def usual(hop: str = TOR4, *more: bytes, path: tuple[int, ...] = (TOR_AS,)) -> bytes:
    """The attributes of any route."""
    return origin() + as_path(*path) + next_hop(hop) + b"".join(more)


def update(attributes: bytes = b"", reachable: bytes = b"", withdrawn: bytes = b"") -> bytes:
    return message(
        UPDATE,
        struct.pack("!H", len(withdrawn)) + withdrawn + struct.pack("!H", len(attributes)) + attributes + reachable,
    )


def mp_reach(prefixes: bytes, hop: bytes, afi: int = 2, *, said: int | None = None) -> bytes:
    value = struct.pack("!HBB", afi, 1, len(hop) if said is None else said) + hop + b"\0" + prefixes
    return attribute(MP_REACH, value, OPTIONAL)


END_OF_RIB: Final = update()
END_OF_RIB_6: Final = update(attribute(MP_UNREACH, struct.pack("!HB", 2, 1), OPTIONAL))


def opening(asn: int, router_id: str, hold: int, families: Iterable[int], restart: int, refresh: bool) -> bytes:
    """An OPEN. ``families`` are AFIs, all unicast; ``restart`` 0: no graceful restart."""
    families = tuple(families)
    capabilities = b"".join(struct.pack("!BBHBB", 1, 4, afi, 0, 1) for afi in families)
    capabilities += struct.pack("!BBI", 65, 4, asn)
    if refresh:
        capabilities += struct.pack("!BB", 2, 0)
    if restart:
        value = struct.pack("!H", restart) + b"".join(struct.pack("!HBB", afi, 1, 0x80) for afi in families)
        capabilities += struct.pack("!BB", 64, len(value)) + value
    parameters = struct.pack("!BB", 2, len(capabilities)) + capabilities
    head = struct.pack("!BHH", 4, asn if asn < 1 << 16 else 23456, hold) + socket.inet_aton(router_id)
    return message(OPEN, head + bytes([len(parameters)]) + parameters)


class Raw:
    """Waits at ``address`` for the node's speaker, again and again. ``buffer`` is its socket's for what it receives."""

    def __init__(
        self,
        net: Net,
        name: str = "tor",
        address: str = TOR4,
        *,
        asn: int = TOR_AS,
        hold: int = 9,
        families: Iterable[int] = (1, 2),
        restart: int = 0,
        refresh: bool = True,
        buffer: int = 0,
    ) -> None:
        self.address = address
        #: What it says for an OPEN.
        self.opening = opening(asn, "10.9.9.9", hold, families, restart, refresh)
        self._pause = hold / 3
        #: Sessions that came up, connections that came, and the NOTIFICATIONs that they ended with: code and subcode.
        self.ups = 0
        self.attempts = 0
        self.notifications: list[tuple[int, int]] = []
        #: Bodies of the UPDATEs that the node sent in this session.
        self.told: list[bytes] = []
        #: What is said in each new session at once, before anything else.
        self.greeting = b""
        #: Cleared: it reads nothing, so that its window closes. False: it does not say that it lives.
        self.reading = asyncio.Event()
        self.reading.set()
        self.keepalives = True
        self._connection: socket.socket | None = None
        #: Of who writes: a message is not to be said in the middle of another.
        self._turn = asyncio.Lock()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with net.inside(name):
            self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self._listener.bind((address, 179))
        self._listener.listen(4)
        self._listener.setblocking(False)

    @property
    def up(self) -> bool:
        return self._connection is not None

    async def say(self, *messages: bytes) -> None:
        """Raises OSError if the session is over, or ends meanwhile."""
        if self._connection is None:
            raise ConnectionError(f"no session at {self.address}")
        await self._write(self._connection, b"".join(messages))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Raw]:
        task = asyncio.create_task(self._serve())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._listener.close()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            connection.setblocking(False)
            self.attempts += 1
            with connection, contextlib.suppress(OSError):
                await self._session(connection)

    async def _session(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, self.opening)
        self.told = []
        beating: asyncio.Task[None] | None = None
        try:
            while True:
                head = await self._exactly(connection, 19)
                length, kind = struct.unpack("!HB", head[16:])
                body = await self._exactly(connection, length - 19)
                if kind == OPEN:
                    await loop.sock_sendall(connection, message(KEEPALIVE))
                elif kind == NOTIFICATION:
                    self.notifications.append((body[0], body[1]))
                elif kind == UPDATE:
                    self.told.append(body)
                elif kind == KEEPALIVE and beating is None:
                    beating = asyncio.create_task(self._beat(connection))
                    if self.greeting:
                        await loop.sock_sendall(connection, self.greeting)
                    self._connection = connection
                    self.ups += 1
        finally:
            self._connection = None
            if beating is not None:
                beating.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await beating

    async def _beat(self, connection: socket.socket) -> None:
        while True:
            await asyncio.sleep(self._pause)
            if self.keepalives:
                await self._write(connection, message(KEEPALIVE))

    async def _write(self, connection: socket.socket, data: bytes) -> None:
        async with self._turn:
            await asyncio.get_running_loop().sock_sendall(connection, data)

    async def _exactly(self, connection: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            await self.reading.wait()
            part = await asyncio.get_running_loop().sock_recv(connection, count - len(data))
            if not part:
                raise ConnectionError("the node closed it")
            data += part
        return data
