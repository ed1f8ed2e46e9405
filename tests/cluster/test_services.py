"""Services, as kube-proxy makes them on the nodes: what it translates goes over the pod network like anything else.

The real kube-proxy runs as its manifests run it, in both of its modes. Docstrings have the upstream test's name;
docs/conformance.md has them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import pytest

from lab.kube.build import find_node
from lab.oob import CONTROL_PLANE
from lab.topology import POOLS
from tests.cluster.cluster import IMAGE, Cluster, Wire
from tests.cluster.netpods import FAMILIES, HOST_PORT, PORT, NetPods, Pod, at_once, netpods, server
from tests.conftest import eventually

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
PROTOCOL = pytest.mark.parametrize("protocol", ["http", "udp"])
#: Of every service; UDP is the port after it.
SERVICE_PORT: Final = 80
PROXY: Final = "kube-proxy"


class World(NamedTuple):
    """``web`` has a pod on every node, ``one`` only that on node-1; ``hosted`` are pods on the nodes' network."""

    net: NetPods
    web: list[Pod]
    hosted: list[Pod]
    services: dict[str, Wire]

    def address(self, service: str, family: int) -> str:
        addresses: list[str] = self.services[service]["spec"]["clusterIPs"]
        return next(address for address in addresses if (":" in address) == (family == 6))

    def node_port(self, service: str, protocol: str) -> int:
        wanted = "UDP" if protocol == "udp" else "TCP"
        ports = self.services[service]["spec"]["ports"]
        return next(int(port["nodePort"]) for port in ports if port["protocol"] == wanted)

    def to(self, service: str, protocol: str, family: int) -> Wire:
        port = SERVICE_PORT + (protocol == "udp")
        return {"kind": protocol, "host": self.address(service, family), "port": port}


@pytest.fixture(scope="module", params=["nftables", "iptables"])
def world(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[World]:
    with _proxied(cluster, request.param), netpods(cluster, f"services-{request.param}") as net:
        net.apply("DaemonSet", "web", server())
        net.apply("DaemonSet", "hosted", server(HOST_PORT, host=True))
        web, hosted = net.pods("web", 4), net.pods("hosted", 4, port=HOST_PORT)
        cluster.kubectl("label", "pod", "-n", net.namespace, web[0].name, "only=yes")
        wanted = {
            "web": _service(net, "web", {"app": "web"}),
            "one": _service(net, "one", {"only": "yes"}),
            "local": _service(net, "local", {"only": "yes"}, externalTrafficPolicy="Local"),
        }
        cluster.apply(*wanted.values())
        services = {s["metadata"]["name"]: s for s in cluster.get("services", "-n", net.namespace)}
        made = World(net, web, hosted, services)
        # A proxy knows of a service a moment after it was made.
        checks = [made.to(name, "http", family) for name in wanted for family in FAMILIES]
        at_once([partial(eventually, partial(_all_answer, net, s, checks)) for s in (*web, *hosted)])
        yield made


@contextmanager
def _proxied(cluster: Cluster, mode: str) -> Iterator[None]:
    """kube-proxy on every node, as kubeadm's manifest has it; afterwards none, and nothing of its."""
    cluster.apply(*_proxy(mode))
    try:
        cluster.running("-n", "kube-system", "-l", f"app={PROXY}", count=4)
        yield
    finally:
        cluster.kubectl("delete", "daemonset", "-n", "kube-system", PROXY, "--cascade=foreground", "--wait")
        at_once([partial(cluster.node_exec, f"node-{i}", str(find_node().proxy), "--cleanup") for i in (1, 2, 3, 4)])


def _proxy(mode: str) -> list[Wire]:
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "clusterCIDR": ",".join(pool.cidr for pool in POOLS),
        # Of the whole machine, and of no use to a lab.
        "conntrack": {"maxPerCore": 0, "min": 0},
        "iptables": {"localhostNodePorts": False, "minSyncPeriod": "0s"},
    }
    subject = {"kind": "ServiceAccount", "name": PROXY, "namespace": "kube-system"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"}
    folders = ("/usr", "/lib", "/lib64", "/sbin", "/etc/alternatives", "/run/xtables", str(find_node().folder))
    mounts = {folder.strip("/").replace("/", "-").replace(".", "-").lower(): folder for folder in folders}
    pod = {
        "serviceAccountName": PROXY,
        "hostNetwork": True,
        "dnsPolicy": "Default",
        "tolerations": [{"operator": "Exists"}],
        "terminationGracePeriodSeconds": 0,
        "containers": [
            {
                "name": PROXY,
                "image": IMAGE,
                "imagePullPolicy": "Never",
                "command": [
                    str(find_node().proxy),
                    "--config=/config/config.conf",
                    "--hostname-override=$(NODE)",
                ],
                "env": [
                    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    {"name": "PATH", "value": "/usr/sbin:/usr/bin:/sbin"},
                ],
                "securityContext": {"privileged": True},
                "readinessProbe": {
                    "httpGet": {"host": "127.0.0.1", "port": 10256, "path": "/healthz"},
                    "periodSeconds": 1,
                },
                "volumeMounts": [
                    *({"name": n, "mountPath": f, "readOnly": n != "run-xtables"} for n, f in mounts.items()),
                    {"name": "config", "mountPath": "/config"},
                ],
            }
        ],
        "volumes": [
            *({"name": n, "hostPath": {"path": f, "type": "DirectoryOrCreate"}} for n, f in mounts.items()),
            {"name": "config", "configMap": {"name": PROXY}},
        ],
    }
    meta = {"name": PROXY, "namespace": "kube-system"}
    labels = {"app": PROXY}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kubeadm:node-proxier"},
            "roleRef": role,
            "subjects": [subject],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"config.conf": json.dumps(config)}},
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": meta,
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
    ]


