"""A cluster as an operator has it: our CRDs, rights and policies, two Nodes, and the tokens of our pods on them."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from store.model import block_name
from tests.conftest import eventually
from tests.kube.build import Programs
from tests.kube.cluster import CONTROLLERS, Cluster, Refused

NAMESPACE = "underlay-system"
CNI, AGENT, SPEAKER = "underlay-cni", "underlay-agent", "underlay-speaker"
ACCOUNTS = (CNI, AGENT, SPEAKER)
OWNER = "underlay.network/owner"
#: Checks the expressions of policies against the schemas of what they match.
TYPE_CHECKER = "validatingadmissionpolicy-status-controller"

Wire = dict[str, Any]

_MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
_GROUP = "/apis/underlay.network/v1"
#: Comes after all policies of ours: when it is in force, so are they.
_CANARY = "/api/v1/namespaces/default/configmaps"


class Installed:
    """``tokens`` by account and node: what the kubelet of that node puts into the account's pod there."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.tokens: dict[tuple[str, str], str] = {}
        #: A token of each account that is bound to nothing, as from a Secret.
        self.unbound: dict[str, str] = {}


@contextmanager
def install(folder: Path, programs: Programs, *more: Wire) -> Iterator[Installed]:
    """Starts it with ``more`` applied too. ``cluster.reset`` goes back to here, so the tokens stay good."""
    cluster = Cluster(folder, programs, controllers=(*CONTROLLERS, TYPE_CHECKER))
    try:
        cluster.start([*documents(), *more, *_canary()])
        made = Installed(cluster)
        for name in ("node-1", "node-2"):
            cluster.request("POST", "/api/v1/nodes", node(name))
            for account in ACCOUNTS:
                made.tokens[account, name] = pod_token(cluster, account, name)
        made.unbound = {account: cluster.token(account, namespace=NAMESPACE) for account in ACCOUNTS}
        probe = {"metadata": {"name": "canary"}}
        eventually(lambda: denial(cluster, "POST", f"{_CANARY}?dryRun=All", probe), limit=30)
        cluster.remember()
        yield made
    finally:
        cluster.close()


def documents() -> list[Wire]:
    """What an operator applies, in order."""
    crds = sorted(_MANIFESTS.glob("crds/*.yaml"))
    return [d for name in (*(f"crds/{f.name}" for f in crds), "rbac.yaml", "policies.yaml") for d in manifest(name)]


def manifest(name: str) -> list[Wire]:
    """The documents of a file in ``manifests``."""
    return [d for d in yaml.safe_load_all((_MANIFESTS / name).read_text()) if d]


def pod_token(cluster: Cluster, account: str, node_name: str) -> str:
    """The token of a new pod of ours; ``node_name`` "" for one that no scheduler has seen."""
    pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
    spec: Wire = {"serviceAccountName": account, "containers": [{"name": "main", "image": "underlay"}]}
    if node_name:
        spec["nodeName"] = node_name
    pod = cluster.request("POST", pods, {"metadata": {"name": f"{account}-{node_name or 'nowhere'}"}, "spec": spec})
    bound = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    asked = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": 3600, "boundObjectRef": bound},
    }
    answer = cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token", asked)
    return str(answer["status"]["token"])


def denial(cluster: Cluster, method: str, path: str, body: object = None, **how: Any) -> Refused | None:
    """Why the API server refuses this; None if it does not."""
    try:
        cluster.request(method, path, body, **how)
    except Refused as e:
        return e
    return None


def status_of(cluster: Cluster, path: str, *, token: str = "") -> int:
    """HTTP's status of a GET, without waiting for the end of the answer (a watch has none); anonymous by default."""
    context = ssl.create_default_context(cafile=str(cluster.ca))
    host, _, port = cluster.url.removeprefix("https://").partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=30, context=context)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    finally:
        connection.close()


# -- objects -------------------------------------------------------------------------------------------------------


def path(plural: str, name: str = "", *, sub: str = "") -> str:
    """Where one of our kinds is."""
    return f"{_GROUP}/{plural}" + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")


def node(name: str) -> Wire:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}


def pool(name: str, cidr: str, size: int = 0) -> Wire:
    return _ours("IPPool", name, {"cidr": cidr, **({"blockSize": size} if size else {})})


def block(cidr: str, node_name: str, pool_name: str = "pool", **meta: Any) -> Wire:
    """``meta`` is the rest of the metadata, in place of the owner's finalizer."""
    made = _ours("IPAMBlock", block_name(cidr), {"cidr": cidr, "pool": pool_name, "node": node_name})
    made["metadata"] |= meta or {"finalizers": [OWNER]}
    return made


def node_status(name: str) -> Wire:
    return {"apiVersion": "underlay.network/v1", "kind": "BGPNodeStatus", "metadata": {"name": name}}


def _ours(kind: str, name: str, spec: Wire) -> Wire:
    return {"apiVersion": "underlay.network/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _canary() -> list[Wire]:
    api = "admissionregistration.k8s.io/v1"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}
    spec = {
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": "object.metadata.name != 'canary'"}],
    }
    binding = {"policyName": "canary", "validationActions": ["Deny"]}
    return [
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": "canary"}, "spec": spec},
        {
            "apiVersion": api,
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": "canary"},
            "spec": binding,
        },
    ]
