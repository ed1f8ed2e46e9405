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
from agent.delta import AddRoute, Failure, explain
from agent.fib import Installed, KernelState, NextHop, Route
from agent.look import Asked
from agent.plan import Plan, plan
from agent.plan.exports import blackhole
from agent.rib import Rib
from cni.endpoint import Address, Endpoint, Reply
from cni.marks import METRIC_IMPORTS, PROTO_IMPORTS
from cni.peer import answers
from ctl.bgp import ask, show, show_diff
from ctl.failures import Failure as Ended
from store.clock import SystemClock
from store.model import BGPNodeStatus, BGPNodeStatusStatus, FilterRuleV4, Meta, SessionStatus
from tests.agent_fakes import bgp_filter, bgp_peer, cluster, pool
from tests.agent_fakes import node as a_node
from tests.conftest import eventually
from tests.ctl_fakes import Ctl
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


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return Ctl(tmp_path, capsys)


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
    assert world.routes(peer="nobody") == look.Answer(node="node-1")


def test_a_prefix_or_address_is_shown_with_what_covers_it(world: World) -> None:
    wide = "10.244.0.0/17"
    told = (world.route(wide, ONE, 65001),)
    world.rib.apply(Update(peer=ONE, generation=1, announced=told), NOW)
    for asked in ("10.244.2.7", FAR, "10.244.2.0/30"):
        assert {r.prefix for r in world.routes(prefix=asked).routes} == {wide, FAR}, asked
    assert {r.prefix for r in world.routes(prefix=wide).routes} == {wide}


@pytest.mark.parametrize("limit", range(1, 9))
def test_answers_one_after_the_other_are_the_whole(world: World, limit: int) -> None:
    """No prefix is cut in two, twice or left out; ``more`` counts the prefixes that are left."""
    for best in (True, False):
        whole = world.routes(best=best)
        assert whole.more == 0
        rows: list[look.RoutePage] = []
        answer = world.routes(best=best, limit=limit)
        while True:
            assert len(answer.routes) <= max(limit, 2)  # a prefix of two peers is shown whole
            rows += answer.routes
            assert answer.more == len({r.prefix for r in whole.routes} - {r.prefix for r in rows})
            if not answer.more:
                break
            answer = world.routes(best=best, limit=limit, after=rows[-1].prefix)
        assert tuple(rows) == whole.routes


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
    for prefix in ("rack", "10.244.3.1/26", "10.244.3.0/33"):
        with pytest.raises(ValueError, match=r"write an address or a prefix, as 10\.244\.3\.0/26"):
            look.asked({"prefix": prefix})


def test_nobody_has_the_agent_work_at_one_answer_for_long() -> None:
    assert look.asked({"limit": "9" * 400}).limit == look.LIMIT
    assert look.asked({"limit": "0"}).limit == 1


def differs(world: World, plan: Plan, **known: Any) -> list[tuple[str, str, str, str]]:
    values: dict[str, Any] = {"status": BGPNodeStatusStatus(), "speaker": world.speaker, "failures": ()}
    answer = look.diff("node-1", plan, kernel=world.kernel, question=Asked(), **{**values, **known})
    return [(d.where, d.prefix, d.differs, d.why) for d in answer.differences]


def test_what_is_not_as_wanted_and_why(world: World) -> None:
    refused = Failure(AddRoute(Route(prefix=FAR, protocol=PROTO_IMPORTS, metric=METRIC_IMPORTS)), 17, "File exists")
    assert differs(world, world.plan(), failures=(refused,)) == [
        ("tor-2", OWN4, "not sent", ""),
        ("kernel", FAR, "missing", explain(refused)[1]),
        ("kernel", LONG, "missing", "not yet"),
        ("kernel", DENIED, "missing", "not yet"),
    ]
    pairs = frozenset({(TWO, OWN4)})
    installed = {
        route.key: Installed(route=route)
        for route in (Route(prefix=p, protocol=PROTO_IMPORTS, metric=METRIC_IMPORTS) for p in (FAR, LONG, DENIED))
    }
    world.kernel = msgspec.structs.replace(world.kernel, routes={**world.kernel.routes, **installed})
    # The filter of tor-1 and the pool of the IPv6 block are meant so.
    assert differs(world, world.plan(), speaker=SpeakerState(known=True, sent=pairs, confirmed=pairs)) == []
    more = pairs | {(TWO, "10.244.9.0/26")}
    assert differs(world, world.plan(), speaker=SpeakerState(known=True, sent=more, confirmed=more)) == [
        ("tor-2", "10.244.9.0/26", "not withdrawn", "it is being withdrawn")
    ]
    unsendable = SpeakerState(known=True, unsendable={(TWO, OWN4): "ExaBGP refused it: see exabgp.log"})
    assert differs(world, world.plan(), speaker=unsendable) == [
        ("tor-2", OWN4, "not announced", "ExaBGP refused it: see exabgp.log")
    ]
    down = BGPNodeStatusStatus(
        sessions=(SessionStatus(peer="tor-2", address=TWO, as_number=65002, state="Connecting", reason="we said: x"),)
    )
    assert differs(world, world.plan(), status=down) == [("tor-2", OWN4, "not sent", "the session is down: we said: x")]


