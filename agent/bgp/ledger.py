"""What each peer is to be told, was told, and was reported to have been sent. Pure; standard library only.

ExaBGP reorders what it has not sent yet (exabgp.md, fault 1), and ``done`` means stored, not sent. So a prefix has one
*step* at a time towards one peer: a command, its answer, and the report that the UPDATE went out. The next step of that
prefix waits for the end of the one before; a withdrawal repeats the attributes of the announcement byte for byte. What
is not reported by itself is ended by a *barrier*: an End-of-RIB, which ExaBGP sends after all that was pending.

A peer that is down is told nothing: what is queued for it would make ExaBGP lose every reload (fault 2) until it comes
back. It catches up at ``connected``, before ExaBGP itself repeats from its cache what it was told last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agent.bgp.table import Routes
from agent.bgp.wire import family_of

#: Prefixes in one command: a line of a few kilobytes, of a limit of a megabyte.
BATCH = 200
#: Seconds that a step may wait for its UPDATE to be reported before a barrier ends it.
REPORT_TIME = 0.3
#: Seconds after which a barrier that was not reported is sent again.
BARRIER_TIME = 2.0
#: Withdrawals remembered for each peer, to be repeated by ``assert_all``.
REMEMBERED = 1000

Action = Literal["announce", "withdraw"]
#: Told and perhaps sent; reported as sent; reported withdrawn.
State = Literal["held", "confirmed", "gone"]


@dataclass(eq=False)
class Step:
    """One change on its way to one peer."""

    action: Action
    attributes: str
    before: str | None  # what ExaBGP was told of this prefix before, should it refuse
    answered: bool = False
    reported: bool = False
    since: float = 0.0  # when it was answered


@dataclass(eq=False)
class Command:
    """One line for ExaBGP and what hangs on its answer. ``steps`` is empty for a barrier. ``generation`` is -1 for what
    is said to a peer that is not up yet."""

    line: str
    peer: str
    generation: int
    steps: dict[str, Step] = field(default_factory=dict)


@dataclass(eq=False)
class Change:
    """What changed in what one peer may hold of us: the last state of each prefix, and what ExaBGP refused."""

    peer: str
    states: dict[str, State] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Barrier:
    """An End-of-RIB on its way; when it is reported, every step in ``steps`` has gone out or never will."""

    steps: dict[str, Step]
    whole: bool  # the one after the whole table: what is not in the table is gone from the peer (RFC 4724)
    since: float


@dataclass(eq=False)
class Peer:
    address: str
    up: bool = False
    generation: int = 0
    families: tuple[str, ...] = ()
    #: Prefix -> attributes, as ExaBGP was told them last; it keeps them while the peer is down.
    told: dict[str, str] = field(default_factory=dict)
    #: Prefix -> the last change that ExaBGP may not have read yet, whichever session it was said in, and the attributes
    #: before it (None: nothing is to be said before what is wanted).
    unread: dict[str, tuple[Step, str | None]] = field(default_factory=dict)
    #: Prefixes of which ExaBGP may have queued something since the session went, and those of them that ``connected``
    #: corrected again, with the attributes before: then it has two things in its queue, sent in any order.
    queued: set[str] = field(default_factory=set)
    twice: dict[str, str | None] = field(default_factory=dict)
    #: Prefix -> attributes before, where ExaBGP may have several things to say in this session, in any order: unread at
    #: ``up``, or queued twice. It waits for the End-of-RIB after the whole table.
    unsure: dict[str, str | None] = field(default_factory=dict)
    #: What the peer may hold of us, and that part of it whose present attributes were reported as sent.
    held: set[str] = field(default_factory=set)
    confirmed: set[str] = field(default_factory=set)
    steps: dict[str, Step] = field(default_factory=dict)
    #: Prefixes to look at again, and those to announce even if ExaBGP was told them.
    dirty: set[str] = field(default_factory=set)
    again: set[str] = field(default_factory=set)
    #: Prefixes that ExaBGP repeats in this session, and that were not said in it yet.
    repeats: set[str] = field(default_factory=set)
    #: Prefixes whose batch was refused: one by one, to find the one at fault.
    single: set[str] = field(default_factory=set)
    #: Families whose End-of-RIB after the whole table is due.
    owed: set[str] = field(default_factory=set)
    barriers: dict[str, deque[Barrier]] = field(default_factory=dict)
    #: End-of-RIBs that a session took with it: ExaBGP may send them in the next one.
    stray: dict[str, int] = field(default_factory=dict)
    withdrawn: dict[str, str] = field(default_factory=dict)


class Ledger:
    """Owns no clock: every method that needs the time is given it, in seconds."""

    def __init__(self) -> None:
        self._wanted: Routes | None = None
        self._peers: dict[str, Peer] = {}
        self._changes: dict[str, Change] = {}

    # -- what is wanted -------------------------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """A table was given: only then is an End-of-RIB the truth."""
        return self._wanted is not None

    def want(self, routes: Routes, retired: Iterable[tuple[str, str]] = ()) -> None:
        """Takes the whole table. ``retired``: pairs that a peer may still hold from an earlier life of the speaker."""
        first = self._wanted is None
        before: Mapping[str, Mapping[str, str]] = self._wanted or {}
        self._wanted = routes
        for address, prefix in retired:
            self._peer(address).held.add(prefix)
        for address in {*before, *routes}:
            self._peer(address)
        for peer in self._peers.values():
            old, new = before.get(peer.address, {}), routes.get(peer.address, {})
            peer.dirty.update(p for p in {*old, *new} if old.get(p) != new.get(p))
            if first and peer.up:
                peer.again.update(new)
                peer.dirty.update(new)
                peer.owed.update(peer.families)

    def lingering(self) -> list[tuple[str, str]]:
        """Pairs that some peer may hold although they are not wanted: to be kept on disk with the table."""
        wanted = self._wanted or {}
        return [
            (peer.address, prefix)
            for peer in self._peers.values()
            for prefix in sorted({*peer.held, *peer.told})
            if prefix not in wanted.get(peer.address, {})
        ]

    def forget(self, configured: Iterable[str]) -> None:
        """Drops what is remembered of peers that are neither configured nor wanted."""
        keep = {*configured, *(self._wanted or {})}
        for address in [a for a, peer in self._peers.items() if a not in keep and not peer.up]:
            del self._peers[address]

    # -- what ExaBGP says -----------------------------------------------------------------------------------------

    def connected(self, address: str) -> Iterator[Command]:
        """TCP is there, the OPENs are not: the moment to correct ExaBGP's cache, which it repeats at ``up``."""
        peer = self._peer(address)
        if self._wanted is None or peer.up:
            return
        wanted = self._wanted.get(address, {})
        stale: dict[tuple[Action, str, str], list[str]] = {}
        for prefix, attributes in peer.told.items():
            if prefix not in wanted:
                stale.setdefault(("withdraw", attributes, family_of(prefix)), []).append(prefix)
            elif wanted[prefix] != attributes:
                stale.setdefault(("announce", wanted[prefix], family_of(prefix)), []).append(prefix)
        for (action, attributes, _), prefixes in stale.items():
            steps = {prefix: Step(action, attributes, peer.told.pop(prefix)) for prefix in prefixes}
            for prefix, step in steps.items():
                _say(peer, prefix, step)
                if prefix in peer.queued:
                    peer.twice[prefix] = step.before if action == "announce" else None
                peer.queued.add(prefix)
                if action == "announce":
                    peer.told[prefix] = attributes
                else:
                    _remember(peer, prefix, attributes)
            for line in _lines(address, action, attributes, prefixes):
                yield Command(line, address, -1, {p: steps[p] for p in line.prefixes})

    def up(self, address: str, generation: int, families: Sequence[str]) -> None:
        peer = self._peer(address)
        self._lose(peer)
        peer.up, peer.generation, peer.families = True, generation, tuple(families)
        # What ExaBGP has not read yet comes behind what it repeats.
        unread = {prefix: before for prefix, (_, before) in peer.unread.items()}
        peer.unsure = {p: before for p, before in (peer.twice | unread).items() if family_of(p) in peer.families}
        peer.queued, peer.twice = set(), {}
        wanted = (self._wanted or {}).get(address, {})
        peer.held.update(p for p in (*wanted, *peer.told) if family_of(p) in peer.families)
        peer.again = set(wanted)
        peer.repeats = set(peer.told)
        peer.dirty = {*wanted, *peer.told, *peer.unsure}
        peer.owed = set(families) if self._wanted is not None else set()
        self._change(peer).states.update(dict.fromkeys(peer.held, "held"))

    def down(self, address: str) -> None:
        peer = self._peer(address)
        if peer.up:
            self._lose(peer)
            self._changes.pop(address, None)

    def answered(self, command: Command, ok: bool, now: float) -> None:
        peer = self._peer(command.peer)
        for prefix, step in command.steps.items():
            if prefix in peer.unread and peer.unread[prefix][0] is step:
                del peer.unread[prefix]
        if command.generation != peer.generation or not peer.up:
            return
        for prefix, step in command.steps.items():
            if peer.steps.get(prefix) is not step:
                continue
            if not ok:
                self._refuse(peer, prefix, step, alone=len(command.steps) == 1)
                continue
            step.answered, step.since = True, now
            if step.reported:
                self._end(peer, prefix, step)

    def reported(self, address: str, announced: Iterable[str], withdrawn: Iterable[str]) -> None:
        """ExaBGP handed an UPDATE to TCP."""
        peer = self._peer(address)
        if not peer.up:
            return
        for action, prefixes in (("withdraw", withdrawn), ("announce", announced)):
            for prefix in prefixes:
                step = peer.steps.get(prefix)
                if step is None or step.action != action:
                    self._seen(peer, prefix, action == "announce")
                    continue
                step.reported = True
                if step.answered:
                    self._end(peer, prefix, step)

    def reported_end(self, address: str, family: str) -> None:
        """ExaBGP handed an End-of-RIB to TCP."""
        peer = self._peer(address)
        if not peer.up:
            return
        if peer.stray.get(family, 0) > 0:
            peer.stray[family] -= 1
            return
        waiting = peer.barriers.get(family)
        if not waiting:
            return
        barrier = waiting.popleft()
        for prefix, step in barrier.steps.items():
            if peer.steps.get(prefix) is step and step.answered:
                self._end(peer, prefix, step)
        if barrier.whole:
            for prefix in [p for p in peer.unsure if family_of(p) == family]:
                self._make_sure(peer, prefix)
            mine = {p for p in peer.held if family_of(p) == family}
            self._drop(peer, mine - peer.told.keys() - peer.steps.keys())

    # -- what to say ----------------------------------------------------------------------------------------------

    def commands(self, now: float) -> Iterator[Command]:
        """What can be said now. Each command must be given to ExaBGP in this order and answered by ``answered``."""
        for peer in self._peers.values():
            if peer.up and self._wanted is not None:
                yield from self._changes_for(peer, self._wanted.get(peer.address, {}))
                yield from self._barriers_for(peer, now)

    def assert_all(self) -> None:
        """Has the whole table said again to every peer that is up, and the last withdrawals too: what ExaBGP forgot it
        knows again, and ghosts that it left are withdrawn."""
        for peer in self._peers.values():
            if peer.up and self._wanted is not None:
                wanted = self._wanted.get(peer.address, {})
                peer.again.update(wanted)
                peer.dirty.update(wanted, peer.withdrawn)
                peer.single.clear()

    def idle(self) -> bool:
        """Nothing is on its way to any peer that is up, and nothing is due."""
        return not any(
            peer.steps or peer.owed or peer.dirty or any(peer.barriers.values())
            for peer in self._peers.values()
            if peer.up and self._wanted is not None
        )

    def waiting(self) -> list[str]:
        """Peers to which something is on its way that ExaBGP has read."""
        return [
            address
            for address, peer in self._peers.items()
            if peer.up and (any(peer.barriers.values()) or any(step.answered for step in peer.steps.values()))
        ]

    # -- what may be held -----------------------------------------------------------------------------------------

    def changes(self) -> list[Change]:
        """What changed since the last call, for the agent."""
        found, self._changes = list(self._changes.values()), {}
        return found

    def wanted(self) -> list[tuple[str, str]]:
        return [(address, prefix) for address, routes in (self._wanted or {}).items() for prefix in routes]

    def held(self) -> list[tuple[str, str]]:
        return [(p.address, prefix) for p in self._peers.values() if p.up for prefix in sorted(p.held)]

    def confirmed(self) -> list[tuple[str, str]]:
        return [(p.address, prefix) for p in self._peers.values() if p.up for prefix in sorted(p.confirmed)]

    # -- inside ---------------------------------------------------------------------------------------------------

    def _peer(self, address: str) -> Peer:
        return self._peers.setdefault(address, Peer(address))

    def _change(self, peer: Peer) -> Change:
        return self._changes.setdefault(peer.address, Change(peer.address))

    def _mark(self, peer: Peer, prefix: str, state: State) -> None:
        before: State = "confirmed" if prefix in peer.confirmed else "held" if prefix in peer.held else "gone"
        if state == before:
            return
        (peer.held.discard if state == "gone" else peer.held.add)(prefix)
        (peer.confirmed.add if state == "confirmed" else peer.confirmed.discard)(prefix)
        self._change(peer).states[prefix] = state

    def _lose(self, peer: Peer) -> None:
        """The session is over: what was on its way is void, what the peer held it may hold still."""
        for family, waiting in peer.barriers.items():
            peer.stray[family] = peer.stray.get(family, 0) + len(waiting)
        if peer.up:
            peer.queued = {p for p, step in peer.steps.items() if not step.answered} | peer.unread.keys()
        peer.up = False
        peer.confirmed = set()
        peer.steps, peer.barriers, peer.unsure = {}, {}, {}
        peer.dirty, peer.again, peer.repeats, peer.single, peer.owed = set(), set(), set(), set(), set()

    def _make_sure(self, peer: Peer, prefix: str) -> None:
        """Nothing is on its way any more, and what the peer has is not known. ExaBGP sends nothing that it believes to
        have sent: so the old comes first, if need be, and then the new."""
        old = peer.unsure.pop(prefix)
        if old is not None:
            peer.told[prefix] = old
        peer.repeats.add(prefix)
        peer.again.add(prefix)
        peer.dirty.add(prefix)

    def _changes_for(self, peer: Peer, wanted: Mapping[str, str]) -> Iterator[Command]:
        batches: dict[tuple[Action, str, str, str], dict[str, Step]] = {}
        for prefix in sorted(peer.dirty - peer.steps.keys() - peer.unsure.keys()):
            peer.dirty.discard(prefix)
            again = prefix in peer.again
            peer.again.discard(prefix)
            step = self._step(peer, prefix, wanted.get(prefix), again)
            if step is None:
                continue
            peer.steps[prefix] = step
            _say(peer, prefix, step)
            alone = prefix if prefix in peer.single else ""
            batches.setdefault((step.action, step.attributes, family_of(prefix), alone), {})[prefix] = step
        for (action, attributes, _, _), steps in batches.items():
            for line in _lines(peer.address, action, attributes, list(steps)):
                part = {p: steps[p] for p in line.prefixes}
                yield Command(line, peer.address, peer.generation, part)

    def _step(self, peer: Peer, prefix: str, wanted: str | None, again: bool) -> Step | None:
        told = peer.told.get(prefix)
        if family_of(prefix) not in peer.families:
            return None
        if prefix in peer.repeats:
            # ExaBGP repeats at up what it was told before, and could send that behind what it is told now (fault 1): so
            # that is said first. Until it is sent, a withdrawal would be lost too.
            peer.repeats.discard(prefix)
            if told is not None and wanted != told:
                self._mark(peer, prefix, "held")
                return Step("announce", told, told)
        if wanted is not None and (again or wanted != told):
            if wanted != told or prefix not in peer.confirmed:  # what is only repeated stays confirmed
                self._mark(peer, prefix, "held")
            peer.told[prefix] = wanted
            peer.withdrawn.pop(prefix, None)
            return Step("announce", wanted, told)
        if wanted is None and told is not None:
            del peer.told[prefix]
            self._mark(peer, prefix, "held")
            _remember(peer, prefix, told)
            return Step("withdraw", told, told)
        if wanted is None and prefix in peer.withdrawn:
            return Step("withdraw", peer.withdrawn[prefix], None)
        return None

    def _barriers_for(self, peer: Peer, now: float) -> Iterator[Command]:
        for family in peer.families:
            waiting = peer.barriers.setdefault(family, deque())
            mine = {p: s for p, s in peer.steps.items() if family_of(p) == family}
            whole = family in peer.owed
            late = any(s.answered and now - s.since > REPORT_TIME for s in mine.values())
            lost = bool(waiting) and now - waiting[-1].since > BARRIER_TIME
            if not (whole or (late and not waiting) or lost):
                continue
            if lost:  # it went with a reload, or a stray one was counted that never comes: this one takes its place
                whole = whole or any(b.whole for b in waiting)
                waiting.clear()
                peer.stray.pop(family, None)
            peer.owed.discard(family)
            waiting.append(Barrier(mine, whole, now))
            yield Command(f"neighbor {peer.address} announce eor {family}", peer.address, peer.generation)

    def _end(self, peer: Peer, prefix: str, step: Step) -> None:
        del peer.steps[prefix]
        if step.action == "withdraw":
            self._drop(peer, {prefix})
        elif step.reported:
            self._mark(peer, prefix, "confirmed")
        if (self._wanted or {}).get(peer.address, {}).get(prefix) != peer.told.get(prefix):
            peer.dirty.add(prefix)

    def _seen(self, peer: Peer, prefix: str, announced: bool) -> None:
        """An UPDATE that no step waits for: ExaBGP repeats by itself what it was told (at up, for a route refresh)."""
        if announced:
            settled = prefix in peer.told and prefix not in peer.steps
            self._mark(peer, prefix, "confirmed" if settled else "held")
        elif prefix not in peer.told and prefix not in peer.steps:
            self._drop(peer, {prefix})

    def _drop(self, peer: Peer, prefixes: set[str]) -> None:
        for prefix in prefixes & peer.held:
            self._mark(peer, prefix, "gone")

    def _refuse(self, peer: Peer, prefix: str, step: Step, *, alone: bool) -> None:
        del peer.steps[prefix]
        if step.before is None:
            peer.told.pop(prefix, None)
        else:
            peer.told[prefix] = step.before
        if not alone:
            peer.single.add(prefix)
            peer.dirty.add(prefix)
            return
        if step.before is None and step.action == "announce":
            self._drop(peer, {prefix})
        self._change(peer).refused.append(prefix)


def _say(peer: Peer, prefix: str, step: Step) -> None:
    """Notes it as unread, but for what ExaBGP can have nothing to say before."""
    if step.action == "withdraw":
        peer.unread[prefix] = step, None
    elif step.before not in (None, step.attributes) or prefix in peer.unread:
        peer.unread[prefix] = step, step.before


def _remember(peer: Peer, prefix: str, attributes: str) -> None:
    peer.withdrawn[prefix] = attributes
    while len(peer.withdrawn) > REMEMBERED:
        del peer.withdrawn[next(iter(peer.withdrawn))]


class _Line(str):
    """A command's text, with the prefixes in it."""

    prefixes: list[str]


def _lines(address: str, action: Action, attributes: str, prefixes: list[str]) -> Iterator[_Line]:
    for start in range(0, len(prefixes), BATCH):
        part = prefixes[start : start + BATCH]
        line = _Line(f"neighbor {address} {action} attributes {attributes} nlri {' '.join(part)}")
        line.prefixes = part
        yield line
