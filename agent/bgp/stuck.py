"""Which peers take nothing of what is on its way to them. Pure; standard library only, for the relay.

A peer that closes its TCP window and says that it lives would stay up for ever: its hold timer runs on what it says.
ExaBGP burns a core meanwhile, no withdrawal to it is ever sent, and every reload is lost (exabgp.md, fault 2). RFC 9687
has a timer for what is sent, too.
"""

from __future__ import annotations

from collections.abc import Iterable


class Stuck:
    """Counts seconds in which the relay itself ran: if it was stopped, no peer is at fault."""

    def __init__(self) -> None:
        self._waiting: dict[str, float] = {}

    def passed(self, seconds: float, waiting: Iterable[str]) -> None:
        """So long went by, and something is on its way to these peers."""
        self._waiting = {address: self._waiting.get(address, 0.0) + seconds for address in waiting}

    def moved(self, address: str) -> None:
        """Something was handed to TCP for it."""
        self._waiting.pop(address, None)

    def longer_than(self, seconds: float) -> list[str]:
        return [address for address, waited in self._waiting.items() if waited > seconds]
