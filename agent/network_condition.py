"""Takes back the Node condition NetworkUnavailable.

A cloud's route controller says with it that a node has no route yet (cloud-provider, controllers/route), and a network
that was here before that it has gone (Calico's CalicoIsDown). While it is True the node has the taint
node.kubernetes.io/network-unavailable, and nobody else would ever take it away: kubelets leave this condition alone
(pkg/controller/nodelifecycle).

It is written only where somebody says it. At its own end the agent says nothing: routes and pods stay (R14).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from store.base import Store
from store.clock import Clock
from store.errors import StoreError
from store.model import Node, NodeCondition

log = logging.getLogger(__name__)

KIND: Final = "NetworkUnavailable"
#: Seconds between two looks or writes, doubled with each up to the second number: somebody may say it again and again.
INTERVAL: Final = (1.0, 300.0)
#: Seconds without a write after which the next is no quarrel any more.
CALM: Final = 600.0


def taken_back(node: Node | None, now: str) -> Node | None:
    """The Node without network no more; None where nobody says that it has none. ``now``: RFC 3339. Pure."""
    if node is None or not any(c.type == KIND and c.status == "True" for c in node.status.conditions):
        return None
    said = NodeCondition(
        type=KIND,
        status="False",
        reason="UnderlayIsUp",
        message="Underlay has its routes in place on this node",
        last_transition_time=now,
    )
    conditions = tuple(said if c.type == KIND else c for c in node.status.conditions)
    return replace(node, status=replace(node.status, conditions=conditions))


class NetworkCondition:
    """``node`` is this node's as the store has it (None: not known); ``unready`` says what is not in place yet."""

    def __init__(self, store: Store, clock: Clock, node: Callable[[], Node | None], unready: Callable[[], str]) -> None:
        self._store, self._clock, self._node, self._unready = store, clock, node, unready
        self._woken = asyncio.Event()
        self._tried = self._wrote = float("-inf")
        self._pause = INTERVAL[0]

    def wake(self) -> None:
        """The Node may have changed."""
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled. The store's faults are waited out."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            while (wanted := taken_back(self._node(), self._clock.now())) is not None:
                if self._unready():
                    await self._clock.sleep(INTERVAL[0])
                    continue
                await self._write(wanted)
                await self._clock.sleep(self._pause)

    async def _write(self, wanted: Node) -> None:
        now = self._clock.monotonic()
        quarrel = now - self._wrote < CALM
        self._pause = min(self._pause * 2, INTERVAL[1]) if now - self._tried < CALM else INTERVAL[0]
        self._tried = now
        try:
            await self._store.update_status(wanted)
        except StoreError as e:
            log.info("%s of Node %s is not taken back yet: %s", KIND, wanted.name, e)
        else:
            self._wrote = now
            log.warning(
                "somebody said %s of Node %s; it has its routes, so that is taken back%s",
                KIND,
                wanted.name,
                "; it is said again and again: does a cloud's route controller run?" if quarrel else "",
            )
