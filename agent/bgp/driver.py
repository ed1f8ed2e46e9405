"""The agent's side of the speaker: whole wanted sets in, events and one state out.

The driver writes ExaBGP's configuration and talks to the relay over relay.sock; it owns no session. It may come and
go: the relay keeps sessions, table and End-of-RIB (R14), and tells everything again to a driver that connects.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from agent.bgp import conf, speaker, wire
from agent.bgp import notification as notifications
from agent.bgp.events import Decoder, Problem
from agent.bgp.model import (
    Announcement,
    Capabilities,
    Change,
    EndOfRib,
    Event,
    Resync,
    Session,
    SessionChanges,
    SessionDown,
    SessionUp,
    SpeakerLost,
    SpeakerState,
)
from store.clock import Clock

_log = logging.getLogger(__name__)

#: Seconds between attempts to reach the relay.
RETRY = 0.2
#: Seconds for `exabgp validate`, and for the relay to say that a configuration is loaded.
VALIDATE_TIME, LOAD_TIME = 20.0, 60.0
#: Seconds between attempts to put a configuration in place that the disk or the speaker did not take.
RETRY_CONF = 5.0
#: Lines of the relay that are handled in one go.
BURST = 64
#: Seconds for which the time of a withdrawal is remembered.
REMEMBER = 120.0

Validate = Callable[[Path], Awaitable[str]]


class DriverError(Exception):
    """The relay is not what this driver can work with; the message says what to do."""


class Driver:
    """``folder`` is run/speaker; ``sink`` is called in the event loop for each event, in the order in which the speaker
    saw them; ``relay_options`` are handed to the relay (see relay.py). ``changed`` is set whenever ``state()`` moved;
    who waits on it clears it."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        sink: Callable[[Event], None],
        *,
        relay_options: Sequence[str] = (),
        validate: Validate | None = None,
    ) -> None:
        self._folder, self._clock, self._sink = folder, clock, sink
        self._options = tuple(relay_options)
        self._validate = validate or exabgp_validate
        self.changed = asyncio.Event()
        self._decoder = Decoder()
        self._writer: asyncio.StreamWriter | None = None
        self._sessions: dict[str, Session] | None = None
        self._good: dict[str, Session] = {}
        self._duplicates: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._unsent: dict[tuple[str, str], str] = {}
        self._reconfigure = asyncio.Event()
        self._loaded = False
        self._rows: list[list[object]] | None = None
        #: The pairs of these rows, or before there are any of the relay's own table.
        self._pairs: frozenset[tuple[str, str]] = frozenset()
        self._table = 0
        self._mark: str | None = None
        self._marked = asyncio.Event()
        self._known = False
        #: How often the relay was reached.
        self.connections = 0
        self._generations: dict[str, int] = {}
        self._held: set[tuple[str, str]] = set()
        self._confirmed: set[tuple[str, str]] = set()
        self._withdrawn_at: dict[str, float] = {}
        #: Table generation -> pairs of the table before: the relay may announce them until it took this one.
        self._superseded: dict[int, frozenset[tuple[str, str]]] = {}
        self._confirmed_at: dict[tuple[str, str], float] = {}
        #: Pair -> generation of the table that says something new of it, which the relay has not taken yet.
        self._new: dict[tuple[str, str], int] = {}

    # -- what is wanted -------------------------------------------------------------------------------------------

    def set_sessions(self, sessions: frozenset[Session]) -> None:
        """The whole set of sessions wanted. Two with one address: the first by name is taken, the other refused."""
        chosen: dict[str, Session] = {}
        duplicates: dict[str, str] = {}
        for session in sorted(sessions):
            if session.address in chosen:
                used = chosen[session.address].name
                duplicates[session.address] = f"{session.name} has the address of {used}, which is used: remove one"
            else:
                chosen[session.address] = session
        if chosen != self._sessions or duplicates != self._duplicates:
            self._sessions, self._duplicates = chosen, duplicates
            self._reconfigure.set()

    def set_announcements(self, announcements: frozenset[Announcement]) -> None:
        """The whole set of prefixes wanted at peers. What cannot be said to ExaBGP is left out and named in
        ``SpeakerState.unsendable``."""
        rows: list[list[object]] = []
        unsent: dict[tuple[str, str], str] = {}
        for a in sorted(announcements, key=lambda a: (a.peer, a.prefix)):
            problem = _unsendable(a)
            if problem:
                unsent[a.peer, a.prefix] = problem
                continue
            row: list[object] = [a.peer, a.prefix, a.next_hop, a.med]
            row += [sorted(a.communities), sorted(a.large_communities)]
            rows.append([*row, list(a.as_path)] if a.as_path else row)
        if rows == self._rows and unsent == self._unsent:
            return
        old = {(str(row[0]), str(row[1])): row for row in self._rows or ()}
        first, self._rows, self._unsent = self._rows is None, rows, unsent
        self._pairs = frozenset((str(row[0]), str(row[1])) for row in rows)
        self._send_table(frozenset(old))
        for row in rows if not first else ():
            pair = (str(row[0]), str(row[1]))
            if old.get(pair) != row:
                self._new[pair] = self._table
                self._confirmed_at.pop(pair, None)
        self.changed.set()

    def state(self) -> SpeakerState:
        asked = self._good if self._sessions is None else self._sessions
        return SpeakerState(
            known=self._known,
            sent=frozenset(self._held).union(
                pair for pairs in self._superseded.values() for pair in pairs if pair[0] in self._generations
            ),
            confirmed=frozenset(self._confirmed),
            table=self._pairs if self._known else frozenset(),
            confirmed_at=dict(self._confirmed_at),
            withdrawn_at=dict(self._withdrawn_at),
            refused={**self._refused, **{a: p for a, p in self._duplicates.items() if a not in self._refused}},
            unsendable=dict(self._unsent),
            sessions=frozenset(asked.values()),
            inherited=self._sessions is None,
        )

    @property
    def configured(self) -> bool:
        """Whether ExaBGP runs with the sessions that were set last, as far as they are usable."""
        return self._known and self._sessions is not None and self._loaded and not self._reconfigure.is_set()

    # -- running --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves until cancelled. A speaker that is away is waited for, and given what was set meanwhile."""
        self._good = _load_sessions(self._folder)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._talk(), name="bgp-talk")
            tasks.create_task(self._configure(), name="bgp-configure")

    async def _talk(self) -> None:
        said = ""
        while True:
            try:
                await self._converse()
                problem = "the relay closed the connection"
            except (OSError, ValueError, KeyError, TypeError, DriverError, msgspec.MsgspecError) as e:
                problem = f"{type(e).__name__}: {e}"
            if self._known:
                self._lost(problem)
            elif problem != said:
                _log.info("no speaker at %s (%s): waiting", self._folder / "relay.sock", problem)
            said = problem
            await self._clock.sleep(RETRY)

    async def _converse(self) -> None:
        path = str(self._folder / "relay.sock")
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_unix_connection(path, limit=wire.MAX_LINE)
        try:
            self._writer = writer
            self._request({"do": "hello", "version": wire.VERSION})
            expected = 0
            while line := await reader.readline():
                if expected % BURST == 0:
                    await asyncio.sleep(0)  # readline does not give way while it has lines at hand
                if not line.endswith(b"\n"):
                    return
                number, kind, payload = line.rstrip(b"\n").split(b" ", 2)
                if int(number) != expected:
                    raise DriverError(f"line {expected} of the relay is missing (got {int(number)}): connecting again")
                expected += 1
                self._heard(kind.decode(), payload)
        finally:
            self._writer = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, request: dict[str, object]) -> None:
        # Without drain: requests are few, a table replaces the one before, and the relay always reads.
        if self._writer is not None:
            self._writer.write(wire.pack(request) + b"\n")

    def _send_table(self, before: frozenset[tuple[str, str]]) -> None:
        if self._known and self._rows is not None:
            self._table += 1
            self._superseded[self._table] = before
            self._request({"do": "table", "generation": self._table, "routes": self._rows})

    def _lost(self, reason: str) -> None:
        _log.warning("the speaker is gone: %s", reason)
        self._known, self._mark, self._loaded = False, None, False
        self._held, self._confirmed, self._superseded = set(), set(), {}
        self._confirmed_at, self._new = {}, {}
        self._generations = {}
        self._sink(SpeakerLost(reason=reason))
        self.changed.set()
        self._marked.set()

    # -- what the relay says --------------------------------------------------------------------------------------

    def _heard(self, kind: str, payload: bytes) -> None:
        if kind == wire.KIND_UPDATE:
            self._update(payload)
            return
        told = json.loads(payload)
        match kind:
            case wire.KIND_HELLO:
                self._hello(told)
            case wire.KIND_UP:
                self._came_up(told["peer"], told)
            case wire.KIND_DOWN:
                self._ended(told["peer"], told)
            case wire.KIND_RESYNC | wire.KIND_END:
                event = Resync if kind == wire.KIND_RESYNC else EndOfRib
                self._sink(event(peer=told["peer"], generation=told["generation"], family=told["family"]))
            case wire.KIND_SENT:
                for prefix, state in told["states"].items():
                    self._sent(told["peer"], prefix, state)
            case wire.KIND_REFUSED:
                for prefix in told["prefixes"]:
                    self._unsent[(told["peer"], prefix)] = "ExaBGP refused it: see exabgp.log"
            case wire.KIND_TABLE:
                self._superseded = {g: p for g, p in self._superseded.items() if g > told["generation"]}
                self._new = {pair: g for pair, g in self._new.items() if g > told["generation"]}
                if told["problem"]:
                    _log.warning("%s", told["problem"])
            case wire.KIND_CONF:
                self._mark = told["mark"] if not told["problem"] else None
                if told["problem"]:
                    _log.warning("configuration %s: %s", told["mark"], told["problem"])
                self._marked.set()
            case wire.KIND_ERROR:
                _log.error("the relay refused a request: %s", told["problem"])
            case _:
                raise DriverError(f"the relay said {kind!r}, which this agent does not know: upgrade the agent")
        self.changed.set()

    def _hello(self, told: dict[str, Any]) -> None:
        if told["version"] != wire.VERSION:
            raise DriverError(
                f"the relay speaks version {told['version']}, this agent {wire.VERSION}: restart the speaker"
            )
        self._known = True
        self.connections += 1
        self._mark = told["mark"]
        self._table = max(self._table, told["table"] or 0)
        self._held = {(peer, prefix) for peer, prefix in told["held"]}
        self._confirmed = {(peer, prefix) for peer, prefix in told["confirmed"]}
        self._confirmed_at = dict.fromkeys(self._confirmed, self._clock.monotonic())
        # After an overflow this is said again: sessions that went meanwhile are down, those that stayed say nothing.
        for peer, generation in list(self._generations.items()):
            if peer not in told["peers"]:
                self._down(peer, generation, "went down while the agent was behind")
        for peer, about in told["peers"].items():
            if self._generations.get(peer) != about["generation"]:
                self._up(peer, about)
        for peer, changes in told.get("history", {}).items():  # an older relay keeps none
            self._sink(SessionChanges(peer=peer, changes=tuple(map(_change, changes))))
        before = frozenset((peer, prefix) for peer, prefix in told["wanted"])
        if self._rows is None:
            self._pairs = before
        self._send_table(before)
        self._reconfigure.set()

    def _up(self, peer: str, about: dict[str, Any]) -> None:
        self._generations[peer] = about["generation"]
        self._sink(
            SessionUp(
                peer=peer,
                generation=about["generation"],
                families=tuple(about["families"]),
                graceful_restart=tuple(about["graceful"]),
                restart_time=about["restart_time"],
                helper=about["helper"],
                capabilities=_capabilities(about),
            )
        )

    def _came_up(self, peer: str, told: dict[str, Any]) -> None:
        self._up(peer, told)
        self._changed_now(peer, told, "up", told["generation"])

    def _ended(self, peer: str, told: dict[str, Any]) -> None:
        """A session, or a connection that never was one (which an older relay does not tell)."""
        generation, reason = told["generation"], told["reason"]
        if peer in self._generations:
            notification = notifications.read(told.get("change", {}).get("notification"), reason)
            self._down(peer, generation, notifications.reason_in_words(reason, notification))
        self._changed_now(peer, told, "down", generation)

    def _changed_now(self, peer: str, told: dict[str, Any], state: Literal["up", "down"], generation: int) -> None:
        if "change" in told:
            change = _change(told["change"])
        else:
            now, reason = int(datetime.fromisoformat(self._clock.now()).timestamp()), told.get("reason", "")
            said = notifications.read(None, reason)
            change = Change(state=state, generation=generation, at=now, last=now, reason=reason, notification=said)
        self._sink(SessionChanges(peer=peer, changes=(change,)))

    def _down(self, peer: str, generation: int, reason: str) -> None:
        self._generations.pop(peer, None)
        for prefix in [prefix for held, prefix in self._held if held == peer]:
            self._sent(peer, prefix, "gone")
        self._sink(SessionDown(peer=peer, generation=generation, reason=reason))

    def _update(self, payload: bytes) -> None:
        generation, _, line = payload.partition(b" ")
        event = self._decoder.update(int(generation), line)
        if isinstance(event, Problem):
            _log.error("an UPDATE was not understood and is left out: %s: %s", event.reason, event.line)
        elif event is not None:
            self._sink(event)

    def _sent(self, peer: str, prefix: str, state: str) -> None:
        pair = (peer, prefix)
        self._confirmed_at.pop(pair, None)
        if state == "gone":
            self._held.discard(pair)
            self._confirmed.discard(pair)
            if not any(p == prefix for _, p in self._held):
                now = self._clock.monotonic()
                self._withdrawn_at = {p: t for p, t in self._withdrawn_at.items() if now - t < REMEMBER}
                self._withdrawn_at[prefix] = now
            return
        self._held.add(pair)
        self._withdrawn_at.pop(prefix, None)
        if state == "confirmed":
            self._confirmed.add(pair)
            if pair not in self._new:  # else it is of the announcement before
                self._confirmed_at[pair] = self._clock.monotonic()
        else:
            self._confirmed.discard(pair)

    # -- configuration --------------------------------------------------------------------------------------------

    async def _configure(self) -> None:
        while True:
            await self._reconfigure.wait()
            self._reconfigure.clear()
            self._loaded = False
            if self._sessions is None:
                continue
            try:
                await self._put_in_place(self._sessions)
                self._loaded = self._known
                self.changed.set()
            except (OSError, TimeoutError, DriverError, speaker.SpeakerError) as e:
                _log.warning("the speaker's configuration is not in place (%s): trying again", e)
                await self._clock.sleep(RETRY_CONF)
                self._reconfigure.set()

    async def _put_in_place(self, wanted: dict[str, Session]) -> None:
        command = speaker.relay_command(self._folder, *self._options)
        path = speaker.prepare(self._folder, *self._options)
        usable, refused = self._usable(wanted)
        if path.read_text() != conf.render(usable.values(), command):
            # Validated before it has its name (fault 3): a file that ExaBGP cannot read breaks it for good.
            if await self._problem(usable, command):
                await self._alone(usable, refused, command)
                problem = await self._problem(usable, command)
                if problem:
                    raise DriverError(f"ExaBGP refuses sessions together that it takes alone: {problem}")
            temporary = self._folder / "exabgp.conf.new"
            _write(temporary, conf.render(usable.values(), command).encode())
            temporary.replace(path)
            _write(self._folder / "sessions.json", msgspec.json.encode(sorted(usable.values())))
        self._good = usable
        if refused != self._refused:
            self._refused = refused
            self.changed.set()
        await self._load(conf.mark(usable.values(), command))

    async def _load(self, mark: str) -> None:
        """Has the relay reload until what runs is what lies on disk. Without a relay: ExaBGP reads it as it starts."""
        if not self._known or self._mark == mark:
            return
        self._marked.clear()
        self._request({"do": "reload", "mark": mark})
        async with asyncio.timeout(LOAD_TIME):
            await self._marked.wait()
        if self._known and self._mark != mark:
            raise DriverError("ExaBGP did not load it")

    def _usable(self, wanted: dict[str, Session]) -> tuple[dict[str, Session], dict[str, str]]:
        """Which sessions can go into the file, and why others cannot. A bad one keeps its last good form (R13)."""
        usable: dict[str, Session] = {}
        refused: dict[str, str] = {}
        for address, session in wanted.items():
            problem = conf.problem(session)
            if problem:
                refused[address] = problem
            chosen = self._last_good(session) if problem else session
            if chosen is not None:
                usable[address] = chosen
        return usable, refused

    def _last_good(self, session: Session) -> Session | None:
        """What this peer had last; never one without a password where one is asked for (R13)."""
        last = self._good.get(session.address)
        return None if last is not None and session.secret and not last.password else last

    async def _alone(self, usable: dict[str, Session], refused: dict[str, str], command: Sequence[str]) -> None:
        """ExaBGP sees something wrong that we do not: shows it each session alone, to find whose it is."""
        for address, session in list(usable.items()):
            problem = await self._problem({address: session}, command)
            if not problem:
                continue
            refused[address] = problem
            last = self._last_good(session)
            if last is None or last == session or await self._problem({address: last}, command):
                del usable[address]
            else:
                usable[address] = last

    async def _problem(self, sessions: dict[str, Session], command: Sequence[str]) -> str:
        temporary = self._folder / "exabgp.conf.check"
        _write(temporary, conf.render(sessions.values(), command).encode())
        try:
            problem = await self._validate(temporary)
            for session in sessions.values():
                if session.password:  # what ExaBGP says may repeat the line, and people see it
                    problem = problem.replace(session.password, "(not shown)")
            return problem
        finally:
            temporary.unlink(missing_ok=True)


