"""What containerd 1.6 really asks of a plugin, by way of the CRI: in the end nothing is left, whatever was killed."""

from __future__ import annotations

import os
import signal

import pytest

from cni import install
from store.model import BGPNodeStatus
from tests.conftest import eventually
from tests.netns.plugin import NODE
from tests.runtime.conftest import BOTH, ONLY_V2, Node, Shared
from tests.runtime.cri import CRIError


def frozen(node: Node) -> None:
    """The CNI server takes connections, in the kernel, and does nothing."""
    os.kill(node.plugin.server.pid, signal.SIGSTOP)


def thaw(node: Node) -> None:
    os.kill(node.plugin.server.pid, signal.SIGCONT)


def ping(node: Node, sandbox: str, address: str) -> None:
    node.containerd.inside_pod(sandbox, ["ping", "-c", "1", "-W", "2", address])


@pytest.mark.parametrize(
    ("node", "version"),
    [("1.6", "0.3.1"), ("1.6", "0.4.0"), ("1.6", "1.0.0"), pytest.param("2", "1.1.0", marks=pytest.mark.containerd_2)],
    indirect=["node"],
)
def test_a_pod_from_its_begin_to_its_end(node: Node, version: str) -> None:
    containerd, cri = node.containerd, node.containerd.cri
    node.reconfigure(version=version)
    one, two = containerd.run("one"), containerd.run("two")
    assert {*cri.addresses(one), *cri.addresses(two)} == node.plugin.routed()
    for address in cri.addresses(two):
        ping(node, one, address)
    cri.stop(one)
    assert not set(cri.addresses(two)) - node.plugin.routed()
    cri.remove(one)
    # The second DEL comes when the namespace is gone.
    assert [(verb, bool(path), live) for verb, path, live in containerd.calls(one)] == [
        ("ADD", True, True),
        ("DEL", True, True),
        ("DEL", False, False),
    ]
    cri.remove(two)  # without a stop
    eventually(node.clean)


def test_a_program_in_a_pod_is_reached_from_another_pod(node: Node) -> None:
    containerd, cri = node.containerd, node.containerd.cri
    server, client = containerd.run("server"), containerd.run("client")
    containerd.program(server, "server", "httpd", ["httpd", "-f", "-p", "80", "-h", "/www"])
    for address in cri.addresses(server):
        eventually(lambda address=address: containerd.fetch(client, address).endswith("\r\n\r\nhello\n"))
    for sandbox in (server, client):
        containerd.end(sandbox)
    eventually(node.clean)


def test_an_add_that_is_refused_says_why_to_kubelet_and_leaves_nothing(node: Node) -> None:
    node.reconfigure(mtu=1000)
    with pytest.raises(CRIError, match=r"mtu: 1000: the pod has an IPv6 address, which needs 1280"):
        node.containerd.run("one")
    (container,) = set(node.containerd.called("ADD")) & set(node.containerd.called("DEL"))
    assert [verb for verb, _, _ in node.containerd.calls(container)] == ["ADD", "DEL"]
    eventually(node.clean)


def test_del_without_add(node: Node) -> None:
    containerd = node.containerd
    containerd.hold.touch()
    starting = containerd.begin("one", limit=5)
    (container,) = eventually(lambda: containerd.called("ADD"))
    with pytest.raises(CRIError, match="deadline"):
        starting.sandbox()
    eventually(lambda: [verb for verb, _, _ in containerd.calls(container)] == ["ADD", "DEL"])
    containerd.hold.unlink()
    containerd.end(containerd.run("two"))
    eventually(node.clean)


@BOTH
def test_the_shim_is_killed_in_the_middle_of_add_when_the_deadline_passes(node: Node) -> None:
    containerd = node.containerd
    frozen(node)
    starting = containerd.begin("one", limit=5)
    (container,) = eventually(lambda: containerd.called("ADD"))
    with pytest.raises(CRIError, match="deadline"):
        starting.sandbox()
    eventually(lambda: [verb for verb, _, _ in containerd.calls(container)] == ["ADD", "DEL"])
    thaw(node)
    containerd.end(containerd.run("two"))
    eventually(node.clean)


def test_pods_outlive_a_containerd_that_is_killed(node: Node) -> None:
    containerd, cri = node.containerd, node.containerd.cri
    one, two = containerd.run("one"), containerd.run("two")
    addresses = cri.addresses(two)
    containerd.kill()
    for address in addresses:
        ping(node, one, address)
    containerd.start()
    assert cri.addresses(two) == addresses
    for sandbox in (one, two):
        containerd.end(sandbox)
    assert [verb for verb, _, _ in containerd.calls(one)] == ["ADD", "DEL", "DEL"]
    eventually(node.clean)


@BOTH
@pytest.mark.parametrize("where", ["before the plugin", "in the server"])
def test_containerd_is_killed_in_the_middle_of_add(node: Node, where: str) -> None:
    """The plugin goes on and finishes. The next containerd has the sandbox as not ready; kubelet ends it."""
    containerd = node.containerd
    if where == "in the server":
        frozen(node)
    else:
        containerd.hold.touch()
    starting = containerd.begin("one")
    (container,) = eventually(lambda: containerd.called("ADD"))
    if where == "in the server":
        eventually(lambda: node.waits(container))
    containerd.kill()
    with pytest.raises(CRIError):
        starting.sandbox()
    if where == "in the server":
        thaw(node)
    else:
        containerd.hold.unlink()
    eventually(lambda: len(node.plugin.routed()) == 2)
    containerd.start()
    assert containerd.cri.sandboxes() == [container]
    containerd.end(container)
    containerd.end(containerd.run("one"))
    eventually(node.clean)


