"""What every store promises, held against the API server: the suite of tests/contract.

Left out: the tests that outrun a small history (how an API server forgets is in test_kube_store.py), and store URLs.
Said otherwise: a Node has no generation there.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

import pytest

from lab.kube.cluster import Cluster, Refused
from store import kubewire
from store.base import Store
from store.clock import SystemClock
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.model import Meta, Node, NodeAddress, NodeStatus, Pod

pytest.register_assert_rewrite("tests.contract.test_store")
from tests.contract.test_store import *  # noqa: E402, F403
from tests.contract.test_store import Plant, Run, changed, remade, with_status  # noqa: E402

del test_update_leaves_status_and_update_status_leaves_the_rest  # noqa: F821
del test_open_store_by_url, test_open_store_refuses_another_url  # noqa: F821
del test_a_version_that_is_too_old_is_expired, test_a_slow_watcher_falls_out_and_an_idle_one_does_not  # noqa: F821


@pytest.fixture
def make(cluster: Cluster) -> Callable[[], Store]:
    return lambda: KubeStore(from_kubeconfig([cluster.kubeconfig()]), SystemClock())


@pytest.fixture
def plant(cluster: Cluster) -> Plant:
    async def plant(store: Store, pod: Pod) -> Pod:
        namespace = f"/api/v1/namespaces/{pod.metadata.namespace}"
        try:
            # A pod needs one, and its controller may not have been here yet.
            cluster.request("POST", f"{namespace}/serviceaccounts", {"metadata": {"name": "default"}})
        except Refused as e:
            assert e.code == HTTPStatus.CONFLICT
        body = kubewire.encode(pod)
        body.setdefault("spec", {})["containers"] = [{"name": "main", "image": "-"}]
        cluster.request("POST", f"{namespace}/pods", body)
        return await store.get(Pod, pod.key)

    return plant


def test_update_leaves_status_and_update_status_leaves_the_rest_of_a_node(run: Run) -> None:
    async def test(store: Store) -> None:
        made = await store.create(Node(metadata=Meta(name="node-1", labels={"rack": "r1", "zone": "z1"})))
        status = NodeStatus(addresses=(NodeAddress(type="InternalIP", address="10.0.0.1"),))
        reported = await store.update_status(remade(with_status(made, status), labels={"rack": "r2"}))
        assert reported.status == status
        assert reported.metadata.labels == {"rack": "r1", "zone": "z1"}
        labelled = await store.update(remade(with_status(reported, NodeStatus()), labels={"rack": "r3"}))
        assert labelled.status == status
        assert labelled.metadata.labels == {"rack": "r3"}
        cordoned = await store.update(changed(labelled, unschedulable=True))
        assert await store.get(Node, "node-1") == cordoned
        assert (await store.update_status(with_status(cordoned, NodeStatus()))).status == NodeStatus()

    run(test)
