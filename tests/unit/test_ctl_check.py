"""ipam check: a view without fault gives no finding, and each fault exactly its own; then looking, and the command."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctl import look
from ctl.check import findings
from ctl.check_events import FRESH
from ctl.failures import Usage
from ctl.finding import KINDS, PATIENCE, SETTLE, Finding, Local, View, attachment_of
from ctl.look import Here, check
from ctl.report import Report, read, write
from ipam.errors import KernelUnavailable
from ipam.journal import Bound, History, Journal, Opened, Taken
from ipam.model import CONTROLLER, Attachment
from store.base import Listing
from store.clock import SystemClock
from store.errors import StoreError, Unavailable
from store.memory import MemoryStore
from store.model import (
    ANNOTATION_RELEASE,
    Allocation,
    Condition,
    EventSeries,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    IPReservation,
    IPReservationSpec,
    KubeEvent,
    Meta,
    Node,
    ObjectReference,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Resource,
    Writer,
    block_name,
)
from tests.ctl_fakes import NOW, Ctl
from tests.ipam_fakes import FakeClock, settle

EARLIER = "2026-11-24T11:00:00Z"
BOOT = "b" * 36
POOLS = {4: ("pods-v4", "10.244.0.0/16", 26), 6: ("pods-v6", "fd00:10:244::/48", 122)}
#: In every block that begins there; nobody has these.
RESERVED = ("10.244.0.0/29", "10.244.2.9", "fd00:10:244::/125")


# -- a view without fault ----------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> View:
    """Some nodes with a block or several, pods with an address of each family, pods that are no fault (``harmless``),
    and one node that is asked itself."""
    names = [f"node-{i}" for i in range(1, draw(st.integers(2, 4)) + 1)]
    blocks: list[IPAMBlock] = []
    numbers = iter(range(100))
    pods: list[Pod] = []
    for name in names:
        cidrs = {family: [_cidr(family, next(numbers)) for _ in range(draw(st.integers(1, 2)))] for family in (4, 6)}
        held: dict[str, list[Allocation]] = {c: [] for family in (4, 6) for c in cidrs[family]}
        for pod in range(draw(st.integers(1, 5))):
            who = Attachment("underlay", f"{name}-c{pod}", "eth0")
            addresses = []
            for family in (4, 6):
                cidr = draw(st.sampled_from(cidrs[family]))
                addresses.append(str(ip_network(cidr)[16 + pod]))
                held[cidr].append(allocation(addresses[-1], who, f"default/{name}-p{pod}"))
            told = draw(st.sampled_from((addresses, addresses[:1], [])))
            pods.append(a_pod(f"{name}-p{pod}", name, *told, phase="Running" if told else "Pending"))
        blocks += [made(cidr, name, held[cidr]) for cidr in held]
    return View(
        now=NOW,
        blocks=tuple(blocks),
        pools=tuple(
            IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr, block_size=draw(st.sampled_from((0, size)))))
            for name, cidr, size in POOLS.values()
        ),
        reservations=(IPReservation(metadata=Meta(name="routers"), spec=IPReservationSpec(reserved_cidrs=RESERVED)),),
        nodes=frozenset(names),
        local=local_of("node-1", blocks),
        pods=(*pods, *harmless(pods[0])),
        events=draw(st.permutations(over())),
    )


def said(node: str, reason: str = "PoolExhausted", **parts: Any) -> KubeEvent:
    """A server's word in an Event; ``name`` tells several apart."""
    meta = Meta(name=parts.pop("name", f"{node}.1"), namespace="default")
    about = ObjectReference(api_version="v1", kind="Node", name=node, uid=node)
    words: dict[str, Any] = {
        "event_time": at(-5),
        "reporting_controller": CONTROLLER,
        "reporting_instance": node,
        "action": "NoFreeBlock",
        "reason": reason,
        "regarding": about,
        "note": "no block is left",
        "type": "Warning",
    }
    return KubeEvent(metadata=meta, **(words | parts))


def at(seconds: float) -> str:
    """A moment, from NOW on, as Events have it."""
    moment = datetime.fromisoformat(NOW) + timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def over() -> list[KubeEvent]:
    """Events that are no fault, of nodes with a block and of one that is gone."""
    return [
        said("node-1"),  # its blocks say all that holds
        said("node-9"),  # there is no such node
    ]


def a_pod(name: str, node: str, *addresses: str, phase: str = "Running", host: bool = False, **meta: Any) -> Pod:
    """``addresses`` as kubelet tells them."""
    return Pod(
        metadata=Meta(name=name, namespace="default", **meta),
        spec=PodSpec(node_name=node, host_network=host),
        status=PodStatus(
            phase=phase, pod_ip=addresses[0] if addresses else "", pod_ips=tuple(PodIP(ip=a) for a in addresses)
        ),
    )


def harmless(other: Pod) -> tuple[Pod, ...]:
    """Pods without allocation that need none, though some have another's address, or one of a pool."""
    taken = other.status.pod_ip or "10.244.0.20"
    return (
        a_pod("agent", "node-1", "10.0.0.1", host=True),
        a_pod("proxy", "node-1", "10.0.0.1", host=True),
        a_pod("job", "node-2", taken, phase="Succeeded"),
        a_pod("evicted", "node-2", taken, phase="Failed"),
        a_pod("leaving", "node-2", taken, deletion_timestamp=EARLIER),
        a_pod("waiting", "", phase="Pending"),
        a_pod("of-another-plugin", "node-1", "172.16.0.9"),
    )


def _cidr(family: int, number: int) -> str:
    _, cidr, size = POOLS[family]
    return f"{ip_network(cidr)[64 * number]}/{size}"


def allocation(address: str, who: Attachment, pod: str = "") -> Allocation:
    return Allocation(
        address=address, network=who.network, container=who.container, interface=who.interface, pod=pod, since=EARLIER
    )


def made(cidr: str, node: str, held: list[Allocation], **status: Any) -> IPAMBlock:
    return IPAMBlock(
        metadata=Meta(name=block_name(cidr), uid=f"uid-{cidr}", creation_timestamp=EARLIER),
        spec=IPAMBlockSpec(cidr=cidr, pool=POOLS[ip_network(cidr).version][0], node=node),
        status=IPAMBlockStatus(
            allocations=tuple(held),
            used=len(held),
            free=64 - len(held) - _reserved(cidr),
            writer=Writer(boot_id=BOOT, start=3),
            **status,
        ),
    )


@lru_cache
def _reserved(cidr: str) -> int:
    addresses = set(ip_network(cidr))
    return sum(1 for r in RESERVED for a in ip_network(r) if a in addresses)


def local_of(node: str, blocks: list[IPAMBlock]) -> Local:
    own = [a for b in blocks if b.spec.node == node for a in b.status.allocations]
    leases = {a.address: attachment_of(a) for a in own}
    return Local(node, Writer(boot_id=BOOT, start=3), leases, frozenset(leases), frozenset(leases.values()))


