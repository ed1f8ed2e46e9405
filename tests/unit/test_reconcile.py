"""The loop over a strict kernel and speaker: whatever happens, in whatever order, it ends in the same state, and on
the way nothing is announced without a blackhole, removed before its withdrawal, or deleted before its source reported.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.bgp.model import Announcement, Attributes, EndOfRib, Received, SessionDown, SessionUp, SpeakerLost, Update
from agent.delta import AddRoute, DeleteRoute, Failure, Operation, ReplaceRoute
from agent.fib import NextHop, Route
from agent.plan import Cluster
from agent.prefix import PrefixSet, parse
from agent.reconcile import RETRY, Reconciler
from cni.marks import LINK_GROUP, PROTO_BLOCKS, PROTO_IMPORTS
from store.model import Allocation, BGPNodeStatusStatus
from tests.agent_fakes import FakeKernel, FakeSpeaker, FakeView, bgp_peer, block, cluster

V4, V6 = "ipv4 unicast", "ipv6 unicast"
OWN4, OWN6 = "10.244.1.0/26", "fd00:10:244::40/122"
PEERS = {"10.0.1.0": 65001, "fd00:0:1::": 65001, "10.0.2.0": 65002, "fd00:0:2::": 65002}
FAR4, FAR6 = "10.244.2.0/26", "fd00:10:244::80/122"
ONE, TWO = NextHop("10.0.1.0", 2), NextHop("10.0.2.0", 3)


class Clock:
    """Time that only moves when told."""

    def __init__(self) -> None:
        self.time = 1000.0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> str:
        return f"t{self.time:g}"

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class Watchful(FakeKernel):
    """Also fails the test when a blackhole goes while a peer may still hold its block."""

    def __init__(self, speaker: FakeSpeaker, clock: Clock) -> None:
        super().__init__()
        self.speaker, self.clock = speaker, clock

    def _carry_out(self, operation: Operation) -> int:
        if isinstance(operation, DeleteRoute) and operation.route.protocol == PROTO_BLOCKS:
            prefix = operation.route.prefix
            assert self.speaker.known
            assert prefix not in {p for _, p in self.speaker.sent}, f"{prefix} is still at a peer"
            assert self.clock.time >= self.speaker.withdrawn_at.get(prefix, 0.0) + 1.0
        return super()._carry_out(operation)


class WatchfulSpeaker(FakeSpeaker):
    kernel: FakeKernel

    def set_announcements(self, announcements: frozenset[Announcement]) -> None:
        for announcement in announcements:
            assert announcement.prefix in self.kernel.blackholes(), f"{announcement.prefix} has no blackhole"
        super().set_announcements(announcements)


class World:
    """A node's agent and what is around it."""

    def __init__(self, start: Cluster | None = None) -> None:
        self.clock = Clock()
        self.speaker = WatchfulSpeaker()
        self.kernel = self.speaker.kernel = Watchful(self.speaker, self.clock)
        self.view = FakeView(cluster() if start is None else start)
        self.statuses: list[BGPNodeStatusStatus] = []
        self.restart()

    def restart(self) -> None:
        """A new agent process: it knows nothing."""
        self.agent = Reconciler(
            node="node-1",
            view=self.view,
            kernel=self.kernel,
            speaker=lambda: self.speaker,
            clock=self.clock,
            link_name=lambda container, interface: f"ul{container}",
            publish=self.statuses.append,
        )

    def step(self) -> float:
        return asyncio.run(self.agent.step())

    def settle(self) -> None:
        """Time passes, the speaker says what it sent, until nothing moves."""
        for _ in range(8):
            self.step()
            self.speaker.report(self.clock.time)
            self.clock.time += 1.0
        self.clock.time += 120.0
        self.step()

    def up(self, generation: int = 1, **routes: list[str]) -> None:
        """All peers come up and tell: ``tor1``, ``tor2`` for their prefixes of both families."""
        for address, asn in PEERS.items():
            self.agent.event(
                SessionUp(
                    peer=address,
                    generation=generation,
                    families=(V6,) if ":" in address else (V4,),
                    graceful_restart=(V4, V6),
                    restart_time=60,
                    helper=True,
                )
            )
            mine = routes.get("tor1" if asn == 65001 else "tor2", [])
            self.tell(address, [p for p in mine if (":" in p) == (":" in address)], generation)
            self.agent.event(EndOfRib(peer=address, generation=generation, family=V6 if ":" in address else V4))

    def tell(self, address: str, prefixes: list[str], generation: int = 1) -> None:
        told = tuple(
            Received(prefix=p, next_hop=address, attributes=Attributes(as_path=(PEERS[address],), origin="igp"))
            for p in prefixes
        )
        self.agent.event(Update(peer=address, generation=generation, announced=told))

    def conditions(self) -> dict[str, str]:
        return {c.type: c.message for c in self.statuses[-1].conditions}


