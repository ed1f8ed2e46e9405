"""Hostile peers beside an honest one, all of one node."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator
from typing import Any

from agent.bgp.model import SessionDown, SessionUp
from agent.rib import Peer, Policy, Rib, Selection
from lab.net import Net
from tests.bgp.conftest import BOTH, Node, announce, session, until
from tests.bgp.raw import Raw, nlri, update, usual
from tests.bgp.routers import NODE4, NODE6, NODE_AS, TOR4, TOR_AS, Router

#: What each peer says after its case.
CANARY = "10.245.99.0/24"
#: Our end of the link to them: a link of its own, as BIRD takes port 179 of all addresses.
HERE = "10.0.3.1"


def address(number: int) -> str:
    return f"10.0.3.{10 + number}"


def peer(at: str) -> Peer:
    return Peer(address=at, name=at, peer_as=TOR_AS, local_as=NODE_AS, families=BOTH, interface=2)


class Rack:
    """Hostile peers beside an honest one; the node's speaker, and what its RIB makes of them."""

    def __init__(self, net: Net, node: Node, bird: Router, count: int, **of_each: Any) -> None:
        self._node, self._bird = node, bird
        net.add("hostile")
        net.link("node", "up1", "hostile", "down1")
        net.address("node", "up1", [f"{HERE}/24"])
        net.address("hostile", "down1", [f"{address(i)}/24" for i in range(count)])
        self.raws = [Raw(net, "hostile", address(i), **of_each) for i in range(count)]
        for one in self.raws:
            one.greeting = self.canary(one)
        self.policy = Policy(
            peers=tuple(peer(at) for at in (TOR4, *(one.address for one in self.raws))),
            allowed=frozenset({"10.244.0.0/16", "10.245.0.0/16", "fd00:10:245::/48"}),
            own_blocks=frozenset({"10.244.0.0/26"}),
            own_addresses=frozenset({NODE4, NODE6, HERE}),
            router_id=NODE4,
            on_link=frozenset({("10.0.1.0/24", 2), ("10.0.3.0/24", 2), ("fd00:1::/64", 2)}),
        )

    @staticmethod
    def canary(raw: Raw) -> bytes:
        return update(usual(raw.address), nlri(CANARY))

    @contextlib.asynccontextmanager
    async def running(self, *, up: bool = True) -> AsyncIterator[Rack]:
        """``up``: only when all sessions are."""
        self._bird.start(["10.245.77.0/26"])
        self._node.start()
        async with contextlib.AsyncExitStack() as stack:
            for one in self.raws:
                await stack.enter_async_context(one.running())
            self.driver, self.events = await stack.enter_async_context(self._node.driver())
            hostile = {session(name=r.address, address=r.address, local_address=HERE) for r in self.raws}
            self.driver.set_sessions(frozenset(hostile | {session()}))
            self.announced = frozenset({announce("10.244.0.0/26")})
            self.driver.set_announcements(self.announced)
            if up:
                await until(lambda: all(r.up for r in self.raws))
                count = 1 + len(self.raws)
                await until(lambda: len({e.peer for e in self.events if isinstance(e, SessionUp)}) == count)
            await until(lambda: "10.244.0.0/26" in self._bird.table())
            self._speaker, self._relay = self._node.process.pid, self._node.relay()
            yield self

    def seen(self) -> tuple[Rib, Selection]:
        rib = Rib()
        rib.configure(self.policy.peers, 0.0)
        for event in self.events:
            rib.apply(event, 0.0)
        return rib, rib.select(self.policy)

    async def sound(self) -> None:
        """Nobody but the peer itself is hurt: the processes live, the honest peer's session too, and news get there."""
        for prefix in ("10.244.0.64/26", "10.244.0.128/26"):
            self.driver.set_announcements(self.announced | {announce(prefix)})
            await until(lambda prefix=prefix: self._bird.table().keys() == {"10.244.0.0/26", prefix})
        assert self._node.process.poll() is None
        assert (self._node.process.pid, self._node.relay()) == (self._speaker, self._relay)
        assert [e.peer for e in self.events if isinstance(e, SessionDown) and e.peer == TOR4] == []
        rib, selection = self.seen()
        assert "10.245.77.0/26" in rib.peers[TOR4].routes
        allowed = [ipaddress.ip_network(text) for text in self.policy.allowed]
        for prefix, hops in selection.best.items():
            network = ipaddress.ip_network(prefix)
            assert any(network.version == a.version and network.subnet_of(a) for a in allowed)  # type: ignore[arg-type]
            assert {hop.interface for hop in hops} == {2}
