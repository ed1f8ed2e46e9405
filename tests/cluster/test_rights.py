"""The rights of our processes in a real cluster: what they ask for is what manifests/rbac.yaml gives them, and a token
that is stolen from one node harms no other."""

from __future__ import annotations

import ast
import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from lab.kube.audit import Asked
from lab.kube.installed import manifest
from store.kube import NOT_YET
from store.model import block_name
from tests.cluster.cluster import NAMESPACE, ROOT, Cluster, Wire
from tests.conftest import eventually

CNI, AGENT, SPEAKER = "underlay-cni", "underlay-agent", "underlay-speaker"
#: What our processes call themselves; underlayctl is another, whoever types it.
PROCESS: Final = "underlay"
#: Rights that a cluster has no use for as long as nothing happens to it: the test that does it with our own code and a
#: token that has no more than these rights.
IN: Final = "tests/kube"
_LIFE: Final = f"{IN}/test_life.py::test_what_people_delete_under_live_pods"
_EVENTS: Final = f"{IN}/test_events.py::test_the_same_again_is_one_event_that_counts_also_after_a_restart"
_CHOOSE: Final = f"{IN}/test_pools.py::test_pods_that_choose_are_read_with_the_servers_own_token"
_POOLS: Final = f"{IN}/test_first_pools.py::test_sixteen_agents_make_one_pool_of_each_family_and_none_again"
_K0S: Final = f"{IN}/test_first_pools.py::test_k0s_says_it_where_its_dynamic_configuration_is_on"
_CONDITION: Final = (
    f"{IN}/test_node_condition.py::test_a_node_that_is_said_to_have_no_network_gets_it_back_and_loses_the_taint"
)
ELSEWHERE: Final[Mapping[tuple[str, str, str], str]] = {
    (CNI, "get", "ipamblocks"): _LIFE,
    (CNI, "update", "ipamblocks"): _LIFE,
    (CNI, "delete", "ipamblocks"): _LIFE,
    (CNI, "create", "events"): _EVENTS,
    (CNI, "get", "events"): _EVENTS,
    (CNI, "patch", "events"): _EVENTS,
    (CNI, "list", "pods"): _CHOOSE,
    (CNI, "watch", "pods"): _CHOOSE,
    (CNI, "list", "namespaces"): _CHOOSE,
    (CNI, "watch", "namespaces"): _CHOOSE,
    # Of nodes whose address was detected: only where the mesh is on.
    (AGENT, "list", "bgpnodestatuses"): f"{IN}/test_rbac.py::test_the_agent_lives_on_its_rights",
    (AGENT, "watch", "bgpnodestatuses"): f"{IN}/test_rbac.py::test_the_agent_lives_on_its_rights",
    # The second is asked for with the first: OwnerReferencesPermissionEnforcement.
    (AGENT, "update", "bgpnodestatuses"): f"{IN}/test_rbac.py::test_the_agent_lives_on_its_rights",
    (AGENT, "delete", "bgpnodestatuses"): f"{IN}/test_rbac.py::test_the_agent_lives_on_its_rights",
    (AGENT, "get", "ipamblocks"): f"{IN}/test_rbac.py::test_the_agent_lives_on_its_rights",
    (AGENT, "patch", "nodes/status"): _CONDITION,
    (AGENT, "create", "ippools"): _POOLS,
    (AGENT, "create", "configmaps"): _POOLS,
    (AGENT, "get", "configmaps"): _POOLS,
    (AGENT, "get", "clusterconfigs"): _K0S,
}


class Right(NamedTuple):
    account: str
    verb: str
    resource: str


def granted() -> dict[Right, str]:
    """Every verb of every rule, and the namespace that it is for ("": all)."""
    documents = manifest("rbac.yaml")
    roles = {(d["kind"], d["metadata"]["name"]): d for d in documents if d["kind"] in ("ClusterRole", "Role")}
    found = {}
    for binding in documents:
        if not binding["kind"].endswith("Binding"):
            continue
        role = roles[binding["roleRef"]["kind"], binding["roleRef"]["name"]]
        for subject in binding["subjects"]:
            for rule in role["rules"]:
                found |= {
                    Right(subject["name"], verb, resource): binding["metadata"].get("namespace", "")
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                }
    return found


def by_processes(cluster: Cluster) -> list[Asked]:
    return [r for r in cluster.audit_log.requests() if r.agent == PROCESS and r.address != "10.96.0.1"]


