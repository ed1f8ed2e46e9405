"""A process that sends numbered UDP datagrams along many paths at a steady rate, and keeps account of what is lost.

As in ``lab.probe`` a socket stays in the namespace that it was made in, so one process is the sender and the receiver
of every path. A datagram goes one way: the way back is a path of its own, and so a loss has a direction. Nothing is
waited for, and everything that is remembered has a bound.

It is told what to do on its standard input, one JSON object a line, and answers each on its output. It ends with its
input.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from cni import netns
from lab.losses import Losses, Tally, Timetable

PORT: Final = 7008
FAMILIES: Final = (4, 6)
#: Seconds after which what has not arrived is lost.
GRACE: Final = 1.0
#: The paths of one period are spread over so many moments.
_SLICES: Final = 10
#: Bytes of a socket's queue, if we may: all of a second for one of many receivers.
_QUEUE: Final = 4 << 20
_HEAD: Final = struct.Struct("!III")  # run, path, number
#: getsockopt(SO_MEMINFO), linux/sock_diag.h: nine u32, the last one is SK_MEMINFO_DROPS.
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")


class Member(msgspec.Struct, frozen=True):
    """Who sends or receives: its name, where its namespace is pinned, its addresses (at most one a family)."""

    name: str
    netns: str
    addresses: tuple[str, ...]

    def address(self, family: int) -> str:
        return next((a for a in self.addresses if (":" in a) == (family == 6)), "")


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first line. ``pairs`` are places in ``members``, sender and receiver; each is a path in both families.
    ``rate`` is datagrams a second along each path. Answer: ``Began``."""

    members: tuple[Member, ...]
    pairs: tuple[tuple[int, int], ...]
    rate: float


class Release(msgspec.Struct, frozen=True, tag=True):
    """These members are about to end: nothing more is sent to or from them, what is on its way is waited for, and their
    sockets are closed. Answer: ``Told``, of their paths alone, which no later one has."""

    members: tuple[str, ...]


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Answer: ``Told``."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Sends nothing more, waits for what is on its way. Answer: ``Told``."""


Order = Begin | Release | Tell | Finish


class Began(msgspec.Struct, frozen=True, tag=True):
    """``at``: CLOCK_MONOTONIC."""

    at: float


class Path(msgspec.Struct, frozen=True, kw_only=True):
    """``unsent``: datagrams whose time passed before we came to send them. ``problem``: what was wrong with one that
    came, and does not count as come."""

    sender: str
    receiver: str
    family: int
    tally: Tally
    unsent: int
    problem: str


