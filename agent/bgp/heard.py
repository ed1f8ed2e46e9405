"""What a peer told in one session, for one that cannot be asked again (no RFC 2918). Pure; standard library only.

ExaBGP's lines are kept as they came, and only as long as a prefix stands in them. ExaBGP's own Adj-RIB-In would not do:
of two next hops it keeps the link-local one (exabgp.md, fault 14), and it costs a copy of every peer's routes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

#: Bytes of lines that are kept for one peer: some 100,000 routes with shared attributes.
LIMIT = 32 << 20


class Heard:
    """``whole`` is False once there was more than ``limit`` bytes, or what is no UPDATE: then nothing is kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._number = 0
        #: Line by number, in the order in which they came, and how many prefixes stand in it.
        self._lines: dict[int, bytes] = {}
        self._standing: Counter[int] = Counter()
        self._where: dict[tuple[str, str], int] = {}
        self.whole = True

    def take(self, line: bytes) -> None:
        """One ``update`` line of ExaBGP: an UPDATE or an End-of-RIB. Raises nothing."""
        if not self.whole:
            return
        try:
            message = json.loads(line)["neighbor"]["message"]
            if "eor" in message:
                return
            update = message["update"]
            gone = [(f, route["nlri"]) for f, routes in update.get("withdraw", {}).items() for route in routes]
            told = {(family, nlri) for family, nlri, _ in _announced(update)}
        except (ValueError, KeyError, TypeError, AttributeError):
            self._give_up()
            return
        for key in (*gone, *told):
            self._forget(key)
        if told:
            self._number += 1
            self._lines[self._number] = line
            self._standing[self._number] = len(told)
            self._bytes += len(line)
            self._where.update(dict.fromkeys(told, self._number))
        if self._bytes > self._limit:
            self._give_up()

    def again(self) -> Iterator[bytes]:
        """All that stands, as lines of ExaBGP, each prefix once. Lines may be taken in between: what they say is not
        said here any more."""
        for number in list(self._lines):
            line = self._lines.get(number)
            if line is not None:
                yield self._rest(number, line)

    def _rest(self, number: int, line: bytes) -> bytes:
        """The line without what was withdrawn or told anew since."""
        whole = json.loads(line)
        update = whole["neighbor"]["message"]["update"]
        update.pop("withdraw", None)
        kept: dict[str, dict[str, list[Any]]] = {}
        for family, nlri, hop in _announced(update):
            if self._where.get((family, nlri)) == number:
                kept.setdefault(family, {}).setdefault(hop, []).append({"nlri": nlri})
        update["announce"] = kept
        return json.dumps(whole).encode()

    def _forget(self, key: tuple[str, str]) -> None:
        number = self._where.pop(key, None)
        if number is None:
            return
        self._standing[number] -= 1
        if not self._standing[number]:
            del self._standing[number]
            self._bytes -= len(self._lines.pop(number))

    def _give_up(self) -> None:
        self.whole = False
        self._lines, self._standing, self._where, self._bytes = {}, Counter(), {}, 0


def _announced(update: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Family, prefix and next hop of all that it announces; a prefix comes once for each next hop."""
    for family, hops in update.get("announce", {}).items():
        for hop, routes in hops.items():
            for route in routes:
                yield family, route["nlri"], hop
