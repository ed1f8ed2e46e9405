"""From the mesh to ToRs: whatever comes first at whichever node, no block is ever without a way, and in the end no
session of the mesh is left."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.adjrib import AdjRibIn
from agent.bgp.model import Announcement, Attributes, EndOfRib, Received, Session, SessionDown, SessionUp, SpeakerState
from agent.bgp.model import Update as Told
from agent.fib import Address, Installed, KernelState, Link, Route
from agent.plan import Cluster, Plan, Snapshot, plan
from agent.plan.leaving import ALONE, SETTLE, UNTOLD
from agent.rib import GRACEFUL_SHUTDOWN, Rib
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS
from tests.agent_fakes import bgp_peer, block, configuration, node, pool

V4 = "ipv4 unicast"
TOR, TOR_AS = "10.0.1.254", 65001
NUMBERS = (1, 2, 3)
MESH = configuration(node_to_node_mesh_enabled=True)
OFF = configuration(node_to_node_mesh_enabled=False)
LINK = Link(index=2, name="eth0")


def own(number: int) -> str:
    return f"10.244.{number}.0/26"


def at(number: int) -> str:
    return f"10.0.1.{number}"


class Node:
    """One node's plans, and what came of them."""

    def __init__(self, number: int, *, with_block: bool = True) -> None:
        self.number, self.rib, self.ready = number, Rib(), dict[str, float]()
        self.sessions = frozenset[Session]()
        self.announcements = frozenset[Announcement]()
        self.inherited = True
        others = tuple(node(f"node-{n}", at(n), asn="65100") for n in NUMBERS if n != number)
        self.cluster = Cluster(
            node=node(f"node-{number}", at(number), asn="65100"),
            nodes=others,
            configuration=MESH,
            pools=(pool("10.244.0.0/16"),),
            blocks=(block(own(number)),) if with_block else (),
        )
        hole = Route(prefix=own(number), protocol=PROTO_BLOCKS, metric=512, kind="blackhole")
        self.kernel = KernelState(
            routes={hole.key: Installed(route=hole)} if with_block else {},
            links={2: LINK},
            addresses=(Address(address=at(number), subnet="10.0.1.0/24", interface=2),),
        )
        self.told: dict[str, frozenset[Announcement]] = {}
        self.plan: Plan

    def step(self, now: float) -> None:
        self.rib.advance(now)
        speaker = SpeakerState(known=True, sessions=self.sessions, inherited=self.inherited)
        self.plan = plan(
            Snapshot(
                node=f"node-{self.number}",
                now=now,
                cluster=self.cluster,
                kernel=self.kernel,
                speaker=speaker,
                rib=self.rib,
                link_name=lambda container, interface: "",
                ready=self.ready,
            )
        )
        self.ready = {a: self.ready.get(a, now) for a in self.plan.ready}
        self.rib.configure(self.plan.peers, now)
        assert self.plan.sessions is not None
        assert self.plan.announcements is not None
        self.sessions, self.announcements, self.inherited = self.plan.sessions, self.plan.announcements, False

    def restart_agent(self, now: float) -> None:
        """Another agent, which hears of the sessions that are up before its first plan, and again what they carry."""
        before, self.rib, self.ready, self.inherited = self.rib, Rib(), {}, True
        for address, peer in before.peers.items():
            if peer.up:
                self.rib.apply(up(address, peer.generation), now)
                self.rib.apply(
                    Told(peer=address, generation=peer.generation, announced=tuple(peer.routes.values())), now
                )
                self.rib.apply(EndOfRib(peer=address, generation=peer.generation, family=V4), now)

    def peers(self) -> set[str]:
        return {s.address for s in self.sessions}

    def ways(self) -> dict[str, str]:
        """Prefix -> next hop of what it routes to others."""
        routes = self.plan.routes.values()
        return {r.prefix: r.nexthops[0].gateway for r in routes if r.protocol == PROTO_IMPORTS}

    def why(self) -> str:
        return next((c.message for c in self.plan.conditions if c.type == "MeshLeaving"), "")


def up(peer: str, generation: int) -> SessionUp:
    return SessionUp(
        peer=peer, generation=generation, families=(V4,), graceful_restart=(V4,), restart_time=60, helper=True
    )


def received(announcements: frozenset[Announcement], path: tuple[int, ...], via: str = "") -> tuple[Received, ...]:
    return tuple(
        Received(
            prefix=a.prefix,
            next_hop=via or a.next_hop,
            attributes=Attributes(as_path=path, origin="igp", communities=a.communities),
        )
        for a in sorted(announcements)
    )