@pytest.mark.parametrize("turns", range(6))
def test_an_end_that_comes_with_a_wake_is_an_end(world: World, turns: int) -> None:
    """Python 3.11's asyncio.wait_for forgets a cancellation that comes in the turn in which what it waits for is done:
    an agent lived on after its SIGTERM."""

    async def ends() -> bool:
        task = asyncio.create_task(world.agent.run())
        await asyncio.sleep(0.05)
        world.agent.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=60)
        over = task.cancelled()
        task.cancel()
        await asyncio.wait({task})
        return over

    assert asyncio.run(ends())


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.kernel.close()


def test_blackholes_then_announcements_then_quiet(world: World) -> None:
    world.step()
    assert world.kernel.blackholes() == {OWN4, OWN6}
    assert world.speaker.prefixes() == {OWN4, OWN6}
    assert len(world.speaker.history) == 1
    world.kernel.log.clear()
    world.settle()
    assert world.kernel.log == []
    assert len(world.speaker.history) == 1


def test_imports_come_in_and_change_without_a_gap(world: World) -> None:
    world.up(tor1=[FAR4, FAR6, "192.0.2.0/24"], tor2=[FAR4])
    world.step()
    assert world.kernel.imports() == {FAR4: (ONE, TWO), FAR6: (NextHop("fd00:0:1::", 2),)}
    world.kernel.log.clear()
    world.agent.event(Update(peer="10.0.2.0", generation=1, withdrawn=(FAR4,)))
    world.step()
    assert world.kernel.imports()[FAR4] == (ONE,)
    assert any(isinstance(op, ReplaceRoute) for op in world.kernel.log)
    assert not any(isinstance(op, (AddRoute, DeleteRoute)) for op in world.kernel.log)


def test_a_restart_touches_nothing_and_deletes_nothing_before_the_peers_have_told(world: World) -> None:
    world.up(tor1=[FAR4], tor2=[FAR4, "10.244.3.0/26"])
    world.settle()
    before = dict(world.kernel.routes), world.speaker.announcements
    world.restart()
    world.kernel.log.clear()
    world.step()
    world.up(generation=2, tor1=[FAR4], tor2=[FAR4])
    world.speaker.known = False
    world.step()
    world.speaker.known = True
    assert (world.kernel.log, dict(world.kernel.routes), world.speaker.announcements) == ([], *before)
    world.step()
    assert set(world.kernel.imports()) == {FAR4}, "what no peer told again goes, once all have reported"


def test_a_restart_with_a_dead_peer_keeps_its_routes_for_its_time_and_no_longer(world: World) -> None:
    world.up(tor1=[FAR4], tor2=["10.244.3.0/26"])
    world.settle()
    world.restart()
    world.step()
    for address in ("10.0.1.0", "fd00:0:1::"):
        family = V6 if ":" in address else V4
        world.agent.event(SessionUp(peer=address, generation=5, families=(family,), helper=True))
        world.tell(address, [FAR4] if family == V4 else [], 5)
        world.agent.event(EndOfRib(peer=address, generation=5, family=family))
    again = world.step()
    assert set(world.kernel.imports()) == {FAR4, "10.244.3.0/26"}
    while world.clock.time < 1000 + 400 and "10.244.3.0/26" in world.kernel.imports():
        world.clock.time = max(again, world.clock.time)
        again = world.step()
    assert set(world.kernel.imports()) == {FAR4}


def test_a_release_withdraws_waits_and_then_removes(world: World) -> None:
    world.settle()
    world.view.now = cluster(blocks=(block(OWN4, releasing=True), block(OWN6)))
    world.step()
    assert world.speaker.prefixes() == {OWN6}
    assert OWN4 in world.kernel.blackholes()
    world.speaker.report(world.clock.time)
    again = world.step()
    assert OWN4 in world.kernel.blackholes()
    assert again == pytest.approx(world.clock.time + 1.0)
    world.clock.time = again
    world.step()
    assert world.kernel.blackholes() == {OWN6}


