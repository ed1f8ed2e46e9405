"""What Kubernetes' own end-to-end tests ask of a pod network, on four nodes in two racks, without kube-proxy.

Docstrings have the upstream test's name; docs/conformance.md has them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.netpods import FAMILIES, HOST_PORT, PORT, NetPods, Pod, at_once, netpods, server
from tests.conftest import eventually

NODES = 4
#: Nobody has these; pods of the pools could.
FOREIGN = {4: "10.244.255.77", 6: "fd00:10:244::ff77"}
FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6"])
PROTOCOL = pytest.mark.parametrize("protocol", ["http", "udp"])


class Path(NamedTuple):
    sender: Pod
    receiver: Pod
    protocol: str
    family: int


class World(NamedTuple):
    """A pod in the pod network and one in the node's on every node, and what came of each dialling each."""

    net: NetPods
    pods: list[Pod]
    hosted: list[Pod]
    dialled: dict[Path, Any]

    def said(self, protocol: str, family: int, chosen: Callable[[Pod, Pod], bool]) -> dict[Path, Any]:
        found = {
            path: said
            for path, said in self.dialled.items()
            if (path.protocol, path.family) == (protocol, family) and chosen(path.sender, path.receiver)
        }
        assert found
        return found


@pytest.fixture(scope="module")
def world(cluster: Cluster) -> Iterator[World]:
    with netpods(cluster, "network") as net:
        net.apply("DaemonSet", "pods", server())
        net.apply("DaemonSet", "hosted", server(HOST_PORT, host=True))
        pods, hosted = net.pods("pods", NODES), net.pods("hosted", NODES, port=HOST_PORT)
        everybody = pods + hosted
        dialled: dict[Path, Any] = {}

        def dial(sender: Pod) -> None:
            paths = [
                Path(sender, to, kind, family) for to in everybody for kind in ("http", "udp") for family in FAMILIES
            ]
            checks = [
                {
                    "kind": p.protocol,
                    "host": p.receiver.address(p.family),
                    "port": p.receiver.port + (p.protocol == "udp"),
                }
                for p in paths
            ]
            dialled.update(zip(paths, net.dial(sender, checks), strict=True))

        at_once([partial(dial, sender) for sender in everybody])
        yield World(net, pods, hosted, dialled)


def hostname(pod: Pod) -> str:
    return pod.node if pod.host else pod.name


def answered(said: dict[Path, Any]) -> None:
    wrong = {path: answer for path, answer in said.items() if answer.get("hostname") != hostname(path.receiver)}
    assert not wrong


@FAMILY
@PROTOCOL
def test_pod_reaches_pod_on_every_node(world: World, protocol: str, family: int) -> None:
    """Networking Granular Checks: Pods should function for intra-pod communication"""
    said = world.said(protocol, family, lambda a, b: not a.host and not b.host and a != b)
    assert len(said) == NODES * (NODES - 1)
    answered(said)


@FAMILY
@PROTOCOL
def test_node_reaches_pod_on_every_node(world: World, protocol: str, family: int) -> None:
    """Networking Granular Checks: Pods should function for node-pod communication"""
    answered(world.said(protocol, family, lambda a, b: a.host and not b.host))


@FAMILY
@PROTOCOL
def test_pod_reaches_every_node(world: World, protocol: str, family: int) -> None:
    """Networking Granular Checks: Services should function for service endpoints using hostNetwork"""
    answered(world.said(protocol, family, lambda a, b: not a.host and b.host))


@FAMILY
@PROTOCOL
def test_node_reaches_every_node(world: World, protocol: str, family: int) -> None:
    """Networking Granular Checks: Services should function for service endpoints using hostNetwork"""
    answered(world.said(protocol, family, lambda a, b: a.host and b.host))


@FAMILY
@PROTOCOL
def test_pod_reaches_itself_by_its_own_address(world: World, protocol: str, family: int) -> None:
    """Services should allow pods to hairpin back to themselves through services

    What a Service adds is kube-proxy's, which is not here; the way from a pod to its own address is the pod network's.
    """
    said = world.said(protocol, family, lambda a, b: a == b and not a.host)
    answered(said)
    assert {answer["client"] for answer in said.values()} == {path.sender.address(family) for path in said}


@FAMILY
@PROTOCOL
def test_pods_see_each_others_own_addresses(world: World, protocol: str, family: int) -> None:
    """NoSNAT Should be able to send traffic between Pods without SNAT"""
    said = world.said(protocol, family, lambda a, _: not a.host)
    assert {p: answer.get("client") for p, answer in said.items()} == {p: p.sender.address(family) for p in said}


@FAMILY
def test_pods_see_the_nodes_own_address(world: World, family: int) -> None:
    """NoSNAT Should be able to send traffic between Pods without SNAT"""
    said = world.said("http", family, lambda a, b: a.host and not b.host)
    assert {p: answer.get("client") for p, answer in said.items()} == {p: p.sender.address(family) for p in said}


