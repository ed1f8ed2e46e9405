"""Pods that restart, end, are probed and looked into, and what of that goes over the pod network.

Docstrings have the upstream test's name; docs/conformance.md has them all.
"""

from __future__ import annotations

import re
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from lab.kube.build import find_node
from tests.cluster.cluster import ROOT, Cluster, Wire
from tests.cluster.netpods import FAMILIES, PORT, NetPods, Pod, at_once, netpods, read, server
from tests.conftest import eventually

LIMIT = 120
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
SYSCTLS = {"net.ipv4.ip_local_port_range": "20000 30000", "net.ipv4.tcp_syncookies": "0"}


def on(node: str, **spec: Any) -> Wire:
    return server(nodeName=node, **spec)


@pytest.fixture(scope="module")
def net(cluster: Cluster) -> Iterator[NetPods]:
    # With patience for a machine that is busy: who is not well says so at once.
    health = {"httpGet": {"path": "/healthy", "port": PORT}, "periodSeconds": 1, "timeoutSeconds": 20}
    probes = {"startupProbe": {**health, "failureThreshold": 60}, "livenessProbe": {**health, "failureThreshold": 2}}
    sysctls = {"sysctls": [{"name": name, "value": value} for name, value in SYSCTLS.items()]}
    # Not where the client is, whose kubelet is asked all the while.
    rule = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node-3"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
    elsewhere = server(affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})
    with netpods(cluster, "pods") as made:
        at_once(
            [
                partial(made.apply, "Pod", "client", on("node-3")),
                partial(made.apply, "Pod", "plain", on("node-1")),
                partial(made.apply, "Pod", "probed", on("node-1", container=probes)),
                partial(made.apply, "Pod", "tuned", on("node-2", securityContext=sysctls)),
                partial(made.apply, "Pod", "ending", on("node-2", grace=600)),
                partial(made.apply, "StatefulSet", "set", elsewhere, serviceName="set", replicas=1),
            ]
        )
        for app in ("client", "plain", "probed", "tuned", "ending", "set"):
            made.pods(app, 1)
        yield made


def pod(net: NetPods, name: str) -> Wire:
    return net.cluster.get("pod", "-n", net.namespace, name)[0]


def restarts(wire: Wire) -> int:
    return int(wire["status"]["containerStatuses"][0]["restartCount"])


def ask(net: NetPods, to: Pod, path: str = "/", *, sender: str = "client", family: int = 4) -> Any:
    check = {"kind": "http", "host": to.address(family), "port": PORT, "path": path}
    (said,) = net.dial(sender, [check])
    return said


def established(net: NetPods, name: str) -> str:
    """Connections to the server of a pod, as the pod's kernel has them."""
    argv = ("/usr/bin/ss", "-Htn", "state", "established", f"sport = :{PORT}")
    return net.cluster.pod_exec(f"{net.namespace}/{name}", *argv)


def reached(net: NetPods, to: Pod, *, sender: str = "client") -> bool:
    checks = [
        {"kind": kind, "host": to.address(family), "port": PORT + (kind == "udp")}
        for kind in ("http", "udp")
        for family in FAMILIES
    ]
    return [said.get("hostname") for said in net.dial(sender, checks)] == [to.name] * len(checks)


def test_a_container_that_restarts_keeps_its_addresses(net: NetPods) -> None:
    """Pods should have monotonically increasing restart count"""
    before = read(pod(net, "plain"))
    ask(net, before, "/exit?code=3")
    (after,) = eventually(
        lambda: [p for p in net.cluster.running("-n", net.namespace, "-l", "app=plain", count=1) if restarts(p) > 0],
        limit=LIMIT,
    )
    assert read(after) == before
    assert reached(net, before)


def test_probes_of_the_kubelet_come_over_the_pod_network(net: NetPods) -> None:
    """Probing container should be restarted with a /healthz http liveness probe;
    with readiness probe that fails should never be ready and never restart"""
    one = read(pod(net, "probed"))

    def ready() -> bool:
        return any(c["type"] == "Ready" and c["status"] == "True" for c in pod(net, "probed")["status"]["conditions"])

    eventually(ready, limit=LIMIT)
    ask(net, one, "/set?what=ready&to=no")
    eventually(lambda: not ready(), limit=LIMIT)
    assert restarts(pod(net, "probed")) == 0
    ask(net, one, "/set?what=healthy&to=no")
    eventually(lambda: restarts(pod(net, "probed")) == 1 and ready(), limit=LIMIT)
    assert read(pod(net, "probed")) == one
    assert reached(net, one)


def test_a_pod_of_a_stateful_set_comes_back_while_its_old_sandbox_lives(net: NetPods, cluster: Cluster) -> None:
    """StatefulSet Should recreate evicted statefulset

    Here by force, as from a node whose kubelet answers nobody."""
    before = read(pod(net, "set-0"))
    kubelet = cluster.node_exec(before.node, "pgrep", "-x", "kubelet").split()
    cluster.kubectl("cordon", before.node)
    cluster.node_exec(before.node, "kill", "-STOP", *kubelet)
    try:
        cluster.kubectl("delete", "pod", "-n", net.namespace, "set-0", "--force", "--grace-period=0", "--wait=false")

        def again() -> Pod | None:
            (found,) = cluster.running("-n", net.namespace, "-l", "app=set", count=1)
            return read(found) if read(found).addresses != before.addresses else None

        after = eventually(again, limit=LIMIT)
        assert after
        assert set(after.addresses).isdisjoint(before.addresses)
        assert reached(net, after)
        assert reached(net, before), "its old sandbox is no more, so this shows nothing"
    finally:
        cluster.node_exec(before.node, "kill", "-CONT", *kubelet)
        cluster.kubectl("uncordon", before.node)
    eventually(lambda: not reached(net, before), limit=LIMIT)
    assert reached(net, after), "the end of the old one took something from the new one"


