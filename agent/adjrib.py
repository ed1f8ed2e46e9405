"""Adj-RIB-In: what one peer told, through its sessions' generations. Pure; time is an argument (monotonic seconds)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from agent.bgp.model import Attributes, Capabilities, EndOfRib, Family, Received, Resync, SessionDown, SessionUp, Update

#: A peer that is up and silent is taken to have told everything after this many seconds (R8).
REPORT_LIMIT: Final = 30.0
#: Our own speaker is gone, the peers are not at fault: their routes stay as long as we ask them to keep ours.
SPEAKER_RESTART: Final = 60.0

#: How long to wait for a peer that was never up, before its configuration says how long.
UNKNOWN_PATIENCE: Final = 120.0

#: AS numbers and communities that a peer may tell for each prefix of its maximum, and in any case: 70 bytes each. What
#: routes share counts once; a full table of the Internet has three.
MARKS_EACH: Final = 4
MARKS_LEAST: Final = 100_000

FAMILIES: Final[tuple[Family, ...]] = ("ipv4 unicast", "ipv6 unicast")


def family_of(prefix: str) -> Family:
    """The family of a prefix or an address, by its text."""
    return "ipv6 unicast" if ":" in prefix else "ipv4 unicast"


class AdjRibIn:
    """The routes of one peer, by prefix, through its sessions' generations.

    A route is *stale* from the moment that its session ends (if graceful restart was negotiated) or begins anew, until
    the peer tells it again; what is stale at the peer's End-of-RIB, or when its time is over, is swept.
    """

    def __init__(self, now: float) -> None:
        self.routes: dict[str, Received] = {}
        self.generation = -1
        self.up = False
        #: When the session last came up or went down; when the peer was configured, before that.
        self.since = now
        self.reason = ""
        self.families: tuple[Family, ...] = ()
        #: Families whose routes may outlive the session; and whether the peer keeps ours while our speaker restarts.
        self.graceful: tuple[Family, ...] = ()
        self.helper = False
        self.restart_time = 0
        self.capabilities: Capabilities | None = None
        #: How often the session went down.
        self.downs = 0
        #: In what way it exceeded its maximum; "": it never did.
        self.exceeded = ""
        #: AS numbers and communities in all attributes that its routes have; and how many have them, by their id.
        self.marks = 0
        self._users: dict[int, int] = {}
        self._stale: dict[Family, set[str]] = {}
        self._sweep_at: dict[Family, float] = {}
        self._reported: set[Family] = set()
        #: Seconds from ``since`` after which a peer that is down has nothing more to report.
        self._patience: dict[Family, float] = {}
        self._unknown_patience = UNKNOWN_PATIENCE

    def session_up(self, event: SessionUp, now: float) -> set[str]:
        """A new session: what is known goes stale, and what the session does not carry goes. Returns what changed."""
        if event.generation < self.generation or (self.up and event.generation == self.generation):
            return set()
        self.generation, self.up, self.since, self.reason = event.generation, True, now, ""
        self.families, self.graceful, self.helper = event.families, event.graceful_restart, event.helper
        self.restart_time, self.capabilities = event.restart_time, event.capabilities
        self._patience = {f: float(event.restart_time) if f in self.graceful else 0.0 for f in self.families}
        for family in self.families:
            self._mark(family)
            self._sweep_at[family] = now + REPORT_LIMIT
        return self._drop({p for p in self.routes if family_of(p) not in self.families})

    def session_down(self, event: SessionDown, now: float, limit: float) -> set[str]:
        """Routes of families with graceful restart stay for the peer's restart time, at most ``limit``; others go."""
        if event.generation < self.generation:
            return set()
        self.reason = event.reason
        if not self.up:
            return set()
        patience = {family: min(self._patience.get(family, 0.0), limit) for family in self.families}
        return self._end(patience, now)

    def speaker_lost(self, reason: str, now: float) -> set[str]:
        """Our own end of the session is gone; the speaker that comes back counts generations anew."""
        self.generation, self.reason = -1, reason
        return self._end(dict.fromkeys(self.families, SPEAKER_RESTART), now) if self.up else set()

    def update(self, event: Update, maximum: int) -> set[str]:
        """Takes routes in and out. Beyond ``maximum`` prefixes, counted before any filter, it forgets all (R11)."""
        if event.generation != self.generation or not self.up or self.exceeded:
            return set()
        changed = set()
        for route in event.announced:
            self._stale.get(family_of(route.prefix), set()).discard(route.prefix)
            before = self.routes.get(route.prefix)
            if before != route:
                self.routes[route.prefix] = route
                self._use(route.attributes, 1)
                if before is not None:
                    self._use(before.attributes, -1)
                changed.add(route.prefix)
        changed |= self._drop(event.withdrawn)
        return changed | self.enforce(maximum)

    def enforce(self, maximum: int) -> set[str]:
        """Forgets everything, until the peer is configured anew, if there are more prefixes than ``maximum``, or their
        attributes say more than those of so many need to: 4 KB for each prefix would be gigabytes."""
        marks = max(MARKS_LEAST, MARKS_EACH * maximum)
        if len(self.routes) > maximum:
            self.exceeded = f"{len(self.routes)} prefixes received, {maximum} are allowed"
        elif self.marks > marks:
            self.exceeded = f"{self.marks} AS numbers and communities received, {marks} are allowed"
        else:
            return set()
        return self._drop(list(self.routes))

    def resync(self, event: Resync) -> None:
        """All is stale until the End-of-RIB that follows; no timer sweeps, as it would sweep what is on its way."""
        if event.generation == self.generation and self.up:
            self._mark(event.family)
            self._sweep_at.pop(event.family, None)

    def end_of_rib(self, event: EndOfRib) -> set[str]:
        if event.generation != self.generation or not self.up:
            return set()
        self._reported.add(event.family)
        return self._sweep(event.family)

    def advance(self, now: float) -> set[str]:
        """What the passing of time does: sweeps what is due. Returns what changed."""
        for family in FAMILIES:
            if self.reported(family, now):
                self._reported.add(family)  # once is for good
        changed: set[str] = set()
        for family in [f for f, at in self._sweep_at.items() if at <= now]:
            changed |= self._sweep(family)
        return changed

    def reported(self, family: Family, now: float) -> bool:
        """R8: at its End-of-RIB, or 30 s after it came up, or when it has been down for its restart time."""
        return family in self._reported or bool(self.exceeded) or now >= self.report_due(family)

    def report_due(self, family: Family) -> float:
        return self.since + (REPORT_LIMIT if self.up else self._patience.get(family, self._unknown_patience))

    def deadlines(self, now: float) -> Iterable[float]:
        """When time will change something, if nothing else does before."""
        yield from self._sweep_at.values()
        yield from (self.report_due(f) for f in self.families or FAMILIES if not self.reported(f, now))

    def expect(self, patience: float) -> None:
        """How long to wait for a peer that was never up: whether it would restart gracefully is not known."""
        self._unknown_patience = patience

    def _end(self, patience: Mapping[Family, float], now: float) -> set[str]:
        self.up, self.since, self._patience = False, now, dict(patience)
        self.downs += 1
        for family, seconds in patience.items():
            self._mark(family)
            self._sweep_at[family] = now + seconds
        return self.advance(now)

    def _mark(self, family: Family) -> None:
        self._stale[family] = {p for p in self.routes if family_of(p) == family}

    def _sweep(self, family: Family) -> set[str]:
        self._sweep_at.pop(family, None)
        return self._drop(self._stale.pop(family, set()))

    def _drop(self, prefixes: Iterable[str]) -> set[str]:
        dropped = set()
        for prefix in prefixes:
            route = self.routes.pop(prefix, None)
            if route is not None:
                self._use(route.attributes, -1)
                dropped.add(prefix)
        for stale in self._stale.values():
            stale -= dropped
        return dropped

    def _use(self, attributes: Attributes, routes: int) -> None:
        """So many routes more have these attributes, which are kept by at least one of them until then."""
        before = self._users.get(id(attributes), 0)
        self._users[id(attributes)] = before + routes
        if before == 0:
            self.marks += attributes.marks
        elif before + routes == 0:
            del self._users[id(attributes)]
            self.marks -= attributes.marks