async def exabgp_validate(path: Path) -> str:
    """What ``exabgp validate`` says against this file; empty if nothing. Raises TimeoutError, OSError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "exabgp", "validate", str(path)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=speaker.environment(path.parent, os.environ) | {"exabgp.log.destination": "stdout"},
    )
    try:
        async with asyncio.timeout(VALIDATE_TIME):
            printed, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in printed.decode("utf-8", "replace").splitlines() if line.strip()]
    return "; ".join(lines[-6:]) or f"exabgp validate ended with {process.returncode}"


def _change(told: dict[str, Any]) -> Change:
    """As the relay tells it (``agent.bgp.past``). Raises KeyError, TypeError, ValueError."""
    return Change(
        state=told["state"],
        generation=told["generation"],
        at=told["at"],
        last=told["last"],
        times=told["times"],
        reason=told["reason"],
        notification=notifications.read(told["notification"], told["reason"]),
    )


def _capabilities(about: dict[str, Any]) -> Capabilities | None:
    """None from a relay that is older and does not say."""
    if "asn4" not in about:
        return None
    return Capabilities(
        refresh=about["refresh"],
        enhanced=about["enhanced"],
        asn4=about["asn4"],
        extended_next_hop=tuple(about["extended_next_hop"]),
        hold_time=about["hold_time"],
        router_id=about["router_id"],
    )


def _unsendable(announcement: Announcement) -> str:
    """Why ExaBGP would not send this, or would send something else (faults 13, 15)."""
    try:
        prefix = ipaddress.ip_network(announcement.prefix)
        hop = ipaddress.ip_address(announcement.next_hop)
    except ValueError as e:
        return f"{e}: write a network and an explicit next hop address"
    if prefix.version != hop.version:
        return f"next hop {hop} is not of the family of {prefix}: give one that is"
    if str(prefix) != announcement.prefix:
        return f"{announcement.prefix} is not in canonical form: write {prefix}"
    return ""


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)


def _load_sessions(folder: Path) -> dict[str, Session]:
    """The sessions that were put in place last, by this driver or one before: the last good ones (R13)."""
    try:
        sessions = msgspec.json.decode((folder / "sessions.json").read_bytes(), type=list[Session])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as e:
        _log.warning("%s cannot be read (%s): no session has a last good form", folder / "sessions.json", e)
        return {}
    return {s.address: s for s in sessions}
