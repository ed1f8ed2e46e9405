"""A daemon that is started again whenever it ends, as systemd or a DaemonSet would."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cni.peer import answers
from lab.errors import LabError
from lab.net import Net
from lab.wire import ProcessState
from store.clock import Clock

RESTART_AFTER: Final = 1.0
_LOOK_EVERY: Final = 0.02
_log = logging.getLogger(__name__)


class Daemon:
    """One process of one namespace: what to run, where it logs. ``run()`` keeps it up until it is cancelled. ``after``
    is a unix socket of another that it needs: it is not started before somebody answers there. A change of ``argv``
    holds from the next start on. ``behind``: argv is nsenter's, which forks the program and waits for it, so it is the
    program that signals are for."""

    def __init__(
        self,
        net: Net,
        clock: Clock,
        *,
        member: str,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        after: Path | None = None,
        behind: bool = False,
    ) -> None:
        self.member = member
        self.name = name
        self._net = net
        self._clock = clock
        self.argv = list(argv)
        self._environment = dict(environment)
        self._log = log
        self._after = after
        self._behind = behind
        self._process: asyncio.subprocess.Process | None = None
        self._starts = 0
        self._restart_after = RESTART_AFTER

    async def run(self) -> None:
        while True:
            while self._after and not answers(self._after):
                await self._clock.sleep(_LOOK_EVERY)
            self._process = process = await self._start()
            self._starts += 1
            try:
                code = await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
            self._process = None
            after, self._restart_after = self._restart_after, RESTART_AFTER
            _log.info("%s: %s ended with %s, again in %.1f s", self.member, self.name, code, after)
            await self._clock.sleep(after)

    def kill(self, number: int, *, restart_after: float = RESTART_AFTER) -> None:
        """Sends the signal; if the process ends of it, the next one starts ``restart_after`` seconds later.
        Raises LabError if it is down."""
        if self._process is None or self._process.returncode is not None:
            raise LabError(f"{self.name} of {self.member} is down: it comes back by itself")
        if not self._behind:
            self._process.send_signal(number)
        elif children := children_of(self._process.pid):
            for pid in children:
                os.kill(pid, number)
        else:
            raise LabError(f"{self.name} of {self.member} is just starting")
        self._restart_after = restart_after

    def state(self) -> ProcessState:
        if self._process is None:
            return ProcessState(pid=0, state="restarting" if self._starts else "new", restarts=max(self._starts - 1, 0))
        return ProcessState(pid=self._process.pid, state="running", restarts=self._starts - 1)

    async def _start(self) -> asyncio.subprocess.Process:
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *self.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd="/",
                start_new_session=True,
                preexec_fn=self._net.enter(self.member),
            )


async def outcome(
    words: Sequence[str], environment: Mapping[str, str], *, enter: Callable[[], None] | None = None
) -> tuple[int, str]:
    """How a command ended, and all that it printed. Cancelled, it is killed. ``enter`` is run in it first."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment),
        preexec_fn=enter,
    )
    try:
        said = (await process.communicate())[0].decode(errors="replace")
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, said


def children_of(pid: int) -> tuple[int, ...]:
    """Processes that this one has started (proc(5)); none if it is gone."""
    try:
        return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return ()


def kill_all_others() -> None:
    """SIGKILL to every process of this process namespace but ourselves and its init (kill(2), pid -1)."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        _log.debug("there was nobody left to kill")
