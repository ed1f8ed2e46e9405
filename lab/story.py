"""What has been done so far, step by step, for whoever listens from whenever on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Literal

from lab.errors import LabError
from lab.wire import Step
from store.clock import Clock


class Story:
    """Steps in order, and how it ended: "done", or "failed" with a reason."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._steps: list[Step] = []
        self._reason = ""
        self._news = asyncio.Event()
        self.state: Literal["under way", "done", "failed"] = "under way"

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Tells that the block begins, and when it is done how long it took."""
        begin = self._clock.monotonic()
        self._tell(Step(text))
        yield
        self._tell(Step(text, self._clock.monotonic() - begin))

    def end(self, state: Literal["done", "failed"], reason: str = "") -> None:
        self.state = state
        self._reason = reason
        self._wake()

    async def follow(self) -> AsyncIterator[Step]:
        """Each step from the first, as it happens, to the end. Raises LabError if that was a failure."""
        told = 0
        while True:
            news = self._news
            while told < len(self._steps):
                yield self._steps[told]
                told += 1
            if self.state == "failed":
                raise LabError(self._reason)
            if self.state == "done":
                return
            await news.wait()

    def _tell(self, step: Step) -> None:
        self._steps.append(step)
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
