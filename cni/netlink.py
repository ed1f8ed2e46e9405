"""Netlink as the kernel speaks it: one socket, requests in batches, every answer read before the call returns.

The kernel carries out a request within sendmsg(2) and has queued the answer when that returns (netlink_rcv_skb in
net/netlink/af_netlink.c), so a synchronous socket never waits for anybody but the kernel, and fits an event loop as a
file write does. A message's body is bytes: packed with ``attr`` and its kin where time counts, or by pyroute2's classes
(``encode``, ``decode``) everywhere else.

A socket belongs to the network namespace that the thread was in when it was made, and stays there.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from cni.errors import CNIError

NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_ECHO: Final = 0x008
NLM_F_DUMP_INTR: Final = 0x010
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_DUMP: Final = 0x300
NLM_F_CREATE: Final = 0x400
NLM_F_APPEND: Final = 0x800

_BATCH_BEGIN: Final = 16  # NFNL_MSG_BATCH_BEGIN
_BATCH_END: Final = 17

_ERROR: Final = 2
_DONE: Final = 3
_CAPPED: Final = 0x100  # NLM_F_CAPPED: the refused request is not echoed after its header
_HAS_TLVS: Final = 0x200  # NLM_F_ACK_TLVS
_EXTACK_TEXT: Final = 1  # NLMSGERR_ATTR_MSG
_NESTED: Final = 0x8000  # NLA_F_NESTED
_KIND: Final = 0x3FFF  # NLA_TYPE_MASK

_SOL_NETLINK: Final = 270
_CAP_ACK: Final = 10
_EXT_ACK: Final = 11
_STRICT_CHECK: Final = 12

_HEADER: Final = struct.Struct("=IHHII")
_NFGENMSG: Final = struct.Struct(">BBH")  # family, version, resource id
_ATTR: Final = struct.Struct("=HH")
_ATTR_U32: Final = struct.Struct("=HHI")
#: By the last two bits of a length.
_PADDING: Final = (b"", bytes(3), bytes(2), bytes(1))
_U32: Final = struct.Struct("=I")
_I32: Final = struct.Struct("=i")

#: Requests sent at once: their answers (under 1 KiB of buffer each) must fit into the default receive buffer.
_CHUNK: Final = 64
#: More than the largest piece of a dump that the kernel makes (32 KiB).
_PIECE: Final = 1 << 16
#: How often a dump that was interrupted is begun again.
_DUMP_ATTEMPTS: Final = 16

_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GLINK: Final = 0x0A


class NetlinkError(CNIError):
    """The kernel refused a request. ``number`` is the errno, ``message`` its own words (extended ACK) or errno's."""

    def __init__(self, number: int, message: str = "") -> None:
        self.number = number
        self.message = message or os.strerror(number)
        super().__init__(f"{self.message} ({errno.errorcode.get(number, number)})")


class DumpInterrupted(NetlinkError):
    """The kernel's tables changed during every attempt to read them: what was read is not to be relied on."""

    def __init__(self) -> None:
        super().__init__(errno.EINTR, f"a dump was interrupted {_DUMP_ATTEMPTS} times in a row; try again")


class Message(NamedTuple):
    """A request or an answer without its header. ``flags`` is what comes on top of NLM_F_REQUEST and NLM_F_ACK."""

    type: int
    body: bytes
    flags: int = 0


# -- attributes (struct nlattr, include/uapi/linux/netlink.h) ------------------------------------------------------


