"""Time as an argument: what waits or stamps takes a Clock, so that a test can own it."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that never jump; the only time to wait or measure by."""
        ...

    def now(self) -> str:
        """Wall clock as RFC 3339 in UTC, whole seconds, for people and status; never to decide by."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> str:
        return "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z".format(*time.gmtime()[:6])

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
