"""NetworkUnavailable of a Node: taken back by the agent's own code and token, with the taint that Kubernetes' own
controller makes of it; and what else a policy lets our tokens write of Nodes, which is nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from agent.network_condition import KIND, NetworkCondition
from lab.kube.cluster import Cluster, Refused
from lab.kube.installed import AGENT, CNI, NAMESPACE, SPEAKER, Installed, Wire, denial
from store.clock import SystemClock
from store.errors import StoreError
from store.informer import Informer
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.model import Node
from tests.conftest import eventually

STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"
NODES = "/api/v1/nodes"
STATUS = f"{NODES}/node-1/status"
TAINT = "node.kubernetes.io/network-unavailable"
USER = f"system:serviceaccount:{NAMESPACE}:{AGENT}"
LIFECYCLE = "node-lifecycle-controller"

UNAVAILABLE = {"type": KIND, "status": "True", "reason": "NoRouteCreated", "message": "RouteController failed"}
READY = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "all is well"}
ADDRESSES = [{"type": t, "address": a} for t, a in (("InternalIP", "192.0.2.1"), ("InternalIP", "fd00::1"))]


def say(cluster: Cluster, *conditions: Wire, node: str = "node-1") -> None:
    """As an administrator, or a controller of a cloud."""
    patch = {"status": {"conditions": list(conditions)}}
    cluster.request("PATCH", f"{NODES}/{node}/status", patch, content_type=STRATEGIC)


def conditions(cluster: Cluster) -> dict[str, Wire]:
    found = cluster.request("GET", f"{NODES}/node-1")["status"].get("conditions", [])
    return {c["type"]: c for c in found}


# -- our own code ------------------------------------------------------------------------------------------------------


def test_a_node_that_is_said_to_have_no_network_gets_it_back_and_loses_the_taint(installed: Installed) -> None:
    cluster = installed.cluster
    began = time.time()
    say(cluster, READY, UNAVAILABLE)
    status = {"addresses": ADDRESSES, "capacity": {"cpu": "2"}, "images": [{"names": ["a"], "sizeBytes": 1}]}
    cluster.request("PATCH", STATUS, {"status": status}, content_type=MERGE)
    before = cluster.request("GET", f"{NODES}/node-1")

    def tainted() -> bool:
        taints = cluster.request("GET", f"{NODES}/node-1")["spec"].get("taints", [])
        return TAINT in [taint["key"] for taint in taints]

    async def take_back() -> None:
        kubeconfig = cluster.kubeconfig(installed.tokens[AGENT, "node-1"])
        store, clock = KubeStore(from_kubeconfig([kubeconfig]), SystemClock()), SystemClock()
        informer = Informer(store, Node, clock, {"metadata.name": "node-1"}, on_change=lambda: condition.wake())
        condition = NetworkCondition(store, clock, lambda: informer.items.get("node-1"), lambda: "")
        tasks = [asyncio.create_task(informer.run()), asyncio.create_task(condition.run())]
        try:
            for n in range(2):  # and once more: somebody says it again
                async with asyncio.timeout(60):
                    while conditions(cluster)[KIND]["status"] == "True":  # noqa: ASYNC110 - another process writes it
                        await asyncio.sleep(0.05)
                assert conditions(cluster)[KIND]["reason"] == "UnderlayIsUp"
                await asyncio.to_thread(eventually, lambda: not tainted())
                asked = [r for r in cluster.audit_log.requests(began) if r.verb == "patch" and r.user == USER]
                assert len([r for r in asked if r.code < 400]) == n + 1
                after = cluster.request("GET", f"{NODES}/node-1")["status"]
                others = [c for c in after.pop("conditions") if c["type"] != KIND]
                assert others == [c for c in before["status"]["conditions"] if c["type"] != KIND]
                assert after == {k: v for k, v in before["status"].items() if k != "conditions"}
                say(cluster, UNAVAILABLE)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await store.close()

    with cluster.more_controllers([LIFECYCLE], "--node-monitor-period=500ms"):
        eventually(tainted)
        asyncio.run(take_back())


def test_a_node_that_was_read_before_it_changed_is_read_again(installed: Installed) -> None:
    """What was decided on an older Node is not written: somebody may have said more meanwhile."""
    cluster = installed.cluster
    say(cluster, READY, UNAVAILABLE)

    async def main() -> None:
        store = KubeStore(from_kubeconfig([cluster.kubeconfig(installed.tokens[AGENT, "node-1"])]), SystemClock())
        try:
            (seen,) = (await store.list(Node, where={"metadata.name": "node-1"})).items
            say(cluster, {**READY, "status": "False"})
            with pytest.raises(StoreError, match="is not what this was decided on"):
                await store.update_status(seen)
        finally:
            await store.close()

    asyncio.run(main())
    assert (conditions(cluster)["Ready"]["status"], conditions(cluster)[KIND]["status"]) == ("False", "True")


# -- the policy --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _unrestrained(_installed: Installed) -> Iterator[None]:
    """All that is refused here is refused by the policy: our accounts may do anything to Nodes."""
    cluster = _installed.cluster
    cluster.reset()
    api = "rbac.authorization.k8s.io"
    rule = {"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["*"]}
    group = {"kind": "Group", "apiGroup": api, "name": f"system:serviceaccounts:{NAMESPACE}"}
    meta = {"name": "test-nodes"}
    reference = {"apiGroup": api, "kind": "ClusterRole", "name": "test-nodes"}
    role = {"apiVersion": f"{api}/v1", "kind": "ClusterRole", "metadata": meta, "rules": [rule]}
    binding = {"apiVersion": f"{api}/v1", "kind": "ClusterRoleBinding", "metadata": meta, "roleRef": reference}
    cluster.apply([role, {**binding, "subjects": [group]}])
    say(cluster, READY, UNAVAILABLE)
    say(cluster, READY, UNAVAILABLE, node="node-2")
    with cluster.remembered():
        speaker = _installed.tokens[SPEAKER, "node-1"]
        eventually(lambda: denial(cluster, "GET", f"{NODES}/node-1", token=speaker) is None)
        yield


@pytest.fixture
def free(_unrestrained: None, installed: Installed) -> Installed:
    return installed


def status(**fields: object) -> Wire:
    return {"status": fields}


UP = {**UNAVAILABLE, "status": "False", "reason": "UnderlayIsUp"}
#: Method, path below /api/v1/nodes, body, content type.
FORBIDDEN: dict[str, tuple[str, str, object, str]] = {
    "of another node": ("PATCH", "/node-2/status", status(conditions=[UP]), STRATEGIC),
    "that there is no network": (
        "PATCH",
        "/node-1/status",
        status(conditions=[UNAVAILABLE | {"reason": "x"}]),
        STRATEGIC,
    ),
    "another condition": ("PATCH", "/node-1/status", status(conditions=[{**READY, "status": "False"}]), STRATEGIC),
    "both": ("PATCH", "/node-1/status", status(conditions=[UP, {**READY, "message": "x"}]), STRATEGIC),
    "a new condition": ("PATCH", "/node-1/status", status(conditions=[{"type": "X", "status": "True"}]), STRATEGIC),
    "it alone, without the others": ("PATCH", "/node-1/status", status(conditions=[UP]), MERGE),
    "an address": ("PATCH", "/node-1/status", status(conditions=[UP], addresses=ADDRESSES), STRATEGIC),
    "room for more pods": ("PATCH", "/node-1/status", status(capacity={"pods": "9"}), STRATEGIC),
    "a label, by the side door": ("PATCH", "/node-1/status", {"metadata": {"labels": {"a": "b"}}}, STRATEGIC),
    "an annotation": ("PATCH", "/node-1", {"metadata": {"annotations": {"a": "b"}}}, MERGE),
    "a taint": ("PATCH", "/node-1", {"spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]}}, MERGE),
    "unschedulable": ("PATCH", "/node-2", {"spec": {"unschedulable": True}}, MERGE),
    "a node gone": ("DELETE", "/node-2", None, MERGE),
    "itself gone": ("DELETE", "/node-1", None, MERGE),
    "a new node": ("POST", "", {"metadata": {"name": "node-9"}}, "application/json"),
}


def check(refusal: Refused | None) -> None:
    assert refusal is not None, "it was let through"
    assert (refusal.code, "ValidatingAdmissionPolicy 'underlay-node-condition'" in str(refusal)) == (403, True), refusal


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("account", [AGENT, CNI])
def test_our_processes_write_nothing_else_of_nodes(free: Installed, account: str, what: str) -> None:
    method, at, body, content = FORBIDDEN[what]
    before = free.cluster.request("GET", NODES)["items"]
    token = free.tokens[account, "node-1"]
    check(denial(free.cluster, method, f"{NODES}{at}", body, token=token, content_type=content))
    assert free.cluster.request("GET", NODES)["items"] == before


def test_a_token_that_is_bound_to_no_node_writes_not_even_that(free: Installed) -> None:
    body = status(conditions=[UP])
    refusal = denial(free.cluster, "PATCH", STATUS, body, token=free.unbound[AGENT], content_type=STRATEGIC)
    check(refusal)
    assert "bound to no node" in str(refusal)


def test_its_own_node_may_and_so_may_people_anything(free: Installed) -> None:
    body = status(conditions=[UP])
    free.cluster.request("PATCH", STATUS, body, token=free.tokens[AGENT, "node-1"], content_type=STRATEGIC)
    assert conditions(free.cluster)[KIND]["reason"] == "UnderlayIsUp"
    say(free.cluster, {**READY, "status": "False"}, UNAVAILABLE)
    assert conditions(free.cluster)[KIND]["status"] == "True"