@given(views())
def test_a_view_without_fault_is_clean(view: View) -> None:
    assert findings(view) == ()


@given(views())
def test_what_could_not_be_read_makes_no_finding(view: View) -> None:
    for part in ("pools", "reservations", "nodes", "local", "pods", "events"):
        view = changed(view, events=()) if part == "nodes" else view  # who is gone is not known then
        assert findings(changed(view, **{part: None})) == ()


# -- one fault, one finding --------------------------------------------------------------------------------------------

Fault = Callable[[View, st.DataObject], View]
FAULTS: dict[str, Fault] = {}


def fault(kind: str) -> Callable[[Fault], Fault]:
    """A way to break a view that is to give one finding of this kind; several ways may give the same."""

    def register(function: Fault) -> Fault:
        FAULTS[f"{kind}: {function.__name__.strip('_').replace('_', ' ')}"] = function
        return function

    return register


def changed(obj: Any, **parts: Any) -> Any:
    return msgspec.structs.replace(obj, **parts)


def with_block(view: View, old: IPAMBlock, *new: IPAMBlock) -> View:
    return changed(view, blocks=(*(b for b in view.blocks if b is not old), *new))


def restatus(view: View, block: IPAMBlock, **parts: Any) -> View:
    return with_block(view, block, changed(block, status=changed(block.status, **parts)))


def remeta(view: View, block: IPAMBlock, **parts: Any) -> View:
    return with_block(view, block, changed(block, metadata=changed(block.metadata, **parts)))


def a_block(view: View, data: st.DataObject, *, used: bool = False, node: str = "") -> IPAMBlock:
    """A block of a node that is not asked itself, or of this very one; with ``used`` one that holds something."""
    fitting = [b for b in view.blocks if b.spec.node == node or (not node and b.spec.node != "node-1")]
    return data.draw(st.sampled_from([b for b in fitting if b.status.used or not used]))


def holding(view: View, block: IPAMBlock, *held: Allocation) -> View:
    """The block with these allocations, counted right."""
    now = made(block.spec.cidr, block.spec.node, list(held))
    return restatus(view, block, allocations=held, used=len(held), free=now.status.free)


def relocal(view: View, **parts: Any) -> View:
    return changed(view, local=changed(view.local, **parts))


STRANGER = Attachment("underlay", "stranger", "eth0")


@fault("ObjectRefused")
def _a_block_with_another_name(view: View, data: st.DataObject) -> View:
    return remeta(view, a_block(view, data), name="block-of-mine")


@fault("ObjectRefused")
def _a_block_whose_cidr_is_none(view: View, data: st.DataObject) -> View:
    block = a_block(view, data)
    return with_block(view, block, changed(block, spec=changed(block.spec, cidr="10.244.0.0/99")))


@fault("ObjectRefused")
def _a_pool_that_asks_for_an_overlay(view: View, data: st.DataObject) -> View:
    assert view.pools
    pool = view.pools[0]
    return changed(view, pools=(changed(pool, spec=changed(pool.spec, ipip_mode="Always")), *view.pools[1:]))


@fault("PoolsOverlap")
def _a_pool_inside_another(view: View, data: st.DataObject) -> View:
    cidr = data.draw(st.sampled_from(("10.244.128.0/17", "10.244.0.0/16", "10.0.0.0/8", "fd00::/16")))
    more = IPPool(metadata=Meta(name="more"), spec=IPPoolSpec(cidr=cidr))
    return changed(view, pools=(*(view.pools or ()), more))


@fault("PoolMissing")
def _a_block_of_a_pool_that_is_not_there(view: View, data: st.DataObject) -> View:
    block = a_block(view, data)
    return with_block(view, block, changed(block, spec=changed(block.spec, pool="gone")))


@fault("BlockOutsidePool")
def _a_block_of_another_range(view: View, data: st.DataObject) -> View:
    return changed(view, blocks=(*view.blocks, made("10.99.0.0/26", "node-2", [])))


@fault("BlockSizeDiffers")
def _a_block_of_another_size(view: View, data: st.DataObject) -> View:
    block = made("10.244.200.0/27", "node-2", [])
    return changed(view, blocks=(*view.blocks, changed(block, status=changed(block.status, free=32))))


@fault("BlocksOverlap")
def _a_block_of_two_nodes(view: View, data: st.DataObject) -> View:
    block = a_block(view, data)
    return changed(view, blocks=(*view.blocks, made(block.spec.cidr, "node-1", [])))


@fault("BlockOfNoNode")
def _a_node_that_is_gone(view: View, data: st.DataObject) -> View:
    return changed(
        view, blocks=(*view.blocks, made("10.244.200.0/26", "node-9", [allocation("10.244.200.1", STRANGER)]))
    )


@fault("BlockOfNoNode")
def _a_node_that_is_gone_with_all_that_its_block_said(view: View, data: st.DataObject) -> View:
    condition = Condition(type="PoolExhausted", status="True")
    block = made("10.244.200.0/26", "node-9", [], releasing=True, conditions=(condition,))
    meta = changed(block.metadata, deletion_timestamp=EARLIER, annotations={ANNOTATION_RELEASE: "10.244.200.1"})
    return changed(view, blocks=(*view.blocks, changed(block, metadata=meta)))


@fault("BlockDeleting")
def _a_block_marked_an_hour_ago(view: View, data: st.DataObject) -> View:
    return remeta(view, a_block(view, data), deletion_timestamp=EARLIER)


@fault("BlockReleasing")
def _a_block_that_is_given_back(view: View, data: st.DataObject) -> View:
    return restatus(view, a_block(view, data), releasing=True)


@fault("ReleasePending")
def _a_release_that_nobody_carries_out(view: View, data: st.DataObject) -> View:
    return remeta(view, a_block(view, data), annotations={ANNOTATION_RELEASE: "10.244.0.9"})


@fault("NotMirrored")
def _a_block_whose_owner_is_silent(view: View, data: st.DataObject) -> View:
    block = changed(made("10.244.200.0/26", "node-2", []), status=IPAMBlockStatus())
    return changed(view, blocks=(*view.blocks, block))


@fault("WritersDiffer")
def _a_block_written_by_another_start(view: View, data: st.DataObject) -> View:
    writer = data.draw(st.sampled_from((Writer(boot_id=BOOT, start=4), Writer(boot_id="c" * 36, start=3))))
    return restatus(view, a_block(view, data), writer=writer)


@fault("ConditionHolds")
def _a_condition_in_all_blocks_of_a_node(view: View, data: st.DataObject) -> View:
    c = Condition(type="SweepStopped", status="True", reason="TooManyGone", message="look", last_transition_time=NOW)
    other = Condition(type="Fine", status="False")
    node = a_block(view, data).spec.node
    for block in [b for b in view.blocks if b.spec.node == node]:
        view = restatus(view, block, conditions=(c, other))
    return view


def blockless(view: View, *events: KubeEvent) -> View:
    """With a node-7 that has no block, and what was said of it."""
    return changed(view, nodes=(view.nodes or frozenset()) | {"node-7"}, events=(*(view.events or ()), *events))


