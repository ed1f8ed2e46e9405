"""What the API server says of a node, for ``install check``."""

from __future__ import annotations

from collections.abc import Mapping

from ctl.kubeapi import Api, Wire, api_of
from ctl.preflight import Cluster
from store.clock import Clock
from store.errors import BadSelector, StoreError
from store.kubehttp import Refusal
from store.selector import parse as parse_selector

#: Name and address.
Peers = tuple[tuple[str, str], ...]

_GROUP = "/apis/underlay.network/v1"


async def ask(
    url: str, node: str, clock: Clock, environment: Mapping[str, str], unseen: dict[str, str]
) -> tuple[Cluster | None, Peers]:
    """The cluster as ``url`` leads to it, and the node's BGPPeers that have an address. What cannot be read is added to
    ``unseen``; nothing is raised."""
    try:
        async with api_of(url.partition(":")[2], clock) as api:
            return await _ask(api, node, environment, unseen)
    except StoreError as e:
        unseen["cluster"] = unseen["node"] = unseen["peers"] = str(e)
        return None, ()


async def _ask(api: Api, name: str, environment: Mapping[str, str], unseen: dict[str, str]) -> tuple[Cluster, Peers]:
    node = await api.get(f"/api/v1/nodes/{name}")
    if node is None:
        unseen["node"] = f"there is no Node {name}"
    status: Wire = (node or {}).get("status", {})
    info: Wire = status.get("nodeInfo", {})
    found = Cluster(
        node=name,
        found=node is not None,
        kubernetes=info.get("kubeletVersion", ""),
        runtime=info.get("containerRuntimeVersion", ""),
        addresses=tuple(a["address"] for a in status.get("addresses", ()) if a["type"] == "InternalIP"),
        pod_cidrs=tuple((node or {}).get("spec", {}).get("podCIDRs", ())),
        service_cidrs=await _services(api, environment),
        pools=tuple((p["metadata"]["name"], p["spec"]["cidr"]) for p in await api.list(f"{_GROUP}/ippools")),
    )
    labels = (node or {}).get("metadata", {}).get("labels", {})
    try:
        peers = [p for p in await api.list(f"{_GROUP}/bgppeers") if _is_of(p["spec"], name, labels)]
    except Refusal as e:  # an account of ours may not list them
        unseen["peers"] = e.status.message or str(e)
        return found, ()
    return found, tuple((p["metadata"]["name"], host(p["spec"]["peerIP"])) for p in peers)


async def _services(api: Api, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The ranges of Services, as the API server says since 1.33; else the address of the one that is everywhere."""
    try:
        ranges = await api.list("/apis/networking.k8s.io/v1/servicecidrs")
        if ranges:
            return tuple(cidr for one in ranges for cidr in one["spec"]["cidrs"])
        known = await api.get("/api/v1/namespaces/default/services/kubernetes")
    except Refusal:  # an account of ours may not read them; the address is in its environment
        return tuple(filter(None, (environment.get("KUBERNETES_SERVICE_HOST", ""),)))
    return tuple((known or {}).get("spec", {}).get("clusterIPs", ()))


def _is_of(spec: Wire, node: str, labels: Mapping[str, str]) -> bool:
    """Whether it is a peer of this node, with an address (``BGPPeer``)."""
    if not spec.get("peerIP") or spec.get("node", node) != node:
        return False
    try:
        return parse_selector(spec.get("nodeSelector") or "all()").matches(labels)
    except BadSelector:
        return False


def host(peer_ip: str) -> str:
    """``peerIP`` without its port: 192.0.2.1, 192.0.2.1:1179, [2001:db8::1]:1179."""
    if peer_ip.startswith("["):
        return peer_ip[1:].partition("]")[0]
    return peer_ip.partition(":")[0] if peer_ip.count(":") == 1 else peer_ip