def attr(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    length = len(value)
    return _ATTR.pack(length + 4, kind) + value + _PADDING[length & 3]


def attr_header(kind: int, length: int) -> bytes:
    """What stands before a value of ``length`` bytes, for a message that is put together in pieces."""
    return _ATTR.pack(length + 4, kind)


def attr_u32(kind: int, value: int) -> bytes:
    return _ATTR_U32.pack(8, kind, value)


def attr_text(kind: int, value: str) -> bytes:
    """A string with its closing zero."""
    return attr(kind, value.encode() + b"\0")


def nest(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds attributes. The NLA_F_NESTED bit is the caller's to put in ``kind``: rtnetlink's old
    ones (IFLA_LINKINFO, RTA_MULTIPATH) do without, nftables and nexthop groups want it."""
    return attr(kind, b"".join(inner))


def attributes(body: bytes, start: int) -> dict[int, bytes]:
    """The attributes from ``start`` (the length of the family's fixed header) on, by kind; of equal ones the last."""
    return dict(iterate(body, start))


def iterate(body: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes in order, as (kind, value). A cut one ends the walk, as in the kernel's nla_for_each_attr."""
    end = len(body)
    while start + 4 <= end:
        length, kind = _ATTR.unpack_from(body, start)
        if length < 4 or start + length > end:
            return
        yield kind & _KIND, body[start + 4 : start + length]
        start += (length + 3) & ~3


def encode(message: Any) -> bytes:
    """The body of a pyroute2 message (``ifinfmsg``, ``rtmsg``...) whose fields and ``attrs`` are set."""
    message.reset()
    message.encode()
    return bytes(message.data[_HEADER.size :])


def decode(kind: Any, message: Message) -> Any:
    """An answer as a decoded pyroute2 message of the class ``kind``."""
    header = _HEADER.pack(_HEADER.size + len(message.body), message.type, message.flags, 0, 0)
    decoded = kind(header + message.body)
    decoded.decode()
    return decoded


# -- sockets -------------------------------------------------------------------------------------------------------


class Netlink:
    """A netlink socket in the calling thread's network namespace.

    ``protocol`` is NETLINK_ROUTE (0), NETLINK_NETFILTER (12)...; ``limit`` is how many seconds an answer may take that
    should be there at once. Closed by ``close`` or as a context manager.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE, *, limit: float = 5.0) -> None:
        self._socket = _open(protocol)
        self._socket.settimeout(limit)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, message: Message) -> None:
        """Sends one request and returns when the kernel has carried it out. Raises NetlinkError."""
        self.apply((message,))

    def apply(self, messages: Sequence[Message]) -> None:
        """Sends requests that belong together; raises the first refusal (the kernel has tried the others too)."""
        for error in self.batch(messages):
            if error is not None:
                raise error

    def batch(self, messages: Sequence[Message]) -> list[NetlinkError | None]:
        """Sends requests, in order, each on its own; returns for each the refusal, or None if it was carried out."""
        results: list[NetlinkError | None] = []
        for start in range(0, len(messages), _CHUNK):
            chunk = messages[start : start + _CHUNK]
            first = self._sequence + 1
            self._send(chunk, 0, NLM_F_ACK)
            refusals: list[NetlinkError | None] = [None] * len(chunk)
            for sequence, error in self._answers(first):
                refusals[sequence - first] = error
            results += refusals
        return results

    def transaction(self, subsystem: int, messages: Sequence[Message]) -> None:
        """Sends requests to a subsystem of nfnetlink (NETLINK_NETFILTER), of which all are carried out at once, or none
        (nfnetlink_rcv_batch, net/netfilter/nfnetlink.c). Raises the first refusal."""
        envelope = _NFGENMSG.pack(0, 0, subsystem)
        # Not every kernel acknowledges the end of a batch; a request in it is, once the batch was carried out.
        *others, last = messages
        inner = (*others, last._replace(flags=last.flags | NLM_F_ACK))
        first = self._sequence + 1
        self._send((Message(_BATCH_BEGIN, envelope), *inner, Message(_BATCH_END, envelope)), 0)
        for kind, sequence, body, flags in self._receive():
            if kind != _ERROR or sequence < first:
                continue
            error = _refusal(body, flags)
            if error is not None:
                raise error
            if sequence == self._sequence - 1:
                return

    def make(self, message: Message) -> Message | None:
        """Carries out a request and returns the object as the kernel made it (NLM_F_ECHO); None if this kernel does not
        tell (links: before 6.2). Raises NetlinkError."""
        self._send((message,), NLM_F_ACK | NLM_F_ECHO)
        made = None
        for kind, sequence, body, flags in self._receive():
            if sequence != self._sequence:
                continue
            if kind == _ERROR:
                error = _refusal(body, flags)
                if error is not None:
                    raise error
                return made
            made = Message(kind, body, flags)
        raise AssertionError("unreachable")

    def get(self, message: Message) -> Message:
        """Asks for one object (RTM_GETLINK, RTM_GETROUTE...) and returns it. Raises NetlinkError."""
        self._send((message,), 0)
        for kind, sequence, body, flags in self._receive():
            if sequence != self._sequence:
                continue
            if kind == _ERROR:
                raise _refusal(body, flags) or NetlinkError(errno.EPROTO, "the kernel answered a question with an ACK")
            return Message(kind, body, flags)
        raise AssertionError("unreachable")

    def dump(self, message: Message) -> list[Message]:
        """Asks for all objects that match, and begins again if they changed meanwhile (NLM_F_DUMP_INTR).

        The kernel filters by the fields and attributes of the request (NETLINK_GET_STRICT_CHK) where the family
        supports that. Raises NetlinkError, DumpInterrupted.
        """
        for _ in range(_DUMP_ATTEMPTS):
            found = self._dump(message)
            if found is not None:
                return found
        raise DumpInterrupted

    def carrier(self, interface: str) -> bool:
        """Whether the interface may send: ETHTOOL_GLINK, which first carries out the pending link-state work that
        would otherwise lose the first packets (ethtool_op_get_link, net/ethtool/ioctl.c). False if there is none."""
        command = array.array("I", [_ETHTOOL_GLINK, 0])
        request = struct.pack("=16sQ16x", interface.encode(), command.buffer_info()[0])
        try:
            fcntl.ioctl(self._socket, _SIOCETHTOOL, request)
        except OSError as e:
            if e.errno == errno.ENODEV:
                return False
            raise NetlinkError(
                e.errno or errno.EIO, f"ETHTOOL_GLINK of {interface}: {os.strerror(e.errno or 0)}"
            ) from e
        return bool(command[1])

    def _send(self, messages: Sequence[Message], flags: int, last: int = 0) -> None:
        """``last``: flags of the last one. A refusal is always told, so its ACK alone says how all of them went
        (netlink_rcv_skb)."""
        parts: list[bytes] = []
        sequence = self._sequence
        end = sequence + len(messages)
        for kind, body, more in messages:
            sequence += 1
            more |= NLM_F_REQUEST | flags | (last if sequence == end else 0)
            parts += (_HEADER.pack(_HEADER.size + len(body), kind, more, sequence, 0), body)
            if len(body) % 4:
                parts.append(bytes(-len(body) % 4))
        self._sequence = end
        try:
            self._socket.send(b"".join(parts))
        except OSError as e:
            raise NetlinkError(e.errno or errno.EIO, f"netlink send: {e}") from e

    def _receive(self) -> Iterator[tuple[int, int, bytes, int]]:
        """Messages as they come, without end: (type, sequence, body, flags)."""
        while True:
            try:
                data = self._socket.recv(_PIECE)
            except TimeoutError as e:
                raise NetlinkError(errno.ETIMEDOUT, "the kernel gave no answer over netlink") from e
            except OSError as e:
                raise NetlinkError(e.errno or errno.EIO, f"netlink receive: {e}") from e
            for kind, body, flags, sequence in _split(data):
                yield kind, sequence, body, flags

    def _answers(self, first: int) -> Iterator[tuple[int, NetlinkError | None]]:
        """The refusals of the requests from ``first`` on, until the last one was answered."""
        for kind, sequence, body, flags in self._receive():
            # What is older belongs to a request that was given up.
            if kind == _ERROR and sequence >= first:
                yield sequence, _refusal(body, flags)
                if sequence == self._sequence:
                    return

    def _dump(self, message: Message) -> list[Message] | None:
        self._send((message,), NLM_F_DUMP)
        found: list[Message] = []
        interrupted = False
        for kind, sequence, body, flags in self._receive():
            if sequence != self._sequence:
                continue
            if flags & NLM_F_DUMP_INTR:
                interrupted = True
            if kind == _ERROR:
                raise _refusal(body, flags) or NetlinkError(errno.EPROTO, "the kernel answered a dump with an ACK")
            if kind == _DONE:
                # A dump that failed half way says so in its last message.
                code = _I32.unpack_from(body)[0] if len(body) >= 4 else 0
                if code == -errno.EINTR:
                    interrupted = True
                elif code < 0:
                    raise _refusal(body, flags | _CAPPED, header=False) or NetlinkError(errno.EPROTO)
                return None if interrupted else found
            found.append(Message(kind, body, flags))
        raise AssertionError("unreachable")


class Monitor:
    """A netlink socket that hears the kernel's news of some multicast groups (RTNLGRP_LINK = 1...). Never blocks."""

    def __init__(self, groups: Iterable[int], protocol: int = socket.NETLINK_ROUTE, *, buffer: int = 1 << 20) -> None:
        self._socket = _open(protocol)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, 1, group)  # NETLINK_ADD_MEMBERSHIP

    def fileno(self) -> int:
        """For ``loop.add_reader``."""
        return self._socket.fileno()

    def read(self) -> list[Message]:
        """What has come since the last call. Raises NetlinkError with ENOBUFS when news was lost: read all again."""
        found: list[Message] = []
        while True:
            try:
                data = self._socket.recv(_PIECE)
            except BlockingIOError:
                return found
            except OSError as e:
                raise NetlinkError(e.errno or errno.EIO, f"netlink receive: {e}") from e
            found += (Message(kind, body, flags) for kind, body, flags, _ in _split(data))

    def close(self) -> None:
        self._socket.close()


def _open(protocol: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        for option in (_CAP_ACK, _EXT_ACK, _STRICT_CHECK):
            opened.setsockopt(_SOL_NETLINK, option, 1)
        opened.bind((0, 0))
    except OSError:
        opened.close()
        raise
    return opened


def _split(data: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    start = 0
    while start + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, start)
        yield kind, data[start + _HEADER.size : start + length], flags, sequence
        start += (length + 3) & ~3


def _refusal(body: bytes, flags: int, *, header: bool = True) -> NetlinkError | None:
    """What an NLMSG_ERROR says (struct nlmsgerr, then attributes if there is an extended ACK); None for an ACK."""
    number = -_I32.unpack_from(body)[0]
    if number == 0:
        return None
    start = 4
    if header:
        echoed = _U32.unpack_from(body, 4)[0]
        start += _HEADER.size if flags & _CAPPED else (echoed + 3) & ~3
    text = attributes(body, start).get(_EXTACK_TEXT, b"") if flags & _HAS_TLVS else b""
    return NetlinkError(number, text.rstrip(b"\0").decode(errors="replace"))
