"""The archive for help of a real cluster: from its administrator, from a node's own pod, with the API server away, and
with secrets planted where a cluster may have them."""

from __future__ import annotations

import base64
import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.kube.build import find_node
from tests.cluster.cluster import BIN, NAMESPACE, ROOT, Cluster, Wire

#: Planted: in a Secret, an annotation and an Event's note, a pod's environment and arguments.
PLANTED = "Planted-in-a-cluster-4711"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"
NODE = "node-1"


def unpacked(data: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        read = {entry.name.partition("/")[2]: archive.extractfile(entry) for entry in archive}
        return {name: file.read().decode() for name, file in read.items() if file}


def errors(files: dict[str, str]) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in files["errors.txt"].splitlines())


@pytest.fixture
def planted(cluster: Cluster) -> Iterator[None]:
    secret: Wire = {"apiVersion": "v1", "kind": "Secret", "stringData": {"tor": PLANTED}}
    secret["metadata"] = {"name": "diags", "namespace": NAMESPACE}
    pod: Wire = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "diags", "namespace": NAMESPACE}}
    container = {"name": "main", "image": "underlay.network/none:none", "args": [f"--token={PLANTED}"]}
    container["env"] = [{"name": "PLAIN_NAME", "value": PLANTED}]
    pod["spec"] = {"containers": [container], "nodeSelector": {"no": "such-node"}}
    # kubectl apply leaves a copy of each in an annotation.
    cluster.apply(secret, pod)
    try:
        yield
    finally:
        cluster.kubectl("delete", "--now", "-n", NAMESPACE, "secret/diags", "pod/diags")


def from_pod(cluster: Cluster, *options: str) -> dict[str, str]:
    """As docs/diags.md does it."""
    agents = cluster.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=agent")
    (pod,) = [p["metadata"]["name"] for p in agents if p["spec"]["nodeName"] == NODE]
    argv = [str(find_node().kubectl), "exec", "-n", NAMESPACE, pod, "--", "underlayctl", "diags", "-o", "-", *options]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=120, env=cluster.environment)
    return unpacked(done.stdout)


def tokens(cluster: Cluster) -> list[str]:
    """Of every pod of ours on that node, as the kubelet put them there."""
    script = "cat /var/lib/kubelet/pods/*/volumes/kubernetes.io~projected/*/token"
    found = cluster.node_exec(NODE, "sh", "-c", script).split("eyJ")[1:]
    return [f"eyJ{part}" for part in found]


def test_what_a_cluster_and_a_node_say_is_in_it_and_no_secret_is(
    cluster: Cluster, planted: None, tmp_path: Path
) -> None:
    target = tmp_path / "cluster.tar.gz"
    cluster.underlayctl("diags", "-o", str(target), "--run", str(tmp_path / "no-node"))
    whole = unpacked(target.read_bytes())
    assert set(errors(whole)) == {"node"}
    assert {"cluster/ipam-check.txt", "cluster/api-pods.json", "cluster/events.json"} <= set(whole)
    assert '"name": "diags"' in whole["cluster/api-pods.json"]
    assert "Established" in whole["cluster/node-status.txt"]
    of_logs = [path for path in whole if path.startswith("cluster/logs/")]
    assert len(of_logs) >= 12

    node = from_pod(cluster)
    missing = errors(node)
    # What the pod's image has not, and its token may not.
    assert not [path for path in missing if not path.startswith(("node/commands/", "cluster/"))], missing
    assert "proto=142" in node["node/kernel/routes.txt"]
    assert "table inet underlay" in node["node/kernel/nftables.txt"]
    assert '"Established"' in node["node/agent/bgp-peers.txt"]
    assert "underlay_" in node["node/cni/metrics.txt"]
    assert "neighbor " in node["node/speaker/exabgp.conf"]
    assert "cannot list" in missing["cluster/api-pods.json"]

    secrets = [PLANTED, base64.b64encode(PLANTED.encode()).decode(), *tokens(cluster)]
    assert len(secrets) >= 4
    for files in (whole, node):
        everything = "".join(files.values())
        assert [secret for secret in secrets if secret in everything] == []


def test_it_works_while_the_api_server_is_away(cluster: Cluster) -> None:
    """At the node's console: no store is reached, and what the node says is there."""
    argv = [str(BIN / "underlayctl"), "diags", "-o", "-", "--store", "kube:/nowhere"]
    said = cluster.node_exec(NODE, "sh", "-c", f"cd {ROOT}; {' '.join(argv)} 2>/dev/null | base64")
    files = unpacked(base64.b64decode(said))
    assert "/nowhere" in errors(files)["cluster"]
    assert "proto=142" in files["node/kernel/routes.txt"]
    assert "blackhole" in files["node/commands/ip-routes.txt"]
    assert any("underlay-agent" in path and path.endswith(".log") for path in files)
    assert "10-underlay.conflist" in files["node/conflists.txt"]
