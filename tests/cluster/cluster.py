"""A real cluster under test, spoken to as an operator would: ``underlay-lab``, ``kubectl``, ``underlayctl``; looks at
what is there are the API server's own answers."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from lab import client
from lab.folder import Folder
from lab.kube.audit import AuditLog
from lab.kube.build import find_node
from lab.oob import CONTROL_PLANE
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

#: Kinds that tests ask for, by what they call them: where they are served, as what, and whether they have a Namespace.
_KINDS: Final = {
    **dict.fromkeys(("node", "nodes"), ("/api/v1", "nodes", False)),
    **dict.fromkeys(("pod", "pods"), ("/api/v1", "pods", True)),
    "events": ("/api/v1", "events", True),
    "daemonsets": ("/apis/apps/v1", "daemonsets", True),
    **{
        name: ("/apis/underlay.network/v1", plural, False)
        for plural in ("ipamblocks", "ippools", "bgppeers", "bgpnodestatuses")
        for name in (plural, plural.removesuffix("es") if plural.endswith("ses") else plural.removesuffix("s"))
    },
}
_SELECTORS: Final = {"-l": "labelSelector", "--field-selector": "fieldSelector"}

Wire = dict[str, Any]


class Cluster:
    """One cluster by the folder of its lab. Whatever fails is an AssertionError with what was said."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        self._server: tuple[str, urllib.request.OpenerDirector] | None = None
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

        eventually(lambda: any(_is(node, "Ready") for node in self.get("nodes")), limit=limit, every=0.2)
        self._note("first node Ready")
        eventually(runs, limit=limit, every=0.2)
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
        """What ``kubectl get WORDS -o json`` has: the items, of one object by name too. Tests ask again and again, and
        a kubectl is a tenth of a second of a processor: where it is plain what it would ask for, we ask ourselves."""
        path = asked(words)
        found: Wire = json.loads(self._request(path) if path else self.kubectl("get", *words, "-o", "json"))
        kind = str(found["kind"])
        if not kind.endswith("List"):
            return [found]
        # Of kinds of its own an API server does not say in a list what each is; kubectl does.
        told = {} if kind == "List" else {"apiVersion": found["apiVersion"], "kind": kind.removesuffix("List")}
        return [told | item for item in found["items"]]

    def _request(self, path: str) -> str:
        """As the administrator of KUBECONFIG."""
        if self._server is None:
            config = yaml.safe_load(Path(self.environment["KUBECONFIG"]).read_text())
            there, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
            trust = ssl.create_default_context(cafile=there["certificate-authority"])
            no_proxy = urllib.request.ProxyHandler({})
            opener = urllib.request.build_opener(no_proxy, urllib.request.HTTPSHandler(context=trust))
            opener.addheaders = [("Authorization", f"Bearer {user['token']}"), ("User-Agent", "tests")]
            self._server = there["server"], opener
        server, opener = self._server
        try:
            with opener.open(server + path, timeout=LIMIT) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{path}: {e.code} {e.read().decode(errors='replace')}") from e
        except (OSError, http.client.HTTPException) as e:
            raise AssertionError(f"{path}: {e}") from e

    def running(self, *where: str, count: int, limit: float = LIMIT) -> list[Wire]:
        """Waits until so many pods run and are Ready (``where``: -n, -l); they, by name."""

        def probe() -> list[Wire]:
            pods = [p for p in self.get("pods", *where) if "deletionTimestamp" not in p["metadata"]]
            good = [p for p in pods if _is(p, "Ready")]
            assert len(good) == count, [(p["metadata"]["name"], p["status"]) for p in pods if p not in good]
            return sorted(good, key=lambda p: str(p["metadata"]["name"]))

        return eventually(probe, limit=limit, every=0.2)

    @property
    def audit_log(self) -> AuditLog:
        """All that the API server was asked, since the cluster began."""
        return AuditLog(self.folder.member(CONTROL_PLANE) / "audit.log")

    def state(self) -> State:
        """What the lab knows of itself."""
        return msgspec.json.decode(self.lab("status", "-o", "json"), type=State)


def asked(words: Sequence[str]) -> str:
    """The path of what ``kubectl get WORDS`` asks for; "" where that is not for us to know."""
    names, query, namespace = [], {}, "default"
    rest = iter(words)
    for word in rest:
        if word == "-A":
            namespace = ""
        elif word == "-n":
            namespace = next(rest)
        elif word in _SELECTORS:
            query[_SELECTORS[word]] = next(rest)
        elif word.startswith("-"):
            return ""
        else:
            names.append(word)
    if len(names) not in (1, 2) or names[0] not in _KINDS:
        return ""
    api, plural, namespaced = _KINDS[names[0]]
    space = f"/namespaces/{namespace}" if namespaced and namespace else ""
    path = "/".join([f"{api}{space}", plural, *names[1:]])
    return f"{path}?{urllib.parse.urlencode(query)}" if query else path


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