@fault("ConditionHolds")
def _a_node_without_a_block_says_so(view: View, data: st.DataObject) -> View:
    return blockless(view, said("node-7", event_time=at(data.draw(st.sampled_from((-FRESH, -FRESH + 1, -1, 30))))))


@fault("ConditionHolds")
def _a_node_without_a_block_says_so_again_and_again(view: View, data: st.DataObject) -> View:
    series = EventSeries(count=90, last_observed_time=at(-600))
    return blockless(view, said("node-7", event_time=at(-54_000), series=series))


@fault("ConditionHolds")
def _it_was_over_and_holds_again(view: View, data: st.DataObject) -> View:
    before = said("node-7", type="Normal", note="over: no block is left", name="n", event_time=at(-90))
    return blockless(view, *data.draw(st.permutations((before, said("node-7", event_time=at(-60))))))


@fault("ConditionHolds")
def _only_the_last_words_of_a_condition_count(view: View, data: st.DataObject) -> View:
    before = said("node-7", note="no block is left, and none was", name="n", event_time=at(-90))
    return blockless(view, *data.draw(st.permutations((before, said("node-7")))))


@fault("ConditionHolds")
def _the_block_of_a_node_says_nothing_yet(view: View, data: st.DataObject) -> View:
    block = changed(made("10.244.200.0/26", "node-7", []), status=IPAMBlockStatus())
    block = changed(block, metadata=changed(block.metadata, creation_timestamp=NOW))
    return changed(blockless(view, said("node-7")), blocks=(*view.blocks, block))


@given(views())
def test_what_is_no_word_of_a_condition_that_holds_makes_no_finding(view: View) -> None:
    pod = ObjectReference(api_version="v1", kind="Pod", name="node-7", namespace="default", uid="u")
    for event in (
        said("node-7", event_time=at(-FRESH - 1)),
        said("node-7", series=EventSeries(count=3, last_observed_time=at(-FRESH - 1)), event_time=at(-9000)),
        said("node-7", type="Normal", note="over: no block is left"),
        said("node-7", reason="BlockMarked"),
        said("node-7", reporting_controller="kubelet"),
        said("node-7", regarding=pod),
        said("node-7", regarding=None),
    ):
        assert findings(blockless(view, event)) == ()
    passed = said("node-7", event_time=at(-90)), said("node-7", type="Normal", name="n", event_time=at(-60))
    for events in (passed, passed[::-1]):
        assert findings(blockless(view, *events)) == ()


@fault("AllocationOutsideBlock")
def _an_address_of_another_range(view: View, data: st.DataObject) -> View:
    block = a_block(view, data, used=True)
    first, *others = block.status.allocations
    wrong = data.draw(st.sampled_from(("192.0.2.1", "2001:db8::1", "10.244.255.255", "house")))
    return restatus(view, block, allocations=(changed(first, address=wrong), *others))


@fault("AddressTwice")
def _an_address_of_two(view: View, data: st.DataObject) -> View:
    block = a_block(view, data, used=True)
    held = block.status.allocations
    return holding(view, block, *held, allocation(held[0].address, STRANGER))


@fault("AttachmentTwice")
def _one_with_two_addresses(view: View, data: st.DataObject) -> View:
    block = a_block(view, data, used=True)
    first, *others = block.status.allocations
    other = str(ip_network(block.spec.cidr)[40])
    return holding(view, block, first, *others, changed(first, address=other))


@fault("AttachmentTwice")
def _one_with_addresses_on_two_nodes(view: View, data: st.DataObject) -> View:
    who = Attachment("underlay", "node-1-c0", "eth0")
    return changed(view, blocks=(*view.blocks, made("10.244.200.0/26", "node-2", [allocation("10.244.200.9", who)])))


@fault("HolderUnknown")
def _a_route_without_a_record(view: View, data: st.DataObject) -> View:
    block = a_block(view, data)
    stray = allocation(str(ip_network(block.spec.cidr)[50]), Attachment("unknown", "unknown", "ulabc"))
    return holding(view, block, *block.status.allocations, stray)


@fault("CountsDisagree")
def _a_wrong_count(view: View, data: st.DataObject) -> View:
    block = a_block(view, data)
    field = data.draw(st.sampled_from(("used", "free")))
    return restatus(view, block, **{field: getattr(block.status, field) + data.draw(st.sampled_from((-1, 1, 5)))})


@fault("ReservedInUse")
def _a_reservation_over_a_pod(view: View, data: st.DataObject) -> View:
    block = a_block(view, data, used=True)
    address = data.draw(st.sampled_from(block.status.allocations)).address
    more = IPReservation(metadata=Meta(name="more"), spec=IPReservationSpec(reserved_cidrs=(address,)))
    return changed(view, reservations=(*(view.reservations or ()), more))


@fault("JournalDamaged")
def _a_journal_with_bad_lines(view: View, data: st.DataObject) -> View:
    return relocal(view, damage=("line 3 is damaged", "line 9 is cut short"))


@fault("RouteWithoutAllocation")
def _a_route_that_nobody_explains(view: View, data: st.DataObject) -> View:
    address = data.draw(st.sampled_from((str(ip_network(view.blocks[0].spec.cidr)[60]), "10.244.250.1")))
    return relocal(view, routes=view.local.routes | {address})  # type: ignore[union-attr,operator]


def one_lease(view: View, data: st.DataObject) -> tuple[str, Attachment, IPAMBlock]:
    assert view.local
    address = data.draw(st.sampled_from(sorted(view.local.leases)))
    block = next(b for b in view.blocks if any(a.address == address for a in b.status.allocations))
    return address, view.local.leases[address], block


def without(view: View, block: IPAMBlock, address: str) -> View:
    return holding(view, block, *(a for a in block.status.allocations if a.address != address))


@fault("AllocationWithoutRoute")
def _link_and_route_gone(view: View, data: st.DataObject) -> View:
    address, who, _ = one_lease(view, data)
    assert view.local and view.local.routes and view.local.linked
    return relocal(view, routes=view.local.routes - {address}, linked=view.local.linked - {who})


@fault("AllocationWithoutRoute")
def _link_and_route_gone_and_only_the_store_has_it(view: View, data: st.DataObject) -> View:
    address, _, _ = one_lease(view, data)
    assert view.local and view.local.routes and view.local.linked
    leases = {a: w for a, w in view.local.leases.items() if a != address}
    who = view.local.leases[address]
    return relocal(view, leases=leases, routes=view.local.routes - {address}, linked=view.local.linked - {who})


@fault("AllocationWithoutRoute")
def _link_and_route_gone_and_only_the_journal_has_it(view: View, data: st.DataObject) -> View:
    address, who, block = one_lease(view, data)
    assert view.local and view.local.routes and view.local.linked
    view = without(view, block, address)
    return relocal(view, routes=view.local.routes - {address}, linked=view.local.linked - {who})


