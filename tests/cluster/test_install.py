"""``kubectl apply -k manifests/`` on a fresh cluster: how the session's cluster came to be, and what it does then."""

from __future__ import annotations

from functools import partial

from tests.cluster.cluster import FIRST, Cluster, addresses
from tests.cluster.netpods import PORT, at_once, netpods, server


def test_every_node_is_ready_and_takes_pods(cluster: Cluster) -> None:
    assert cluster.not_ready() == []


def test_pods_that_waited_for_a_network_run(cluster: Cluster) -> None:
    """How long that took is told, not judged: docs/kubernetes.md has it of a machine that did nothing else."""
    pods = cluster.running("-n", FIRST, count=2)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    assert all(len(addresses(pod)) == 2 for pod in pods)
    print(", ".join(f"{what} {seconds:.1f} s" for what, seconds in cluster.times.items()))


def test_pods_of_a_deployment_reach_each_other_the_api_server_and_another_rack(cluster: Cluster) -> None:
    with netpods(cluster, "install") as net:
        racks = {"nodeSelector": {"rack": "rack-1"}, "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
             "labelSelector": {"matchLabels": {"app": "web"}}}
        ]}  # fmt: skip
        net.apply("Deployment", "web", server(**racks), replicas=2)
        net.apply("Pod", "far", server(nodeSelector={"rack": "rack-2"}))
        web, (far,) = net.pods("web", 2), net.pods("far", 1)
        assert [pod.node for pod in web] == ["node-1", "node-2"]
        assert far.node in ("node-3", "node-4")

        def checks(names: list[str]) -> list[dict[str, object]]:
            others = [pod for pod in (*web, far) if pod.name not in names]
            dials = [{"kind": "http", "host": a, "port": PORT} for pod in others for a in pod.addresses]
            return [{"kind": "api"}, *dials]

        said = at_once([partial(net.dial, pod, checks([pod.name])) for pod in (*web, far)])
        for pod, (api, *dialled) in zip((*web, far), said, strict=True):
            assert api.get("user") == "system:serviceaccount:install:default", api
            others = [other.name for other in (*web, far) if other != pod for _ in other.addresses]
            assert [answer.get("hostname") for answer in dialled] == others


def test_an_operator_is_at_the_console_of_a_node(cluster: Cluster) -> None:
    said = cluster.node_exec("node-1", "sh", "-c", "hostname; ls /etc/cni/net.d /opt/cni/bin")
    assert said.startswith("node-1\n")
    assert {"10-underlay.conflist", "underlay", "loopback"} <= set(said.split())
    assert cluster.node_exec("tor-1", "hostname") != "node-1\n"
