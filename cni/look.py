"""What the kernel shows of a pod's wiring and of the node's uplinks."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from cni import beside, netns, rtnl
from cni.marks import LINK_GROUP, LINK_MAC, PROTO_IMPORTS, PROTO_PODS
from cni.netlink import Message, Netlink, NetlinkError, attr, attr_u32, attributes
from cni.podnet import DEFAULT_MTU, GATEWAY6, MOST_MTU, Wiring


def problems(node: Netlink, pod_ns: int, want: Wiring, gateways: Sequence[str]) -> list[str]:
    """What of the wiring is not as wanted, each in a sentence; empty if all is. ``gateways`` are those whose default
    route must be in the pod. MTU, which later plugins may change, and whatever else is there are not judged. Raises
    NetlinkError."""
    outer = rtnl.find(node, want.node_end)
    if outer is None:
        return [f"the node's end {want.node_end} is gone"]
    found = _node_problems(node, outer, want)
    with netns.inside(pod_ns), Netlink() as pod:
        inner = rtnl.find(pod, want.pod_end)
        if inner is None:
            return [*found, f"the pod has no interface {want.pod_end}"]
        if inner.index != outer.peer or inner.peer != outer.index:
            return [*found, f"the pod's {want.pod_end} is not the other end of {want.node_end}"]
        found += _pod_problems(pod, inner, want, gateways)
    for a in want.addresses:
        oif = _route_to(node, a)
        if oif != outer.index:
            found.append(f"the node's route to {a} does not lead to {want.node_end}")
    return found


def uplink_mtu(node: Netlink) -> int:
    """The MTU for pods: the smallest of the links that a default route or a nexthop of ours (a BGP import) uses;
    DEFAULT_MTU if there is none. A default route is what leads to 192.0.2.1 and 2001:db8::1: addresses for
    documentation (RFC 5737, RFC 3849), which no other route should match. Raises NetlinkError."""
    indices: set[int] = set()
    for probe in ("192.0.2.1", "2001:db8::1"):
        indices |= _uses(node, probe)
    for message in node.dump(Message(rtnl.GETNEXTHOP, rtnl.NEXTHOP.pack(0, 0, 0, 0))):
        if message.body[2] == PROTO_IMPORTS and (oif := attributes(message.body, rtnl.NEXTHOP.size).get(rtnl.NHA_OIF)):
            indices.add(rtnl.U32.unpack(oif)[0])
    links = [link for i in indices if (link := rtnl.find_index(node, i)) is not None]
    # The loopback's 65536 is more than a veth takes: what ends there is on its way to no uplink.
    return min((link.mtu for link in links if link.mtu <= MOST_MTU), default=DEFAULT_MTU)


def _node_problems(node: Netlink, link: rtnl.Link, want: Wiring) -> list[str]:
    end = f"the node's end {want.node_end}"
    found: list[str] = []
    if link.group != LINK_GROUP:
        found.append(f"{end} is in group {link.group}, not {LINK_GROUP}")
    if not link.up:
        found.append(f"{end} is down")
    if link.mac != LINK_MAC:
        found.append(f"{end} has the MAC {link.mac}, not {LINK_MAC}, which the pod sends to")
    if any(":" not in a for a in want.addresses):
        settings = {"forwarding": link.forwarding, "proxy_arp": link.proxy_arp}
        found += [f"{end} has {name}=0" for name, on in settings.items() if not on]
    if any(":" in a for a in want.addresses) and not _has_gateway6(node, link.index):
        found.append(f"{end} lacks the address {GATEWAY6}")
    return found


def _has_gateway6(node: Netlink, index: int) -> bool:
    head = rtnl.ADDR.pack(socket.AF_INET6, 0, 0, 0, index)
    try:
        return node.get(Message(rtnl.GETADDR, head + attr(rtnl.IFA_ADDRESS, rtnl.packed(GATEWAY6)))) is not None
    except NetlinkError as e:
        if e.number == errno.EADDRNOTAVAIL:
            return False
        raise


def _pod_problems(pod: Netlink, link: rtnl.Link, want: Wiring, gateways: Sequence[str]) -> list[str]:
    found: list[str] = []
    if not link.up:
        found.append(f"the pod's {want.pod_end} is down")
    if want.mac and link.mac != want.mac:
        found.append(f"the pod's {want.pod_end} has the MAC {link.mac}, not {want.mac}")

    present = set()
    for m in pod.dump(Message(rtnl.GETADDR, rtnl.ADDR.pack(0, 0, 0, 0, link.index))):
        _, length, _, _, index = rtnl.ADDR.unpack_from(m.body)
        values = attributes(m.body, rtnl.ADDR.size)
        if index == link.index:
            present.add((values.get(rtnl.IFA_LOCAL) or values.get(rtnl.IFA_ADDRESS), length))
    for a in want.addresses:
        if (rtnl.packed(a), len(rtnl.packed(a)) * 8) not in present:
            found.append(f"the pod's {want.pod_end} lacks the address {a}")

    neighbours = {}
    for m in pod.dump(Message(rtnl.GETNEIGH, rtnl.NEIGH.pack(0, 0, 0, 0, 0) + attr_u32(8, link.index))):  # NDA_IFINDEX
        _, index, state, _, _ = rtnl.NEIGH.unpack_from(m.body)
        values = attributes(m.body, rtnl.NEIGH.size)
        if index == link.index:
            neighbours[values.get(rtnl.NDA_DST)] = (state, values.get(rtnl.NDA_LLADDR))
    defaults = set()
    on_link = set()
    own = beside.TABLE_BASE + link.index
    beside_another = False
    for family in (socket.AF_INET, socket.AF_INET6):
        request = rtnl.ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + attr_u32(rtnl.RTA_OIF, link.index)
        for m in pod.dump(Message(rtnl.GETROUTE, request)):
            values = attributes(m.body, rtnl.ROUTE.size)
            table = rtnl.U32.unpack(values[rtnl.RTA_TABLE])[0] if rtnl.RTA_TABLE in values else m.body[4]
            if table not in (rtnl.RT_TABLE_MAIN, own) or m.body[7] != rtnl.RTN_UNICAST:
                continue
            beside_another |= table == own
            if m.body[1] == 0:
                defaults.add(values.get(rtnl.RTA_GATEWAY))
            elif rtnl.RTA_GATEWAY not in values:
                on_link.add(values.get(rtnl.RTA_DST))
    if beside_another:
        rules = beside.rules(pod)
        found += [
            f"the pod lacks the rule for what is sent from {a}"
            for a in want.addresses
            if (link.index, rtnl.packed(a)) not in rules
        ]
    for g in gateways:
        if neighbours.get(rtnl.packed(g)) != (rtnl.NUD_PERMANENT, rtnl.mac_bytes(LINK_MAC)):
            found.append(f"the pod's {want.pod_end} lacks the permanent neighbour {g}")
        if rtnl.packed(g) not in defaults:
            found.append(f"the pod lacks the default route via {g}")
        if ":" not in g and not beside_another and rtnl.packed(g) not in on_link:
            found.append(f"the pod lacks the route to {g}")
    return found


def _route_to(node: Netlink, address: str) -> int:
    """Index of the link that packets to this address take by a pod route of ours; 0 if by anything else."""
    message = _match(node, address)
    if message is None or message.body[5] != PROTO_PODS:
        return 0
    oif = attributes(message.body, rtnl.ROUTE.size).get(rtnl.RTA_OIF)
    return int(rtnl.U32.unpack(oif)[0]) if oif else 0


def _uses(node: Netlink, address: str) -> set[int]:
    message = _match(node, address)
    if message is None:
        return set()
    values = attributes(message.body, rtnl.ROUTE.size)
    found = {rtnl.U32.unpack(values[rtnl.RTA_OIF])[0]} if rtnl.RTA_OIF in values else set()
    hops = values.get(rtnl.RTA_MULTIPATH, b"")
    start = 0
    while start + rtnl.MULTIPATH.size <= len(hops):
        length, _, _, index = rtnl.MULTIPATH.unpack_from(hops, start)
        found.add(index)
        start += max(rtnl.MULTIPATH.size, (length + 3) & ~3)
    return found


def _match(node: Netlink, address: str) -> Message | None:
    """The routing entry, as it stands in the table, that packets to this address would take."""
    raw = rtnl.packed(address)
    head = rtnl.ROUTE.pack(rtnl.family(address), len(raw) * 8, 0, 0, 0, 0, 0, 0, rtnl.RTM_F_FIB_MATCH)
    try:
        return node.get(Message(rtnl.GETROUTE, head + attr(rtnl.RTA_DST, raw)))
    except NetlinkError as e:
        # No route, or one that says so (unreachable, blackhole, prohibit).
        if e.number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            return None
        raise
