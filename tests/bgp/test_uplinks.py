"""A node on two ToRs: both links carry traffic, a dead one is left at once and used again when it is back, and a strict
rp_filter breaks nothing."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp import routers
from tests.bgp.routers import NODE4, SECOND
from tests.bgp.worlds import World
from tests.conftest import eventually

#: Behind both ToRs, behind the first alone, and a pod of the node.
FAR, SINGLE, POD = "10.244.3.0/26", "10.244.5.0/26", "10.244.1.5"
SERVERS = [f"10.244.3.{i}" for i in range(1, 33)]


@pytest.fixture(params=["bird", "frr"])
def world(request: pytest.FixtureRequest, net: Net, tmp_path: Path) -> Iterator[World]:
    made = World(net, tmp_path)
    # As an operator may have set it.
    net.sysctl("node", {f"net.ipv4.conf.{name}.rp_filter": "1" for name in ("all", "up0", "up1")})
    made.start()
    first = routers.KINDS[request.param](net, tmp_path)
    first.start([FAR, SINGLE])
    for tor in ("tor", "tor2"):
        net.address(tor, "lo", [f"{server}/32" for server in SERVERS])
    net.address("tor", "lo", ["10.244.5.1/32"])
    net.ip("tor2", [f"route add {NODE4}/32 via {SECOND.node4}"])  # the node's own address is on the other's subnet
    eventually(lambda: devices(net, FAR) == ["up0", "up1"] and devices(net, SINGLE) == ["up0"])
    yield made


def devices(net: Net, prefix: str) -> list[str]:
    return sorted(re.findall(r"dev (up\d)", net.run("node", ["ip", "route", "show", prefix]).stdout))


def sent(net: Net, port: str) -> int:
    """Packets that left by it."""
    (link,) = json.loads(net.run("node", ["ip", "-s", "-j", "link", "show", port]).stdout)
    return int(link["stats64"]["tx"]["packets"])


def answers(net: Net, *words: str) -> bool:
    return net.run("node", ["ping", "-c", "1", "-W", "5", *words], check=False).returncode == 0


def test_both_links_carry_traffic_and_a_dead_one_is_left_and_used_again(net: Net, tmp_path: Path, world: World) -> None:
    before = {port: sent(net, port) for port in ("up0", "up1")}
    assert all(answers(net, server) for server in SERVERS)
    assert all(sent(net, port) - n >= 5 for port, n in before.items())

    # What a second's packets are to a machine with other work is not said by one cut.
    lost: list[int] = []
    while not lost or (lost[-1] > 50 and len(lost) < 3):
        lost.append(_lost_by_a_cut(net, tmp_path / f"cut-{len(lost)}"))
    print(f"at most {lost} of 50 packets a second lost to one server")
    assert min(lost) <= 50, "more than a second's"


def _lost_by_a_cut(net: Net, folder: Path) -> int:
    """Of the packets to the server that lost most, 50 a second to each; one link was cut, and mended, meanwhile."""
    folder.mkdir()
    logs = {server: folder / server for server in SERVERS[:8]}
    pings = [
        net.spawn("node", ["stdbuf", "-oL", "ping", "-i", "0.02", server], log=log) for server, log in logs.items()
    ]
    eventually(lambda: all(log.read_text().count("bytes from") > 5 for log in logs.values()))
    net.ip("tor", ["link set down0 down"])
    eventually(lambda: devices(net, FAR) == ["up1"], every=0.01)
    net.ip("tor", ["link set down0 up"])
    eventually(lambda: devices(net, FAR) == ["up0", "up1"])
    before = {port: sent(net, port) for port in ("up0", "up1")}
    eventually(lambda: all(sent(net, port) - n >= 20 for port, n in before.items()))
    lost = 0
    for ping, log in zip(pings, logs.values(), strict=True):
        ping.send_signal(signal.SIGINT)
        ping.wait(timeout=60)
        said, got = re.search(r"(\d+) packets transmitted, (\d+) received", log.read_text()).groups()  # type: ignore[union-attr]
        lost = max(lost, int(said) - int(got))
    return lost


def test_a_strict_rp_filter_breaks_nothing(net: Net, world: World) -> None:
    """Out by one link and back by the other, as the ToRs see fit: a strict filter would drop what comes back."""
    net.link("tor", "peer", "tor2", "peer")
    net.address("tor", "peer", ["10.0.9.1/30"])
    net.address("tor2", "peer", ["10.0.9.2/30"])
    net.address("node", "lo", [f"{POD}/32"])
    net.ip("tor", [f"route add {POD}/32 via 10.0.9.2"])
    net.ip("tor2", [f"route add {POD}/32 via {SECOND.node4}"])
    for port in ("up0", "up1"):
        assert net.run("node", ["cat", f"/proc/sys/net/ipv4/conf/{port}/rp_filter"]).stdout.strip() == "2"
    assert answers(net, "-I", POD, "10.244.5.1")
    assert world.agent.process is not None
    world.agent.process.send_signal(signal.SIGSTOP)  # it would set it right
    net.sysctl("node", {"net.ipv4.conf.up1.rp_filter": "1"})
    assert not answers(net, "-I", POD, "10.244.5.1"), "the filter would not have dropped it"
