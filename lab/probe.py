"""Measures the matrix: UDP between all pods, both families, from one process.

A socket stays in the namespace that it was made in, so one loop can speak for every pod. Sockets are bound to no
address: which source the kernel takes is part of what is asked.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from lab.matrix import Path, Pod, Report
from lab.net import Net

PORT: Final = 7007
PROBES: Final = 5
_FAMILIES: Final = (4, 6)
_HEAD: Final = struct.Struct("!cHHHH")  # ask or reply, run, sender, receiver, number of the probe
_ASK, _REPLY = b"A", b"R"


class Prober:
    """Runs one measurement at a time over the namespaces of ``net``."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._turn = asyncio.Lock()
        self._run = 0

    async def measure(self, pods: Sequence[Pod], *, nodes: int, probes: int = PROBES, limit: float = 5.0) -> Report:
        """Sends ``probes`` datagrams along every path, and waits at most ``limit`` seconds after the last."""
        async with self._turn:
            self._run = (self._run + 1) % 65536
            with ExitStack() as stack:
                exchange = _Exchange(self._net, tuple(pods), self._run, stack)
                for number in range(probes):
                    # One distance at a time, so that no pod is sent more than its buffer holds.
                    for distance in range(1, len(pods)):
                        exchange.send(distance, number)
                        await asyncio.sleep(0)
                await exchange.finish(limit)
                return exchange.report(nodes, probes)


class _Exchange:
    def __init__(self, net: Net, pods: tuple[Pod, ...], run: int, stack: ExitStack) -> None:
        self._pods = pods
        self._run = run
        self._sockets: dict[tuple[int, int], socket.socket] = {}
        self._open: set[tuple[int, int, int, int]] = set()  # sender, receiver, family, number
        self._problems: dict[tuple[int, int, int], str] = {}
        self._sent: list[tuple[int, int, int]] = []
        self._done = asyncio.Event()
        loop = asyncio.get_running_loop()
        for index, pod in enumerate(pods):
            with net.inside(pod.name):
                for family in _FAMILIES:
                    self._sockets[index, family] = stack.enter_context(_socket(family))
        for (index, family), sock in self._sockets.items():
            loop.add_reader(sock, self._reader(index, family, sock))
            stack.callback(loop.remove_reader, sock)

    def send(self, distance: int, number: int) -> None:
        """Each pod asks the one so many places further on."""
        for sender, pod in enumerate(self._pods):
            receiver = (sender + distance) % len(self._pods)
            for family in _FAMILIES:
                probe = (sender, receiver, family, number)
                self._open.add(probe)
                there = self._pods[receiver].address(family)
                if not there or not pod.address(family):
                    self._problems[sender, receiver, family] = "no address in this family"
                    continue
                head = _HEAD.pack(_ASK, self._run, sender, receiver, number)
                try:
                    self._sockets[sender, family].sendto(head, (there, PORT))
                except OSError as e:
                    self._problems[sender, receiver, family] = e.strerror or str(e)

    async def finish(self, limit: float) -> None:
        self._done.clear()
        if not self._open:
            return
        try:
            async with asyncio.timeout(limit):
                await self._done.wait()
        except TimeoutError:
            return  # what is open now is lost

    def report(self, nodes: int, probes: int) -> Report:
        lost: dict[tuple[int, int, int], int] = {}
        for sender, receiver, family, _ in self._open:
            lost[sender, receiver, family] = lost.get((sender, receiver, family), 0) + 1
        everyone = range(len(self._pods))
        return Report(
            nodes=nodes,
            pods=self._pods,
            paths=tuple(
                Path(
                    sender=self._pods[a].name,
                    receiver=self._pods[b].name,
                    family=family,
                    sent=probes,
                    answered=probes - lost.get((a, b, family), 0),
                    problem=self._problems.get((a, b, family), ""),
                )
                for a in everyone
                for b in everyone
                if a != b
                for family in _FAMILIES
            ),
        )

    def _reader(self, index: int, family: int, sock: socket.socket) -> Callable[[], None]:
        def read() -> None:
            while True:
                try:
                    data, peer = sock.recvfrom(512)
                except BlockingIOError:
                    return
                self._received(index, family, sock, data, peer)

        return read

    def _received(self, index: int, family: int, sock: socket.socket, data: bytes, peer: tuple[str, int]) -> None:
        if len(data) < _HEAD.size:
            return
        kind, run, sender, receiver, number = _HEAD.unpack_from(data)
        if run != self._run:
            return  # of an earlier measurement
        if kind == _ASK and receiver == index:
            # The reply tells what the receiver saw; it goes where the datagram seemed to come from.
            sock.sendto(_HEAD.pack(_REPLY, run, sender, receiver, number) + peer[0].encode(), peer)
        elif kind == _REPLY and sender == index:
            here, there = self._pods[sender].address(family), self._pods[receiver].address(family)
            if (seen := data[_HEAD.size :].decode(errors="replace")) != here:
                self._problems[sender, receiver, family] = f"was seen as {seen}, is {here}"
            elif peer[0] != there:
                self._problems[sender, receiver, family] = f"was answered by {peer[0]}, asked {there}"
            self._open.discard((sender, receiver, family, number))
            if not self._open:
                self._done.set()


def _socket(family: int) -> socket.socket:
    sock = socket.socket(
        socket.AF_INET6 if family == 6 else socket.AF_INET,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
    )
    if family == 6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("", PORT))
    return sock
