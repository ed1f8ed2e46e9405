"""The wiring of one pod: Calico's recipe, in five netlink batches and without a wait.

    pod    eth0, /32 and /128, default via 169.254.1.1 and via the node end's link-local address; both gateways are
           permanent neighbours, so the first packet leaves without a question
    node   ul<hash>, MAC ee:ee:ee:ee:ee:ee, in LINK_GROUP; a /32 and a /128 route to it; the pod's MAC is already a
           (stale) neighbour, so the first packet arrives without a question, and a changed MAC heals by itself

Everything here is synchronous: the kernel carries out each request within the system call. Names and numbers of
attributes are those of the kernel's include/uapi/linux/{if_link,rtnetlink,neighbour,if_addr}.h.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import ipaddress
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cni import netns
from cni.errors import CNIError
from cni.marks import (
    GATEWAY4,
    LINK_GROUP,
    LINK_GROUP_DOOMED,
    LINK_MAC,
    LINK_PREFIX,
    METRIC_PODS,
    PROTO_IMPORTS,
    PROTO_PODS,
)
from cni.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Netlink,
    NetlinkError,
    attr,
    attr_text,
    attr_u32,
    attributes,
    nest,
)

#: The link-local address that LINK_MAC gives (EUI-64, RFC 4291 appendix A): the pod's IPv6 gateway.
GATEWAY6: Final = "fe80::ecee:eeff:feee:eeee"
#: Without any uplink: Ethernet's.
DEFAULT_MTU: Final = 1500
#: IPv6 is off on a link with less (RFC 8200, section 5).
LEAST_MTU6: Final = 1280

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _GETADDR = 20, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWNEIGH, _GETNEIGH = 28, 30
_GETNEXTHOP = 106

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDR = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NEIGH = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_NEXTHOP = struct.Struct("=BBBxI")  # nhmsg: family, scope, protocol, flags
_MULTIPATH = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, index
_U32 = struct.Struct("=I")

_IFF_UP = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_LINKINFO = 1, 3, 4, 5, 18
_IFLA_AF_SPEC, _IFLA_GROUP, _IFLA_NET_NS_FD, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 26, 27, 28, 31, 32
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_INET_CONF, _CONF_FORWARDING, _CONF_PROXY_ARP = 1, 1, 3
_INET6_ADDR_GEN_MODE, _ADDR_GEN_NONE = 8, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_F_NODAD = 1, 2, 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_MULTIPATH = 1, 4, 5, 6, 9
_RT_TABLE_MAIN, _RTPROT_BOOT, _RTN_UNICAST, _RTM_F_FIB_MATCH = 254, 3, 1, 0x2000
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_NDA_DST, _NDA_LLADDR, _NUD_STALE, _NUD_PERMANENT = 1, 2, 0x04, 0x80
_NHA_OIF = 5

_MAKE = NLM_F_CREATE | NLM_F_EXCL
_PUT = NLM_F_CREATE | NLM_F_REPLACE


class WiringError(CNIError):
    """The kernel refused a step of the wiring; nothing of it is left. The message names step, link and reason."""


class InterfaceExists(WiringError):
    """The pod has an interface of the name that was asked for, and it is not ours."""


class Link(msgspec.Struct, frozen=True):
    """An interface as RTM_GETLINK shows it. ``peer`` is the index of a veth's other end in its own namespace."""

    index: int
    name: str
    mac: str
    mtu: int
    group: int
    peer: int
    up: bool


class Wiring(msgspec.Struct, frozen=True):
    """A pod's wiring as wanted: names of both ends, the pod end's MAC, plain addresses, MTU of both ends."""

    node_end: str
    pod_end: str
    mac: str
    addresses: tuple[str, ...]
    mtu: int


def link_name(container: str, interface: str) -> str:
    """The node end's name: LINK_PREFIX and 13 letters and digits of a hash (65 bits), 15 characters in all."""
    return LINK_PREFIX + base64.b32encode(_hash(container, interface)[:8]).decode().rstrip("=").lower()


