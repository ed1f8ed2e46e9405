"""The lab on an API server of its own: every path answers, nobody has more rights than the manifests give, and the API
server may go and come."""

from __future__ import annotations

import base64
import json
import os
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cni.marks import PROTO_PODS
from lab import client, oob
from lab.kube.build import Programs
from lab.kube.installed import NAMESPACE
from lab.kubelets import ACCOUNTS, TOKEN_LIFE
from tests.conftest import eventually
from tests.e2e.conftest import BIN, LAST_LINE, Lab, Ping, processes

NODES = ("node-1", "node-2", "node-3", "node-4")
#: Seconds that the API server is away: longer than what is done meanwhile.
AWAY = 45


@pytest.fixture(scope="module")
def up(programs: Programs, lab: Lab) -> Iterator[str]:
    """What ``up`` printed. In the end the supervisor is killed: nothing of a control plane may outlive it."""
    try:
        yield lab.command("up", "--store", "kube", timeout=170).stdout
        os.kill(client.peer(lab.folder), signal.SIGKILL)
        eventually(lambda: not processes(lab.folder))
    finally:
        lab.command("down", check=False)


class Api:
    """The API server as a shell outside of the lab has it: by the operator's kubeconfig, or with another's token."""

    def __init__(self, lab: Lab) -> None:
        config = yaml.safe_load((lab.folder.path / "admin.kubeconfig").read_text())
        self._server = config["clusters"][0]["cluster"]["server"]
        self._tls = ssl.create_default_context(cafile=config["clusters"][0]["cluster"]["certificate-authority"])
        self.admin = config["users"][0]["user"]["token"]

    def ask(self, path: str, *, token: str = "", body: object = None) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {token or self.admin}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._server + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, context=self._tls, timeout=60) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text[:1] == "{" else {}
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)


@pytest.fixture
def api(up: str, lab: Lab) -> Api:
    return Api(lab)


