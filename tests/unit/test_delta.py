"""Wanted against actual: any plan is reached from any state, in an order that loses nothing, and then all is quiet."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delta import (
    AddGroup,
    AddNextHop,
    AddRoute,
    DeleteNextHop,
    DeleteRoute,
    Failure,
    NoFreeId,
    Operation,
    ReplaceRoute,
    SetSysctl,
    delta,
    explain,
)
from agent.fib import KernelState, NextHop, Route
from agent.plan import Plan
from agent.rib import Selection
from cni.marks import METRIC_BLOCKS, METRIC_IMPORTS, NEXTHOP_BASE, NEXTHOP_SPAN, PROTO_BLOCKS, PROTO_IMPORTS
from tests.agent_fakes import FakeKernel

FAMILIES = ("ipv4 unicast", "ipv6 unicast")
ALL = frozenset((p, f) for p in (PROTO_BLOCKS, PROTO_IMPORTS) for f in FAMILIES)
ONE, TWO = NextHop("10.0.1.0", 2), NextHop("10.0.2.0", 3)
SIX = NextHop("fd00:0:1::", 2)


def plan_of(routes: Iterable[Route] = (), deletable: Any = ALL, **sysctls: str) -> Plan:
    return Plan(
        routes={r.key: r for r in routes},
        deletable=deletable,
        sysctls={key.replace("__", "."): value for key, value in sysctls.items()},
        sessions=frozenset(),
        announcements=frozenset(),
        peers=(),
        conditions=(),
        selection=Selection({}, {}),
    )


def block(cidr: str = "10.244.1.0/26") -> Route:
    return Route(prefix=cidr, protocol=PROTO_BLOCKS, metric=METRIC_BLOCKS, kind="blackhole")


def imported(prefix: str, *hops: NextHop, src: str = "") -> Route:
    return Route(prefix=prefix, protocol=PROTO_IMPORTS, metric=METRIC_IMPORTS, nexthops=tuple(sorted(hops)), src=src)


def converge(wanted: Plan, kernel: FakeKernel, passes: int = 4) -> list[Operation]:
    """Applies until there is nothing to do; more than ``passes`` is a fault."""
    done: list[Operation] = []
    for _ in range(passes):
        operations = delta(wanted, kernel.read())
        if not operations:
            return done
        assert kernel.do(operations) == ()
        done += operations
    raise AssertionError(f"still at work after {passes} passes: {operations}")


def test_the_order_of_operations() -> None:
    kernel = FakeKernel()
    converge(plan_of([block("10.244.9.0/26"), imported("10.244.8.0/26", ONE)]), kernel)
    wanted = plan_of(
        [imported("10.244.2.0/26", ONE, TWO), imported("10.244.8.0/26", TWO), block()],
        net__ipv4__conf__up1__rp_filter="2",
    )
    kinds = [type(op) for op in delta(wanted, kernel.read())]
    expected = [SetSysctl, AddNextHop, AddNextHop, AddGroup, AddRoute, AddRoute, ReplaceRoute, DeleteRoute]
    assert kinds == expected
    added = [op.route.protocol for op in delta(wanted, kernel.read()) if isinstance(op, AddRoute)]
    assert added == [PROTO_BLOCKS, PROTO_IMPORTS], "blackholes first: pods wait for them"


def test_a_single_next_hop_stands_in_the_route_and_several_in_a_group() -> None:
    kernel = FakeKernel()
    converge(plan_of([imported("10.244.2.0/26", ONE), imported("10.244.3.0/26", ONE, TWO)]), kernel)
    assert kernel.routes[("10.244.2.0/26", PROTO_IMPORTS, METRIC_IMPORTS)][1] == 0
    assert kernel.routes[("10.244.3.0/26", PROTO_IMPORTS, METRIC_IMPORTS)][1] in kernel.groups


def test_equal_sets_share_a_group() -> None:
    kernel = FakeKernel()
    converge(plan_of(imported(f"10.244.{i}.0/26", ONE, TWO) for i in range(2, 9)), kernel)
    assert (len(kernel.groups), len(kernel.nexthops)) == (1, 2)


def test_a_nexthop_goes_only_when_no_route_in_the_kernel_uses_it() -> None:
    """The fake fails if a nexthop is deleted under a route: also when replacing that route was refused."""
    kernel = FakeKernel()
    converge(plan_of([imported("10.244.2.0/26", ONE, TWO)]), kernel)
    kernel.refuse = lambda op: errno.ENOBUFS if isinstance(op, (ReplaceRoute, DeleteRoute)) else 0
    for wanted in (plan_of([imported("10.244.2.0/26", ONE)]), plan_of()):
        for _ in range(3):
            kernel.do(delta(wanted, kernel.read()))
        assert kernel.imports() == {"10.244.2.0/26": (ONE, TWO)}
    kernel.refuse = lambda op: 0
    converge(plan_of(), kernel)
    assert (kernel.routes, kernel.groups, kernel.nexthops) == ({}, {}, {})


def test_a_nexthop_that_a_route_uses_without_a_group_is_kept_until_the_route_is_changed() -> None:
    kernel = FakeKernel()
    route = imported("10.244.2.0/26", ONE)
    kernel.nexthops[NEXTHOP_BASE + 1] = ONE
    kernel.routes[route.key] = (route, NEXTHOP_BASE + 1)
    first = delta(plan_of([route]), kernel.read())
    assert first == (ReplaceRoute(route, 0),)
    converge(plan_of([route]), kernel)
    assert kernel.nexthops == {}


def test_nothing_is_deleted_that_may_not_be_yet() -> None:
    kernel = FakeKernel()
    converge(plan_of([block(), imported("10.244.2.0/26", ONE, TWO), imported("fd00:10:244::/122", SIX)]), kernel)
    for deletable in (frozenset(), frozenset({(PROTO_BLOCKS, "ipv6 unicast")})):
        assert delta(plan_of(deletable=deletable), kernel.read()) == ()
    converge(plan_of(deletable=frozenset({(PROTO_IMPORTS, "ipv6 unicast")})), kernel)
    assert (kernel.blackholes(), set(kernel.imports())) == ({"10.244.1.0/26"}, {"10.244.2.0/26"})
    assert len(kernel.groups) == 1


def test_pod_routes_are_never_deleted() -> None:
    kernel = FakeKernel()
    kernel.pod(9, "ulx", 1, "10.244.1.9")
    assert delta(plan_of(), kernel.read()) == ()


def test_a_foreign_route_is_refused_by_the_kernel_and_named() -> None:
    kernel = FakeKernel()
    kernel.foreign = {("10.244.2.0/26", METRIC_IMPORTS)}
    (failure,) = kernel.do(delta(plan_of([imported("10.244.2.0/26", ONE)]), kernel.read()))
    kind, text = explain(failure)
    assert kind == "ForeignRoute"
    assert "10.244.2.0/26" in text


def test_a_member_that_the_kernel_dropped_is_put_back() -> None:
    kernel = FakeKernel()
    wanted = plan_of([imported("10.244.2.0/26", ONE, TWO)])
    converge(wanted, kernel)
    kernel.carrier(2, False)
    assert kernel.imports() == {"10.244.2.0/26": (TWO,)}
    converge(plan_of([imported("10.244.2.0/26", TWO)]), kernel)
    kernel.carrier(2, True)
    converge(wanted, kernel)
    assert kernel.imports() == {"10.244.2.0/26": (ONE, TWO)}
    assert len(kernel.groups) == 1


def test_foreign_ids_are_passed_over() -> None:
    state = msgspec.structs.replace(FakeKernel().read(), foreign_ids=frozenset({NEXTHOP_BASE + 1, NEXTHOP_BASE + 3}))
    ids = [op.id for op in delta(plan_of([imported("10.244.2.0/26", ONE, TWO)]), state) if hasattr(op, "id")]
    assert ids == [NEXTHOP_BASE + 2, NEXTHOP_BASE + 4, NEXTHOP_BASE + 5]


def test_no_free_id_is_said() -> None:
    state = KernelState(foreign_ids=frozenset(range(NEXTHOP_BASE, NEXTHOP_BASE + NEXTHOP_SPAN)))
    with pytest.raises(NoFreeId, match="ip nexthop"):
        delta(plan_of([imported("10.244.2.0/26", ONE, TWO)]), state)


@pytest.mark.parametrize(
    "operation",
    [
        SetSysctl("net.x", "1"),
        AddNextHop(7, ONE),
        AddGroup(8, (7, 9)),
        AddRoute(block()),
        ReplaceRoute(block()),
        DeleteRoute(block()),
        DeleteNextHop(7),
    ],
)
def test_every_failure_can_be_explained(operation: Operation) -> None:
    kind, text = explain(Failure(operation, errno.ENOBUFS, "No buffer space"))
    assert kind == "KernelRefused"
    assert "No buffer space" in text
    assert any(part in text for part in ("net.x", " 7", " 8", "10.244.1.0/26"))


def failing(broken: set[int]) -> Callable[[Operation], int]:
    """A failure switch: the operations with these numbers, counted from now, are refused."""
    count = itertools.count()
    return lambda _: errno.ENOBUFS if next(count) in broken else 0


HOPS = st.lists(st.sampled_from((ONE, TWO)), min_size=1, max_size=2, unique=True)
ROUTES = st.lists(
    st.one_of(
        st.sampled_from(("10.244.1.0/26", "10.244.1.64/26", "fd00:10:244::/122")).map(block),
        st.builds(
            lambda prefix, hops, src: imported(prefix, *hops, src=src),
            st.sampled_from(("10.244.2.0/26", "10.244.3.0/26", "10.244.1.0/26")),
            HOPS,
            st.sampled_from(("", "10.0.1.1", "10.0.2.1")),
        ),
    ),
    max_size=6,
)


@settings(max_examples=200)
@given(st.lists(ROUTES, min_size=1, max_size=4), st.data())
def test_any_plan_is_reached_from_any_state_and_applying_twice_changes_nothing(
    plans: list[list[Route]], data: st.DataObject
) -> None:
    kernel = FakeKernel()
    for routes in plans:
        wanted = plan_of(routes)
        # Half of it may fail on the way; the fake fails the test if anything is lost by that.
        broken = data.draw(st.sets(st.integers(0, 12), max_size=4))
        kernel.refuse = failing(broken)
        kernel.do(delta(wanted, kernel.read()))
        kernel.refuse = lambda op: 0
        converge(wanted, kernel)
        assert {key: r.route for key, r in kernel.read().routes.items()} == wanted.routes
        used = {id_ for _, id_ in kernel.routes.values() if id_}
        assert set(kernel.groups) == used
        assert set(kernel.nexthops) == {m for id_ in used for m in kernel.groups[id_]}
        assert delta(wanted, kernel.read()) == ()