def right(asked: Asked) -> Right:
    resource = f"{asked.resource}/{asked.subresource}" if asked.subresource else asked.resource
    return Right(asked.user.rpartition(":")[2], asked.verb, resource)


def test_our_processes_use_every_right_and_no_request_of_theirs_is_refused(cluster: Cluster) -> None:
    """By the API server's audit log, of all that tests have done to this cluster so far."""
    # As a runtime asks that knows CNI 1.1.
    conflist = json.loads(cluster.node_exec(HOME, "cat", "/etc/cni/net.d/10-underlay.conflist"))
    plugin = json.dumps({"cniVersion": "1.1.0", "name": conflist["name"], **conflist["plugins"][0]})
    environment = "CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin"
    status = f"echo '{plugin}' | {environment} /opt/cni/bin/{conflist['plugins'][0]['type']}"

    def unused() -> set[Right]:
        return set(granted()) - {right(r) for r in by_processes(cluster)} - {Right(*key) for key in ELSEWHERE}

    def every_right() -> bool:
        cluster.node_exec(HOME, "sh", "-c", status)  # which waits for an answer of the API server for a second
        assert unused() == set()
        return True

    eventually(every_right, every=1)
    asked = by_processes(cluster)
    # An API server that has just begun may not be able to judge yet; a token that ends with its pod is a 401.
    refused = [r for r in asked if r.code == 403 and not NOT_YET.search(r.said)]
    assert {(r.user, r.verb, r.resource, r.name, r.said) for r in refused} == set()
    assert {right(r) for r in asked} <= set(granted())


def test_a_right_that_is_used_elsewhere_is_used_by_a_test_that_there_is() -> None:
    for where in ELSEWHERE.values():
        path, _, name = where.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where
    assert {Right(*key) for key in ELSEWHERE} <= set(granted())


def test_every_request_comes_with_the_token_of_the_processs_own_pod(cluster: Cluster) -> None:
    nodes = {a["address"]: n["metadata"]["name"] for n in cluster.get("nodes") for a in n["status"]["addresses"]}
    seen = {(r.user, r.node, nodes.get(r.address)) for r in by_processes(cluster)}
    ours = {f"system:serviceaccount:{NAMESPACE}:{account}" for account in (CNI, AGENT)}
    assert {user for user, _, _ in seen} == ours
    assert all(node == where for _, node, where in seen), seen
    assert len(seen) == len(ours) * len(cluster.get("nodes"))


# -- stolen tokens -----------------------------------------------------------------------------------------------------

HOME, OTHER = "node-1", "node-2"
#: Asks the API server what its argument says, and prints codes and answers. It runs where the thief is.
ASK: Final = """
import base64, json, ssl, sys, urllib.request, urllib.error
server, token, wishes = json.loads(base64.b64decode(sys.argv[1]))
context = ssl._create_unverified_context()
said = []
for method, path, body, kind in wishes:
    headers = {"Authorization": "Bearer " + token, "Content-Type": kind, "User-Agent": "thief"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, context=context, timeout=60) as answer:
            said.append([answer.status, answer.read(100000).decode()])
    except urllib.error.HTTPError as e:
        said.append([e.code, e.read().decode()])
print(json.dumps(said))
"""
OURS, CORE = "/apis/underlay.network/v1", "/api/v1"
MERGE, JSON = "application/merge-patch+json", "application/json"
STRATEGIC = "application/strategic-merge-patch+json"
Wish = tuple[str, str, Wire | None, str]


def pods_of(cluster: Cluster, account: str, node: str) -> Wire:
    pods = cluster.get("pods", "-n", NAMESPACE, "-l", f"app.kubernetes.io/component={account.rpartition('-')[2]}")
    (pod,) = [p for p in pods if p["spec"]["nodeName"] == node]
    return pod


def mounted(cluster: Cluster, account: str, node: str) -> str:
    """The token as it lies on that node's disk: what somebody has who broke into it. "": there is none."""
    uid = pods_of(cluster, account, node)["metadata"]["uid"]
    script = f"cat /var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/*/token 2>/dev/null || true"
    return cluster.node_exec(node, "sh", "-c", script).strip()


class Thief:
    """Has a token, and is on some machine: ``where`` a node, or "" for outside of the rack."""

    def __init__(self, cluster: Cluster, token: str, where: str) -> None:
        self._cluster, self._token, self._where = cluster, token, where

    def ask(self, *wishes: Wish) -> list[tuple[int, str]]:
        config = yaml.safe_load(Path(self._cluster.environment["KUBECONFIG"]).read_text())
        server = "https://10.96.0.1" if self._where else config["clusters"][0]["cluster"]["server"]
        given = base64.b64encode(json.dumps([server, self._token, wishes]).encode()).decode()
        argv = [sys.executable, "-c", ASK, given]
        if self._where:
            said = self._cluster.node_exec(self._where, *argv)
        else:
            said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
        return [(code, text) for code, text in json.loads(said)]


