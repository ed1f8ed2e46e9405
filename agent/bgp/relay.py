"""The relay: ExaBGP's helper process, which outlives the agent and remembers what is announced (R14).

ExaBGP runs it as ``python -ISEs relay.py FOLDER CONFIGURATION``: no site packages, standard library only, so that it
starts in 40 ms and cannot be broken by an installation. ``helper`` is its side to ExaBGP, ``link`` its side to the
agent, ``ledger`` what it says to whom, ``table`` what it keeps on disk. It ends when ExaBGP closes its input.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The folder that holds the packages goes to the end: nothing in it may stand before the standard library.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from agent.bgp import table as tables
from agent.bgp import wire
from agent.bgp.heard import LIMIT, Heard
from agent.bgp.helper import Speaker, log
from agent.bgp.ledger import Command, Ledger
from agent.bgp.link import Link
from agent.bgp.past import Past
from agent.bgp.stuck import Stuck

#: Seconds between looks at what is late while something is on its way, and while nothing is.
TICK, REST = 0.05, 1.0
#: Seconds for which a command may stay unanswered.
PATIENCE = 60.0
#: Seconds for one reload to be confirmed, and how many are tried before ExaBGP is restarted (fault 2, fault 3).
RELOAD_TIME, RELOADS = 3.0, 5
#: Seconds that a reload waits for what is on its way, and after which a peer that takes nothing of it is left.
RELOAD_WAIT, RELOAD_STUCK = 10.0, 5.0
#: Seconds without an UPDATE after which a peer that neither brackets its route refresh nor said an End-of-RIB is taken
#: to be through.
QUIET = 2.0
#: Lines of a peer without route refresh that are told again in one turn: ExaBGP must not wait long to be read.
RETELL = 500
#: Why ExaBGP says that a session went down when it shuts down itself (5.0.15, Peer.shutdown).
SHUTS_DOWN = "stop, message [shutting down]"


@dataclass(eq=False)
class Session:
    """A session that is up."""

    generation: int
    peering: wire.Peering
    #: Families that are told again.
    resyncing: dict[str, Resync] = field(default_factory=dict)
    #: What a peer told that cannot be asked, and what is left to tell of it again.
    heard: Heard | None = None
    retelling: Iterator[bytes] | None = None
    #: Families whose End-of-RIB came, and those in which the peer said anything else.
    ended: set[str] = field(default_factory=set)
    spoken: set[str] = field(default_factory=set)

    def all_told(self, family: str) -> bool:
        """Whether the agent has heard all that the peer ever said, whatever it answers to a route refresh: an ExaBGP
        that has nothing in a family answers nothing at all."""
        return family in self.ended and (self.heard is not None or family not in self.spoken)

    def began(self, family: str) -> bool:
        """Whether the peer told all that it begins with. One that says End-of-RIBs (RFC 4724) and did not say this one
        yet may wait for its own table, as an ExaBGP beside a relay that has just started: that answers a route refresh
        with nothing, and tells its routes then."""
        return family in self.ended or not self.peering.helper


@dataclass(eq=False)
class Resync:
    """A family that a peer tells again. Its end counts only if its beginning came after the agent heard of it: an
    earlier request may still be on its way through. ``answered``: it ended, or the peer has nothing to say."""

    since: float
    heard: float
    begun: bool = False
    answered: bool = False


@dataclass(eq=False)
class Reload:
    """A configuration that ExaBGP is to load: its mark, and how far that is."""

    mark: str
    since: float
    tries: int = 0
    signalled: float = 0
    asked: bool = False


class Relay:
    def __init__(
        self,
        folder: Path,
        configuration: Path,
        *,
        buffer: int,
        assert_every: float,
        watch_every: float,
        silence: float,
        heard: int,
        send_hold: float,
    ) -> None:
        self._folder, self._configuration = folder, configuration
        self._assert_every, self._watch_every, self._silence = assert_every, watch_every, silence
        self._heard_limit, self._send_hold = heard, send_hold
        self._selector = selectors.DefaultSelector()
        self._speaker = Speaker(self._selector, self._event)
        self._agent = Link(self._selector, buffer, greet=self._greet, request=self._request, left=self._left)
        self._ledger = Ledger()
        self._past = Past()
        self._stuck = Stuck()
        self._table: tables.Table | None = None
        self._problem = ""
        self._sessions: dict[str, Session] = {}
        self._opens: dict[str, dict[str, Any]] = {}
        self._base = int(time.monotonic() * 1000)
        self._loaded: str | None = None
        self._reload: Reload | None = None
        self._watch_at = self._assert_at = self._worked_at = time.monotonic()
        self._missed = 0
        self._flush_due = False

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self._speaker.start(self._folder)
        try:
            self._table = tables.load(self._table_path)
            if self._table is not None:
                self._ledger.want(self._table.routes, self._table.retired)
            else:
                self._problem = "no table was ever given: no End-of-RIB is sent"
        except tables.TableError as e:
            self._problem = str(e)
        if self._problem:
            log(self._problem)
        self._agent.listen(self._folder / "relay.sock")
        self._ask_loaded()
        self._assert_at = time.monotonic() + self._assert_every
        rest = min(REST, self._watch_every, self._assert_every)
        while not self._speaker.ended:
            waiting = self._speaker.unanswered() or self._reload or self._resyncing() or not self._ledger.idle()
            for key, _ in self._selector.select(TICK if waiting else rest):
                key.data()
            self._work()

    @property
    def _table_path(self) -> Path:
        return self._folder / "table.json"

    def _work(self) -> None:
        now = time.monotonic()
        if self._speaker.unanswered() is None:  # or it is ExaBGP that keeps them waiting
            self._stuck.passed(min(now - self._worked_at, REST), self._ledger.waiting())
        self._worked_at = now
        self._leave(self._stuck.longer_than(self._send_hold))
        asked = self._speaker.unanswered()
        if asked is not None and now - asked > PATIENCE:
            self._speaker.restart(f"no answer for {PATIENCE:.0f} s")
        if self._reload is None:
            if now >= self._assert_at:
                self._assert_at = now + self._assert_every
                self._ledger.assert_all()
                self._flush_due = True
            self._tell_peers(now)
            if self._flush_due and self._ledger.idle():
                self._flush_due = False
                self._flush_peers()
        else:
            self._reload_step(now)
        if now >= self._watch_at:
            self._watch_at = now + self._watch_every
            self._watch()
        self._tell_changes()
        for address, session in self._sessions.items():
            if session.heard is not None:
                self._retell(address, session, session.heard)
            for family, resync in list(session.resyncing.items()) if session.retelling is None else ():
                silent = now - resync.heard
                if resync.begun and not resync.answered and silent > self._silence:
                    self._ask_routes(address, session, family)  # it never said the end
                elif not resync.begun and silent > (self._silence if session.peering.enhanced else QUIET):
                    resync.answered = True  # what is withdrawn again leaves an ExaBGP with nothing, too
                late = now - resync.since > max(self._silence, session.peering.restart_time)
                if session.all_told(family) or (resync.answered and (late or session.began(family))):
                    self._resynced(address, session, family)
        self._agent.tend(now)

    # -- ExaBGP ---------------------------------------------------------------------------------------------------

    def _tell_peers(self, now: float) -> None:
        for command in self._ledger.commands(now):
            self._say(command)

    def _flush_peers(self) -> None:
        """Second half of an assertion: ExaBGP sends all it was told, where the peer brackets that (RFC 7313). The peer
        takes what it lacked and drops what was not said again; what it had does not change."""
        for address, session in self._sessions.items():
            if session.peering.enhanced and self._ledger.known:
                self._speaker.say(f"neighbor {address} flush adj-rib out")

    def _say(self, command: Command) -> None:
        def answer(ok: bool, lines: list[str]) -> None:
            if not ok and command.generation >= 0:
                log(f"ExaBGP refused {str(command.line)[:200]!r} {' '.join(lines)[:200]}")
            self._ledger.answered(command, ok, time.monotonic())

        self._speaker.say(command.line, answer)

    def _event(self, line: bytes) -> None:
        head = wire.head(line)
        if head is None:
            log(f"a line of ExaBGP was not understood: {line[:200]!r}")
            return
        if head.kind == "update" and head.direction == "receive":
            self._received(head.peer, line)
            return
        try:
            self._told(head, json.loads(line)["neighbor"])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            log(f"a line of ExaBGP was not understood ({e!r}): {line[:200]!r}")

    def _told(self, head: wire.Head, neighbor: dict[str, Any]) -> None:
        match head.kind:
            case "state":
                self._state(head.peer, neighbor.get("state"), neighbor.get("reason", ""))
            case "open":
                self._opens.setdefault(head.peer, {})[head.direction] = neighbor.get("open")
            case "update":
                self._sent(head.peer, neighbor.get("message"))
            case "refresh" if head.direction == "receive":
                self._refresh(head.peer, neighbor["route-refresh"])
            case "notification":
                self._past.notified(head.peer, head.direction, neighbor["notification"])
            case _:
                return

    def _state(self, address: str, state: Any, reason: Any) -> None:
        now = int(time.time())
        match state:
            case "connected":
                self._opens.pop(address, None)
                self._past.connected(address)
                for command in self._ledger.connected(address):
                    self._say(command)
            case "up":
                opens = self._opens.get(address, {})
                peering = wire.peering(opens.get("send"), opens.get("receive"))
                self._base += 1
                self._sessions[address] = Session(
                    self._base, peering, heard=None if peering.refresh else Heard(self._heard_limit)
                )
                if not peering.told:
                    log(f"peer {address} names no family (RFC 4760): ExaBGP announces nothing to it")
                self._ledger.up(address, self._base, peering.told)
                change = self._past.up(address, self._base, now)
                about = self._about(self._sessions[address])
                self._agent.tell(wire.KIND_UP, {"peer": address, **about, "change": change})
            case "down" if reason == SHUTS_DOWN:
                # Its peers did nothing: when it is gone so are we, and the agent keeps their routes meanwhile.
                log(f"ExaBGP shuts down and leaves {address}")
            case "down":
                # It says nothing where it could not make out a message, not even where one begins.
                reason = reason or "the peer said what is no BGP: see exabgp.log"
                session = self._sessions.pop(address, None)
                generation = self._base if session is None else session.generation
                change = self._past.down(address, generation, str(reason), now, was_up=session is not None)
                if session is not None:
                    self._ledger.down(address)
                # Also of a connection that never became a session: the agent shows why.
                about = {"peer": address, "generation": generation, "reason": str(reason)}
                self._agent.tell(wire.KIND_DOWN, {**about, "change": change})

    def _received(self, address: str, line: bytes) -> None:
        session = self._sessions.get(address)
        if session is None:
            return
        if session.heard is not None:
            session.heard.take(line)
        ended = wire.end_of_rib(line)
        if ended:
            session.ended.add(ended)
        else:
            quiet = [family for family in session.peering.families if family not in session.spoken]
            session.spoken.update(family for family in quiet if wire.names(line, family))
        if session.resyncing:
            for resync in session.resyncing.values():
                resync.heard = time.monotonic()
            if ended:
                # The end of the session's first telling, which began before the resynchronisation did: what came
                # before it may never have reached the agent. The end of the second telling is the one that counts.
                return
        self._agent.pass_on(wire.KIND_UPDATE, b"%d %s" % (session.generation, line))

    def _leave(self, stuck: list[str]) -> None:
        for address in stuck:
            log(f"peer {address} takes nothing of what is sent to it (RFC 9687): its session is restarted")
            self._stuck.moved(address)
            self._speaker.say(f"neighbor {address} teardown 4")

    def _sent(self, address: str, message: Any) -> None:
        self._stuck.moved(address)
        if not isinstance(message, dict):
            return
        end = message.get("eor")
        if isinstance(end, dict):
            self._ledger.reported_end(address, f"{end.get('afi')} {end.get('safi')}")
            return
        update = message.get("update") or {}
        announced = [
            route["nlri"]
            for hops in update.get("announce", {}).values()
            for routes in hops.values()
            for route in routes
        ]
        withdrawn = [route["nlri"] for routes in update.get("withdraw", {}).values() for route in routes]
        self._ledger.reported(address, announced, withdrawn)

    # -- watchdog -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Fault 4: peers are configured and ExaBGP runs none of them."""

        def answer(ok: bool, lines: list[str]) -> None:
            running = [line for line in lines if line and not line.startswith("Peer ")]
            self._missed = self._missed + 1 if ok and not running and self._configured() else 0
            if self._missed > 1:
                self._speaker.restart("its peers are configured and it runs none")

        if self._reload is None and self._speaker.unanswered() is None:
            self._speaker.say("show neighbor summary", answer)

    def _configured(self) -> list[str]:
        try:
            return re.findall(r"^neighbor (\S+) \{$", self._configuration.read_text(), re.MULTILINE)
        except OSError:
            return []

    # -- reload ---------------------------------------------------------------------------------------------------

    def _ask_loaded(self) -> None:
        """Which configuration runs: the mark in the descriptions; empty when there is no neighbor."""

        def answer(ok: bool, lines: list[str]) -> None:
            if ok:
                marks = set(re.findall(rf'description "{wire.MARK}([0-9a-f]*)', "\n".join(lines)))
                self._loaded = marks.pop() if len(marks) == 1 else "" if not marks else "mixed"

        self._speaker.say("show neighbor configuration", answer)

    def _reload_step(self, now: float) -> None:
        reload = self._reload
        assert reload is not None
        if self._speaker.unanswered() is not None:
            return
        if not reload.asked:
            reload.asked = True
            self._ask_loaded()
        elif self._loaded == reload.mark:
            self._reload = None
            self._ledger.forget(self._configured())
            self._past.forget(self._configured())
            self._agent.tell(wire.KIND_CONF, {"mark": reload.mark, "problem": ""})
        elif reload.signalled == 0:
            # Nothing may be on its way: ExaBGP would forget the signal without a word (fault 2).
            if reload.tries == 0 and not self._ledger.idle() and now < reload.since + RELOAD_WAIT:
                self._leave(self._stuck.longer_than(RELOAD_STUCK))
                self._tell_peers(now)
                return
            reload.signalled, reload.tries = now, reload.tries + 1
            self._speaker.reload()
        elif now < reload.signalled + RELOAD_TIME:
            self._ask_loaded()
        elif reload.tries < RELOADS:
            reload.signalled = 0
        else:
            self._agent.tell(
                wire.KIND_CONF, {"mark": reload.mark, "problem": f"not loaded in {RELOADS} tries: restarting"}
            )
            self._speaker.restart(f"{RELOADS} reloads were not taken")

    # -- route refresh --------------------------------------------------------------------------------------------

    def _resyncing(self) -> bool:
        return any(session.resyncing for session in self._sessions.values())

    def _resync(self, address: str) -> None:
        """Has a peer tell all its routes again, or tells them itself for one that cannot be asked. Not from ExaBGP's
        Adj-RIB-In: that one keeps only the link-local of two next hops (fault 14), needs a second parser, and costs
        ExaBGP a copy of every route."""
        session = self._sessions[address]
        for family in session.peering.families:
            self._agent.tell(wire.KIND_RESYNC, {"peer": address, "generation": session.generation, "family": family})
            self._ask_routes(address, session, family)
        if session.heard is not None:
            session.retelling = session.heard.again()

    def _retell(self, address: str, session: Session, heard: Heard) -> None:
        """Tells what such a peer told, as fast as the agent reads it."""
        if session.resyncing and not heard.whole:
            # No other way to hear it again. Graceful restart, where there is any, covers it.
            log(f"peer {address} has no route refresh (RFC 2918) and too many routes to keep: its session is restarted")
            session.resyncing, session.retelling = {}, None
            self._speaker.say(f"neighbor {address} teardown 4")
        for _ in range(RETELL):
            if session.retelling is None or not self._agent.room:
                break
            line = next(session.retelling, None)
            if line is None:
                session.retelling = None
            else:
                self._agent.pass_on(wire.KIND_UPDATE, b"%d %s" % (session.generation, line))

    def _ask_routes(self, address: str, session: Session, family: str) -> None:
        now = time.monotonic()
        session.resyncing[family] = Resync(now, now)
        if session.peering.refresh:
            self._speaker.say(f"neighbor {address} announce route-refresh {family}")

    def _refresh(self, address: str, message: dict[str, Any]) -> None:
        """A peer's marks around its answer (RFC 7313)."""
        family = f"{message.get('afi')} {message.get('safi')}"
        session = self._sessions.get(address)
        resync = session.resyncing.get(family) if session is not None else None
        if session is None or resync is None:
            return
        if message.get("subtype") == "begin":
            resync.begun = True
        elif message.get("subtype") == "end" and resync.begun:
            resync.answered = True

    def _resynced(self, address: str, session: Session, family: str) -> None:
        session.resyncing.pop(family, None)
        self._agent.tell(wire.KIND_END, {"peer": address, "generation": session.generation, "family": family})

    # -- the agent ------------------------------------------------------------------------------------------------

    def _request(self, request: dict[str, Any]) -> None:
        match request["do"]:
            case "table":
                try:
                    given = tables.parse(request["generation"], request["routes"])
                except tables.TableError as e:
                    raise ValueError(str(e)) from e
                self._take(given)
            case "reload":
                self._reload = Reload(str(request["mark"]), time.monotonic())
            case "restart":
                self._speaker.restart("the agent asked for it")
            case "resync":
                if request["peer"] in self._sessions:
                    self._resync(request["peer"])
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _left(self) -> None:
        """Nobody waits for routes that are told again."""
        for session in self._sessions.values():
            session.resyncing.clear()
            session.retelling = None

    def _take(self, given: tables.Table) -> None:
        self._ledger.want(given.routes)
        self._table = given._replace(retired=tuple(self._ledger.lingering()))
        try:
            tables.save(self._table_path, self._table)
            self._problem = ""
        except OSError as e:
            # Announced all the same: a full disk must not stop routing; the next table tries again.
            self._problem = f"{self._table_path} cannot be written ({e}): the speaker would restart with an old table"
            log(self._problem)
        self._agent.tell(wire.KIND_TABLE, {"generation": given.generation, "problem": self._problem})

    def _greet(self) -> None:
        """Tells all there is to know, and has every peer tell its routes again."""
        table = None if self._table is None else self._table.generation
        hello = {
            "version": wire.VERSION,
            "mark": self._loaded,
            "table": table,
            "problem": self._problem,
            "peers": {address: self._about(session) for address, session in self._sessions.items()},
            "wanted": self._ledger.wanted(),
            "held": self._ledger.held(),
            "confirmed": self._ledger.confirmed(),
            "history": self._past.told(),
        }
        self._ledger.changes()
        self._agent.tell(wire.KIND_HELLO, hello)
        for address in self._sessions:
            self._resync(address)

    @staticmethod
    def _about(session: Session) -> dict[str, object]:
        agreed = session.peering
        return {
            "generation": session.generation,
            "families": agreed.families,
            "graceful": agreed.graceful,
            "restart_time": agreed.restart_time,
            "helper": agreed.helper,
            "refresh": agreed.refresh,
            "enhanced": agreed.enhanced,
            "asn4": agreed.asn4,
            "extended_next_hop": agreed.extended_next_hop,
            "hold_time": agreed.hold_time,
            "router_id": agreed.router_id,
        }

    def _tell_changes(self) -> None:
        for change in self._ledger.changes():
            if change.states:
                self._agent.tell(wire.KIND_SENT, {"peer": change.peer, "states": change.states})
            if change.refused:
                self._agent.tell(wire.KIND_REFUSED, {"peer": change.peer, "prefixes": change.refused})