class World:
    """Nodes on a segment with a ToR. What one announces reaches the others at once; they plan when they come to it."""

    def __init__(self, *, blockless: tuple[int, ...] = ()) -> None:
        self.now = 1000.0
        self.nodes = {n: Node(n, with_block=n not in blockless) for n in NUMBERS}
        self.blocks = {own(n): n for n in NUMBERS if n not in blockless}
        self.tor_up: set[int] = set()
        self.tor_tells = "all"
        #: Whether every node is to have a way to every block.
        self.watched = False
        self._up: set[tuple[int, int]] = set()  # 0 is the ToR
        self._generation = 0
        for _ in range(2):
            for number in NUMBERS:
                self.step(number)

    def step(self, number: int) -> None:
        self.nodes[number].step(self.now)
        self._deliver()
        self.check()

    def check(self) -> None:
        """Each node has a way to each block: to its node, or to the ToR if that has it."""
        for number, one in self.nodes.items() if self.watched else ():
            ways = one.ways()
            for prefix, owner in self.blocks.items():
                if owner != number:
                    assert prefix in ways, f"node-{number} lost {prefix}"
                    assert ways[prefix] == at(owner) or (0, owner) in self._up, f"the ToR has no {prefix}"

    def off(self, number: int, **changes: Any) -> None:
        tor = bgp_peer("tor", TOR, as_number=TOR_AS, num_allowed_local_as_numbers=1)
        one = self.nodes[number]
        one.cluster = replace(one.cluster, **{"configuration": OFF, "nodes": (), "peers": (tor,), **changes})

    def settle(self, seconds: float = 5.0) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            for number in NUMBERS:
                self.step(number)

    def _deliver(self) -> None:
        """Withdrawals, then ends of sessions, then new ones and announcements, as driver and relay do it."""
        self._tell()
        wanted = {
            (a, b) for a in NUMBERS for b in NUMBERS if a < b and at(b) in self._peers(a) and at(a) in self._peers(b)
        } | {(0, n) for n in NUMBERS if n in self.tor_up and TOR in self._peers(n)}
        for pair in sorted(self._up - wanted):
            self._end(pair)
        for pair in sorted(wanted - self._up):
            self._begin(pair)
        self._tell()

    def _peers(self, number: int) -> set[str]:
        return self.nodes[number].peers()

    def _ends(self, pair: tuple[int, int]) -> list[tuple[Node, str]]:
        a, b = pair
        return [(self.nodes[b], at(a) if a else TOR)] + ([(self.nodes[a], at(b))] if a else [])

    def _begin(self, pair: tuple[int, int]) -> None:
        self._generation += 1
        self._up.add(pair)
        for one, peer in self._ends(pair):
            one.told[peer] = frozenset()
            one.rib.apply(up(peer, self._generation), self.now)
        self._tell()
        for one, peer in self._ends(pair):
            one.rib.apply(EndOfRib(peer=peer, generation=self._generation, family=V4), self.now)

    def _end(self, pair: tuple[int, int]) -> None:
        self._up.discard(pair)
        for one, peer in self._ends(pair):
            generation = one.rib.peers[peer].generation if peer in one.rib.peers else 0
            one.rib.apply(SessionDown(peer=peer, generation=generation, reason="closed"), self.now)
            one.told.pop(peer, None)

    def _tell(self) -> None:
        for pair in sorted(self._up, reverse=True):  # the ToR last: it passes on what it has
            for one, peer in self._ends(pair):
                if peer == TOR:
                    now, path = self._of_tor(one.number), (TOR_AS, 65100)
                else:
                    other = next(n for n in NUMBERS if at(n) == peer)
                    now = frozenset(a for a in self.nodes[other].announcements if a.peer == at(one.number))
                    path = ()
                before = one.told[peer]
                if now == before or peer not in one.rib.peers:
                    continue
                gone = {a.prefix for a in before} - {a.prefix for a in now}
                via = TOR if peer == TOR else ""
                one.rib.apply(
                    Told(
                        peer=peer,
                        generation=one.rib.peers[peer].generation,
                        announced=received(now - before, path, via),
                        withdrawn=tuple(sorted(gone)),
                    ),
                    self.now,
                )
                one.told[peer] = now

    def _of_tor(self, number: int) -> frozenset[Announcement]:
        if self.tor_tells == "nothing":
            return frozenset()
        if self.tor_tells == "aggregate":
            return frozenset({Announcement(peer=at(number), prefix="10.244.0.0/16", next_hop=TOR)})
        return frozenset(
            a
            for other, one in self.nodes.items()
            if other != number and (0, other) in self._up
            for a in one.announcements
            if a.peer == TOR
        )


