"""A ToR that comes to the segment of a mesh: what an operator brings who leaves the mesh behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from lab import rack, routers
from lab.net import Net
from lab.processes import Daemon
from lab.topology import SWITCH, End, Link, Router, Topology, bare
from store.clock import Clock

NAME: Final = "tor-1"
ASN: Final = 65001
_ADDRESSES: Final = ("10.1.0.254/24", "fd00:10:1::fe/64")
_MAC: Final = "02:00:0a:01:00:fe"
#: IPv4 and IPv6, without prefix length.
ADDRESSES: Final = tuple(map(bare, _ADDRESSES))


class Visitor:
    """``come`` and ``go``; in between BIRD runs there, in eBGP with every node that connects, and is every route's next
    hop."""

    def __init__(self, net: Net, clock: Clock, topology: Topology, folder: Path) -> None:
        self._net, self._clock, self._topology, self._folder = net, clock, topology, folder
        self._task: asyncio.Task[None] | None = None

    def come(self) -> None:
        """Raises NetError."""
        (program,) = routers.prepare(around(self._topology), _router(), self._folder)
        rack.add(self._net, NAME)
        # What comes in by its one port goes out by it again; nobody is to be told of a shorter way.
        self._net.sysctl(NAME, {f"net.ipv4.conf.{each}.send_redirects": "0" for each in ("all", "default")})
        port = Link(upper=End(name=SWITCH, port=NAME, addresses=()), lower=_end())
        rack.plug(self._net, self._topology, port)
        # One that comes again is the same device: the nodes know its address still.
        self._net.ip(NAME, [f"link set dev {SWITCH} address {_MAC}"])
        daemon = Daemon(
            self._net,
            self._clock,
            member=NAME,
            name=program.name,
            argv=program.argv,
            environment={},
            log=program.log,
        )
        self._task = asyncio.create_task(daemon.run())

    async def go(self) -> None:
        """Ends it, and its port on the switch with it."""
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._net.ip(SWITCH, [f"link del dev {NAME}"])
        self._net.remove(NAME)


def around(mesh: Topology) -> Topology:
    """The mesh as that ToR sees it: itself, with a link to every node, all of them on its one port. Pure."""
    links = tuple(Link(upper=_end(), lower=link.lower) for link in mesh.links)
    return replace(mesh, tors=(_router(),), links=links)


def _end() -> End:
    return End(name=NAME, port=SWITCH, addresses=_ADDRESSES)


def _router() -> Router:
    return Router(name=NAME, role="tor", rack=0, asn=ASN, router_id="10.255.1.1")
