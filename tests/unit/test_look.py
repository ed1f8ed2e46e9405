"""What people see of BGP on a node, and ``underlayctl bgp`` over a real socket of such an agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import look
from agent.bgp.history import History
from agent.bgp.model import (
    Capabilities,
    Change,
    EndOfRib,
    Notification,
    Received,
    SessionChanges,
    SessionUp,
    SpeakerState,
    Update,
)
from agent.fib import Installed, KernelState, NextHop, Route
from agent.look import Asked
from agent.plan import Plan, plan
from agent.rib import Rib
from cni.endpoint import Address, Endpoint, Reply
from cni.marks import METRIC_IMPORTS, PROTO_IMPORTS
from ctl.bgp import ask, show, show_diff
from ctl.failures import Failure
from lab.processes import answers
from store.clock import SystemClock
from store.model import BGPNodeStatusStatus, FilterRuleV4, SessionStatus
from tests.agent_fakes import bgp_filter, bgp_peer, cluster, pool
from tests.conftest import eventually
from tests.unit.test_plan import OWN4, V4, kernel_of, snapshot
from tests.unit.test_rib import route

NOW = 1000.0
ONE, TWO = "10.0.1.0", "10.0.2.0"
FAR, LONG, DENIED, OUTSIDE = "10.244.2.0/26", "10.244.3.0/26", "10.244.4.0/26", "192.0.2.0/24"


class World:
    """A node with two ToRs; the first one's routes go through a filter."""

    def __init__(self) -> None:
        deny = FilterRuleV4(action="Reject", cidr=DENIED, match_operator="Equal")
        self.cluster = cluster(
            peers=(bgp_peer("tor-1", ONE, as_number=65001, filters=("deny",)), bgp_peer("tor-2", TWO, as_number=65002)),
            filters=(bgp_filter("deny", import_v4=(deny,), export_v4=(FilterRuleV4(action="Reject"),)),),
            pools=(pool("10.244.0.0/16"), pool("fd00:10:244::/48", disable_bgp_export=True)),
        )
        self.rib = Rib()
        self.kernel = kernel_of(OWN4, "fd00:10:244::40/122")
        self.speaker = SpeakerState(known=True)
        self.rib.configure(self.plan().peers, NOW)
        for peer, asn in ((ONE, 65001), (TWO, 65002)):
            agreed = Capabilities(refresh=True, enhanced=True, asn4=True, hold_time=9, router_id="10.255.1.1")
            up = SessionUp(
                peer=peer, generation=1, families=(V4,), graceful_restart=(V4,), restart_time=60, capabilities=agreed
            )
            self.rib.apply(up, NOW)
            told = (
                self.route(FAR, peer, asn),
                self.route(LONG, peer, asn, *([65009] if peer == TWO else [])),
                self.route(DENIED, peer, asn),
                self.route(OUTSIDE, peer, asn),
            )
            self.rib.apply(Update(peer=peer, generation=1, announced=told), NOW)
            self.rib.apply(EndOfRib(peer=peer, generation=1, family=V4), NOW)

    def route(self, prefix: str, peer: str, *path: int) -> Received:
        return msgspec.structs.replace(route(prefix, peer, as_path=path), prefix=prefix)

    def plan(self, **changes: Any) -> Plan:
        return plan(snapshot(cluster=self.cluster, rib=self.rib, kernel=self.kernel, speaker=self.speaker, **changes))

    def routes(self, *, best: bool = False, **asked: Any) -> look.Answer:
        return look.routes("node-1", self.plan(), self.rib, self.kernel, Asked(**asked), best=best)


@pytest.fixture
def world() -> World:
    return World()


def test_what_became_of_each_path_and_what_it_was_that_decided(world: World) -> None:
    found = {(r.prefix, r.peer): (r.state, r.why) for r in world.routes().routes}
    outside = "the prefix is inside no pool and no importCIDRs"
    assert found == {
        (FAR, "tor-1"): ("best", ""),
        (FAR, "tor-2"): ("best", ""),
        (LONG, "tor-1"): ("best", ""),
        (LONG, "tor-2"): ("worse", "shortest as path"),
        (DENIED, "tor-1"): ("refused", "BGPFilter deny, importV4[0] rejects it"),
        (DENIED, "tor-2"): ("best", ""),
        (OUTSIDE, "tor-1"): ("refused", outside),
        (OUTSIDE, "tor-2"): ("refused", outside),
    }


def test_which_are_let_in_and_in_the_kernel(world: World) -> None:
    installed = Route(prefix=FAR, protocol=PROTO_IMPORTS, metric=METRIC_IMPORTS, nexthops=(NextHop(ONE, 2),))
    routes = {**world.kernel.routes, installed.key: Installed(route=installed)}
    world.kernel = msgspec.structs.replace(world.kernel, routes=routes)
    found = world.routes(best=True)
    assert {(r.prefix, r.in_kernel) for r in found.routes} == {(FAR, True), (LONG, False), (DENIED, False)}
    assert isinstance(world.kernel, KernelState)


def test_one_peer_one_prefix_and_what_is_left_off(world: World) -> None:
    assert {(r.peer, r.prefix) for r in world.routes(peer="tor-2", prefix=FAR).routes} == {("tor-2", FAR)}
    assert world.routes(peer=TWO).routes == world.routes(peer="tor-2").routes
    few = world.routes(limit=3)
    assert (len(few.routes), few.more) == (3, 5)
    assert world.routes(peer="nobody") == look.Answer(node="node-1")


