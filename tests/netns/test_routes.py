"""The agent's hand in a real kernel: what ``ip route`` shows after a plan, and what stays untouched."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from agent import delta as d
from agent.bgp.model import Announcement
from agent.delta import Failure, delta
from agent.fib import KernelState, NextHop, Route
from agent.kernel.state import Kernel
from agent.plan import Plan
from agent.rib import Selection
from cni import netns
from cni.marks import LINK_GROUP, METRIC_BLOCKS, METRIC_IMPORTS, METRIC_PODS, PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from lab.net import Net
from tests.conftest import eventually, usable

ALL = frozenset((p, f) for p in (PROTO_BLOCKS, PROTO_IMPORTS) for f in ("ipv4 unicast", "ipv6 unicast"))


def plan_of(*routes: Route, sysctls: Mapping[str, str] | None = None, deletable: Any = ALL) -> Plan:
    return Plan(
        routes={r.key: r for r in routes},
        deletable=deletable,
        sysctls=sysctls or {},
        sessions=frozenset(),
        announcements=frozenset[Announcement](),
        peers=(),
        conditions=(),
        selection=Selection({}, {}),
    )


def block(cidr: str) -> Route:
    return Route(prefix=cidr, protocol=PROTO_BLOCKS, metric=METRIC_BLOCKS, kind="blackhole")


def imported(prefix: str, *hops: NextHop, src: str = "") -> Route:
    return Route(prefix=prefix, protocol=PROTO_IMPORTS, metric=METRIC_IMPORTS, nexthops=tuple(sorted(hops)), src=src)


class Node:
    """A node with two uplinks to two ToRs, and its kernel as the agent has it."""

    def __init__(self, net: Net) -> None:
        self.net = net
        for tor in (1, 2):
            net.add(f"tor-{tor}", forwarding=True)
        net.add("node-1", forwarding=True)
        for tor in (1, 2):
            net.link("node-1", f"up{tor}", f"tor-{tor}", "south")
            net.address("node-1", f"up{tor}", [f"10.0.{tor}.1/31", f"fd00:0:{tor}::1/127"])
            net.address(f"tor-{tor}", "south", [f"10.0.{tor}.0/31", f"fd00:0:{tor}::/127"])
        usable(net, "node-1", "tor-1", "tor-2")
        fd = os.open(net.path("node-1"), os.O_RDONLY)
        with netns.inside(fd):
            self.kernel = Kernel()
        self._fd = fd
        links = {link.name: link.index for link in self.read().links.values()}
        self.v4 = tuple(NextHop(f"10.0.{tor}.0", links[f"up{tor}"]) for tor in (1, 2))
        self.v6 = tuple(NextHop(f"fd00:0:{tor}::", links[f"up{tor}"]) for tor in (1, 2))

    def read(self) -> KernelState:
        with netns.inside(self._fd):
            return self.kernel.read()

    def apply(self, plan: Plan) -> tuple[Failure, ...]:
        """Until nothing is left to do, or what is left is refused."""
        failures: tuple[Failure, ...] = ()
        for _ in range(4):
            operations = delta(plan, self.read())
            if not operations:
                return ()
            with netns.inside(self._fd):
                failures = asyncio.run(self.kernel.apply(operations))
            if len(failures) == len(operations):
                break
        return failures

    def routes(self, family: str = "-4") -> list[str]:
        """The main table as ``ip route`` says it, but for what the kernel makes of addresses."""
        out = self.net.run("node-1", ["ip", family, "route", "show", "table", "main"]).stdout
        lines = (re.sub(r"\s+", " ", line).strip() for line in out.splitlines())
        return sorted(line for line in lines if "proto kernel" not in line)

    def close(self) -> None:
        self.kernel.close()
        os.close(self._fd)


@pytest.fixture
def node(net: Net) -> Iterator[Node]:
    made = Node(net)
    yield made
    made.close()


def test_blackholes(node: Node) -> None:
    assert node.apply(plan_of(block("10.244.1.0/26"), block("fd00:10:244::40/122"))) == ()
    assert node.routes() == ["blackhole 10.244.1.0/26 proto 142 metric 512"]
    assert node.routes("-6") == ["blackhole fd00:10:244::40/122 dev lo proto 142 metric 512 pref medium"]
    assert node.apply(plan_of()) == ()
    assert node.routes() == [] == node.routes("-6")


def test_imports_through_one_next_hop_carry_their_source(node: Node) -> None:
    wanted = plan_of(
        imported("10.244.2.0/26", node.v4[0], src="10.0.1.1"),
        imported("fd00:10:244::80/122", node.v6[1], src="fd00:0:2::1"),
    )
    assert node.apply(wanted) == ()
    assert node.routes() == ["10.244.2.0/26 via 10.0.1.0 dev up1 proto 143 src 10.0.1.1 metric 2048"]
    assert node.routes("-6") == [
        "fd00:10:244::80/122 via fd00:0:2:: dev up2 proto 143 src fd00:0:2::1 metric 2048 pref medium"
    ]


def test_equal_paths_are_a_group_and_come_and_go_as_one_route(node: Node) -> None:
    single = plan_of(imported("10.244.2.0/26", node.v4[0]), imported("fd00:10:244::80/122", node.v6[0]))
    double = plan_of(imported("10.244.2.0/26", *node.v4), imported("fd00:10:244::80/122", *node.v6))
    for wanted, hops in ((single, 1), (double, 2), (single, 1), (double, 2)):
        assert node.apply(wanted) == ()
        state = node.read()
        assert {key: i.route for key, i in state.routes.items()} == wanted.routes
        assert len(state.groups) == (2 if hops == 2 else 0), "an unused group stays"
        assert len(state.nexthops) == (4 if hops == 2 else 0), "an unused nexthop stays"
    shown = node.net.run("node-1", ["ip", "route", "get", "10.244.2.1"]).stdout
    assert "via 10.0." in shown


def test_applying_twice_is_silent(node: Node) -> None:
    wanted = plan_of(
        block("10.244.1.0/26"),
        block("fd00:10:244::40/122"),
        imported("10.244.2.0/26", *node.v4, src="10.0.1.1"),
        imported("10.244.3.0/26", node.v4[0], src="10.0.1.1"),
        imported("fd00:10:244::80/122", *node.v6, src="fd00:0:1::1"),
        imported("fd00:10:244::c0/122", node.v6[0]),
        sysctls={"net.ipv4.conf.up1.rp_filter": "2"},
    )
    assert node.apply(wanted) == ()
    assert delta(wanted, node.read()) == ()
    heard = Heard(node)
    try:
        eventually(lambda: heard.marks(1))
        node.kernel.forget()
        assert node.apply(wanted) == ()
        eventually(lambda: heard.marks(2))
    finally:
        heard.stop()
    between = heard.text.split("192.0.2.2")[0].split("192.0.2.1")[-1]
    assert [line for line in between.splitlines() if "proto 14" in line or "nexthop" in line] == []


class Heard:
    """``ip monitor`` in the node. A mark is a foreign route made and removed, which it must tell."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.text = ""
        self._process = node.net.spawn(
            "node-1",
            ["stdbuf", "-oL", "ip", "monitor", "route", "nexthop"],
            log=node.net.path("node-1").with_suffix(".monitor"),
        )

    def marks(self, number: int) -> bool:
        self.node.net.ip("node-1", [f"route add 192.0.2.{number} dev lo", f"route del 192.0.2.{number} dev lo"])
        self.text = (self.node.net.path("node-1").with_suffix(".monitor")).read_text()
        return f"192.0.2.{number}" in self.text

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def test_carrier_loss_moves_the_route_and_mending_brings_the_member_back(node: Node) -> None:
    wanted = plan_of(imported("10.244.2.0/26", *node.v4), imported("fd00:10:244::80/122", *node.v6))
    assert node.apply(wanted) == ()
    node.net.ip("tor-1", ["link set south down"])

    def kernel_dropped_it() -> bool:
        state = node.read()
        return all(len(i.route.nexthops) == 1 for i in state.routes.values()) and len(state.routes) == 2

    eventually(kernel_dropped_it)
    # What the plan says now: the other next hop alone, as a plain route.
    assert node.apply(plan_of(imported("10.244.2.0/26", node.v4[1]), imported("fd00:10:244::80/122", node.v6[1]))) == ()
    assert node.routes() == ["10.244.2.0/26 via 10.0.2.0 dev up2 proto 143 metric 2048"]
    node.net.ip("tor-1", ["link set south up"])
    eventually(lambda: all(link.carrier for link in node.read().links.values()))
    assert node.apply(wanted) == ()
    assert {len(i.route.nexthops) for i in node.read().routes.values()} == {2}


