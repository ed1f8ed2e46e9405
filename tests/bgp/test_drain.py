"""A node is taken out of the routes and comes back, by what people type, as its ToR sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.net import Net
from store.base import mutate
from store.model import Node, NodeCondition, NodeStatus
from tests.bgp.agents import OWN4, OWN6, Agent, peers
from tests.bgp.routers import Router
from tests.conftest import eventually

SHUTDOWN = "65535:0"


@pytest.fixture
def made(net: Net, tmp_path: Path, router: Router) -> Agent:
    router.start()
    agent = Agent(net, tmp_path, peers=peers())
    agent.start_speaker()
    agent.start()
    eventually(lambda: router.table().keys() == {OWN4, OWN6})
    return agent


def ctl(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [str(Path(sys.executable).parent / "underlayctl"), *words, "--store", agent.url]
    return subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False, env=dict(os.environ))


def conditions(agent: Agent) -> set[str]:
    status = agent.status()
    return {c.type for c in status.status.conditions} if status else set()


def plain(router: Router) -> bool:
    return router.table().keys() == {OWN4, OWN6} and not any(
        SHUTDOWN in router.communities(prefix) for prefix in (OWN4, OWN6)
    )


def test_drained_and_back(made: Agent, router: Router) -> None:
    made.net.ip("node", ["route add 10.244.1.9/32 dev lo proto 141 metric 32"])
    assert plain(router)

    def draining() -> bool:
        asked = ctl(made, "node", "drain-routes", "node-1", "--wait", "4")
        assert asked.returncode == 1, asked
        return f"{OWN4} stays until its last pod is gone: 1 live in it" in asked.stdout

    eventually(draining)
    eventually(lambda: SHUTDOWN in router.communities(OWN4))
    eventually(lambda: router.table().keys() == {OWN4})

    # Another agent goes on where this one was.
    made.stop(signal.SIGKILL)
    made.start()
    for _ in range(10):
        assert router.table().keys() == {OWN4}
        assert SHUTDOWN in router.communities(OWN4)
    eventually(lambda: "RoutesDraining" in conditions(made))
    assert router.table().keys() == {OWN4}
    made.net.ip("node", ["route del 10.244.1.9/32 dev lo proto 141 metric 32"])
    done = ctl(made, "node", "drain-routes", "node-1", "--wait", "60")
    assert (done.returncode, "nothing is announced" in done.stdout) == (0, True), done
    eventually(lambda: not router.table())

    back = ctl(made, "node", "drain-routes", "node-1", "--undo")
    assert (back.returncode, back.stdout) == (0, "node-1: its blocks are announced as before\n"), back
    eventually(lambda: plain(router))


def test_a_machine_that_goes_down_is_out_of_the_routes_before_its_agent_ends(made: Agent, router: Router) -> None:
    def goes_down(node: Node) -> Node:
        said = NodeCondition(type="Ready", status="False", message="node is shutting down")
        return Node(metadata=node.metadata, status=NodeStatus(addresses=node.status.addresses, conditions=(said,)))

    made.store(lambda store: mutate(store, Node, "node-1", goes_down, status=True))
    eventually(lambda: SHUTDOWN in router.communities(OWN4))
    assert made.process is not None
    made.process.send_signal(signal.SIGTERM)
    assert made.process.wait(timeout=60) == 0
    # It has seen them sent, which a busy router reads a moment later; with the agent gone nobody takes more out.
    eventually(lambda: not router.table())


def test_an_upgrade_takes_nothing_out_of_the_routes(made: Agent, router: Router) -> None:
    assert made.stop(signal.SIGTERM) == 0
    assert plain(router)
