"""A topology made real: its namespaces, cables and addresses. What lab, tests and benches build with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from lab.net import Net
from lab.topology import Link, Node, Topology

#: A switch's one part.
BRIDGE: Final = "bridge"
#: No wait for duplicate address detection on point-to-point links, and no rate limit on what traceroute asks for.
_SYSCTLS = {
    "net.ipv6.conf.all.accept_dad": "0",
    "net.ipv6.conf.default.accept_dad": "0",
    "net.ipv6.conf.default.accept_ra": "0",
    # A port that was shut and opened again has its addresses still, as on a switch.
    "net.ipv6.conf.all.keep_addr_on_down": "1",
    "net.ipv6.conf.default.keep_addr_on_down": "1",
    "net.ipv4.icmp_ratelimit": "0",
    "net.ipv6.icmp.ratelimit": "0",
    "net.ipv4.fib_multipath_hash_policy": "1",
    "net.ipv6.fib_multipath_hash_policy": "1",
}


def build(net: Net, topology: Topology) -> None:
    """Makes every namespace and link of the topology, and the default routes of its nodes. Starts nothing.
    Raises NetError."""
    for name in [*(r.name for r in topology.routers), *(n.name for n in topology.nodes)]:
        add(net, name)
    for name in topology.switches:
        net.add(name)
        net.ip(name, [f"link add name {BRIDGE} type bridge", f"link set dev {BRIDGE} up"])
    for link in topology.links:
        plug(net, topology, link)
    for node in topology.nodes:
        net.ip(node.name, _defaults(node))


def add(net: Net, name: str) -> None:
    """Makes the namespace of a router or node. Raises NetError."""
    net.add(name, forwarding=True)
    net.sysctl(name, _SYSCTLS)


def switch_off(net: Net, topology: Topology, node: Node) -> None:
    """Takes all that a node's kernel has away; the other ends of its cables lose their carrier. Raises NetError."""
    net.renew(node.name, [near.port for near, _ in topology.ends(node.name)], forwarding=True)


def switch_on(net: Net, topology: Topology, node: Node) -> None:
    """Sets a node up as ``build`` did, after ``switch_off``. Raises NetError."""
    net.sysctl(node.name, _SYSCTLS)
    for near, _ in topology.ends(node.name):
        net.address(node.name, near.port, near.addresses)
        net.ip(node.name, [f"link set dev {near.port} up"])
    net.ip(node.name, _defaults(node))


def plug(net: Net, topology: Topology, link: Link) -> None:
    """Makes the link between two namespaces that are there. Raises NetError."""
    net.link(link.upper.name, link.upper.port, link.lower.name, link.lower.port)
    for end in (link.upper, link.lower):
        if end.name in topology.switches:
            net.ip(end.name, [f"link set dev {end.port} master {BRIDGE}"])
        else:
            net.address(end.name, end.port, end.addresses)


def cut(net: Net, link: Link) -> None:
    """Shuts the port at the upper end, as on a switch: the lower end loses its carrier."""
    net.ip(link.upper.name, [f"link set dev {link.upper.port} down"])


def mend(net: Net, link: Link) -> None:
    net.ip(link.upper.name, [f"link set dev {link.upper.port} up"])


def power(net: Net, topology: Topology, name: str, *, on: bool) -> None:
    """Shuts all ports of a router or node at once, as when it has no power any more, or opens them."""
    net.ip(name, [f"link set dev {near.port} {'up' if on else 'down'}" for near, _ in topology.ends(name)])


def mute(net: Net, topology: Topology, name: str, *, on: bool) -> None:
    """Has a router or node send nothing any more by any of its ports, which keep their carrier; or ends that."""
    for near, _ in topology.ends(name):
        net.run(
            name,
            [
                "tc",
                "qdisc",
                *(("add", "dev", near.port, "root", "blackhole") if on else ("del", "dev", near.port, "root")),
            ],
        )


def routes(net: Net, name: str, *, protocol: str | int | None = None) -> frozenset[str]:
    """Destinations, in both families, of the main table of a namespace, as CIDRs; of one route protocol if given."""
    found: set[str] = set()
    for family, length in (("-4", 32), ("-6", 128)):
        words = ["ip", family, "-j", "route", "show", "table", "main"]
        words += [] if protocol is None else ["protocol", str(protocol)]
        for route in json.loads(net.run(name, words).stdout or "[]"):
            found.add(_cidr(route["dst"], family, length))
    return frozenset(found)


def ways(net: Net, name: str, wanted: frozenset[str], *, protocol: str | int) -> frozenset[str]:
    """The ports that a namespace's routes of one protocol to these destinations (CIDRs) lead through."""
    found: set[str] = set()
    for family, length in (("-4", 32), ("-6", 128)):
        said = net.run(name, ["ip", family, "-j", "route", "show", "table", "main", "protocol", str(protocol)]).stdout
        for route in json.loads(said or "[]"):
            if _cidr(route["dst"], family, length) in wanted:
                found |= {hop["dev"] for hop in (route, *route.get("nexthops", ())) if "dev" in hop}
    return frozenset(found)


def missing(net: Net, names: Iterable[str], wanted: frozenset[str], *, protocol: str | int) -> tuple[str, str] | None:
    """The first namespace that lacks one of the wanted destinations, and which; None when none does."""
    for name in names:
        for cidr in sorted(wanted - routes(net, name, protocol=protocol)):
            return name, cidr
    return None


def _cidr(destination: str, family: str, length: int) -> str:
    if destination == "default":
        return "::/0" if family == "-6" else "0.0.0.0/0"
    return destination if "/" in destination else f"{destination}/{length}"


def _defaults(node: Node) -> list[str]:
    """As an installer leaves it: one default route a family, over every uplink, static, no metric given."""
    if not node.uplinks:
        return []
    found = []
    for place, everything in enumerate(("0.0.0.0/0", "::/0")):
        ways = [f"via {uplink.gateways[place]} dev {uplink.tor}" for uplink in node.uplinks]
        to = ways[0] if len(ways) == 1 else " ".join(f"nexthop {way}" for way in ways)
        found.append(f"route add {everything} proto static {to}")
    return found
