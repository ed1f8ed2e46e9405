"""One process of a kind works on a node, and the newest one does: a lock that lives as long as its holder, so that a
kill gives it back at once.

Who comes asks by holding a second lock beside it. Who works sees that, ends its work in order, and stands by: should
the newer process end before it does, it works again. So an upgrade starts the new process first, and one that cannot
work costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import IO, Any, Final

from store.clock import Clock

log = logging.getLogger(__name__)

#: Seconds between two tries, and between two looks of who works; flock(2) can tell an event loop nothing.
_POLL: Final = 0.02
_LOOK: Final = 0.1


async def in_turn(
    path: Path, clock: Clock, work: Callable[[], Coroutine[Any, Any, None]], *, ahead: Callable[[], None] = lambda: None
) -> None:
    """Calls ``work`` with ``path``'s lock held, until it ends by itself (its exception is raised) or we are cancelled.
    While a newer process works it is not called; before that works the call is cancelled, and waited for. ``ahead``
    is called again and again while an older process ends its work: for what need not wait. A child that is forked must
    not outlive the holder; exec drops the lock. Raises OSError where the files cannot be made."""
    asks = True
    while True:
        async with _turn(path, clock, ahead, asks=asks):
            asks = False
            task = asyncio.create_task(work())
            try:
                while not task.done() and not _asked(path):
                    await asyncio.wait({task}, timeout=_LOOK)
                over = task.done()
            finally:
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                task.result()  # raises what ended it
            if over:
                return
        log.info("gave %s to a newer process; standing by", path)


@contextlib.asynccontextmanager
async def _turn(path: Path, clock: Clock, ahead: Callable[[], None], *, asks: bool) -> AsyncIterator[None]:
    """The lock; waits for it without limit."""
    with path.open("a") as lock:
        if asks:
            with _next(path).open("a") as coming:
                await _take(coming, clock, path)
                await _take(lock, clock, path, ahead)
        else:
            while _asked(path) or not taken(lock):
                await clock.sleep(_POLL)
            log.info("nobody else holds %s any more: working again", path)
        yield


async def _take(file: IO[str], clock: Clock, path: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    waited = False
    while not taken(file):
        if not waited:
            log.info("another process holds %s; waiting for its end, or that it gives way", path)
        waited = True
        meanwhile()
        await clock.sleep(_POLL)


def taken(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock of an open file if it is free; says whether."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _asked(path: Path) -> bool:
    """Whether somebody asks for the lock. Shared, so that those who only look are not taken for somebody."""
    with _next(path).open("a") as coming:
        return not taken(coming, fcntl.LOCK_SH)


def _next(path: Path) -> Path:
    return path.with_name(f"{path.name}.next")