def pod_mac(container: str, interface: str) -> str:
    """The pod end's MAC: chosen by hash, so that nobody must ask for it; local and unicast (IEEE 802, bits 1 and 0)."""
    raw = bytearray(_hash(container, interface)[8:14])
    raw[0] = raw[0] & 0xFC | 0x02
    return raw.hex(":")


def gateway(address: str) -> str:
    return GATEWAY6 if ":" in address else GATEWAY4


# -- make and unmake -----------------------------------------------------------------------------------------------


def wire(node: Netlink, pod_ns: int, want: Wiring) -> int:
    """Makes the veth pair, addresses, neighbours and routes; returns the node end's index.

    ``pod_ns`` is a descriptor of the pod's network namespace. A link of ours that is left from before under the same
    name is removed first. Raises WiringError, InterfaceExists; then nothing is left.
    """
    made = False
    try:
        link = _make_pair(node, pod_ns, want)
        made = True
        with netns.inside(pod_ns):
            _sysctls(want, want.pod_end)
            with Netlink() as pod:
                pod.apply(_pod_end(want, link.peer))
        _sysctls(want, want.node_end)
        node.apply(_node_end(want, link.index))
    except (NetlinkError, OSError) as e:
        if made:
            remove(node, want.node_end)
        raise WiringError(f"wiring of {want.node_end} to {want.pod_end}, {', '.join(want.addresses)}: {e}") from e
    return link.index


def has_carrier(node: Netlink, pod_ns: int, want: Wiring) -> bool:
    """Whether both ends may send; asking carries out what would otherwise lose the first packets."""
    with netns.inside(pod_ns), Netlink() as pod:
        return pod.carrier(want.pod_end) and node.carrier(want.node_end)


def unwire(node: Netlink, node_end: str, addresses: Sequence[str]) -> bool:
    """Takes the pod's routes out and dooms its link, which costs nothing; ``reap`` removes all doomed ones at once.

    Returns whether there was a link. What is gone already is no error. Raises WiringError.
    """
    link = find(node, node_end)
    routes = [Message(_DELROUTE, _host_route(a, link.index if link else 0)) for a in addresses]
    doom = (
        []
        if link is None
        else [Message(_NEWLINK, _LINK.pack(0, 0, link.index, 0, 0) + attr_u32(_IFLA_GROUP, LINK_GROUP_DOOMED))]
    )
    for error in node.batch(routes + doom):
        if error is not None and error.number not in (errno.ESRCH, errno.ENODEV):
            raise WiringError(f"unwiring of {node_end}, {', '.join(addresses)}: {error}") from error
    return link is not None


def reap(node: Netlink) -> None:
    """Removes every doomed link; takes some 20 ms however many they are (RCU). Raises NetlinkError."""
    _delete(node, _LINK.pack(0, 0, 0, 0, 0) + attr_u32(_IFLA_GROUP, LINK_GROUP_DOOMED))


def remove(node: Netlink, node_end: str) -> None:
    """Removes one link, and with it everything on it, at once (20 ms). Gone already is no error. NetlinkError."""
    _delete(node, _LINK.pack(0, 0, 0, 0, 0) + attr_text(_IFLA_IFNAME, node_end))


def _delete(node: Netlink, body: bytes) -> None:
    for error in node.batch((Message(_DELLINK, body),)):
        if error is not None and error.number != errno.ENODEV:
            raise error


def _make_pair(node: Netlink, pod_ns: int, want: Wiring) -> Link:
    make = Message(_NEWLINK, pair(want, pod_ns), _MAKE)
    try:
        node.request(make)
    except NetlinkError as e:
        if e.number != errno.EEXIST:
            raise
        # Both names are in question: the node end's can only be ours, left by a kill or just doomed.
        if find(node, want.node_end) is None:
            raise InterfaceExists(f"the pod already has an interface {want.pod_end}, which is not ours") from e
        remove(node, want.node_end)
        try:
            node.request(make)
        except NetlinkError as again:
            if again.number != errno.EEXIST:
                raise
            raise InterfaceExists(f"the pod already has an interface {want.pod_end}, which is not ours") from again
    link = find(node, want.node_end)
    if link is None:
        raise NetlinkError(errno.ENODEV, f"{want.node_end} vanished as soon as it was made")
    return link


