"""What it is to be ExaBGP's helper: two pipes, answers in order, a parent to signal. Standard library only.

The input is always drained (a helper that does not read blocks ExaBGP whole, exabgp.md fault 5), and the output never
blocks (with both pipes full that would be a deadlock).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

#: Bytes read at once.
CHUNK = 1 << 18

#: Called with whether ExaBGP said ``done``, and the lines that it printed before.
Answer = Callable[[bool, list[str]], None]


def ignore(ok: bool, lines: list[str]) -> None:
    """For commands whose effect is seen elsewhere."""


class Speaker:
    """The ExaBGP that runs us. ``event`` is called with each line of JSON, in order."""

    def __init__(self, selector: selectors.BaseSelector, event: Callable[[bytes], None]) -> None:
        self._selector, self._event = selector, event
        self._parent = os.getppid()
        self._input = b""
        self._output: deque[bytes] = deque()
        self._answers: deque[tuple[Answer, list[str], float]] = deque()
        #: It closed our input, or we ended it: nothing is left to do.
        self.ended = False
        #: It said that it shuts down.
        self.leaving = False

    def start(self, folder: Path) -> None:
        """Begins to listen. Kills an ExaBGP that had another helper before (``folder``/relay.parent says so): what was
        on its way died with that one, and a graceful restart is the way back to the truth."""
        # Field 22 of proc(5) stat: the start time, with the pid a name that is not used twice.
        started = Path(f"/proc/{self._parent}/stat").read_text().rpartition(")")[2].split()[19]
        record, me = folder / "relay.parent", f"{self._parent} {started}"
        with contextlib.suppress(FileNotFoundError):
            if record.read_text() == me:
                self.restart("a relay of this ExaBGP died before")
        record.write_text(me)
        self._catch_sigterm()
        for descriptor in (0, 1):
            os.set_blocking(descriptor, False)
        self._selector.register(0, selectors.EVENT_READ, self._read)

    def say(self, line: str, answer: Answer = ignore) -> None:
        """One command. Its answer comes after those of all commands before it."""
        self._answers.append((answer, [], time.monotonic()))
        self._output.append(line.encode("ascii") + b"\n")
        self._write()

    def unanswered(self) -> float | None:
        """When the oldest command without an answer was given, on the monotonic clock."""
        return self._answers[0][2] if self._answers else None

    def reload(self) -> None:
        """Has it read its configuration. It forgets this while announcements are pending (fault 2)."""
        if os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGUSR1)

    def restart(self, reason: str) -> None:
        """Ends it without a word to the peers, so that those in graceful restart keep our routes; its supervisor
        starts it again."""
        log(f"restarting ExaBGP: {reason}")
        if os.getppid() == self._parent:
            os.kill(self._parent, signal.SIGKILL)
        self.ended = True

    def _catch_sigterm(self) -> None:
        """ExaBGP ends its helper when it shuts down, which it says first, and when it could not read its file as it
        reloaded (fault 3): then it runs on with nobody to command it, and must go."""
        wake, self._waker = socket.socketpair()
        for end in (wake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno())
        signal.signal(signal.SIGTERM, lambda number, frame: None)

        def woken() -> None:
            if signal.SIGTERM not in wake.recv(64):
                return
            self._read()
            if not self.leaving:
                self.restart("it ended its relay without shutting down")
            self.ended = True

        self._selector.register(wake, selectors.EVENT_READ, woken)

    def _read(self) -> None:
        while True:
            try:
                data = os.read(0, CHUNK)
            except BlockingIOError:
                return
            if not data:
                self.ended = True
                return
            *lines, self._input = (self._input + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"{"):
                    self._answer(line.decode("ascii", "replace").strip())
                elif b'"notification": "shutdown"' in line[:1024]:
                    self.leaving = True
                else:
                    self._event(line)

    def _answer(self, line: str) -> None:
        if not self._answers:
            if line:
                log(f"unexpected answer {line[:100]!r}")
            return
        answer, lines, _ = self._answers[0]
        if line not in ("done", "error"):
            lines.append(line)
            return
        self._answers.popleft()
        answer(line == "done", lines)

    def _write(self) -> None:
        while self._output:
            try:
                done = os.write(1, self._output[0])
            except BlockingIOError:
                break
            except BrokenPipeError:
                self.ended = True
                return
            if done < len(self._output[0]):
                self._output[0] = self._output[0][done:]
            else:
                self._output.popleft()
        watched = 1 in self._selector.get_map()
        if self._output and not watched:
            self._selector.register(1, selectors.EVENT_WRITE, self._write)
        elif watched and not self._output:
            self._selector.unregister(1)


def log(message: str) -> None:
    """To ExaBGP's standard error, which is the speaker's."""
    sys.stderr.write(f"relay: {message}\n")
    sys.stderr.flush()
