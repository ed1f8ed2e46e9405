"""Objects as the API server has them, and one look that needs no client."""

from __future__ import annotations

import http.client
import ssl
from typing import Any

from lab.kube.cluster import Cluster
from lab.kube.installed import Wire
from store.model import FINALIZER_OWNER, block_name

OWNER = FINALIZER_OWNER

_GROUP = "/apis/underlay.network/v1"


def status_of(cluster: Cluster, path: str, *, token: str = "") -> int:
    """HTTP's status of a GET, without waiting for the end of the answer (a watch has none); anonymous by default."""
    context = ssl.create_default_context(cafile=str(cluster.ca))
    host, _, port = cluster.url.removeprefix("https://").partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=60, context=context)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    finally:
        connection.close()


def path(plural: str, name: str = "", *, sub: str = "") -> str:
    """Where one of our kinds is."""
    return f"{_GROUP}/{plural}" + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")


def pool(name: str, cidr: str, size: int = 0, **spec: Any) -> Wire:
    return _ours("IPPool", name, {"cidr": cidr, **({"blockSize": size} if size else {}), **spec})


def block(cidr: str, node_name: str, pool_name: str = "pool", **meta: Any) -> Wire:
    """``meta`` is the rest of the metadata, in place of the owner's finalizer."""
    made = _ours("IPAMBlock", block_name(cidr), {"cidr": cidr, "pool": pool_name, "node": node_name})
    made["metadata"] |= meta or {"finalizers": [OWNER]}
    return made


def node_status(name: str) -> Wire:
    return {"apiVersion": "underlay.network/v1", "kind": "BGPNodeStatus", "metadata": {"name": name}}


def _ours(kind: str, name: str, spec: Wire) -> Wire:
    return {"apiVersion": "underlay.network/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
