"""What the CNI server says in Events, on a real API server with our tokens: found where kubectl describe looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest

from ctl import look
from ipam.errors import Exhausted
from ipam.model import News, Request, Settings
from lab.kube.cluster import Cluster
from lab.kube.installed import CNI, Installed, Wire, denial
from store.clock import SystemClock
from store.kube import KubeStore
from store.kubeaccess import from_kubeconfig
from store.recorder import Recorder, node_reference, pod_reference
from store.recorder import Settings as Pace
from tests.ipam_fakes import Rig, attachment, link_name
from tests.kube.objects import path, pool

#: Quick enough for a test.
PACE = Pace(again=0.2, other=0.1, backoff=(0.1, 0.2))


def described(cluster: Cluster, kind: str, name: str, uid: str, namespace: str = "") -> list[Wire]:
    """What kubectl describe asks for: core events of the object by name, namespace, kind and uid."""
    fields = {"name": name, "namespace": namespace, "kind": kind, "uid": uid}
    selector = ",".join(f"involvedObject.{key}={value}" for key, value in fields.items() if value)
    root = f"/api/v1/namespaces/{namespace}/events" if namespace else "/api/v1/events"
    items: list[Wire] = cluster.request("GET", f"{root}?{urlencode({'fieldSelector': selector})}")["items"]
    return items


@asynccontextmanager
async def recorder(installed: Installed, node: str = "node-1") -> AsyncIterator[tuple[Recorder, KubeStore]]:
    kubeconfig = installed.cluster.folder / f"events-{node}.kubeconfig"
    installed.cluster.kubeconfig(installed.tokens[CNI, node], path=kubeconfig)
    store = KubeStore(from_kubeconfig([kubeconfig]), SystemClock())
    made = Recorder(store, SystemClock(), controller="underlay.network/cni", instance=node, settings=PACE)
    running = asyncio.create_task(made.run())
    try:
        yield made, store
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await store.close()


async def soon(probe: Callable[[], object]) -> None:
    """``eventually``, where what is waited for runs on this event loop."""
    async with asyncio.timeout(60):
        while not probe():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.05)


def play(story: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(story, 60)

    asyncio.run(limited())


def test_what_is_said_of_node_and_pod_is_what_kubectl_describe_shows(installed: Installed) -> None:
    cluster = installed.cluster

    async def story() -> None:
        async with recorder(installed) as (events, _):
            events.say(node_reference("node-1"), "PoolExhausted", "no block is left", action="Claim")
            events.say(pod_reference("default/web-0", "u1"), "NoAddress", "no address", action="HandOut")
            await soon(lambda: events.written == 2)
            (on_node,) = described(cluster, "Node", "node-1", "node-1")
            (on_pod,) = described(cluster, "Pod", "web-0", "u1", "default")
            assert (on_node["reason"], on_node["message"]) == ("PoolExhausted", "no block is left")
            assert (on_pod["type"], on_pod["reason"], on_pod["message"]) == ("Warning", "NoAddress", "no address")
            assert on_node["reportingComponent"] == "underlay.network/cni"

    play(story())


def test_the_same_again_is_one_event_that_counts_also_after_a_restart(installed: Installed) -> None:
    async def story() -> None:
        def say(events: Recorder) -> None:
            events.say(node_reference("node-1"), "PoolExhausted", "no block is left", action="Claim")

        async with recorder(installed) as (events, _):
            say(events)
            await soon(lambda: events.written == 1)
            say(events)
            say(events)
            await soon(lambda: events.written == 2)
        async with recorder(installed) as (events, _):
            say(events)
            await soon(lambda: events.written == 1)
        (event,) = described(installed.cluster, "Node", "node-1", "node-1")
        assert event["series"]["count"] == 4

    play(story())


def test_in_a_namespace_that_is_gone_an_event_is_dropped_and_the_others_are_told(installed: Installed) -> None:
    async def story() -> None:
        async with recorder(installed) as (events, _):
            events.say(pod_reference("gone/web-0", "u1"), "NoAddress", "no address", action="HandOut")
            events.say(node_reference("node-1"), "PoolExhausted", "no block is left", action="Claim")
            await soon(lambda: described(installed.cluster, "Node", "node-1", "node-1"))
            await soon(lambda: events.dropped == 1)

    play(story())


def test_a_node_that_never_got_a_block_says_so_on_its_node_and_on_the_pod(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the way from the ADD: another node has the only block there is. ``ipam check`` finds it, until it is over."""
    monkeypatch.setattr(look, "SETTLE", 0.1)
    cluster = installed.cluster
    cluster.request("POST", path("ippools"), pool("tiny", "10.9.0.0/28", 28))
    spec = {"cidr": "10.9.0.0/28", "pool": "tiny", "node": "node-2", "within": "10.9.0.0/20"}
    block = {
        "apiVersion": "underlay.network/v1",
        "kind": "IPAMBlock",
        "metadata": {"name": "10-9-0-0-28"},
        "spec": spec,
    }
    cluster.request("POST", path("ipamblocks"), block)

    async def said_of_node_1() -> list[str]:
        people = KubeStore(from_kubeconfig([cluster.kubeconfig()]), SystemClock())
        try:
            report = await look.check(people, SystemClock(), nodes=("node-1",))
        finally:
            await people.close()
        assert report.unseen == ()
        return [finding.what for finding in report.findings if finding.kind == "ConditionHolds"]

    async def story() -> None:
        async with recorder(installed) as (events, store):
            rig = Rig(tmp_path, store=store, clock=SystemClock(), settings=Settings(take_limit=10))  # type: ignore[arg-type]

            def tell(news: News) -> None:
                about = pod_reference(news.pod, news.pod_uid) if news.pod else node_reference("node-1")
                events.say(about, news.reason, news.note, action=news.action, normal=news.normal)

            rig.tell = tell
            await rig.up(run=False)
            try:
                with pytest.raises(Exhausted):
                    await rig.ipam.take(Request(attachment(1), pod="default/web-0", pod_uid="u1"))
                assert link_name(attachment(1)) not in rig.kernel.live().values()
                await soon(lambda: described(cluster, "Pod", "web-0", "u1", "default"))
                await soon(lambda: described(cluster, "Node", "node-1", "node-1"))
                (found,) = await said_of_node_1()
                assert found.startswith("PoolExhausted (NoFreeBlock): ")
                assert "tiny" in found
                cluster.request("DELETE", path("ippools", "tiny"))
                await rig.ipam._watches.read()
                await rig.ipam._keeper.step()
                await soon(lambda: len(described(cluster, "Node", "node-1", "node-1")) == 2)
                assert await said_of_node_1() == []
            finally:
                await rig.down()
        assert denial(cluster, "GET", path("ipamblocks", "10-9-0-0-28")) is None

    play(story())