def test_a_link_that_flaps_without_us_keeps_its_plain_route(node: Node) -> None:
    assert node.apply(plan_of(imported("10.244.2.0/26", node.v4[0]), imported("fd00:10:244::80/122", node.v6[0]))) == ()
    before = node.routes(), node.routes("-6")
    node.net.ip("tor-1", ["link set south down"])
    eventually(lambda: "linkdown" in "".join(node.routes()))
    node.net.ip("tor-1", ["link set south up", "addr replace fd00:0:1::/127 dev south nodad"])
    eventually(lambda: (node.routes(), node.routes("-6")) == before)


@pytest.mark.parametrize("foreign", ["via 10.0.2.0 proto 4", "via 10.0.2.0 proto 186", "dev up2 proto 3"])
def test_a_foreign_route_is_never_replaced_nor_removed(node: Node, foreign: str) -> None:
    node.net.ip("node-1", [f"route add 10.244.2.0/26 {foreign} metric 2048"])
    node.net.ip("node-1", ["route add blackhole 10.244.1.0/26 proto 4 metric 512"])
    node.net.ip("node-1", ["route add fd00:10:244::80/122 via fd00:0:2:: proto 186 metric 2048"])
    before = node.routes(), node.routes("-6")
    failures = node.apply(
        plan_of(
            block("10.244.1.0/26"),
            imported("10.244.2.0/26", node.v4[0]),
            imported("10.244.3.0/26", node.v4[0]),
            imported("fd00:10:244::80/122", node.v6[0]),
        )
    )
    assert sorted(d.explain(f)[0] for f in failures) == ["ForeignRoute"] * 3
    # The others go on, and what is foreign is as it was, also after all of ours is gone again.
    assert "10.244.3.0/26 via 10.0.1.0 dev up1 proto 143 metric 2048" in node.routes()
    assert node.apply(plan_of()) == ()
    assert (node.routes(), node.routes("-6")) == before