class Told(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """``late`` is the worst delay of a sending in seconds; ``dropped`` is what our own queues had no room for: it is
    counted as lost too, and nobody else's fault."""

    paths: tuple[Path, ...]
    late: float
    dropped: int


Answer = Began | Told


class _Line:
    """One path at work, from one socket to another."""

    def __init__(
        self, number: int, family: int, sender: Member, out: socket.socket, receiver: Member, into: socket.socket
    ) -> None:
        self.number = number
        self.sender, self.receiver, self.family = sender, receiver, family
        self.source = sender.address(family)
        self.target = (receiver.address(family), PORT)
        self.out, self.into = out, into
        self.losses = Losses(GRACE)
        self.unsent = 0
        self.problem = ""
        self.ended = False

    def told(self) -> Path:
        return Path(
            sender=self.sender.name,
            receiver=self.receiver.name,
            family=self.family,
            tally=self.losses.tally(),
            unsent=self.unsent,
            problem=self.problem,
        )


class Pinger:
    """Sockets, paths and the time. ``turn`` is to be called again and again."""

    def __init__(self, begin: Begin, run: int, now: float) -> None:
        self._run = run
        self._poll = select.epoll()
        self._sockets: dict[tuple[str, int], socket.socket] = {}
        self._receivers: dict[int, socket.socket] = {}
        self._dropped = 0
        used = {place for pair in begin.pairs for place in pair}
        for place, member in enumerate(begin.members):
            if place in used:
                self._open(member)
        self._lines: list[_Line] = []
        for sender, receiver in ((begin.members[a], begin.members[b]) for a, b in begin.pairs):
            for family in FAMILIES:
                if sender.address(family) and receiver.address(family):
                    out, into = self._sockets[sender.name, family], self._sockets[receiver.name, family]
                    self._lines.append(_Line(len(self._lines), family, sender, out, receiver, into))
        self._slices: list[list[_Line]] = [self._lines[place::_SLICES] for place in range(_SLICES)]
        self._times = Timetable(now, 1 / begin.rate, _SLICES)
        #: Whatever arrived before that has been read.
        self._read_to = now

    def turn(self, until: float, other: int | None = None) -> bool:
        """Sends what is due, then reads what has come, or waits for it until the next is due, or ``until`` (monotonic);
        True if the descriptor ``other`` can be read."""
        for place, in_time in self._times.due(time.monotonic()):
            for line in self._slices[place]:
                if in_time:
                    self._send(line)
                else:
                    line.unsent += 1
        begin = time.monotonic()
        wait = max(0.0, min(self._times.next, until) - begin)
        asked = False
        for fd, _ in self._poll.poll(wait):
            if fd == other:
                asked = True
            else:
                self._drain(self._receivers[fd])
        self._read_to = begin
        return asked

    def watch(self, other: int) -> None:
        self._poll.register(other, select.EPOLLIN)

    def release(self, members: Sequence[str]) -> Told:
        """See ``Release``; the other paths go on meanwhile."""
        theirs = [
            line for line in self._lines if not line.ended and {line.sender.name, line.receiver.name} & set(members)
        ]
        self._stop(theirs)
        for key in [key for key in self._sockets if key[0] in members]:
            sock = self._sockets.pop(key)
            self._dropped += _drops(sock)
            self._poll.unregister(sock)
            del self._receivers[sock.fileno()]
            sock.close()
        for line in theirs:
            line.ended = True
        return self._told(theirs)

    def finish(self) -> Told:
        self._stop(self._lines)
        return self.tell()

    def tell(self) -> Told:
        for line in self._lines:
            line.losses.settle(self._read_to)
        return self._told([line for line in self._lines if not line.ended])

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        self._poll.close()

    def _stop(self, lines: Sequence[_Line]) -> None:
        numbers = {line.number for line in lines}
        self._slices = [[line for line in each if line.number not in numbers] for each in self._slices]
        end = time.monotonic() + GRACE
        while self._read_to <= end:
            self.turn(end + 0.01)
        for line in lines:
            line.losses.settle(self._read_to)

    def _told(self, lines: Sequence[_Line]) -> Told:
        return Told(
            paths=tuple(line.told() for line in lines),
            late=self._times.late,
            dropped=self._dropped + sum(_drops(sock) for sock in self._sockets.values()),
        )

    def _open(self, member: Member) -> None:
        fd = os.open(member.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with netns.inside(fd):
                for family in FAMILIES:
                    self._sockets[member.name, family] = sock = _socket(family)
                    self._receivers[sock.fileno()] = sock
                    self._poll.register(sock, select.EPOLLIN)
        finally:
            os.close(fd)

    def _send(self, line: _Line) -> None:
        now = time.monotonic()
        losses = line.losses
        losses.settle(self._read_to)
        number = losses.sent(now)
        try:
            line.out.sendto(_HEAD.pack(self._run, line.number, number), line.target)
        except OSError as e:
            line.problem = line.problem or f"sending: {e.strerror or e}"

    def _drain(self, sock: socket.socket) -> None:
        lines, run, at = self._lines, self._run, self._read_to
        while True:
            try:
                data, peer = sock.recvfrom(64)
            except BlockingIOError:
                return
            except OSError as e:
                # An ICMP error of something sent before; it is lost, and told as that.
                sys.stderr.write(f"pinger: {e}\n")
                return
            if len(data) != _HEAD.size:
                continue
            of, path, number = _HEAD.unpack(data)
            if of != run or path >= len(lines):
                continue
            line = lines[path]
            if sock is not line.into:
                line.problem = f"came to another, who has {line.target[0]} too"
            elif peer[0] != line.source:
                line.problem = f"was seen as {peer[0]}, is {line.source}"
            else:
                line.losses.arrived(number, at)


def _socket(family: int) -> socket.socket:
    sock = socket.socket(
        socket.AF_INET6 if family == 6 else socket.AF_INET,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
    )
    if family == 6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, 33, _QUEUE)  # SO_RCVBUFFORCE, which a user namespace does not allow
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE)
    sock.bind(("", PORT))
    return sock


def _drops(sock: socket.socket) -> int:
    drops: int = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[-1]
    return drops


def main() -> None:
    """Until the end of the input."""
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)  # what it measures must not be its own waiting for a processor
    buffer = b""
    pinger: Pinger | None = None
    try:
        while True:
            if pinger and not pinger.turn(time.monotonic() + 1.0, 0):
                continue
            data = os.read(0, 1 << 20)
            if not data:
                return
            *orders, buffer = (buffer + data).split(b"\n")
            for order in orders:
                pinger = _obey(pinger, msgspec.json.decode(order, type=Order))
    finally:
        if pinger:
            pinger.close()


def _obey(pinger: Pinger | None, order: Order) -> Pinger:
    answer: Answer
    if isinstance(order, Begin):
        now = time.monotonic()
        pinger = Pinger(order, int.from_bytes(os.urandom(4)), now)
        pinger.watch(0)
        gc.freeze()
        answer = Began(now)
    elif pinger is None:
        raise ValueError(f"{type(order).__name__} before Begin")
    else:
        match order:
            case Release(members):
                answer = pinger.release(members)
            case Tell():
                answer = pinger.tell()
            case Finish():
                answer = pinger.finish()
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()
    return pinger


if __name__ == "__main__":
    main()
