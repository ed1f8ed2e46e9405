"""The wiring of one pod: Calico's recipe, in four netlink batches and without a wait.

    pod    eth0, /32 and /128, default via 169.254.1.1 and via the node end's link-local address; both gateways are
           permanent neighbours, so the first packet leaves without a question; the /128 is local at once, so the
           answer to it is taken
    node   ul<hash>, MAC ee:ee:ee:ee:ee:ee, in LINK_GROUP; a /32 and a /128 route to it; the pod's MAC is already a
           (stale) neighbour, so the first packet arrives without a question, and a changed MAC heals by itself

Everything here is synchronous: the kernel carries out each request within the system call.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import socket
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec

from cni import beside, netns, rtnl, sysctls
from cni.errors import CNIError
from cni.marks import (
    GATEWAY4,
    LINK_GROUP,
    LINK_GROUP_DOOMED,
    LINK_MAC,
    LINK_PREFIX,
    METRIC_PODS,
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
    nest,
)

#: The link-local address that LINK_MAC gives (EUI-64, RFC 4291 appendix A): the pod's IPv6 gateway.
GATEWAY6: Final = "fe80::ecee:eeff:feee:eeee"
#: Without any uplink: Ethernet's.
DEFAULT_MTU: Final = 1500
#: ETH_MAX_MTU (include/uapi/linux/if_ether.h): a veth takes no more.
MOST_MTU: Final = 65535
#: IPv6 is off on a link with less (RFC 8200, section 5).
LEAST_MTU6: Final = 1280

_MAKE = NLM_F_CREATE | NLM_F_EXCL
_PUT = NLM_F_CREATE | NLM_F_REPLACE
#: There is such a route; the gateway is on another interface (fib_check_nh, net/ipv4/fib_semantics.c).
_ROUTED_ELSEWHERE: Final = frozenset({errno.EEXIST, errno.ENETUNREACH})

# What is the same in every pod's messages.
_ANY_LINK: Final = rtnl.LINK.pack(0, 0, 0, 0, 0)
_NODE_MAC: Final = attr(rtnl.IFLA_ADDRESS, rtnl.mac_bytes(LINK_MAC))
_GROUP: Final = attr_u32(rtnl.IFLA_GROUP, LINK_GROUP)
_DOOM: Final = attr_u32(rtnl.IFLA_GROUP, LINK_GROUP_DOOMED)
_ONE_QUEUE: Final = attr_u32(rtnl.IFLA_NUM_TX_QUEUES, 1) + attr_u32(rtnl.IFLA_NUM_RX_QUEUES, 1)
_VETH: Final = attr_text(rtnl.IFLA_INFO_KIND, "veth")
_FORWARD4: Final = nest(
    socket.AF_INET,
    nest(rtnl.IFLA_INET_CONF, attr_u32(rtnl.CONF_FORWARDING, 1), attr_u32(rtnl.CONF_PROXY_ARP, 1)),
)
# The kernel's own link-local address would spend a second in duplicate detection; ours does not.
_NO_ADDRESS6: Final = nest(socket.AF_INET6, attr(rtnl.IFLA_INET6_ADDR_GEN_MODE, bytes((rtnl.ADDR_GEN_NONE,))))
_NODE_END: Final = {False: attr(rtnl.IFLA_AF_SPEC, _FORWARD4), True: attr(rtnl.IFLA_AF_SPEC, _FORWARD4 + _NO_ADDRESS6)}


#: Where the kernel has them; elsewhere in a container that may not write there.
SYSCTLS: Final = Path("/proc/sys")
#: Whether this network namespace forwards.
FORWARD4, FORWARD6 = "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"


class WiringError(CNIError):
    """The kernel refused a step of the wiring; nothing of it is left. The message names step, link and reason."""


class InterfaceExists(WiringError):
    """The pod has an interface of the name that was asked for, and it is not ours."""


class Wiring(msgspec.Struct, frozen=True):
    """A pod's wiring as wanted: names of both ends, the pod end's MAC, plain addresses, MTU of both ends."""

    node_end: str
    pod_end: str
    mac: str
    addresses: tuple[str, ...]
    mtu: int
    #: Where the sysctls of the thread's namespace can be written.
    sysctls: Path = SYSCTLS


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


def wire(node: Netlink, pod_ns: int, want: Wiring) -> tuple[int, bool]:
    """Makes the veth pair, addresses, neighbours and routes; returns the node end's index, and whether both ends have
    carrier already (``has_carrier`` asks again).

    ``pod_ns`` is a descriptor of the pod's network namespace. A link of ours that is left from before under the same
    name is removed first. Raises WiringError, InterfaceExists; then nothing is left.
    """
    made = False
    try:
        link = _make_pair(node, pod_ns, want)
        made = True
        with _netlink_of(pod_ns) as pod:
            if not _apply_first(pod, pod_end(want, link.peer), want, pod_ns):
                beside.wire(pod, link.peer, want.addresses, tuple(gateway(a) for a in want.addresses))
            if link.accept_ra > 1:
                # Only with 2 does a router take advertisements: a pod could give the node a default route.
                _zero(want.sysctls, f"ipv6/conf/{want.node_end}/accept_ra")
            _apply(node, node_end(want, link.index), want.node_end, want.sysctls)
            ready = pod.carrier(want.pod_end) and node.carrier(want.node_end)
    except (NetlinkError, OSError) as e:
        if made:
            remove(node, want.node_end)
        raise WiringError(f"wiring of {want.node_end} to {want.pod_end}, {', '.join(want.addresses)}: {e}") from e
    return link.index, ready


def has_carrier(node: Netlink, pod_ns: int, want: Wiring) -> bool:
    """Whether both ends may send; asking carries out what would otherwise lose the first packets."""
    with _netlink_of(pod_ns) as pod:
        return pod.carrier(want.pod_end) and node.carrier(want.node_end)


def unwire(node: Netlink, node_end: str, addresses: Sequence[str]) -> bool:
    """Takes the pod's routes out and dooms its link, which costs nothing; ``reap`` removes all doomed ones at once.

    Returns whether there was a link. What is gone already is no error. Raises WiringError.
    """
    messages = [Message(rtnl.DELROUTE, _host_route(a, 0)) for a in addresses]
    # Not NEWLINK: without a link of that name it would mean every link of the group (rtnl_newlink).
    messages.append(Message(rtnl.SETLINK, _ANY_LINK + attr_text(rtnl.IFLA_IFNAME, node_end) + _DOOM))
    errors = node.batch(messages)
    for error in errors:
        if error is not None and error.number not in (errno.ESRCH, errno.ENODEV):
            raise WiringError(f"unwiring of {node_end}, {', '.join(addresses)}: {error}") from error
    return errors[-1] is None


def reap(node: Netlink) -> None:
    """Removes every doomed link; takes some 20 ms however many they are (RCU). Raises NetlinkError."""
    _delete(node, _ANY_LINK + _DOOM)


def remove(node: Netlink, node_end: str) -> None:
    """Removes one link, and with it everything on it, at once (20 ms). Gone already is no error. NetlinkError."""
    _delete(node, _ANY_LINK + attr_text(rtnl.IFLA_IFNAME, node_end))


def _delete(node: Netlink, body: bytes) -> None:
    for error in node.batch((Message(rtnl.DELLINK, body),)):
        if error is not None and error.number != errno.ENODEV:
            raise error


def _make_pair(node: Netlink, pod_ns: int, want: Wiring) -> rtnl.Link:
    message = Message(rtnl.NEWLINK, pair(want, pod_ns), _MAKE)
    try:
        made = node.make(message)
    except NetlinkError as e:
        if e.number != errno.EEXIST:
            raise
        # A link of this name on the node can only be ours, left by a kill. That in the pod may be the end of a doomed
        # one, if the namespace is used again at once.
        remove(node, want.node_end)
        reap(node)
        made = _make_again(node, message, want)
    link = rtnl.read_link(made.body) if made else rtnl.find(node, want.node_end)
    if link is None:
        raise NetlinkError(errno.ENODEV, f"{want.node_end} vanished as soon as it was made")
    return link


def _make_again(node: Netlink, message: Message, want: Wiring) -> Message | None:
    try:
        return node.make(message)
    except NetlinkError as e:
        if e.number != errno.EEXIST:
            raise
        raise InterfaceExists(f"the pod already has an interface {want.pod_end}, which is not ours") from e


def pair(want: Wiring, pod_ns: int) -> bytes:
    """RTM_NEWLINK's body: both ends with name, MAC, MTU and one queue, the peer already in its namespace."""
    both = _ONE_QUEUE + attr_u32(rtnl.IFLA_MTU, want.mtu)
    peer = (
        _ANY_LINK
        + attr_text(rtnl.IFLA_IFNAME, want.pod_end)
        + attr(rtnl.IFLA_ADDRESS, rtnl.mac_bytes(want.mac))
        + both
        + attr_u32(rtnl.IFLA_NET_NS_FD, pod_ns)
    )
    data = attr(rtnl.IFLA_INFO_DATA, attr(rtnl.VETH_INFO_PEER, peer))
    return (
        _ANY_LINK
        + attr_text(rtnl.IFLA_IFNAME, want.node_end)
        + _NODE_MAC
        + both
        + _GROUP
        + attr(rtnl.IFLA_LINKINFO, _VETH + data)
    )