@fault("RouteMissing")
def _only_the_route_gone(view: View, data: st.DataObject) -> View:
    address, _, _ = one_lease(view, data)
    return relocal(view, routes=view.local.routes - {address})  # type: ignore[union-attr,operator]


@fault("RouteMissing")
def _only_the_route_gone_and_only_the_journal_has_it(view: View, data: st.DataObject) -> View:
    address, _, block = one_lease(view, data)
    return relocal(without(view, block, address), routes=view.local.routes - {address})  # type: ignore[union-attr,operator]


@fault("RouteMissing")
def _only_the_route_gone_and_only_the_store_has_it(view: View, data: st.DataObject) -> View:
    address, _, _ = one_lease(view, data)
    return relocal(_the_journal_has_lost(view, address), routes=view.local.routes - {address})  # type: ignore[union-attr,operator]


@fault("MirrorBehind")
def _the_store_has_not_heard_of_it(view: View, data: st.DataObject) -> View:
    address, _, block = one_lease(view, data)
    return without(view, block, address)


@fault("RecordsDisagree")
def _journal_and_store_name_others(view: View, data: st.DataObject) -> View:
    address, _, _ = one_lease(view, data)
    return relocal(view, leases={**view.local.leases, address: STRANGER})  # type: ignore[union-attr]


@fault("RecordsDisagree")
def _the_journal_has_lost_it(view: View, data: st.DataObject) -> View:
    return _the_journal_has_lost(view, one_lease(view, data)[0])


def _the_journal_has_lost(view: View, address: str) -> View:
    return relocal(view, leases={a: w for a, w in view.local.leases.items() if a != address})  # type: ignore[union-attr]


@fault("MirrorBehind")
def _given_back_and_the_kernel_cannot_be_asked(view: View, data: st.DataObject) -> View:
    return relocal(_the_journal_has_lost_it(view, data), routes=None, linked=None)


@fault("AddressOfOtherNode")
def _in_use_here_in_a_block_of_another(view: View, data: st.DataObject) -> View:
    assert view.local and view.local.routes is not None
    address = str(ip_network(a_block(view, data).spec.cidr)[data.draw(st.sampled_from((16, 33)))])
    leases = {**view.local.leases, **({address: STRANGER} if data.draw(st.booleans()) else {})}
    return relocal(view, leases=leases, routes=view.local.routes | {address})


def repod(view: View, key: str, **parts: Any) -> View:
    """``parts`` of the pod; None for one that is gone."""
    assert view.pods
    left = tuple(p for p in view.pods if p.key != key)
    pod = next(p for p in view.pods if p.key == key)
    return changed(view, pods=(*left, changed(pod, **parts)) if parts else left)


def a_held(view: View, data: st.DataObject, *, told: bool = False) -> tuple[IPAMBlock, Allocation]:
    """An allocation; with ``told`` one whose pod has its address by kubelet's word."""
    known = {ip.ip for p in view.pods or () if p.status.phase == "Running" for ip in p.status.pod_ips}
    all_of_them = [(b, a) for b in view.blocks for a in b.status.allocations if not told or a.address in known]
    assume(all_of_them)
    return data.draw(st.sampled_from(all_of_them))


@fault("PodGone")
def _a_pod_that_is_not_there(view: View, data: st.DataObject) -> View:
    _, held = a_held(view, data)
    return only(repod(view, held.pod), held)


@fault("PodGone")
def _a_pod_that_has_finished(view: View, data: st.DataObject) -> View:
    _, held = a_held(view, data)
    phase = data.draw(st.sampled_from(("Succeeded", "Failed")))
    return only(repod(view, held.pod, status=PodStatus(phase=phase)), held)


@fault("PodGone")
def _a_pod_that_runs_elsewhere(view: View, data: st.DataObject) -> View:
    _, held = a_held(view, data)
    node = data.draw(st.sampled_from(("node-8", "")))
    return only(repod(view, held.pod, spec=PodSpec(node_name=node), status=PodStatus(phase="Pending")), held)


def only(view: View, held: Allocation) -> View:
    """Of this pod nothing else is handed out, so that there is one finding."""
    for block in view.blocks:
        left = [a for a in block.status.allocations if a.pod != held.pod or a == held]
        if len(left) < len(block.status.allocations):
            view = holding(view, block, *left)
    own = [a for b in view.blocks if b.spec.node == "node-1" for a in b.status.allocations]
    return changed(view, local=local_of("node-1", list(view.blocks))) if own else changed(view, local=None)


@fault("PodAddressDiffers")
def _an_address_of_an_older_sandbox(view: View, data: st.DataObject) -> View:
    """The new sandbox has its own."""
    block, held = a_held(view, data, told=True)
    older = changed(held, container="older", address=str(ip_network(block.spec.cidr)[40]))
    view = holding(view, block, *block.status.allocations, older)
    return changed(view, local=local_of("node-1", list(view.blocks)))


@fault("PodWithoutAllocation")
def _a_pod_whose_address_is_free(view: View, data: st.DataObject) -> View:
    block = a_block(view, data)
    return more_pods(view, a_pod("new", block.spec.node, str(ip_network(block.spec.cidr)[50])))


@fault("PodWithoutAllocation")
def _a_pod_whose_address_is_in_no_block(view: View, data: st.DataObject) -> View:
    return more_pods(view, a_pod("new", "node-2", data.draw(st.sampled_from(("10.244.250.1", "fd00:10:244:9::1")))))


@fault("PodsShareAddress")
def _two_pods_with_one_address(view: View, data: st.DataObject) -> View:
    _, held = a_held(view, data, told=True)
    return more_pods(view, a_pod("twin", data.draw(st.sampled_from(("node-1", "node-2"))), held.address))


OF_PODS = {"PodGone", "PodAddressDiffers", "PodWithoutAllocation", "PodsShareAddress"}


def more_pods(view: View, *pods: Pod) -> View:
    return changed(view, pods=(*(view.pods or ()), *pods))


@pytest.mark.parametrize("name", FAULTS)
@given(data=st.data())
@settings(max_examples=15)
def test_each_fault_gives_exactly_its_finding(name: str, data: st.DataObject) -> None:
    kind = name.partition(":")[0]
    view = FAULTS[name](data.draw(views()), data)
    # What a wrong block does to pods is said of these too.
    others = [f.kind for f in findings(view) if f.kind != kind]
    assert set(others) <= (set() if kind in OF_PODS else {"PodWithoutAllocation"})
    if others:
        view = changed(view, pods=None)
    (found,) = findings(view)
    assert found.kind == kind, found
    assert all((found.object, found.what, found.remedy))
    assert found == findings(view)[0]  # the words stay, as a report is compared with what is found later


def test_every_kind_has_a_fault() -> None:
    assert {name.partition(":")[0] for name in FAULTS} == set(KINDS)
    assert set(PATIENCE) <= set(KINDS)