def test_a_terminating_pod_is_reached_and_reaches(net: NetPods, cluster: Cluster) -> None:
    """Pod Lifecycle should be able to connect from a Pod to a terminating Pod;
    should be able to connect to other Pod from a terminating Pod"""
    ending, client = read(pod(net, "ending")), read(pod(net, "client"))
    # Answered once the process has its SIGTERM: these connections are open before, and used after.
    checks = [{"kind": "http", "host": a, "port": PORT, "path": "/end", "limit": LIMIT} for a in ending.addresses]
    with ThreadPoolExecutor(1) as beside:
        drained = beside.submit(net.dial, "client", checks)
        eventually(lambda: all(address in established(net, "ending") for address in client.addresses), limit=LIMIT)
        cluster.kubectl("delete", "pod", "-n", net.namespace, "ending", "--wait=false")
        said = drained.result()
    assert [(s.get("hostname"), s.get("client")) for s in said] == [("ending", a) for a in client.addresses]
    assert pod(net, "ending")["metadata"]["deletionTimestamp"]
    assert reached(net, ending)
    assert reached(net, client, sender="ending")
    ask(net, ending, "/exit?code=0")
    # Also if it is gone by now, which kubectl says nothing of.
    cluster.kubectl("wait", "--for=delete", "pod/ending", "-n", net.namespace, f"--timeout={LIMIT}s")


def test_sysctls_of_a_pod_are_set(net: NetPods, cluster: Cluster) -> None:
    """Sysctls should support sysctls"""
    for name, value in SYSCTLS.items():
        path = f"/proc/sys/{name.replace('.', '/')}"
        assert cluster.pod_exec(f"{net.namespace}/tuned", "cat", path).split() == value.split()


def test_exec_and_logs(net: NetPods, cluster: Cluster) -> None:
    """Kubectl client should support exec; Kubectl logs should be able to retrieve and filter logs"""
    assert cluster.pod_exec(f"{net.namespace}/client", "cat", "/etc/hostname") == "client\n"
    assert "serving on 8080\n" in cluster.kubectl("logs", "-n", net.namespace, "client")


def test_port_forward(net: NetPods, cluster: Cluster) -> None:
    """Kubectl Port forwarding should support a client that connects, sends DATA, and disconnects"""
    argv = [str(find_node().kubectl), "port-forward", "-n", net.namespace, "pod/tuned", f":{PORT}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=cluster.environment, cwd=ROOT) as forward:
        try:
            assert forward.stdout
            told = re.match(r"Forwarding from 127.0.0.1:(\d+)", forward.stdout.readline())
            assert told
            with urllib.request.urlopen(f"http://127.0.0.1:{told[1]}/", timeout=60) as said:
                assert b'"hostname": "tuned"' in said.read()
        finally:
            forward.terminate()


@pytest.fixture
def chained(cluster: Cluster) -> Iterator[None]:
    """node-4 with portmap behind us."""
    install = ("underlay-cni-install", "--only", "conflist")
    cluster.node_exec("node-4", *install, "--chain", "portmap")
    try:
        yield
    finally:
        cluster.node_exec("node-4", *install)


def test_host_ports_lead_to_pods_of_the_node(net: NetPods, cluster: Cluster, chained: None) -> None:
    """HostPort validates that there is no conflict between pods with same hostPort but different hostIP and protocol

    With portmap in the chain (UNDERLAY_CNI_CHAIN).
    """
    (node,) = cluster.get("node", "node-4")
    addresses = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
    number = 25432
    wanted = {
        "by-node": {"hostIP": addresses[0], "containerPort": PORT, "protocol": "TCP"},
        "by-loopback": {"hostIP": "127.0.0.1", "containerPort": PORT, "protocol": "TCP"},
        "by-udp": {"hostIP": addresses[0], "containerPort": PORT + 1, "protocol": "UDP"},
        "by-any": {"containerPort": PORT, "protocol": "TCP", "hostPort": number + 1},
    }
    for name, port in wanted.items():
        net.apply("Pod", name, on("node-4", container={"ports": [{"hostPort": number} | port]}))
    for name in wanted:
        net.pods(name, 1)
    checks: list[Wire] = [
        {"kind": "http", "host": addresses[0], "port": number},
        {"kind": "udp", "host": addresses[0], "port": number},
        {"kind": "http", "host": addresses[0], "port": number + 1},
        {"kind": "http", "host": addresses[1], "port": number + 1},
    ]
    client = read(pod(net, "client"))
    said = net.dial("client", checks)
    assert [answer.get("hostname") for answer in said] == ["by-node", "by-udp", "by-any", "by-any"], said
    assert [answer["client"] for answer in said] == [client.addresses[a] for a in (0, 0, 0, 1)]
    here = cluster.node_exec("node-4", "/bin/busybox", "wget", "-q", "-O-", f"http://127.0.0.1:{number}/")
    assert '"hostname": "by-loopback"' in here
    cluster.kubectl("delete", "pod", "-n", net.namespace, *wanted)
    eventually(lambda: f"dport {number}" not in cluster.node_exec("node-4", "iptables-save", "-t", "nat"), limit=LIMIT)
