"""What a real CNI server tells after real calls: metrics, and Events on its Node and on pods."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import pytest

from ipam.model import CONDITIONS
from lab.net import Net
from store.clock import SystemClock
from store.model import IPReservation, IPReservationSpec, KubeEvent, Meta, Namespace, ObjectReference
from store.open import open_store
from tests.conftest import eventually
from tests.netns.plugin import NODE, POOL4, POOL6, Answer, Plugin
from tests.promtext import check, get


@pytest.fixture
def node(net: Net, tmp_path: Path, shim_c: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    monkeypatch.setenv("UNDERLAY_METRICS", str(tmp_path / "m.sock"))
    plugin = Plugin(net, tmp_path, shim_c)
    net.add("pod-1")
    plugin.start()
    return plugin


def ok(answer: Answer) -> Answer:
    assert answer.code == 0, answer.text
    return answer


def scrape(node: Plugin) -> dict[str, float]:
    """Each sample by its name and labels."""
    code, page = get(node.folder / "m.sock", "/metrics")
    assert code == 200
    check(page)
    return {name: float(value) for name, value in re.findall(r"^([^#\s][^ ]*) (\S+)$", page.decode(), re.MULTILINE)}


def test_a_server_tells_what_it_did_and_how_it_is(node: Plugin) -> None:
    added = ok(node.call("ADD", "c1", "pod-1"))
    assert node.call("ADD", "c2", "pod-1", conf=node.conf(mtu="big")).json["code"] == 7
    eventually(lambda: scrape(node)["underlay_ipam_mirror_lag_seconds"] == 0)
    found = scrape(node)
    assert found['underlay_cni_calls_total{verb="ADD",code="0"}'] == 1
    assert found['underlay_cni_calls_total{verb="ADD",code="7"}'] == 1
    assert found['underlay_cni_call_seconds_count{verb="ADD"}'] == 2
    assert 0 < found['underlay_cni_call_seconds_sum{verb="ADD"}'] < 20
    assert len(added.addresses) == 2
    for pool, family, size in (("pool-0", "ipv4", 64), ("pool-1", "ipv6", 64)):
        labels = f'pool="{pool}",family="{family}"'
        assert found[f'underlay_ipam_addresses{{{labels},state="used"}}'] == 1
        assert found[f'underlay_ipam_addresses{{{labels},state="free"}}'] == size - 1
    assert {c: found[f'underlay_ipam_condition{{type="{c}"}}'] for c in CONDITIONS} == dict.fromkeys(CONDITIONS, 0)
    assert sum(found[f'underlay_ipam_blocks{{phase="{p}"}}'] for p in ("new", "ready")) == 2
    assert found["underlay_cni_ready"] == 1
    assert found["underlay_ipam_leases"] == 1
    assert found["underlay_ipam_journal_bytes"] > 0
    assert found["underlay_ipam_journal_write_seconds_count"] > 0
    assert found['underlay_store_requests_total{verb="create"}'] == 2
    assert found["underlay_events_dropped_total"] == 0
    assert 10 << 20 < found["process_resident_memory_bytes"] < 100 << 20
    assert get(node.folder / "m.sock", "/healthz") == (200, b"ok\n")
    assert get(node.folder / "m.sock", "/readyz") == (200, b"ok\n")
    ok(node.call("DEL", "c1", "pod-1"))
    after = scrape(node)
    assert after['underlay_cni_calls_total{verb="DEL",code="0"}'] == 1
    assert after["underlay_ipam_leases"] == 0


def events(node: Plugin) -> dict[str, KubeEvent]:
    """By reason."""

    async def read() -> dict[str, KubeEvent]:
        store = open_store(node.people, clock=SystemClock())
        try:
            return {event.reason: event for event in (await store.list(KubeEvent)).items}
        finally:
            await store.close()

    return asyncio.run(read())


def test_a_pod_that_gets_no_address_hears_why_and_so_does_its_node(node: Plugin) -> None:
    """What the runtime says of the pod in CNI_ARGS is what kubectl describe finds the Event by."""
    node.create(IPReservation(metadata=Meta(name="all"), spec=IPReservationSpec(reserved_cidrs=(POOL4, POOL6))))
    pod = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-7"
    eventually(lambda: scrape(node)['underlay_ipam_addresses{pool="pool-0",family="ipv4",state="free"}'] == 0)
    assert node.call("ADD", "c1", "pod-1", CNI_ARGS=pod).json["code"] == 11
    said = eventually(lambda: {"NoAddress", "PoolExhausted"} <= set(events(node)) and events(node))
    about = said["NoAddress"].regarding
    assert about == ObjectReference(api_version="v1", kind="Pod", namespace="shop", name="web-0", uid="u-7")
    assert "pool-0" in said["NoAddress"].note
    about = said["PoolExhausted"].regarding
    assert about == ObjectReference(api_version="v1", kind="Node", name=NODE, uid=NODE)
    assert (said["PoolExhausted"].type, said["PoolExhausted"].reporting_instance) == ("Warning", NODE)
    assert scrape(node)['underlay_ipam_condition{type="PoolExhausted"}'] == 1
    assert scrape(node)["underlay_events_written_total"] >= 2


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ('["none"]', "annotation underlay.network/ipv4pools of pod shop/web-0: "),
        ("none", "write a JSON list of texts"),
        ('["pool-1"]', "annotation underlay.network/ipv4pools of pod shop/web-0: "),
    ],
)
def test_a_pod_that_chooses_what_it_cannot_have_hears_which_annotation_says_so(
    net: Net, tmp_path: Path, shim_c: Path, monkeypatch: pytest.MonkeyPatch, wish: str, words: str
) -> None:
    monkeypatch.setenv("UNDERLAY_PODS_MAY_CHOOSE", "yes")
    plugin = Plugin(net, tmp_path, shim_c)
    net.add("pod-1")
    plugin.create(Namespace(metadata=Meta(name="shop")))
    plugin.start()
    annotations = {"io.kubernetes.cri.pod-annotations": {"underlay.network/ipv4pools": wish}}
    pod = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-7"
    refused = plugin.call("ADD", "c1", "pod-1", conf=plugin.conf(runtimeConfig=annotations), CNI_ARGS=pod)
    assert refused.json["code"] == 7
    (said,) = eventually(lambda: events(plugin).values())
    assert (said.reason, said.type) == ("NoAddress", "Warning")
    assert words in said.note


def test_the_socket_goes_with_the_server_and_a_killed_ones_is_taken_over(node: Plugin) -> None:
    node.server.kill()
    node.server.wait()
    assert (node.folder / "m.sock").exists()
    node.start()
    eventually(lambda: scrape(node)["underlay_cni_ready"] == 1)
    node.server.send_signal(signal.SIGTERM)
    assert node.server.wait(60) == 0
    assert not (node.folder / "m.sock").exists()
