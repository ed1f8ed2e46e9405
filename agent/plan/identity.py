"""Who this node is to its peers. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from ipaddress import IPv4Address

import msgspec

from agent.adjrib import family_of
from agent.bgp.model import Family
from agent.fib import Address, KernelState
from agent.plan.model import Notes, Snapshot
from store.model import ANNOTATION_ADDRESS, ANNOTATION_ASN, BGPConfiguration, BGPConfigurationSpec, Node
from store.validate import as_number_problem, is_address


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


def identify(snapshot: Snapshot, notes: Notes) -> Identity:
    """Node, AS number and router id. A node that cannot be read leaves its sessions as they are (R13)."""
    node = snapshot.cluster.node
    if node is None:
        notes.add("NodeNotUsable", f"the store has no Node {snapshot.node}: create it; sessions stay as they are")
        return Identity(snapshot.node, 0, "", {}, {})
    addresses = node_addresses(node)
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
    )


def connected(kernel: KernelState, configuration: BGPConfiguration | None) -> tuple[Address, ...]:
    """The node's addresses without those of interfaces that ``ignoredInterfaces`` matches."""
    patterns = configuration.spec.ignored_interfaces if configuration else ()
    if not patterns:
        return kernel.addresses
    ignored = {link.index for link in kernel.links.values() if any(fnmatchcase(link.name, p) for p in patterns)}
    return tuple(address for address in kernel.addresses if address.interface not in ignored)


def node_addresses(node: Node) -> dict[Family, str]:
    """Where the node's sessions end: as its annotations say, else at its first InternalIP of each family."""
    found: dict[Family, str] = {}
    for version, key in ANNOTATION_ADDRESS.items():
        text = node.metadata.annotations.get(key, "")
        if is_address(text, version):
            found[family_of(text)] = text
    for entry in node.status.addresses:
        if entry.type == "InternalIP":
            found.setdefault(family_of(entry.address), entry.address)
    return found


def node_as(node: Node, configuration: BGPConfiguration | None) -> int:
    """The node's annotation, else the cluster's AS number; -1 for an annotation that is no number."""
    text = node.metadata.annotations.get(ANNOTATION_ASN)
    if text is None:
        return (configuration.spec if configuration else BGPConfigurationSpec()).as_number
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else -1


def router_id(name: str, addresses: Mapping[Family, str]) -> str:
    """The IPv4 address; without one, 32 bits of the name's hash (RFC 6286 asks only that they be unique in the AS)."""
    return addresses.get("ipv4 unicast") or str(IPv4Address(zlib.crc32(name.encode()) or 1))
