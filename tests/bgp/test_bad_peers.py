"""A ToR that announces what it must not: the node's own connectivity stays, and so does the other ToR's."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from lab.net import Net
from store.base import Store, mutate
from store.model import BGPPeer, BGPPeerSpec, SessionStatus
from tests.bgp import routers
from tests.bgp.agents import OWN4, OWN6, Agent, peers
from tests.bgp.conftest import run
from tests.bgp.raw import Raw, nlri, update, usual
from tests.bgp.routers import NODE4, NODE_AS, SECOND, TOR4, TOR_AS
from tests.conftest import eventually

#: Behind the node's own default route.
WORLD4, WORLD6 = "198.51.100.1", "2001:db8:100::1"
BAD = (
    *("0.0.0.0/0", "::/0"),
    # Our own blocks, and what is in them.
    *(OWN4, "10.244.1.8/29", "10.244.1.5/32", OWN6, "fd00:10:244::41/128"),
    # The management network, by itself and by what holds it; the world that is reached through it.
    *("192.168.0.0/24", "192.168.0.0/16", "192.168.0.254/32", "198.51.100.0/24", "2001:db8:1::/64", "2001:db8::/32"),
    # The uplinks: more specific than they are, our own address, and all of them.
    *("10.0.0.0/8", "10.0.1.0/25", "10.0.2.2/32", f"{NODE4}/32", "fd00::/8", "fd00:2::2/128"),
)
GOOD = ("10.244.2.0/26", "10.244.0.0/16", "fd00:10:244::80/122")
HONEST = ("10.244.3.0/26", "fd00:10:244::c0/122")


class World:
    """``node`` on a ToR that is good for nothing (up0), one that is honest (up1), and a management network (mgmt0) with
    the node's default route."""

    def __init__(self, net: Net, folder: Path, **of_the_bad: Any) -> None:
        self.net, self.folder = net, folder
        routers.wire(net)
        routers.attach(net, "tor2", "up1", SECOND)
        net.add("mgmt", forwarding=True)
        net.link("node", "mgmt0", "mgmt", "south")
        net.address("node", "mgmt0", ["192.168.0.1/24", "2001:db8:1::1/64"])
        net.address("mgmt", "south", ["192.168.0.254/24", "2001:db8:1::254/64"])
        net.address("mgmt", "lo", [f"{WORLD4}/32", f"{WORLD6}/128"])
        net.ip("node", ["route add default via 192.168.0.254", "route add default via 2001:db8:1::254"])
        both = (("honest-4", SECOND.tor4), ("honest-6", SECOND.tor6))
        honest = {n: BGPPeerSpec(peer_ip=a, as_number=TOR_AS, node="node-1") for n, a in both}
        self.agent = Agent(net, folder, peers={**peers(**of_the_bad), **honest})
        self.honest = routers.Bird(net, folder, "tor2", SECOND)

    def start(self) -> None:
        self.agent.start_speaker()
        self.agent.start()
        # Or a route into one of them would keep it from use.
        eventually(lambda: sum(line.startswith("blackhole") for line in self.agent.routes()) == 2, limit=20)
        self.before = self.own_routes()
        self.honest.start(HONEST)
        eventually(lambda: self.imports() == set(HONEST) and self.heard(), limit=30)
        self.since = self.session()
        self._pings = {
            target: self.net.spawn("node", ["ping", "-i", "0.05", target], log=self.folder / f"ping-{target}")
            for target in (WORLD4, WORLD6, TOR4, SECOND.tor4)
        }

    def heard(self) -> bool:
        return self.honest.table().keys() == {OWN4, OWN6}

    def session(self) -> list[str]:
        """The honest ToR's sessions: since when they are up."""
        lines = self.honest.ask("show", "protocols").splitlines()
        # BIRD works the time out anew each time, and is off by a millisecond or so.
        return [re.sub(r"\.\d+", "", line) for line in lines if line.startswith("node") and "Established" in line]

    def own_routes(self) -> list[str]:
        """All routes that are not ours; link-local ones come when they will."""
        lines: list[str] = []
        for family in ("-4", "-6"):
            out = self.net.run("node", ["ip", family, "route", "show", "table", "all"]).stdout
            lines += (line.strip() for line in out.splitlines() if not re.search(r"proto 14[23]", line))
        return sorted(line for line in lines if "fe80::" not in line and "multicast" not in line)

    def imports(self) -> set[str]:
        found = (line.removeprefix("unicast ").split() for line in self.agent.routes() if "proto 143" in line)
        return {{"default": "::/0" if "::" in " ".join(rest) else "0.0.0.0/0"}.get(p, p) for p, *rest in found}

    def sound(self) -> None:
        """Nothing was lost, nothing changed, and the honest ToR did not notice."""
        lost = {}
        for target, ping in self._pings.items():
            ping.send_signal(signal.SIGINT)
            ping.wait(timeout=10)
            sent, got = re.search(r"(\d+) packets transmitted, (\d+) received", self._log(target)).groups()  # type: ignore[union-attr]
            # The last one may be under way.
            if int(sent) - int(got) > 1 or int(got) < 5:
                lost[target] = (sent, got)
        assert lost == {}
        assert self.own_routes() == self.before
        assert len(self.since) == 2
        assert self.session() == self.since
        assert self.heard()

    def _log(self, target: str) -> str:
        return (self.folder / f"ping-{target}").read_text()

    def change(self, name: str, **changes: Any) -> None:
        async def act(store: Store) -> None:
            await mutate(store, BGPPeer, name, lambda p: replace(p, spec=replace(p.spec, **changes)))

        self.agent.store(act)

    def conditions(self) -> dict[str, str]:
        status = self.agent.status()
        return {c.type: c.message for c in status.status.conditions} if status else {}

    def told(self, name: str) -> SessionStatus:
        status = self.agent.status()
        assert status is not None
        return next(s for s in status.status.sessions if s.peer == name)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[None]:
    yield
    for log in ("agent.log", "speaker.log"):
        if (tmp_path / log).exists():
            print(f"--- {log}\n{(tmp_path / log).read_text()[-4000:]}")


