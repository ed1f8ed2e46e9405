"""Who makes a cluster's first pools, and when nobody does: agents over one store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from agent.fib import Address, KernelState, Link
from agent.firstpools import Wish
from agent.poolmaker import PoolMaker
from store.clock import SystemClock
from store.memory import MemoryStore
from store.model import ConfigMap, IPPool, Meta
from tests.agent_fakes import block, node, pool

KUBEADM = "networking: {podSubnet: '10.244.0.0/16,fd00:10:244::/56', serviceSubnet: 10.96.0.0/12}"
RECORD = "underlay-system/underlay-first-pools"
KERNEL = KernelState(
    links={2: Link(index=2, name="eth0")}, addresses=(Address(address="10.0.1.1", subnet="10.0.1.0/24", interface=2),)
)


class Quick(SystemClock):
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def run(main: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(bounded())


async def a_store(configuration: str = KUBEADM) -> MemoryStore:
    store = MemoryStore(SystemClock())
    await store.create(node())
    meta = Meta(name="kubeadm-config", namespace="kube-system")
    await store.create(ConfigMap(metadata=meta, data={"ClusterConfiguration": configuration}))
    return store


def maker(
    store: MemoryStore, name: str = "node-1", *, wishes: tuple[Wish, ...] | None = None, server: str = "10.96.0.1"
) -> PoolMaker:
    return PoolMaker(
        store,
        Quick(),
        node=name,
        namespace="underlay-system",
        wishes=wishes,
        kernel=lambda: KERNEL,
        on_change=lambda: None,
        environment={"KUBERNETES_SERVICE_HOST": server},
    )


async def there(store: MemoryStore) -> dict[str, str]:
    return {p.name: p.spec.cidr for p in (await store.list(IPPool)).items}


BOTH = {"default-ipv4": "10.244.0.0/16", "default-ipv6": "fd00:10:244::/56"}


def test_of_many_agents_one_makes_each_pool_and_all_come_to_an_end() -> None:
    async def main() -> None:
        store = await a_store()
        agents = [maker(store, f"node-{number}") for number in range(100)]
        await asyncio.gather(*(agent.run() for agent in agents))
        assert await there(store) == BOTH
        assert {agent.reason for agent in agents} == {""}
        record = await store.get(ConfigMap, RECORD)
        assert record.data["pools"] == "default-ipv4 10.244.0.0/16\ndefault-ipv6 fd00:10:244::/56"
        assert record.data["source"] == "kubeadm's podSubnet"
        # Neither was written again.
        assert {p.metadata.generation for p in (await store.list(IPPool)).items} == {1}

    run(main())


@pytest.mark.parametrize("server", ["1.2", "api:6443", "kubernetes.example", ""])
def test_an_api_server_that_is_known_by_no_address_is_no_hindrance(server: str) -> None:
    async def main() -> None:
        store = await a_store()
        assert await maker(store, server=server).step() == (True, "")
        assert await there(store) == BOTH

    run(main())


def test_what_a_person_deleted_stays_deleted_until_the_record_goes() -> None:
    async def main() -> None:
        store = await a_store()
        await maker(store).run()
        for name in BOTH:
            await store.delete(IPPool, name)
        settled, reason = await maker(store, "node-2").step()
        assert (settled, await there(store)) == (False, {})
        assert "somebody deleted them" in reason
        assert f"delete ConfigMap {RECORD}" in reason
        await store.delete(ConfigMap, RECORD)
        assert await maker(store).step() == (True, "")
        assert await there(store) == BOTH

    run(main())


def test_one_that_died_in_the_middle_is_finished_by_another() -> None:
    async def main() -> None:
        store = await a_store()
        await store.create(pool("10.244.0.0/16", "default-ipv4", block_size=26))
        assert await maker(store).step() == (True, "")
        assert await there(store) == BOTH

    run(main())


def test_pools_of_a_person_are_left_alone_and_are_the_last_word() -> None:
    async def main() -> None:
        store = await a_store()
        await store.create(pool("10.9.0.0/16", "pods"))
        assert await maker(store).step() == (True, "")
        await store.delete(IPPool, "pods")
        settled, reason = await maker(store).step()
        assert (settled, await there(store)) == (False, {})
        assert "somebody deleted them" in reason

    run(main())


def test_blocks_of_pools_that_are_gone_keep_it_from_making_any() -> None:
    async def main() -> None:
        store = await a_store()
        await store.create(block("10.9.0.0/26"))
        settled, reason = await maker(store).step()
        assert (settled, await there(store)) == (False, {})
        assert "blocks of one that was deleted" in reason

    run(main())


def test_it_waits_for_a_source_and_for_the_store_and_says_so_meanwhile() -> None:
    async def main() -> None:
        store = await a_store("networking: {}")
        agent = maker(store)
        told: asyncio.Queue[str] = asyncio.Queue()
        agent._on_change = lambda: told.put_nowait(agent.reason)
        task = asyncio.create_task(agent.run())
        assert "kubeadm-config has no podSubnet" in await told.get()
        store.fail_with("away")
        assert "is not known: away" in await told.get()
        store.fail_with("")
        await store.create(pool("10.9.0.0/16", "pods"))
        await task
        assert agent.reason == ""

    run(main())


def test_a_configuration_that_is_no_yaml_makes_none() -> None:
    async def main() -> None:
        for text in ("a: [", "networking: text"):
            settled, reason = await maker(await a_store(text)).step()
            assert not settled
            assert "ClusterConfiguration" in reason

    run(main())


def test_the_setting_goes_before_what_the_installer_says_and_none_asks_nobody() -> None:
    async def main() -> None:
        store = await a_store()
        store.fail_with("nobody is asked")
        await maker(store, wishes=()).run()
        store.fail_with("")
        await maker(store, wishes=(Wish("10.7.0.0/16"),)).run()
        assert await there(store) == {"default-ipv4": "10.7.0.0/16"}

    run(main())


def test_what_is_on_link_at_the_node_is_not_for_pods() -> None:
    async def main() -> None:
        _, reason = await maker(await a_store(), wishes=(Wish("10.0.0.0/16"),)).step()
        assert "overlaps 10.0.1.1 of Node node-1" in reason or "10.0.1.0/24 on interface eth0" in reason

    run(main())