def pair(want: Wiring, pod_ns: int) -> bytes:
    """RTM_NEWLINK's body: both ends with name, MAC, MTU and one queue, the peer already in its namespace."""
    queues = attr_u32(_IFLA_NUM_TX_QUEUES, 1) + attr_u32(_IFLA_NUM_RX_QUEUES, 1) + attr_u32(_IFLA_MTU, want.mtu)
    peer = (
        attr_text(_IFLA_IFNAME, want.pod_end)
        + attr(_IFLA_ADDRESS, _mac(want.mac))
        + queues
        + attr_u32(_IFLA_NET_NS_FD, pod_ns)
    )
    data = nest(_INFO_DATA, attr(_VETH_PEER, _LINK.pack(0, 0, 0, 0, 0) + peer))
    return (
        _LINK.pack(0, 0, 0, 0, 0)
        + attr_text(_IFLA_IFNAME, want.node_end)
        + attr(_IFLA_ADDRESS, _mac(LINK_MAC))
        + queues
        + attr_u32(_IFLA_GROUP, LINK_GROUP)
        + nest(_IFLA_LINKINFO, attr_text(_INFO_KIND, "veth"), data)
    )


def _pod_end(want: Wiring, index: int) -> list[Message]:
    messages = [_up(index)]
    for a in want.addresses:
        via, family = gateway(a), _family(a)
        messages += (
            _address(index, a, len(_packed(a)) * 8, _SCOPE_UNIVERSE),
            _neighbour(index, via, LINK_MAC, _NUD_PERMANENT),
        )
        if family == socket.AF_INET:
            on_link = _ROUTE.pack(family, 32, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, _SCOPE_LINK, _RTN_UNICAST, 0)
            messages.append(
                Message(_NEWROUTE, on_link + attr(_RTA_DST, _packed(via)) + attr_u32(_RTA_OIF, index), _MAKE)
            )
        default = _ROUTE.pack(family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, _SCOPE_UNIVERSE, _RTN_UNICAST, 0)
        messages.append(
            Message(_NEWROUTE, default + attr(_RTA_GATEWAY, _packed(via)) + attr_u32(_RTA_OIF, index), _MAKE)
        )
    return messages


def _node_end(want: Wiring, index: int) -> list[Message]:
    six = any(":" in a for a in want.addresses)
    conf = nest(_INET_CONF, attr_u32(_CONF_FORWARDING, 1), attr_u32(_CONF_PROXY_ARP, 1))
    families = nest(socket.AF_INET, conf)
    if six:
        # The kernel's own link-local address would spend a second in duplicate detection; ours does not.
        families += nest(socket.AF_INET6, attr(_INET6_ADDR_GEN_MODE, bytes((_ADDR_GEN_NONE,))))
    messages = [
        Message(_NEWLINK, _LINK.pack(0, 0, index, 0, 0) + attr(_IFLA_AF_SPEC, families)),
        _up(index),
    ]
    if six:
        messages.append(_address(index, GATEWAY6, 64, _SCOPE_LINK))
    for a in want.addresses:
        messages.append(_neighbour(index, a, want.mac, _NUD_STALE))
        # REPLACE cannot hit a foreign route: ours are told apart by their metric (R10).
        messages.append(Message(_NEWROUTE, _host_route(a, index), _PUT))
    return messages


def _up(index: int) -> Message:
    return Message(_NEWLINK, _LINK.pack(0, 0, index, _IFF_UP, _IFF_UP))


def _address(index: int, address: str, length: int, scope: int) -> Message:
    raw = _packed(address)
    flags = _IFA_F_NODAD if len(raw) == 16 else 0
    body = _ADDR.pack(_family(address), length, flags, scope, index) + attr(_IFA_LOCAL, raw) + attr(_IFA_ADDRESS, raw)
    return Message(_NEWADDR, body, _MAKE)


