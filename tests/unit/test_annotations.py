"""Pods that may choose: where their annotations come from, and what an ADD then gets or hears."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from cni import spec
from cni.annotations import LIMIT, MIRROR, Annotations
from cni.choice import OURS, Choice
from cni.daemon import StartError, parse
from cni.netlink import Netlink
from cni.spec import Call, Config, Refusal, Runtime
from cni.verbs import Verbs
from ipam.model import Attachment
from store.model import Meta, Namespace, Pod, PodSpec
from tests.ipam_fakes import V4, V6, Rig, play, pool, settle

GOLD = pool("gold", "10.9.0.0/16", assignment_mode="Manual")
GOLD6 = pool("gold6", "fd09::/64", assignment_mode="Manual")
OFF = pool("off", "10.8.0.0/16", disabled=True)


def pod(name: str = "web", node: str = "node-1", **annotations: str) -> Pod:
    said = {f"{OURS}{key}": text for key, text in annotations.items()}
    return Pod(metadata=Meta(name=name, namespace="default", annotations=said), spec=PodSpec(node_name=node))


def namespace(**annotations: str) -> Namespace:
    return Namespace(metadata=Meta(name="default", annotations={f"{OURS}{k}": v for k, v in annotations.items()}))


def call(container: str = "c1", *, uid: str = "", name: str = "default/web", runtime: Any = None) -> Call:
    config = Config(version="1.0.0", name="pods", runtime=Runtime(runtime))
    return Call("ADD", config, container, "eth0", "/proc/self/ns/net", name, uid)


class Front:
    """A node's server with pods that may choose, as far as ADD's wiring."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.annotations = Annotations(rig.node, rig.store, rig.clock)
        self.verbs = Verbs(
            node=rig.node,
            ipam=rig.ipam,
            store=rig.store,
            netlink=cast(Netlink, None),
            reaper=cast(Any, None),
            clock=rig.clock,
            choose=self.annotations.choice,
        )

    async def take(self, asked: Call) -> tuple[str, ...]:
        """The addresses that its ADD would wire."""
        return (
            await self._done(self.verbs._take(asked, Attachment("pods", asked.container, "eth0"), known=False))
        ).addresses

    async def choice(self, asked: Call) -> Choice:
        return await self._done(self.annotations.choice(asked))

    async def refused(self, asked: Call) -> Refusal:
        """How ADD is refused, by which nothing has changed."""
        before = (self.rig.ipam.leases(), self.rig.phases())
        with pytest.raises(Refusal) as e:
            await self._done(self.verbs.carry_out(asked, 0))
        assert (self.rig.ipam.leases(), self.rig.phases()) == before
        return e.value

    async def _done(self, work: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(work)
        for _ in range(80):
            if task.done():
                break
            await self.rig.clock.advance(0.1)
        assert task.done(), "it has no limit"
        return await task


def run(directory: Path, test: Callable[[Front], Awaitable[None]], *objects: Any) -> None:
    async def main() -> None:
        rig = Rig(directory)
        await rig.create(V4, V6, GOLD, GOLD6, OFF)
        await rig.create(*objects)
        await rig.up()
        front = Front(rig)
        watching = asyncio.create_task(front.annotations.run())
        await settle()
        try:
            await test(front)
            assert not watching.done()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await rig.down()

    play(main())


def test_a_pod_has_what_its_annotations_choose_and_the_rest_as_ever(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        four, six = await front.take(call())
        assert four.startswith("10.9.")
        assert six.startswith("fd00:10:244:")

    run(tmp_path, test, pod(ipv4pools='["gold"]'), namespace())


def test_a_pod_has_the_address_that_it_asks_for_and_no_other(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        assert await front.take(call()) == ("10.9.3.7",)

    run(tmp_path, test, pod(ipAddrs='["10.9.3.7"]'))


def test_a_namespace_chooses_for_its_pods(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        four, six = await front.take(call())
        assert four.startswith("10.9.")
        assert six.startswith("fd09:")

    run(tmp_path, test, pod(ipv4pools='["10.9.0.0/16"]'), namespace(ipv4pools='["off"]', ipv6pools='["gold6"]'))


def test_what_the_runtime_says_is_taken_and_the_watch_of_pods_not_asked(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        assert (await front.take(call(runtime={OURS + "ipAddrs": '["10.9.0.1"]'}))) == ("10.9.0.1",)
        # None at all is said as well: then the namespace's count.
        assert (await front.choice(call("c2", runtime={}))).pools == ("gold6",)

    run(tmp_path, test, pod(ipAddrs='["10.9.0.9"]'), namespace(ipv6pools='["gold6"]'))


def test_a_pod_that_chooses_for_both_families_waits_for_no_namespace(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        assert (await front.choice(call())).pools == ("gold", "gold6")

    run(tmp_path, test, pod(ipv4pools='["gold"]', ipv6pools='["gold6"]'))


def test_who_is_no_pod_of_kubernetes_is_asked_nothing(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        assert await front.choice(call(name="")) == Choice()

    run(tmp_path, test)


def test_a_pod_that_is_seen_late_is_waited_for(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        task = asyncio.ensure_future(front.annotations.choice(call()))
        await front.rig.clock.advance(LIMIT - 0.1)
        assert not task.done()
        await front.rig.store.create(pod(ipv4pools='["gold"]'))
        await front.rig.clock.advance(0.05)
        assert (await task).pools4 == ("gold",)

    run(tmp_path, test, namespace())


@pytest.mark.parametrize(
    "objects", [(), (pod(node="node-2"), namespace()), (pod(),)], ids=["none", "elsewhere", "no ns"]
)
def test_unknown_after_2_s_is_try_again_never_the_wrong_pool(tmp_path: Path, objects: tuple[Any, ...]) -> None:
    async def test(front: Front) -> None:
        began = front.rig.clock.monotonic()
        refusal = await front.refused(call())
        assert refusal.code == spec.TRY_AGAIN
        assert "default" in refusal.details
        assert "2 s" in refusal.details
        assert LIMIT <= front.rig.clock.monotonic() - began < LIMIT + 0.5

    run(tmp_path, test, *objects)


def test_a_statefulsets_new_pod_does_not_get_the_old_ones_annotations(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        old = await front.rig.store.get(Pod, "default/web")
        assert (await front.choice(call(uid=old.metadata.uid))).pools4 == ("gold",)
        task = asyncio.ensure_future(front.annotations.choice(call(uid="the-new-ones")))
        await front.rig.clock.advance(0.5)
        assert not task.done()
        await front.rig.store.delete(Pod, "default/web")
        new = await front.rig.store.create(pod(ipv4pools='["v4"]'))
        await front.rig.clock.advance(3)
        with pytest.raises(Refusal):
            await task
        assert (await front.choice(call(uid=new.metadata.uid))).pools4 == ("v4",)

    run(tmp_path, test, pod(ipv4pools='["gold"]'), namespace())


def test_without_a_uid_a_pod_that_is_going_is_not_believed(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        await front.rig.store.delete(Pod, "default/web")
        await front.rig.clock.advance(0.1)
        assert (await front.refused(call())).code == spec.TRY_AGAIN

    held = pod(ipv4pools='["gold"]')
    run(tmp_path, test, replace(held, metadata=replace(held.metadata, finalizers=("a/b",))), namespace())


def test_a_static_pod_is_known_by_its_mirror(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        assert (await front.choice(call(uid="hash"))).pools4 == ("gold",)

    mirror = pod(ipv4pools='["gold"]')
    annotations = {**mirror.metadata.annotations, MIRROR: "hash"}
    run(tmp_path, test, replace(mirror, metadata=replace(mirror.metadata, annotations=annotations)), namespace())


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({"ipv4pools": "gold"}, "write a JSON list"),
        ({"ipv4pools": '["nope"]'}, "there is no IPPool 'nope'"),
        ({"ipv4pools": '["off"]'}, "IPPool off is disabled"),
        ({"ipv4pools": '["gold6"]'}, "IPPool gold6 is no IPv4 pool"),
        ({"ipv6pools": '["gold"]'}, "IPPool gold is no IPv6 pool"),
        ({"ipAddrs": '["192.0.2.1"]'}, "192.0.2.1 is in no IPPool"),
        ({"ipAddrs": '["10.8.0.1"]'}, "which is disabled"),
        ({"ipAddrs": '["10.9.0.1"]', "ipv4pools": '["v4"]'}, "not in the chosen pools"),
    ],
)
def test_a_bad_annotation_is_refused_by_pod_and_name_and_changes_nothing(
    tmp_path: Path, annotations: dict[str, str], words: str
) -> None:
    async def test(front: Front) -> None:
        refusal = await front.refused(call())
        assert refusal.code == spec.INVALID_CONFIG
        assert words in refusal.details
        for key in annotations:
            assert f"annotation {OURS}{key} of pod default/web" in refusal.details

    run(tmp_path, test, pod(**annotations), namespace())


def test_a_namespaces_bad_pool_is_refused_by_pod_and_namespace(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        refusal = await front.refused(call())
        assert refusal.code == spec.INVALID_CONFIG
        assert "pod default/web: annotation underlay.network/ipv4pools of namespace default: there is no" in str(
            refusal
        )

    run(tmp_path, test, pod(), namespace(ipv4pools='["nope"]'))


def test_an_address_in_use_is_try_again_and_says_who_asks_for_it(tmp_path: Path) -> None:
    async def test(front: Front) -> None:
        await front.take(call())
        refusal = await front.refused(call("c2"))
        assert refusal.code == spec.TRY_AGAIN
        assert "pod default/web: annotation underlay.network/ipAddrs of pod default/web: address 10.9.0.1" in str(
            refusal
        )

    run(tmp_path, test, pod(ipAddrs='["10.9.0.1"]'))


# -- the setting ------------------------------------------------------------------------------------------------------


def test_pods_may_choose_only_if_the_server_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "boot").write_text("b1\n")
    flags = ["--node", "n", "--store", "memory:", "--boot-id", str(tmp_path / "boot")]
    assert not parse(flags, {}).pods_may_choose
    assert not parse(flags, {"UNDERLAY_PODS_MAY_CHOOSE": ""}).pods_may_choose
    assert parse(flags, {"UNDERLAY_PODS_MAY_CHOOSE": "yes"}).pods_may_choose
    assert not parse([*flags, "--pods-may-choose", "no"], {"UNDERLAY_PODS_MAY_CHOOSE": "yes"}).pods_may_choose
    with pytest.raises(StartError, match="--pods-may-choose maybe: write yes or no"):
        parse([*flags, "--pods-may-choose=maybe"], {})


def test_nothing_of_it_is_loaded_where_pods_may_not_choose() -> None:
    code = "import cni.daemon, sys; print([m for m in sys.modules if m in ('cni.choice', 'cni.annotations')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_the_runtime_gives_for_the_capability_is_read_and_a_wrong_value_named() -> None:
    environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_NETNS": "/n"}
    text = b'{"cniVersion":"1.0.0","name":"n","type":"underlay","runtimeConfig":%s}'
    given = b'{"io.kubernetes.cri.pod-annotations":{"a":"b"},"portMappings":[]}'
    assert spec.parse(environment, text % given).config.runtime.annotations == {"a": "b"}
    assert spec.parse(environment, text % b"{}").config.runtime.annotations is None
    with pytest.raises(Refusal, match=r"runtimeConfig.*pod-annotations") as e:
        spec.parse(environment, text % b'{"io.kubernetes.cri.pod-annotations":[]}')
    assert e.value.code == spec.INVALID_CONFIG
    assert spec.parse({**environment, "CNI_COMMAND": "DEL"}, text % b"[]").command == "DEL"
