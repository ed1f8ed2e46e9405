"""Times a program from its start to its end, with as little of our own in it as Python can do.

``posix_spawn`` (vfork in glibc), and files instead of pipes: what is measured is the program, and the kernel that
starts it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class SpawnError(Exception):
    """The program ended badly; the message has its code and what it printed."""


def timed(argv: Sequence[str], environment: Mapping[str, str], *, stdin: Path, stdout: Path) -> float:
    """Seconds from the start of ``argv`` to its end. Raises SpawnError unless it ends with 0."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.fspath(stdin), os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.fspath(stdout), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    ]
    begin = time.perf_counter()
    pid = os.posix_spawn(argv[0], list(argv), dict(environment), file_actions=actions)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - begin
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise SpawnError(f"{' '.join(argv)} ended with {code}: {stdout.read_text().strip()}")
    return seconds
