"""Nodes that reboot, leave, come, and change their names (docs/nodes.md): no leak, and no address is had twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial

import pytest

from cni.marks import LINK_GROUP
from lab.kube.installed import NAMESPACE
from tests.cluster.cluster import IMAGE, LIMIT, Cluster, Wire, addresses
from tests.conftest import eventually as polled

pytestmark = pytest.mark.timeout(400)
NS = "nodes"
NODES = {"node-1", "node-2", "node-3", "node-4"}
#: Each look costs a kubectl, which the nodes would miss.
eventually = partial(polled, every=0.5)
#: Of a pod that is gone an address rests 30 s, then its block is withdrawn; the garbage collector has its pace, too.
GONE = 150.0
#: A minute each, most of it that of Kubernetes' own controllers.
LONG = pytest.mark.skipif(os.environ.get("UNDERLAY_LONG") != "1", reason="UNDERLAY_LONG=1 has it run")


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Iterator[Cluster]:
    """A pod on node-1 that others are looked at from, and four that may be anywhere."""
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NS}})
    cluster.apply(_pod("looker", nodeName="node-1"), _deployment("web", 4))
    cluster.running("-n", NS, count=5)
    yield cluster
    cluster.kubectl("delete", "namespace", NS, "--wait=false")


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """What a test leaves: four machines that are on, under their own names, which take pods; no block is another's."""
    yield
    for node in ("node-3", "node-4"):
        cluster.lab("rename", node, node, check=False)
        cluster.lab("power", node, "on", check=False)
    names = {node["metadata"]["name"] for node in cluster.get("nodes")}
    for name in names - NODES:
        cluster.kubectl("delete", "node", name)
    cluster.kubectl("uncordon", "node-3", "node-4", check=False)
    settled(cluster)
    # Of a name that is no more nobody gives them back.
    for block in cluster.get("ipamblocks"):
        if block["spec"]["node"] not in NODES:
            cluster.underlayctl("ipam", "release", "--block", block["spec"]["cidr"], "--yes")


def _container(*, grace: int = 0) -> Wire:
    main = {"name": "main", "image": IMAGE, "imagePullPolicy": "Never"}
    return {"containers": [main], "terminationGracePeriodSeconds": grace, "dnsPolicy": "Default"}


def _pod(name: str, **spec: str) -> Wire:
    meta = {"name": name, "namespace": NS, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": _container() | spec}


def _deployment(name: str, replicas: int) -> Wire:
    """Pods that a node loses soon after it is not heard of any more."""
    gone = [
        {"key": f"node.kubernetes.io/{why}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
        for why in ("not-ready", "unreachable")
    ]
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"app": name}},
    }
    template = {
        "metadata": {"labels": {"app": name}},
        "spec": _container() | {"tolerations": gone, "topologySpreadConstraints": [spread]},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": NS},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template},
    }


# -- what is seen ----------------------------------------------------------------------------------------------------


def blocks(cluster: Cluster, node: str) -> dict[str, Wire]:
    """Of a node, by CIDR."""
    found = cluster.get("ipamblocks", "--field-selector", f"spec.node={node}")
    return {block["spec"]["cidr"]: block for block in found}


def routes(cluster: Cluster, router: str, gateway: str) -> set[str]:
    """Destinations to which a router sends by way of this address."""
    found = json.loads(cluster.node_exec(router, "ip", "-j", "route", "show", "table", "main"))
    return {route["dst"] for route in found if route.get("gateway") == gateway}


def on(cluster: Cluster, node: str) -> list[Wire]:
    """Our running pods on a node."""
    return cluster.get("pods", "-n", NS, "--field-selector", f"spec.nodeName={node},status.phase=Running")


def staying(cluster: Cluster, node: str) -> list[Wire]:
    """A node's pods, ours and Underlay's: the namespaces of earlier tests may be on their way out."""
    return [pod for space in (NS, NAMESPACE) for pod in cluster.get("pods", "-n", space, *of(node))]


def reached(cluster: Cluster, pod: Wire) -> bool:
    """Whether the looker reaches a pod, under each of its addresses."""
    both = addresses(pod)
    assert len(both) == 2, pod["status"]
    return all("1 packets received" in _ping(cluster, address) for address in both)


def _ping(cluster: Cluster, address: str) -> str:
    return cluster.pod_exec(f"{NS}/looker", "ping", "-c1", "-W1", address, check=False)


def clean(cluster: Cluster, node: str) -> bool:
    """The store, and that node's journal and kernel, agree."""
    store = f"UNDERLAY_STORE=kube:{cluster.folder.path}/control-plane/admin.kubeconfig"
    words = ["env", store, "underlayctl", "ipam", "check", "--run", "/run/underlay", "--node", node]
    said = cluster.node_exec(node, *words, check=False)
    assert "clean" in said, said
    return True


def established(cluster: Cluster, node: str) -> bool:
    found = cluster.get("bgpnodestatus", node)[0].get("status", {}).get("sessions", [])
    return bool(found) and all(session["state"] == "Established" for session in found)


