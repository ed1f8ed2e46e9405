"""Which routers, nodes, links and addresses a lab has, worked out from its shape. Pure.

In racks every session is eBGP: spines share an AS, each ToR has its own, the nodes of a rack share one. Links are point
to point, /31 (RFC 3021) and /127 (RFC 6164). A mesh has neither rack nor router: a switch, and one segment for all. A
port is named after what it leads to, so ``ip route`` reads like the map.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Final, Literal

import msgspec

AS_SPINE: Final = 65000
AS_TORS: Final = (65000, 65200)  # of a rack's first and second ToR, plus the rack's number
AS_NODE: Final = 65100  # plus the rack's number
AS_MESH: Final = 64512  # of who says none, as in Calico
MAX_RACKS: Final = 90
MAX_SPINES: Final = 16
MAX_NODES: Final = 64
MAX_MESH: Final = 250
MAX_PODS: Final = 250

SWITCH: Final = "switch"

Software = Literal["bird", "frr"]
#: How a router is to be used (RFC 8326): as ever; by nobody who has another way (``leaving``); and it, too, uses other
#: ways than its peers' where it has them (``left``). One step at a time, or two routers may send packets to each other.
Use = Literal["normal", "leaving", "left"]


class TopologyError(ValueError):
    """A size out of range, or wishes that exclude each other; the message names them, and what would do."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a lab was asked for: ``Topology.build`` takes the same words. In a mesh ``racks`` is 0."""

    racks: int
    nodes: int
    pods: int
    spines: int = 1
    dual_tor: bool = False
    mesh: bool = False
    tor: Software = "bird"
    ipv6_only: bool = False

    @property
    def options(self) -> str:
        """As ``underlay-lab up`` takes it."""
        words = ["--mesh"] if self.mesh else [f"--racks {self.racks}"]
        words += [f"--nodes {self.nodes}", f"--pods {self.pods}"]
        words += ["--dual-tor"] if self.dual_tor else []
        words += [f"--tor {self.tor}"] if self.tor != "bird" else []
        words += ["--ipv6-only"] if self.ipv6_only else []
        return " ".join(words)


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    cidr: str
    block_size: int

    @property
    def room(self) -> str:
        """What routers take from nodes: the pool, and as much beside it, for one that is to take its place."""
        return str(ip_network(self.cidr).supernet())


POOLS: Final = (
    Pool(name="pods-v4", cidr="10.244.0.0/16", block_size=26),
    Pool(name="pods-v6", cidr="fd00:10:244::/112", block_size=122),
)


class Router(msgspec.Struct, frozen=True, kw_only=True):
    """A spine or ToR: a namespace in which BIRD or FRR runs. ``rack`` is 0 for a spine."""

    name: str
    role: Literal["spine", "tor"]
    rack: int
    asn: int
    router_id: str


class Uplink(msgspec.Struct, frozen=True, kw_only=True):
    """A node's way to one ToR, over the port that is called as the ToR. Addresses as a node's: its own, the ToR's."""

    tor: str
    asn: int
    addresses: tuple[str, str]
    gateways: tuple[str, str]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that pods run on. ``addresses`` are those it is known by, without prefix length, IPv4 then IPv6: of its
    first uplink, or on the segment of a mesh, where ``rack`` is 0 and uplinks there are none."""

    name: str
    rack: int
    asn: int
    addresses: tuple[str, ...]
    uplinks: tuple[Uplink, ...]
    pods: tuple[str, ...]

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("node-"))


class End(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a link: in which namespace, on which port, with which addresses (with prefix length): IPv4 and IPv6,
    IPv6 alone, or none on a switch."""

    name: str
    port: str
    addresses: tuple[str, ...]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A cable. ``upper`` is the end nearer to the spine, or the switch's."""

    upper: End
    lower: End

    def joins(self, a: str, b: str) -> bool:
        return {a, b} == {self.upper.name, self.lower.name}


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    shape: Shape
    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    spines: tuple[Router, ...] = ()
    tors: tuple[Router, ...] = ()
    #: Names.
    switches: tuple[str, ...] = ()
    pools: tuple[Pool, ...] = POOLS

    @classmethod
    def build(
        cls,
        *,
        racks: int | None = None,
        nodes: int | None = None,
        pods: int = 3,
        spines: int = 1,
        dual_tor: bool = False,
        mesh: bool = False,
        tor: Software = "bird",
        ipv6_only: bool = False,
    ) -> Topology:
        """So many racks (2), nodes per rack (2), pods per node, and spines, each of which every ToR is linked to. With
        ``dual_tor`` every rack has two ToRs and every node a link to both; ``tor`` is what runs on ToRs and spines.
        With ``mesh`` so many nodes (4) on one segment, and nothing else; with ``ipv6_only`` no node there has an IPv4
        address. Raises TopologyError."""
        _within("pods per node", pods, 0, MAX_PODS)
        if mesh:
            _no_router(racks=racks, dual_tor=dual_tor, tor=tor)
            nodes = 4 if nodes is None else nodes
            _within("nodes of a mesh", nodes, 1, MAX_MESH)
            return _segment(Shape(racks=0, nodes=nodes, pods=pods, mesh=True, ipv6_only=ipv6_only))
        if ipv6_only:
            raise TopologyError("--ipv6-only is for --mesh: the routers of racks have both families")
        racks, nodes = 2 if racks is None else racks, 2 if nodes is None else nodes
        _within("racks", racks, 1, MAX_RACKS)
        _within("nodes per rack", nodes, 1, MAX_NODES)
        _within("spines", spines, 1, MAX_SPINES)
        return _fabric(Shape(racks=racks, nodes=nodes, pods=pods, spines=spines, dual_tor=dual_tor, tor=tor))

    @property
    def routers(self) -> tuple[Router, ...]:
        return self.spines + self.tors

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
                if address in map(bare, end.addresses):
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
    """ "" for 0, which is no rack."""
    return f"rack-{rack}" if rack else ""