class Loot(NamedTuple):
    """What there is of two nodes to be changed."""

    mine: Wire
    theirs: Wire
    pool: Wire
    status: Wire


@pytest.fixture
def loot(cluster: Cluster) -> Iterator[Loot]:
    blocks = cluster.get("ipamblocks")
    of_v4 = [b for b in blocks if ":" not in b["spec"]["cidr"]]
    # The fullest: an owner gives others back when it has no use for them.
    of_v4.sort(key=lambda b: int(b.get("status", {}).get("used", 0)), reverse=True)
    mine, theirs = (next(b for b in of_v4 if b["spec"]["node"] == node) for node in (HOME, OTHER))
    kept = {mine["metadata"]["name"], theirs["metadata"]["name"]}
    pool = cluster.get("ippool", theirs["spec"]["pool"])[0]
    before = guarded(cluster, kept)
    yield Loot(mine, theirs, pool, cluster.get("bgpnodestatus", OTHER)[0])
    assert guarded(cluster, kept) == before


def guarded(cluster: Cluster, kept: set[str]) -> Any:
    """What no thief may have changed, of these blocks; not what changes by itself."""
    blocks = {
        b["metadata"]["name"]: (
            b["metadata"]["uid"],
            b["spec"],
            b["metadata"].get("annotations"),
            b["metadata"].get("deletionTimestamp"),
        )
        for b in cluster.get("ipamblocks")
        if b["metadata"]["name"] in kept
    }
    pools = {p["metadata"]["name"]: p["spec"] for p in cluster.get("ippools")}
    nodes = {n["metadata"]["name"]: (n["metadata"].get("labels"), n["spec"]) for n in cluster.get("nodes")}
    status = {s["metadata"]["name"]: s["metadata"]["uid"] for s in cluster.get("bgpnodestatuses")}
    return blocks, pools, nodes, status


