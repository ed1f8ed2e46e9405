"""The relay without one of its cares: what ExaBGP does then is what the care is for (tests/bgp/faults.py).

ExaBGP runs it in the relay's place: ``python -ISEs careless.py FOLDER CONFIGURATION --without CARE``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from agent.bgp import relay, table, wire
from agent.bgp.helper import Speaker, log
from agent.bgp.ledger import Command, Ledger, Peer
from agent.bgp.link import Client, Link
from agent.bgp.table import Routes


def order() -> None:
    """Fault 1: says all changes of a prefix at once, and withdraws without attributes."""
    want = Ledger.want
    said: list[Command] = []

    def say(ledger: Ledger) -> None:
        for peer in ledger._peers.values():
            wanted = (ledger._wanted or {}).get(peer.address, {})
            for prefix in sorted(peer.dirty) if peer.up else ():
                route = f"announce route {prefix} {wanted[prefix]}" if prefix in wanted else f"withdraw route {prefix}"
                said.append(Command(f"neighbor {peer.address} {route}", peer.address, peer.generation))
                peer.told |= {prefix: wanted[prefix]} if prefix in wanted else {}
            peer.dirty.clear()

    def wanting(ledger: Ledger, routes: Routes, retired: Iterable[tuple[str, str]] = ()) -> None:
        want(ledger, routes, retired)
        say(ledger)

    def commands(ledger: Ledger, now: float) -> Iterator[Command]:
        say(ledger)
        said.sort(key=lambda command: command.line.split()[4])
        while said:
            yield said.pop(0)

    Ledger.want, Ledger.commands = wanting, commands  # type: ignore[method-assign]


def confirmation() -> None:
    """Fault 2: tells peers that are down, reloads at once, and believes it."""
    take = relay.Relay._take

    def taking(self: relay.Relay, given: table.Table) -> None:
        take(self, given)
        for peer in self._configured():
            for prefix, attributes in given.routes.get(peer, {}).items() if peer not in self._sessions else ():
                self._speaker.say(f"neighbor {peer} announce route {prefix} {attributes}")

    def step(self: relay.Relay, now: float) -> None:
        assert self._reload is not None
        self._speaker.reload()
        self._agent.tell(wire.KIND_CONF, {"mark": self._reload.mark, "problem": ""})
        self._reload = None

    relay.Relay._take, relay.Relay._reload_step = taking, step  # type: ignore[method-assign]


def farewell() -> None:
    """Fault 3: lets itself be ended by an ExaBGP that runs on."""
    Speaker._catch_sigterm = lambda self: None  # type: ignore[method-assign]


def record() -> None:
    """Faults 4 and 6: does not know that a relay of this ExaBGP died before."""
    start = Speaker.start

    def starting(self: Speaker, folder: Path) -> None:
        (folder / "relay.parent").unlink(missing_ok=True)
        start(self, folder)

    Speaker.start = starting  # type: ignore[method-assign]


def watchdog() -> None:
    """Fault 4: neither that, nor does it do anything about an ExaBGP that runs none of its peers."""
    record()
    Speaker.restart = lambda self, reason: log(f"left alone: {reason}")  # type: ignore[method-assign]


def patience() -> None:
    """Fault 5: waits for an agent that is slow to read."""

    def send(self: Link, client: Client, kind: str, payload: bytes) -> None:
        client.socket.setblocking(True)
        client.socket.sendall(wire.frame(client.number, kind, payload))
        client.number += 1

    Link._send = send  # type: ignore[method-assign]


def _signal(number: signal.Signals) -> None:
    Speaker.reload = lambda self: os.kill(self._parent, number)  # type: ignore[method-assign]


def sighup() -> None:
    """Fault 7: the signal that makes other daemons read their configuration."""
    _signal(signal.SIGHUP)


def sigalrm() -> None:
    """Fault 7: a restart in place of a reload."""
    _signal(signal.SIGALRM)


def repetition() -> None:
    """Fault 8: leaves it to ExaBGP to tell a peer again what it was told."""
    up = Ledger.up

    def upping(self: Ledger, address: str, generation: int, families: Any) -> None:
        up(self, address, generation, families)
        peer: Peer = self._peers[address]
        peer.dirty, peer.again, peer.repeats = set(), set(), set()

    Ledger.up = upping  # type: ignore[method-assign]


def haste() -> None:
    """Fault 11: as on a busy node, has nothing to say before there is a file named ``late`` in its folder."""
    commands, late = Ledger.commands, Path(sys.argv[1]) / "late"

    def waiting(self: Ledger, now: float) -> Iterator[Command]:
        if late.exists():
            yield from commands(self, now)

    Ledger.commands = waiting  # type: ignore[method-assign]


def hops() -> None:
    """Faults 13 and 15: takes any next hop."""
    parse = table.parse

    def parsing(generation: Any, rows: Any) -> table.Table:
        given = parse(generation, [])
        routes: dict[str, dict[str, str]] = {}
        for row in rows:
            routes.setdefault(row[0], {})[row[1]] = table._text(row, row[2], *row[3:6], row[6:])
        return given._replace(routes=routes)

    table.parse = parsing


CARES = (order, confirmation, farewell, record, watchdog, patience, sighup, sigalrm, repetition, haste, hops)

if __name__ == "__main__":
    *sys.argv, option, care = sys.argv
    assert option == "--without"
    {c.__name__: c for c in CARES}[care]()
    relay.main()
