"""A node's routing: our agent and speaker against BIRD doing the same side by side (``bench/routers.py``), the kernel's
part against the same in C (``bench/routes.c``), and how long a plan takes.

What is waited for is always in a kernel: a route in its table, or a packet that arrived.
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Final

from agent.delta import AddRoute, DeleteRoute
from agent.fib import NextHop, Route
from agent.kernel.state import Kernel
from bench import planned
from bench.routers import FAR_ADDRESS, LIMIT, NODES, TORS, BenchError, Rack
from cni.marks import METRIC_IMPORTS, PROTO_IMPORTS
from cni.netlink import Monitor
from lab.net import Net

#: New blocks, cuts of a link, loads of a full table, for each of the two; and rounds of the kernel's part.
ANNOUNCED, CUTS, LOADS, ROUNDS = 40, 6, 3, 5
#: Routes of a full table.
TABLE: Final = 100_000
#: Packets a second of each flow, and flows, so that both links carry some.
RATE, FLOWS = 1000, 8
PORT: Final = 7009
_ROUTE_GROUP = 7  # RTNLGRP_IPV4_ROUTE


def figures(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """``bgp.*``. Raises BenchError."""
    folder.mkdir(parents=True)
    return measure(folder, say)


def measure(
    folder: Path,
    say: Callable[[str], None],
    *,
    announced: int = ANNOUNCED,
    cuts: int = CUTS,
    loads: int = LOADS,
    rounds: int = ROUNDS,
    table: int = TABLE,
) -> dict[str, float]:
    """The same with other sizes."""
    found: dict[str, float] = {}
    say("bgp: 5,000 prefixes planned")
    found |= planned.figures()
    with closing(Net(folder / "kernel")) as net:
        say(f"bgp: {table} routes into a kernel and out, against C, {rounds} rounds")
        found |= kernel_against_c(net, folder, rounds, table)
    with closing(Net(folder / "net")) as net:
        rack = Rack(net, folder / "rack", prefixes(table))
        say(f"bgp: {announced} blocks announced by us and by BIRD")
        found |= announcements(rack, announced)
        say(f"bgp: a link cut, {cuts} times each")
        found |= reroutes(rack, cuts)
        say(f"bgp: {table} routes received, installed and withdrawn, {loads} times each")
        found |= tables(rack, loads, table)
    return found


def prefixes(count: int) -> Iterator[str]:
    """Prefixes of a table, all in the pool."""
    return (f"10.{64 + (i >> 14)}.{(i >> 6) & 255}.{(i & 63) * 4}/30" for i in range(count))


# -- against BIRD --------------------------------------------------------------------------------------------------


def announcements(rack: Rack, count: int) -> dict[str, float]:
    """From the wish that a block be announced to the ToR's kernel: from the store, and from BIRD's kernel."""
    times: dict[str, list[float]] = {node: [] for node in NODES}
    with rack.net.inside(TORS[0]):
        monitor = Monitor((_ROUTE_GROUP,))
    with closing(monitor):
        for _ in range(count):
            for node in NODES:
                cidr = rack.next_block(node)
                begin = time.perf_counter()
                rack.announce(node, cidr)
                _hear(monitor, socket.inet_aton(cidr.partition("/")[0]))
                times[node].append(time.perf_counter() - begin)
    ours, theirs = (median(times[node]) for node in NODES)
    return {
        "bgp.announce.vs_bird": ours / theirs,
        "bgp.announce.p50_ms": 1000 * ours,
        "bird.announce.p50_ms": 1000 * theirs,
    }


def _hear(monitor: Monitor, address: bytes) -> None:
    end = time.monotonic() + LIMIT
    readable = select.poll()
    readable.register(monitor, select.POLLIN)
    while time.monotonic() < end:
        if readable.poll(1000) and any(address in message.body for message in monitor.read()):
            return
    raise BenchError(f"{socket.inet_ntoa(address)} did not come into the ToR's kernel in {LIMIT:.0f} s")


def reroutes(rack: Rack, count: int) -> dict[str, float]:
    """For how long packets to the far machine are lost when one of two links loses its carrier: the longest of the
    flows, by the packets that did not arrive."""
    lost: dict[str, list[float]] = {node: [] for node in NODES}
    for number in range(count):
        for node in NODES:
            tor = TORS[number % 2]
            rack.until(lambda node=node: rack.hops(node) == 2, f"{node} has both ways again")
            lost[node].append(max(_flows(rack, node, tor)) / RATE)
            rack.link(node, tor, up=True)
    for node in NODES:
        rack.until(lambda node=node: rack.hops(node) == 2, f"{node} has both ways again")
    ours, theirs = (median(lost[node]) for node in NODES)
    return {
        # Half a packet's time for none: what is not seen is not nothing.
        "bgp.reroute.vs_bird": max(ours, 0.5 / RATE) / max(theirs, 0.5 / RATE),
        "bgp.reroute.lost_ms": 1000 * ours,
        "bgp.reroute.lost_most_ms": 1000 * max(lost["node-u"]),
        "bird.reroute.lost_ms": 1000 * theirs,
    }


def _flows(rack: Rack, node: str, tor: str) -> list[int]:
    """Packets lost of each flow, one second through, with a cut after the first third."""
    with ExitStack() as stack:
        with rack.net.inside("far"):
            sink = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sink.bind((FAR_ADDRESS, PORT))
        sink.setblocking(False)
        with rack.net.inside(node):
            sources = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(FLOWS)]
        for source in sources:
            source.setblocking(False)
        arrived: list[set[bytes]] = [set() for _ in range(FLOWS)]
        begin = time.perf_counter()
        for tick in range(RATE):
            if tick == RATE // 3:
                rack.link(node, tor, up=False)
            for flow, source in enumerate(sources):
                try:
                    source.sendto(bytes([flow]) + tick.to_bytes(2, "big"), (FAR_ADDRESS, PORT))
                except OSError:
                    continue  # no route, or a full queue: it is lost
            while time.perf_counter() < begin + (tick + 1) / RATE:
                _take(sink, arrived)
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            _take(sink, arrived)
    return [RATE - len(packets) for packets in arrived]


def _take(sink: socket.socket, arrived: list[set[bytes]]) -> None:
    try:
        packet = sink.recv(16)
    except BlockingIOError:
        return
    arrived[packet[0]].add(packet)


def tables(rack: Rack, count: int, size: int) -> dict[str, float]:
    """From the ToR's first route to the last in the node's kernel, and the same out again."""
    times: dict[tuple[str, bool], list[float]] = {(node, on): [] for node in NODES for on in (True, False)}
    for _ in range(count):
        for node in NODES:
            before = _prefixes(rack.net, node)
            for on in (True, False):
                wanted = before + size if on else before
                begin = time.perf_counter()
                rack.load(node, on=on)
                there = lambda node=node, wanted=wanted: _prefixes(rack.net, node) == wanted  # noqa: E731
                rack.until(there, f"{node} has {wanted} routes", every=0.01)
                times[node, on].append(time.perf_counter() - begin)
    middle = {key: median(values) for key, values in times.items()}
    return {
        "bgp.table_in.vs_bird": middle["node-u", True] / middle["node-b", True],
        "bgp.table_out.vs_bird": middle["node-u", False] / middle["node-b", False],
        "bgp.table_in_s": middle["node-u", True],
        "bgp.table_out_s": middle["node-u", False],
        "bird.table_in_s": middle["node-b", True],
        "bird.table_out_s": middle["node-b", False],
    }


def _prefixes(net: Net, name: str) -> int:
    """How many prefixes the kernel's main table has in IPv4, without reading them (fib_triestat)."""
    with net.inside(name):
        text = Path("/proc/thread-self/net/fib_triestat").read_text()
    found = re.search(r"^Main:.*?Prefixes:\s+(\d+)", text, re.MULTILINE | re.DOTALL)
    return int(found[1]) if found else 0


