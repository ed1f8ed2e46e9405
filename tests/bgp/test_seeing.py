"""What people see of sessions with real routers: what was agreed on, and why they ended, in the words of both ends."""

from __future__ import annotations

import os
import signal

from msgspec.structs import replace

from agent.bgp.history import History
from agent.bgp.model import Capabilities, SessionChanges, SessionUp
from lab.net import Net
from tests.bgp.conftest import SESSIONS, Node, ended, run, session, until
from tests.bgp.routers import NODE4, TOR4, TOR6, TOR_AS, Router, connections
from tests.bgp.test_peers import secured

SHUTDOWN = {
    "bird": ("disable", "node4", '"maintenance of rack 7"'),
    "frr": ("conf t", f"router bgp {TOR_AS}", f"neighbor {NODE4} shutdown message maintenance of rack 7"),
}


def history(node: Node) -> History:
    """As an agent keeps it."""
    made = History()
    for event in node.changes:
        assert isinstance(event, SessionChanges)
        made.take(event)
    return made


def says(node: Node, peer: str, why: str) -> bool:
    found = history(node)
    assert found.why_down(peer) == why, found.of(peer)
    return True


def quiet(net: Net) -> bool:
    """The router has read all that came, and all that it sent has arrived. Else, when it closes its connection, its
    kernel resets it and takes what still waits to be sent away, and with it the NOTIFICATION (RFC 1122, 4.2.2.13)."""
    return list(connections(net, "tor").values()) == [("0", "0")] * 2


def test_what_was_agreed_on_and_what_the_ends_said(router: Router, node: Node, net: Net) -> None:
    """A shutdown with a message (RFC 9003), and an AS number that is not the router's; both still known to the next
    agent, as the relay remembers them."""
    said = 'the peer said: Cease, Administrative Shutdown: "maintenance of rack 7"'
    wrong = f"we said: OPEN Message Error, Bad Peer AS: ASN in OPEN ({TOR_AS}) did not match ASN expected (65009)"

    async def main() -> None:
        router.start([])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            await until(lambda: {e.peer for e in events if isinstance(e, SessionUp)} == {TOR4, TOR6})
            agreed = {e.peer: e for e in events if isinstance(e, SessionUp)}[TOR4]
            expected = Capabilities(refresh=True, enhanced=True, asn4=True, hold_time=9, router_id=TOR4)
            assert agreed.capabilities == expected
            assert (agreed.helper, agreed.restart_time) == (True, 60)
            await until(lambda: len(ended(events)) == 4 and quiet(net))
            router.ask(*SHUTDOWN[router.kind])  # type: ignore[attr-defined]
            await until(lambda: says(node, TOR4, said))
            driver.set_sessions(frozenset({session("4"), session("6", peer_as=65009)}))
            await until(lambda: says(node, TOR6, wrong))
        node.changes.clear()
        async with node.driver() as (_, _):
            await until(lambda: says(node, TOR6, wrong))
            # A router may refuse a connection before it takes one.
            states = [c.state for c in history(node).of(TOR4)]
            assert states[states.index("up") :][:2] == ["up", "down"]
            assert history(node).last_said(TOR4) is not None

    run(main())


def test_a_silence_is_ours_to_end_and_a_wrong_password_says_nothing(bird: Router, node: Node, net: Net) -> None:
    """RFC 4271, 6.5; and RFC 2385, 2: a segment without the right digest is dropped without a word."""

    def dropped() -> bool:
        done = net.run("tor", ["nstat", "-asz", "TcpExtTCPMD5NotFound"])
        return int(done.stdout.split()[-2]) > 0

    async def main() -> None:
        bird.start([], password="hunter2")
        node.start()
        (six,) = secured("hunter2", frozenset({replace(session("6"), hold_time=3)}))
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4"), six}))
            await until(lambda: any(isinstance(e, SessionUp) for e in events))
            assert bird.process is not None
            os.kill(bird.process.pid, signal.SIGSTOP)
            await until(lambda: says(node, TOR6, "we said: Hold Timer Expired"))
            await until(dropped)
            assert history(node).of(TOR4) == ()
            assert {e.peer for e in events} == {TOR6}

    run(main())