def wishes(loot: Loot) -> dict[str, Wish]:
    """What a thief would like."""
    name, cidr = loot.theirs["metadata"]["name"], loot.theirs["spec"]["cidr"]
    block, status, node = f"{OURS}/ipamblocks/{name}", f"{OURS}/bgpnodestatuses/{OTHER}", f"{CORE}/nodes/{OTHER}"
    meta = {k: v for k, v in loot.theirs["metadata"].items() if k != "managedFields"}
    free = {"underlay.network/release": cidr.partition("/")[0]}
    pool: Wire = {"apiVersion": "underlay.network/v1", "kind": "IPPool", "metadata": {"name": "thief"}}
    # One that only its node is wrong with: the last of the pool.
    free_block = [*ip_network(loot.pool["spec"]["cidr"]).subnets(new_prefix=ip_network(cidr).prefixlen)][-1]
    spec = {"cidr": str(free_block), "pool": loot.theirs["spec"]["pool"], "node": OTHER}
    taken = {
        "apiVersion": "underlay.network/v1",
        "kind": "IPAMBlock",
        "metadata": {"name": block_name(str(free_block))},
    }
    said: Wire = {"apiVersion": "underlay.network/v1", "kind": "BGPNodeStatus", "metadata": {"name": OTHER}}
    condition = {"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False", "reason": "x"}]}}
    label: Wire = {"metadata": {"labels": {"a": "b"}}}
    space = f"{CORE}/namespaces/{NAMESPACE}"
    return {
        "release another node's addresses": (
            "PUT",
            block,
            {**loot.theirs, "metadata": {**meta, "annotations": free}},
            JSON,
        ),
        "delete another node's block": ("DELETE", block, None, JSON),
        "patch another node's block": ("PATCH", block, label, MERGE),
        "make it look empty": (
            "PUT",
            f"{block}/status",
            {**loot.theirs, "metadata": meta, "status": {"used": 0}},
            JSON,
        ),
        "a block in another node's name": ("POST", f"{OURS}/ipamblocks", {**taken, "spec": spec}, JSON),
        "delete all blocks": ("DELETE", f"{OURS}/ipamblocks", None, JSON),
        "a pool of its own": ("POST", f"{OURS}/ippools", {**pool, "spec": {"cidr": "198.51.100.0/24"}}, JSON),
        "delete a pool": ("DELETE", f"{OURS}/ippools/{loot.pool['metadata']['name']}", None, JSON),
        "another node's status": ("PATCH", f"{status}/status", {"status": {"asNumber": 1}}, MERGE),
        "write another node's status": ("PUT", f"{status}/status", {**loot.status, "status": {"asNumber": 1}}, JSON),
        "delete another node's status": ("DELETE", status, None, JSON),
        "a status in another's name": ("POST", f"{OURS}/bgpnodestatuses", {**said, "metadata": {"name": "no"}}, JSON),
        "another node's condition": ("PATCH", f"{node}/status", condition, STRATEGIC),
        "another node's labels": ("PATCH", node, label, MERGE),
        "delete another node": ("DELETE", node, None, JSON),
        "secrets": ("GET", f"{CORE}/secrets", None, JSON),
        "another token": ("POST", f"{space}/serviceaccounts/{CNI}/token", {}, JSON),
        "a pod": ("POST", f"{space}/pods", {"metadata": {"name": "thief"}}, JSON),
        "rights": ("PATCH", f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{CNI}", {"rules": []}, MERGE),
    }


@pytest.mark.parametrize("where", [OTHER, ""], ids=["used on another node", "used from outside"])
@pytest.mark.parametrize("account", [CNI, AGENT])
def test_a_stolen_token_changes_nothing_of_another_node(cluster: Cluster, loot: Loot, account: str, where: str) -> None:
    token = mounted(cluster, account, HOME)
    thief = Thief(cluster, token, where)

    def answers() -> dict[str, tuple[int, str]]:
        (theirs,) = cluster.get("ipamblock", loot.theirs["metadata"]["name"])
        (status,) = cluster.get("bgpnodestatus", OTHER)
        tried = wishes(loot._replace(theirs=theirs, status=status))
        said = dict(zip(tried, thief.ask(*tried.values()), strict=True))
        # Its owner wrote it just then: a conflict comes before the question who may.
        assert all(code != 409 for code, _ in said.values())
        return said

    for what, (code, text) in eventually(answers).items():
        message = json.loads(text).get("message", "")
        assert code == 403, (what, code, text)
        # A sentence: RBAC says who cannot do what, a policy whose it is.
        assert re.search(r"User .* cannot \w+ resource|denied request: .{40}", message), what
    # It is no dead token: of its own node it may write what that node may, and read what its process reads.
    mine = {**loot.mine, "metadata": {k: v for k, v in loot.mine["metadata"].items() if k != "managedFields"}}
    alive: Wish = ("GET", f"{OURS}/ipamblocks/{loot.mine['metadata']['name']}", None, JSON)
    own: Wish = ("PUT", f"{OURS}/ipamblocks/{mine['metadata']['name']}?dryRun=All", mine, JSON)
    (read, _), (write, text) = thief.ask(alive, own)
    # The CNI server writes it just now and then: then it is a conflict, no refusal.
    assert (read, write) in ([(200, 200), (200, 409)] if account == CNI else [(200, 403)]), text


def test_the_speaker_has_no_token_to_steal(cluster: Cluster) -> None:
    """None on the disk, none in its processes' files, none in their environment."""
    assert mounted(cluster, AGENT, HOME).startswith("eyJ")
    assert mounted(cluster, SPEAKER, HOME) == ""
    pids = cluster.node_exec(HOME, "pgrep", "-f", "underlay-speaker|-m exabgp|bgp/relay.py").split()
    assert len(pids) >= 2
    for pid in pids:
        script = f"ls /proc/{pid}/root/var/run/secrets 2>/dev/null; tr '\\0' '\\n' </proc/{pid}/environ"
        said = cluster.node_exec(HOME, "sh", "-c", script)
        assert "serviceaccount" not in said
        assert "eyJ" not in said


def test_a_token_ends_with_its_pod(cluster: Cluster, loot: Loot) -> None:
    """Who stole it and comes back after the pod was replaced has nothing."""
    pod = pods_of(cluster, AGENT, HOME)["metadata"]["name"]
    thief = Thief(cluster, mounted(cluster, AGENT, HOME), OTHER)
    wish: Wish = ("GET", f"{OURS}/ippools", None, JSON)
    assert thief.ask(wish)[0][0] == 200
    cluster.kubectl("delete", "pod", "-n", NAMESPACE, pod)
    eventually(lambda: thief.ask(wish)[0][0] == 401, every=1)
    eventually(lambda: cluster.not_ready() == [], limit=120, every=0.5)
