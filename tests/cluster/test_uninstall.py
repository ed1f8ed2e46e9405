"""A cluster that Underlay leaves: nodes and ToRs are as before it came, nothing hangs, and it can come again."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.cluster.cluster import FIRST, LIMIT, Cluster
from tests.conftest import eventually

NODES = ("node-1", "node-2")
#: What is looked at on a node. Neighbours, and what a kubelet keeps of a pod that has ended, are nobody's of ours.
LOOK = r"""
ip -N route show table all; ip -N -6 route show table all
ip -d link; ip nexthop; ip rule; ip -6 rule; nft list ruleset
ls -A /etc/cni/net.d /opt/cni/bin; ls -d /run/underlay /var/lib/underlay
cd /proc/sys/net; grep . ipv4/ip_forward ipv4/conf/*/rp_filter ipv[46]/conf/*/forwarding
grep . ipv[46]/conf/*/ignore_routes_with_linkdown ipv6/conf/*/accept_ra
"""


def look(cluster: Cluster) -> dict[str, list[str]]:
    found = {}
    for node in NODES:
        said = cluster.node_exec(node, "sh", "-c", LOOK, check=False)
        # Table local, and link-local routes: the kernel's own, which come when duplicate detection is over.
        lines = [line for line in said.splitlines() if not re.search("table 255|fe80::", line)]
        found[node] = [re.sub(r" (expires|qlen) \S+", "", line).rstrip() for line in lines]
    return found


def blocks_at(cluster: Cluster, tor: str) -> list[str]:
    said = cluster.node_exec(
        tor, "birdc", "show", "route", "where", "net ~ [10.244.0.0/16+] || net ~ [fd00:10:244::/48+]", check=False
    )
    return [line for line in said.splitlines() if "10.244." in line or "fd00:10:244" in line]


def end_pods(cluster: Cluster) -> None:
    cluster.kubectl("delete", "namespace", FIRST, "--timeout=90s")


def delete_manifests(cluster: Cluster, *, check: bool = True) -> str:
    return cluster.kubectl(
        "delete", "--ignore-not-found", "-k", "manifests/", "--timeout=90s", check=check, limit=LIMIT
    )


def ours(cluster: Cluster) -> list[str]:
    """Objects of the cluster itself that have our name."""
    kinds = (
        "crds,clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,namespaces"
    )
    return [line for line in cluster.kubectl("get", kinds, "-o", "name").splitlines() if "underlay" in line]


def test_nodes_and_tor_are_as_before_in_good_order_and_in_a_hurry(bare: Callable[..., Cluster]) -> None:
    cluster = bare("--racks", "1", "--nodes", "2")
    before = look(cluster)
    cluster.install()
    cluster.ready()
    in_order(cluster, before)
    # It can come again.
    cluster.install()
    cluster.ready()
    in_a_hurry(cluster, before)


def in_order(cluster: Cluster, before: dict[str, list[str]]) -> None:
    eventually(lambda: len(blocks_at(cluster, "tor-1")) >= 4)
    # One of the two may still be on its way.
    cluster.running("-n", FIRST, count=2)
    refused = "2 pods have an address of a block: first/first-"
    eventually(lambda: refused in cluster.underlayctl("uninstall", "--yes", check=False), limit=LIMIT, every=0.5)
    assert cluster.not_ready() == []
    end_pods(cluster)
    said = cluster.underlayctl("uninstall", "--yes", "--restore-forwarding", limit=300)
    print(said)
    for node in NODES:
        assert f"{node}: removed: announcements, and the sessions with all peers" in said
        assert f"{node}: removed: the run directory" in said
    assert look(cluster) == before
    # They were told, which is not yet read.
    eventually(lambda: blocks_at(cluster, "tor-1") == [])
    assert cluster.get("ipamblocks") == []
    assert len(cluster.get("ippools")) == 2
    delete_manifests(cluster)
    eventually(lambda: ours(cluster) == [], limit=LIMIT, every=0.5)


def in_a_hurry(cluster: Cluster, before: dict[str, list[str]]) -> None:
    """Everything is deleted at once; who would free the blocks is gone before them."""

    # An API server takes half a minute until it compares with a kind that is new.
    def guarded() -> bool:
        what = ("delete", "crd", "ipamblocks.underlay.network", "--dry-run=server")
        return "underlayctl uninstall" in cluster.kubectl(*what, check=False)

    eventually(guarded, limit=LIMIT, every=1.0)
    said = delete_manifests(cluster, check=False)
    print(said)
    kind = "customresourcedefinition.apiextensions.k8s.io/ipamblocks.underlay.network"
    assert "underlayctl uninstall takes blocks away" in said
    eventually(lambda: ours(cluster) == [kind], limit=LIMIT, every=0.5)
    (crd,) = cluster.get("crd", "ipamblocks.underlay.network")
    assert "deletionTimestamp" not in crd["metadata"], "it waits for finalizers that nobody removes"
    assert cluster.get("ipamblocks")
    # Pods run on, and end: their DELs wait in the queue.
    end_pods(cluster)
    image = "underlay.network/underlay:lab"
    print(cluster.underlayctl("uninstall", "--yes", "--restore-forwarding", "--image", image, limit=300))
    assert look(cluster) == before
    delete_manifests(cluster)
    eventually(lambda: ours(cluster) == [], limit=LIMIT, every=0.5)
