"""A node of which somebody says that it has no network (a route controller, a network that was here before)."""

from __future__ import annotations

import json
import time

from lab.kube.audit import count
from tests.cluster.cluster import NAMESPACE, Cluster, Wire
from tests.conftest import eventually

KIND = "NetworkUnavailable"
TAINT = "node.kubernetes.io/network-unavailable"
NODE = "node-2"
LIMIT = 60


def test_a_node_that_is_said_to_have_no_network_takes_pods_again(cluster: Cluster) -> None:
    """With the agent stopped the node is tainted; as soon as it goes on, condition and taint are gone by themselves."""

    def node() -> Wire:
        return cluster.get("node", NODE)[0]

    def condition() -> Wire:
        return next((c for c in node()["status"]["conditions"] if c["type"] == KIND), {})

    def taints() -> list[str]:
        return [taint["key"] for taint in node()["spec"].get("taints", [])]

    assert condition() == {} or condition()["status"] == "False"
    began = time.time()
    said = {"type": KIND, "status": "True", "reason": "CalicoIsDown", "message": "Calico is shutting down on this node"}
    patch = json.dumps({"status": {"conditions": [said]}})
    agent = cluster.node_exec(NODE, "pgrep", "-f", "bin/underlay-agent").split()
    cluster.node_exec(NODE, "kill", "-STOP", *agent)
    try:
        cluster.kubectl("patch", "node", NODE, "--subresource=status", "--type=strategic", "-p", patch)
        eventually(lambda: TAINT in taints(), limit=LIMIT)
    finally:
        cluster.node_exec(NODE, "kill", "-CONT", *agent)
    eventually(lambda: condition()["status"] == "False", limit=LIMIT)
    assert condition()["reason"] == "UnderlayIsUp"
    eventually(lambda: taints() == [], limit=LIMIT)

    def who() -> bool:
        user = f"system:serviceaccount:{NAMESPACE}:underlay-agent"
        asked = [r for r in cluster.audit_log.requests(began) if (r.resource, r.subresource) == ("nodes", "status")]
        writes = count((r for r in asked if r.user == user), "node", "name", "code")
        # 409: the kubelet wrote just then.
        assert {(node, name) for node, name, _ in writes} == {(NODE, NODE)}
        assert set(writes) <= {(NODE, NODE, "200"), (NODE, NODE, "409")}
        assert writes[NODE, NODE, "200"] == 1
        return True

    eventually(who)