def test_pods_have_an_address_of_each_family(world: World) -> None:
    """[Feature:IPv6DualStack] should create pod, add ipv6 and ipv4 ip to pod ips"""
    assert all([":" in address for address in pod.addresses] == [False, True] for pod in world.pods)
    everyone = [address for pod in world.pods for address in pod.addresses]
    assert len(set(everyone)) == len(everyone)


def test_pods_know_both_addresses_of_their_node(world: World, cluster: Cluster) -> None:
    """[Feature:IPv6DualStack] should create pod, add ipv6 and ipv4 ip to host ips"""
    of_nodes = {pod.node: pod.addresses for pod in world.hosted}
    for pod in cluster.get("pods", "-n", world.net.namespace):
        assert tuple(a["ip"] for a in pod["status"]["hostIPs"]) == of_nodes[pod["spec"]["nodeName"]]


def test_pods_reach_the_api_server_as_their_service_account(world: World) -> None:
    """Networking should provide unchanging, static URL paths for kubernetes api services

    From inside a pod, at the address of the service ``kubernetes``, with the token that the kubelet put there.
    """
    said = at_once([partial(world.net.dial, pod, [{"kind": "api"}]) for pod in world.pods])
    user = f"system:serviceaccount:{world.net.namespace}:default"
    assert said == [[{"server": "https://10.96.0.1:443", "user": user}]] * NODES


@FAMILY
def test_large_transfers_arrive_whole(world: World, family: int) -> None:
    """Networking Granular Checks: Services should be able to handle large requests

    10 MB from and to a pod behind the other ToR, and datagrams that are to be put together again.
    """
    here, there = world.pods[0], world.pods[-1]
    host = there.address(family)
    down, up, datagram = world.net.dial(
        here,
        [
            {"kind": "http", "host": host, "port": PORT, "path": "/bytes?count=10000000", "limit": 60},
            {"kind": "http", "host": host, "port": PORT, "post": 10_000_000, "limit": 60},
            {"kind": "udp", "host": host, "port": PORT + 1, "size": 2000},
        ],
    )
    assert down == {"bytes": 10_000_000}
    assert up.get("posted") == 10_000_000, up
    assert datagram.get("size") == 2000, datagram


@FAMILY
def test_packets_as_large_as_the_mtu_pass_unfragmented(world: World, family: int) -> None:
    """Networking Granular Checks: Services should be able to handle large requests: udp"""
    here, *others = world.pods
    checks = [{"kind": "full", "host": pod.address(family), "port": PORT + 1} for pod in others]
    head = 28 if family == 4 else 48
    for said in world.net.dial(here, checks):
        assert said == {"mtu": 1500, "came": 1500 - head, "more": "EMSGSIZE"}


@FAMILY
def test_five_hundred_connections_at_once(world: World, family: int) -> None:
    """Networking Granular Checks: Pods should function for intra-pod communication: http"""
    here, there = world.pods[1], world.pods[-1]
    check = {"kind": "many", "host": there.address(family), "port": PORT, "count": 500, "limit": 60}
    assert world.net.dial(here, [check]) == [{"good": 500}]


@FAMILY
def test_a_pod_sends_under_its_own_addresses_alone(world: World, family: int) -> None:
    """of ours: the source check (docs/decisions/0012-source-check.md); upstream has none"""
    here, near, far = world.pods[0], world.pods[1], world.pods[-1]
    # The same from a pod on the node's network arrives: it is the pod that is held back, not the packet.
    free = world.hosted[1]

    def spoofs(receiver: Pod, source: str) -> list[Any]:
        return [{"kind": "spoof", "host": receiver.address(family), "port": PORT + 1, "source": source}]

    stolen = world.pods[2].address(family)

    def heard(receiver: Pod) -> dict[str, int]:
        own = {"kind": "udp", "host": receiver.address(family), "port": PORT + 1}
        (after,) = world.net.dial(here, [own])
        assert after.get("client") == here.address(family), after
        ask = {"kind": "http", "host": receiver.address(family), "port": PORT, "path": "/heard"}
        (senders,) = world.net.dial(here, [ask])
        return dict(senders)

    # Whoever is "stolen" sent some itself, when all dialled all.
    before = [heard(receiver).get(stolen, 0) for receiver in (near, far)]
    for receiver in (near, far):
        for source in (FOREIGN[family], stolen):
            assert world.net.dial(here, spoofs(receiver, source)) == [{"sent": 10}]
    assert world.net.dial(free, spoofs(near, FOREIGN[family][:-1] + "8")) == [{"sent": 10}]

    eventually(lambda: FOREIGN[family][:-1] + "8" in heard(near))
    after = [heard(receiver) for receiver in (near, far)]
    assert [(FOREIGN[family] in h, h.get(stolen, 0)) for h in after] == [(False, count) for count in before]
