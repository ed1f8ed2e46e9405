"""The supervisor's half of ``lab.pinger``: starts the process, gives it orders, ends it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import msgspec

from cni import netns
from lab.errors import LabError
from lab.pinger import GRACE, Answer, Began, Begin, Finish, Member, Order, Release, Tell, Told

A = TypeVar("A", Began, Told)

#: Seconds to wait for an answer, beside the grace; a loaded machine may be slow to start Python.
_PATIENCE: Final = 30.0
_LONGEST: Final = 1 << 25


class Pings:
    """Datagrams along all paths until the block of ``pinging`` ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()

    async def tell(self) -> Told:
        """The account so far. Raises LabError, as all of these do, if the pinger is gone."""
        return await self._ask(Tell(), Told)

    async def release(self, members: Sequence[str]) -> Told:
        """Ends the paths from and to these members, whose namespaces can go then; returns their account."""
        return await self._ask(Release(tuple(members)), Told)

    async def finish(self) -> Told:
        """Ends the sending; returns the account when nothing is on its way any more."""
        return await self._ask(Finish(), Told)

    async def begin(self, order: Begin) -> float:
        """Returns when (monotonic) the first datagrams were due."""
        return (await self._ask(order, Began)).at

    async def _ask(self, order: Order, kind: type[A]) -> A:
        assert self._process.stdin
        assert self._process.stdout
        async with self._turn:
            try:
                async with asyncio.timeout(_PATIENCE + GRACE):
                    self._process.stdin.write(msgspec.json.encode(order) + b"\n")
                    await self._process.stdin.drain()
                    line = await self._process.stdout.readline()
            except (ConnectionError, TimeoutError) as e:
                raise LabError(f"the pinger does not answer: {e!r}: the end of lab.log may say why") from e
        if not line:
            raise LabError("the pinger ended by itself; the end of lab.log says why")
        answer: Answer = msgspec.json.decode(line, type=Answer)
        if not isinstance(answer, kind):
            raise LabError(f"the pinger answered {type(order).__name__} with {type(answer).__name__}")
        return answer


@asynccontextmanager
async def pinging(members: Sequence[Member], pairs: Sequence[tuple[int, int]], rate: float) -> AsyncIterator[Pings]:
    """Sends ``rate`` datagrams a second along each of the paths (places in ``members``) while the block runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lab.pinger",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST,
        cwd="/",
        preexec_fn=lambda: netns.die_with_parent(signal.SIGKILL),
    )
    try:
        pings = Pings(process)
        await pings.begin(Begin(tuple(members), tuple(pairs), rate))
        yield pings
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
