"""Pods that run netexec.py, and what they say when they are told to dial each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.cluster.cluster import IMAGE, Cluster, Wire, addresses

SCRIPT: Final = Path(__file__).with_name("netexec.py")
#: HTTP of a pod; UDP is the port after it. Those of pods on the node's own network are others than anybody's.
PORT: Final = 8080
HOST_PORT: Final = 18080
PYTHON: Final = ("/usr/bin/python3", "-I", "/netexec/netexec.py")
FAMILIES: Final = (4, 6)
_FOLDERS: Final = ("/usr", "/lib", "/lib64")


class Pod(NamedTuple):
    """``addresses`` are IPv4 and IPv6, of the node where ``host`` is set."""

    name: str
    node: str
    addresses: tuple[str, ...]
    host: bool
    port: int

    def address(self, family: int) -> str:
        return self.addresses[FAMILIES.index(family)]


class NetPods:
    """The pods of one Namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def begin(self) -> None:
        self.cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}},
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "netexec", "namespace": self.namespace},
                "data": {SCRIPT.name: SCRIPT.read_text()},
            },
        )

    def end(self) -> None:
        self.cluster.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", "--wait=false")

    def apply(self, kind: str, name: str, pod: Wire, **spec: Any) -> None:
        """A Pod, or a DaemonSet, Deployment, StatefulSet of that pod; labels are app=NAME."""
        meta = {"name": name, "namespace": self.namespace}
        if kind == "Pod":
            obj = {"apiVersion": "v1", "kind": kind, "metadata": meta | {"labels": {"app": name}}, "spec": pod}
        else:
            template = {"metadata": {"labels": {"app": name}}, "spec": pod}
            more = {"selector": {"matchLabels": {"app": name}}, "template": template}
            obj = {"apiVersion": "apps/v1", "kind": kind, "metadata": meta, "spec": more | spec}
        self.cluster.apply(obj)

    def pods(self, app: str, count: int, *, port: int = PORT) -> list[Pod]:
        """They, once they are Ready, by node."""
        found = self.cluster.running("-n", self.namespace, "-l", f"app={app}", count=count)
        return sorted((read(pod, port) for pod in found), key=lambda pod: pod.node)

    def dial(self, pod: Pod | str, checks: Sequence[Wire]) -> list[Any]:
        """The result of each check, as netexec.py tells it."""
        name = pod if isinstance(pod, str) else pod.name
        text = json.dumps(list(checks))
        said = self.cluster.pod_exec(f"{self.namespace}/{name}", *PYTHON, "dial", text=text)
        results: list[Any] = json.loads(said)
        return results


@contextmanager
def netpods(cluster: Cluster, namespace: str) -> Iterator[NetPods]:
    made = NetPods(cluster, namespace)
    try:
        made.begin()
        yield made
    finally:
        made.end()


def at_once(tasks: Sequence[Any]) -> list[Any]:
    """The results of functions, called beside each other."""
    with ThreadPoolExecutor(max(len(tasks), 1)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def server(port: int = PORT, *, host: bool = False, grace: int = 0, container: Wire | None = None, **spec: Any) -> Wire:
    """The spec of a pod that serves; ``container`` and ``spec`` go over it."""
    main = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": [*PYTHON, "serve", str(port)],
        "volumeMounts": [
            *({"name": folder[1:], "mountPath": folder, "readOnly": True} for folder in _FOLDERS),
            {"name": "netexec", "mountPath": "/netexec"},
        ],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": port}, "periodSeconds": 1, "timeoutSeconds": 20},
    }
    return {
        "containers": [main | (container or {})],
        "volumes": [
            *({"name": folder[1:], "hostPath": {"path": folder}} for folder in _FOLDERS),
            {"name": "netexec", "configMap": {"name": "netexec"}},
        ],
        "hostNetwork": host,
        "dnsPolicy": "Default",
        "terminationGracePeriodSeconds": grace,
        "enableServiceLinks": False,
    } | spec


def read(pod: Wire, port: int = PORT) -> Pod:
    spec = pod["spec"]
    return Pod(pod["metadata"]["name"], spec["nodeName"], addresses(pod), bool(spec.get("hostNetwork")), port)