def test_why_a_block_is_not_announced(world: World) -> None:
    world.kernel = msgspec.structs.replace(world.kernel, routes={})
    waiting = {(d[0], d[1], d[3]) for d in differs(world, world.plan()) if d[2] == "not announced"}
    own6 = "fd00:10:244::40/122"
    assert waiting == {("every peer", own, "its blackhole is not in the kernel yet") for own in (OWN4, own6)}
    refused = Failure(AddRoute(blackhole(OWN4)), 17, "File exists")
    whys = {d[3] for d in differs(world, world.plan(), failures=(refused,)) if d[1] == OWN4}
    assert whys == {explain(refused)[1]}
    # R5: a new block that somebody else's route leads into.
    world.rib.apply(Update(peer=TWO, generation=1, announced=(world.route(OWN4, TWO, 65002),)), NOW)
    whys = {d[3] for d in differs(world, world.plan()) if d[:2] == ("every peer", OWN4)}
    assert whys == {"somebody else's route is in it: ForeignRoute"}


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
    status = BGPNodeStatusStatus()
    answer = look.diff("node-1", world.plan(), status, world.speaker, world.kernel, (), Asked(limit=2))
    assert served(tmp_path, {"/bgp/diff": page(answer)}, waiting(tmp_path, lambda: show_diff(tmp_path))) == 1
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "WHERE PREFIX DIFFERS WHY",
        f"tor-2 {OWN4} not sent",
        f"kernel {FAR} missing not yet",
        "2 more",
    ]
    nothing = {"/bgp/diff": page(look.Answer(node="n", announcements=2, prefixes=3))}
    assert served(tmp_path, nothing, waiting(tmp_path, lambda: show_diff(tmp_path))) == 0
    assert capsys.readouterr().out == "nothing differs: 2 announcements, 3 prefixes let in\n"
    assert served(tmp_path, nothing, waiting(tmp_path, lambda: show_diff(tmp_path, output="json"))) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


def test_a_long_table_is_asked_for_in_parts(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Asked] = []

    def received(query: Any) -> Reply:
        asked.append(look.asked({**query, "limit": "2"}))  # an agent that answers two at a time
        return page(look.routes("n", world.plan(), world.rib, world.kernel, asked[-1], best=False))(query)

    def rows(limit: int) -> tuple[int, str]:
        asked.clear()
        work = waiting(tmp_path, lambda: show("received", tmp_path, now="", limit=limit))
        assert served(tmp_path, {"/bgp/received": received}, work) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return (len(lines) - 1, last) if "more" in last else (len(lines), "")

    assert rows(1000) == (8, "")
    assert [a.after for a in asked] == ["", FAR, LONG, DENIED]
    assert rows(4) == (4, "2 more prefixes: --limit, --peer or --prefix")
    assert len(asked) == 2


def test_what_differs_on_other_nodes_is_known_in_numbers(ctl: Ctl) -> None:
    up = SessionStatus(peer="tor-1", address=ONE, as_number=65001, state="Established", wanted=2, sent=2)
    down = SessionStatus(peer="tor-2", address=TWO, as_number=65002, state="Connecting", wanted=2, reason="we said: x")
    for name, sessions in (("node-1", (up,)), ("node-2", (up, down))):
        ctl.put(a_node(name), BGPNodeStatus(metadata=Meta(name=name), status=BGPNodeStatusStatus(sessions=sessions)))
    assert ctl.ok("bgp", "diff", "--node", "node-1") == "nothing differs, as far as the store knows\n"
    code, out, _ = ctl("bgp", "diff", "--all-nodes")
    assert code == 1
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "NODE PEER STATE WANTED SENT WHY",
        "node-2 tor-2 Connecting 2 0 we said: x",
        "which prefixes, and why: underlayctl bgp diff on that node",
    ]
    ctl.put(a_node("node-3"))
    assert "node-3: its agent has not said anything yet: is it running?" in ctl("bgp", "diff", "--all-nodes")[1]
    assert json.loads(ctl("bgp", "diff", "--all-nodes", "-o", "json")[1])["silent"] == ["node-3"]
    code, _, err = ctl("bgp", "diff", "--node", "node-9")
    assert (code, "node node-9: its agent has said nothing yet" in err) == (1, True)
    assert ctl("bgp", "diff", "--node", "node-1", "--all-nodes")[0] == 2


def test_an_agent_that_is_not_there_or_does_not_know_is_said(tmp_path: Path) -> None:
    with pytest.raises(Ended, match="does underlay-agent run on this node"):
        ask(tmp_path, "peers")

    def fails() -> int:
        with pytest.raises(Ended, match=r"the agent says 404.*older than this underlayctl"):
            ask(tmp_path, "peers")
        return 0

    assert served(tmp_path, {"/metrics": lambda _: Reply("")}, waiting(tmp_path, fails)) == 0
