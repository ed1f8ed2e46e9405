"""The node-to-node mesh with real agents, speakers and kernels: nothing configured, nodes come and go, and the way from
the mesh to ToRs and back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp.segment import TOR4, TOR6, Pings, Segment, addresses, blocks, name, start_tor, straight
from tests.conftest import eventually


@pytest.fixture
def segment(net: Net, tmp_path: Path) -> Iterator[Segment]:
    made = Segment(net, tmp_path)
    yield made
    for number in made.agents:
        print(f"--- {name(number)}\n{(made.home(number) / 'agent.log').read_text()[-3000:]}")
        log = made.home(number) / "run/speaker/exabgp.log"
        print(log.read_text()[-3000:] if log.exists() else "no exabgp.log")


def pinged(segment: Segment, numbers: tuple[int, ...]) -> Pings:
    """A mesh of these nodes, with a pod on each, and packets between all pods."""
    for number in numbers:
        segment.add(number, with_pod=True)
        segment.start(number)
    eventually(lambda: segment.meshed(numbers))
    pings = Pings(segment, numbers)
    pings.go_on()
    return pings


def test_nodes_on_a_segment_mesh_by_themselves_and_come_and_go_alone(segment: Segment) -> None:
    for number in (2, 3, 4):
        segment.add(number)
        segment.start(number)
    eventually(lambda: segment.meshed((2, 3, 4)))
    before = {n: segment.connections(n) for n in (2, 3, 4)}
    assert {n: len(c) for n, c in before.items()} == {2: 4, 3: 4, 4: 4}

    def kept() -> None:
        for number, connections in before.items():
            assert connections <= segment.connections(number), f"a session of {name(number)} flapped"

    segment.add(1)  # it sorts first: all wait for it, and those that never waited have to begin to
    segment.start(1)
    segment.add(5)
    segment.start(5)
    eventually(lambda: segment.meshed((1, 2, 3, 4, 5)))
    kept()
    segment.stop(1)
    segment.stop(5)
    eventually(lambda: segment.meshed((2, 3, 4)))
    kept()
    assert all(segment.connections(n) == before[n] for n in before)


def test_the_family_that_kubelets_do_not_report_is_found_told_and_followed(segment: Segment) -> None:
    """Two Nodes have an IPv4 InternalIP alone, the third has both: all are peers by both."""
    numbers = (1, 2, 3)
    for number in numbers:
        segment.add(number, reported=2 if number == 3 else 1)
        segment.start(number)
    eventually(lambda: segment.meshed(numbers))

    def found() -> bool:
        told = {number: segment.status(number) for number in numbers}
        assert {n: s.status.address_source for n, s in told.items() if s} == {1: "Detected", 2: "Detected", 3: ""}
        assert {n: s.status.addresses for n, s in told.items() if s} == {n: addresses(n) for n in numbers}
        return True

    eventually(found)

    before, after = addresses(2)[1], f"{addresses(2)[1]}2"
    segment.net.ip(name(2), [f"address del {before}/64 dev eth0", f"address add {after}/64 nodad dev eth0"])
    six = blocks(2)[1]
    eventually(lambda: [segment.imports(n).get(six) for n in (1, 3)] == [(after,), (after,)])
    # Nothing else has moved.
    four = blocks(2)[0]
    assert [segment.imports(n).get(four) for n in (1, 3)] == [(addresses(2)[0],)] * 2


def test_a_pool_that_is_deleted_under_live_pods_cuts_nobody_off(segment: Segment) -> None:
    """Also not at an agent that is started again: what it has let in it knows from its disk."""
    numbers = (1, 2, 3)
    pings = pinged(segment, numbers)
    for pool in ("v4", "v6"):
        segment.delete_pool(pool)
    told = "IPPool v4: it was deleted, and pods live in it"
    eventually(lambda: all(told in segment.conditions(n).get("ObjectNotUsable", "") for n in numbers))
    pings.go_on()
    segment.end(segment.agents, 1)
    segment.start_agent(1)
    segment.end(segment.speakers, 2, signal.SIGKILL)
    segment.start_speaker(2)
    eventually(lambda: "SpeakerUnreachable" not in segment.conditions(2))
    pings.go_on()
    eventually(lambda: segment.meshed(numbers))
    assert pings.stop() == {}


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_from_the_mesh_to_a_tor_and_back_nothing_is_lost(segment: Segment, kind: str) -> None:
    numbers = (1, 2, 3)
    pings = pinged(segment, numbers)

    # As one file may say it, whichever comes first. The ToR is not there yet: the mesh stays, whatever is restarted.
    segment.mesh(on=False)
    segment.peer_with_tor()
    eventually(lambda: all("MeshLeaving" in segment.conditions(n) for n in numbers))
    segment.end(segment.agents, 1)
    segment.start_agent(1)
    segment.end(segment.speakers, 2, signal.SIGKILL)
    segment.start_speaker(2)
    for processes in (segment.agents, segment.speakers):
        segment.end(processes, 3)
    segment.start(3)
    eventually(lambda: all(len(segment.connections(n)) == 4 for n in numbers))
    said = eventually(lambda: segment.conditions(2).get("MeshLeaving"))
    assert "mesh-node-01 (10.0.0.1) stays: no BGPPeer of this node is up and has told all its routes" in said
    pings.go_on()
    assert segment.meshed(numbers)

    start_tor(segment, kind)
    by_tor = {n: {b: (TOR6 if ":" in b else TOR4,) for m in numbers if m != n for b in blocks(m)} for n in numbers}
    eventually(lambda: all(segment.imports(n) == by_tor[n] for n in numbers))
    eventually(lambda: all(len(segment.connections(n)) == 2 for n in numbers))
    eventually(lambda: not any("MeshLeaving" in segment.conditions(n) for n in numbers))
    pings.go_on()

    segment.mesh(on=True)
    eventually(lambda: all(segment.imports(n) == straight(n, numbers) for n in numbers))
    pings.go_on()
    assert pings.stop() == {}
