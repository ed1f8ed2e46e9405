"""NetworkUnavailable: when it is taken back, and when it is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from agent.network_condition import INTERVAL, KIND, NetworkCondition, taken_back
from store.errors import Unavailable
from store.memory import MemoryStore
from store.model import Meta, Node, NodeAddress, NodeCondition, NodeStatus
from tests.ipam_fakes import FakeClock, settle

NOW = "2026-01-01T00:00:00Z"
READY = NodeCondition(type="Ready", status="True", message="kubelet is posting ready status")
SAID = NodeCondition(type=KIND, status="True", reason="CalicoIsDown", message="Calico is shutting down on this node")
ADDRESS = NodeAddress(type="InternalIP", address="10.0.0.1")


def node(*conditions: NodeCondition) -> Node:
    return Node(metadata=Meta(name="node-1"), status=NodeStatus(addresses=(ADDRESS,), conditions=conditions))


def test_the_condition_is_taken_back_and_nothing_else_is_touched() -> None:
    given = node(READY, SAID)
    said = taken_back(given, NOW)
    assert said is not None
    ready, network = said.status.conditions
    assert ready == READY
    assert (network.status, network.reason, network.last_transition_time) == ("False", "UnderlayIsUp", NOW)
    assert replace(said, status=given.status) == given
    assert said.status.addresses == (ADDRESS,)


@pytest.mark.parametrize(
    "given",
    [None, node(), node(READY), node(READY, replace(SAID, status="False")), node(replace(SAID, status="Unknown"))],
    ids=["not known", "no conditions", "not said", "said to be there", "nobody knows"],
)
def test_where_nobody_says_it_nothing_is_written(given: Node | None) -> None:
    assert taken_back(given, NOW) is None


class Home:
    """A Node in a store, the agent's word on itself, and the loop."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.node: Node | None = None
        self.unready = ""
        self.writes = 0
        self.loop = NetworkCondition(self, self.clock, lambda: self.node, lambda: self.unready)  # type: ignore[arg-type]

    async def update_status(self, obj: Node) -> Node:
        self.writes += 1
        return await self.store.update_status(obj)

    async def say(self, *conditions: NodeCondition) -> None:
        """Somebody else writes; a watch tells us."""
        if self.node is None:
            await self.store.create(node())
        current = await self.store.get(Node, "node-1")
        status = replace(current.status, conditions=conditions)
        self.node = await self.store.update_status(replace(current, status=status))
        self.loop.wake()

    async def network(self) -> str:
        self.node = await self.store.get(Node, "node-1")
        return next(c.status for c in self.node.status.conditions if c.type == KIND)


def play(story: Callable[[Home], Awaitable[None]]) -> None:
    async def main() -> None:
        home = Home()
        task = asyncio.create_task(home.loop.run())
        try:
            await story(home)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_it_waits_until_the_agent_is_ready() -> None:
    async def story(home: Home) -> None:
        home.unready = "tor-1 is waited for"
        await home.say(READY, SAID)
        await home.clock.advance(60)
        assert await home.network() == "True"
        home.unready = ""
        await home.clock.advance(1)
        assert await home.network() == "False"
        assert home.writes == 1

    play(story)


def test_the_store_away_is_waited_out() -> None:
    async def story(home: Home) -> None:
        async def away(_: Node) -> Node:
            raise Unavailable("no")

        works, home.store.update_status = home.store.update_status, home.store.update_status
        await home.say(SAID)
        home.store.update_status = away  # type: ignore[method-assign,assignment]
        await home.clock.advance(0)
        assert (home.writes, await home.network()) == (1, "True")
        home.store.update_status = works  # type: ignore[method-assign]
        await home.clock.advance(INTERVAL[0])
        assert (home.writes, await home.network()) == (2, "False")

    play(story)


def test_who_says_it_again_and_again_is_answered_ever_more_slowly() -> None:
    """As a route controller does, every 10 s: no storm of writes, and never given up."""

    async def story(home: Home) -> None:
        for _ in range(360):
            await home.say(SAID)
            await home.clock.advance(10)
            await settle()
            await home.network()
        assert 10 <= home.writes <= 22

    play(story)
