"""The node-to-node mesh with real agents, speakers and kernels: nothing configured, nodes come and go, and the way from
the mesh to ToRs and back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.net import Net
from tests.bgp.segment import TOR4, TOR6, Pings, Segment, blocks, name, start_tor, straight
from tests.conftest import eventually


@pytest.fixture
def segment(net: Net, tmp_path: Path) -> Iterator[Segment]:
    made = Segment(net, tmp_path)
    yield made
    for number in made.agents:
        print(f"--- {name(number)}\n{(made.home(number) / 'agent.log').read_text()[-3000:]}")
        log = made.home(number) / "run/speaker/exabgp.log"
        print(log.read_text()[-3000:] if log.exists() else "no exabgp.log")


def test_nodes_on_a_segment_mesh_by_themselves_and_come_and_go_alone(segment: Segment) -> None:
    for number in (2, 3, 4):
        segment.add(number)
        segment.start(number)
    eventually(lambda: segment.meshed((2, 3, 4)), limit=60)
    before = {n: segment.connections(n) for n in (2, 3, 4)}
    assert {n: len(c) for n, c in before.items()} == {2: 4, 3: 4, 4: 4}

    def kept() -> None:
        for number, connections in before.items():
            assert connections <= segment.connections(number), f"a session of {name(number)} flapped"

    segment.add(1)  # it sorts first: all wait for it, and those that never waited have to begin to
    segment.start(1)
    segment.add(5)
    segment.start(5)
    eventually(lambda: segment.meshed((1, 2, 3, 4, 5)), limit=60)
    kept()
    segment.stop(1)
    segment.stop(5)
    eventually(lambda: segment.meshed((2, 3, 4)), limit=60)
    kept()
    assert all(segment.connections(n) == before[n] for n in before)


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_from_the_mesh_to_a_tor_and_back_nothing_is_lost(segment: Segment, kind: str) -> None:
    numbers = (1, 2, 3)
    for number in numbers:
        segment.add(number, with_pod=True)
        segment.start(number)
    eventually(lambda: segment.meshed(numbers), limit=60)
    pings = Pings(segment, numbers)
    pings.go_on()

    # As one file may say it, whichever comes first. The ToR is not there yet: the mesh stays, whatever is restarted.
    segment.mesh(on=False)
    segment.peer_with_tor()
    eventually(lambda: all("MeshLeaving" in segment.conditions(n) for n in numbers), limit=20)
    segment.end(segment.agents, 1)
    segment.start_agent(1)
    segment.end(segment.speakers, 2, signal.SIGKILL)
    segment.start_speaker(2)
    for processes in (segment.agents, segment.speakers):
        segment.end(processes, 3)
    segment.start(3)
    eventually(lambda: all(len(segment.connections(n)) == 4 for n in numbers), limit=60)
    said = eventually(lambda: segment.conditions(2).get("MeshLeaving"), limit=20)
    assert "mesh-node-01 (10.0.0.1) stays: no BGPPeer of this node is up and has told all its routes" in said
    pings.go_on()
    assert segment.meshed(numbers)

    start_tor(segment, kind)
    by_tor = {n: {b: (TOR6 if ":" in b else TOR4,) for m in numbers if m != n for b in blocks(m)} for n in numbers}
    eventually(lambda: all(segment.imports(n) == by_tor[n] for n in numbers), limit=60)
    eventually(lambda: all(len(segment.connections(n)) == 2 for n in numbers), limit=60)
    eventually(lambda: not any("MeshLeaving" in segment.conditions(n) for n in numbers), limit=20)
    pings.go_on()

    segment.mesh(on=True)
    eventually(lambda: all(segment.imports(n) == straight(n, numbers) for n in numbers), limit=60)
    pings.go_on()
    assert pings.stop() == {}
