"""KubeStore on a real API server: what the contract suite cannot ask of every store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab.kube.cluster import Cluster, Refused
from lab.kube.installed import denial
from store import kube
from store.base import Store, mutate
from store.clock import SystemClock
from store.errors import AlreadyExists, Expired, Invalid, NotFound, Unavailable
from store.informer import Informer
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.kubehttp import Limits
from store.model import (
    Allocation,
    BGPNodeStatus,
    BGPNodeStatusStatus,
    BGPPeer,
    BGPPeerSpec,
    Condition,
    Endpoint,
    EndpointSlice,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    Meta,
    Namespace,
    Node,
    OwnerReference,
    Secret,
    Writer,
    block_name,
)
from tests.conftest import eventually

ROOT = "/apis/underlay.network/v1"
MERGE = "application/merge-patch+json"
CLOCK = SystemClock()


def run(
    cluster: Cluster,
    test: Callable[[Store], Awaitable[None]],
    *,
    token: str | None = None,
    limits: Limits | None = None,
) -> None:
    async def main() -> None:
        store = KubeStore(from_kubeconfig([cluster.kubeconfig(token)]), CLOCK, limits=limits)
        try:
            async with asyncio.timeout(90):
                await test(store)
        finally:
            await store.close()

    asyncio.run(main())


def block(cidr: str = "10.0.0.0/26", **meta: Any) -> IPAMBlock:
    return IPAMBlock(
        metadata=Meta(name=block_name(cidr), **meta), spec=IPAMBlockSpec(cidr=cidr, pool="pool", node="node-1")
    )


def full(count: int = 64) -> IPAMBlockStatus:
    return IPAMBlockStatus(
        allocations=tuple(
            Allocation(
                address=f"10.0.0.{i}",
                network="pods",
                container=f"{i:064x}",
                interface="eth0",
                pod=f"default/web-{i}" if i % 2 else "",
                since="2026-01-01T00:00:00Z",
            )
            for i in range(count)
        ),
        used=count,
        free=64 - count,
        writer=Writer(boot_id="b", start=1),
        conditions=(Condition(type="A", status="True", message="fine"),),
    )


async def until(probe: Callable[[], bool], limit: float = 60) -> None:
    async with asyncio.timeout(limit):
        while not probe():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.02)


# -- blocks -------------------------------------------------------------------------------------------------------


def test_a_full_block_comes_back_as_it_was_written_and_writing_it_again_changes_nothing(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block())
        written = await store.update_status(msgspec.structs.replace(made, status=full()))
        assert written.status == full()
        assert await store.get(IPAMBlock, made.name) == written
        assert (await store.list(IPAMBlock)).items == (written,)
        assert await store.update_status(written) == written
        assert await store.update(written) == written

    run(cluster, test)
    stored = cluster.request("GET", f"{ROOT}/ipamblocks/10-0-0-0-26")
    assert stored["status"]["allocations"]["10.0.0.1"] == f"pods {1:064x} eth0 default/web-1 2026-01-01T00:00:00Z"
    # Managed fields name the status as a whole: they do not grow with it.
    assert len(json.dumps(stored["metadata"]["managedFields"])) < 600


def test_an_owner_and_a_finalizer_go_along_and_the_owner_takes_its_block_away(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        node = await store.create(Node(metadata=Meta(name="node-1")))
        owner = OwnerReference(api_version="v1", kind="Node", name="node-1", uid=node.metadata.uid)
        made = await store.create(block(owner_references=(owner,), finalizers=("underlay.network/owner",)))
        assert made.metadata.owner_references == (owner,)
        async with aclosing(store.watch(IPAMBlock, since=made.metadata.resource_version)) as events:
            await store.delete(Node, "node-1")
            marked = (await anext(events)).object
            assert marked is not None
            assert marked.metadata.deletion_timestamp
            meta = msgspec.structs.replace(marked.metadata, finalizers=())
            await store.update(msgspec.structs.replace(marked, metadata=meta))
            kinds = [(await anext(events)).type]
            if kinds == ["modified"]:
                kinds = [(await anext(events)).type]
            assert kinds == ["deleted"]
        with pytest.raises(NotFound):
            await store.get(IPAMBlock, made.name)

    run(cluster, test)


def test_a_refusal_of_the_server_alone_reaches_the_caller_with_its_field(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block())
        stray = Allocation(address="10.0.0.64", network="pods", container="c", interface="eth0")
        with pytest.raises(Invalid) as refused:
            await store.update_status(msgspec.structs.replace(made, status=IPAMBlockStatus(allocations=(stray,))))
        (problem,) = refused.value.problems
        assert (problem.field, problem.remedy) == ("status.allocations", "an address is outside the block")

    run(cluster, test)


# -- core objects -------------------------------------------------------------------------------------------------


def test_of_a_node_nothing_is_lost_that_the_model_does_not_know(cluster: Cluster) -> None:
    taint = {"key": "example.org/spare", "effect": "NoSchedule"}
    cluster.request("POST", "/api/v1/nodes", {"metadata": {"name": "node-1"}, "spec": {"taints": [taint]}})
    condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
    status = {
        "conditions": [condition],
        "capacity": {"pods": "110"},
        "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Hostname", "address": "node-1"}],
    }
    cluster.request(
        "PATCH", "/api/v1/nodes/node-1/status", {"status": status}, content_type="application/merge-patch+json"
    )

    def kept(seen: dict[str, Any]) -> bool:
        return taint in seen["spec"]["taints"] and seen["status"]["capacity"]["pods"] == "110"

    async def test(store: Store) -> None:
        def label(node: Node) -> Node:
            meta = msgspec.structs.replace(node.metadata, labels={"rack": "r1"}, annotations={"a": "b"})
            return msgspec.structs.replace(node, metadata=meta)

        await mutate(store, Node, "node-1", label)
        assert kept(cluster.request("GET", "/api/v1/nodes/node-1"))

        def cut(node: Node) -> Node:
            fewer = msgspec.structs.replace(node.status, addresses=node.status.addresses[:1])
            return msgspec.structs.replace(node, status=fewer)

        after = await mutate(store, Node, "node-1", cut, status=True)
        assert after.metadata.labels == {"rack": "r1"}
        seen = cluster.request("GET", "/api/v1/nodes/node-1")
        assert kept(seen)
        assert [a["type"] for a in seen["status"]["addresses"]] == ["InternalIP"]
        assert seen["status"]["conditions"][0]["reason"] == "KubeletReady"
        unlabelled = msgspec.structs.replace(after.metadata, labels={}, annotations={})
        bare = await store.update(msgspec.structs.replace(after, metadata=unlabelled))
        assert (bare.metadata.labels, bare.metadata.annotations) == ({}, {})
        assert kept(cluster.request("GET", "/api/v1/nodes/node-1"))
        # One that was not read but made, with nothing in it that is optional.
        meta = Meta(name="node-1", resource_version=bare.metadata.resource_version, labels={"rack": "r2"})
        assert (await store.update(Node(metadata=meta))).metadata.labels == {"rack": "r2"}
        assert kept(cluster.request("GET", "/api/v1/nodes/node-1"))

    run(cluster, test)


def test_a_slice_without_endpoints_has_a_null_there_and_one_with_is_its_owners(cluster: Cluster) -> None:
    where = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    body: dict[str, Any] = {"metadata": {"name": "web"}, "addressType": "IPv4", "endpoints": None}
    assert cluster.request("POST", where, body)["endpoints"] is None

    async def test(store: Store) -> None:
        (empty,) = (await store.list(EndpointSlice, where={"metadata.name": "web"})).items
        assert empty.endpoints == ()
        assert await store.get(EndpointSlice, "default/web") == empty
        async with aclosing(store.watch(EndpointSlice, where={"metadata.namespace": "default"})) as events:
            while (await anext(events)).type != "synced":
                pass
            one = {"addresses": ["10.0.0.1"], "hostname": "kept"}
            filled = cluster.request("PATCH", f"{where}/web", {"endpoints": [one]}, content_type=MERGE)
            event = await anext(events)
        assert event.object is not None
        assert event.object.endpoints == (Endpoint(addresses=("10.0.0.1",)),)
        with pytest.raises(Invalid, match="change it as its owner does"):
            await store.update(msgspec.structs.replace(event.object, endpoints=()))
        meta = msgspec.structs.replace(event.object.metadata, annotations={"a": "b"})
        await store.update(msgspec.structs.replace(event.object, metadata=meta))
        now = cluster.request("GET", f"{where}/web")
        assert (now["endpoints"], now["metadata"]["annotations"]) == (filled["endpoints"], {"a": "b"})

    run(cluster, test)


def test_what_goes_into_a_missing_namespace_is_told_so(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        with pytest.raises(NotFound, match="Secret shop/tor: there is no namespace shop: make it first"):
            await store.create(Secret(metadata=Meta(name="tor", namespace="shop")))
        with pytest.raises(NotFound, match="Namespace shop does not exist"):
            await store.get(Namespace, "shop")

    run(cluster, test)


def test_a_right_to_one_secret_is_enough_to_follow_it(cluster: Cluster) -> None:
    rules = [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["tor"], "verbs": ["get", "list", "watch"]}]
    subject = {"kind": "ServiceAccount", "name": "reader", "namespace": "default"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"}
    meta = {"name": "reader", "namespace": "default"}
    rbac = "rbac.authorization.k8s.io/v1"
    cluster.apply(
        [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
            {"apiVersion": rbac, "kind": "Role", "metadata": meta, "rules": rules},
            {"apiVersion": rbac, "kind": "RoleBinding", "metadata": meta, "subjects": [subject], "roleRef": reference},
        ]
    )
    for name in ("tor", "other"):
        cluster.request("POST", "/api/v1/namespaces/default/secrets", {"metadata": {"name": name}})

    async def test(store: Store) -> None:
        where = {"metadata.namespace": "default", "metadata.name": "tor"}
        version = (await store.list(Secret, where=where)).version
        async with aclosing(store.watch(Secret, where=where, since=version)) as events:
            secret = {"stringData": {"password": "hunter2"}}
            cluster.request("PATCH", "/api/v1/namespaces/default/secrets/tor", secret, content_type=MERGE)
            event = await anext(events)
        assert event.object is not None
        assert event.object.data == {"password": b"hunter2"}
        with pytest.raises(Unavailable, match=r"secrets \"other\" is forbidden"):
            await store.get(Secret, "default/other")

    token = cluster.token("reader", namespace="default")
    # The API server reads rights from a watch of its own.
    eventually(lambda: denial(cluster, "GET", "/api/v1/namespaces/default/secrets/tor", token=token) is None)
    run(cluster, test, token=token)


# -- reading much ---------------------------------------------------------------------------------------------------


def test_many_objects_are_read_in_pages_and_watched_from_there(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "PAGE", 7)

    async def test(store: Store) -> None:
        names = [f"p{i:02}" for i in range(30)]
        for i, name in enumerate(names):
            await store.create(IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=f"10.{i}.0.0/16")))
        listing = await store.list(IPPool)
        assert [p.name for p in listing.items] == names
        await store.delete(IPPool, "p07")
        async with aclosing(store.watch(IPPool, since=listing.version)) as events:
            event = await anext(events)
        assert (event.type, event.object and event.object.name) == ("deleted", "p07")

    run(cluster, test)


# -- who may ----------------------------------------------------------------------------------------------------------


def test_what_rbac_forbids_is_an_outage_with_the_reason(cluster: Cluster) -> None:
    cluster.request("POST", "/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "nobody"}})
    token = cluster.token("nobody", namespace="default")

    async def test(store: Store) -> None:
        with pytest.raises(Unavailable, match=r'"system:serviceaccount:default:nobody" cannot list resource "ippools"'):
            await store.list(IPPool)
        with pytest.raises(Unavailable, match="cannot create"):
            await store.create(BGPPeer(metadata=Meta(name="a"), spec=BGPPeerSpec(peer_ip="10.0.0.1", as_number=65001)))

    run(cluster, test, token=token)


def test_a_policy_that_cannot_be_judged_is_an_outage_and_no_fault_of_the_object(cluster: Cluster) -> None:
    """As for the first seconds after a restart, when the API server has not read what its policies ask for."""
    api = "admissionregistration.k8s.io/v1"
    rule = {
        "apiGroups": ["*"],
        "apiVersions": ["*"],
        "operations": ["CREATE"],
        "resources": ["ippools"],
        "resourceNames": ["early"],  # the API server holds to it for a while after a reset, and other tests make pools
    }
    policy = {
        "apiVersion": api,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "early"},
        "spec": {
            "paramKind": {"apiVersion": "example.org/v1", "kind": "NotThereYet"},
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": "true"}],
        },
    }
    binding = {
        "apiVersion": api,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "early"},
        "spec": {
            "policyName": "early",
            "paramRef": {"selector": {}, "parameterNotFoundAction": "Deny"},
            "validationActions": ["Deny"],
        },
    }
    cluster.apply([policy, binding])

    async def test(store: Store) -> None:
        end = CLOCK.monotonic() + 60
        while True:
            try:
                await store.create(IPPool(metadata=Meta(name="early"), spec=IPPoolSpec(cidr="10.0.0.0/16")))
            except Unavailable as e:
                assert "failed to configure" in str(e)
                return
            await store.delete(IPPool, "early")
            assert CLOCK.monotonic() < end, "the policy never came into force"
            await asyncio.sleep(0.1)

    run(cluster, test)


def test_an_api_server_without_our_kinds_says_what_to_apply(spare: Callable[[], Cluster]) -> None:
    bare = spare()
    bare.start()

    async def test(store: Store) -> None:
        for call in (store.list(IPPool), store.get(IPPool, "a"), store.create(block())):
            with pytest.raises(Unavailable, match="apply manifests/crds"):
                await call
        assert (await store.list(Node)).items == ()

    run(bare, test)


# -- when it dies -----------------------------------------------------------------------------------------------------


def test_a_version_of_before_a_restart_is_expired_or_followed_without_loss(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        old = (await store.list(IPPool)).version
        for i in range(3):
            await store.create(IPPool(metadata=Meta(name=f"p{i}"), spec=IPPoolSpec(cidr=f"10.{i}.0.0/16")))
        cluster.kill("kube-apiserver")
        with pytest.raises(Unavailable):
            await store.list(IPPool)
        cluster.start_apiserver()
        async with asyncio.timeout(60):
            while True:
                try:
                    async with aclosing(store.watch(IPPool, since=old)) as events:
                        found = [await anext(events) for _ in range(3)]
                    assert [e.object and e.object.name for e in found] == ["p0", "p1", "p2"]
                    break
                except Expired:
                    break
                except Unavailable:
                    await asyncio.sleep(0.1)

    run(cluster, test)


def test_informers_follow_through_restarts_and_lose_nothing(cluster: Cluster) -> None:
    """The API server is killed again and again under a storm of writes; in the end the copy is what the store has."""

    async def test(store: Store) -> None:
        informer = Informer(store, BGPNodeStatus, CLOCK)
        following = asyncio.create_task(informer.run())
        stop = asyncio.Event()
        refused = 0

        async def storm(lane: int) -> None:
            nonlocal refused
            count = 0
            while not stop.is_set():
                count += 1
                name = f"node-{lane}-{count % 5}"
                try:
                    await write(name, count)
                except (Unavailable, NotFound):
                    refused += 1
                    await asyncio.sleep(0.05)

        async def write(name: str, count: int) -> None:
            def report(seen: BGPNodeStatus) -> BGPNodeStatus:
                return msgspec.structs.replace(seen, status=BGPNodeStatusStatus(as_number=count))

            if count % 7 == 0:
                await store.delete(BGPNodeStatus, name)
                return
            try:
                await store.create(BGPNodeStatus(metadata=Meta(name=name)))
            except AlreadyExists:
                await mutate(store, BGPNodeStatus, name, report, status=True)

        storms = [asyncio.create_task(storm(lane)) for lane in range(3)]
        for _ in range(3):
            await asyncio.sleep(0.7)
            cluster.kill("kube-apiserver")
            await asyncio.sleep(0.3)
            cluster.start_apiserver(wait=False)
            await until(cluster.is_ready)
        stop.set()
        await asyncio.gather(*storms)
        assert refused
        for _ in range(300):
            listing = await listed(store)
            if dict(informer.items) == {s.name: s for s in listing} and not informer.error:
                break
            await asyncio.sleep(0.2)
        assert dict(informer.items) == {s.name: s for s in await listed(store)}
        assert informer.error == ""
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    async def listed(store: Store) -> tuple[BGPNodeStatus, ...]:
        async with asyncio.timeout(60):
            while True:
                try:
                    return (await store.list(BGPNodeStatus)).items
                except Unavailable:
                    await asyncio.sleep(0.1)

    run(cluster, test, limits=Limits(patience=2))


# -- what people see --------------------------------------------------------------------------------------------------


def test_kubectl_prints_what_an_operator_looks_for(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        made = await store.create(block())
        await store.update_status(msgspec.structs.replace(made, status=full(3)))
        made = await store.create(block("10.0.0.64/26"))
        await store.update_status(msgspec.structs.replace(made, status=IPAMBlockStatus(free=64)))
        await store.create(IPPool(metadata=Meta(name="pool"), spec=IPPoolSpec(cidr="10.0.0.0/16", block_size=26)))
        await store.create(BGPPeer(metadata=Meta(name="tor"), spec=BGPPeerSpec(peer_ip="10.9.0.1", as_number=65001)))

    run(cluster, test)

    def table(plural: str) -> list[dict[str, Any]]:
        answer = cluster.request("GET", f"{ROOT}/{plural}", accept="application/json;as=Table;v=v1;g=meta.k8s.io")
        names = [c["name"] for c in answer["columnDefinitions"] if c["priority"] == 0]
        return [dict(zip(names, row["cells"], strict=False)) for row in answer["rows"]]

    one, two = table("ipamblocks")
    assert {k: one[k] for k in ("Name", "CIDR", "Node", "Used", "Free")} == {
        "Name": "10-0-0-0-26",
        "CIDR": "10.0.0.0/26",
        "Node": "node-1",
        "Used": 3,
        "Free": 61,
    }
    assert (two["Used"], two["Free"]) == (0, 64)
    (pool,) = table("ippools")
    assert (pool["CIDR"], pool["Block"], pool["Nodes"], pool["Disabled"]) == ("10.0.0.0/16", 26, "all()", False)
    (peer,) = table("bgppeers")
    assert (peer["Peer"], peer["AS"]) == ("10.9.0.1", 65001)


def test_blocks_are_selected_by_what_the_model_says_and_by_nothing_else(cluster: Cluster) -> None:
    async def test(store: Store) -> None:
        await store.create(block())

    run(cluster, test)
    for node, count in (("node-1", 1), ("node-2", 0)):
        found = cluster.request("GET", f"{ROOT}/ipamblocks?fieldSelector=spec.node%3D{node}")["items"]
        assert len(found) == count
    with pytest.raises(Refused) as refused:
        cluster.request("GET", f"{ROOT}/ipamblocks?fieldSelector=spec.cidr%3D10.0.0.0")
    assert refused.value.code == 400


def test_a_misspelt_field_is_told_and_not_dropped(cluster: Cluster, tmp_path: Path) -> None:
    """A program that is newer than the CRDs must not believe that the API server keeps what it writes."""
    wire = {
        "apiVersion": "underlay.network/v1",
        "kind": "IPPool",
        "metadata": {"name": "a"},
        "spec": {"cidr": "10.0.0.0/16", "blocksize": 26},
    }
    with pytest.raises(Refused, match="unknown field"):
        cluster.request("POST", f"{ROOT}/ippools?fieldValidation=Strict", wire)