def test_only_our_numbers_are_seen_and_pod_routes_are_never_deleted(node: Node) -> None:
    node.net.ip(
        "node-1",
        [
            "link add ulpod type veth peer name podend",
            "link set podend up",
            f"link set ulpod up group {LINK_GROUP}",
            "route add 10.244.1.5/32 dev ulpod scope link proto 141 metric 32",
            "route add fd00:10:244::45/128 dev ulpod proto 141 metric 32",
            "route add default via 10.0.1.0 proto static",
            "route add 10.244.9.0/26 via 10.0.1.0 table 100 proto 143",
        ],
    )
    state = node.read()
    assert sorted(state.routes) == [("10.244.1.5/32", PROTO_PODS, METRIC_PODS), ("fd00:10:244::45/128", PROTO_PODS, 32)]
    before = node.routes()
    assert node.apply(plan_of()) == ()
    assert node.routes() == before
    assert "10.244.9.0/26" in node.net.run("node-1", ["ip", "route", "show", "table", "100"]).stdout
    # A pod's route that we write is the one that the CNI server writes.
    present = tuple(i.route for i in state.routes.values())
    node.net.ip("node-1", ["route del 10.244.1.5/32", "route del fd00:10:244::45/128"])
    assert node.apply(plan_of(*present)) == ()
    assert node.routes() == before


