"""The management network of a lab: how its nodes reach the API server, as over the management ports of a real rack.

A bridge in the namespace that the supervisor itself is in, one port a node. It is no part of the fabric: nobody
announces it, and a node's way to it stands in a routing table of its own that only the node's own packets look into
(ip-rule(8), ``iif lo``), so agent and CNI server take it for no uplink, and what a pod sends there ends at the fabric's
edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Final

from lab.errors import LabError
from lab.topology import Node

if TYPE_CHECKING:
    from lab.net import Net

#: The namespace of bridge and control plane, as a member of the lab.
CONTROL_PLANE: Final = "control-plane"
BRIDGE: Final = "oob"
PORT: Final = "oob0"
#: Outside of pools and fabric.
NETWORK: Final = IPv4Network("172.30.0.0/16")
#: Where the API server listens.
SERVER: Final = str(NETWORK[1])
#: A Linux bridge has at most 1023 ports (net/bridge/br_private.h, BR_PORT_BITS).
MAX_NODES: Final = 1023
_FIRST_NODE: Final = 256
_TABLE: Final = 30
_PRIORITY: Final = 100


def address(node: Node) -> str:
    """The node's own on the management network."""
    return str(NETWORK[_FIRST_NODE + node.number])


def build(net: Net) -> None:
    """Makes a member of the namespace that we are in, and the bridge there. Raises NetError."""
    net.adopt(CONTROL_PLANE)
    # A new namespace may have taken over that the machine is a router; this is none.
    net.sysctl(CONTROL_PLANE, {"net.ipv4.ip_forward": "0"})
    net.ip(
        CONTROL_PLANE,
        [
            f"link add name {BRIDGE} type bridge",
            f"addr add {SERVER}/{NETWORK.prefixlen} dev {BRIDGE}",
            f"link set dev {BRIDGE} up",
        ],
    )


def plug(net: Net, nodes: Sequence[Node]) -> None:
    """Gives every node its port; their namespaces are there. Raises NetError, and LabError for too many."""
    if len(nodes) > MAX_NODES:
        raise LabError(f"{len(nodes)} nodes: a management bridge takes {MAX_NODES}: fewer, or --store sqlite")
    lines = []
    for node in nodes:
        lines.append(f"link add name {node.name} type veth peer name {PORT} netns {net.path(node.name)}")
        lines.append(f"link set dev {node.name} master {BRIDGE} up")
    net.ip(CONTROL_PLANE, lines)
    for node in nodes:
        net.sysctl(node.name, {f"net.ipv4.conf.{PORT}.forwarding": "0", f"net.ipv6.conf.{PORT}.disable_ipv6": "1"})
        net.ip(
            node.name,
            [
                f"addr add {address(node)}/{NETWORK.prefixlen} dev {PORT} noprefixroute",
                f"link set dev {PORT} up",
                f"route add {NETWORK} dev {PORT} src {address(node)} table {_TABLE} proto static",
                f"rule add pref {_PRIORITY} iif lo lookup {_TABLE}",
            ],
        )