def test_every_path_answers_and_the_shell_outside_reaches_the_store(up: str, lab: Lab) -> None:
    last = LAST_LINE.match(up.splitlines()[-1])
    assert last, up
    assert {k: int(v) for k, v in last.groupdict().items()} == {
        "pods": 12, "nodes": 4, "answered": 264, "paths": 264, "lost": 0
    }  # fmt: skip
    state = lab.state()
    assert {p.state for p in state.control_plane.values()} == {"running"}
    assert f"export UNDERLAY_STORE={state.store} " in up
    environment = {"PATH": os.environ["PATH"], "UNDERLAY_STORE": state.store}
    said = subprocess.run(
        [BIN / "underlayctl", "get", "nodes"], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert all(node in said.stdout for node in NODES)
    assert not (lab.folder.path / "store.db").exists()


def test_pods_are_written_down_and_the_check_is_clean(api: Api, lab: Lab) -> None:
    state = lab.state()
    _, said = api.ask("/api/v1/namespaces/default/pods")
    written = {
        (p["spec"]["nodeName"], p["metadata"]["name"], tuple(ip["ip"] for ip in p["status"]["podIPs"]))
        for p in said["items"]
    }
    assert written == {(node.name, pod.name, pod.addresses) for node in state.nodes for pod in node.pods}
    for node in NODES:
        assert lab.inside(node, "underlayctl", "ipam", "check").startswith("clean: ")


def test_no_process_of_ours_has_an_administrators_token(api: Api, lab: Lab) -> None:
    for node in lab.state().nodes:
        home = lab.folder.path / node.name
        for part, process in node.processes.items():
            about = [f"/proc/{process.pid}/{name}" for name in ("cmdline", "environ")]
            given = lab.inside(node.name, "cat", *about) + lab.inside(node.name, "ls", "-l", f"/proc/{process.pid}/fd")
            assert "admin" not in given
            assert api.admin not in given
            assert ("kube:" in given) == (part in ACCOUNTS)
            if part in ACCOUNTS:
                assert f"kube:{home / 'credentials' / part / 'kubeconfig'}\0" in given
        for file in home.rglob("*"):
            assert not file.is_file() or api.admin.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("part", ACCOUNTS)
def test_a_token_is_its_pods_and_bound_by_rights_and_policies(api: Api, lab: Lab, part: str) -> None:
    folder = lab.folder.path / "node-1" / "credentials" / part
    assert {f.name: f.stat().st_mode & 0o777 for f in folder.iterdir()} == {"kubeconfig": 0o600, "token": 0o600}
    token = (folder / "token").read_text()
    claims = claims_of(token)
    account = f"underlay-{part}"
    assert claims["sub"] == f"system:serviceaccount:{NAMESPACE}:{account}"
    assert claims["kubernetes.io"]["pod"]["name"] == f"{account}-node-1"
    assert claims["kubernetes.io"]["node"]["name"] == "node-1"
    assert claims["exp"] - claims["iat"] == TOKEN_LIFE

    assert api.ask("/apis/underlay.network/v1/ippools", token=token)[0] == 200
    assert api.ask("/api/v1/secrets", token=token)[0] == 403
    assert api.ask("/api/v1/secrets")[0] == 200
    block = {
        "apiVersion": "underlay.network/v1",
        "kind": "IPAMBlock",
        "metadata": {"name": "10-244-255-192-26"},
        "spec": {"cidr": "10.244.255.192/26", "pool": "pods-v4", "node": "node-2"},
    }
    code, said = api.ask("/apis/underlay.network/v1/ipamblocks?dryRun=All", token=token, body=block)
    assert code in (403, 422), said
    # What refuses the CNI server is our policy: it may create blocks, but none of another node.
    assert ("ValidatingAdmissionPolicy" in said["message"]) == (part == "cni"), said


def test_the_management_network_is_for_nodes_and_not_for_pods(up: str, lab: Lab) -> None:
    assert oob.PORT in lab.inside("node-1", "ip", "route", "get", oob.SERVER)
    pod = lab.address("pod-1-1", 4)
    (route,) = [r for r in lab.routes("node-1", "proto", str(PROTO_PODS)) if r["dst"] == f"{pod}/32"]
    theirs = lab.inside("node-1", "ip", "route", "get", oob.SERVER, "from", pod, "iif", route["dev"])
    assert oob.PORT not in theirs
    assert "tor-1" in theirs
    for name in ("tor-1", "tor-2", "spine-1", *NODES):
        assert not [r for r in lab.routes(name) if r["dst"] == str(oob.NETWORK)]
    # Agent and CNI server take it for no uplink: it is as the kernel made it, and pods have the fabric's MTU.
    assert lab.inside("node-1", "cat", f"/proc/sys/net/ipv4/conf/{oob.PORT}/ignore_routes_with_linkdown").strip() == "0"
    assert lab.inside("node-1", "cat", f"/proc/sys/net/ipv4/conf/{oob.PORT}/forwarding").strip() == "0"


def test_the_api_server_may_go_and_come(api: Api, lab: Lab) -> None:
    ping = Ping(lab, "pod-1-1", "pod-4-1")
    before = lab.state()
    lab.command("kill", "control-plane", "kube-apiserver", "--restart-after", str(AWAY))
    eventually(lambda: not reachable(api))
    restarts = {(n.name, part): p.restarts for n in before.nodes for part, p in n.processes.items()}

    lab.command("pod", "add", "pod-1-4")
    lab.command("pod", "del", "pod-2-3")
    killed = (("node-1", "agent"), ("node-4", "cni"), ("node-4", "agent"))
    for node, part in killed:
        lab.command("kill", node, part, "--restart-after", "0.1")
    for node, part in killed:
        lab.restarted(node, part, restarts[node, part])
    # Of what it handed out before, the new CNI server knows all; new addresses wait until it has seen its blocks.
    lab.command("pod", "del", "pod-4-3")
    lab.command("pod", "add", "pod-1-5")
    lab.command("pod", "del", "pod-1-4")
    lab.whole()
    assert not reachable(api), f"it came back too early: AWAY = {AWAY}"

    eventually(lambda: reachable(api), limit=150)
    lab.command("pod", "add", "pod-4-4")
    for node in NODES:
        eventually(lambda node=node: clean(lab, node))
    eventually(lambda: {"pod-1-5", "pod-4-4"} <= pods(api) and not {"pod-1-4", "pod-2-3", "pod-4-3"} & pods(api))
    assert ping.lost() == [0, 0]
    assert {n.name: n.blocks for n in lab.state().nodes} == {n.name: n.blocks for n in before.nodes}
    for name in ("pod-1-5", "pod-4-4"):
        lab.command("pod", "del", name)
    for name in ("pod-2-3", "pod-4-3"):
        lab.command("pod", "add", name)
    lab.whole()
    eventually(lambda: {p.name for n in lab.state().nodes for p in n.pods} == pods(api))


def test_what_is_not_there_is_not_killed(up: str, lab: Lab) -> None:
    done = lab.command("kill", "node-1", "etcd", check=False)
    assert done.returncode == 1
    assert "node-1 has no etcd; it has: cni, agent, exabgp" in done.stderr
    done = lab.command("up", check=False)
    assert done.returncode == 1
    assert "--store kube is up" in done.stderr


def test_without_programs_it_says_what_to_type(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "l", ("env", "PATH=/usr/bin:/bin", f"XDG_CACHE_HOME={tmp_path}", "KUBEBUILDER_ASSETS="))
    done = lab.command("up", "--store", "kube", check=False)
    assert done.returncode == 1
    assert "type 'make apiserver'" in done.stderr
    assert not lab.folder.path.exists()


def clean(lab: Lab, node: str) -> bool:
    return lab.command("exec", node, "underlayctl", "ipam", "check", check=False).returncode == 0


def reachable(api: Api) -> bool:
    try:
        return api.ask("/readyz")[0] == 200
    except (OSError, ValueError):
        return False


def pods(api: Api) -> set[str]:
    try:
        _, said = api.ask("/api/v1/namespaces/default/pods")
    except OSError:
        return set()
    return {p["metadata"]["name"] for p in said.get("items", [])}


def claims_of(token: str) -> dict[str, Any]:
    """A token's payload (RFC 7519), unverified."""
    body = token.split(".")[1]
    return dict(json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))))
