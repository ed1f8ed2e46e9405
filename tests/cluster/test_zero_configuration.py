"""A cluster on one segment for which nothing is configured: ``kubectl apply -k manifests/``, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial

import pytest

from tests.cluster.cluster import NAMESPACE, Cluster
from tests.cluster.netpods import PORT, at_once, netpods, server
from tests.conftest import eventually

#: kubeadm leaves its configuration, and podCIDRs as k3s does. Each takes a cluster of its own.
SHAPES = {
    "kubeadm": ("--installer", "kubeadm"),
    "kubeadm-ipv6": ("--installer", "kubeadm", "--ipv6-only"),
    "k3s": ("--installer", "k3s"),
}
POOLS = {
    "kubeadm": {"default-ipv4": ("10.244.0.0/16", 26), "default-ipv6": ("fd00:10:244::/112", 122)},
    "kubeadm-ipv6": {"default-ipv6": ("fd00:10:244::/112", 122)},
    "k3s": {"default-ipv4": ("10.244.0.0/16", 0), "default-ipv6": ("fd00:10:244::/112", 0)},
}
NODES = ("node-1", "node-2")


@pytest.mark.parametrize("shape", SHAPES if os.environ.get("UNDERLAY_LONG") else [s for s in SHAPES if s != "k3s"])
def test_pods_of_two_nodes_reach_each_other_by_every_family(bare: Callable[..., Cluster], shape: str) -> None:
    cluster = bare("--mesh", "--nodes", "2", *SHAPES[shape])
    cluster.kubectl("apply", "-k", "manifests/")
    families = len(POOLS[shape])
    with netpods(cluster, "zero") as net:
        for node in NODES:
            net.apply("Pod", f"on-{node}", server(nodeSelector={"kubernetes.io/hostname": node}))
        web = [pod for node in NODES for pod in net.pods(f"on-{node}", 1)]
        assert [len(pod.addresses) for pod in web] == [families] * 2

        def checks(name: str) -> list[dict[str, object]]:
            return [{"kind": "http", "host": a, "port": PORT} for p in web if p.name != name for a in p.addresses]

        def reach() -> bool:
            said = at_once([partial(net.dial, pod, checks(pod.name)) for pod in web])
            found = [[answer.get("hostname") for answer in one] for one in said]
            assert found == [[web[1].name] * families, [web[0].name] * families], said
            return True

        eventually(reach)  # a pod does not wait for the mesh

    made = {p["metadata"]["name"]: p for p in cluster.get("ippools")}
    assert {n: (p["spec"]["cidr"], p["spec"].get("blockSize", 0)) for n, p in made.items()} == POOLS[shape]
    assert {p["spec"].get("usePodCIDRs", False) for p in made.values()} == {shape == "k3s"}
    assert {p["metadata"]["generation"] for p in made.values()} == {1}
    record = cluster.get("configmap", "-n", NAMESPACE, "underlay-first-pools")[0]["data"]
    assert record["source"] == ("the Nodes' podCIDRs" if shape == "k3s" else "kubeadm's podSubnet")
    eventually(lambda: cluster.not_ready() == [])

    def told() -> bool:
        said = [s["status"] for s in cluster.get("bgpnodestatuses")]
        assert [s.get("conditions", []) for s in said] == [[], []], json.dumps(said)
        assert [[session["state"] for session in s["sessions"]] for s in said] == [["Established"] * families] * 2
        assert len({s["routerID"] for s in said}) == 2
        return True

    eventually(told)
    if "--ipv6-only" in SHAPES[shape]:
        for node in NODES:
            addresses = json.loads(cluster.node_exec(node, "ip", "-4", "-j", "address"))
            assert [one["ifname"] for one in addresses if one.get("addr_info")] == ["lo"], addresses
        assert cluster.get("service", "kubernetes")[0]["spec"]["clusterIPs"] == ["fd00:10:97::1"]