@BOTH
def test_the_server_is_away_for_a_while(node: Node) -> None:
    """As at an upgrade of the server: an ADD waits for it, a DEL does not."""
    containerd, cri, plugin = node.containerd, node.containerd.cri, node.plugin
    one = containerd.run("one")
    plugin.server.terminate()
    plugin.server.wait(60)
    containerd.end(one)
    assert list((plugin.run / "queue").glob("*.del"))
    pending = containerd.begin("two")
    eventually(lambda: len(containerd.called("ADD")) == 2)
    plugin.start()
    two = pending.sandbox()
    assert set(cri.addresses(two)) == plugin.routed()
    containerd.end(two)
    eventually(node.clean)


@BOTH
def test_the_network_is_renamed_while_pods_live(node: Node) -> None:
    containerd = node.containerd
    one = containerd.run("one")
    node.reconfigure(name="renamed")
    two = containerd.run("two")
    ping(node, one, containerd.cri.addresses(two)[0])
    containerd.cri.stop(one)
    assert node.leases() == 1  # by the DEL, before any sweep
    containerd.cri.remove(one)
    containerd.end(two)
    eventually(node.clean)


@BOTH
def test_the_conflist_is_rewritten_under_load(node: Node) -> None:
    containerd, cri = node.containerd, node.containerd.cri
    lists = [install.conflist(mtu=mtu) for mtu in (1400, 1500)]
    under_way = [containerd.begin(f"pod-{i}") for i in range(8)]
    for n in range(100):
        node.put(lists[n % 2])
        assert cri.network_ready() == ""
    sandboxes = [each.sandbox() for each in under_way]
    stopping = [cri.begin("StopPodSandbox", {1: sandbox}) for sandbox in sandboxes]
    for n in range(100):
        node.put(lists[n % 2])
        assert cri.network_ready() == ""
    for each in stopping:
        each.result()
    for sandbox in sandboxes:
        cri.remove(sandbox)
    eventually(node.clean)


def test_the_server_is_killed_while_pods_start_and_while_they_stop(node: Node) -> None:
    containerd, cri, plugin = node.containerd, node.containerd.cri, node.plugin
    under_way = [containerd.begin(f"pod-{i}") for i in range(6)]
    eventually(lambda: len(containerd.called("ADD")) >= 2)
    node.kill_server()
    sandboxes = [each.sandbox() for each in under_way]
    assert {a for sandbox in sandboxes for a in cri.addresses(sandbox)} == plugin.routed()
    assert len(plugin.routed()) == 12
    stopping = [cri.begin("StopPodSandbox", {1: sandbox}) for sandbox in sandboxes]
    eventually(lambda: len(containerd.called("DEL")) >= 2)
    node.kill_server()
    for each in stopping:
        each.result()
    for sandbox in sandboxes:
        cri.remove(sandbox)
    eventually(node.clean)


@BOTH
def test_a_host_port_leads_to_the_pod_until_it_ends(node: Node) -> None:
    containerd = node.containerd
    node.reconfigure(({"type": "portmap", "capabilities": {"portMappings": True}},))
    ports = {8080: 80}
    server = containerd.run("server", ports=ports)
    containerd.program(server, "server", "httpd", ["httpd", "-f", "-p", "80", "-h", "/www"])
    for address in containerd.cri.addresses(server):  # the pod itself, before the node's port
        eventually(lambda a=address: node.fetch(a, 80).endswith("hello\n"))
    for address in node.addresses:
        eventually(lambda a=address: node.fetch(a, 8080).endswith("hello\n"))
    containerd.end(server)
    for address in node.addresses:
        assert node.fetch(address, 8080) == ""
    eventually(node.clean)


@ONLY_V2
def test_a_status_that_fails_makes_the_node_not_ready_and_pods_start_all_the_same(node: Node) -> None:
    """With CNI 1.1 containerd asks STATUS whenever kubelet asks for its own."""
    containerd, cri, plugin = node.containerd, node.containerd.cri, node.plugin
    node.reconfigure(version="1.1.0")
    assert cri.network_ready() == ""
    session = {"peer": "tor", "address": "192.0.2.9", "asNumber": 65001, "state": "Idle"}
    plugin.status(BGPNodeStatus, NODE, {"sessions": [session]})
    try:
        # A store that takes its time is not asked for long.
        eventually(lambda: "none of the 1 BGP sessions of node node-1 is up" in cri.network_ready())
        containerd.end(containerd.run("one"))
    finally:
        plugin.status(BGPNodeStatus, NODE, {"sessions": []})
    assert cri.network_ready() == ""
    assert "STATUS" in {verb for verb, _, _ in containerd.calls()}
    eventually(node.clean)


def test_pods_that_vanish_without_a_del_are_swept(nodes: dict[str, Shared[Node]]) -> None:
    """As when somebody takes the runtime away with all its state."""
    node = nodes["1.6"].get()
    node.begin()
    try:
        for n in range(3):
            node.containerd.run(f"pod-{n}")
        assert len(node.plugin.routed()) == 6
        node.containerd.kill()
        node.containerd.close()
        eventually(node.plugin.nothing_left)
        eventually(lambda: not node.leases())
        assert not node.containerd.called("DEL")
    finally:
        nodes["1.6"].drop()