def meshed(**how: Any) -> World:
    world = World(**how)
    world.settle(3)
    world.watched = True
    world.check()
    assert all(one.peers() == {at(n) for n in NUMBERS if n != number} for number, one in world.nodes.items())
    return world


ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["off", "tor", "restart"]), st.sampled_from(NUMBERS)),
    st.tuples(st.just("step"), st.sampled_from(NUMBERS)),
    st.tuples(st.just("time"), st.sampled_from([0.1, 1.0, 7.0, 61.0])),
)


@settings(max_examples=150)
@given(actions=st.lists(ACTIONS, max_size=40), blockless=st.sampled_from([(), (2,), (1, 2)]))
def test_in_whatever_order_no_route_is_lost_and_the_mesh_ends(
    actions: list[tuple[str, Any]], blockless: tuple[int, ...]
) -> None:
    world = meshed(blockless=blockless)
    for action, what in actions:
        if action == "off":
            world.off(what)
        elif action == "tor":
            world.tor_up.add(what)
            world._deliver()
        elif action == "restart":
            world.nodes[what].restart_agent(world.now)
        elif action == "time":
            world.now += what
        else:
            world.step(what)
    for number in NUMBERS:
        world.off(number)
    world.settle(3)
    if not world.tor_up:
        assert all(len(one.peers()) == 3 for one in world.nodes.values()), "no ToR is up"
    world.tor_up = set(NUMBERS)
    world.settle(8)
    for number, one in world.nodes.items():
        assert one.peers() == {TOR}
        assert one.ways() == {b: TOR for b, owner in world.blocks.items() if owner != number}
        assert not one.why()


def test_a_node_that_is_ready_says_so_and_waits_for_the_other() -> None:
    world = meshed()
    for number in NUMBERS:
        world.off(number)
    world.tor_up = {1, 2}
    world.settle()
    # 1 and 2 have each other by the ToR, and 3 by the mesh alone.
    one = world.nodes[1]
    assert one.ways() == {own(2): TOR, own(3): at(3)}
    assert one.peers() == {TOR, at(3)}
    assert "mesh-node-3 (10.0.1.3) stays: no BGPPeer tells of 10.244.3.0/26" in one.why()
    assert "no BGPPeer of this node is up" in world.nodes[3].why()
    # After a minute they take it that a default route leads there; 3 knows better.
    world.settle(UNTOLD)
    assert one.ways() == {own(2): TOR, own(3): at(3)}
    assert "the other node is not ready" in one.why()
    assert {a.communities for a in one.announcements if a.peer == at(3)} == {(GRACEFUL_SHUTDOWN,)}
    assert {a.communities for a in one.announcements if a.peer == TOR} == {()}
    # The ToR does not know 3, and what 3 is told by the mesh is its only way: it is kept, at no preference.
    assert world.nodes[3].ways() == {own(1): at(1), own(2): at(2)}
    world.tor_up = {1, 2, 3}
    world.settle()
    assert all(n.peers() == {TOR} for n in world.nodes.values())


def test_an_aggregate_of_the_tor_is_a_way() -> None:
    world = meshed()
    world.tor_tells, world.watched = "aggregate", False
    for number in NUMBERS:
        world.off(number)
    world.tor_up = set(NUMBERS)
    world.settle()
    assert all(n.peers() == {TOR} and n.ways() == {"10.244.0.0/16": TOR} for n in world.nodes.values())


def test_a_tor_that_tells_nothing_is_left_to_the_node_s_default_route_after_a_minute() -> None:
    world = meshed()
    world.tor_tells = "nothing"
    for number in NUMBERS:
        world.off(number)
    world.tor_up = set(NUMBERS)
    world.settle(UNTOLD - 5)
    assert all(len(n.peers()) == 3 for n in world.nodes.values())
    world.watched = False
    world.settle(10)
    assert all(n.peers() == {TOR} and not n.ways() for n in world.nodes.values())


