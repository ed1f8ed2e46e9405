"""One process of a kind on a node: a lock that lives as long as its holder, so that a kill gives it back at once."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from store.clock import Clock

log = logging.getLogger(__name__)

#: Seconds between two tries; flock(2) can tell an event loop nothing.
_POLL: Final = 0.02


@asynccontextmanager
async def alone(path: Path, clock: Clock) -> AsyncIterator[None]:
    """Holds ``path``'s lock; waits, without limit and until cancelled, while another process does: an upgrade starts
    the new one while the old one ends. A child that is forked must not outlive the holder; exec drops the lock.
    Raises OSError where the file cannot be made."""
    with path.open("a") as lock:
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    log.info("another process holds %s; waiting for its end", path)
                waited = True
                await clock.sleep(_POLL)
        yield