# -- the kernel's part, against C ----------------------------------------------------------------------------------


def kernel_against_c(net: Net, folder: Path, rounds: int, count: int) -> dict[str, float]:
    """Routes from Python's objects into the kernel and out, against a C program that does nothing else."""
    program = folder / "routes"
    source = Path(__file__).with_name("routes.c")
    subprocess.run(["gcc", "-O2", "-o", str(program), str(source)], check=True, capture_output=True)
    net.add("node", forwarding=True)
    net.add("tor")
    net.link("node", "up0", "tor", "down0")
    net.address("node", "up0", ["10.1.0.1/31"])
    with net.inside("node"):
        index = socket.if_nametoindex("up0")
        kernel = Kernel()
    hops = (NextHop("10.1.0.0", index),)
    routes = [
        Route(prefix=p, protocol=PROTO_IMPORTS, metric=METRIC_IMPORTS, nexthops=hops, src="10.1.0.1")
        for p in prefixes(count)
    ]
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with closing(kernel):
        for _ in range(rounds):
            said = net.run("node", [str(program), "10.1.0.0", "10.1.0.1", str(index), str(count)]).stdout.split()
            theirs.append((float(said[0]), float(said[1])))
            ours.append(asyncio.run(_through(kernel, routes)))
    into, out = ([(u[i], c[i]) for u, c in zip(ours, theirs, strict=True)] for i in (0, 1))
    return {
        "kernel.routes_in.vs_c": median(u / c for u, c in into),
        "kernel.routes_out.vs_c": median(u / c for u, c in out),
        "kernel.routes_in.per_second": count / median(u for u, _ in into),
        "kernel.routes_out.per_second": count / median(u for u, _ in out),
    }


async def _through(kernel: Kernel, routes: list[Route]) -> tuple[float, float]:
    begin = time.perf_counter()
    refused = await kernel.apply([AddRoute(route) for route in routes])
    middle = time.perf_counter()
    refused += await kernel.apply([DeleteRoute(route) for route in routes])
    end = time.perf_counter()
    if refused:
        raise BenchError(f"the kernel refused {len(refused)} of {len(routes)} routes: {refused[0].message}")
    return middle - begin, end - middle
