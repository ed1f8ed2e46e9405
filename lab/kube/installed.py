"""A cluster as an operator has it: our CRDs, rights and policies, two Nodes, and the tokens of our pods on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lab.kube.build import Programs
from lab.kube.cluster import Cluster, Refused
from lab.kube.plane import CONTROLLERS, ClusterError

NAMESPACE = "underlay-system"
CNI, AGENT, SPEAKER = "underlay-cni", "underlay-agent", "underlay-speaker"
ACCOUNTS = (CNI, AGENT, SPEAKER)
#: Checks the expressions of policies against the schemas of what they match.
TYPE_CHECKER = "validatingadmissionpolicy-status-controller"

Wire = dict[str, Any]

_MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
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
def install(folder: Path, programs: Programs, *, audit: bool = False) -> Iterator[Installed]:
    """Starts it. ``cluster.reset`` goes back to here, so the tokens stay good."""
    cluster = Cluster(folder, programs, controllers=(*CONTROLLERS, TYPE_CHECKER), audit=audit)
    try:
        cluster.start([*documents(), *_canary()])
        made = Installed(cluster)
        for name in ("node-1", "node-2"):
            cluster.request("POST", "/api/v1/nodes", node(name))
            for account in ACCOUNTS:
                made.tokens[account, name] = pod_token(cluster, account, name)
        made.unbound = {account: cluster.token(account, namespace=NAMESPACE) for account in ACCOUNTS}
        probe = {"metadata": {"name": "canary"}}
        cluster.wait_for("kube-apiserver", lambda: _refused(cluster, f"{_CANARY}?dryRun=All", probe))
        cluster.remember()
        yield made
    finally:
        cluster.close()


def documents() -> list[Wire]:
    """What an operator applies, in order."""
    return [*crds(), *manifest("rbac.yaml"), *manifest("policies.yaml")]


def crds() -> list[Wire]:
    """Our kinds."""
    return [d for file in sorted(_MANIFESTS.glob("crds/*.yaml")) for d in manifest(f"crds/{file.name}")]


def manifest(name: str) -> list[Wire]:
    """The documents of a file in ``manifests``."""
    return [d for d in yaml.safe_load_all((_MANIFESTS / name).read_text()) if d]


def pod_token(cluster: Cluster, account: str, node_name: str) -> str:
    """The token of a new pod of ours; ``node_name`` "" for one that no scheduler has seen."""
    pod = cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", pod_of(account, node_name))
    asked = bound_token(pod, seconds=3600)
    answer = cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token", asked)
    return str(answer["status"]["token"])


def pod_of(account: str, node_name: str) -> Wire:
    """The Pod of one of our processes, in the node's own network as they all are."""
    spec: Wire = {
        "serviceAccountName": account,
        "hostNetwork": True,
        "containers": [{"name": "main", "image": "underlay"}],
    }
    if node_name:
        spec["nodeName"] = node_name
    return {"metadata": {"name": f"{account}-{node_name or 'nowhere'}", "namespace": NAMESPACE}, "spec": spec}


def bound_token(pod: Wire, *, seconds: int) -> Wire:
    """What a kubelet asks of the API server for a pod that is there: a token that is good as long as the pod is."""
    bound = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    return {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": seconds, "boundObjectRef": bound},
    }


def denial(cluster: Cluster, method: str, path: str, body: object = None, **how: Any) -> Refused | None:
    """Why the API server refuses this; None if it does not."""
    try:
        cluster.request(method, path, body, **how)
    except Refused as e:
        return e
    return None


def node(name: str) -> Wire:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}


def _refused(cluster: Cluster, url: str, body: Wire) -> None:
    if denial(cluster, "POST", url, body) is None:
        raise ClusterError("the policies are not in force")


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
