"""A daemon that is started again whenever it ends, as systemd or a DaemonSet would."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lab.errors import LabError
from lab.net import Net
from lab.wire import ProcessState
from store.clock import Clock

RESTART_AFTER: Final = 1.0
_LOOK_EVERY: Final = 0.02
_log = logging.getLogger(__name__)


class Daemon:
    """One process of one namespace: what to run, where it logs. ``run()`` keeps it up until it is cancelled. ``after``
    is a unix socket of another that it needs: it is not started before somebody answers there."""

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
    ) -> None:
        self.member = member
        self.name = name
        self._net = net
        self._clock = clock
        self._argv = list(argv)
        self._environment = dict(environment)
        self._log = log
        self._after = after
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
        self._restart_after = restart_after
        self._process.send_signal(number)

    def state(self) -> ProcessState:
        if self._process is None:
            return ProcessState(pid=0, state="restarting" if self._starts else "new", restarts=max(self._starts - 1, 0))
        return ProcessState(pid=self._process.pid, state="running", restarts=self._starts - 1)

    async def _start(self) -> asyncio.subprocess.Process:
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd="/",
                start_new_session=True,
                preexec_fn=self._net.enter(self.member),
            )


def kill_all_others() -> None:
    """SIGKILL to every process of this process namespace but ourselves and its init (kill(2), pid -1)."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        _log.debug("there was nobody left to kill")


def answers(path: Path) -> bool:
    """Whether somebody listens on this unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