@pytest.mark.parametrize("kind", ["bird", "frr"])
def test_nothing_comes_in_that_is_the_node_s_own(net: Net, tmp_path: Path, logs: None, kind: str) -> None:
    world = World(net, tmp_path)
    world.start()
    bad = routers.KINDS[kind](net, tmp_path)
    bad.start((*BAD, *GOOD))
    wanted = {*GOOD, *HONEST}
    eventually(lambda: world.imports() == wanted, limit=30)

    def received() -> bool:
        four, six = world.told("tor-4"), world.told("tor-6")
        assert (four.received, six.received) == (
            sum(":" not in p for p in (*BAD, *GOOD)),
            sum(":" in p for p in (*BAD, *GOOD)),
        )
        assert (four.accepted, six.accepted) == (2, 1)
        return True

    eventually(received, limit=20)
    assert world.imports() == wanted
    said = world.conditions()["ForeignRoute"]
    assert all(prefix in said for prefix in (OWN4, "10.244.1.8/29", "10.244.1.5/32", OWN6, "fd00:10:244::41/128"))
    # A default route that may come in stands behind the node's own.
    for name in ("tor-4", "tor-6"):
        world.change(name, default_route="Fallback")
    eventually(lambda: world.imports() == wanted | {"0.0.0.0/0", "::/0"}, limit=20)
    assert all("metric 4096" in line for line in world.agent.routes() if line.startswith("default"))
    for target in (WORLD4, WORLD6):
        assert "dev mgmt0" in net.run("node", ["ip", "route", "get", target]).stdout
    world.sound()
    net.ip("node", ["route del default via 192.168.0.254"])
    assert f"via {TOR4} dev up0" in net.run("node", ["ip", "route", "get", WORLD4]).stdout


def test_next_hops_and_paths_that_lead_nowhere(net: Net, tmp_path: Path, logs: None) -> None:
    """Byte by byte, as no router would say most of it. The pod lives, and its route is on the link."""
    world = World(net, tmp_path)
    net.add("pod")
    net.link("node", "pod0", "pod", "eth0")
    net.ip("node", ["route add 10.244.1.5/32 dev pod0 proto 141 metric 32"])
    world.start()
    bad = Raw(net)
    hops = {
        "10.244.16.0/26": usual("10.244.1.5"),
        "10.244.17.0/26": usual("10.9.9.9"),
        "10.244.18.0/26": usual(WORLD4),
        "10.244.19.0/26": usual(NODE4),
        "10.244.20.0/26": usual("10.244.2.1"),  # in a prefix that it announces itself
        "10.244.21.0/26": usual(path=(TOR_AS, NODE_AS)),
        "10.244.22.0/26": usual(path=(65009, TOR_AS)),
    }
    good = update(usual(), nlri("10.244.2.0/26"))

    async def main() -> None:
        async with bad.running():
            bad.greeting = b"".join((good, *(update(said, nlri(prefix)) for prefix, said in hops.items()), good))

            def judged() -> bool:
                session = world.told("tor-4")
                assert (session.received, session.accepted) == (len(hops) + 1, 1)
                assert world.imports() == {"10.244.2.0/26", *HONEST}
                return True

            await asyncio.to_thread(lambda: eventually(judged, limit=30))
            said = await asyncio.to_thread(world.conditions)
            assert "tor-4: 4 prefixes" in said["NextHopNotOnLink"]
            assert "NextHopIsSelf" in said["RoutesRefused"]
            assert "FirstASNotPeer" in said["RoutesRefused"]

    run(main(), 120)
    world.sound()
