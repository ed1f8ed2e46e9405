"""``kubectl apply -k manifests/`` on a real cluster."""

from __future__ import annotations

from tests.cluster.cluster import Cluster


def test_every_node_is_ready_and_takes_pods(cluster: Cluster) -> None:
    assert cluster.not_ready() == []