@given(views(), st.data())
def test_several_faults_are_all_found_in_a_stable_order(view: View, data: st.DataObject) -> None:
    names = ("WritersDiffer: a block written by another start", "PoolsOverlap: a pool inside another")
    for name in names:
        view = FAULTS[name](view, data)
    found = findings(view)
    assert [f.kind for f in found] == ["PoolsOverlap", "WritersDiffer"]
    assert findings(changed(view, blocks=tuple(reversed(view.blocks)))) == found


@given(views(), st.data())
def test_a_choice_of_nodes_leaves_out_what_is_of_others(view: View, data: st.DataObject) -> None:
    block = a_block(view, data)
    view = restatus(view, block, releasing=True)
    view = FAULTS["PoolsOverlap: a pool inside another"](view, data)
    assert [f.kind for f in findings(view, frozenset({block.spec.node}))] == ["BlockReleasing"]
    assert findings(view, frozenset({"node-1"})) == ()


def test_a_status_of_another_start_or_boot_is_not_compared_address_by_address() -> None:
    block = made("10.244.0.0/26", "node-1", [allocation("10.244.0.9", STRANGER)])
    local = Local("node-1", Writer(boot_id=BOOT, start=4), {"10.244.0.20": STRANGER}, frozenset({"10.244.0.20"}))
    view = View(NOW, (block,), local=local)
    (found,) = findings(view)
    assert (found.kind, found.address) == ("MirrorBehind", "10.244.0.0/26")
    unknown = changed(local, writer=Writer(boot_id=BOOT, start=0))
    assert len(findings(changed(view, local=unknown))) == 2  # of one boot, so both addresses are compared
    unsaid = changed(block, status=IPAMBlockStatus())
    assert [f.kind for f in findings(changed(view, blocks=(unsaid,)))] == ["MirrorBehind", "NotMirrored"]


@pytest.mark.parametrize("known", ["journal", "kernel", "neither"])
def test_a_new_block_is_behind_only_if_something_lives_in_it(known: str) -> None:
    block = changed(made("10.244.0.0/26", "node-1", []), status=IPAMBlockStatus())
    block = changed(block, metadata=changed(block.metadata, creation_timestamp=NOW))
    leases = {"10.244.0.20": STRANGER} if known == "journal" else {}
    routes = {"journal": None, "kernel": frozenset({"10.244.0.20"}), "neither": frozenset({"10.244.1.1"})}[known]
    local = Local("node-1", Writer(boot_id=BOOT, start=3), leases, routes)
    other = made("10.244.1.0/26", "node-1", [allocation("10.244.1.1", STRANGER)])
    local = changed(local, leases={**leases, "10.244.1.1": STRANGER})
    if routes is not None:
        local = changed(local, routes=routes | {"10.244.1.1"})
    kinds = [f.kind for f in findings(View(NOW, (block, other), local=local))]
    # what the kernel alone knows in it has no record at all
    assert (
        kinds
        == {"journal": ["MirrorBehind"], "kernel": ["MirrorBehind", "RouteWithoutAllocation"], "neither": []}[known]
    )


def test_an_empty_block_of_another_boot_is_behind() -> None:
    block = made("10.244.0.0/26", "node-1", [])
    local = Local("node-1", Writer(boot_id="c" * 36, start=3), {}, frozenset())
    assert [f.kind for f in findings(View(NOW, (block,), local=local))] == ["MirrorBehind"]


def test_findings_say_who_and_why() -> None:
    c = Condition(type="SweepStopped", status="True", reason="TooManyGone", message="look")
    theirs = made("10.244.0.0/26", "node-2", [allocation("10.244.0.9", STRANGER, "default/p")], conditions=(c,))
    local = Local("node-1", Writer(boot_id=BOOT, start=3), {"10.244.0.9": Attachment("underlay", "mine", "eth0")})
    foreign, held = findings(View(NOW, (theirs,), local=local))
    assert foreign.what == (
        "underlay/mine/eth0 has it on node-1, and the block is of node-2, which has handed it out to "
        "pod default/p (underlay/stranger/eth0)"
    )
    assert foreign.nodes == ("node-1", "node-2")
    assert held.what == "SweepStopped (TooManyGone): look"
    alone = changed(theirs, status=changed(theirs.status, allocations=()))
    assert "handed" not in findings(View(NOW, (alone,), local=local))[0].what


def test_overlapping_blocks_are_paired_with_the_nearest_around() -> None:
    blocks = [
        made(cidr, "node-1", []) for cidr in ("10.244.0.0/24", "10.244.0.0/26", "10.244.0.64/26", "10.244.1.0/26")
    ]
    blocks.append(made("10.244.0.64/28", "node-2", []))
    found = [f for f in findings(View(NOW, tuple(blocks))) if f.kind == "BlocksOverlap"]
    assert {(f.address, f.what.split("(")[1].split(")")[0]) for f in found} == {
        ("10.244.0.0/26", "10.244.0.0/24"),
        ("10.244.0.64/26", "10.244.0.0/24"),
        ("10.244.0.64/28", "10.244.0.64/26"),
    }
    assert next(f for f in found if f.address == "10.244.0.64/28").nodes == ("node-2", "node-1")


@given(views(), st.data())
def test_where_no_kubelet_tells_of_pods_an_allocation_needs_none(view: View, data: st.DataObject) -> None:
    assert view.pods
    waiting = [changed(p, status=PodStatus(phase="Pending")) for p in view.pods]
    left = data.draw(st.sampled_from(((), tuple(waiting[:1]), tuple(waiting))))
    assert findings(changed(view, pods=left)) == ()


def test_what_a_node_that_is_gone_handed_out_is_said_of_its_block_alone() -> None:
    block = made("10.244.0.0/26", "node-9", [allocation("10.244.0.9", STRANGER, "default/gone")])
    view = View(NOW, (block,), nodes=frozenset({"node-1"}), pods=(a_pod("p", "node-1", "192.0.2.1"),))
    assert [f.kind for f in findings(view)] == ["BlockOfNoNode"]
    assert [f.kind for f in findings(changed(view, nodes=None))] == ["PodGone"]


def test_an_attachment_of_a_further_network_is_no_address_of_its_pod() -> None:
    further = Attachment("storage", "c1", "net1")
    block = made("10.244.64.0/26", "node-1", [allocation("10.244.64.9", further, "default/p")])
    pods = (a_pod("p", "node-1", "192.0.2.1"),)
    assert findings(View(NOW, (block,), pods=pods)) == ()
    primary = changed(block.status.allocations[0], interface="eth0")
    found = findings(View(NOW, (changed(block, status=changed(block.status, allocations=(primary,))),), pods=pods))
    assert [f.kind for f in found] == ["PodAddressDiffers"]


