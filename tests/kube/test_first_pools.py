"""The first pools on a real API server: agents with the tokens of their pods, rights and policies in force."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.fib import KernelState
from agent.poolmaker import RECORD, PoolMaker
from lab.kube.cluster import Cluster
from lab.kube.installed import AGENT, CNI, NAMESPACE, Installed, Wire, denial, node, pod_token
from store.clock import SystemClock
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from tests.conftest import eventually
from tests.kube.objects import path, pool, status_of

CONFIGURATION = "networking: {podSubnet: '10.244.0.0/16,fd00:10:244::/56', serviceSubnet: 10.96.0.0/12}"
CONFIG_MAPS = "/api/v1/namespaces/{}/configmaps"
SETTINGS = {"metadata": {"name": "kubeadm-config"}, "data": {"ClusterConfiguration": CONFIGURATION}}
CLUSTER_CONFIGS = "/apis/k0s.k0sproject.io/v1beta1/namespaces/kube-system/clusterconfigs"
#: The definition as far as it matters here: k0s' own has every field.
K0S: Wire = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "clusterconfigs.k0s.k0sproject.io"},
    "spec": {
        "group": "k0s.k0sproject.io",
        "names": {"kind": "ClusterConfig", "plural": "clusterconfigs", "singular": "clusterconfig"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def makers(installed: Installed, nodes: list[str], folder: Path) -> Iterator[tuple[KubeStore, PoolMaker]]:
    """An agent's part on each node, with the token of its pod there."""
    cluster = installed.cluster
    for number, name in zip(itertools.count(), nodes, strict=False):
        token = installed.tokens.get((AGENT, name)) or pod_token(cluster, AGENT, name)
        kubeconfig = cluster.kubeconfig(token, path=folder / f"{number}.kubeconfig")
        store = KubeStore(from_kubeconfig([kubeconfig]), SystemClock())
        yield (
            store,
            PoolMaker(
                store,
                SystemClock(),
                node=name,
                namespace=NAMESPACE,
                wishes=None,
                kernel=KernelState,
                on_change=lambda: None,
                environment={},
            ),
        )


def together(installed: Installed, nodes: list[str], folder: Path) -> list[str]:
    """Each node's runs to its end, all at once; what they had to say then."""

    async def main() -> list[str]:
        made = list(makers(installed, nodes, folder))
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*(agent.run() for _, agent in made))
        finally:
            for store, _ in made:
                await store.close()
        return [agent.reason for _, agent in made]

    return asyncio.run(main())


def once(installed: Installed, folder: Path) -> tuple[bool, str]:
    """node-1 looks once."""

    async def main() -> tuple[bool, str]:
        ((store, agent),) = makers(installed, ["node-1"], folder)
        try:
            async with asyncio.timeout(60):
                return await agent.step()
        finally:
            await store.close()

    return asyncio.run(main())


def there(cluster: Cluster) -> dict[str, tuple[str, int]]:
    items = cluster.request("GET", path("ippools"))["items"]
    return {i["metadata"]["name"]: (i["spec"]["cidr"], i["metadata"]["generation"]) for i in items}


BOTH = {"default-ipv4": ("10.244.0.0/16", 1), "default-ipv6": ("fd00:10:244::/56", 1)}


def test_sixteen_agents_make_one_pool_of_each_family_and_none_again(installed: Installed, tmp_path: Path) -> None:
    cluster = installed.cluster
    cluster.request("POST", CONFIG_MAPS.format("kube-system"), SETTINGS)
    nodes = ["node-1", "node-2", *(f"more-{number}" for number in range(14))]
    for name in nodes[2:]:
        cluster.request("POST", "/api/v1/nodes", node(name))
    assert set(together(installed, nodes, tmp_path)) == {""}
    assert there(cluster) == BOTH
    record = cluster.request("GET", f"{CONFIG_MAPS.format(NAMESPACE)}/{RECORD}")
    assert record["data"]["source"] == "kubeadm's podSubnet"
    for name in BOTH:
        cluster.request("DELETE", path("ippools", name))
    settled, reason = once(installed, tmp_path)
    assert (settled, there(cluster)) == (False, {})
    assert f"delete ConfigMap {NAMESPACE}/{RECORD}" in reason


def test_k0s_says_it_where_its_dynamic_configuration_is_on(installed: Installed, tmp_path: Path) -> None:
    cluster = installed.cluster
    settled, reason = once(installed, tmp_path)
    assert not settled
    assert "nor has k0s" in reason
    cluster.apply([K0S])
    network = {"provider": "custom", "podCIDR": "10.243.0.0/16", "serviceCIDR": "10.96.0.0/12"}
    body = {
        "apiVersion": "k0s.k0sproject.io/v1beta1",
        "kind": "ClusterConfig",
        "metadata": {"name": "k0s", "namespace": "kube-system"},
        "spec": {"network": network},
    }
    cluster.request("POST", CLUSTER_CONFIGS, body)
    assert once(installed, tmp_path) == (True, "")
    assert there(cluster) == {"default-ipv4": ("10.243.0.0/16", 1)}


