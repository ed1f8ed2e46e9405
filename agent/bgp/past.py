"""What became of each peer's sessions: the last changes, with what the two ends said of them. Pure; standard library
only: the relay keeps it, as it outlives the agent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

#: Changes remembered for each peer.
KEPT = 16
#: Hexadecimal digits of a NOTIFICATION's data that are kept: all of a shutdown communication (RFC 9003).
DATA = 1100

#: A change as it goes to the agent: ``state`` (``up``, ``down``, or ``failed``: a connection that never became a
#: session), ``generation``, ``reason`` in ExaBGP's words, ``notification`` or None, and when: from ``at`` to ``last``,
#: in seconds since 1970, ``times`` times the same.
Change = dict[str, Any]


class Past:
    """Owns no clock: what needs the time is given it, in seconds since 1970."""

    def __init__(self) -> None:
        self._changes: dict[str, deque[Change]] = {}
        self._notified: dict[str, dict[str, object]] = {}

    def connected(self, address: str) -> None:
        """What is said from here on is said in a new connection."""
        self._notified.pop(address, None)

    def notified(self, address: str, direction: str, said: dict[str, Any]) -> None:
        """A NOTIFICATION (RFC 4271, 4.5) as ExaBGP tells it; ``direction`` is ``send`` or ``receive``."""
        self._notified[address] = {
            "direction": direction,
            "code": int(said["code"]),
            "subcode": int(said["subcode"]),
            "data": str(said["data"])[:DATA],
        }

    def up(self, address: str, generation: int, now: int) -> Change:
        return self._add(address, generation, "up", "", None, now)

    def down(self, address: str, generation: int, reason: str, now: int, *, was_up: bool) -> Change:
        """A session ended, or a connection did that never was one; of failures in a row, equal ones are one."""
        notification = self._notified.pop(address, None)
        return self._add(address, generation, "down" if was_up else "failed", reason, notification, now)

    def told(self) -> dict[str, list[Change]]:
        """Peer -> its changes, oldest first."""
        return {address: list(changes) for address, changes in self._changes.items()}

    def forget(self, keep: Iterable[str]) -> None:
        """Drops all peers but these."""
        keep = set(keep)
        for address in [a for a in self._changes if a not in keep]:
            del self._changes[address]

    def _add(self, address: str, generation: int, state: str, reason: str, notification: Any, now: int) -> Change:
        changes = self._changes.setdefault(address, deque(maxlen=KEPT))
        what = {"state": state, "reason": reason, "notification": notification}
        change = {**what, "generation": generation, "at": now, "last": now, "times": 1}
        for known in takewhile(lambda c: state == c["state"] == "failed", reversed(changes)):
            if what.items() <= known.items():
                changes.remove(known)
                change = {**known, "last": now, "times": known["times"] + 1}
                break
        changes.append(change)
        return change