def test_what_the_journal_has_is_only_behind_in_the_store() -> None:
    pools = (IPPool(metadata=Meta(name="pods-v4"), spec=IPPoolSpec(cidr="10.244.0.0/16")),)
    local = Local("node-1", Writer(boot_id=BOOT, start=3), {"10.244.64.9": STRANGER})
    block = made("10.244.64.0/26", "node-1", [])
    pods = (a_pod("p", "node-1", "10.244.64.9"), a_pod("q", "node-2", "10.244.65.9"))
    silent = changed(made("10.244.65.0/26", "node-2", []), status=IPAMBlockStatus())
    kinds = {f.kind for f in findings(View(NOW, (block, silent), pools, local=local, pods=pods))}
    assert kinds == {"MirrorBehind", "NotMirrored"}


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(24, 32)), max_size=12), st.integers(0, 255))
def test_free_is_counted_with_any_reservations(cuts: list[tuple[int, int]], offset: int) -> None:
    """Against counting address by address."""
    cidrs = tuple(dict.fromkeys(str(ip_network(f"10.244.0.{n}/{length}", strict=False)) for n, length in cuts))
    reserved = {a for c in cidrs for a in ip_network(c)}
    cidr = str(ip_network(f"10.244.0.{offset}/26", strict=False))
    address = ip_address(f"10.244.0.{offset}")
    free = sum(1 for a in ip_network(cidr) if a not in reserved and a != address)
    block = made(cidr, "n", [allocation(str(address), STRANGER)])
    block = changed(block, status=changed(block.status, free=free))
    reservations = (IPReservation(metadata=Meta(name="r"), spec=IPReservationSpec(reserved_cidrs=cidrs)),)
    found = findings(View(NOW, (block,), reservations=reservations))
    assert [f.kind for f in found] == (["ReservedInUse"] if address in reserved else [])


# -- looking -----------------------------------------------------------------------------------------------------------


S = TypeVar("S", bound=MemoryStore)


async def filled(store: S, *objects: Resource) -> S:
    for obj in objects:
        created = await store.create(changed(obj, metadata=Meta(name=obj.name, namespace=obj.metadata.namespace)))
        if hasattr(obj, "status"):
            await store.update_status(changed(created, status=obj.status))
    return store


POOL = IPPool(metadata=Meta(name="pods-v4"), spec=IPPoolSpec(cidr="10.244.0.0/16"))
NODE = Node(metadata=Meta(name="node-1"))


def test_nothing_wrong_is_one_look() -> None:
    async def run() -> Report:
        clock = FakeClock()
        store = await filled(MemoryStore(clock), POOL, NODE, made("10.244.64.0/26", "node-1", []))
        return await check(store, clock)  # the clock stands still: a wait would not end

    report = asyncio.run(asyncio.wait_for(run(), 60))
    assert (report.findings, report.unseen, report.local) == ((), (), "")
    assert report.looked == ("0 events", "1 ipamblocks", "0 allocations", "1 ippools", "0 ipreservations", "1 nodes")


def test_what_is_on_its_way_is_no_finding_and_what_stays_is() -> None:
    async def run() -> Report:
        clock = FakeClock()
        orphan = made("10.244.64.0/26", "node-9", [])
        wrong = made("10.244.65.0/26", "node-1", [], releasing=True)
        store = await filled(MemoryStore(clock), POOL, NODE, orphan, wrong)
        running = asyncio.create_task(check(store, clock))
        await settle()
        await store.create(changed(NODE, metadata=Meta(name="node-9")))
        await store.create(changed(POOL, metadata=Meta(name="more"), spec=IPPoolSpec(cidr="10.99.0.0/16")))
        await store.create(changed(made("10.99.0.0/26", "node-8", []), spec=IPAMBlockSpec(
            cidr="10.99.0.0/26", pool="more", node="node-8")))  # fmt: skip
        await clock.advance(SETTLE + 0.5)
        assert not running.done()
        await clock.advance(PATIENCE["BlockReleasing"])
        return await running

    report = asyncio.run(asyncio.wait_for(run(), 60))
    # node-8's came later than the first look: it may be on its way too
    assert [(f.kind, f.address) for f in report.findings] == [("BlockReleasing", "10.244.65.0/26")]


def test_a_release_that_comes_to_its_end_is_waited_for() -> None:
    async def run() -> Report:
        clock = FakeClock()
        block = made("10.244.65.0/26", "node-1", [], releasing=True)
        store = await filled(MemoryStore(clock), POOL, NODE, block)
        running = asyncio.create_task(check(store, clock))
        await clock.advance(6)
        await store.delete(IPAMBlock, block.name)
        await clock.advance(PATIENCE["BlockReleasing"])
        return await running

    assert asyncio.run(asyncio.wait_for(run(), 60)).findings == ()


class Busy(MemoryStore):
    """Between the list of pods and that of blocks, in every look, a pod goes with its address and another comes."""

    def busy_with(self, block: IPAMBlock) -> None:
        self.looks = 0
        self.block = block

    async def list(self, kind: type[Any], **where: Any) -> Listing[Any]:
        if kind is IPAMBlock:
            self.looks += 1
            await self.swap(self.looks)
        return await super().list(kind, **where)

    async def swap(self, number: int) -> None:
        if number:
            await self.delete(Pod, f"default/p{number - 1}")
        address = f"10.244.64.{number + 1}"
        pod = a_pod(f"p{number}", "node-1", address)
        await self.update_status(changed(await self.create(pod), status=pod.status))
        held = [allocation(address, Attachment("underlay", f"c{number}", "eth0"), f"default/p{number}")]
        current = await self.get(IPAMBlock, self.block.name)
        await self.update_status(changed(current, status=made(self.block.spec.cidr, "node-1", held).status))


def test_pods_that_come_and_go_while_we_look_are_no_finding_and_a_leak_among_them_is() -> None:
    async def run(*more: IPAMBlock) -> tuple[Report, int]:
        clock = FakeClock()
        block = made("10.244.64.0/26", "node-1", [])
        store = await filled(Busy(clock), POOL, NODE, block, *more)
        store.busy_with(block)
        await store.swap(0)
        running = asyncio.create_task(check(store, clock))
        await settle()
        assert not running.done(), "p0 was seen, and its address was given back meanwhile"
        await clock.advance(PATIENCE["PodGone"])
        return await running, store.looks

    report, looks = asyncio.run(asyncio.wait_for(run(), 60))
    assert (report.findings, report.unseen, looks) == ((), (), 2)
    assert report.looked[0] == "1 pods"
    leak = made("10.244.65.0/26", "node-1", [allocation("10.244.65.9", STRANGER, "default/gone")])
    report, _ = asyncio.run(asyncio.wait_for(run(leak), 60))
    assert [(f.kind, f.address) for f in report.findings] == [("PodGone", "10.244.65.9")]


def test_a_store_without_pods_is_clean_and_nothing_is_unseen() -> None:
    async def run() -> Report:
        clock = FakeClock()
        held = [allocation("10.244.64.9", STRANGER, "default/of-a-lab")]
        return await check(await filled(MemoryStore(clock), POOL, NODE, made("10.244.64.0/26", "node-1", held)), clock)

    report = asyncio.run(asyncio.wait_for(run(), 60))
    assert (report.findings, report.unseen) == ((), ())
    assert not any("pods" in what for what in report.looked)