def test_the_podcidrs_of_nodes_where_no_installer_left_anything(installed: Installed, tmp_path: Path) -> None:
    cluster = installed.cluster
    for name, cidr in (("node-1", "10.42.0.0/24"), ("node-2", "10.42.1.0/24")):
        spec = {"spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}
        cluster.request("PATCH", f"/api/v1/nodes/{name}", spec, content_type="application/merge-patch+json")
    assert once(installed, tmp_path) == (True, "")
    made = cluster.request("GET", path("ippools", "default-ipv4"))["spec"]
    assert (made["cidr"], made["usePodCIDRs"]) == ("10.42.0.0/16", True)


def refusal(cluster: Cluster, at: str, body: Wire, token: str) -> str:
    refused = denial(cluster, "POST", f"{at}?dryRun=All", body, token=token)
    return str(refused.status["message"]) if refused else ""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (pool("pods", "10.244.0.0/16"), "this one would be default-ipv4"),
        (pool("default-ipv4", "fd00:10::/56"), "this one would be default-ipv6"),
        (pool("default-ipv6", "10.244.0.0/16"), "this one would be default-ipv4"),
        (pool("default-ipv4", "10.244.0.0/16"), ""),
        (pool("default-ipv6", "fd00:10::/56"), ""),
    ],
)
def test_a_node_makes_no_pool_but_the_first_ones(installed: Installed, body: Wire, said: str) -> None:
    cluster, token = installed.cluster, installed.tokens[AGENT, "node-1"]
    found = refusal(cluster, path("ippools"), body, token)
    assert said in found if said else not found
    assert "bound to no node" in refusal(cluster, path("ippools"), body, installed.unbound[AGENT])
    assert " cannot " in refusal(cluster, path("ippools"), body, installed.tokens[CNI, "node-1"])
    assert refusal(cluster, path("ippools"), body, cluster.admin_token) == ""


def test_a_node_makes_none_beside_another(installed: Installed) -> None:
    cluster, token = installed.cluster, installed.tokens[AGENT, "node-1"]
    second = pool("default-ipv6", "fd00:10::/56")
    cluster.request("POST", path("ippools"), pool("default-ipv4", "10.244.0.0/16"), token=token)
    assert refusal(cluster, path("ippools"), second, token) == ""
    cluster.request("POST", path("ippools"), pool("pods", "10.9.0.0/16"))
    eventually(lambda: "there is IPPool pods (10.9.0.0/16)" in refusal(cluster, path("ippools"), second, token))


def test_a_node_reads_what_it_needs_and_writes_its_record_and_no_other(installed: Installed) -> None:
    cluster, token = installed.cluster, installed.tokens[AGENT, "node-1"]
    ours, theirs = CONFIG_MAPS.format(NAMESPACE), CONFIG_MAPS.format("kube-system")
    for name, code in (("kubeadm-config", 404), ("kube-proxy", 403), ("", 403)):
        assert status_of(cluster, f"{theirs}/{name}".rstrip("/"), token=token) == code, name
    for name, code in ((RECORD, 404), ("underlay-config", 403), ("", 403)):
        assert status_of(cluster, f"{ours}/{name}".rstrip("/"), token=token) == code, name
    record, other = ({"metadata": {"name": name}} for name in (RECORD, "other"))
    assert refusal(cluster, ours, record, token) == ""
    assert "may create underlay-first-pools" in refusal(cluster, ours, other, token)
    assert "may create underlay-first-pools" in refusal(cluster, ours, record, installed.unbound[AGENT])
    assert " cannot " in refusal(cluster, theirs, record, token)
    assert refusal(cluster, ours, other, cluster.admin_token) == ""


@pytest.mark.parametrize(
    ("binding", "read", "said"),
    [
        (
            "namespaces/kube-system/rolebindings/underlay-agent-installer",
            f"{CONFIG_MAPS.format('kube-system')}/kubeadm-config",
            'configmaps "kubeadm-config" is forbidden',
        ),
        (
            f"namespaces/{NAMESPACE}/rolebindings/underlay-agent-first-pools",
            f"{CONFIG_MAPS.format(NAMESPACE)}/{RECORD}",
            f'configmaps "{RECORD}" is forbidden',
        ),
        ("clusterrolebindings/underlay-agent", path("ippools"), "ippools.underlay.network is forbidden"),
    ],
)
def test_without_a_right_it_makes_nothing_and_says_which(
    installed: Installed, tmp_path: Path, binding: str, read: str, said: str
) -> None:
    cluster = installed.cluster
    cluster.request("POST", CONFIG_MAPS.format("kube-system"), SETTINGS)
    cluster.request("DELETE", f"/apis/rbac.authorization.k8s.io/v1/{binding}")

    async def reason() -> str:
        ((store, agent),) = makers(installed, ["node-1"], tmp_path)
        told: asyncio.Queue[str] = asyncio.Queue()
        agent._on_change = lambda: told.put_nowait(agent.reason)
        task = asyncio.create_task(agent.run())
        try:
            async with asyncio.timeout(60):
                return await told.get()
        finally:
            task.cancel()
            await store.close()

    eventually(lambda: status_of(cluster, read, token=installed.tokens[AGENT, "node-1"]) == 403)
    assert said in asyncio.run(reason())
    assert there(cluster) == {}