def bare(address: str) -> str:
    """The address without its prefix length."""
    return address.partition("/")[0]


def _fabric(shape: Shape) -> Topology:
    spines = tuple(
        Router(name=f"spine-{s}", role="spine", rack=0, asn=AS_SPINE, router_id=f"10.255.0.{s}")
        for s in range(1, shape.spines + 1)
    )
    tors: list[Router] = []
    up: list[Link] = []
    down: list[Link] = []
    nodes: list[Node] = []
    for rack in range(1, shape.racks + 1):
        pair = [_tor(rack, side, shape) for side in range(2 if shape.dual_tor else 1)]
        tors += pair
        for side, tor in enumerate(pair):
            up += [_link(s.name, tor.name, *_spine_link(rack, side, n)) for n, s in enumerate(spines)]
        for place in range(shape.nodes):
            name = f"node-{(rack - 1) * shape.nodes + place + 1}"
            links = [_link(tor.name, name, *_node_link(rack, side, place)) for side, tor in enumerate(pair)]
            uplinks = tuple(
                Uplink(tor=t.name, asn=t.asn, addresses=_bare(link.lower), gateways=_bare(link.upper))
                for t, link in zip(pair, links, strict=True)
            )
            down += links
            nodes.append(_node(name, rack, AS_NODE + rack, uplinks[0].addresses, uplinks, shape))
    return Topology(shape=shape, spines=spines, tors=tuple(tors), nodes=tuple(nodes), links=(*up, *down))


def _segment(shape: Shape) -> Topology:
    first = 1 if shape.ipv6_only else 0
    links = tuple(
        Link(
            upper=End(name=SWITCH, port=f"node-{n}", addresses=()),
            lower=End(name=f"node-{n}", port=SWITCH, addresses=(f"10.1.0.{n}/24", f"fd00:10:1::{n:x}/64")[first:]),
        )
        for n in range(1, shape.nodes + 1)
    )
    nodes = tuple(
        _node(link.lower.name, 0, AS_MESH, tuple(map(bare, link.lower.addresses)), (), shape) for link in links
    )
    return Topology(shape=shape, nodes=nodes, links=links, switches=(SWITCH,), pools=POOLS[first:])


def _tor(rack: int, side: int, shape: Shape) -> Router:
    return Router(
        name=f"tor-{rack}{'ab'[side] if shape.dual_tor else ''}",
        role="tor",
        rack=rack,
        asn=AS_TORS[side] + rack,
        router_id=f"10.255.{1 + side}.{rack}",
    )


def _node(
    name: str, rack: int, asn: int, addresses: tuple[str, ...], uplinks: tuple[Uplink, ...], shape: Shape
) -> Node:
    number = int(name.removeprefix("node-"))
    pods = tuple(pod_name(number, n) for n in range(1, shape.pods + 1))
    return Node(name=name, rack=rack, asn=asn, addresses=addresses, uplinks=uplinks, pods=pods)


def _no_router(*, racks: int | None, dual_tor: bool, tor: Software) -> None:
    for option, said in (("--racks", racks), ("--dual-tor", dual_tor), ("--tor frr", tor == "frr")):
        if said:
            raise TopologyError(f"--mesh and {option}: a mesh has no rack, ToR or spine: leave one of them out")


def _bare(end: End) -> tuple[str, str]:
    v4, v6 = end.addresses
    return bare(v4), bare(v6)


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise TopologyError(f"{what}: {value}: from {low} to {high}")


# Numbers read the same in both families where they can: the rack's is written in decimal digits in both.


def _spine_link(rack: int, side: int, spine: int) -> tuple[IPv4Address, IPv6Address]:
    port = 128 * side + 2 * spine
    return IPv4Address(f"10.0.{rack}.{port}"), IPv6Address(f"fd00:10:0:{rack}::{port:x}")


def _node_link(rack: int, side: int, place: int) -> tuple[IPv4Address, IPv6Address]:
    return IPv4Address(f"10.{rack}.{side}.{2 * place}"), IPv6Address(f"fd00:10:{rack}:{side}::{2 * place:x}")


def _link(upper: str, lower: str, v4: IPv4Address, v6: IPv6Address) -> Link:
    """The upper end has the even address of each pair."""
    return Link(
        upper=End(name=upper, port=lower, addresses=(f"{v4}/31", f"{v6}/127")),
        lower=End(name=lower, port=upper, addresses=(f"{v4 + 1}/31", f"{v6 + 1}/127")),
    )
