"""Every kind of pool on a real API server, with our policies in force and tokens of our pods."""

from __future__ import annotations

import asyncio
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from msgspec.structs import replace

from cni import spec
from cni.annotations import Annotations
from cni.choice import Choice
from cni.spec import Call, Config, Refusal
from ipam.errors import Exhausted, WrongPool
from ipam.ledger import Phase
from lab.kube.installed import CNI, NAMESPACE, Installed
from store.base import mutate
from store.model import (
    BLOCK_LIMIT,
    IPAMBlock,
    IPAMConfiguration,
    IPAMConfigurationSpec,
    IPPool,
    Meta,
    Node,
    block_name,
)
from tests.ipam_fakes import pool as a_pool
from tests.ipam_fakes import reservation
from tests.kube.world import CLOCK, World, adds, run, soon

USER = f"system:serviceaccount:{NAMESPACE}:{CNI}"
FOUR = a_pool("four", "10.5.0.0/16", use_pod_cidrs=True)
SIX = a_pool("six", "fd00:5::/48", use_pod_cidrs=True)
NODE_IPAM = (
    "--allocate-node-cidrs=true",
    "--cluster-cidr=10.5.0.0/16,fd00:5::/48",
    "--node-cidr-mask-size-ipv4=24",
    "--node-cidr-mask-size-ipv6=64",
)


def test_the_podcidrs_that_controller_manager_hands_out_become_blocks(installed: Installed, tmp_path: Path) -> None:
    """Its own node-ipam controller; first it is not there."""

    async def story(world: World) -> None:
        rigs = [await world.node(name) for name in ("node-1", "node-2")]
        for rig in rigs:
            assert "--allocate-node-cidrs=true" in rig.ipam.refusal()
            with pytest.raises(Exhausted, match="has no podCIDR inside"):
                await rig.add("early")
        with installed.cluster.more_controllers(["node-ipam-controller"], *NODE_IPAM):

            async def both() -> bool:
                return all(sorted(r.phases().values(), key=str) == [Phase.READY, Phase.READY] for r in rigs)

            await soon(both, 60)
        seen = []
        for rig in rigs:
            node = await world.people.get(Node, rig.node)
            assert sorted(rig.phases()) == sorted(node.spec.pod_cidrs)
            assert [cidr.rpartition("/")[2] for cidr in sorted(node.spec.pod_cidrs)] == ["24", "64"]
            (lease,) = await adds(rig, [f"{rig.node}-1"])
            seen += lease.addresses
            assert rig.ipam.conditions() == ()
        assert len(set(seen)) == 4

        async def mirrored() -> bool:
            return all([len(await rig.mirror()) == 2 for rig in rigs])

        await soon(mirrored)
        six = next(b for b in (await world.people.list(IPAMBlock)).items if ":" in b.spec.cidr)
        assert (six.status.used, six.status.free) == (1, BLOCK_LIMIT - 1)

    run(installed, tmp_path, story, FOUR, SIX)


def test_a_full_large_podcidr_is_mirrored(installed: Installed, tmp_path: Path) -> None:
    """As many allocations as the API server takes in one block."""

    async def story(world: World) -> None:
        node = await world.people.get(Node, "node-1")
        spec_ = replace(node.spec, pod_cidrs=("fd00:5:0:7::/64",))
        await world.people.update(replace(node, spec=spec_))
        rig = await world.node("node-1")

        async def ready() -> bool:
            return rig.phases() == {"fd00:5:0:7::/64": Phase.READY}

        await soon(ready)
        for i in range(BLOCK_LIMIT):
            await rig.add(i)
        with pytest.raises(Exhausted):
            await rig.add("more")

        async def mirrored() -> bool:
            return len(await rig.mirror()) == BLOCK_LIMIT

        await soon(mirrored)

    run(installed, tmp_path, story, SIX)


