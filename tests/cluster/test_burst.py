"""Many pods at once: what all of Underlay asks the API server for then, by the API server's own audit log."""

from __future__ import annotations

import asyncio
import random
import time

from bench.burst import Pods
from bench.cluster import told
from lab.kube.audit import Asked
from store.clock import SystemClock
from store.kubeaccess import find_access
from store.kubehttp import Http, Limits
from tests.cluster.cluster import NAMESPACE, Cluster

NODES = ("node-1", "node-2")
#: Pods of each node. All of them stand in a handful of writes; one write a pod is what a store asked at each ADD costs.
EACH = 15
MOST = 0.8
#: Seconds for pods to come, or to go; and after it until what they asked for is in the log (a mirror is written within
#: 0.2 s, blocks are given back 5 s after they were withdrawn).
LIMIT, AFTER = 300.0, 8.0


def test_pods_cost_the_api_server_less_than_a_request_each(cluster: Cluster) -> None:
    wanted = {f"burst-{node}-{i}": node for i in range(EACH) for node in NODES}
    began, between, addresses = asyncio.run(_burst(cluster, wanted))
    assert len(addresses) == len({a for pair in addresses for a in pair}) / 2 == len(wanted)
    asked = [r for r in _by_us(cluster) if r.at >= began]
    starts, ends = [r for r in asked if r.at < between], [r for r in asked if r.at >= between]
    print(f"{len(wanted)} pods: {len(starts)} requests as they started ({told(starts)})")
    print(f"{len(ends)} as they ended ({told(ends)})")
    assert any(r.resource == "ipamblocks" and r.writes for r in starts), "the store was told of none of them"
    assert len(starts) <= MOST * len(wanted), told(starts)
    assert len(ends) <= MOST * len(wanted), told(ends)


async def _burst(cluster: Cluster, wanted: dict[str, str]) -> tuple[float, float, list[tuple[str, ...]]]:
    """When they were asked for, when they were deleted, and the addresses of each."""
    clock = SystemClock()
    access = find_access(cluster.environment["KUBECONFIG"])
    http = Http(access, clock, random.Random(), Limits(request=LIMIT, patience=LIMIT))
    pods = Pods(http, clock, "burst")
    try:
        await pods.begin(limit=60)
        began = time.time()
        await pods.start(wanted, limit=LIMIT)
        await clock.sleep(AFTER)
        addresses, between = [pods.addresses(name) for name in wanted], time.time()
        await pods.delete(wanted, limit=LIMIT)
        await clock.sleep(AFTER)
    finally:
        await pods.end()
        await http.close()
    cluster.kubectl("delete", "namespace", "burst", "--wait=false")
    return began, between, addresses


def _by_us(cluster: Cluster) -> list[Asked]:
    return [r for r in cluster.audit_log.requests() if r.user.startswith(f"system:serviceaccount:{NAMESPACE}:")]
