"""ExaBGP's faults 11 to 16 (exabgp.md), each provoked twice (faults.py): routes, and what is around a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.bgp import conf, driver, events, speaker
from agent.bgp.driver import Driver, exabgp_validate
from agent.bgp.model import Event, Update
from agent.filters import Rule
from agent.plan.exports import announcement
from agent.rib import Peer, Policy, Rib
from lab.net import Net
from tests.bgp.conftest import BOTH, SESSIONS, Node, Witness, announce, blocks, ended, run, session, until
from tests.bgp.faults import FIRST, SECOND, Without, downs, handled, ups
from tests.bgp.routers import NODE4, NODE6, NODE_AS, TOR4, TOR6, TOR_AS, Bird, Router


@handled
def test_fault_11_the_end_of_rib_comes_before_the_table(
    router: Router,
    node: Node,
    net: Net,
    without: Without,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    handled: bool,
) -> None:
    """ExaBGP's own. The peer takes it for all there is, while the relay is late, here with no agent."""
    without("haste")
    neighbor = conf._neighbor
    if not handled:
        monkeypatch.setattr(conf, "_neighbor", lambda s, name: neighbor(s, name).replace("manual-eor true;", ""))
    wanted = blocks(4)
    prefixes = {a.prefix for a in wanted}

    async def main() -> None:
        router.start()
        node.start()
        late = node.folder / "late"
        late.touch()
        async with node.driver() as (one, _):
            one.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            one.set_announcements(wanted)
            await until(lambda: len(one.state().confirmed) == 4)
            await witness.begin(prefixes)
        node.kill()
        await until(router.stale)
        late.unlink()
        node.start()
        await (asyncio.sleep(2) if handled else until(witness.seen))
        late.touch()
        await until(lambda: not router.stale())
        await until(lambda: router.table().keys() == prefixes)
        assert (witness.seen() == []) == handled

    run(main())


def test_no_end_of_rib_before_the_first_table(router: Router, node: Node) -> None:
    """The other way round: a relay that lost its table must not have the peer sweep our routes."""

    async def main() -> None:
        router.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(4))
            await until(lambda: router.table().keys() == {a.prefix for a in blocks(4)})
            await until(lambda: len(driver.state().confirmed) == 4)
        node.kill()
        table = node.folder / "table.json"
        table.write_text(table.read_text().replace("10.244.0.0/26", "10.244.0.0/27"))
        await until(router.stale)
        log = node.folder / "exabgp.log"
        before = log.read_text().count("connected to peer")  # the first connections may have met FRR's own, and ended
        node.start()
        await until(lambda: "damaged" in node.log.read_text())
        await until(lambda: log.read_text().count("connected to peer") >= before + 2)
        await asyncio.sleep(0.5)  # long enough for an End-of-RIB that must not come
        assert router.stale()
        assert router.table().keys() == {a.prefix for a in blocks(4)}
        async with node.driver() as (driver, _):
            driver.set_announcements(blocks(2))
            await until(lambda: router.table().keys() == {a.prefix for a in blocks(2)})
            await until(lambda: not router.stale())

    run(main())