def test_a_blackhole_that_was_removed_comes_back_without_a_withdrawal(world: World) -> None:
    world.settle()
    del world.kernel.routes[(OWN4, PROTO_BLOCKS, 512)]
    world.step()
    assert world.kernel.blackholes() == {OWN4, OWN6}
    assert len(world.speaker.history) == 1


def test_a_vanished_block_is_asked_for(world: World) -> None:
    world.settle()
    world.view.now = cluster(blocks=(block(OWN6),))
    world.step()
    assert world.view.questioned == {OWN4}


def test_a_failure_stops_nothing_else_and_is_tried_again_later_each_time(world: World) -> None:
    world.kernel.refuse = lambda op: errno.ENOBUFS if isinstance(op, AddRoute) and op.route.prefix == OWN4 else 0
    world.up(tor1=[FAR4])
    waits = []
    for _ in range(9):
        begun = world.clock.time
        waits.append(world.step() - begun)
        world.clock.time += 0.01
    assert world.kernel.blackholes() == {OWN6}
    assert set(world.kernel.imports()) == {FAR4}
    assert world.speaker.prefixes() == {OWN6}
    assert OWN4 in world.conditions()["KernelRefused"]
    assert waits[:5] == sorted(waits[:5])
    assert waits[0] <= 2 * RETRY[0]
    assert waits[4] > 8 * RETRY[0]
    world.kernel.refuse = lambda op: 0
    world.step()
    assert world.speaker.prefixes() == {OWN4, OWN6}
    assert world.conditions() == {}


def test_a_foreign_route_is_a_condition(world: World) -> None:
    world.kernel.foreign = {(FAR4, 2048)}
    world.up(tor1=[FAR4, "10.244.3.0/26"])
    world.step()
    assert set(world.kernel.imports()) == {"10.244.3.0/26"}
    assert FAR4 in world.conditions()["ForeignRoute"]


def test_a_kernel_that_cannot_be_read_changes_nothing(world: World) -> None:
    world.settle()
    world.kernel.unreadable = OSError(errno.ENOBUFS, "No buffer space")
    world.view.now = cluster(blocks=())
    world.kernel.log.clear()
    again = world.step()
    assert (world.kernel.log, world.speaker.prefixes()) == ([], {OWN4, OWN6})
    assert again - world.clock.time <= RETRY[1]
    world.kernel.unreadable = None
    world.step()
    assert world.speaker.prefixes() == set()


def test_without_any_view_nothing_is_touched() -> None:
    world = World()
    world.view.now = None
    world.step()
    assert world.kernel.log == []
    assert world.speaker.sessions is None
    world.kernel.close()


def test_a_kernel_that_never_comes_to_rest_keeps_no_announcement_back(world: World) -> None:
    """Somebody sets a sysctl back each time: the loop neither spins nor waits for it."""
    world.step()
    read = world.kernel.read

    def restless() -> Any:
        world.kernel.sysctls["net.ipv4.conf.all.rp_filter"] = "1"
        world.kernel.sysctls["net.ipv4.conf.up1.rp_filter"] = "0"
        return read()

    world.kernel.read = restless  # type: ignore[method-assign]
    world.view.now = cluster(blocks=(block(OWN4), block(OWN6), block("10.244.9.0/26")))
    begun = world.clock.time
    world.step()
    assert "10.244.9.0/26" in world.speaker.prefixes()
    assert world.clock.time > begun, "it rests"


def test_a_table_that_is_still_being_told_is_not_waited_for(world: World) -> None:
    world.settle()
    world.up(tor1=[FAR4])
    told = (f"10.244.{n}.0/26" for n in range(8, 250))
    apply = world.kernel.apply

    async def applied(operations: Sequence[Operation]) -> tuple[Failure, ...]:
        """While a pass is carried out, the next routes come."""
        attributes = Attributes(as_path=(65001,))
        route = Received(prefix=next(told), next_hop="10.0.1.0", attributes=attributes)
        world.agent.event(Update(peer="10.0.1.0", generation=1, announced=(route,)))
        return await apply(operations)

    world.kernel.apply = applied  # type: ignore[method-assign]
    before = world.clock.time
    assert world.step() == world.clock.time == before


