"""Life under traffic: packets on every path, 100 a second on each, and pods that come and go, while Underlay is
upgraded, killed, or left without its API server.

Two nodes behind two ToRs. UNDERLAY_LONG=1 has them run: they take a quarter of an hour, and want the machine for
themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from manifests import image
from tests.cluster.calm import no_leak, no_warnings, nothing_lost
from tests.cluster.churn import churning
from tests.cluster.cluster import NAMESPACE, Cluster, Wire
from tests.cluster.conftest import watched
from tests.cluster.monitor import nothing_changes
from tests.cluster.netpods import PORT, PYTHON, SCRIPT, server
from tests.conftest import eventually

LIMIT: Final = 240.0
PARTS: Final = ("cni", "agent", "speaker")
NODES: Final = ("node-1", "node-2")
NEXT: Final = "underlay.network/underlay:next"
POD_NAME: Final = 'labels."io.kubernetes.pod.name"'
CONTAINERD: Final = ("ctr", "-a", "/run/containerd/containerd.sock", "-n", "k8s.io")
#: A probe that was not answered in time: the machine's processors were taken.
NO_TIME: Final = "Client.Timeout exceeded"
#: Seconds.
AWAY: Final = 300

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("UNDERLAY_LONG") != "1", reason="UNDERLAY_LONG=1 has it run"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With Underlay, a pod on each node, and the image of another version."""
    with watched(tmp_path_factory.mktemp("traffic") / "lab") as made:
        made.up("--bare", "--racks", "2", "--nodes", "1")
        made.install()
        made.ready()
        tar = tmp_path_factory.mktemp("next") / "next.tar"
        image.build(tar, name=NEXT)
        for number, node in enumerate(NODES, start=1):
            made.node_exec(node, *CONTAINERD, "images", "import", str(tar))
            made.lab("pod", "add", f"pod-{number}-1")
        yield made


def rolled_out(site: Cluster, *words: str) -> None:
    """Does that to all three DaemonSets, and waits for them."""
    for part in PARTS:
        site.kubectl(*words[:2], "-n", NAMESPACE, f"daemonset/underlay-{part}", *words[2:])
    for part in PARTS:
        site.kubectl("rollout", "status", "-n", NAMESPACE, f"daemonset/underlay-{part}", limit=LIMIT)


def own_pods(site: Cluster) -> dict[str, tuple[str, int]]:
    """Image and restarts of each that is to stay, by name."""
    found = {}
    for pod in site.get("pods", "-n", NAMESPACE):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        restarts = sum(status["restartCount"] for status in pod["status"].get("containerStatuses", ()))
        found[pod["metadata"]["name"]] = (pod["spec"]["containers"][0]["image"], restarts)
    return found


def test_an_upgrade_and_its_rollback_lose_nothing_and_fail_nothing(site: Cluster) -> None:
    """Of all three DaemonSets at once, to another image and back: no packet lost, no pod failed, no warning told."""
    before = own_pods(site)
    with nothing_lost(site), no_warnings(site, allowed=(NO_TIME,)), churning(site, "upgrade") as churn:
        eventually(lambda: churn.ran > 0, limit=LIMIT)
        rolled_out(site, "set", "image", f"*={NEXT}")
        after = own_pods(site)
        assert {name for name, _ in after.values()} == {NEXT}
        assert before.keys().isdisjoint(after)
        ran = churn.ran
        rolled_out(site, "rollout", "undo")
        assert {name for name, _ in own_pods(site).values()} == {name for name, _ in before.values()}
        report = churn.end()
    print(report)
    assert not report.failed
    assert report.ran > ran > 0
    assert {restarts for _, restarts in own_pods(site).values()} == {0}
    no_leak(site)


@pytest.mark.parametrize("part", ["kubelet", "containerd"])
def test_a_runtime_that_is_killed_comes_back_and_leaks_nothing(site: Cluster, part: str) -> None:
    """Killed with pods on their way: no packet lost, each of those pods runs, or ends, in the end."""
    before = own_pods(site)
    with nothing_lost(site), churning(site, f"kill-{part}") as churn:
        eventually(lambda: churn.ran > 0, limit=LIMIT)
        for node in NODES:
            site.lab("kill", node, part)
        ran = churn.ran
        eventually(lambda: churn.ran > ran + 4, limit=LIMIT)
        report = churn.end()
    print(report)
    assert not report.failed
    eventually(lambda: not site.not_ready(), limit=LIMIT)
    assert own_pods(site).keys() == before.keys()
    no_leak(site)


@pytest.mark.parametrize("how", [(), ("--grace-period=0", "--force")], ids=["in order", "by force"])
def test_all_pods_of_underlay_deleted_at_once_change_nothing_in_a_kernel(site: Cluster, how: tuple[str, ...]) -> None:
    before = own_pods(site)
    with nothing_lost(site), nothing_changes(site, "node-1", "tor-1"):
        site.kubectl("delete", "pods", "-n", NAMESPACE, "--all", *how)
        eventually(lambda: not site.not_ready() and before.keys().isdisjoint(own_pods(site)), limit=LIMIT)
        # What they do once they are ready is done.
        eventually(lambda: all(settled(site, node) for node in NODES), limit=LIMIT)
    no_leak(site)


def settled(site: Cluster, node: str) -> bool:
    said = site.node_exec(
        node, "curl", "-s", "--unix-socket", "/run/underlay/agent.sock", "http://x/settled", check=False
    )
    return said == "ok\n"