def main() -> None:
    parser = argparse.ArgumentParser(description="Relay between ExaBGP and the Underlay agent; run by ExaBGP.")
    parser.add_argument("folder", type=Path, help="where table.json and relay.sock are")
    parser.add_argument("configuration", type=Path, help="ExaBGP's configuration file")
    parser.add_argument("--buffer", type=int, default=32 << 20, help="bytes that the agent may be behind")
    parser.add_argument("--assert-every", type=float, default=300, help="seconds between repetitions of the table")
    parser.add_argument("--watch-every", type=float, default=5, help="seconds between looks at ExaBGP's peers")
    parser.add_argument("--silence", type=float, default=10, help="seconds to wait for the answer to a route refresh")
    parser.add_argument("--heard", type=int, default=LIMIT, help="bytes kept of a peer without route refresh")
    parser.add_argument("--send-hold", type=float, default=60, help="seconds that a peer may take nothing")
    options = parser.parse_args()
    os.umask(0o077)
    # The signals that mean something to ExaBGP may reach its whole group: it speaks to us by closing our input.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    Relay(
        options.folder,
        options.configuration,
        buffer=options.buffer,
        assert_every=options.assert_every,
        watch_every=options.watch_every,
        silence=options.silence,
        heard=options.heard,
        send_hold=options.send_hold,
    ).run()


if __name__ == "__main__":
    main()
