"""A pod's first TCP connection, begun as soon as its ADD was answered: to a server on its node, and to one behind the
node's uplink.

The servers are listening sockets and nothing more: the kernel shakes hands, and says whether a SYN had to be repeated.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.plugins import POOL4, POOL6, SUBNET, Plugin, ptp, underlay
from bench.stats import Times
from lab.net import Net

NODES = ("node-u", "node-p")
ROUTER = "router"
PORT = 7000
#: Seconds; a repeated SYN leaves after one.
LIMIT = 5.0
#: Of struct tcp_info (include/uapi/linux/tcp.h).
TOTAL_RETRANS = struct.Struct("=100xI")


class First(NamedTuple):
    """From the ADD's answer until it is established, with the socket's making; ``lost``: a packet was repeated."""

    seconds: float
    lost: bool


def figures(net: Net, folder: Path, pods: int, shim: Path) -> dict[str, float]:
    """``cni.first_syn.*`` and ``cni.first_connect.*``, of dual-stack pods in turn over IPv4 and IPv6, near and far; and
    ptp's, over IPv4."""
    with ExitStack() as stack:
        for server in (_rack(net), *NODES):
            stack.enter_context(_listen(net, server))
        us = underlay(net, NODES[0], folder / "underlay", {"pods-v4": POOL4, "pods-v6": POOL6}, shim=shim)
        them = ptp(net, NODES[1], folder / "ptp")
        ours = [("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6)]
        ours += [("192.0.2.254", socket.AF_INET), ("2001:db8::254", socket.AF_INET6)]
        theirs = [("198.51.100.1", socket.AF_INET), ("198.51.100.254", socket.AF_INET)]
        found = {"cni": _connect(net, us, "us", pods, ours), "ptp": _connect(net, them, "them", pods, theirs)}
    figures: dict[str, float] = {}
    for key, connections in found.items():
        times = Times(tuple(each.seconds for each in connections))
        figures |= {
            f"{key}.first_syn.lost_of_{pods}": sum(each.lost for each in connections),
            f"{key}.first_connect.p50_ms": 1000 * times.p50,
            f"{key}.first_connect.p99_ms": 1000 * times.p99,
            f"{key}.first_connect.most_ms": 1000 * max(times.values),
        }
    return figures


def _connect(
    net: Net, plugin: Plugin, name: str, pods: int, servers: list[tuple[str, socket.AddressFamily]]
) -> list[First]:
    found = []
    for i, (address, family) in zip(range(pods), itertools.cycle(servers)):
        pod = f"{name}-{i}"
        net.add(pod)
        plugin.run("ADD", pod)
        begin = time.perf_counter()
        with net.inside(pod):
            client = socket.socket(family, socket.SOCK_STREAM)
        with client:
            client.settimeout(LIMIT)
            try:
                client.connect((address, PORT))
            except TimeoutError:
                found.append(First(LIMIT, lost=True))
            else:
                seconds = time.perf_counter() - begin
                (again,) = TOTAL_RETRANS.unpack(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))
                found.append(First(seconds, lost=again > 0))
        plugin.run("DEL", pod)
        net.remove(pod)
    return found


def _rack(net: Net) -> str:
    """Both nodes behind one router, which knows a route to their pods."""
    net.add(ROUTER, forwarding=True)
    for node, four, six, pods in (
        (NODES[0], "192.0.2", "2001:db8:", (POOL4, POOL6)),
        (NODES[1], "198.51.100", "2001:db8:1:", (SUBNET,)),
    ):
        net.add(node, forwarding=True)
        net.link(node, "up0", ROUTER, node)
        net.address(node, "up0", [f"{four}.1/24", f"{six}:1/64"])
        net.address(ROUTER, node, [f"{four}.254/24", f"{six}:254/64"])
        net.ip(ROUTER, [f"route add {each} via {six + ':1' if ':' in each else four + '.1'}" for each in pods])
        # Node and router know each other, as they do where a node is at work.
        net.run(node, ["ping", "-c", "1", "-W", "2", f"{four}.254"])
        net.run(node, ["ping", "-c", "1", "-W", "2", f"{six}:254"])
    return ROUTER


def _listen(net: Net, name: str) -> socket.socket:
    """Takes what comes over either family; as many as there may be pods wait in its queue."""
    with net.inside(name):
        return socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
