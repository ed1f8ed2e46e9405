"""Taking a node out of the routes: what is announced at which moment, and what of it people are told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.bgp.model import SpeakerState
from agent.fib import Installed, NextHop, Route
from agent.plan import Plan, Snapshot, plan
from agent.plan.draining import DRAIN_SETTLE
from agent.rib import GRACEFUL_SHUTDOWN, Rib
from cni.marks import METRIC_PODS, PROTO_PODS
from store.model import ANNOTATION_DRAIN, NodeCondition
from tests.agent_fakes import FakeKernel, cluster, node
from tests.unit.test_plan import OWN4, OWN6, kernel_of, snapshot

NOW = 1000.0
TOLD4 = [("10.0.1.0", OWN4), ("10.0.2.0", OWN4)]
TOLD6 = [("fd00:0:1::", OWN6), ("fd00:0:2::", OWN6)]


def drained(value: str = "yes", **changes: Any) -> Snapshot:
    addresses = tuple(a.address for a in FakeKernel().addresses[:2])
    marked = node("node-1", *addresses)
    marked = replace(
        marked, metadata=replace(marked.metadata, annotations={ANNOTATION_DRAIN: value, **marked.metadata.annotations})
    )
    return snapshot(**{"cluster": cluster(node=marked), "now": NOW, **changes})


def speaker(confirmed_at: dict[tuple[str, str], float], *sent: tuple[str, str]) -> SpeakerState:
    pairs = frozenset((*confirmed_at, *sent))
    return SpeakerState(
        known=True, sent=pairs, table=pairs, confirmed=frozenset(confirmed_at), confirmed_at=confirmed_at
    )


def said(wanted: Plan) -> dict[str, set[str]]:
    """Prefix -> its communities, which are the same for all peers."""
    found: dict[str, set[str]] = {}
    for a in wanted.announcements or ():
        assert found.setdefault(a.prefix, set(a.communities)) == set(a.communities)
    return found


def told(wanted: Plan) -> dict[str, str]:
    return {c.type: c.message for c in wanted.conditions if c.type.startswith(("Routes", "Drain"))}


def pod(address: str) -> dict[Any, Installed]:
    length = 128 if ":" in address else 32
    route = Route(prefix=f"{address}/{length}", protocol=PROTO_PODS, metric=METRIC_PODS, nexthops=(NextHop("", 9),))
    return {route.key: Installed(route=route)}


def test_first_the_community_then_after_its_time_the_withdrawal() -> None:
    assert said(plan(snapshot())) == {OWN4: set(), OWN6: set()}
    asked = plan(drained(speaker=speaker({}, *TOLD4, *TOLD6)))
    assert said(asked) == {OWN4: {GRACEFUL_SHUTDOWN}, OWN6: {GRACEFUL_SHUTDOWN}}
    assert told(asked) == {"RoutesDraining": "asked for: 2 blocks are withdrawn when peers had time to take other ways"}

    # One peer was told of the one block later than the other: its time counts.
    at = dict.fromkeys(TOLD4 + TOLD6, NOW - DRAIN_SETTLE) | {TOLD4[1]: NOW - 1}
    half = plan(drained(speaker=speaker(at)))
    assert said(half) == {OWN4: {GRACEFUL_SHUTDOWN}}
    assert half.wake_at == NOW - 1 + DRAIN_SETTLE

    done = plan(drained(speaker=speaker({}), now=half.wake_at))
    assert said(done) == {}
    assert told(done) == {"RoutesDrained": "asked for: nothing is announced"}
    assert {p for p, *_ in done.routes} >= {OWN4, OWN6}, "the blackholes stay"


def test_a_peer_that_was_not_told_yet_is_waited_for() -> None:
    at = dict.fromkeys(TOLD4[:1] + TOLD6, NOW - 60)
    assert said(plan(drained(speaker=speaker(at, TOLD4[1])))) == {OWN4: {GRACEFUL_SHUTDOWN}}


def test_without_the_speaker_s_word_nothing_is_withdrawn_and_nothing_comes_back() -> None:
    assert plan(drained(speaker=SpeakerState())).announcements is None


def test_a_block_with_pods_stays_until_the_last_is_gone_unless_people_insist() -> None:
    kernel = kernel_of(OWN4, OWN6)
    kernel = replace(kernel, routes={**kernel.routes, **pod("10.244.1.9"), **pod("10.244.1.10")})
    late = speaker(dict.fromkeys(TOLD4 + TOLD6, NOW - 60))
    wanted = plan(drained(kernel=kernel, speaker=late))
    assert said(wanted) == {OWN4: {GRACEFUL_SHUTDOWN}}
    assert told(wanted)["RoutesDraining"] == f"asked for: {OWN4} stays until its last pod is gone: 2 live in it"
    assert said(plan(drained("force", kernel=kernel, speaker=late))) == {}
    assert said(plan(drained(speaker=late))) == {}


def test_a_block_that_comes_while_drained_is_announced_only_with_pods() -> None:
    empty = plan(drained(speaker=speaker({})))
    assert said(empty) == {}
    kernel = kernel_of(OWN4, OWN6)
    kernel = replace(kernel, routes={**kernel.routes, **pod("10.244.1.9")})
    assert said(plan(drained(kernel=kernel, speaker=speaker({})))) == {OWN4: {GRACEFUL_SHUTDOWN}}


def test_what_is_neither_yes_nor_force_changes_nothing_and_is_named() -> None:
    wanted = plan(drained("please"))
    assert said(wanted) == {OWN4: set(), OWN6: set()}
    assert told(wanted) == {"DrainNotUsable": f"{ANNOTATION_DRAIN}: 'please': yes or force; the node is not drained"}


@pytest.mark.parametrize(
    ("ready", "message", "goes"),
    [
        ("False", "node is shutting down", True),
        ("False", "[container runtime is down, node is shutting down]", True),
        ("False", "PLEG is not healthy", False),
        ("True", "kubelet is posting ready status", False),
    ],
)
def test_a_machine_that_goes_down_is_drained(ready: str, message: str, goes: bool) -> None:
    condition = NodeCondition(type="Ready", status=ready, message=message)
    addresses = tuple(a.address for a in FakeKernel().addresses[:2])
    down = node("node-1", *addresses)
    down = replace(down, status=replace(down.status, conditions=(condition,)))
    begins = plan(snapshot(cluster=cluster(node=down), speaker=speaker({}, *TOLD4, *TOLD6), now=NOW))
    assert begins.going_down is goes
    assert said(begins) == dict.fromkeys((OWN4, OWN6), {GRACEFUL_SHUTDOWN} if goes else set())
    leaving = replace(speaker({}, *TOLD4, *TOLD6), table=frozenset())
    last = plan(snapshot(cluster=cluster(node=down), speaker=leaving, now=NOW))
    assert (last.going_down, said(last) == {}) == (goes, goes)
    ends = plan(snapshot(cluster=cluster(node=down), speaker=speaker({}), now=NOW))
    assert (ends.going_down, said(ends) == {}) == (False, goes)


def test_what_is_being_withdrawn_stays_so_until_that_is_reported() -> None:
    """The speaker says of it that it may be there still, and not when it was told: that moment is over. It came back
    for 5 s, on a machine that was slow to report."""
    leaving = replace(speaker(dict.fromkeys(TOLD4, NOW), *TOLD6), table=frozenset(TOLD4))
    assert said(plan(drained(speaker=leaving))) == {OWN4: {GRACEFUL_SHUTDOWN}}


@given(st.lists(st.sampled_from(["confirm", "report", "wait", "lose", "come back", "restart"]), max_size=25))
def test_whatever_happens_nothing_goes_without_the_community_and_its_time_and_nothing_comes_back(
    acts: list[str],
) -> None:
    """A speaker that carries out what is planned, and reports what it did when it likes to: nobody hears of a block
    without the community, and a block that was withdrawn is not announced again."""
    now, rib = NOW, Rib()
    marked_at: dict[tuple[str, str], float] = {}
    sent = table = frozenset({*TOLD4, *TOLD6})
    gone: set[str] = set()
    for act in acts:
        state = SpeakerState(
            known=True, sent=sent, table=table, confirmed=frozenset(marked_at), confirmed_at=dict(marked_at)
        )
        wanted = plan(drained(speaker=state, now=now, rib=rib))
        prefixes = said(wanted)
        assert all(GRACEFUL_SHUTDOWN in communities for communities in prefixes.values())
        assert not gone & prefixes.keys()
        for pair in [p for p in sent & table if p[1] not in prefixes]:
            assert all(now >= marked_at[other] + DRAIN_SETTLE for other in sent & table if other[1] == pair[1])
        gone |= {p for _, p in sent if p not in prefixes}
        table = frozenset(pair for pair in table if pair[1] in prefixes)
        marked_at = {pair: at for pair, at in marked_at.items() if pair in sent & table}
        match act:
            case "confirm":
                marked_at |= dict.fromkeys((sent & table) - marked_at.keys(), now)
            case "report":
                sent &= table
            case "wait":
                now += 2.0
            case "lose":
                sent = frozenset(pair for pair in sent if pair[0] != "10.0.1.0")
                marked_at = {pair: at for pair, at in marked_at.items() if pair in sent}
            case "come back":
                sent |= table & {TOLD4[0]}
            case "restart":
                marked_at = dict.fromkeys(marked_at, now)
