"""The fixture itself: what a test leaves behind reaches no other, and nothing outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.kube.cluster import Cluster, Refused
from lab.kube.installed import crds
from tests.conftest import eventually
from tests.kube.world import COLLECTED

NODES = "/api/v1/nodes"
BLOCKS = "/apis/underlay.network/v1/ipamblocks"
POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"


def node(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}


def block(owner: dict[str, Any], *finalizers: str) -> dict[str, Any]:
    meta = owner["metadata"]
    reference = {"apiVersion": "v1", "kind": "Node", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "underlay.network/v1",
        "kind": "IPAMBlock",
        "metadata": {"name": "10-0-0-0-26", "ownerReferences": [reference], "finalizers": list(finalizers)},
        "spec": {"cidr": "10.0.0.0/26", "pool": "pool", "node": meta["name"]},
    }


def gone(cluster: Cluster, path: str) -> bool:
    try:
        cluster.request("GET", path)
    except Refused as e:
        assert e.code == 404, e
        return True
    return False


def contents(cluster: Cluster) -> dict[str, str]:
    """What etcd holds, whatever the numbers of its writes."""
    return {key: kv["value"] for key, kv in cluster.keys(values=True).items()}


def test_reset_undoes_all_that_a_test_can_do(cluster: Cluster) -> None:
    before = contents(cluster)
    owner = cluster.request("POST", NODES, node("node-1"))
    cluster.request("POST", BLOCKS, block(owner, "example.org/stuck"))
    cluster.request("DELETE", f"{BLOCKS}/10-0-0-0-26")  # marked, and nobody will ever let it go
    cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": "left-over"}})
    cluster.request("DELETE", "/apis/rbac.authorization.k8s.io/v1/clusterroles/view")
    cluster.apply([{**crds()[0], "metadata": {**crds()[0]["metadata"], "labels": {"changed": "yes"}}}])
    denial: dict[str, Any] = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "deny"},
        "spec": {
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": ["*"], "apiVersions": ["*"], "operations": ["*"], "resources": ["ipamblocks"]}
                ]
            },
            "validations": [{"expression": "false"}],
        },
    }
    cluster.request("POST", POLICIES, denial)
    cluster.reset()
    assert contents(cluster) == before
    assert gone(cluster, f"{BLOCKS}/10-0-0-0-26")
    assert cluster.request("GET", BLOCKS)["items"] == []
    owner = cluster.request("POST", NODES, node("node-1"))
    cluster.request("POST", BLOCKS, block(owner))


def test_a_few_tests_can_have_a_start_of_their_own(cluster: Cluster) -> None:
    before = contents(cluster)
    cluster.request("POST", NODES, node("node-1"))
    with cluster.remembered():
        cluster.request("DELETE", f"{NODES}/node-1")
        cluster.request("POST", NODES, node("node-2"))
        cluster.reset()
        assert [n["metadata"]["name"] for n in cluster.request("GET", NODES)["items"]] == ["node-1"]
    assert contents(cluster) == before
    cluster.reset()
    assert contents(cluster) == before


@pytest.mark.parametrize("name", ["etcd", "kube-apiserver", "kube-controller-manager"])
def test_reset_starts_again_what_a_test_killed(cluster: Cluster, name: str) -> None:
    cluster.request("POST", NODES, node("node-1"))
    cluster.kill(name)
    cluster.reset()
    assert cluster.request("GET", NODES)["items"] == []
    # All three are at work: the API server has the block, etcd keeps it, the controller-manager collects it.
    owner = cluster.request("POST", NODES, node("node-1"))
    cluster.request("POST", BLOCKS, block(owner))
    cluster.request("DELETE", f"{NODES}/node-1")
    assert eventually(lambda: gone(cluster, f"{BLOCKS}/10-0-0-0-26"))


def test_the_garbage_collector_takes_a_block_with_its_node_and_only_marks_one_with_a_finalizer(
    cluster: Cluster,
) -> None:
    owner = cluster.request("POST", NODES, node("node-1"))
    cluster.request("POST", BLOCKS, block(owner, "underlay.network/owner"))
    cluster.request("DELETE", f"{NODES}/node-1")
    path = f"{BLOCKS}/10-0-0-0-26"
    # Its collector may be looking for new kinds, which it does every 30 s, or come back from a test's restart.
    assert eventually(lambda: "deletionTimestamp" in cluster.request("GET", path)["metadata"], limit=COLLECTED)
    cluster.request("PATCH", path, {"metadata": {"finalizers": None}}, content_type="application/merge-patch+json")
    assert gone(cluster, path)


def test_a_token_bound_to_a_node_says_so(cluster: Cluster) -> None:
    cluster.request("POST", NODES, node("node-1"))
    cluster.request("POST", "/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "agent"}})
    token = cluster.token("agent", namespace="default", node="node-1")
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    me = cluster.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review, token=token)["status"]
    assert me["userInfo"]["username"] == "system:serviceaccount:default:agent"
    assert me["userInfo"]["extra"]["authentication.kubernetes.io/node-name"] == ["node-1"]
    for wrong, code in ((token, 403), ("nonsense", 401)):
        with pytest.raises(Refused) as refused:
            cluster.request("GET", NODES, token=wrong)
        assert refused.value.code == code


def test_two_clusters_know_nothing_of_each_other(cluster: Cluster, spare: Callable[[], Cluster]) -> None:
    other = spare()
    other.start()
    assert other.url != cluster.url
    cluster.request("POST", NODES, node("node-1"))
    assert other.request("GET", NODES)["items"] == []
    with pytest.raises(Refused):
        other.request("GET", BLOCKS)


_CHILD = """
import sys, time
from pathlib import Path
from lab.net import enter_sandbox
from lab.kube.build import find
from lab.kube.cluster import Cluster
enter_sandbox()
cluster = Cluster(Path(sys.argv[1]), find())
cluster.start()
print(*(cluster.pid(p) for p in ("etcd", "kube-apiserver", "kube-controller-manager")), flush=True)
time.sleep(600)
"""


def test_a_cluster_dies_with_the_process_that_started_it(cluster: Cluster, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "c")], cwd=root, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        try:
            pids = [int(word) for word in child.stdout.readline().split()]
            assert len(pids) == 3
        finally:
            os.kill(child.pid, signal.SIGKILL)
    assert eventually(lambda: not any(_alive(pid) for pid in pids))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_process_that_does_not_start_is_told_with_its_log(cluster: Cluster) -> None:
    cluster.kill("kube-apiserver")
    cluster.kill("etcd")
    began = time.monotonic()
    key = cluster.folder / "pki" / "server.key"
    kept = key.read_text()
    try:
        key.write_text("")
        cluster.start_etcd()
        with pytest.raises(Exception, match=r"kube-apiserver ended with 1[\s\S]*server\.key"):
            cluster.start_apiserver()
    finally:
        key.write_text(kept)
    assert time.monotonic() - began < 60
