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
from functools import partial
from typing import Final

from agent import config
from agent.bgp.driver import Driver
from agent.detect import reached
from agent.errors import AgentError
from agent.kernel.state import Kernel
from agent.network_condition import NetworkCondition
from agent.pages import Pages
from agent.poolmaker import PoolMaker
from agent.reconcile import Reconciler
from agent.status import StatusWriter
from agent.view import View
from cni.endpoint import Address, Endpoint, Lasting
from cni.errors import CNIError, first_of
from cni.lock import in_turn
from cni.podnet import link_name
from cni.sysctls import FOLDER
from store.clock import Clock, SystemClock
from store.counted import CountedStore
from store.errors import StoreError
from store.model import Node
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
    # For who may scrape it, and for probes.
    front = Lasting(settings.metrics, clock)
    # Two agents would take the speaker and each other's routes in turn.
    turn = partial(_turn, settings, clock, store, front, loops)
    work = asyncio.create_task(in_turn(settings.run / "agent.lock", clock, turn))
    ending = asyncio.create_task(stop.wait())
    told = asyncio.create_task(front.run())
    try:
        await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
        for loop in loops:
            await loop.drained(DRAIN_LIMIT)
    finally:
        ending.cancel()
        work.cancel()
        try:
            with suppress(asyncio.CancelledError):  # by us
                await work
        finally:
            told.cancel()
            await asyncio.wait({told})
            await store.close()
    log.info("stopped; routes and sessions stay")


async def _turn(
    settings: config.Config, clock: Clock, store: CountedStore, front: Lasting, loops: list[Reconciler]
) -> None:
    """With the lock held."""
    try:
        reach = reached(*settings.methods.values())
        with closing(Kernel(settings.sysctls, settings.run / FOLDER, reach=reach)) as kernel:
            await _work(settings, clock, store, kernel, front, loops)
    finally:
        loops.clear()
        front.stand_by()


async def _work(
    settings: config.Config,
    clock: Clock,
    store: CountedStore,
    kernel: Kernel,
    front: Lasting,
    loops: list[Reconciler],
) -> None:
    """Everything that runs, each part owned by this one group: the first that fails ends the others. ``loops`` is told
    of the loop."""
    writer = StatusWriter(store, settings.node, clock)
    view = View(
        store,
        settings.node,
        clock,
        settings.state / "snapshot.json",
        lambda: moved(),
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
        methods=settings.methods,
        why_no_pool=lambda: maker.reason,
    )
    maker = PoolMaker(
        store,
        clock,
        node=settings.node,
        namespace=settings.namespace,
        wishes=settings.pools,
        kernel=lambda: loop.seen.kernel if loop.seen else None,
        on_change=loop.wake,
    )
    loops.append(loop)
    driver = Driver(settings.run / "speaker", clock, loop.event)
    pages = Pages(settings.node, clock, store, view, loop, driver, writer)
    condition = NetworkCondition(store, clock, lambda: _own_node(view), pages.unready)

    def moved() -> None:
        writer.own(view.node_uid())
        loop.wake()
        condition.wake()

    # For whoever is root on this node.
    here = Endpoint(Address(path=str(settings.run / "agent.sock")), pages.for_people(), clock)
    async with asyncio.TaskGroup() as tasks:
        for part in (view, driver, loop, writer, condition, maker, here):
            tasks.create_task(part.run(), name=type(part).__name__)
        tasks.create_task(pages.settle(front), name="settle")


def _own_node(view: View) -> Node | None:
    """As the store has it now; None while that is not known."""
    cluster = view.cluster()
    return cluster.node if cluster and cluster.live else None