class Blind(MemoryStore):
    """Refuses to list some kinds, as the API server does where a right is missing."""

    hidden: tuple[type[Resource], ...] = ()

    async def list(self, kind: type[Any], **where: Any) -> Listing[Any]:
        if kind in self.hidden:
            raise StoreError(f"{kind.PLURAL} is forbidden")
        return await super().list(kind, **where)


@pytest.mark.parametrize(
    ("hidden", "unseen"),
    [
        ((Node,), ("nodes: nodes is forbidden",)),
        ((Pod, Node), ("pods: pods is forbidden", "nodes: nodes is forbidden")),
        ((IPPool, IPReservation), ("ippools: ippools is forbidden", "ipreservations: ipreservations is forbidden")),
        ((IPAMBlock,), ("ipamblocks: ipamblocks is forbidden", "nothing else was looked at")),
    ],
)
def test_what_may_not_be_listed_is_said(
    hidden: tuple[type[Resource], ...], unseen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "SETTLE", 0.01)

    async def run() -> Report:
        clock = FakeClock()
        store = await filled(Blind(clock), POOL, made("10.244.64.0/26", "node-9", []))
        store.hidden = hidden
        return await check(store, SystemClock())

    report = asyncio.run(run())
    assert len(report.unseen) == len(unseen)
    assert all(line.startswith(text) for line, text in zip(report.unseen, unseen, strict=True))
    assert [f.kind for f in report.findings] == ([] if hidden != (IPPool, IPReservation) else ["BlockOfNoNode"])


def test_a_node_without_a_block_is_heard_by_its_events() -> None:
    async def run() -> Report:
        clock = FakeClock()
        now = f"{clock.now().removesuffix('Z')}.000000Z"
        pod = ObjectReference(api_version="v1", kind="Pod", name="p", namespace="default", uid="u")
        store = await filled(MemoryStore(clock), POOL, NODE, made("10.244.64.0/26", "node-9", []))
        for event in (
            said("node-1", event_time=now),
            said("node-1", event_time=now, name="node-1.2", reporting_controller="kubelet", note="of kubelet"),
            said("node-1", event_time=now, name="p.1", regarding=pod),
        ):
            await store.create(event)
        running = asyncio.create_task(check(store, clock, nodes=("node-1",)))
        await clock.advance(SETTLE)
        return await running

    report = asyncio.run(asyncio.wait_for(run(), 60))
    assert [(f.kind, f.object, f.what) for f in report.findings] == [
        ("ConditionHolds", "node/node-1", "PoolExhausted (NoFreeBlock): no block is left")
    ]
    assert report.looked[0] == "1 events"


def test_a_store_that_goes_away_between_two_looks_is_said() -> None:
    async def run() -> Report:
        clock = FakeClock()
        store = await filled(MemoryStore(clock), POOL, made("10.244.64.0/26", "node-9", []))
        running = asyncio.create_task(check(store, clock))
        await settle()
        store.fail_with("gone fishing")
        await clock.advance(SETTLE)
        return await running

    report = asyncio.run(asyncio.wait_for(run(), 60))
    assert report.findings == ()
    assert report.unseen[:3] == ("pods: gone fishing", "events: gone fishing", "ipamblocks: gone fishing")


def test_a_store_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(MemoryStore):
        async def list(self, kind: type[Any], **where: Any) -> Listing[Any]:
            await asyncio.sleep(3600)
            return await super().list(kind, **where)

    monkeypatch.setattr(look, "LIMIT", 0.01)
    report = asyncio.run(check(Silent(SystemClock()), SystemClock()))
    assert report.unseen[:2] == ("pods: no answer within 0.01 s", "events: no answer within 0.01 s")


def test_a_node_that_nobody_knows_is_a_slip_of_the_pen() -> None:
    async def run(*nodes: str) -> Report:
        clock = FakeClock()
        store = await filled(MemoryStore(clock), POOL, NODE, made("10.244.64.0/26", "node-2", []))
        store.fail_with("")
        return await check(store, clock, nodes=nodes)

    assert asyncio.run(run("node-1")).findings == ()
    with pytest.raises(Usage, match=r"no node 'node-3' .* node-1, node-2"):
        asyncio.run(run("node-1", "node-3"))


# -- a node's own words ------------------------------------------------------------------------------------------------

NETNS = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run directory with a journal, a start and the namespace that we are in."""
    folder = tmp_path / "run"
    journal = Journal(folder, BOOT)
    journal.append(Opened(NETNS))
    journal.append(Taken(STRANGER, ("10.244.64.1",), ("uid-of-node-1",), "default/p"))
    journal.append(Bound(STRANGER, 7))
    journal.close()
    (folder / f"starts-{BOOT}").write_text("3\n")
    yield folder


class Numbered(MemoryStore):
    """Gives each block the uid that its node's name makes."""

    @classmethod
    async def of(cls, *objects: Resource) -> Numbered:
        uids = iter([f"uid-of-{o.spec.node}" if isinstance(o, IPAMBlock) else o.name for o in objects])
        return await filled(cls(FakeClock(), new_uid=lambda: next(uids)), *objects)


def look_once(folder: Path, node: str, monkeypatch: pytest.MonkeyPatch, kernel: Any = None) -> Report:
    """A check on ``node``, whose block holds what the journal holds; ``kernel`` stands in for it."""
    held = [allocation("10.244.64.1", STRANGER, "default/p")]

    def ask(history: History, said: set[Attachment]) -> tuple[frozenset[str], frozenset[Attachment]]:
        assert said == {STRANGER}  # what the store has on this node
        if isinstance(kernel, Exception):
            raise kernel
        return frozenset({"10.244.64.1"}), frozenset({STRANGER})

    monkeypatch.setattr(look, "_read_kernel", ask)

    async def main() -> Report:
        blocks = (made("10.244.64.0/26", "node-1", held), made("10.244.65.0/26", "node-2", []))
        store = await Numbered.of(POOL, NODE, changed(NODE, metadata=Meta(name="node-2")), *blocks)
        return await check(store, SystemClock(), here=Here(node, folder))

    return asyncio.run(main())


def test_a_node_that_agrees_is_clean(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = look_once(run, "node-1", monkeypatch)
    assert (report.findings, report.unseen) == ((), ())
    assert report.local == "node-1"
    assert report.looked[-2:] == ("journal of node-1", "kernel of node-1")


def test_a_journal_is_only_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "journal-other").write_bytes(b"x")
    monkeypatch.setattr(look, "BOOT_ID", run / "boot")
    (run / "boot").write_text(f"{BOOT}\n")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()}
    assert look_once(run, "node-1", monkeypatch).unseen == ()
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()} == before