def _neighbour(index: int, address: str, mac: str, state: int) -> Message:
    body = _NEIGH.pack(_family(address), index, state, 0, 0)
    return Message(_NEWNEIGH, body + attr(_NDA_DST, _packed(address)) + attr(_NDA_LLADDR, _mac(mac)), _PUT)


def _host_route(address: str, index: int) -> bytes:
    raw = _packed(address)
    head = _ROUTE.pack(_family(address), len(raw) * 8, 0, 0, _RT_TABLE_MAIN, PROTO_PODS, _SCOPE_LINK, _RTN_UNICAST, 0)
    body = head + attr(_RTA_DST, raw) + attr_u32(_RTA_PRIORITY, METRIC_PODS)
    return body + attr_u32(_RTA_OIF, index) if index else body


def _sysctls(want: Wiring, interface: str) -> None:
    """What netlink cannot set, in the namespace that the thread is in. A runtime may have turned IPv6 off there."""
    if any(":" in a for a in want.addresses):
        folder = Path("/proc/sys/net/ipv6/conf") / interface
        (folder / "disable_ipv6").write_text("0")
        if interface == want.node_end:
            # A router's interface, but ``default.accept_ra=2`` would still let a pod give the node a default route.
            (folder / "accept_ra").write_text("0")
    if interface == want.node_end:
        # For a pod that flushed its neighbours: the answer to its question must not be put off by up to 0.8 s.
        Path(f"/proc/sys/net/ipv4/neigh/{interface}/proxy_delay").write_text("0")


# -- look ----------------------------------------------------------------------------------------------------------


def find(netlink: Netlink, name: str) -> Link | None:
    """The interface of this name in the socket's namespace. Raises NetlinkError."""
    return _get_link(netlink, _LINK.pack(0, 0, 0, 0, 0) + attr_text(_IFLA_IFNAME, name))


def find_index(netlink: Netlink, index: int) -> Link | None:
    """The interface of this index in the socket's namespace. Raises NetlinkError."""
    return _get_link(netlink, _LINK.pack(0, 0, index, 0, 0))


def links(netlink: Netlink) -> list[Link]:
    """Every interface in the socket's namespace. Raises NetlinkError, DumpInterrupted."""
    return [_read_link(m.body) for m in netlink.dump(Message(_GETLINK, _LINK.pack(0, 0, 0, 0, 0)))]


def problems(node: Netlink, pod_ns: int, want: Wiring, gateways: Sequence[str]) -> list[str]:
    """What of the wiring is not as wanted, each in a sentence; empty if all is. ``gateways`` are those whose default
    route must be in the pod. MTU and whatever else is there are not judged. Raises NetlinkError."""
    found: list[str] = []
    outer = find(node, want.node_end)
    if outer is None or outer.group != LINK_GROUP:
        return [f"the node's end {want.node_end} is gone"]
    if not outer.up:
        found.append(f"the node's end {want.node_end} is down")
    with netns.inside(pod_ns), Netlink() as pod:
        inner = find(pod, want.pod_end)
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
    for message in node.dump(Message(_GETNEXTHOP, _NEXTHOP.pack(0, 0, 0, 0))):
        if message.body[2] == PROTO_IMPORTS and (oif := attributes(message.body, _NEXTHOP.size).get(_NHA_OIF)):
            indices.add(_U32.unpack(oif)[0])
    found = [link.mtu for i in indices if (link := find_index(node, i)) is not None]
    return min(found, default=DEFAULT_MTU)