def test_single_addresses_are_blocks_that_come_and_go_with_their_pod(installed: Installed, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        one, two = await world.node("node-1"), await world.node("node-2")
        asked = ("10.6.0.7", "fd00:6::7")
        assert (await one.add(1, addresses=asked)).addresses == asked
        assert sorted(await one.own_blocks()) == ["10.6.0.7/32", "fd00:6::7/128"]
        with pytest.raises(Exhausted, match="belongs to node node-1"):
            await two.add(1, addresses=asked)
        one.delete(1)

        async def moved() -> bool:
            try:
                return (await two.add(1, addresses=asked)).addresses == asked
            except Exhausted:
                return False

        await soon(moved)
        assert (await world.people.get(IPAMBlock, block_name("10.6.0.7/32"))).spec.node == "node-2"

    run(installed, tmp_path, story, a_pool("f4", "10.6.0.0/24", 32), a_pool("f6", "fd00:6::/120", 128))


def test_reserved_addresses_are_handed_out_to_nobody_and_kept_by_who_has_them(
    installed: Installed, tmp_path: Path
) -> None:
    async def story(world: World) -> None:
        await world.people.create(reservation("printers", "10.6.1.0/29"))
        rig = await world.node("node-1")
        leases = [await rig.add(i) for i in range(8)]
        assert all(ip_address(a) >= ip_address("10.6.1.8") for lease in leases for a in lease.addresses)
        with pytest.raises(Exhausted):
            await rig.add("more")
        await world.people.create(reservation("late", "10.6.1.8"))

        async def said() -> bool:
            block = await world.block("10.6.1.0/28")
            return block is not None and (block.status.used, block.status.free) == (8, 0)

        await soon(said)
        rig.delete(0)

        async def left() -> bool:
            block = await world.block("10.6.1.0/28")
            return block is not None and (block.status.used, block.status.free) == (7, 0)

        await soon(left)

    run(installed, tmp_path, story, a_pool("one", "10.6.1.0/28", 28))


def test_a_disabled_pool_gives_nothing_more_and_its_blocks_go_back(installed: Installed, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        rig = await world.node("node-1")
        await rig.add(1)

        def disabled(pool: IPPool) -> IPPool:
            return replace(pool, spec=replace(pool.spec, disabled=True))

        await mutate(world.people, IPPool, "small", disabled)
        await world.people.create(a_pool("next", "10.6.3.0/24", 28))

        async def other() -> bool:
            return Phase.READY in [p for cidr, p in rig.phases().items() if cidr.startswith("10.6.3.")]

        await soon(other)
        assert (await rig.add(2)).addresses[0].startswith("10.6.3.")
        with pytest.raises(WrongPool, match="small is disabled"):
            await rig.add(3, pools=("small",))
        rig.delete(1)

        async def gone() -> bool:
            return all(cidr.startswith("10.6.3.") for cidr in await rig.own_blocks())

        await soon(gone)

    run(installed, tmp_path, story, a_pool("small", "10.6.2.0/24", 28))


def test_a_node_has_no_more_blocks_than_the_cluster_lets_it(installed: Installed, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        limit = IPAMConfigurationSpec(max_blocks_per_host=1)
        await world.people.create(IPAMConfiguration(metadata=Meta(name="default"), spec=limit))
        rig = await world.node("node-1")
        for i in range(16):
            await rig.add(i)
        with pytest.raises(Exhausted, match="may have 1"):
            await rig.add("more")
        assert len(await rig.own_blocks()) == 1

    run(installed, tmp_path, story, a_pool("small", "10.6.4.0/24", 28))


def test_pods_that_choose_are_read_with_the_servers_own_token(installed: Installed, tmp_path: Path) -> None:
    """The fixture's own pods are pods of a node too."""

    async def story(world: World) -> None:
        api, began = installed.cluster, time.time()
        path = f"/api/v1/namespaces/{NAMESPACE}"
        merge = "application/merge-patch+json"
        wish = {"metadata": {"annotations": {"underlay.network/ipv4pools": '["small"]'}}}
        pod = api.request("PATCH", f"{path}/pods/{CNI}-node-1", wish, content_type=merge)
        wish = {"metadata": {"annotations": {"cni.projectcalico.org/ipv6pools": '["six"]'}}}
        api.request("PATCH", path, wish, content_type=merge)
        annotations = Annotations("node-1", world.store(CNI, "node-1"), CLOCK)
        running = asyncio.create_task(annotations.run())

        def asked(name: str, uid: str) -> Call:
            return Call("ADD", Config(name="pods"), "c1", "eth0", "/n", f"{NAMESPACE}/{name}", uid)

        try:
            choice = await annotations.choice(asked(f"{CNI}-node-1", pod["metadata"]["uid"]))
            assert (choice.pools4, choice.pools6) == (("small",), ("six",))
            for name, uid in ((f"{CNI}-node-1", "another"), (f"{CNI}-node-2", "")):
                with pytest.raises(Refusal) as e:
                    await annotations.choice(asked(name, uid))
                assert e.value.code == spec.TRY_AGAIN
            assert await annotations.choice(Call("ADD", Config(name="pods"), "c1", "eth0", "/n")) == Choice()

            async def followed() -> bool:
                """By watches, that is, and not by reading all again after one that was refused."""
                requests = installed.cluster.audit_log.requests(began)
                asked = {(r.verb, r.resource, r.code) for r in requests if r.user == USER}
                return {("watch", "pods", 200), ("watch", "namespaces", 200)} <= asked

            await soon(followed)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    run(installed, tmp_path, story)