def test_what_a_peer_is_told_and_what_keeps_the_rest_back(world: World) -> None:
    pairs = frozenset({(TWO, OWN4)})
    speaker = SpeakerState(known=True, sent=pairs | {(TWO, "10.244.9.0/26")}, confirmed=pairs)
    answer = look.advertised("node-1", world.plan(), speaker, Asked())
    assert [(r.peer, r.prefix, r.state, r.why) for r in answer.advertised] == [
        ("tor-1", OWN4, "withheld", "BGPFilter deny, exportV4[0] rejects it"),
        ("tor-2", OWN4, "sent", ""),
        ("tor-2", "10.244.9.0/26", "not wanted", "it is being withdrawn"),
    ]
    world.kernel = kernel_of()
    waiting = look.advertised("node-1", world.plan(), speaker, Asked(prefix=OWN4)).advertised
    assert ("", "withheld", "its blackhole is not in the kernel yet") in {(r.peer, r.state, r.why) for r in waiting}


def test_a_session_with_what_was_agreed_and_what_became_of_it(world: World) -> None:
    history = History()
    said = Notification(sent=False, code=6, subcode=2, text='"rack 7"')
    down = Change(state="down", generation=1, at=0, last=0, reason="x", notification=said)
    history.take(SessionChanges(peer=ONE, changes=(down, Change(state="up", generation=2, at=9, last=9))))
    status = BGPNodeStatusStatus(
        sessions=(SessionStatus(peer="tor-1", address=ONE, as_number=65001, state="Established", received=4),)
    )
    (page,) = look.peers("node-1", status, world.rib, history, Asked()).peers
    assert (page.families, page.graceful, page.restart_time, page.hold_time) == ((V4,), (V4,), 60, 9)
    assert page.capabilities == ("route refresh (enhanced)", "4-byte AS")
    assert [(h.state, h.at, h.why) for h in page.history] == [
        ("down", "1970-01-01T00:00:00Z", 'the peer said: Cease, Administrative Shutdown: "rack 7"'),
        ("up", "1970-01-01T00:00:09Z", ""),
    ]


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=many: write a number of rows"):
        look.asked({"limit": "many"})


# -- the command, over a socket ------------------------------------------------------------------------------------


def served(run: Path, pages: dict[str, Callable[[Any], Reply]], work: Callable[[], int]) -> int:
    """What ``work`` returns while an agent answers in that run directory."""

    async def main() -> int:
        endpoint = asyncio.create_task(Endpoint(Address(path=str(run / "agent.sock")), pages, SystemClock()).run())
        try:
            return await asyncio.get_running_loop().run_in_executor(None, work)
        finally:
            endpoint.cancel()

    return asyncio.run(main())


def page(answer: look.Answer) -> Callable[[Any], Reply]:
    return lambda _: Reply(msgspec.json.encode(answer), "application/json")


def waiting(run: Path, work: Callable[[], int]) -> Callable[[], int]:
    def once() -> int:
        eventually(lambda: answers(run / "agent.sock"))
        return work()

    return once


def test_the_commands_print_it(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = {"/bgp/received": page(world.routes())}
    work = waiting(tmp_path, lambda: show("received", tmp_path, now="2026-11-26T00:00:00Z"))
    assert served(tmp_path, pages, work) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["PREFIX", "PEER", "NEXT-HOP", "STATE", "KERNEL", "AS-PATH", "MED", "COMMUNITIES", "WHY"]
    assert any("BGPFilter deny, importV4[0] rejects it" in line and line.startswith(DENIED) for line in out)
    work = waiting(tmp_path, lambda: show("received", tmp_path, now="", output="json"))
    assert served(tmp_path, pages, work) == 0
    assert len(json.loads(capsys.readouterr().out)["routes"]) == 8


def test_diff_ends_with_1_if_anything_is_not_as_wanted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = SpeakerState(known=True)
    pages = {
        "/bgp/advertised": page(look.advertised("node-1", world.plan(), speaker, Asked())),
        "/bgp/routes": page(world.routes(best=True)),
    }
    assert served(tmp_path, pages, waiting(tmp_path, lambda: show_diff(tmp_path))) == 1
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["WHERE", "PREFIX", "DIFFERS"],
        ["tor-2", OWN4, "not"],
        ["kernel", FAR, "missing"],
        ["kernel", LONG, "missing"],
        ["kernel", DENIED, "missing"],
    ]
    nothing = {"/bgp/advertised": page(look.Answer(node="n")), "/bgp/routes": page(look.Answer(node="n"))}
    assert served(tmp_path, nothing, waiting(tmp_path, lambda: show_diff(tmp_path))) == 0
    assert capsys.readouterr().out == "nothing differs: 0 announcements, 0 paths\n"


def test_an_agent_that_is_not_there_or_does_not_know_is_said(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="does underlay-agent run on this node"):
        ask(tmp_path, "peers")

    def fails() -> int:
        with pytest.raises(Failure, match=r"the agent says 404.*older than this underlayctl"):
            ask(tmp_path, "peers")
        return 0

    assert served(tmp_path, {"/metrics": lambda _: Reply("")}, waiting(tmp_path, fails)) == 0
