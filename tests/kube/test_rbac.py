"""The rights of our accounts: exactly these, each of them used by tokens of our pods, with all policies in force."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from msgspec.structs import replace

from agent.status import StatusWriter
from agent.view import View
from ipam.node import Settings
from lab.kube.cluster import Cluster, Refused
from lab.kube.installed import ACCOUNTS, AGENT, CNI, NAMESPACE, SPEAKER, Installed, Wire, denial
from store.clock import SystemClock
from store.errors import Invalid, NotFound
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.model import BGPNodeStatus, BGPNodeStatusStatus, IPAMBlock
from tests.conftest import eventually
from tests.ipam_fakes import Rig
from tests.kube.objects import block, node_status, path, pool, status_of

FOLLOW = ("list", "watch")
#: What each process does with each kind; why is said in the manifest.
RIGHTS: dict[str, dict[str, tuple[str, ...]]] = {
    CNI: {
        "ippools": ("get", *FOLLOW),
        "ipreservations": FOLLOW,
        "ipamconfigurations": FOLLOW,
        "ipamblocks": ("get", *FOLLOW, "create", "update", "delete"),
        "ipamblocks/status": ("update",),
        "bgpnodestatuses": ("get",),
        "nodes": ("get", *FOLLOW),
        "events": ("create", "get", "patch"),
        "pods": FOLLOW,
        "namespaces": FOLLOW,
    },
    AGENT: {
        "ippools": (*FOLLOW, "create"),
        "ipamblocks": ("get", *FOLLOW),
        "bgpconfigurations": FOLLOW,
        "bgppeers": FOLLOW,
        "bgpfilters": FOLLOW,
        "bgpnodestatuses": ("get", *FOLLOW, "create", "update", "delete"),
        "bgpnodestatuses/status": ("update",),
        "nodes": FOLLOW,
        "nodes/status": ("patch",),
    },
    SPEAKER: {},
}
#: What is of one namespace, and mostly of one object there; used in test_first_pools.py.
NARROW = {
    (AGENT, "kube-system"): {("configmaps kubeadm-config", "get"), ("clusterconfigs k0s.k0sproject.io k0s", "get")},
    (AGENT, NAMESPACE): {("configmaps underlay-first-pools", "get"), ("configmaps", "create")},
}
#: Only where pods may choose pool or address.
OPTIONAL = "underlay-cni-annotations"
EACH = [(a, r, v) for a, rights in RIGHTS.items() for r, verbs in rights.items() for v in verbs]

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
#: The roles of manifests/rbac.yaml, by account.
ROLES = {CNI: (CNI, OPTIONAL), AGENT: (AGENT,), SPEAKER: ()}
CLUSTER_ROLES = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
BINDINGS = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"


@pytest.fixture(scope="module")
def _populated(_installed: Installed) -> Iterator[None]:
    """One object of each kind, so that there is something to read and to write."""
    cluster = _installed.cluster

    def ours(plural: str, kind: str, name: str, spec: Wire) -> None:
        body = {"apiVersion": "underlay.network/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        cluster.request("POST", path(plural), body)

    cluster.reset()
    cluster.request("POST", path("ippools"), pool("pool", "10.0.0.0/16"))
    ours("ipreservations", "IPReservation", "router", {"reservedCIDRs": ["10.0.0.1"]})
    ours("ipamconfigurations", "IPAMConfiguration", "default", {"maxBlocksPerHost": 4})
    ours("bgpconfigurations", "BGPConfiguration", "default", {"asNumber": 64512})
    ours("bgppeers", "BGPPeer", "tor", {"peerIP": "192.0.2.1", "asNumber": 65001})
    ours("bgpfilters", "BGPFilter", "deny", {"importV4": [{"action": "Reject"}]})
    cluster.request("POST", path("ipamblocks"), block("10.0.0.0/26", "node-1"))
    for name in ("node-1", "node-2"):
        cluster.request("POST", path("bgpnodestatuses"), node_status(name))
    with cluster.remembered():
        yield


@pytest.fixture
def installed(_populated: None, installed: Installed) -> Installed:
    return installed


@pytest.fixture
def cluster(installed: Installed) -> Cluster:
    return installed.cluster


class Resource(NamedTuple):
    """Where a kind is, an object that is there, how a node narrows a list, and a new object."""

    root: str
    name: str
    where: str = ""
    new: Wire | None = None


def _event(name: str) -> Wire:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": "default"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "underlay.network/cni",
        "reportingInstance": "node-1",
        "action": "Claim",
        "reason": "PoolExhausted",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"},
        "note": "pool has no free block left: add a pool",
        "type": "Warning",
    }


EVENTS = "/apis/events.k8s.io/v1/namespaces/default/events"
RESOURCES = {
    "ippools": Resource(path("ippools"), "pool", "", pool("default-ipv4", "10.8.0.0/16")),
    "ipreservations": Resource(path("ipreservations"), "router"),
    "ipamconfigurations": Resource(path("ipamconfigurations"), "default", "metadata.name=default"),
    "bgpconfigurations": Resource(path("bgpconfigurations"), "default"),
    "bgppeers": Resource(path("bgppeers"), "tor"),
    "bgpfilters": Resource(path("bgpfilters"), "deny"),
    "ipamblocks": Resource(path("ipamblocks"), "10-0-0-0-26", "spec.node=node-1", block("10.0.0.64/26", "node-1")),
    "bgpnodestatuses": Resource(path("bgpnodestatuses"), "node-1", "", node_status("node-1")),
    "nodes": Resource("/api/v1/nodes", "node-1", "metadata.name=node-1"),
    "pods": Resource(f"/api/v1/namespaces/{NAMESPACE}/pods", f"{CNI}-node-1"),
    "namespaces": Resource("/api/v1/namespaces", "default"),
    "events": Resource(EVENTS, "seen", "", _event("new")),
}
#: Pods of one node, whatever their namespace.
PODS_HERE = "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-1"


def _see_event(cluster: Cluster) -> None:
    if status_of(cluster, f"{EVENTS}/seen", token=cluster.admin_token) == 404:
        cluster.request("POST", EVENTS, _event("seen"))


def listed(resource: str) -> str:
    if resource == "pods":
        return PODS_HERE
    root, _, where, _ = RESOURCES[resource]
    return f"{root}?fieldSelector={where.replace('=', '%3D')}" if where else f"{root}?limit=500"


def use(installed: Installed, account: str, resource: str, verb: str) -> None:
    """Does it as the account's pod on node-1 would; Refused if it may not."""
    cluster, token = installed.cluster, installed.tokens[account, "node-1"]
    resource, _, sub = resource.partition("/")
    root, name, _, new = RESOURCES[resource]
    at = f"{root}/{name}"
    match verb:
        case "get":
            if resource == "events":
                _see_event(cluster)
            assert cluster.request("GET", at, token=token)["metadata"]["name"] == name
        case "list":
            names = [
                item["metadata"]["name"] for item in cluster.request("GET", listed(resource), token=token)["items"]
            ]
            assert name in names
        case "watch":
            assert status_of(cluster, f"{listed(resource)}&watch=true", token=token) == 200
        case "create":
            if resource == "bgpnodestatuses":
                cluster.request("DELETE", at)
            if resource == "ippools":
                # The first one is made where there is none.
                cluster.request("DELETE", at)
                eventually(
                    lambda: (
                        "there is IPPool" not in str(denial(cluster, "POST", f"{root}?dryRun=All", new, token=token))
                    )
                )
            cluster.request("POST", root, new, token=token)
        case "update":
            obj = cluster.request("GET", at)
            if sub:
                obj["status"] = {"used": 1, "free": 63} if resource == "ipamblocks" else {"asNumber": 64512}
            else:
                # The owner reference needs a right to delete too, where OwnerReferencesPermissionEnforcement is on.
                uid = cluster.request("GET", "/api/v1/nodes/node-1")["metadata"]["uid"]
                owner = {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": uid}
                obj["metadata"] |= {"annotations": {"a": "b"}, "ownerReferences": [owner]}
            before = obj["metadata"]["resourceVersion"]
            after = cluster.request("PUT", f"{at}/{sub}" if sub else at, obj, token=token)
            assert after["metadata"]["resourceVersion"] != before
        case "patch" if resource == "nodes":
            said = {"type": "NetworkUnavailable", "status": "False", "reason": "UnderlayIsUp"}
            patch = {"status": {"conditions": [said]}}
            after = cluster.request("PATCH", f"{at}/{sub}", patch, token=token, content_type=STRATEGIC)
            assert [(c["type"], c["reason"]) for c in after["status"]["conditions"]] == [
                ("NetworkUnavailable", "UnderlayIsUp")
            ]
        case "patch":
            _see_event(cluster)
            series = {"count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z"}
            after = cluster.request("PATCH", at, {"series": series}, token=token, content_type=MERGE)
            assert after["series"] == series
        case "delete":
            cluster.request("DELETE", at, token=token)
        case _:
            raise AssertionError(f"no use of {verb} is known")


@pytest.mark.parametrize(("account", "resource", "verb"), EACH)
def test_every_right_is_of_use(installed: Installed, account: str, resource: str, verb: str) -> None:
    use(installed, account, resource, verb)


@pytest.mark.parametrize(("account", "resource", "verb"), EACH)
def test_without_a_right_what_it_is_for_fails(installed: Installed, account: str, resource: str, verb: str) -> None:
    """So each verb of each rule is needed by ``test_every_right_is_of_use``: take one away, and that fails."""
    cluster = installed.cluster
    kind, _, _ = resource.partition("/")
    takers = [role for role in ROLES[account] if _takes(cluster, role, resource, verb)]
    assert len(takers) == 1, "one rule gives it"

    def refused() -> bool:
        try:
            use(installed, account, resource, verb)
        except Refused as e:
            assert f'cannot {verb} resource "{resource}"' in str(e)
            return True
        except AssertionError:
            # A watch says only its code.
            return (
                verb == "watch"
                and status_of(cluster, f"{listed(kind)}&watch=true", token=installed.tokens[account, "node-1"])
                == HTTPStatus.FORBIDDEN
            )
        cluster.reset()
        for role in takers:
            _takes(cluster, role, resource, verb)
        return False

    eventually(refused)


def _takes(cluster: Cluster, role: str, resource: str, verb: str) -> bool:
    """Takes the verb out of every rule of the role for that resource; False if none had it."""
    at = f"{CLUSTER_ROLES}/{role}"
    obj = cluster.request("GET", at)
    rules, found = [], False
    for rule in obj["rules"]:
        if resource in rule["resources"] and verb in rule["verbs"]:
            found = True
            others = [r for r in rule["resources"] if r != resource]
            rules += [{**rule, "resources": others}] if others else []
            verbs = [v for v in rule["verbs"] if v != verb]
            rules += [{**rule, "resources": [resource], "verbs": verbs}] if verbs else []
        else:
            rules.append(rule)
    if found:
        cluster.request("PUT", at, {**obj, "rules": rules})
    return found


def granted(cluster: Cluster, token: str, namespace: str) -> set[tuple[str, str]]:
    """Resource and verb, as the API server sums up all roles; without what everybody has who is known at all."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    answer = cluster.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review, token=token)
    rules = answer["status"]["resourceRules"]
    found = set()
    for rule in rules:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for name in rule.get("resourceNames", [""]):
                    what = " ".join(part for part in (resource, group, name) if part)
                    found |= {(what, verb) for verb in rule["verbs"]}
    return found


@pytest.mark.parametrize("account", ACCOUNTS)
@pytest.mark.parametrize("namespace", ["default", "kube-system", NAMESPACE])
def test_no_account_has_any_other_right(cluster: Cluster, installed: Installed, account: str, namespace: str) -> None:
    anybody = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "anybody", "namespace": "default"}}
    cluster.apply([anybody])
    everybodys = granted(cluster, cluster.token("anybody", namespace="default"), namespace)
    others = {"nodes": "nodes", "pods": "pods", "namespaces": "namespaces", "events": "events events.k8s.io"}
    wanted = {
        (resource if resource == "nodes/status" else others.get(resource, f"{resource} underlay.network"), verb)
        for resource, verbs in RIGHTS[account].items()
        for verb in verbs
    } | NARROW.get((account, namespace), set())
    assert granted(cluster, installed.tokens[account, "node-1"], namespace) - everybodys == wanted


#: What an intruder with one of our tokens would like.
WISHES: dict[str, Callable[[Cluster, str], int]] = {
    "secrets": lambda c, t: status_of(c, "/api/v1/secrets", token=t),
    "config maps": lambda c, t: status_of(c, "/api/v1/namespaces/kube-system/configmaps", token=t),
    "another ConfigMap": lambda c, t: _code(
        c, "POST", f"/api/v1/namespaces/{NAMESPACE}/configmaps", {"metadata": {"name": "underlay-config"}}, t
    ),
    "logs of a pod": lambda c, t: status_of(c, f"/api/v1/namespaces/{NAMESPACE}/pods/{CNI}-node-2/log", token=t),
    "a pod": lambda c, t: _code(c, "POST", "/api/v1/namespaces/default/pods", {"metadata": {"name": "p"}}, t),
    "a token": lambda c, t: _code(c, "POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{CNI}/token", {}, t),
    "to change a node": lambda c, t: _code(c, "PATCH", "/api/v1/nodes/node-1", {"metadata": {"labels": {"a": "b"}}}, t),
    "to delete a node": lambda c, t: _code(c, "DELETE", "/api/v1/nodes/node-2", None, t),
    "a pool": lambda c, t: _code(c, "POST", path("ippools"), pool("new", "10.9.0.0/16"), t),
    "a first pool beside another": lambda c, t: _code(
        c, "POST", path("ippools"), pool("default-ipv4", "10.9.0.0/16"), t
    ),
    "to delete a pool": lambda c, t: _code(c, "DELETE", path("ippools", "pool"), None, t),
    "to change a peer": lambda c, t: _code(c, "PATCH", path("bgppeers", "tor"), {"spec": {"asNumber": 65002}}, t),
    "to patch a block": lambda c, t: _code(c, "PATCH", path("ipamblocks", "10-0-0-0-26"), {"metadata": {}}, t),
    "to delete all blocks": lambda c, t: _code(c, "DELETE", path("ipamblocks"), None, t),
    "to delete a status": lambda c, t: _code(c, "DELETE", path("bgpnodestatuses", "node-2"), None, t),
    "rights": lambda c, t: _code(c, "PATCH", f"{BINDINGS}/{OPTIONAL}", {"metadata": {"labels": {"a": "b"}}}, t),
}


def _code(cluster: Cluster, method: str, at: str, body: object, token: str) -> int:
    content = MERGE if method == "PATCH" else "application/json"
    refusal = denial(cluster, method, at, body, token=token, content_type=content)
    return refusal.code if refusal else 200


@pytest.mark.parametrize("account", ACCOUNTS)
def test_what_an_intruder_would_like_is_refused(installed: Installed, account: str) -> None:
    token = installed.tokens[account, "node-1"]
    assert {wish: ask(installed.cluster, token) for wish, ask in WISHES.items()} == dict.fromkeys(WISHES, 403)


def test_the_speaker_may_do_nothing_and_has_no_token(cluster: Cluster, installed: Installed) -> None:
    token = installed.tokens[SPEAKER, "node-1"]
    readable = [r for r in RESOURCES if status_of(cluster, listed(r), token=token) != 403]
    assert readable == []
    for account, volumes in ((SPEAKER, 0), (AGENT, 1)):
        pod = cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/{account}-node-1")
        assert len(pod["spec"].get("volumes", [])) == volumes, account


def test_without_the_optional_role_the_cni_server_sees_no_pod_and_does_all_else(installed: Installed) -> None:
    cluster, token = installed.cluster, installed.tokens[CNI, "node-1"]
    cluster.request("DELETE", f"{BINDINGS}/{OPTIONAL}")
    eventually(lambda: status_of(cluster, PODS_HERE, token=token) == 403)
    assert status_of(cluster, "/api/v1/namespaces/default", token=token) == 403
    for resource, verbs in RIGHTS[CNI].items():
        if resource not in ("pods", "namespaces"):
            for verb in verbs:
                use(installed, CNI, resource, verb)


def test_the_role_of_the_docs_lets_the_agent_follow_one_secret_and_no_other(installed: Installed) -> None:
    cluster, token = installed.cluster, installed.tokens[AGENT, "node-1"]
    root = f"/api/v1/namespaces/{NAMESPACE}/secrets"
    for name in ("tor-passwords", "other"):
        cluster.request("POST", root, {"metadata": {"name": name}, "stringData": {"tor-1": "hunter2"}})
    one = f"{root}?fieldSelector=metadata.name%3Dtor-passwords"
    assert status_of(cluster, one, token=token) == 403
    text = (Path(__file__).parents[2] / "docs/bgp.md").read_text().partition("## Passwords")[2]
    cluster.apply(list(yaml.safe_load_all(text.split("```")[1])))
    eventually(lambda: status_of(cluster, one, token=token) == 200)
    assert status_of(cluster, f"{one}&watch=true", token=token) == 200
    for other in (root, f"{root}/other", f"{root}?fieldSelector=metadata.name%3Dother", "/api/v1/secrets"):
        assert status_of(cluster, other, token=token) == 403


def test_our_namespace_takes_pods_that_work_in_the_nodes_network(cluster: Cluster) -> None:
    """Also where pod security is enforced by default: a namespace's own label goes before that."""
    pod: Wire = {
        "metadata": {"name": "agent"},
        "spec": {
            "hostNetwork": True,
            "containers": [{"name": "main", "image": "i", "securityContext": {"capabilities": {"add": ["NET_ADMIN"]}}}],
        },
    }
    label = "pod-security.kubernetes.io/enforce"
    ours = cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}")["metadata"]["labels"]
    for level, code in ((ours.get(label, "baseline"), 200), ("baseline", 403)):
        cluster.apply(
            [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": level, "labels": {label: level}}}]
        )
        create = f"/api/v1/namespaces/{level}/pods?dryRun=All"
        _await_account(cluster, level)
        assert _code(cluster, "POST", create, pod, cluster.admin_token) == code


def _await_account(cluster: Cluster, namespace: str) -> None:
    """A pod needs its namespace's default account, which a controller makes."""
    eventually(lambda: denial(cluster, "GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default") is None)


def test_the_anonymous_and_other_accounts_are_as_they_were(cluster: Cluster) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "other", "namespace": NAMESPACE}}
    cluster.apply([account])
    other = cluster.token("other", namespace=NAMESPACE, node="node-1")  # of our namespace, and yet no process of ours
    for token in ("", other):
        assert status_of(cluster, "/version", token=token) == 200
        readable = [r for r in RESOURCES if status_of(cluster, listed(r), token=token) != 403]
        assert readable == []
    assert _code(cluster, "POST", path("ipamblocks"), block("10.0.0.64/26", "node-1"), other) == 403


