"""What became of each peer's sessions, as the relay and events tell it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agent.bgp.model import Change, SessionChanges
from agent.bgp.notification import reason_in_words

#: Changes kept for each peer; the relay keeps as many.
KEPT: Final = 16
#: Seconds for which what an end said explains failures that come after it without a word.
_EXPLAINS: Final = 60


class History:
    """The last changes of each peer, oldest first. What the relay tells again after a restart is taken once."""

    def __init__(self) -> None:
        self._changes: dict[str, tuple[Change, ...]] = {}

    def take(self, event: SessionChanges) -> bool:
        """Whether that is news: more than one more failure like the last ones."""
        before = {_key(c): c for c in self._changes.get(event.peer, ())}
        told = {_key(c): c for c in event.changes}
        merged = sorted({**before, **told}.values(), key=lambda c: (c.last, c.generation, c.state != "up"))
        self._changes[event.peer] = tuple(merged[-KEPT:])
        return not told.keys() <= before.keys()

    def of(self, peer: str) -> tuple[Change, ...]:
        return self._changes.get(peer, ())

    def last_said(self, peer: str) -> Change | None:
        """The last change with a NOTIFICATION, of either end."""
        return next((c for c in reversed(self.of(peer)) if c.notification), None)

    def why_down(self, peer: str) -> str:
        """In words, why the peer has no session; "" if it has one, or nothing was heard of it."""
        changes = self.of(peer)
        if not changes or changes[-1].state == "up":
            return ""
        last, said = changes[-1], self.last_said(peer)
        # Between what it says a router may close connections without a word.
        chosen = said if said and said.last >= last.last - _EXPLAINS else last
        return reason_in_words(chosen.reason, chosen.notification)

    def keep(self, peers: Iterable[str]) -> None:
        """Forgets all others."""
        keep = set(peers)
        self._changes = {peer: changes for peer, changes in self._changes.items() if peer in keep}


def _key(change: Change) -> tuple[object, ...]:
    return change.at, change.state, change.generation, change.reason, change.notification