def test_a_route_that_the_tor_tells_and_that_is_refused_keeps_the_mesh_and_is_named() -> None:
    """One AS for all nodes, as by default, and nobody thought of numAllowedLocalASNumbers."""
    world = meshed()
    for number in NUMBERS:
        world.off(number, peers=(bgp_peer("tor", TOR, as_number=TOR_AS),))
    world.tor_up = set(NUMBERS)
    world.settle(UNTOLD + 5)
    one = world.nodes[1]
    assert one.ways() == {own(2): at(2), own(3): at(3)}
    assert "10.244.2.0/26 is refused of tor: our AS is in the AS_PATH more often than num" in one.why()


def test_without_a_peer_off_means_off_but_not_before_the_end_of_the_file() -> None:
    world = meshed()
    world.watched = False
    for number in NUMBERS:
        world.off(number, peers=())
    world.settle(ALONE - 2)
    assert all(len(n.peers()) == 2 for n in world.nodes.values())
    assert "no BGPPeer takes its place" in world.nodes[1].why()
    world.settle(4)
    assert all(n.peers() == set() and n.ways() == {} for n in world.nodes.values())


def test_a_peer_of_the_other_family_takes_no_place() -> None:
    world = meshed()
    world.watched = False
    world.off(1, peers=(bgp_peer("six", "fd00::fe"),))
    world.settle(ALONE + 2)
    assert at(2) not in world.nodes[1].peers()


def test_a_session_that_a_bgppeer_takes_over_is_no_longer_the_mesh_s() -> None:
    world = meshed()
    rack = bgp_peer("rack", at(2), as_number=65100)
    world.off(1, peers=(rack,))
    world.step(1)
    assert {(s.name, s.mesh) for s in world.nodes[1].sessions} == {("rack", False), ("mesh-node-3", True)}


def test_switched_on_again_the_mesh_goes_on_as_it_was() -> None:
    world = meshed()
    one = world.nodes[1]
    before, mesh_cluster = one.sessions, one.cluster
    world.off(1)
    world.tor_up = {1}
    world.settle(UNTOLD + 5)
    assert {a.communities for a in one.announcements if a.peer == at(2)} == {(GRACEFUL_SHUTDOWN,)}
    one.cluster = replace(mesh_cluster, peers=one.cluster.peers)
    world.settle(1)
    assert one.sessions > before
    assert {a.communities for a in one.announcements} == {()}
    assert not one.why()


def test_a_dead_node_s_session_ends_when_its_routes_are_over() -> None:
    world = meshed()
    one = world.nodes[1]
    world.watched = False
    one.rib.apply(SessionDown(peer=at(3), generation=99, reason="gone"), world.now)
    world.off(1)
    one.step(world.now)
    assert at(3) in one.peers()
    one.step(world.now + 61.0)
    assert at(3) not in one.peers()
    assert at(2) in one.peers()


@pytest.mark.parametrize("late", [0.0, SETTLE])
def test_time_alone_wakes_it(late: float) -> None:
    world = meshed()
    world.off(1)
    world.tor_up = {1}
    world.tor_tells = "aggregate"
    world.step(1)
    world.step(1)
    assert world.nodes[1].plan.wake_at == world.now + SETTLE
    world.now += late
    world.step(1)
    marked = {a.communities for a in world.nodes[1].announcements if a.peer == at(2)}
    assert marked == ({(GRACEFUL_SHUTDOWN,)} if late else {()})


def test_what_is_not_told_to_its_end_is_no_reason_to_go() -> None:
    """Neither a ToR's routes, nor those of the mesh after a restart of the agent."""
    world = meshed()
    one = world.nodes[1]
    world.off(1)
    one.step(world.now)
    told = Received(prefix="10.244.0.0/16", next_hop=TOR, attributes=Attributes(as_path=(TOR_AS,), origin="igp"))
    one.rib.apply(up(TOR, 1), world.now)
    one.rib.apply(Told(peer=TOR, generation=1, announced=(told,)), world.now)
    one.step(world.now)
    assert not one.ready
    assert "has told all its routes" in one.why()
    one.rib.apply(EndOfRib(peer=TOR, generation=1, family=V4), world.now)
    one.step(world.now)
    assert one.ready.keys() == {at(2), at(3)}
    one.rib.peers[at(2)] = AdjRibIn(world.now)
    one.rib.apply(up(at(2), 99), world.now)
    one.step(world.now)
    assert one.ready.keys() == {at(3)}
    assert "mesh-node-2 (10.0.1.2) stays: it has not told all its routes" in one.why()
