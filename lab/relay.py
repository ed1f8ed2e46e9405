"""Carries connections from a socket of another network namespace to a server in ours: shells are outside the lab."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Final

_CHUNK: Final = 1 << 16
_log = logging.getLogger(__name__)


async def relay(listener: socket.socket, host: str, port: int) -> None:
    """Takes connections from ``listener``, each to one of its own to ``host``, until it is cancelled. A server that is
    away costs the connection, as it would without us."""
    async with asyncio.TaskGroup() as group:

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            group.create_task(_carry(reader, writer, host, port))

        server = await asyncio.start_server(take, sock=listener)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    ends = [writer]
    try:
        there, back = await asyncio.open_connection(host, port)
        ends.append(back)
        async with asyncio.TaskGroup() as both:
            both.create_task(_pump(reader, back))
            both.create_task(_pump(there, writer))
    except* OSError as e:
        _log.info("a connection to %s:%d ended: %s", host, port, e.exceptions[0])
    finally:
        for end in ends:
            end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