def test_half_a_record_at_the_end_may_be_on_its_way_but_is_a_finding_if_it_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "SETTLE", 0.01)
    with (run / f"journal-{BOOT}").open("ab") as journal:
        journal.write(b"0123")
    assert [f.kind for f in look_once(run, "node-1", monkeypatch).findings] == ["JournalDamaged"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / f"journal-{BOOT}").unlink(), "has none of this boot"),
        (lambda run: (run / f"journal-{BOOT}").rename(run.parent / "j"), "has none of this boot"),
        (lambda run: run.rename(run.parent / "other"), "No such file"),
        (lambda run: (run / "journal-second").write_text(""), "has none of this boot"),
    ],
)
def test_a_journal_that_cannot_be_read_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any], words: str
) -> None:
    spoil(run)
    (line,) = look_once(run, "node-1", monkeypatch).unseen
    assert line.startswith("journal of node-1: ")
    assert words in line


def test_a_kernel_that_cannot_be_asked_is_said_and_the_journal_is_compared(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = look_once(run, "node-1", monkeypatch, KernelUnavailable("no"))
    assert report.unseen == ("kernel of node-1: no",)
    assert "journal of node-1" in report.looked


def test_the_run_directory_of_another_node_is_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = look_once(run, "node-2", monkeypatch)
    assert report.findings == ()
    assert "is of node-1: name the node" in report.unseen[0]


def test_a_start_that_cannot_be_read_is_not_compared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "SETTLE", 0.01)
    starts = run / f"starts-{BOOT}"
    starts.write_text("4\n")
    assert [f.kind for f in look_once(run, "node-1", monkeypatch).findings] == ["MirrorBehind"]
    starts.write_text("?\n")
    assert look_once(run, "node-1", monkeypatch).findings == ()


# -- the report --------------------------------------------------------------------------------------------------------


def finding(kind: str = "BlockOfNoNode") -> Finding:
    return Finding(kind, "ipamblock/10-244-9-0-26", "10.244.9.0/26", ("node-9",), "what", "remedy")  # type: ignore[arg-type]


def report(*found: Finding, **parts: Any) -> Report:
    whole: dict[str, Any] = {
        "version": "underlay.network/ipam-check/v1", "at": NOW, "nodes": (), "local": "", "looked": ("1 ipamblocks",),
        "unseen": (),
    }  # fmt: skip
    return Report(**{**whole, **parts}, findings=found)


def test_the_form_of_a_report_is_fixed() -> None:
    """Scripts read it: a change here breaks them."""
    assert json.loads(write(report(finding(), unseen=("x",)))) == {
        "version": "underlay.network/ipam-check/v1",
        "at": NOW,
        "nodes": [],
        "local": "",
        "looked": ["1 ipamblocks"],
        "unseen": ["x"],
        "findings": [
            {
                "kind": "BlockOfNoNode",
                "object": "ipamblock/10-244-9-0-26",
                "address": "10.244.9.0/26",
                "nodes": ["node-9"],
                "what": "what",
                "remedy": "remedy",
            }
        ],
    }


def test_a_report_is_read_as_it_was_written() -> None:
    whole = report(finding(), finding("AddressTwice"), nodes=("a",), local="b")
    assert read(write(whole).encode(), "r.json") == whole


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"version": "v0"}', b"\xff", b"clean: looked at 3 blocks"])
def test_what_is_no_report_is_refused(text: bytes) -> None:
    with pytest.raises(Usage, match=r"r\.json: no report: .*ipam check -o json"):
        read(text, "r.json")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    for name in ("UNDERLAY_STORE", "UNDERLAY_NODE", "UNDERLAY_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(look, "SETTLE", 0.01)
    made_ = Ctl(tmp_path, capsys)
    made_.on_store(lambda store: store.list(IPPool))
    return made_


def test_a_clean_check_is_exit_0(ctl: Ctl) -> None:
    ctl.put(POOL, NODE, made("10.244.64.0/26", "node-1", [allocation("10.244.64.1", STRANGER)]))
    assert ctl.ok("ipam", "check") == (
        "clean: looked at 0 events, 1 ipamblocks, 1 allocations, 1 ippools, 0 ipreservations, 1 nodes\n"
    )
    assert json.loads(ctl.ok("ipam", "check", "-o", "json"))["findings"] == []


def test_findings_are_exit_1_with_a_remedy(ctl: Ctl) -> None:
    ctl.put(POOL, NODE, made("10.244.64.0/26", "node-9", []))
    code, out, err = ctl("ipam", "check")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].split() == ["KIND", "OBJECT", "ADDRESS", "WHAT"]
    assert lines[1].split()[:3] == ["BlockOfNoNode", "ipamblock/10-244-64-0-26", "10.244.64.0/26"]
    assert "underlayctl ipam release --block 10.244.64.0/26" in lines[3]
    assert lines[-1].startswith("1 finding: looked at")
    assert ctl("ipam", "check", "--node", "node-1")[0] == 0
    assert ctl("ipam", "check", "--node", "node-1", "--node", "node-9")[0] == 1
    code, _, err = ctl("ipam", "check", "--node", "node-7")
    assert (code, "no node 'node-7'" in err) == (2, True)


def test_what_could_not_be_looked_at_is_exit_2_findings_or_not(ctl: Ctl) -> None:
    ctl.put(POOL, NODE, made("10.244.64.0/26", "node-1", []))
    where = ("--node", "node-1", "--run", str(ctl.folder))
    code, out, err = ctl("ipam", "check", *where)
    assert (code, "could not look at journal of node-1" in err) == (2, True)
    assert out.startswith("no finding about node-1: looked at")
    ctl.put(made("10.244.65.0/26", "node-9", []))
    code, out, err = ctl("ipam", "check", "--run", str(ctl.folder), "-o", "json")
    assert code == 2
    assert [f["kind"] for f in json.loads(out)["findings"]] == ["BlockOfNoNode"]


@pytest.mark.parametrize("spoil", ["missing", "broken", "unknown"])
def test_no_store_is_exit_2_and_a_report_all_the_same(ctl: Ctl, spoil: str) -> None:
    path = ctl.folder / f"{spoil}.db"
    if spoil == "broken":
        path.write_bytes(b"this is no database" * 100)
    ctl.url = "carrier-pigeon:x" if spoil == "unknown" else f"sqlite:{path}"
    code, out, err = ctl("ipam", "check", "-o", "json")
    assert (code, err.startswith("underlayctl: could not look at ")) == (2, True)
    said = json.loads(out)
    assert (said["findings"], said["looked"]) == ([], [])
    assert said["unseen"]


def test_the_node_is_named_by_option_environment_or_machine(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl.put(POOL, NODE)
    monkeypatch.setenv("UNDERLAY_RUN", str(ctl.folder))
    monkeypatch.setattr("socket.gethostname", lambda: "machine")
    assert "journal of machine" in ctl("ipam", "check")[2]
    monkeypatch.setenv("UNDERLAY_NODE", "named")
    assert "journal of named" in ctl("ipam", "check")[2]
    assert "journal of node-1" in ctl("ipam", "check", "--node", "node-1")[2]


def test_unavailable_is_a_store_error() -> None:
    """``check`` relies on it: a store that is away is not to be a crash."""
    assert issubclass(Unavailable, StoreError)
