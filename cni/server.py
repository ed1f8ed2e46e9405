"""The socket that shims call.

One request a connection. A caller must be root, its message has limits in size and time, and its descriptor must be a
network namespace that is not the node's. Calls beyond the bound wait in the listen queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from cni import message, netns, spec
from cni.listener import Listener
from cni.message import MalformedMessage
from cni.spec import Refusal
from cni.verbs import CarryOut

log = logging.getLogger(__name__)

_UCRED: Final = struct.Struct("=iII")  # pid, uid, gid
_NS_GET_NSTYPE: Final = 0xB703  # ioctl_ns(2)
_ROOT: Final = 0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, real ones, as the callers' are."""

    connections: int = 256  # calls at once
    read_limit: float = 5.0  # from the connection to the whole request
    write_limit: float = 5.0
    full_limit: float = 1.0  # before the queue is looked at again when no call can be taken
    drain_limit: float = 10.0  # at the end, for calls that are under way


class Server:
    """Takes the calls of ``listener``. ``carry_out`` is ``Verbs.carry_out``; ``observe`` is told of each answer: the
    verb, the CNI code (0: success) and the seconds that it took."""

    def __init__(
        self,
        *,
        listener: Listener,
        carry_out: CarryOut,
        settings: Settings | None = None,
        step: Callable[[str], None] = lambda _: None,
        observe: Callable[[str, int, float], None] = lambda *_: None,
    ) -> None:
        self._listener = listener
        self._carry_out = carry_out
        self._settings = settings or Settings()
        self._step = step
        self._observe = observe
        self._home = Path("/proc/thread-self/ns/net").stat()

    async def run(self) -> None:
        """Answers until cancelled; then closes the listener, and ends what is under way. Raises ListenerError when the
        socket cannot be had."""
        listener = self._listener.open()
        log.info("answering on %s", self._listener)
        calls: set[asyncio.Task[None]] = set()
        try:
            await self._accept(listener, calls)
        finally:
            asyncio.get_running_loop().remove_reader(listener)
            self._listener.close()
            await self._end(calls)

    async def _accept(self, listener: socket.socket, calls: set[asyncio.Task[None]]) -> None:
        """Takes calls from the queue, at most ``settings.connections`` at once. Runs until cancelled."""
        loop = asyncio.get_running_loop()
        full, ended = asyncio.Event(), asyncio.Event()

        def done(call: asyncio.Task[None]) -> None:
            calls.discard(call)
            ended.set()

        def take() -> None:
            try:
                while len(calls) < self._settings.connections:
                    connection, _ = listener.accept()
                    call = loop.create_task(self._serve(connection))
                    calls.add(call)
                    call.add_done_callback(done)
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:
                log.warning("no call can be taken before another has ended: %s", e)
            loop.remove_reader(listener)
            ended.clear()
            full.set()

        # The reader stays while there is room: to add it for each call would be a part of each ADD.
        while True:
            full.clear()
            loop.add_reader(listener, take)
            await full.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.full_limit):
                    await ended.wait()

    async def _end(self, calls: set[asyncio.Task[None]]) -> None:
        if not calls:
            return
        _, late = await asyncio.wait(calls, timeout=self._settings.drain_limit)
        for call in late:
            call.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _serve(self, connection: socket.socket) -> None:
        received: list[int] = []
        began = time.monotonic()
        with connection:
            connection.setblocking(False)
            try:
                pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
                if uid != _ROOT:
                    log.warning("process %d of user %d was turned away: only root may call", pid, uid)
                    return
                data = await _read(connection, received, self._settings.read_limit)
                code, text, command = await self._answer(data, received)
                answer = message.encode_answer(int(code != 0), text)
                await _send(connection, answer, self._settings.write_limit)
                self._observe(command, code, time.monotonic() - began)
                self._step(f"{command.lower()}-answered")
            except MalformedMessage as e:
                log.warning("a call was refused: %s", e)
                self._observe("", spec.UNDECODABLE, time.monotonic() - began)
                refusal = Refusal(spec.UNDECODABLE, "the request is malformed", str(e))
                with contextlib.suppress(OSError, TimeoutError):
                    answer = message.encode_answer(1, spec.error(spec.LATEST, refusal))
                    await _send(connection, answer, self._settings.write_limit)
            except TimeoutError:
                log.warning("a caller neither sent its request nor took its answer in time")
            except ConnectionError as e:
                # The runtime killed its shim; a DEL will follow.
                log.info("a caller went away: %s", e)
            finally:
                for fd in received:
                    os.close(fd)

    async def _answer(self, data: bytes, received: list[int]) -> tuple[int, bytes, str]:
        """CNI code (0: success), what is to be printed, and the command that it was."""
        request = message.decode(data)
        try:
            call = spec.parse(request.environment, request.config)
            # A DEL may find any file where its namespace was mounted.
            pod_ns = self._pod_ns(received) if call.command in ("ADD", "CHECK") else None
            return 0, await self._carry_out(call, pod_ns), call.command
        except Refusal as e:
            problem = e
            log.info("%s refused: %s", request.environment.get("CNI_COMMAND", "?")[:16], e)
        except Exception:
            log.exception("a call failed by a defect of ours")
            problem = Refusal(spec.INTERNAL, "internal error", "see the log of underlay-cni on this node")
        command = request.environment.get("CNI_COMMAND", "")
        return problem.code, spec.error(spec.version_of(request.config), problem), command

    def _pod_ns(self, received: list[int]) -> int | None:
        if not received:
            return None
        fd = received[0]
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != netns.CLONE_NEWNET:
            details = "CNI_NETNS: is no network namespace; it must be the path of the pod's"
            raise Refusal(spec.INVALID_ENVIRONMENT, "invalid CNI_NETNS", details)
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) == (self._home.st_dev, self._home.st_ino):
            details = "CNI_NETNS: is the node's own network namespace; a pod must have one of its own"
            raise Refusal(spec.INVALID_ENVIRONMENT, "invalid CNI_NETNS", details)
        return fd


async def _read(connection: socket.socket, received: list[int], limit: float) -> bytes:
    """The whole request, if it comes within ``limit`` seconds; descriptors that come with it are added to ``received``,
    which the caller closes."""
    end = asyncio.get_running_loop().time() + limit
    data = bytearray()
    wanted = message.REQUEST.size
    while len(data) < wanted:
        known = len(data) >= message.REQUEST.size
        try:
            # Room for more descriptors than allowed, so that a surplus is seen and closed, not cut off.
            chunk, control, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            async with asyncio.timeout_at(end):
                await _readable(connection)
            continue
        for level, kind, body in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.extend(struct.unpack(f"={len(body) // 4}i", body[: len(body) // 4 * 4]))
        if not chunk:
            raise MalformedMessage(f"a request ended after {len(data)} B; {wanted} B were expected at least")
        if len(received) > 1:
            raise MalformedMessage(f"a request came with {len(received)} descriptors; one is allowed")
        data += chunk
        if not known and len(data) >= message.REQUEST.size:
            wanted += message.body_length(bytes(data[: message.REQUEST.size]))
    return bytes(data)


async def _send(connection: socket.socket, data: bytes, limit: float) -> None:
    """Within ``limit`` seconds. TimeoutError, ConnectionError."""
    with contextlib.suppress(BlockingIOError):
        data = data[connection.send(data) :]
    if data:
        async with asyncio.timeout(limit):
            await asyncio.get_running_loop().sock_sendall(connection, data)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
