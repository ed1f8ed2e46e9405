"""Times a program from its start to its end, with as little of our own in it as Python can do.

``posix_spawn`` (vfork in glibc), and files instead of pipes: what is measured is the program, and the kernel that
starts it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class SpawnError(Exception):
    """The program ended badly; the message has its code and what it printed."""


def timed(argv: Sequence[str], environment: Mapping[str, str], *, stdin: Path, stdout: Path) -> float:
    """Seconds from the start of ``argv`` to its end. Raises SpawnError unless it ends with 0."""
    begin = time.perf_counter()
    pid = _start(argv, environment, stdin, stdout)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - begin
    _check(argv, status, stdout)
    return seconds


class Flood(NamedTuple):
    """``seconds`` from the first start to the last end; ``times`` of each, from its own start to its end."""

    seconds: float
    times: tuple[float, ...]


def flood(argv: Sequence[str], calls: Iterable[tuple[Mapping[str, str], Path]], *, stdin: Path, width: int) -> Flood:
    """Runs ``argv`` once for each environment and file for its output, ``width`` at once: as soon as one ends the next
    one starts. Raises SpawnError unless all end with 0."""
    running: dict[int, tuple[int, float, Path]] = {}  # by a descriptor that can be read once the process has ended
    ended = select.poll()
    times: list[float] = []
    waiting = iter(calls)
    begin = time.perf_counter()
    while True:
        for environment, stdout in itertools.islice(waiting, width - len(running)):
            started = time.perf_counter()
            pid = _start(argv, environment, stdin, stdout)
            descriptor = os.pidfd_open(pid)
            ended.register(descriptor, select.POLLIN)
            running[descriptor] = pid, started, stdout
        if not running:
            return Flood(time.perf_counter() - begin, tuple(times))
        for descriptor, _ in ended.poll():
            pid, started, stdout = running.pop(descriptor)
            times.append(time.perf_counter() - started)
            ended.unregister(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            _check(argv, status, stdout)


class Call:
    """A program that runs beside others."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], *, stdin: Path, stdout: Path) -> None:
        self._argv = argv
        self._stdout = stdout
        self._pid = _start(argv, environment, stdin, stdout)
        self._descriptor = os.pidfd_open(self._pid)

    async def ended(self) -> float:
        """When it ended (monotonic); to be waited for once. Raises SpawnError unless it ended with 0."""
        descriptor = self._descriptor
        loop = asyncio.get_running_loop()
        at: asyncio.Future[float] = loop.create_future()

        def readable() -> None:
            loop.remove_reader(descriptor)
            at.set_result(time.monotonic())

        loop.add_reader(descriptor, readable)
        try:
            return await at
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(self._pid, 0)  # noqa: ASYNC222 - it has ended
            _check(self._argv, status, self._stdout)


def _start(argv: Sequence[str], environment: Mapping[str, str], stdin: Path, stdout: Path) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.fspath(stdin), os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.fspath(stdout), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    ]
    return os.posix_spawn(argv[0], list(argv), dict(environment), file_actions=actions)


def _check(argv: Sequence[str], status: int, stdout: Path) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise SpawnError(f"{' '.join(argv)} ended with {code}: {stdout.read_text().strip()}")
