"""The folder in which shims leave their DELs while no server answers."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Final

from cni import message, spec
from cni.errors import CNIError
from cni.message import MalformedMessage
from cni.spec import Call, Refusal
from cni.verbs import CarryOut
from store.clock import Clock

log = logging.getLogger(__name__)

FOLDER: Final = "queue"
_SUFFIX: Final = ".del"
#: Seconds between two looks: a shim may have written while the server was on its way up.
_EVERY: Final = 3.0
#: Seconds after which a file that a shim has begun is one that a killed shim left.
_BEGUN: Final = 60.0


class Queue:
    """``directory``/queue, whose files each hold one request. ``carry_out`` is ``Verbs.carry_out``."""

    def __init__(self, *, directory: Path, carry_out: CarryOut, clock: Clock) -> None:
        self._folder = directory / FOLDER
        self._carry_out = carry_out
        self._clock = clock
        self._folder.mkdir(mode=0o700, exist_ok=True)
        #: Those of which it was said that they fail.
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            await self._clock.sleep(_EVERY)
            await self.drain()

    async def drain(self) -> None:
        """Carries out what is there, oldest first. A DEL that fails stays for the next look; what is no DEL is put
        aside with the suffix .bad."""
        self._tidy()
        names = self._names()
        self._failing &= set(names)
        for name in names:
            call = self._read(name)
            if call is None:
                continue
            try:
                await self._carry_out(call, None)
            except CNIError as e:
                if name not in self._failing:
                    log.warning("queued DEL %s fails and will be tried again: %s", name, e)
                self._failing.add(name)
                continue
            self._remove(name)
            log.info("queued DEL of %s in container %s carried out", call.interface, call.container)

    def _names(self) -> list[str]:
        # Named by the shim's time, so their order is that of arrival.
        return sorted(p.name for p in self._folder.glob(f"*{_SUFFIX}"))

    def _tidy(self) -> None:
        for path in self._folder.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _BEGUN:
                    path.unlink()

    def _read(self, name: str) -> Call | None:
        path = self._folder / name
        try:
            with path.open("rb") as file:
                request = message.decode(file.read(message.MESSAGE_LIMIT + 1))
            return _only_del(spec.parse(request.environment, request.config))
        except FileNotFoundError:
            # The shim found a server after all, and took its file back.
            return None
        except (MalformedMessage, Refusal, OSError) as e:
            log.warning("queued DEL %s is put aside as .bad: %s", name, e)
            with contextlib.suppress(FileNotFoundError):
                path.rename(path.with_suffix(".bad"))
            return None

    def _remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)


def _only_del(call: Call) -> Call:
    if call.command != "DEL":
        raise MalformedMessage(f"it asks for {call.command}; only DEL may be queued")
    return call