# -- our own code with these rights ------------------------------------------------------------------------------------


@asynccontextmanager
async def stores(installed: Installed, *accounts: tuple[str, str]) -> AsyncIterator[list[KubeStore]]:
    """Stores as the accounts' pods on these nodes have them."""
    opened = []
    for account in accounts:
        kubeconfig = installed.cluster.folder / f"{'-'.join(account)}.kubeconfig"
        installed.cluster.kubeconfig(installed.tokens[account], path=kubeconfig)
        opened.append(KubeStore(from_kubeconfig([kubeconfig]), SystemClock()))
    try:
        yield opened
    finally:
        for store in opened:
            await store.close()


async def soon(probe: Callable[[], Awaitable[bool]]) -> None:
    """``eventually``, where what is waited for runs on this event loop."""
    async with asyncio.timeout(60):
        while not await probe():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.05)


def test_the_cni_server_lives_on_its_rights(installed: Installed, tmp_path: Path) -> None:
    """It adopts and claims blocks, hands out, mirrors, and gives up a block that somebody deletes; another node's does
    nothing to them."""
    name = "10-0-0-0-26"

    async def story() -> None:
        async with stores(installed, (CNI, "node-1"), (CNI, "node-2")) as (mine, theirs):
            settings = Settings(rest=0.1, withdrawn=0.1)
            rig = Rig(tmp_path, store=mine, clock=SystemClock(), settings=settings)  # type: ignore[arg-type]
            await rig.up(run=False)
            server = asyncio.create_task(rig.ipam.run())
            try:
                await rig.sync_blackholes()
                lease = await rig.add(1)

                async def mirrored() -> bool:
                    return lease.addresses[0] in await rig.mirror()

                await soon(mirrored)
                seen = await theirs.get(IPAMBlock, name)
                with pytest.raises(
                    Invalid, match=r"block 10\.0\.0\.0/26 is of node node-1 and this token of node node-2"
                ):
                    await theirs.update_status(replace(seen, status=replace(seen.status, used=9)))
                installed.cluster.request("DELETE", path("ipamblocks", name))
                rig.delete(1)

                async def gone() -> bool:
                    await rig.sync_blackholes()
                    try:
                        return (await theirs.get(IPAMBlock, name)).metadata.uid != seen.metadata.uid
                    except NotFound:
                        return True

                await soon(gone)
                assert (await rig.add(2)).addresses
            finally:
                server.cancel()
                await asyncio.gather(server, return_exceptions=True)

    asyncio.run(story())