def _pod_problems(pod: Netlink, link: Link, want: Wiring, gateways: Sequence[str]) -> list[str]:
    found: list[str] = []
    if not link.up:
        found.append(f"the pod's {want.pod_end} is down")
    if want.mac and link.mac != want.mac:
        found.append(f"the pod's {want.pod_end} has the MAC {link.mac}, not {want.mac}")

    present = set()
    for m in pod.dump(Message(_GETADDR, _ADDR.pack(0, 0, 0, 0, link.index))):
        _, length, _, _, index = _ADDR.unpack_from(m.body)
        values = attributes(m.body, _ADDR.size)
        if index == link.index:
            present.add((values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS), length))
    for a in want.addresses:
        if (_packed(a), len(_packed(a)) * 8) not in present:
            found.append(f"the pod's {want.pod_end} lacks the address {a}")

    neighbours = {}
    for m in pod.dump(Message(_GETNEIGH, _NEIGH.pack(0, 0, 0, 0, 0) + attr_u32(8, link.index))):  # NDA_IFINDEX
        _, index, state, _, _ = _NEIGH.unpack_from(m.body)
        values = attributes(m.body, _NEIGH.size)
        if index == link.index:
            neighbours[values.get(_NDA_DST)] = (state, values.get(_NDA_LLADDR))
    defaults = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0) + attr_u32(_RTA_OIF, link.index)
        for m in pod.dump(Message(_GETROUTE, request)):
            if m.body[1] == 0:
                defaults.add(attributes(m.body, _ROUTE.size).get(_RTA_GATEWAY))
    for g in gateways:
        if neighbours.get(_packed(g)) != (_NUD_PERMANENT, _mac(LINK_MAC)):
            found.append(f"the pod's {want.pod_end} lacks the permanent neighbour {g}")
        if _packed(g) not in defaults:
            found.append(f"the pod lacks the default route via {g}")
    return found


def _route_to(node: Netlink, address: str) -> int:
    """Index of the link that packets to this address take by a pod route of ours; 0 if by anything else."""
    message = _match(node, address)
    if message is None or message.body[5] != PROTO_PODS:
        return 0
    oif = attributes(message.body, _ROUTE.size).get(_RTA_OIF)
    return int(_U32.unpack(oif)[0]) if oif else 0


def _uses(node: Netlink, address: str) -> set[int]:
    message = _match(node, address)
    if message is None:
        return set()
    values = attributes(message.body, _ROUTE.size)
    found = {_U32.unpack(values[_RTA_OIF])[0]} if _RTA_OIF in values else set()
    hops = values.get(_RTA_MULTIPATH, b"")
    start = 0
    while start + _MULTIPATH.size <= len(hops):
        length, _, _, index = _MULTIPATH.unpack_from(hops, start)
        found.add(index)
        start += max(_MULTIPATH.size, (length + 3) & ~3)
    return found


def _match(node: Netlink, address: str) -> Message | None:
    """The routing entry, as it stands in the table, that packets to this address would take."""
    raw = _packed(address)
    head = _ROUTE.pack(_family(address), len(raw) * 8, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
    try:
        return node.get(Message(_GETROUTE, head + attr(_RTA_DST, raw)))
    except NetlinkError as e:
        # No route, or one that says so (unreachable, blackhole, prohibit).
        if e.number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            return None
        raise


def _get_link(netlink: Netlink, body: bytes) -> Link | None:
    try:
        return _read_link(netlink.get(Message(_GETLINK, body)).body)
    except NetlinkError as e:
        if e.number == errno.ENODEV:
            return None
        raise


def _read_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    values = attributes(body, _LINK.size)
    return Link(
        index=index,
        name=values[_IFLA_IFNAME].rstrip(b"\0").decode(errors="surrogateescape"),
        mac=values.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_number(values.get(_IFLA_MTU)),
        group=_number(values.get(_IFLA_GROUP)),
        peer=_number(values.get(_IFLA_LINK)),
        up=bool(flags & _IFF_UP),
    )


def _number(value: bytes | None) -> int:
    return int(_U32.unpack(value)[0]) if value else 0


def _hash(container: str, interface: str) -> bytes:
    # No container id and no interface name holds a slash.
    return hashlib.blake2b(f"{container}/{interface}".encode(), digest_size=16).digest()


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