def test_a_pod_s_route_is_repaired_after_a_while(world: World) -> None:
    allocation = Allocation(address="10.244.1.9", network="n", container="abc", interface="eth0")
    world.view.now = cluster(blocks=(block(OWN4, allocations=(allocation,)),))
    world.kernel.pod(9, "ulabc", LINK_GROUP)
    again = world.step()
    assert ("10.244.1.9/32", 141, 32) not in world.kernel.routes
    world.clock.time = again
    world.step()
    assert ("10.244.1.9/32", 141, 32) in world.kernel.routes


def test_carrier_loss_and_return(world: World) -> None:
    world.up(tor1=[FAR4], tor2=[FAR4])
    world.step()
    world.kernel.carrier(2, False)
    world.step()
    assert world.kernel.imports() == {FAR4: (TWO,)}
    world.kernel.carrier(2, True)
    world.step()
    assert world.kernel.imports() == {FAR4: (ONE, TWO)}


def test_status_counts_and_keeps_stamps(world: World) -> None:
    world.up(tor1=[FAR4, "192.0.2.0/24"])
    world.step()
    world.speaker.report(world.clock.time)
    world.clock.time += 5.0
    world.agent.event(SessionDown(peer="10.0.2.0", generation=1, reason="hold timer expired"))
    world.step()
    sessions = {s.peer: s for s in world.statuses[-1].sessions}
    one, two = sessions["tor-1-v4"], sessions["tor-2-v4"]
    assert (one.address, one.as_number, two.as_number) == ("10.0.1.0", 65001, 65002)
    assert (one.state, one.received, one.accepted, one.wanted, one.sent) == ("Established", 2, 1, 1, 1)
    assert (one.since, two.since) == ("t1000", "t1005")
    assert (two.state, two.reason, two.graceful_restart) == ("Connecting", "hold timer expired", False)


def test_a_condition_keeps_its_stamp_as_long_as_it_holds(world: World) -> None:
    def told() -> tuple[str, str, str]:
        (one,) = (c for c in world.statuses[-1].conditions if c.type == "ForeignRoute")
        return one.status, one.reason, one.last_transition_time

    world.kernel.foreign = {(FAR4, 2048)}
    world.up(tor1=[FAR4])
    world.step()
    began = told()[2]
    assert told() == ("True", "ForeignRoute", began)
    world.clock.time += 60.0
    world.step()
    assert told() == ("True", "ForeignRoute", began)
    world.kernel.foreign = set()
    world.clock.time += 60.0
    world.step()
    assert "ForeignRoute" not in world.conditions()
    world.tell("10.0.1.0", ["10.244.9.0/26"])
    world.kernel.foreign = {("10.244.9.0/26", 2048)}
    world.clock.time += 60.0
    world.step()
    again = told()[2]
    assert again not in ("", began)


# -- any sequence ------------------------------------------------------------------------------------------------------

BLOCKS = ("10.244.1.0/26", "10.244.1.64/26", "fd00:10:244::40/122")
PREFIXES = (FAR4, "10.244.3.0/26", "10.244.1.0/26", "192.0.2.0/24", FAR6)
Act = Callable[[World], None]


def set_blocks(chosen: frozenset[str], releasing: frozenset[str]) -> Act:
    def act(world: World) -> None:
        blocks = tuple(block(c, releasing=c in releasing) for c in sorted(chosen))
        assert world.view.now is not None
        world.view.now = replace(world.view.now, blocks=blocks)

    return act


def set_peers(count: int, maximum: int) -> Act:
    def act(world: World) -> None:
        assert world.view.now is not None
        peers = cluster().peers[:count]
        few = tuple(replace(p, spec=replace(p.spec, max_prefixes=maximum)) for p in peers)
        world.view.now = replace(world.view.now, peers=few)

    return act


def set_live(live: bool) -> Act:
    def act(world: World) -> None:
        assert world.view.now is not None
        world.view.now = replace(world.view.now, live=live)

    return act


def tell(address: str, prefixes: list[str], generation: int) -> Act:
    return lambda world: world.tell(address, [p for p in prefixes if (":" in p) == (":" in address)], generation)