@handled
def test_fault_12_a_down_peer_withdraws_nothing(
    bird: Bird, node: Node, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """So what the agent knows of its routes goes with the session that told them."""
    down, told = Driver._down, list[str]()

    def silent(self: Driver, peer: str, generation: int, reason: str) -> None:
        if handled:
            down(self, peer, generation, reason)
        if peer in self._generations or handled:
            told.append(peer)

    monkeypatch.setattr(Driver, "_down", silent)
    peer = Peer(address=TOR4, name="tor", peer_as=TOR_AS, local_as=NODE_AS, families=BOTH, max_restart_time=0)
    policy = Policy(peers=(peer,), allowed=frozenset({"10.9.0.0/16"}), on_link=frozenset({("10.0.1.0/24", 2)}))

    def best(heard: list[Event]) -> set[str]:
        rib = Rib()
        rib.configure((peer,), 0.0)
        for event in heard:
            rib.apply(event, 0.0)
        return set(rib.select(policy).best)

    async def main() -> None:
        bird.start(["10.9.0.0/24"], graceful=False)
        node.start()
        async with node.driver() as (one, heard):
            one.set_sessions(frozenset({session("4")}))
            await until(lambda: best(heard) == {"10.9.0.0/24"})
            bird.stop()
            await until(lambda: TOR4 in told)
            assert not any(e.withdrawn for e in heard if isinstance(e, Update))
            assert best(heard) == (set() if handled else {"10.9.0.0/24"})

    run(main())


@handled
def test_fault_13_next_hop_self_is_the_router_id(
    bird: Bird, node: Node, without: Without, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """IPv4 over an IPv6 session; IPv6 over an IPv4 session is an error. Next hops are explicit, as any other is refused
    and named."""
    if not handled:
        monkeypatch.setattr(driver, "_unsendable", lambda announcement: "")
        without("hops")
    four = announce("10.244.7.0/26", peer=TOR6, next_hop="self")
    six = announce("fd00:10:244::/122", peer=TOR4, next_hop="self")
    plain = announce("10.244.8.0/26", peer=TOR6)

    def hop(prefix: str) -> str:
        return bird.ask("show", "route", prefix, "all").partition("BGP.next_hop: ")[2].split("\n")[0]

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (one, _):
            one.set_sessions(frozenset({session("4"), session("6", router_id="10.0.1.77")}))
            one.set_announcements(frozenset({four, six, plain}))
            await until(lambda: hop(plain.prefix) == NODE4)
            if handled:
                assert one.state().unsendable.keys() == {(a.peer, a.prefix) for a in (four, six)}
                assert bird.table().keys() == {plain.prefix}
                return
            await until(lambda: hop(four.prefix) == "10.0.1.77")
            await until(lambda: one.state().unsendable.keys() == {(TOR4, six.prefix)})

    run(main())


@handled
def test_fault_14_two_next_hops_are_two_paths(
    bird: Bird, node: Node, net: Net, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """BIRD gives a global and a link-local next hop, ExaBGP reports the route under both."""
    if not handled:
        monkeypatch.setattr(events, "_link_local", lambda address: False)

    async def main() -> None:
        await until(lambda: "tentative" not in net.run("tor", ["ip", "-6", "addr", "show", "dev", "down0"]).stdout)
        bird.start(["fd09::/64"])
        node.start()
        async with node.driver() as (one, heard):
            one.set_sessions(SESSIONS)
            await until(lambda: len(ended(heard)) == 4)
            hops = {r.next_hop for e in heard if isinstance(e, Update) for r in e.announced if r.prefix == "fd09::/64"}
            assert (hops == {TOR6}) == handled, hops
            assert handled or any(hop.startswith("fe80:") for hop in hops)

    run(main())


@handled
def test_fault_15_a_next_hop_of_the_other_family(
    bird: Bird, node: Node, without: Without, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """ExaBGP answers done. Of one route it sends nothing; in a batch it sends what makes the peer end the session, each
    time it comes up. It is never said, and named."""
    if not handled:
        monkeypatch.setattr(driver, "_unsendable", lambda announcement: "")
        without("hops")
    odd = announce("10.244.7.0/26", next_hop=NODE6)

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (one, heard):
            one.set_sessions(SESSIONS)
            one.set_announcements(frozenset({odd, FIRST}))
            if not handled:
                await until(lambda: downs(heard).count(TOR4) > 1)
                assert "Optional attribute error" in (bird.folder / "log").read_text()
                return
            await until(lambda: one.state().confirmed == {(TOR4, FIRST.prefix)})
            await until(lambda: bird.table().keys() == {FIRST.prefix})
            assert one.state().unsendable.keys() == {(TOR4, odd.prefix)}
            assert one.state().sent == one.state().confirmed
            assert downs(heard) == []

    run(main())


@handled
def test_fault_16_an_explicit_as_path_is_sent_verbatim(router: Router, node: Node, handled: bool) -> None:
    """So one towards an eBGP peer begins with our AS."""
    prefix = "10.244.0.0/26"
    given = announcement(prefix, session("4"), Rule(name="far", accept=True, prepend=(65009,)))
    if not handled:
        given = replace(given, as_path=given.as_path[1:])

    async def main() -> None:
        router.start([])
        node.start()
        async with node.driver() as (one, _):
            one.set_sessions(SESSIONS)
            one.set_announcements(frozenset({given, FIRST}))
            await until(lambda: FIRST.prefix in router.table())
            one.set_announcements(frozenset({given, FIRST, SECOND}))
            await until(lambda: SECOND.prefix in router.table())
            if handled:
                await until(lambda: router.paths().get(prefix) == (NODE_AS, 65009))
            else:
                assert router.paths().get(prefix, ()) in {(), (65009,)}

    run(main())


@handled
def test_one_link_local_address_on_two_interfaces(
    bird: Bird, node: Node, monkeypatch: pytest.MonkeyPatch, handled: bool
) -> None:
    """Makes ExaBGP's whole file invalid. Such peers are refused with a sentence, and the others are up."""
    twins = [session("6", name=name, address="fe80::2", local_address="fe80::1") for name in ("left", "right")]

    async def main() -> None:
        bird.start()
        if not handled:
            path = speaker.prepare(node.folder)
            path.write_text(conf.render([session("4"), *twins], speaker.relay_command(node.folder)))
            assert "duplicate peer definition" in await exabgp_validate(path)
            return
        node.start()
        async with node.driver() as (one, heard):
            one.set_sessions(frozenset({session("4"), *twins}))
            await until(lambda: ups(heard) == [TOR4])
            assert one.state().refused == {"fe80::2": "peer fe80::2 is link-local: give the peer's global address"}

    run(main())


def test_family_that_the_peer_does_not_speak(bird: Bird, node: Node) -> None:
    """Wanted, never sent, and it holds nothing up."""
    only4 = session("4", families=("ipv4 unicast",))

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(frozenset({only4}))
            driver.set_announcements(frozenset({announce("10.244.8.0/26"), announce("fd00:10:244::/122", peer=TOR4)}))
            await until(lambda: driver.state().confirmed == {(TOR4, "10.244.8.0/26")})
            assert driver.state().sent == {(TOR4, "10.244.8.0/26")}
            driver.set_announcements(frozenset())
            await until(lambda: driver.state().sent == frozenset())

    run(main())


def test_gaps_heal(bird: Bird, node: Node, net: Net, tmp_path: Path) -> None:
    """The table is asserted now and then, on the wire; a peer that has it all does not notice."""
    node.options = ("--assert-every", "0.5")
    everything = {a.prefix for a in blocks(4)}

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            await witness.begin(everything)
            await asyncio.sleep(1.2)  # two assertions
            assert witness.seen() == []
            # BIRD asks for nothing when its filter changes softly: it loses a route now, and does not get it back.
            config = bird.folder / "bird.conf"
            plain = config.read_text()
            config.write_text(plain.replace("import all;", "import where net != 10.244.0.0/26;"))
            bird.ask("configure", "soft")
            await until(lambda: bird.table().keys() == everything - {"10.244.0.0/26"})
            config.write_text(plain)
            bird.ask("configure", "soft")
            await until(lambda: bird.table().keys() == everything)
            assert downs(events) == []
            assert driver.state().sent == driver.state().confirmed == {(a.peer, a.prefix) for a in blocks(4)}

    run(main())