def settled(cluster: Cluster) -> None:
    """All nodes are Ready and take pods, all of Underlay's pods are Ready."""

    def good() -> bool:
        missing = cluster.not_ready()
        assert not missing, missing
        return True

    eventually(good, limit=LIMIT)


def unique(cluster: Cluster) -> bool:
    """No address of a pod that is there is another's."""
    found = [
        address
        for pod in cluster.get("pods", "-A")
        if not pod["spec"].get("hostNetwork") and pod["status"]["phase"] == "Running"
        for address in addresses(pod)
    ]
    assert len(found) == len(set(found)), sorted(found)
    return True


# -- tests -----------------------------------------------------------------------------------------------------------


def test_a_node_that_reboots_is_back_by_itself_with_its_blocks_and_no_leak(pods: Cluster) -> None:
    cluster, node = pods, "node-3"
    eventually(lambda: on(cluster, node), limit=LIMIT)
    before, boot = blocks(cluster, node), boot_id(cluster, node)
    starts = {pod["metadata"]["name"]: restarts(pod) for pod in staying(cluster, node)}

    cluster.lab("reboot", node)

    def back() -> bool:
        found = {pod["metadata"]["name"]: restarts(pod) for pod in staying(cluster, node)}
        assert found.keys() == starts.keys()
        assert all(found[name] > starts[name] for name in found), (starts, found)
        return True

    eventually(back, limit=LIMIT)
    settled(cluster)
    assert boot_id(cluster, node) != boot
    eventually(lambda: established(cluster, node), limit=LIMIT)
    assert all(eventually(lambda p=pod: reached(cluster, p)) for pod in on(cluster, node))
    after = blocks(cluster, node)
    assert after
    assert after.keys() <= before.keys(), "one that is empty may be given back"
    assert all(b["metadata"]["uid"] == before[cidr]["metadata"]["uid"] for cidr, b in after.items())

    # What the store and the kernel have is what lives: two addresses and one link for each pod.
    def as_it_lives() -> bool:
        lives = [p for p in cluster.get("pods", "-A", *of(node)) if not p["spec"].get("hostNetwork")]
        used = sum(b["status"]["used"] for b in blocks(cluster, node).values())
        said = json.loads(cluster.node_exec(node, "ip", "-j", "link", "show", "group", str(LINK_GROUP)))
        assert (used, sum(bool(link) for link in said)) == (2 * len(lives), len(lives))
        return True

    eventually(as_it_lives, limit=LIMIT)
    assert all(b["status"]["writer"]["bootId"] == boot_id(cluster, node) for b in blocks(cluster, node).values())
    assert eventually(lambda: clean(cluster, node))


def test_a_node_that_is_drained_and_deleted_gives_its_blocks_back_and_comes_anew(pods: Cluster) -> None:
    cluster, node = pods, "node-4"
    assert blocks(cluster, node)
    assert eventually(lambda: routes(cluster, "tor-2", "10.2.0.3"), limit=LIMIT)

    cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force")
    cluster.kubectl("delete", "node", node)
    eventually(lambda: not blocks(cluster, node), limit=GONE)
    eventually(lambda: not routes(cluster, "tor-2", "10.2.0.3"), limit=LIMIT)
    eventually(lambda: not cluster.get("pods", "-A", *of(node)), limit=GONE)
    assert node not in {status["metadata"]["name"] for status in cluster.get("bgpnodestatuses")}
    cluster.lab("power", node, "off")
    cluster.running("-n", NS, "-l", "app=web", count=4)
    assert "clean" in cluster.underlayctl("ipam", "check")

    # The same machine as a new node: what it finds on its disks is of another life.
    cluster.lab("power", node, "on")
    settled(cluster)
    assert eventually(lambda: blocks(cluster, node), limit=LIMIT)
    cluster.apply(_pod("newcomer", nodeName=node))
    newcomer = cluster.running("-n", NS, "-l", "app=newcomer", count=1)[0]
    assert eventually(lambda: reached(cluster, newcomer), limit=LIMIT)
    assert eventually(lambda: clean(cluster, node))
    cluster.kubectl("delete", "pod", "-n", NS, "newcomer")


@LONG
def test_a_node_that_is_switched_off_and_deleted_leaves_blocks_that_are_released_by_hand(pods: Cluster) -> None:
    cluster, node = pods, "node-4"
    before = eventually(lambda: blocks(cluster, node), limit=LIMIT)
    cluster.lab("power", node, "off")
    cluster.kubectl("delete", "node", node)
    eventually(lambda: not routes(cluster, "tor-2", "10.2.0.3"), limit=LIMIT)
    cluster.running("-n", NS, "-l", "app=web", count=4, limit=GONE)
    eventually(lambda: all(b["metadata"].get("deletionTimestamp") for b in blocks(cluster, node).values()), limit=GONE)
    assert blocks(cluster, node).keys() == before.keys(), "nobody but people, or a node in need, ends them"
    said = cluster.underlayctl("ipam", "check", check=False)
    for cidr in before:
        assert f"underlayctl ipam release --block {cidr}" in said
        cluster.underlayctl("ipam", "release", "--block", cidr, "--yes")
    assert not blocks(cluster, node)
    eventually(lambda: not cluster.get("pods", "-A", *of(node)), limit=GONE)
    assert "clean" in cluster.underlayctl("ipam", "check")