def test_nothing_goes_before_its_sources_have_reported(node: Node) -> None:
    wanted = plan_of(block("10.244.1.0/26"), imported("10.244.2.0/26", *node.v4))
    assert node.apply(wanted) == ()
    before = node.routes()
    assert node.apply(plan_of(deletable=frozenset())) == ()
    assert node.routes() == before
    assert node.apply(plan_of(deletable=frozenset({(PROTO_BLOCKS, "ipv4 unicast")}))) == ()
    assert not any(r.startswith("blackhole") for r in node.routes())
    assert any(r.startswith("10.244.2.0/26") for r in node.routes())


def test_a_foreign_nexthop_in_our_range_is_left_alone(node: Node) -> None:
    node.net.ip("node-1", [f"nexthop add id {0x554C0001} via 10.0.1.0 dev up1 proto 186"])
    assert node.apply(plan_of(imported("10.244.2.0/26", *node.v4))) == ()
    assert node.apply(plan_of()) == ()
    assert f"id {0x554C0001} " in node.net.run("node-1", ["ip", "nexthop"]).stdout


def test_ipv4_over_an_ipv6_next_hop(node: Node) -> None:
    """RFC 8950: alone in the route, and in a group."""
    assert node.apply(plan_of(imported("10.244.2.0/26", node.v6[0]), imported("10.244.3.0/26", *node.v6))) == ()
    assert "10.244.2.0/26 via inet6 fd00:0:1:: dev up1 proto 143 metric 2048" in node.routes()


def test_sysctls_are_set_and_a_missing_one_is_a_failure_by_name(node: Node) -> None:
    wanted = plan_of(
        block("10.244.1.0/26"),
        sysctls={"net.ipv4.conf.up1.rp_filter": "2", "net.ipv4.conf.gone.rp_filter": "2"},
    )
    failures = node.apply(wanted)
    assert [d.explain(f) for f in failures] == [
        ("KernelRefused", "setting net.ipv4.conf.gone.rp_filter to 2: No such file or directory")
    ]
    assert node.read().sysctls["net.ipv4.conf.up1.rp_filter"] == "2"
    assert node.routes() == ["blackhole 10.244.1.0/26 proto 142 metric 512"], "a failure stops nothing else"


def test_state_of_links_and_addresses(node: Node) -> None:
    node.net.ip("node-1", ["addr add 10.9.0.1 peer 10.9.0.2/32 dev up1", "link set up2 down"])
    state = node.read()
    assert {(a.address, a.subnet) for a in state.addresses if a.interface == node.v4[0].interface} == {
        ("10.0.1.1", "10.0.1.0/31"),
        ("10.9.0.1", "10.9.0.2/32"),
        ("fd00:0:1::1", "fd00:0:1::/127"),
    }
    assert {link.name: (link.up, link.carrier) for link in state.links.values()} == {
        "lo": (True, True),
        "up1": (True, True),
        "up2": (False, False),
    }


def test_news_name_what_changed(node: Node) -> None:
    node.read()
    assert node.kernel.news() is False
    node.net.ip("node-1", ["route add 192.0.2.0/24 dev up1"])
    assert node.kernel.news() is False, "a foreign route is none of our business"
    node.net.ip("node-1", ["route add blackhole 10.244.1.0/26 proto 142 metric 512"])
    assert node.kernel.news() is True
    assert ("10.244.1.0/26", PROTO_BLOCKS, 512) in node.read().routes
    node.net.ip("node-1", ["link set up1 down"])
    assert node.kernel.news() is True
    assert not node.read().links[node.v4[0].interface].up


def test_lost_news_are_news_of_everything(node: Node) -> None:
    node.read()
    lines = [f"route add blackhole 10.{i >> 8}.{i & 255}.0/24 proto 142 metric 512" for i in range(1 << 8, 28 << 8)]
    node.net.ip("node-1", lines)
    assert node.kernel.news() is True
    assert len(node.read().routes) == len(lines)
