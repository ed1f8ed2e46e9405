"""``underlay-agent``: ties store, kernel and speaker to the loop, and runs until SIGTERM.

At the end nothing is taken back: routes, sessions and announcements stay as they are for the next one (R14). Only where
the machine itself goes down the node is first taken out of the routes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import closing, suppress
from typing import Final

from agent import config
from agent.bgp.driver import Driver
from agent.errors import AgentError
from agent.kernel.state import Kernel
from agent.pages import Pages
from agent.reconcile import Reconciler
from agent.status import StatusWriter
from agent.view import View
from cni.endpoint import Address, Endpoint
from cni.errors import CNIError, first_of
from cni.lock import alone
from cni.podnet import link_name
from store.clock import Clock, SystemClock
from store.counted import CountedStore
from store.errors import StoreError
from store.open import open_store

log = logging.getLogger(__name__)

#: Seconds that the end of the agent waits for a node that goes down to be out of the routes.
DRAIN_LIMIT: Final = 12.0


def main() -> int:
    """Entry point: 0 after SIGTERM or SIGINT, 1 with one line if it cannot go on."""
    settings = config.parse(sys.argv[1:], os.environ)
    logging.basicConfig(level=settings.log, stream=sys.stderr, format="underlay-agent: %(levelname)s: %(message)s")
    failed = False
    try:
        asyncio.run(run(settings, SystemClock()))
    except* (AgentError, CNIError, StoreError, OSError) as group:
        log.error("%s", first_of(group))  # noqa: TRY400 - one clear line
        failed = True
    return int(failed)


async def run(settings: config.Config, clock: Clock) -> None:
    """The agent, until it is told to stop by SIGTERM or SIGINT. Raises what it cannot work without."""
    settings.state.mkdir(parents=True, exist_ok=True)
    settings.run.mkdir(parents=True, exist_ok=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    store = CountedStore(open_store(settings.store, clock=clock))
    loops: list[Reconciler] = []
    try:
        with closing(Kernel(settings.sysctls)) as kernel:
            work = asyncio.create_task(_alone(settings, clock, store, kernel, loops))
            ending = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
                for loop in loops:
                    await loop.drained(DRAIN_LIMIT)
            finally:
                ending.cancel()
                work.cancel()
                with suppress(asyncio.CancelledError):  # by us
                    await work
    finally:
        await store.close()
    log.info("stopped; routes and sessions stay")


async def _alone(
    settings: config.Config, clock: Clock, store: CountedStore, kernel: Kernel, loops: list[Reconciler]
) -> None:
    """Two agents would take the speaker and each other's routes in turn: the second waits for the first one's end."""
    async with alone(settings.run / "agent.lock", clock):
        await _work(settings, clock, store, kernel, loops)


async def _work(
    settings: config.Config, clock: Clock, store: CountedStore, kernel: Kernel, loops: list[Reconciler]
) -> None:
    """Everything that runs, each part owned by this one group: the first that fails ends the others. ``loops`` is told
    of the loop."""
    writer = StatusWriter(store, settings.node, clock)
    view = View(
        store,
        settings.node,
        clock,
        settings.state / "snapshot.json",
        lambda: loop.wake(),
        namespace=settings.namespace,
    )
    loop = Reconciler(
        node=settings.node,
        view=view,
        kernel=kernel,
        speaker=lambda: driver,
        clock=clock,
        link_name=link_name,
        publish=writer.offer,
    )
    loops.append(loop)
    driver = Driver(settings.run / "speaker", clock, loop.event)
    pages = Pages(settings.node, clock, store, view, loop, driver, writer)
    # For whoever is root on this node; ``metrics`` is for who may scrape it.
    here = Endpoint(Address(path=str(settings.run / "agent.sock")), pages.for_people(), clock)
    there = (Endpoint(settings.metrics, pages.all(), clock),) if settings.metrics else ()
    async with asyncio.TaskGroup() as tasks:
        for part in (view, driver, loop, writer, here, *there):
            tasks.create_task(part.run(), name=type(part).__name__)
