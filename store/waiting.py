"""Waiting with a limit, on a clock that a test can own."""

from __future__ import annotations

import asyncio

from store.clock import Clock


async def until(clock: Clock, event: asyncio.Event, seconds: float | None) -> bool:
    """Waits for the event, at most ``seconds`` of ``clock`` (None: for ever). Says whether it is set."""
    waits: list[asyncio.Future[object]] = [asyncio.ensure_future(event.wait())]
    if seconds is not None:
        waits.append(asyncio.ensure_future(clock.sleep(seconds)))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    return event.is_set()


class Moved:
    """Tells everyone who waits that something has moved, and to look again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, clock: Clock, seconds: float) -> None:
        """To be called with no await between the last look and this."""
        await until(clock, self._event, seconds)
