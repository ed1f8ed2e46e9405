"""What of the kernel's news wakes the agent: a sysctl that somebody writes does, a pod that comes does not."""

from __future__ import annotations

import pytest

from agent.kernel.monitor import LINKS, KernelMonitor
from cni.marks import LINK_GROUP
from lab.net import Net


@pytest.mark.parametrize(
    ("key", "urgent"),
    [
        ("net.ipv4.conf.up0.rp_filter", True),
        ("net.ipv4.conf.all.rp_filter", True),
        ("net.ipv4.conf.up0.ignore_routes_with_linkdown", True),
        ("net.ipv6.conf.up0.ignore_routes_with_linkdown", True),
        ("net.ipv4.ip_forward", True),
        ("net.ipv4.conf.up0.proxy_arp", False),
    ],
)
def test_a_sysctl_that_the_plan_looks_at_is_urgent_when_it_is_written(net: Net, key: str, urgent: bool) -> None:
    net.add("node")
    net.ip("node", ["link add name up0 type veth peer name far"])
    with net.inside("node"):
        monitor = KernelMonitor()
    try:
        net.sysctl("node", {key: "1"})
        news = monitor.read()
        assert (news.changed, news.urgent) == (frozenset(), urgent)
        # As it is already: nothing is told.
        net.sysctl("node", {key: "1"})
        assert not monitor.read().urgent
    finally:
        monitor.close()


def test_a_pod_that_comes_wakes_nobody(net: Net) -> None:
    net.add("node")
    net.add("pod")
    with net.inside("node"):
        monitor = KernelMonitor()
    try:
        peer = f"netns {net.path('pod')}"
        net.ip("node", [f"link add name ul1 group {LINK_GROUP} type veth peer name eth0 {peer}"])
        net.ip("node", ["link set dev ul1 up"])
        news = monitor.read()
        assert (news.changed, news.urgent) == (frozenset({LINKS}), False)
    finally:
        monitor.close()