def pod_end(want: Wiring, index: int) -> list[Message]:
    """What is done in the pod, to its interface of this index."""
    messages = [_up(index)]
    for a in want.addresses:
        via, family = gateway(a), rtnl.family(a)
        messages.append(_address(index, a, len(rtnl.packed(a)) * 8, rtnl.SCOPE_UNIVERSE))
        messages.append(_neighbour(index, via, LINK_MAC, rtnl.NUD_PERMANENT))
        hop, oif = rtnl.packed(via), attr_u32(rtnl.RTA_OIF, index)
        if family == socket.AF_INET:
            on_link = _route(family, 32, rtnl.RTPROT_BOOT, rtnl.SCOPE_LINK) + attr(rtnl.RTA_DST, hop) + oif
            messages.append(Message(rtnl.NEWROUTE, on_link, _MAKE))
        else:
            messages.append(_local(index, a))
        default = _route(family, 0, rtnl.RTPROT_BOOT, rtnl.SCOPE_UNIVERSE) + attr(rtnl.RTA_GATEWAY, hop) + oif
        messages.append(Message(rtnl.NEWROUTE, default, _MAKE))
    return messages


def node_end(want: Wiring, index: int) -> list[Message]:
    """What is done on the node, to the veth of this index, which is still down."""
    six = any(":" in a for a in want.addresses)
    configure = rtnl.LINK.pack(0, 0, index, 0, 0) + _NODE_END[six]
    messages = [Message(rtnl.NEWLINK, configure), _answer_at_once(index), _up(index)]
    if six:
        messages.append(_address(index, GATEWAY6, 64, rtnl.SCOPE_LINK))
    for a in want.addresses:
        messages.append(_neighbour(index, a, want.mac, rtnl.NUD_STALE))
        # REPLACE cannot hit a foreign route: ours are told apart by their metric (R10).
        messages.append(Message(rtnl.NEWROUTE, _host_route(a, index), _PUT))
    return messages


