"""What the agent answers over HTTP: is it alive, is it ready, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping

from agent import health, metrics
from agent.bgp.driver import Driver
from agent.reconcile import Reconciler
from agent.status import StatusWriter
from agent.view import View
from cni import endpoint
from cni.endpoint import Page, Reply
from cni.process import resident
from cni.prometheus import CONTENT_TYPE, render
from store.clock import Clock
from store.counted import CountedStore


class Pages:
    """Looks at the parts of the agent whenever it is asked."""

    def __init__(
        self, clock: Clock, store: CountedStore, view: View, loop: Reconciler, driver: Driver, writer: StatusWriter
    ) -> None:
        self._clock, self._store, self._view = clock, store, view
        self._loop, self._driver, self._writer = loop, driver, writer

    def all(self) -> dict[str, Page]:
        return {"/healthz": self._healthz, "/readyz": self._readyz, "/metrics": self._metrics}

    def _healthz(self, _: Mapping[str, str]) -> Reply:
        return endpoint.health(health.unhealthy(self._health()))

    def _readyz(self, _: Mapping[str, str]) -> Reply:
        state = self._health()
        problem = health.unready(state)
        without = health.without(state)
        return Reply(f"ok, {without}") if without and not problem else endpoint.health(problem)

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
            ready=not health.unready(self._health()),
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