def test_the_agent_lives_on_its_rights(installed: Installed, tmp_path: Path) -> None:
    """It follows all that it plans from, and tells of its own node; another node's agent does not. A status that an
    older release left without an owner gets it."""
    said = BGPNodeStatusStatus(as_number=64512, router_id="192.0.2.7")

    async def story() -> None:
        async with stores(installed, (AGENT, "node-2"), (AGENT, "node-1")) as (mine, theirs):
            view = View(mine, "node-2", SystemClock(), tmp_path / "snapshot.json", lambda: None, patience=60)
            writer = StatusWriter(mine, "node-2", SystemClock())
            writer.offer(said)
            tasks = [asyncio.create_task(view.run()), asyncio.create_task(writer.run())]

            async def complete() -> bool:
                assert not any(task.done() for task in tasks)
                # The mesh is on where nothing else is said: then the other nodes are read too.
                cluster = view.cluster()
                return cluster is not None and [n.name for n in cluster.nodes] == ["node-1"]

            async def told() -> bool:
                try:
                    return (await theirs.get(BGPNodeStatus, "node-2")).status == said
                except NotFound:
                    return False

            async def owned() -> bool:
                owners = (await theirs.get(BGPNodeStatus, "node-2")).metadata.owner_references
                return [owner.uid for owner in owners] == [view.node_uid()]

            async def knows_who_has_it() -> bool:
                return (cluster := view.cluster()) is not None and cluster.taken == {"10.0.0.0/26"}

            try:
                await soon(complete)
                await soon(told)
                writer.own(view.node_uid())
                await soon(owned)
                # Of a block that it holds, and that the store no longer says is its own.
                view.question(frozenset({"10.0.0.0/26"}))
                await soon(knows_who_has_it)
                seen = await theirs.get(BGPNodeStatus, "node-2")
                with pytest.raises(Invalid, match="BGPNodeStatus node-2 is of the node of that name"):
                    await theirs.update_status(replace(seen, status=BGPNodeStatusStatus()))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(story())
