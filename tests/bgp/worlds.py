"""A node between two ToRs, one of which a test makes bad, with a network of its own beside them."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lab.net import Net
from store.base import Store, mutate
from store.model import BGPPeer, BGPPeerSpec, SessionStatus
from tests.bgp import routers
from tests.bgp.agents import OWN4, OWN6, Agent, peers
from tests.bgp.routers import SECOND, TOR4, TOR_AS
from tests.conftest import eventually

#: Behind the node's own default route.
WORLD4, WORLD6 = "198.51.100.1", "2001:db8:100::1"
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
        self.honest.start(HONEST)
        self.agent.start_speaker()
        self.agent.start()
        # The bad one comes later, or its routes into our blocks would keep them from use.
        eventually(lambda: self.imports() == set(HONEST) and self.heard())
        self.before = self.own_routes()
        self.since = self.sessions()
        self._pings = {
            target: self.net.spawn("node", ["ping", "-i", "0.05", target], log=self.folder / f"ping-{target}")
            for target in (WORLD4, WORLD6, TOR4, SECOND.tor4)
        }

    def heard(self) -> bool:
        return self.honest.table().keys() == {OWN4, OWN6}

    def sessions(self) -> set[str]:
        """The honest ToR's connections: a session that flapped has another."""
        return set(routers.connections(self.net, "tor2"))

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
            ping.wait(timeout=60)
            sent, got = re.search(r"(\d+) packets transmitted, (\d+) received", self._log(target)).groups()  # type: ignore[union-attr]
            # The last one may be under way.
            if int(sent) - int(got) > 1 or int(got) < 5:
                lost[target] = (sent, got)
        assert lost == {}
        assert self.own_routes() == self.before
        assert len(self.since) == 2
        assert self.sessions() == self.since
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
