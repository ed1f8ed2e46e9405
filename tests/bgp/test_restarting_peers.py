"""Peers that go and come back, or do not: their routes in the node's kernel, and packets that go by them (RFC 4724)."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp import routers
from tests.bgp.agents import Agent, peers
from tests.conftest import eventually

KEPT, LEFT, KEPT6, LEFT6 = "10.244.2.0/26", "10.244.3.0/26", "fd00:10:244::80/122", "fd00:10:244::c0/122"
SERVER = "10.244.2.1"


class Pair:
    """A node, whole, and one router, which announces ``KEPT``, ``KEPT6`` and ``more``."""

    def __init__(
        self, net: Net, folder: Path, kind: str, more: Sequence[str] = (), restart: int = 60, **of_peers: object
    ) -> None:
        self.net, self.folder = net, folder
        routers.wire(net)
        net.address("tor", "lo", [f"{SERVER}/32"])
        self.agent = Agent(net, folder, peers=peers(**of_peers))
        self.router = routers.KINDS[kind](net, folder)
        self.router.start([KEPT, KEPT6, *more], restart=restart)
        self.agent.start_speaker()
        self.agent.start()
        eventually(lambda: self.imports() == {KEPT, KEPT6, *more})

    def imports(self) -> set[str]:
        return {line.split()[0] for line in self.agent.routes() if "proto 143" in line}

    def down(self) -> bool:
        status = self.agent.status()
        return status is not None and all(s.state != "Established" for s in status.status.sessions)


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_routes_of_a_router_that_comes_back_stay_and_stale_ones_are_swept(net: Net, tmp_path: Path, kind: str) -> None:
    """Killed, and back within its restart time with less to say."""
    pair = Pair(net, tmp_path, kind, (LEFT, LEFT6))
    monitor, pings = tmp_path / "monitor", tmp_path / "pings"
    net.spawn("node", ["stdbuf", "-oL", "ip", "monitor", "route"], log=monitor)
    ping = net.spawn("node", ["stdbuf", "-oL", "ping", "-i", "0.02", SERVER], log=pings)
    eventually(lambda: pings.read_text().count("bytes from") > 10)
    pair.router.stop()
    eventually(pair.down)
    assert pair.imports() == {KEPT, LEFT, KEPT6, LEFT6}
    pair.router.start([KEPT, KEPT6])
    eventually(lambda: pair.imports() == {KEPT, KEPT6})
    ping.send_signal(signal.SIGINT)
    ping.wait(timeout=60)
    sent, got = re.search(r"(\d+) packets transmitted, (\d+) received", pings.read_text()).groups()  # type: ignore[union-attr]
    assert int(sent) - int(got) <= 1, "more than the one that may have been under way"
    touched = [line for line in monitor.read_text().splitlines() if KEPT in line or KEPT6 in line]
    assert touched == []


@pytest.mark.parametrize("kind", ["bird", "frr"])
@pytest.mark.parametrize(("asked", "limit"), [(3, "60s"), (60, "3s")], ids=["its-own-time", "our-limit"])
def test_routes_of_a_router_that_stays_away_go_in_time(
    net: Net, tmp_path: Path, kind: str, asked: int, limit: str
) -> None:
    pair = Pair(net, tmp_path, kind, restart=asked, max_restart_time=limit)
    gone = time.monotonic()
    pair.router.stop()
    eventually(lambda: pair.imports() == set())
    # The sessions end with the process, as its kernel closes them.
    assert time.monotonic() - gone > 2.9
