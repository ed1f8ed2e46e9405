"""The one loop: read, plan, diff, apply, and again until nothing is left to do.

It is woken by whatever changes (store, kernel, speaker, time), lets what comes in a burst gather, and looks at
everything now and then, woken or not. A fault of one operation stops no other; it is tried again, later each time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from msgspec.structs import replace

from agent.bgp.history import History
from agent.bgp.model import Announcement, Event, Session, SessionChanges, SpeakerState
from agent.delta import Failure, NoFreeId, Operation, delta, explain
from agent.detect import Method
from agent.fib import KernelState
from agent.health import Seen
from agent.metrics import Figures
from agent.plan import Cluster, Plan, Snapshot, plan
from agent.report import report
from agent.rib import Rib
from cni.marks import PROTO_BLOCKS
from cni.netlink import NetlinkError
from store.clock import Clock
from store.model import BGPNodeStatusStatus, Condition
from store.waiting import until

log = logging.getLogger(__name__)

#: Seconds for which changes gather before a pass; a pass that took longer is followed by as long a rest.
GATHER: Final = 0.02
#: Seconds between two looks at everything.
FULL_PASS: Final = 30.0
#: Seconds until a refused operation is tried again: doubled each time, up to the second number.
RETRY: Final = (0.5, 30.0)
#: Passes in a row that may each find work, and the rest in seconds after that: somebody else may be at it, too.
ROUNDS: Final = 4
UNREST: Final = 1.0


class ViewPort(Protocol):
    def cluster(self) -> Cluster | None: ...
    def question(self, cidrs: frozenset[str]) -> None: ...
    def inhabit(self, pools: frozenset[str]) -> None: ...


class KernelPort(Protocol):
    def fileno(self) -> int: ...
    def news(self) -> bool: ...
    def forget(self) -> None: ...
    def read(self) -> KernelState: ...
    async def apply(self, operations: Sequence[Operation]) -> tuple[Failure, ...]: ...


class SpeakerPort(Protocol):
    """``agent.bgp.driver.Driver``."""

    @property
    def changed(self) -> asyncio.Event: ...
    def set_sessions(self, sessions: frozenset[Session]) -> None: ...
    def set_announcements(self, announcements: frozenset[Announcement]) -> None: ...
    def state(self) -> SpeakerState: ...


class Reconciler:
    """``event`` is the speaker's sink. ``publish`` takes each new status. ``link_name`` is that of ``Snapshot``."""

    def __init__(
        self,
        *,
        node: str,
        view: ViewPort,
        kernel: KernelPort,
        speaker: Callable[[], SpeakerPort],
        clock: Clock,
        link_name: Callable[[str, str], str],
        publish: Callable[[BGPNodeStatusStatus], None],
        why_no_pool: Callable[[], str] = lambda: "",
        methods: Mapping[int, Method] | None = None,
    ) -> None:
        self._node, self._view, self._kernel, self._speaker = node, view, kernel, speaker
        self._clock, self._link_name, self._publish = clock, link_name, publish
        self._why_no_pool, self._methods = why_no_pool, methods or {}
        self.rib = Rib()
        #: What became of each peer's sessions.
        self.history = History()
        self.figures = Figures(clock.monotonic())
        #: What the last pass saw; None before there was one.
        self.seen: Seen | None = None
        #: The newest status that was published, and why the kernel is not as planned ("" if it is).
        self.status = BGPNodeStatusStatus()
        self.kernel_error = ""
        #: What the kernel refused in the last pass.
        self.failures: tuple[Failure, ...] = ()
        self._woken = asyncio.Event()
        self._events = 0
        self._missing: dict[str, float] = {}
        self._ready: dict[str, float] = {}
        self._retry = RETRY[0]
        self._full_at = 0.0

    def wake(self) -> None:
        """Something changed: look soon."""
        self._woken.set()

    def event(self, event: Event) -> None:
        """Takes one of the speaker's events."""
        if isinstance(event, SessionChanges):
            if self.history.take(event):
                self.wake()
            return
        self._events += 1
        self.rib.apply(event, self._clock.monotonic())
        self.wake()

    async def drained(self, limit: float) -> None:
        """Returns when a node that goes down is out of the routes, after ``limit`` seconds at most; else at once."""
        end = self._clock.monotonic() + limit
        while self.seen and self.seen.plan.going_down and self._clock.monotonic() < end:
            await self._clock.sleep(GATHER)

    async def run(self) -> None:
        """Until cancelled; whatever is in the kernel then stays there (R14)."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._kernel.fileno(), self._hear)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._hear_speaker())
                tasks.create_task(self._loop())
        finally:
            loop.remove_reader(self._kernel.fileno())

    async def _loop(self) -> None:
        while True:
            begun = self._clock.monotonic()
            again = await self.step()
            self.figures.turned = self._clock.monotonic()
            # A pass that is slow (a large table under churn) leaves at least as much time to everything else.
            await self._clock.sleep(max(GATHER, self._clock.monotonic() - begun))
            await until(self._clock, self._woken, max(0.0, again - self._clock.monotonic()))

    def _hear(self) -> None:
        try:
            urgent = self._kernel.news()
        except NetlinkError as e:
            log.warning("the kernel's news cannot be read: %s", e)
            self._kernel.forget()
            urgent = True
        if urgent:
            self.wake()

    async def _hear_speaker(self) -> None:
        changed = self._speaker().changed
        while True:
            await changed.wait()
            changed.clear()
            self.wake()

    async def step(self) -> float:
        """Passes until there is nothing left to do (or only what is refused); returns when to come again unasked."""
        if self._clock.monotonic() >= self._full_at:
            self._kernel.forget()
            self._full_at = self._clock.monotonic() + FULL_PASS
        at: float | None = None
        heard = 0
        for left in reversed(range(ROUNDS)):
            self._woken.clear()
            heard = self._events
            found = await self._pass(last=left == 0)
            if found is None:
                break
            wanted, worked = found
            at = wanted.wake_at
            if not worked:
                break
        else:
            if heard != self._events:  # a table that is still being told is no unrest
                return self._clock.monotonic()
            log.warning("the kernel is not as planned after %d passes: going on in %g s", ROUNDS, UNREST)
            await self._clock.sleep(UNREST)
        return min(t for t in (at, self._full_at, self._retry_at()) if t is not None)

    async def _pass(self, *, last: bool) -> tuple[Plan, bool] | None:
        """One look and what follows of it: the plan, and whether the kernel was changed, so that another look is due
        (but for the ``last``). None if there is nothing to plan from."""
        cluster = self._view.cluster()
        if cluster is None:
            return None
        now = self._clock.monotonic()
        self.rib.advance(now)
        speaker = self._speaker()
        state = speaker.state()
        try:
            kernel = self._kernel.read()
        except (NetlinkError, OSError) as e:
            self._blind(e)
            return None
        with self.figures.plan_times.timing(self._clock.monotonic):
            wanted = plan(
                Snapshot(
                    node=self._node,
                    now=now,
                    cluster=cluster,
                    kernel=kernel,
                    speaker=state,
                    rib=self.rib,
                    link_name=self._link_name,
                    missing=self._missing,
                    ready=self._ready,
                    why_no_pool=self._why_no_pool(),
                    methods=self._methods,
                )
            )
        self.figures.passes += 1
        self._missing = {address: self._missing.get(address, now) for address in wanted.missing}
        self._ready = {address: self._ready.get(address, now) for address in wanted.ready}
        if wanted.sessions is not None:
            self.rib.configure(wanted.peers, now)
            self.history.keep(peer.address for peer in wanted.peers)
        if cluster.live:
            own = {block.spec.cidr for block in cluster.blocks}
            held = {prefix for prefix, protocol, _ in kernel.routes if protocol == PROTO_BLOCKS}
            self._view.question(frozenset(held - own))
            self._view.inhabit(wanted.inhabited)
        try:
            operations = delta(wanted, kernel)
        except NoFreeId as e:
            operations = ()
            self.kernel_error = str(e)
        else:
            self.kernel_error = ""
        failures = await self._apply(operations) if operations else ()
        self._note(failures)
        worked = len(failures) < len(operations)
        if last or not worked:
            # Only now, when the kernel is as wanted or will not be: a blackhole that came back in this very pass must
            # not be withdrawn and announced again.
            if wanted.sessions is not None and wanted.announcements is not None:
                speaker.set_sessions(wanted.sessions)
                speaker.set_announcements(wanted.announcements)
            self.seen = Seen(replace(wanted, routes={}), kernel, state)
            self._tell(wanted, state)
        return wanted, worked

    async def _apply(self, operations: Sequence[Operation]) -> tuple[Failure, ...]:
        with self.figures.apply_times.timing(self._clock.monotonic):
            failures = await self._kernel.apply(operations)
        self.figures.applied(operations, failures)
        return failures

    def _blind(self, error: Exception) -> None:
        """Without the kernel's word nothing is changed anywhere."""
        if str(error) != self.kernel_error:
            log.warning("the kernel cannot be read, nothing is changed: %s", error)
        self.kernel_error = str(error)
        self._kernel.forget()
        self._retry = min(self._retry * 2, RETRY[1])
        self._full_at = min(self._full_at, self._clock.monotonic() + self._retry)

    def _note(self, failures: tuple[Failure, ...]) -> None:
        for failure in failures:
            if failure not in self.failures:
                log.warning("%s: %s", *explain(failure))
        self._retry = RETRY[0] if failures != self.failures else min(self._retry * 2, RETRY[1])
        self.failures = failures

    def _retry_at(self) -> float | None:
        return self._clock.monotonic() + self._retry if self.failures else None

    def _tell(self, wanted: Plan, state: SpeakerState) -> None:
        conditions = [
            Condition(type=kind, status="True", reason=kind, message=message)
            for kind, message in sorted({explain(f) for f in self.failures})[:8]
        ]
        if self.kernel_error:
            kind = "KernelUnavailable"
            conditions.append(Condition(type=kind, status="True", reason=kind, message=self.kernel_error))
        self.status = report(wanted, self.rib, state, self.history, conditions, self.status, self._clock.now())
        self._publish(self.status)
