"""What ``underlayctl uninstall`` puts on each node and how it reads what came of it. Pure.

The DaemonSet is what ``manifests/uninstall.yaml`` holds for those who have kubectl alone; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network
from typing import Any, Final

import msgspec

Wire = dict[str, Any]

NAMESPACE: Final = "underlay-system"
NAME: Final = "underlay-uninstall"
#: DaemonSets of an installation: those that hand out and program, and the one that talks to peers, which goes last.
SERVERS: Final = ("underlay-cni", "underlay-agent")
SPEAKER: Final = "underlay-speaker"
#: The image in the manifests.
IMAGE: Final = "underlay.network/underlay:lab"
LABELS: Final = {"app.kubernetes.io/name": "underlay", "app.kubernetes.io/component": "uninstall"}
#: Of an installation's pods, what says where and how ours can run.
_TAKEN: Final = ("imagePullSecrets", "nodeSelector", "affinity", "tolerations", "priorityClassName")
#: Volume: the folder of the node, and where it is in the container. The first two are parents of ours: only in its
#: parent can a folder be removed. /run has to be /run there: the speaker's configuration names files in it.
_MOUNTS: Final = {
    "run": ("/run", "/run", "Directory"),
    "lib": ("/var/lib", "/var/lib", "Directory"),
    "bin": ("/opt/cni/bin", "/opt/cni/bin", "DirectoryOrCreate"),
    "conf": ("/etc/cni/net.d", "/etc/cni/net.d", "DirectoryOrCreate"),
    "sysctls": ("/proc/sys/net", "/host/proc/sys/net", "Directory"),
}


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What people want of the nodes' part (``agent.removal.Wishes``)."""

    keep_pods: bool = False
    restore_forwarding: bool = False


class Word(msgspec.Struct, frozen=True):
    """What one node has said: ``done``, and lines; a line that begins with ``failed:`` says why it is not done."""

    node: str
    done: bool
    lines: tuple[str, ...]


def daemonset(asked: Asked, like: Mapping[str, Any] | None = None, *, image: str = "") -> Wire:
    """One pod on each node: its init container does the work, as often as it takes, and by running the other says that
    it is done. ``like`` is a DaemonSet of the installation, for image and place; ``image`` wins."""
    pod: Wire = dict((like or {}).get("spec", {}).get("template", {}).get("spec", {}))
    first: Wire = next(iter(pod.get("containers", ())), {})
    words = [NAME, "--report", "/dev/termination-log"]
    words += ["--keep-pods"] if asked.keep_pods else []
    words += ["--restore-forwarding"] if asked.restore_forwarding else []
    common: Wire = {
        "image": image or first.get("image", IMAGE),
        "imagePullPolicy": first.get("imagePullPolicy", "IfNotPresent"),
    }
    closed: Wire = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        "capabilities": {"drop": ["ALL"]},
    }
    work = common | {
        "name": "uninstall",
        "command": words,
        "env": [{"name": "UNDERLAY_SYSCTLS", "value": "/host/proc/sys"}],
        "securityContext": closed | {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}},
        "resources": {"requests": {"cpu": "25m", "memory": "48Mi"}},
        "volumeMounts": [{"name": name, "mountPath": inside} for name, (_, inside, _) in _MOUNTS.items()],
    }
    stay = common | {
        "name": "done",
        "command": [NAME, "--stay"],
        "securityContext": closed,
        "resources": {"requests": {"cpu": "5m", "memory": "24Mi"}},
    }
    spec: Wire = {
        "hostNetwork": True,
        "dnsPolicy": "Default",
        "automountServiceAccountToken": False,
        "priorityClassName": "system-node-critical",
        "tolerations": [{"operator": "Exists"}],
        "terminationGracePeriodSeconds": 5,
        **{key: pod[key] for key in _TAKEN if pod.get(key)},
        "initContainers": [work],
        "containers": [stay],
        "volumes": [
            {"name": name, "hostPath": {"path": path, "type": kind}} for name, (path, _, kind) in _MOUNTS.items()
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": LABELS},
        "spec": {
            "selector": {"matchLabels": LABELS},
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
            "template": {"metadata": {"labels": LABELS}, "spec": spec},
        },
    }


def word(pod: Mapping[str, Any]) -> Word:
    """What a pod of the DaemonSet has said of its node so far."""
    node = str(pod["spec"].get("nodeName", ""))
    status: Wire = next(iter(pod.get("status", {}).get("initContainerStatuses", ())), {})
    for state in (status.get("state", {}), status.get("lastState", {})):
        ended: Wire = state.get("terminated") or {}
        if ended:
            lines = tuple(str(ended.get("message") or "").splitlines())
            return Word(node, ended.get("exitCode") == 0, lines)
    waiting: Wire = status.get("state", {}).get("waiting") or {}
    why = ": ".join(filter(None, (str(waiting.get("reason", "")), str(waiting.get("message", "")))))
    return Word(node, False, (f"failed: {why}",) if why and why != "PodInitializing" else ())


def pods_on(pods: Iterable[Mapping[str, Any]], cidrs: Iterable[str]) -> list[tuple[str, str]]:
    """Pods that have an address in one of these blocks: ``namespace/name`` and node, in order."""
    networks = [ip_network(cidr) for cidr in cidrs]
    found = []
    for pod in pods:
        spec, status = pod.get("spec", {}), pod.get("status", {})
        if spec.get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
            continue
        addresses = [ip_address(each["ip"]) for each in status.get("podIPs", ())]
        if any(a.version == n.version and a in n for a in addresses for n in networks):
            meta = pod["metadata"]
            found.append((f"{meta['namespace']}/{meta['name']}", str(spec.get("nodeName", ""))))
    return sorted(found)