def session(address: str, generation: int, graceful: bool) -> Act:
    families = (V6,) if ":" in address else (V4,)
    return lambda world: world.agent.event(
        SessionUp(
            peer=address,
            generation=generation,
            families=families,
            graceful_restart=families if graceful else (),
            restart_time=60,
        )
    )


def refuse(every: int) -> Act:
    def act(world: World) -> None:
        count = iter(range(1, 10**6))
        world.kernel.refuse = lambda _: errno.ENOBUFS if next(count) % every == 0 else 0

    return act


def flush(world: World) -> None:
    """``ip route flush`` by somebody, of all that is ours."""
    world.kernel.routes.clear()


ACTS: st.SearchStrategy[Act] = st.one_of(
    st.builds(set_blocks, st.frozensets(st.sampled_from(BLOCKS)), st.frozensets(st.sampled_from(BLOCKS))),
    st.builds(set_peers, st.integers(0, 4), st.sampled_from((1, 100))),
    st.builds(set_live, st.booleans()),
    st.builds(tell, st.sampled_from(tuple(PEERS)), st.lists(st.sampled_from(PREFIXES), max_size=4), st.integers(1, 2)),
    st.builds(session, st.sampled_from(tuple(PEERS)), st.integers(1, 2), st.booleans()),
    st.builds(
        lambda p, g: lambda world: world.agent.event(SessionDown(peer=p, generation=g, reason="")),
        st.sampled_from(tuple(PEERS)),
        st.integers(1, 2),
    ),
    st.builds(lambda i, on: lambda world: world.kernel.carrier(i, on), st.sampled_from((2, 3)), st.booleans()),
    st.builds(lambda on: lambda world: setattr(world.speaker, "known", on), st.booleans()),
    st.builds(refuse, st.integers(1, 5)),
    st.just(flush),
    st.just(lambda world: world.agent.event(SpeakerLost(reason="killed"))),
    st.just(World.restart),
    st.just(lambda world: world.speaker.report(world.clock.time)),
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTS, max_size=14), st.lists(st.sampled_from((0.0, 0.3, 2.0, 61.0)), min_size=14, max_size=14))
def test_any_sequence_of_events_ends_in_the_same_state(acts: list[Act], pauses: list[float]) -> None:
    world, calm = World(), World()
    try:
        for act, pause in zip(acts, pauses, strict=False):
            act(world)
            world.step()
            inside = PrefixSet(("10.244.0.0/16", "fd00:10:244::/48"))
            assert all(inside.covers(parse(p)) for p in world.kernel.imports()), "an import outside the pools"
            world.clock.time += pause
        for either in (world, calm):
            either.view.now = cluster()
            either.kernel.refuse = lambda _: 0
            either.speaker.known = True
            for index in (2, 3):
                either.kernel.carrier(index, True)
            either.step()
            either.up(generation=9, tor1=[FAR4, FAR6], tor2=[FAR4])
            either.settle()
        assert world.kernel.shown() == calm.kernel.shown()
        assert world.speaker.announcements == calm.speaker.announcements
        assert world.speaker.sessions == calm.speaker.sessions
        assert len(world.kernel.groups) == len(calm.kernel.groups) == 1
        assert world.conditions() == calm.conditions() == {}
        world.kernel.log.clear()
        world.step()
        assert world.kernel.log == []
    finally:
        world.kernel.close()
        calm.kernel.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTS, max_size=10))
def test_before_the_peers_have_reported_no_import_is_deleted(acts: list[Act]) -> None:
    """An agent that has just started, whatever it is told but for reports and time."""
    world = World()
    try:
        old = Route(prefix="10.244.77.0/26", protocol=PROTO_IMPORTS, metric=2048, nexthops=(ONE,))
        world.kernel.routes[old.key] = (old, 0)
        world.view.now = cluster(peers=(*cluster().peers, bgp_peer("z-silent", "10.0.1.9")))
        silent = world.view.now.peers[-1:]
        for act in acts:
            if act not in (flush, World.restart):
                act(world)
            assert world.view.now is not None
            if silent[0] not in world.view.now.peers:
                world.view.now = replace(world.view.now, peers=(*world.view.now.peers, *silent))
            world.step()
            assert "10.244.77.0/26" in world.kernel.imports()
    finally:
        world.kernel.close()