def _service(net: NetPods, name: str, selector: dict[str, str], **more: Any) -> Wire:
    """Of both families and protocols, on the nodes' ports, too."""
    ports = [
        {"name": "http", "protocol": "TCP", "port": SERVICE_PORT, "targetPort": PORT},
        {"name": "udp", "protocol": "UDP", "port": SERVICE_PORT + 1, "targetPort": PORT + 1},
    ]
    spec = {"type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "selector": selector, "ports": ports}
    meta = {"name": name, "namespace": net.namespace}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec | more}


def _all_answer(net: NetPods, sender: Pod, checks: list[Wire]) -> bool:
    said = net.dial(sender, [check | {"limit": 10} for check in checks])
    assert all("hostname" in answer for answer in said), said
    return True


def outside(world: World, host: str, port: int) -> Any:
    """What a machine that is no node, behind the spine, is told."""
    where = f"[{host}]" if ":" in host else host
    said = world.net.cluster.node_exec(CONTROL_PLANE, "/bin/busybox", "wget", "-q", "-O-", f"http://{where}:{port}/")
    return json.loads(said)


@FAMILY
@PROTOCOL
def test_pods_reach_a_service_on_every_node(world: World, protocol: str, family: int) -> None:
    """Services should serve a basic endpoint from pods"""

    def ask(sender: Pod) -> list[Any]:
        return world.net.dial(sender, [world.to("web", protocol, family)] * 20)

    names = {pod.name for pod in world.web}
    for sender, said in zip(world.web, at_once([partial(ask, sender) for sender in world.web]), strict=True):
        assert {answer.get("hostname") for answer in said} <= names, said
        # Of itself it hears through the node, which has to see the answer to translate it back.
        others = [answer for answer in said if answer["hostname"] != sender.name]
        assert {answer["client"] for answer in others} == {sender.address(family)}


@FAMILY
@PROTOCOL
def test_a_pod_reaches_itself_through_its_service(world: World, protocol: str, family: int) -> None:
    """Services should allow pods to hairpin back to themselves through services"""
    (said,) = world.net.dial(world.web[0], [world.to("one", protocol, family)])
    assert said.get("hostname") == world.web[0].name, said


@FAMILY
@PROTOCOL
def test_nodes_and_their_own_pods_reach_a_service(world: World, protocol: str, family: int) -> None:
    """Networking Granular Checks: Services should function for endpoint-Service"""
    for sender in world.hosted:
        (said,) = world.net.dial(sender, [world.to("one", protocol, family)])
        assert said.get("hostname") == world.web[0].name, said


@FAMILY
@PROTOCOL
def test_pods_reach_a_node_port_of_every_node(world: World, protocol: str, family: int) -> None:
    """Networking Granular Checks: Services should function for pod-Service"""
    port = world.node_port("one", protocol)
    checks = [{"kind": protocol, "host": node.address(family), "port": port} for node in world.hosted]
    for sender in world.web:
        said = world.net.dial(sender, checks)
        assert [answer.get("hostname") for answer in said] == [world.web[0].name] * len(checks), said


@FAMILY
def test_who_is_outside_reaches_a_node_port_of_every_node(world: World, family: int) -> None:
    """Services should be able to create a functioning NodePort service

    A node that sends it on to another node's pod does so under its own address, or the answer would pass it by."""
    port = world.node_port("one", "http")
    for node in world.hosted:
        said = outside(world, node.address(family), port)
        assert said["hostname"] == world.web[0].name
        if node.node != world.web[0].node:
            assert said["client"] == node.address(family)


@FAMILY
def test_a_local_node_port_shows_the_pod_who_asked(world: World, family: int) -> None:
    """LoadBalancers ExternalTrafficPolicy: Local should work for type=NodePort"""
    node = world.hosted[0]
    assert node.node == world.web[0].node
    said = outside(world, node.address(family), world.node_port("local", "http"))
    assert said["hostname"] == world.web[0].name
    assert said["client"] in _outside_addresses(world)


def _outside_addresses(world: World) -> set[str]:
    links = json.loads(world.net.cluster.node_exec(CONTROL_PLANE, "ip", "-j", "address"))
    return {a["local"] for link in links for a in link["addr_info"]}


def test_the_api_server_is_reached_through_the_proxy(world: World) -> None:
    """Networking should provide unchanging, static URL paths for kubernetes api services"""
    for pod in world.web:
        (said,) = world.net.dial(pod, [{"kind": "api"}])
        assert said.get("user") == f"system:serviceaccount:{world.net.namespace}:default", said


def test_pods_that_move_are_found_again(world: World) -> None:
    """Services should be able to up and down services

    A pod's address goes to nobody else while a proxy may still send to it."""
    net, pod = world.net, world.web[-1]
    net.cluster.kubectl("delete", "pod", "-n", net.namespace, pod.name)
    web = net.pods("web", 4)
    new = next(p for p in web if p.node == pod.node)
    assert not set(new.addresses) & set(pod.addresses)

    def found() -> bool:
        said = net.dial(world.web[0], [world.to("web", "http", 4)] * 40)
        hosts = {answer.get("hostname") for answer in said}
        assert hosts == {p.name for p in web}, hosts
        return True

    eventually(found)
