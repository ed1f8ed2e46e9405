"""Pod routes (R10): the CNI server writes them, here they are only repaired. Pure."""

from __future__ import annotations

from typing import Final

from agent.fib import NextHop, Route
from agent.plan.model import Snapshot
from cni.marks import LINK_GROUP, METRIC_PODS, PROTO_PODS

#: Seconds that a pod's route must have been missing before it is repaired: the CNI server may be at work (R10).
REPAIR_AFTER: Final = 2.0


def missing_pod_routes(snapshot: Snapshot) -> dict[str, Route]:
    """Routes that the store says and the kernel lacks, of pods whose veth is there and not about to be deleted."""
    kernel = snapshot.kernel
    veths = {link.name: link.index for link in kernel.links.values() if link.group == LINK_GROUP}
    found: dict[str, Route] = {}
    for block in snapshot.cluster.blocks if veths else ():
        for allocation in block.status.allocations:
            address = allocation.address
            prefix = f"{address}/{128 if ':' in address else 32}"
            if (prefix, PROTO_PODS, METRIC_PODS) in kernel.routes:
                continue
            index = veths.get(snapshot.link_name(allocation.container, allocation.interface))
            if index is not None:
                found[address] = Route(
                    prefix=prefix, protocol=PROTO_PODS, metric=METRIC_PODS, nexthops=(NextHop("", index),)
                )
    return found


def overdue(address: str, snapshot: Snapshot) -> bool:
    """Missing for long enough that nobody else can be about to write it."""
    return snapshot.now >= snapshot.missing.get(address, snapshot.now) + REPAIR_AFTER
