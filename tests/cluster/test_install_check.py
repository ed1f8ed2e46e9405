"""``underlayctl install check`` on nodes of a cluster, as docs/install-check.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.cluster.cluster import BIN, NAMESPACE, Cluster

NODES = ("node-1", "node-2", "node-3", "node-4")
#: For no node, so that nobody gets an address of it meanwhile.
OVERLAP = """
apiVersion: underlay.network/v1
kind: IPPool
metadata:
  name: over-services
spec:
  cidr: 10.96.8.0/24
  disabled: true
  nodeSelector: "!all()"
"""


def found(text: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(text)["checks"]}


def test_every_node_is_fit_as_its_own_account_sees_it(cluster: Cluster) -> None:
    pods = cluster.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=cni")
    assert sorted(pod["spec"]["nodeName"] for pod in pods) == sorted(NODES)
    for pod in pods[:2]:
        words = ["exec", "-n", NAMESPACE, pod["metadata"]["name"], "-c", "cni", "--"]
        checks = found(cluster.kubectl(*words, "underlayctl", "install", "check", "--root", "/host", "-o", "json"))
        wrong = {name: c for name, c in checks.items() if c["result"] not in ("ok", "skipped")}
        assert wrong == {}
        assert checks["node"]["found"].startswith(f"{pod['spec']['nodeName']}: ")
        assert [name for name, c in checks.items() if c["result"] == "skipped"] == ["peers"]
        assert "cannot list" in checks["peers"]["found"]


def test_an_administrator_at_a_nodes_console_sees_peers_too(cluster: Cluster, tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    text = (cluster.folder.path / "admin.kubeconfig").read_text()
    kubeconfig.write_text(re.sub(r"https://127\.0\.0\.1:\d+", "https://10.96.0.1:443", text))
    words = [str(BIN / "underlayctl"), "install", "check", "-o", "json", "--store", f"kube:{kubeconfig}"]
    checks = found(cluster.node_exec("node-1", *words))
    wrong = {name: c for name, c in checks.items() if c["result"] not in ("ok", "skipped")}
    assert wrong == {}
    assert checks["peers"]["found"].endswith("answer at port 179")
    # Speakers wait for peers in a mesh alone.
    assert checks["port-179"]["found"] == "nobody waits at port 179"
    # The same machine, if somebody put a pool over the Services.
    cluster.kubectl("create", "-f", "-", text=OVERLAP)
    try:
        said = cluster.node_exec("node-1", *words, check=False)
        pools = found(said)["pools"]
    finally:
        cluster.kubectl("delete", "ippool", "over-services")
    assert pools["result"] == "failure"
    assert "pool over-services (10.96.8.0/24) and the Services (10.96.0.0/" in pools["found"]
