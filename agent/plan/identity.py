"""Who this node is to its peers. Pure."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from ipaddress import IPv4Address
from typing import Final

import msgspec

from agent.adjrib import family_of
from agent.bgp.model import Family
from agent.detect import Method, find
from agent.fib import Address, KernelState
from agent.plan.model import Cluster, Notes, Snapshot
from agent.prefix import is_prefix
from store.model import ANNOTATION_ADDRESS, ANNOTATION_ASN, DETECTED, BGPConfiguration, BGPConfigurationSpec, Node
from store.validate import as_number_problem, is_address

#: Families of addresses by IP version.
VERSIONS: Final[Mapping[int, Family]] = {4: "ipv4 unicast", 6: "ipv6 unicast"}


class Identity(msgspec.Struct, frozen=True):
    """This node as its peers know it. ``local_as`` 0: the store does not say, so that nothing is to be changed."""

    name: str
    local_as: int
    router_id: str
    #: Where the node is reached, by family; and where the kernel lets us use it as a source.
    addresses: Mapping[Family, str]
    sources: Mapping[Family, str]
    #: Its addresses on interfaces that are not ignored: what is in one of their subnets is on-link.
    connected: tuple[Address, ...] = ()
    #: Whether its Node says other addresses than these, or less of them.
    detected: bool = False
    #: Where the other nodes are reached, by name.
    others: Mapping[str, Mapping[Family, str]] = {}


def identify(snapshot: Snapshot, notes: Notes) -> Identity:
    """Node, AS number and router id. A node that cannot be read leaves its sessions as they are (R13)."""
    node = snapshot.cluster.node
    if node is None:
        notes.add("NodeNotUsable", f"the store has no Node {snapshot.node}: create it; sessions stay as they are")
        return Identity(snapshot.node, 0, "", {}, {})
    addresses, detected = own_addresses(node, snapshot, notes)
    own = {a.address for a in snapshot.kernel.addresses if a.usable}
    for address in addresses.values():
        if address not in own:
            message = f"{address} of Node {node.name} is on no interface: imports come without a source"
            notes.add("NodeAddressNotLocal", message)
    for version, key in ANNOTATION_ADDRESS.items():
        text = node.metadata.annotations.get(key)
        if text is not None and not is_address(text, version):
            notes.add(
                "NodeAddressNotLocal", f"{key} of Node {node.name}, {text!r}, is no IPv{version} address: left out"
            )
    local_as = node_as(node, snapshot.cluster.configuration)
    why = as_number_problem(local_as)
    if why:
        notes.add(
            "NodeNotUsable", f"AS number of Node {node.name} ({ANNOTATION_ASN}): {why}; sessions stay as they are"
        )
        local_as = 0
    return Identity(
        name=node.name,
        local_as=local_as,
        router_id=router_id(node.name, addresses),
        addresses=addresses,
        sources={family: address for family, address in addresses.items() if address in own},
        connected=connected(snapshot.kernel, snapshot.cluster.configuration),
        detected=detected,
        others=other_addresses(snapshot.cluster, addresses.values(), notes),
    )


def connected(kernel: KernelState, configuration: BGPConfiguration | None) -> tuple[Address, ...]:
    """The node's addresses without those of interfaces that ``ignoredInterfaces`` matches."""
    patterns = configuration.spec.ignored_interfaces if configuration else ()
    if not patterns:
        return kernel.addresses
    ignored = {link.index for link in kernel.links.values() if any(fnmatchcase(link.name, p) for p in patterns)}
    return tuple(address for address in kernel.addresses if address.interface not in ignored)


def own_addresses(node: Node, snapshot: Snapshot, notes: Notes) -> tuple[dict[Family, str], bool]:
    """This node's, and whether others find them elsewhere than in its Node. Annotations go first, then what is detected
    as its setting says, then InternalIP; where that is missing of a family that there are pools of, what is found."""
    said, told = node_addresses(node), _annotated(node)
    pools = [pool.spec.cidr for pool in snapshot.cluster.pools if is_prefix(pool.spec.cidr)]
    found = dict(said)
    for version, family in VERSIONS.items():
        method = snapshot.methods.get(version, Method())
        if family in told:
            continue
        if method.kind == "none":
            found.pop(family, None)
            continue
        if method.kind == "internal-ip":
            if family in said or not any(family_of(cidr) == family for cidr in pools):
                continue
            method = Method("first-found")
        beside = next((address for other, address in said.items() if other != family), "")
        address, why = find(method, family, snapshot.kernel, pools, beside=beside, routed=snapshot.kernel.sources)
        if address:
            found[family] = address
        elif version in snapshot.methods and method == snapshot.methods[version]:
            instead = f"{said[family]} of its Node is used" if family in said else "it has none"
            notes.add("NodeAddressNotFound", f"IPv{version} address of Node {node.name}: {why}: {instead}")
    return found, found != said


def other_addresses(cluster: Cluster, own: Iterable[str], notes: Notes) -> dict[str, dict[Family, str]]:
    """The other nodes', as own_addresses has it there: what a node says of itself goes before its InternalIP. It does
    not count for an address that is another's: whoever says so, sessions of others are not his to take."""
    statuses = {status.name: status.status for status in cluster.statuses}
    found = {node.name: node_addresses(node) for node in cluster.nodes}
    holders = Counter([*own, *(a for of_node in found.values() for a in of_node.values())])
    said: dict[str, dict[Family, str]] = {}
    for node in cluster.nodes:
        status, told = statuses.get(node.name), _annotated(node)
        if status is None or status.address_source != DETECTED:
            continue
        detected = {family_of(a): a for a in status.addresses if any(is_address(a, v) for v in VERSIONS)}
        said[node.name] = {f: a for f, a in detected.items() if f not in told and found[node.name].get(f) != a}
        for family in [f for f in found[node.name] if f not in detected and f not in told]:
            del found[node.name][family]  # it has none there
    claims = Counter(a for of_node in said.values() for a in of_node.values())
    for name, addresses in said.items():
        for family, address in addresses.items():
            if holders[address] or claims[address] > 1:
                notes.add("NodeAddressTwice", f"{address} of Node {name}, as it says itself, is another's: left out")
            else:
                found[name][family] = address
    return found


def node_addresses(node: Node) -> dict[Family, str]:
    """Where the node's sessions end as its Node says: its annotations, else its first InternalIP of each family."""
    found = _annotated(node)
    for entry in node.status.addresses:
        if entry.type == "InternalIP":
            found.setdefault(family_of(entry.address), entry.address)
    return found


def _annotated(node: Node) -> dict[Family, str]:
    texts = ((version, node.metadata.annotations.get(key, "")) for version, key in ANNOTATION_ADDRESS.items())
    return {family_of(text): text for version, text in texts if is_address(text, version)}


def node_as(node: Node, configuration: BGPConfiguration | None) -> int:
    """The node's annotation, else the cluster's AS number; -1 for an annotation that is no number."""
    text = node.metadata.annotations.get(ANNOTATION_ASN)
    if text is None:
        return (configuration.spec if configuration else BGPConfigurationSpec()).as_number
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else -1


def router_id(name: str, addresses: Mapping[Family, str]) -> str:
    """The IPv4 address; without one, 32 bits of the name's hash (RFC 6286 asks only that they be unique in the AS)."""
    return addresses.get("ipv4 unicast") or str(IPv4Address(zlib.crc32(name.encode()) or 1))
