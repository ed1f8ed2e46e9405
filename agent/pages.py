"""What the agent answers over HTTP: is it alive, is it ready, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import msgspec

from agent import health, look, metrics
from agent.bgp.driver import Driver
from agent.health import Seen
from agent.reconcile import Reconciler
from agent.status import StatusWriter
from agent.view import View
from cni import endpoint
from cni.endpoint import Lasting, Page, Reply
from cni.process import resident
from cni.prometheus import CONTENT_TYPE, render
from store.clock import Clock
from store.counted import CountedStore

#: Seconds that a start may take: a session that does not come up has had its time by then (``health.unready``).
SETTLE_LIMIT: Final = 150.0
_LOOK_EVERY: Final = 0.1


class Pages:
    """Looks at the parts of the agent whenever it is asked."""

    def __init__(
        self,
        node: str,
        clock: Clock,
        store: CountedStore,
        view: View,
        loop: Reconciler,
        driver: Driver,
        writer: StatusWriter,
    ) -> None:
        self._node = node
        self._clock, self._store, self._view = clock, store, view
        self._loop, self._driver, self._writer = loop, driver, writer
        self._settled = False
        self._begun = clock.monotonic()

    async def settle(self, front: Lasting) -> None:
        """Opens ``front``; returns when the agent has been ready once."""
        await front.tell(self.all())
        while health.unready(self._health()):
            await self._clock.sleep(_LOOK_EVERY)
        self._settled = True

    def all(self) -> dict[str, Page]:
        return {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/fit": self._fit,
            "/metrics": self._metrics,
        }

    def for_people(self) -> dict[str, Page]:
        """And what ``underlayctl bgp`` asks for."""
        shown: dict[str, Callable[[Seen, look.Asked], look.Answer]] = {
            "/bgp/peers": lambda seen, asked: look.peers(
                self._node, self._loop.status, self._loop.rib, self._loop.history, asked
            ),
            "/bgp/routes": lambda seen, asked: look.routes(
                self._node, seen.plan, self._loop.rib, seen.kernel, asked, best=True
            ),
            "/bgp/received": lambda seen, asked: look.routes(
                self._node, seen.plan, self._loop.rib, seen.kernel, asked, best=False
            ),
            "/bgp/advertised": lambda seen, asked: look.advertised(self._node, seen.plan, seen.speaker, asked),
            "/bgp/diff": lambda seen, asked: look.diff(
                self._node, seen.plan, self._loop.status, seen.speaker, seen.kernel, self._loop.failures, asked
            ),
        }
        return (
            self.all()
            | {"/settled": self._settledz}
            | {path: partial(self._look, page) for path, page in shown.items()}
        )

    def unready(self) -> str:
        """What is not in place yet, in words; "" if all is."""
        return health.unready(self._health())

    def _look(self, page: Callable[[Seen, look.Asked], look.Answer], query: Mapping[str, str]) -> Reply:
        seen = self._loop.seen
        if seen is None:
            return Reply("the agent has planned nothing yet: look at /readyz", code=503)
        try:
            asked = look.asked(query)
        except ValueError as e:
            return Reply(str(e), code=400)
        return Reply(msgspec.json.encode(page(seen, asked)), "application/json")

    def _healthz(self, _: Mapping[str, str]) -> Reply:
        return endpoint.health(health.unhealthy(self._health()))

    def _readyz(self, _: Mapping[str, str]) -> Reply:
        state = self._health()
        problem = health.unready(state)
        without = health.without(state)
        return Reply(f"ok, {without}") if without and not problem else endpoint.health(problem)

    def _settledz(self, _: Mapping[str, str]) -> Reply:
        return endpoint.health("" if self._settled else health.unready(self._health()) or "in a moment")

    def _fit(self, _: Mapping[str, str]) -> Reply:
        """For a kubelet, whose hook waits for ``/settled`` first: until then it asks for the agent of before."""
        state = self._health()
        if not self._settled and state.now < self._begun + SETTLE_LIMIT:
            return Reply("ok, not settled yet")
        return endpoint.health(health.unfit(state))

    def _metrics(self, _: Mapping[str, str]) -> Reply:
        return Reply(render(metrics.families(self._figures())), CONTENT_TYPE)

    def _health(self) -> health.State:
        return health.State(
            now=self._clock.monotonic(),
            turned=self._loop.figures.turned,
            viewed=self._view.cluster() is not None,
            kernel_error=self._loop.kernel_error,
            seen=self._loop.seen,
            rib=self._loop.rib,
        )

    def _figures(self) -> metrics.State:
        cluster = self._view.cluster()
        age, whole = self._view.last_good()
        return metrics.State(
            now=self._clock.monotonic(),
            ready=not self.unready(),
            live=cluster is not None and cluster.live,
            figures=self._loop.figures,
            status=self._loop.status,
            seen=self._loop.seen,
            rib=self._loop.rib,
            followed=self._view.followed(),
            last_good_age=age,
            last_good_whole=whole,
            store_requests=self._store.requests,
            store_failures=self._store.failures,
            status_writes=self._writer.written,
            status_failures=self._writer.failed,
            relay_connections=self._driver.connections,
            resident=resident(),
        )