@LONG
def test_a_node_object_that_is_deleted_and_made_anew_drains_its_old_blocks(pods: Cluster) -> None:
    cluster, node = pods, "node-3"
    cluster.apply(_pod("stays", nodeName=node))
    cluster.running("-n", NS, "-l", "app=stays", count=1)
    before = set(blocks(cluster, node))
    cluster.kubectl("delete", "node", node)
    cluster.lab("kill", node, "kubelet")
    eventually(lambda: any(n["metadata"]["name"] == node for n in cluster.get("nodes")), limit=LIMIT)
    # Labels and annotations went with the old object: people's to set again.
    cluster.kubectl("label", "node", node, "rack=rack-2", "--overwrite")
    cluster.kubectl("annotate", "node", node, "underlay.network/as-number=65102", "--overwrite")
    settled(cluster)

    def anew() -> bool:
        now = blocks(cluster, node)
        assert now
        assert not before & now.keys(), now.keys()
        (found,) = {r["uid"] for b in now.values() for r in b["metadata"]["ownerReferences"]}
        return bool(found == cluster.get("node", node)[0]["metadata"]["uid"])

    # A pod that lived through it keeps its block; it is the kubelet's to say whether it did.
    cluster.kubectl("delete", "pods", "-n", NS, "-l", "app=stays", "--ignore-not-found")
    for pod in cluster.get("pods", "-A", *of(node)):
        if not pod["spec"].get("hostNetwork"):
            meta = pod["metadata"]
            cluster.kubectl("delete", "pod", "-n", meta["namespace"], meta["name"], "--ignore-not-found")
    eventually(anew, limit=GONE)
    assert eventually(lambda: established(cluster, node), limit=LIMIT)
    (owner,) = cluster.get("bgpnodestatus", node)[0]["metadata"]["ownerReferences"]
    assert owner["uid"] == cluster.get("node", node)[0]["metadata"]["uid"]
    assert unique(cluster)


@LONG
@pytest.mark.parametrize("reboot", [False, True], ids=["while it runs", "with a boot"])
def test_a_node_under_another_name_hands_out_nothing_that_is_another_s(pods: Cluster, reboot: bool) -> None:
    """The CNI server under the old name answers until its pod is gone: what it hands out then is found, and named."""
    cluster, machine, name = pods, "node-3", f"web-{7 + reboot}"
    before = eventually(lambda: blocks(cluster, machine), limit=LIMIT)
    rename_peers(cluster, machine, name)
    try:
        cluster.kubectl("drain", machine, "--ignore-daemonsets", "--delete-emptydir-data", "--force")
        if reboot:
            cluster.lab("power", machine, "off")
        cluster.lab("rename", machine, name)
        if reboot:
            cluster.lab("power", machine, "on")
        cluster.kubectl("delete", "node", machine)
        settled(cluster)
        eventually(lambda: blocks(cluster, name), limit=LIMIT)
        assert not before.keys() & blocks(cluster, name).keys()
        # What came in between may have an address of the old name's blocks.
        cluster.kubectl("delete", "pods", "-n", NS, "-l", "app=web", *of(name), "--wait=false")
        cluster.apply(_pod(name, nodeName=name))
        (renamed,) = cluster.running("-n", NS, "-l", f"app={name}", count=1)
        assert unique(cluster)
        assert eventually(lambda: established(cluster, name), limit=LIMIT)
        assert eventually(lambda: reached(cluster, renamed), limit=LIMIT)
        # Nobody is left who would give the old ones back.
        eventually(lambda: all(b["metadata"].get("deletionTimestamp") for b in blocks(cluster, machine).values()))
        for cidr in blocks(cluster, machine):
            cluster.underlayctl("ipam", "release", "--block", cidr, "--yes")
        cluster.kubectl("delete", "pod", "-n", NS, name)
        assert "clean" in eventually(lambda: said_clean(cluster), limit=LIMIT)
    finally:
        rename_peers(cluster, machine, machine)


def said_clean(cluster: Cluster) -> str:
    said = cluster.underlayctl("ipam", "check", check=False)
    assert "clean" in said, said
    return said


def rename_peers(cluster: Cluster, machine: str, name: str) -> None:
    """Has the peers of that machine be of a Node of another name."""
    for peer in cluster.get("bgppeers"):
        if peer["metadata"]["name"].startswith(f"{machine}-"):
            patch = json.dumps({"spec": {"node": name}})
            cluster.kubectl("patch", "bgppeer", peer["metadata"]["name"], "--type=merge", "-p", patch)


def of(node: str) -> tuple[str, str]:
    return ("--field-selector", f"spec.nodeName={node}")


def restarts(pod: Wire) -> int:
    return sum(int(c["restartCount"]) for c in pod["status"].get("containerStatuses", ()))


def boot_id(cluster: Cluster, node: str) -> str:
    return cluster.node_exec(node, "cat", "/proc/sys/kernel/random/boot_id").strip()


def is_ready(node: Wire) -> bool:
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", ()))
    return ready and not node["spec"].get("taints")