# -- without an API server -------------------------------------------------------------------------------------------


def test_pods_start_stop_and_talk_while_the_api_server_is_away(site: Cluster) -> None:
    before = own_pods(site)
    site.apply(pod("killed", nodeName="node-1"))
    (killed,) = site.running("-l", "app=killed", count=1)
    first = addresses(site, "node-1", "killed")
    with nothing_lost(site):
        site.lab("kill", "control-plane", "kube-apiserver", "--restart-after", str(AWAY))
        eventually(lambda: not answers(site), limit=LIMIT)
        for node in NODES:
            (statics(site, node) / "static.json").write_text(json.dumps(pod("static")))
        there = {
            node: eventually(lambda node=node: addresses(site, node, f"static-{node}"), limit=LIMIT) for node in NODES
        }
        for number, node in enumerate(NODES, start=1):
            others = [a for other, found in there.items() if other != node for a in found]
            # A pod that was there, and one that has started meanwhile.
            for inside in (
                [f"pod-{number}-1"],
                [node, "nsenter", "-n", "-t", processes(site, node, f"static-{node}")[-1]],
            ):
                assert dial(site, inside, others) == [f"static-{other}" for other in NODES if other != node] * 2
        # Its sandbox and all that is in it; the kubelet makes another.
        for task in site.node_exec("node-1", *CONTAINERD, "containers", "ls", "-q", f"{POD_NAME}==killed").split():
            site.node_exec("node-1", *CONTAINERD, "tasks", "kill", "-s", "SIGKILL", task, check=False)
        second = eventually(
            lambda: addresses(site, "node-1", "killed") != first and addresses(site, "node-1", "killed"), limit=LIMIT
        )
        assert dial(site, ["pod-2-1"], second) == ["killed", "killed"]
        (statics(site, "node-1") / "static.json").unlink()
        eventually(lambda: there["node-1"][0] not in pod_routes(site, "node-1"), limit=LIMIT)
        assert first[0] not in pod_routes(site, "node-1")
        assert not answers(site), "the API server was back too early for this test to tell anything"
        eventually(lambda: answers(site), limit=LIMIT + AWAY)
        eventually(lambda: not site.not_ready(), limit=LIMIT)
    assert own_pods(site) == before
    assert killed["metadata"]["uid"] == site.get("pod", "killed")[0]["metadata"]["uid"]
    eventually(
        lambda: [p["metadata"]["name"] for p in site.get("pods", "-l", "app=static")] == ["static-node-2"], limit=LIMIT
    )
    no_leak(site)
    (statics(site, "node-2") / "static.json").unlink()
    site.kubectl("delete", "pod", "killed")
    eventually(lambda: not site.get("pods", "-l", "app=static"), limit=LIMIT)
    no_leak(site)


def answers(site: Cluster) -> bool:
    return site.kubectl("get", "--raw", "/readyz", check=False) == "ok"


def pod(name: str, **spec: Any) -> Wire:
    """It serves, says its addresses first, and needs nothing that comes from an API server."""
    main = server(**spec)
    (container,) = main["containers"]
    container |= {
        "command": ["sh", "-c", f'echo "addresses $ADDRESSES"; exec {" ".join(PYTHON)} serve {PORT}'],
        "env": [{"name": "ADDRESSES", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}}],
    }
    for volume in main["volumes"]:
        if volume["name"] == "netexec":
            del volume["configMap"]
            volume["hostPath"] = {"path": str(SCRIPT.parent)}
    meta = {"name": name, "namespace": "default", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": main | {"automountServiceAccountToken": False}}


def statics(site: Cluster, node: str) -> Path:
    return site.folder.member(node) / "static"


def addresses(site: Cluster, node: str, name: str) -> list[str]:
    """As the newest container of the pod has said them; none if it has not yet."""
    logs = [*(site.folder.member(node) / "log" / "pods").glob(f"default_{name}_*/main/*.log")]
    lines = [
        line for log in sorted(logs, key=lambda log: log.stat().st_mtime)[-1:] for line in log.read_text().splitlines()
    ]
    found = [line.split("addresses ")[1] for line in lines if "addresses " in line]
    serving = any("serving on" in line for line in lines)
    return sorted(found[-1].split(","), key=lambda a: ":" in a) if found and serving else []


def processes(site: Cluster, node: str, name: str) -> list[str]:
    """The pod's, as at the node's console."""
    script = (
        f'for p in /proc/[0-9]*; do [ "$(cat $p/root/etc/hostname 2>/dev/null)" = {name} ] && echo ${{p#/proc/}}; done'
    )
    return site.node_exec(node, "sh", "-c", script, check=False).split()


def dial(site: Cluster, inside: list[str], to: list[str]) -> list[str]:
    """Who answers at these addresses, asked from inside of a pod of the lab, or by a command of a node."""
    member, *through = inside
    checks = json.dumps([{"kind": "http", "host": a, "port": PORT} for a in to])
    script = f"echo '{checks}' | {' '.join(through)} /usr/bin/python3 -I {SCRIPT} dial"
    said: list[Any] = json.loads(site.node_exec(member, "sh", "-c", script))
    return [answer.get("hostname", str(answer)) for answer in said]


def pod_routes(site: Cluster, node: str) -> set[str]:
    return {line.split()[0] for line in site.node_exec(node, "ip", "route", "show", "proto", "141").splitlines()}