def _up(index: int) -> Message:
    return Message(rtnl.NEWLINK, rtnl.LINK.pack(0, 0, index, rtnl.IFF_UP, rtnl.IFF_UP))


def _answer_at_once(index: int) -> Message:
    """proxy_delay 0: a pod that flushed its neighbours is answered now, not within 0.8 s."""
    none = struct.pack("=Q", 0)
    parameters = nest(rtnl.NDTA_PARMS, attr_u32(rtnl.NDTPA_IFINDEX, index), attr(rtnl.NDTPA_PROXY_DELAY, none))
    body = rtnl.NEIGHTBL.pack(socket.AF_INET) + attr_text(rtnl.NDTA_NAME, "arp_cache") + parameters
    return Message(rtnl.SETNEIGHTBL, body)


def _address(index: int, address: str, length: int, scope: int) -> Message:
    raw = rtnl.packed(address)
    flags = rtnl.IFA_F_NODAD if len(raw) == 16 else 0
    head = rtnl.ADDR.pack(rtnl.family(address), length, flags, scope, index)
    return Message(rtnl.NEWADDR, head + attr(rtnl.IFA_LOCAL, raw) + attr(rtnl.IFA_ADDRESS, raw), _MAKE)


def _local(index: int, address: str) -> Message:
    """What makes the pod take packets for its IPv6 address. The kernel makes such a route too, but from a work queue
    (addrconf_dad_start, net/ipv6/addrconf.c): the answer to the first SYN may come before that, and be dropped."""
    head = rtnl.ROUTE.pack(
        socket.AF_INET6, 128, 0, 0, rtnl.RT_TABLE_LOCAL, rtnl.RTPROT_BOOT, rtnl.SCOPE_UNIVERSE, rtnl.RTN_LOCAL, 0
    )
    return Message(
        rtnl.NEWROUTE, head + attr(rtnl.RTA_DST, rtnl.packed(address)) + attr_u32(rtnl.RTA_OIF, index), _MAKE
    )


