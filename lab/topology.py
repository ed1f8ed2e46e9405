"""Which routers, nodes, links and addresses a rack has, worked out from three numbers. Pure.

Every session is eBGP: spines share an AS, each ToR has its own, the nodes of a rack share one. Links are point to
point, /31 (RFC 3021) and /127 (RFC 6164); a port is named after what it leads to, so ``ip route`` reads like the map.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

import msgspec

AS_SPINE: Final = 65000
AS_TOR: Final = 65000  # plus the rack's number
AS_NODE: Final = 65100  # plus the rack's number
MAX_RACKS: Final = 90
MAX_SPINES: Final = 16
MAX_NODES: Final = 64
MAX_PODS: Final = 250


class TopologyError(ValueError):
    """A size out of range; the message names it and the range."""


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    cidr: str
    block_size: int


POOLS: Final = (
    Pool(name="pods-v4", cidr="10.244.0.0/16", block_size=26),
    Pool(name="pods-v6", cidr="fd00:10:244::/112", block_size=122),
)


class Router(msgspec.Struct, frozen=True, kw_only=True):
    """A spine or ToR: a namespace in which BIRD runs. ``rack`` is 0 for a spine."""

    name: str
    role: Literal["spine", "tor"]
    rack: int
    asn: int
    router_id: str


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that pods run on. Addresses stand without prefix length, IPv4 then IPv6."""

    name: str
    rack: int
    asn: int
    tor: str
    tor_asn: int
    addresses: tuple[str, str]
    gateways: tuple[str, str]
    pods: tuple[str, ...]

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("node-"))


class End(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a link: in which namespace, on which port, with which addresses (with prefix length)."""

    name: str
    port: str
    addresses: tuple[str, str]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A cable. ``upper`` is the end nearer to the spine."""

    upper: End
    lower: End

    def joins(self, a: str, b: str) -> bool:
        return {a, b} == {self.upper.name, self.lower.name}


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    spines: tuple[Router, ...]
    tors: tuple[Router, ...]
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    pools: tuple[Pool, ...] = POOLS

    @classmethod
    def build(cls, *, racks: int = 2, nodes: int = 2, pods: int = 3, spines: int = 1) -> Topology:
        """The rack with so many racks, nodes per rack, pods per node, and spines, each of which every ToR is linked to.
        Raises TopologyError."""
        _within("racks", racks, 1, MAX_RACKS)
        _within("nodes per rack", nodes, 1, MAX_NODES)
        _within("pods per node", pods, 0, MAX_PODS)
        _within("spines", spines, 1, MAX_SPINES)
        spine = tuple(
            Router(name=f"spine-{s}", role="spine", rack=0, asn=AS_SPINE, router_id=f"10.255.0.{s}")
            for s in range(1, spines + 1)
        )
        tor = tuple(
            Router(name=f"tor-{r}", role="tor", rack=r, asn=AS_TOR + r, router_id=f"10.255.1.{r}")
            for r in range(1, racks + 1)
        )
        links = [
            _link(s.name, f"tor-{r}", *_spine_link(r, n)) for r in range(1, racks + 1) for n, s in enumerate(spine)
        ]
        node: list[Node] = []
        for r in range(1, racks + 1):
            for place in range(nodes):
                number = (r - 1) * nodes + place + 1
                link = _link(f"tor-{r}", f"node-{number}", *_node_link(r, place))
                links.append(link)
                node.append(
                    Node(
                        name=f"node-{number}",
                        rack=r,
                        asn=AS_NODE + r,
                        tor=f"tor-{r}",
                        tor_asn=AS_TOR + r,
                        addresses=_bare(link.lower.addresses),
                        gateways=_bare(link.upper.addresses),
                        pods=tuple(pod_name(number, n) for n in range(1, pods + 1)),
                    )
                )
        return cls(spines=spine, tors=tor, nodes=tuple(node), links=tuple(links))

    @property
    def routers(self) -> tuple[Router, ...]:
        return self.spines + self.tors

    @property
    def racks(self) -> int:
        return len(self.tors)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Racks, nodes per rack, pods per node: what ``build`` was asked for."""
        return len(self.tors), len(self.nodes) // len(self.tors), len(self.nodes[0].pods)

    def node(self, name: str) -> Node | None:
        return next((n for n in self.nodes if n.name == name), None)

    def link(self, a: str, b: str) -> Link | None:
        """The cable between the two, in whichever order they are named."""
        return next((link for link in self.links if link.joins(a, b)), None)

    def ends(self, name: str) -> tuple[tuple[End, End], ...]:
        """Every port of ``name`` with the port that it leads to."""
        down = tuple((link.upper, link.lower) for link in self.links if link.upper.name == name)
        return tuple((link.lower, link.upper) for link in self.links if link.lower.name == name) + down

    def owner(self, address: str) -> str:
        """Which router or node has this address; "" if none has."""
        for link in self.links:
            for end in (link.upper, link.lower):
                if address in _bare(end.addresses):
                    return end.name
        return ""


def pod_name(node: int, number: int) -> str:
    return f"pod-{node}-{number}"


def node_of_pod(pod: str) -> str:
    """``pod-3-1`` -> ``node-3``. Raises TopologyError for a name of another shape."""
    parts = pod.split("-")
    if len(parts) != 3 or parts[0] != "pod" or not all(p.isascii() and p.isdigit() and p[0] != "0" for p in parts[1:]):
        raise TopologyError(f"{pod!r}: a pod's name is pod-NODE-NUMBER, as pod-1-2 for the second one of node-1")
    return f"node-{parts[1]}"


def pod_number(pod: str) -> tuple[int, int]:
    """Of which node, and which there: the order of pods. Raises TopologyError for a name of another shape."""
    node_of_pod(pod)
    _, node, number = pod.split("-")
    return int(node), int(number)


def rack_name(rack: int) -> str:
    return f"rack-{rack}"


def bare(address: str) -> str:
    """The address without its prefix length."""
    return address.partition("/")[0]


def _bare(addresses: tuple[str, str]) -> tuple[str, str]:
    return bare(addresses[0]), bare(addresses[1])


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise TopologyError(f"{what}: {value}: from {low} to {high}")


def _spine_link(rack: int, spine: int) -> tuple[IPv4Address, IPv6Address]:
    return IPv4Address(f"10.0.{rack}.{2 * spine}"), IPv6Address(f"fd00:10:0:{rack}::{2 * spine:x}")


def _node_link(rack: int, place: int) -> tuple[IPv4Address, IPv6Address]:
    # The rack's number reads the same in both families, so it is written in decimal digits in both.
    return IPv4Address(f"10.{rack}.0.{2 * place}"), IPv6Address(f"fd00:10:{rack}::{2 * place:x}")


def _link(upper: str, lower: str, v4: IPv4Address, v6: IPv6Address) -> Link:
    """The upper end has the even address of each pair."""
    return Link(
        upper=End(name=upper, port=lower, addresses=(f"{v4}/31", f"{v6}/127")),
        lower=End(name=lower, port=upper, addresses=(f"{v4 + 1}/31", f"{v6 + 1}/127")),
    )
