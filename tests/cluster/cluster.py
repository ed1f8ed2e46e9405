"""A real cluster under test, spoken to as an operator would: ``underlay-lab``, ``kubectl``, ``underlayctl``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from lab import client
from lab.folder import Folder
from lab.kube.build import find_node
from lab.wire import State
from tests.conftest import eventually

BIN: Final = Path(sys.executable).parent
ROOT: Final = Path(__file__).resolve().parents[2]
NAMESPACE: Final = "underlay-system"
#: The Namespace of the pods that are there before the network.
FIRST: Final = "first"
#: What pods of tests run: it sleeps, unless told otherwise.
IMAGE: Final = "underlay.network/busybox:lab"
#: The machine is shared.
LIMIT: Final = 120.0

Wire = dict[str, Any]


class Cluster:
    """One cluster by the folder of its lab. Whatever fails is an AssertionError with what was said."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        #: Seconds from the start of ``install`` to what is named.
        self.times: dict[str, float] = {}
        self.environment = os.environ | {
            "KUBECONFIG": str(path / "admin.kubeconfig"),
            "UNDERLAY_STORE": f"kube:{path / 'admin.kubeconfig'}",
            "KUBECACHEDIR": str(path / "kubectl"),
        }

    # -- its life --------------------------------------------------------------------------------------------------

    def up(self, *options: str) -> str:
        """``underlay-lab up --cluster OPTIONS``; what it printed."""
        return self.lab("up", "--cluster", "--pods", "0", *options, limit=300)

    def install(self) -> None:
        """Underlay, as a user installs it, where two pods wait for a network already. Nodes are not Ready yet when it
        returns."""
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": FIRST}}, _waiting())
        self._begin = time.monotonic()
        self.kubectl("apply", "-k", "manifests/")
        self.underlayctl("apply", "-f", str(self.folder.path / "fabric.yaml"))
        self._note("applied")

    def ready(self, *, limit: float = LIMIT) -> None:
        """Waits until a pod runs, all nodes are Ready and take pods, and Underlay's own pods are Ready."""

        def runs() -> bool:
            return any(pod["status"]["phase"] == "Running" for pod in self.get("pods", "-n", FIRST))

        eventually(lambda: any(_is(node, "Ready") for node in self.get("nodes")), limit=limit)
        self._note("first node Ready")
        eventually(runs, limit=limit)
        self._note("first pod Running")

        def whole() -> bool:
            missing = self.not_ready()
            assert not missing, missing
            return True

        eventually(whole, limit=limit, every=0.3)
        self._note("everything Ready")

    def _note(self, what: str) -> None:
        self.times[what] = time.monotonic() - self._begin

    def not_ready(self) -> list[str]:
        """What is not as it is to be: nodes, DaemonSets."""
        nodes = self.get("nodes")
        found = [n["metadata"]["name"] for n in nodes if n["spec"].get("taints") or not _is(n, "Ready")]
        for one in self.get("daemonsets", "-n", NAMESPACE):
            status = one["status"]
            wanted = (one["metadata"]["generation"], len(nodes), len(nodes))
            there = (status.get("observedGeneration"), status.get("numberReady"), status.get("updatedNumberScheduled"))
            found += [one["metadata"]["name"]] if there != wanted else []
        return found

    # -- commands --------------------------------------------------------------------------------------------------

    def lab(self, *words: str, check: bool = True, limit: float = LIMIT) -> str:
        """``underlay-lab``: what it prints."""
        verb = 2 if words[0] in ("pod", "link") else 1
        words = (*words[:verb], "--dir", str(self.folder.path), *words[verb:])
        return self._run([str(BIN / "underlay-lab"), *words], check=check, limit=limit)

    def kubectl(self, *words: str, text: str | None = None, check: bool = True, limit: float = LIMIT) -> str:
        """What it prints, as an administrator; ``text`` is its input."""
        return self._run([str(find_node().kubectl), *words], text=text, check=check, limit=limit)

    def underlayctl(self, *words: str, check: bool = True, limit: float = LIMIT) -> str:
        return self._run([str(BIN / "underlayctl"), *words], check=check, limit=limit)

    def node_exec(self, node: str, *words: str, check: bool = True, limit: float = LIMIT) -> str:
        """At the console of a node; or in a router, or ``control-plane``."""
        return self._run(client.enter(self.folder, node, words), check=check, limit=limit)

    def pod_exec(self, pod: str, *words: str, text: str | None = None, check: bool = True, limit: float = LIMIT) -> str:
        """``pod`` is NAMESPACE/NAME or a name in ``default``; output and errors together."""
        namespace, _, name = pod.rpartition("/")
        to = ["exec", "-n", namespace or "default", name, *(["-i"] if text is not None else []), "--"]
        return self.kubectl(*to, *words, text=text, check=check, limit=limit)

    def _run(self, argv: Sequence[str], *, text: str | None = None, check: bool, limit: float) -> str:
        done = subprocess.run(
            argv,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
            cwd=ROOT,
            env=self.environment,
        )
        assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    # -- objects ---------------------------------------------------------------------------------------------------

    def apply(self, *objects: Wire | str) -> None:
        """``kubectl apply``: objects, or YAML."""
        for text in (one if isinstance(one, str) else json.dumps(one) for one in objects):
            self.kubectl("apply", "-f", "-", text=text)

    def get(self, *words: str) -> list[Wire]:
        """``kubectl get WORDS -o json``: the items, of one object by name too."""
        found: Wire = json.loads(self.kubectl("get", *words, "-o", "json"))
        items: list[Wire] = found["items"] if found["kind"] == "List" or found["kind"].endswith("List") else [found]
        return items

    def running(self, *where: str, count: int, limit: float = LIMIT) -> list[Wire]:
        """Waits until so many pods run and are Ready (``where``: -n, -l); they, by name."""

        def probe() -> list[Wire]:
            pods = [p for p in self.get("pods", *where) if "deletionTimestamp" not in p["metadata"]]
            good = [p for p in pods if _is(p, "Ready")]
            assert len(good) == count, [(p["metadata"]["name"], p["status"]) for p in pods if p not in good]
            return sorted(good, key=lambda p: str(p["metadata"]["name"]))

        return eventually(probe, limit=limit, every=0.2)

    def state(self) -> State:
        """What the lab knows of itself."""
        return msgspec.json.decode(self.lab("status", "-o", "json"), type=State)


def addresses(pod: Wire) -> tuple[str, ...]:
    """A pod's, IPv4 first."""
    found = (str(ip["ip"]) for ip in pod["status"].get("podIPs", ()))
    return tuple(sorted(found, key=lambda address: ":" in address))


def _waiting() -> Wire:
    """Two pods, on two nodes."""
    labels = {"app": FIRST}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": labels},
    }
    pod = {
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never"}],
        "topologySpreadConstraints": [spread],
        "dnsPolicy": "Default",
        "terminationGracePeriodSeconds": 0,
    }
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": FIRST, "namespace": FIRST},
        "spec": spec,
    }


def _is(obj: Wire, condition: str) -> bool:
    return any(c["type"] == condition and c["status"] == "True" for c in obj.get("status", {}).get("conditions", ()))
