"""Where a cluster's control plane is in the fabric: on a port of the first spine, or of a mesh's switch.

It has the address of the service ``kubernetes``: nodes and pods reach the API server there without a kube-proxy.
"""

from __future__ import annotations

from typing import Final

from lab.kube.plane import SERVICES
from lab.net import Net
from lab.oob import CONTROL_PLANE
from lab.rack import BRIDGE
from lab.topology import SWITCH, Node, Topology

#: The first address of the API server's --service-cluster-ip-range; and where that is IPv6 alone.
SERVICE: Final = "10.96.0.1"
_SERVICE6: Final = "fd00:10:97::1"
#: As the fabric sees it; the service's address is one of a link's two.
#: A kube-proxy that knows the service refuses what is sent to its address untranslated: it leads to another.
_ENDPOINT: Final = "10.97.0.1"
_LINK: Final = (
    ("10.96.0.0/31", "10.97.0.0/31", "fd00:10:96::/127"),
    (f"{SERVICE}/31", f"{_ENDPOINT}/31", "fd00:10:96::1/127"),
)
_ON_SEGMENT: Final = ("10.1.0.251", "fd00:10:1::fb")
_PORT, _HERE = "api0", "fabric0"


def service(topology: Topology) -> str:
    """The address of the service ``kubernetes``."""
    return _SERVICE6 if topology.shape.ipv6_only else SERVICE


def services(topology: Topology) -> str:
    """Where Services have their addresses."""
    return SERVICES.partition(",")[2] if topology.shape.ipv6_only else SERVICES


def endpoint(topology: Topology) -> str:
    """The address at which a proxy of services finds the API server."""
    return _ON_SEGMENT[topology.shape.ipv6_only] if topology.shape.mesh else _ENDPOINT


def plug(net: Net, topology: Topology) -> None:
    """Makes a member of the namespace that we are in, and links it. The rack is there. Raises NetError."""
    net.adopt(CONTROL_PLANE)
    net.sysctl(CONTROL_PLANE, {"net.ipv4.ip_forward": "0"})
    if topology.shape.mesh:
        _on_a_segment(net, topology)
        return
    spine = topology.spines[0].name
    net.link(spine, _PORT, CONTROL_PLANE, _HERE)
    for name, port, addresses in ((spine, _PORT, _LINK[0]), (CONTROL_PLANE, _HERE, _LINK[1])):
        net.address(name, port, addresses)
    net.ip(CONTROL_PLANE, ["route add 0.0.0.0/0 via 10.96.0.0", "route add ::/0 via fd00:10:96::"])


def _on_a_segment(net: Net, topology: Topology) -> None:
    """No router there knows the service's address or leads to pods: nodes have a route, as an installer's script would
    leave it, and the control plane sends to pods by way of the first node."""
    v4, v6 = _ON_SEGMENT
    net.link(SWITCH, _PORT, CONTROL_PLANE, _HERE)
    net.ip(SWITCH, [f"link set dev {_PORT} master {BRIDGE}"])
    net.address(CONTROL_PLANE, _HERE, [f"{v6}/64"] if topology.shape.ipv6_only else [f"{v4}/24", f"{v6}/64"])
    net.address(CONTROL_PLANE, "lo", [service(topology)])
    for pool, first in zip(topology.pools, topology.nodes[0].addresses, strict=True):
        net.ip(CONTROL_PLANE, [f"route add {pool.cidr} via {first}"])
    for node in topology.nodes:
        lead(net, topology, node)


def lead(net: Net, topology: Topology, node: Node) -> None:
    """Gives a node its way to the control plane, where no default route is one. Raises NetError."""
    if topology.shape.mesh:
        net.ip(node.name, [f"route add {service(topology)} via {endpoint(topology)} dev {SWITCH} proto static"])