def _neighbour(index: int, address: str, mac: str, state: int) -> Message:
    head = rtnl.NEIGH.pack(rtnl.family(address), index, state, 0, 0)
    body = head + attr(rtnl.NDA_DST, rtnl.packed(address)) + attr(rtnl.NDA_LLADDR, rtnl.mac_bytes(mac))
    return Message(rtnl.NEWNEIGH, body, _PUT)


def _host_route(address: str, index: int) -> bytes:
    raw = rtnl.packed(address)
    head = _route(rtnl.family(address), len(raw) * 8, PROTO_PODS, rtnl.SCOPE_LINK)
    body = head + attr(rtnl.RTA_DST, raw) + attr_u32(rtnl.RTA_PRIORITY, METRIC_PODS)
    return body + attr_u32(rtnl.RTA_OIF, index) if index else body


def _route(family: int, length: int, protocol: int, scope: int) -> bytes:
    return rtnl.ROUTE.pack(family, length, 0, 0, rtnl.RT_TABLE_MAIN, protocol, scope, rtnl.RTN_UNICAST, 0)


def _netlink_of(pod_ns: int) -> Netlink:
    """A socket in the pod's namespace: it stays there, while the thread comes back."""
    with netns.inside(pod_ns):
        return Netlink()


def _apply(netlink: Netlink, messages: Sequence[Message], interface: str, sysctls: Path) -> None:
    """As ``Netlink.apply``. Where IPv6 is off on the interface, which a runtime may have seen to, it is turned on
    (EACCES: inet6_rtm_newaddr, net/ipv6/addrconf.c) and what was refused is said again."""
    for _, error in _refused(netlink, messages, interface, sysctls, None):
        raise error


def _apply_first(pod: Netlink, messages: Sequence[Message], want: Wiring, pod_ns: int) -> bool:
    """As ``_apply``; False if another interface has some of the routes already (the kernel has done all the rest)."""
    alone = True
    for message, error in _refused(pod, messages, want.pod_end, want.sysctls, pod_ns):
        if message.type != rtnl.NEWROUTE or error.number not in _ROUTED_ELSEWHERE:
            raise error
        alone = False
    return alone


def _refused(
    netlink: Netlink, messages: Sequence[Message], interface: str, sysctls: Path, pod_ns: int | None
) -> list[tuple[Message, NetlinkError]]:
    errors = netlink.batch(messages)
    if any(error is not None and error.number == errno.EACCES for error in errors):
        with netns.inside(pod_ns) if pod_ns is not None else nullcontext():
            _zero(sysctls, f"ipv6/conf/{interface}/disable_ipv6")
        messages = [m for m, error in zip(messages, errors, strict=True) if error is not None]
        errors = netlink.batch(messages)
    return [(m, error) for m, error in zip(messages, errors, strict=True) if error is not None]


def _zero(sysctls: Path, name: str) -> None:
    """Sets a sysctl of the namespace that the thread is in. A write costs more than a batch: it is for what is rare."""
    (sysctls / "net" / name).write_text("0")


def prepare_node(root: Path = SYSCTLS, record: Path | None = None) -> None:
    """Turns forwarding on in this network namespace, where it is off; what was changed is kept in the folder ``record``
    (``cni.sysctls``). Raises OSError.

    Interfaces that live by router advertisements go on doing so: a router takes them only with ``accept_ra`` 2
    (Documentation/networking/ip-sysctl.rst).
    """
    if sysctls.path(FORWARD4, root).read_text().strip() != "1":
        sysctls.change(FORWARD4, "1", root, record)
    forwarding = sysctls.path(FORWARD6, root)
    if not forwarding.exists() or forwarding.read_text().strip() == "1":
        return
    for setting in (root / "net/ipv6/conf").glob("*/accept_ra"):
        name = setting.parent.name
        if name not in ("all", "default") and setting.read_text().strip() == "1":
            sysctls.change(f"net.ipv6.conf.{name.replace('.', '/')}.accept_ra", "2", root, record)
    sysctls.change(FORWARD6, "1", root, record)


def _hash(container: str, interface: str) -> bytes:
    # No container id and no interface name holds a slash.
    return hashlib.blake2b(f"{container}/{interface}".encode(), digest_size=16).digest()
