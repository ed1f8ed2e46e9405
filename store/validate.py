"""What is refused, and why: one function for every kind. Pure.

The API server refuses the same with CEL and admission policies; the other backends call ``validate`` and
``validate_against`` before they write. Every problem names the field, its value and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final, cast

import msgspec

from store.errors import BadSelector, Problem
from store.model import (
    ANNOTATION_ADDRESS,
    ANNOTATION_ASN,
    BLOCK_LIMIT,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPFilter,
    BGPPassword,
    BGPPeer,
    BGPPeerSpec,
    ConfigMap,
    EndpointSlice,
    FilterRule,
    IPAMBlock,
    IPAMConfiguration,
    IPPool,
    IPPoolSpec,
    IPReservation,
    KubeEvent,
    Meta,
    Node,
    Resource,
    Secret,
    block_name,
    within_of,
)
from store.selector import parse

Network = IPv4Network | IPv6Network

#: Prefix length of a block where the pool says none, by IP version; Calico's defaults.
DEFAULT_BLOCK_SIZE: Mapping[int, int] = {4: 26, 6: 122}

#: The most that ``maxBlocksPerHost`` can say; Calico's.
MAX_BLOCKS = 1_000_000

#: Filters of a peer, rules of one list of a filter, operations of a rule, AS numbers of one field.
MAX_FILTERS = 16
MAX_RULES = 128
MAX_OPERATIONS = 10
MAX_AS_NUMBERS = 10
#: Named communities of a configuration, prefixes that it says anything of, communities of one of them.
MAX_ADVERTISEMENTS = 32
MAX_COMMUNITIES = 8
#: Characters of a community's name.
MAX_COMMUNITY_NAME = 63
#: Patterns of interfaces that are ignored.
MAX_INTERFACES = 32
INTERFACE_PATTERN = r"[*A-Za-z0-9:._-]{1,15}"


def _up_to(limit: str) -> str:
    """A regular expression for the numbers from 0 to ``limit``, each in its one spelling."""
    shorter = f"[1-9][0-9]{{0,{len(limit) - 2}}}"
    same = (
        f"{limit[:i]}[{0 if i else 1}-{int(digit) - 1}][0-9]{{{len(limit) - i - 1}}}"
        for i, digit in enumerate(limit)
        if digit != "0"
    )
    return f"(0|{shorter}|{'|'.join(same)}|{limit})"


_16, _32 = _up_to("65535"), _up_to("4294967295")
#: A standard community (RFC 1997), or a large one (RFC 8092); one regular expression, as CEL reckons the cost of more.
COMMUNITY_PATTERN = f"{_16}:{_16}|{_32}:{_32}:{_32}"
#: Communities that everybody knows by a name (IANA, "BGP Well-known Communities"), and their numbers.
WELL_KNOWN_COMMUNITIES: Final[Mapping[str, str]] = {
    "graceful-shutdown": "65535:0",
    "llgr-stale": "65535:6",
    "no-llgr": "65535:7",
    "blackhole": "65535:666",
    "no-export": "65535:65281",
    "no-advertise": "65535:65282",
    "no-export-subconfed": "65535:65283",
    "no-peer": "65535:65284",
}
NAMED_COMMUNITY_PATTERN = "|".join((COMMUNITY_PATTERN, *WELL_KNOWN_COMMUNITIES))

#: Which kinds ``validate_against`` wants to see beside an object of this kind.
BESIDE: Mapping[type[Resource], type[Resource]] = {IPPool: IPPool, IPAMBlock: IPPool}


def validate(obj: Resource, *, old: Resource | None = None) -> tuple[Problem, ...]:
    """All that is wrong with ``obj`` by itself, or as the successor of ``old`` (what never changes); () if nothing."""
    problems = [*_namespace(obj), *_metadata(obj.metadata)]
    check = _CHECKS.get(type(obj))
    if check is not None:
        problems += check(obj)
    if old is not None:
        problems += _immutable(obj, old)
    return tuple(problems)


def validate_against(obj: Resource, others: Iterable[Resource]) -> tuple[Problem, ...]:
    """What is wrong with ``obj`` beside ``others`` (objects of ``BESIDE``): pools that overlap, a block that is not one
    of its pool's. A block whose pool is not there is let through: the pool may have been deleted before the block."""
    if isinstance(obj, IPPool):
        return tuple(
            Problem(
                "spec.cidr",
                obj.spec.cidr,
                f"it overlaps IPPool {other.name} ({other.spec.cidr}): pools share no address, or one block could "
                f"belong to two of them; choose a range outside, or delete that pool first",
            )
            for other in overlaps(obj, (o for o in others if isinstance(o, IPPool)))
        )
    if isinstance(obj, IPAMBlock):
        pools = (o for o in others if isinstance(o, IPPool) and o.name == obj.spec.pool)
        return tuple(problem for pool in pools for problem in _block_of_pool(obj, pool))
    return ()


def overlaps(pool: IPPool, others: Iterable[IPPool]) -> tuple[IPPool, ...]:
    """The pools among ``others`` that share an address with ``pool``; itself (by name) not counted. A CIDR that cannot
    be read overlaps nothing: ``validate`` refuses it."""
    mine = _network(pool.spec.cidr)
    if mine is None:
        return ()
    found = []
    for other in others:
        theirs = _network(other.spec.cidr)
        if other.name != pool.name and theirs is not None and _overlap(mine, theirs):
            found.append(other)
    return tuple(found)


def block_size(pool: IPPool) -> int | None:
    """Prefix length of the pool's blocks: what it says, else its family's default (26, 122). None: that of each Node's
    podCIDR."""
    if pool.spec.use_pod_cidrs:
        return None
    return pool.spec.block_size or DEFAULT_BLOCK_SIZE[ip_network(pool.spec.cidr).version]


def peer_address(text: str) -> tuple[str, int]:
    """Address and port of a ``peerIP``: ``10.0.0.1``, ``10.0.0.1:1179``, ``fd00::1``, ``[fd00::1]:1179``; the port is
    179 where none is given (RFC 4271, 3.). ``ValueError`` says what is wrong."""
    brackets = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", text)
    if brackets:
        host, port = brackets[1], brackets[2]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, None
    if port is not None and not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError(f"the port {port!r} is not in 1..65535")
    if "%" in host:
        raise ValueError("a link-local address with a zone is not served: peer with a global or private address")
    try:
        address = ip_address(host)
    except ValueError:
        raise ValueError("write an IPv4 or IPv6 address, with a port as 10.0.0.1:1179 or [fd00::1]:1179") from None
    if address.version == 6 and address.ipv4_mapped is not None:
        raise ValueError(f"write the IPv4 address as {address.ipv4_mapped}")
    if brackets and address.version == 4:
        raise ValueError(f"only an IPv6 address stands in brackets: write {address}{f':{port}' if port else ''}")
    if str(address) != host:
        raise ValueError(f"write the address as {address}")
    if address.is_multicast or address.is_unspecified:
        raise ValueError("no peer can have that address")
    return host, 179 if port is None else int(port)


_UNITS: Mapping[str, float] = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}


def duration(text: str) -> float:
    """Seconds of a duration as Kubernetes writes it: ``120s``, ``2m``, ``1h30m``, ``500ms``. ``ValueError``."""
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?(h|ms|m|s))+", text, re.ASCII):
        raise ValueError("write a duration with its unit, as 120s, 2m or 1h30m")
    return sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)(h|ms|m|s)", text))


def as_number_problem(number: int) -> str:
    """Why nobody can have this AS number, or "": RFC 7607 (0), 6793 (23456), 7300 (the last of either width)."""
    if not 1 <= number <= 4294967294:
        return "an AS number is in 1..4294967294"
    if number == 23456:
        return "23456 stands for AS numbers that do not fit into 16 bits (RFC 6793); private ones are 64512..65534"
    if number == 65535:
        return "65535 is reserved (RFC 7300); private ones are 64512..65534"
    return ""


# -- metadata -----------------------------------------------------------------------------------------------------

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_KEY_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_ANNOTATIONS_LIMIT = 256 * 1024
_SECRET_LIMIT = 1024 * 1024


def _is_name(text: str) -> bool:
    """RFC 1123 subdomain, as Kubernetes asks of names."""
    return len(text) <= 253 and _NAME.fullmatch(text) is not None


def _is_secret_key(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9._-]{1,253}", text) is not None and text not in (".", "..")


def _is_key(text: str) -> bool:
    """A qualified name: ``name`` or ``domain/name``."""
    prefix, slash, name = text.rpartition("/")
    return _KEY_NAME.fullmatch(name) is not None and (not slash or _is_name(prefix))


_NAME_REMEDY = "write lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit (RFC 1123)"
_SECRET_KEY_REMEDY = "a key has letters, digits, '-', '_' and '.', at most 253 of them"
_KEY_REMEDY = "write name or domain/name of letters, digits, '-', '_' and '.', the name at most 63 characters"


def _namespace(obj: Resource) -> Iterator[Problem]:
    namespace = obj.metadata.namespace
    if not obj.NAMESPACED:
        if namespace:
            yield Problem("metadata.namespace", namespace, "leave it out: this kind belongs to the whole cluster")
    elif not re.fullmatch(_LABEL, namespace):
        remedy = "say in which namespace it lives: lower-case letters, digits and '-', at most 63 of them (RFC 1123)"
        yield Problem("metadata.namespace", namespace, remedy)


def _metadata(meta: Meta) -> Iterator[Problem]:
    if not _is_name(meta.name):
        yield Problem("metadata.name", meta.name, _NAME_REMEDY)
    for key, value in meta.labels.items():
        if not _is_key(key):
            yield Problem("metadata.labels", key, _KEY_REMEDY)
        if value and not _KEY_NAME.fullmatch(value):
            yield Problem(
                f"metadata.labels[{key}]", value, "write at most 63 letters, digits, '-', '_' and '.', or nothing"
            )
    for key in meta.annotations:
        if not _is_key(key):
            yield Problem("metadata.annotations", key, _KEY_REMEDY)
    size = sum(len(k.encode()) + len(v.encode()) for k, v in meta.annotations.items())
    if size > _ANNOTATIONS_LIMIT:
        yield Problem("metadata.annotations", f"{size} bytes", f"all together hold at most {_ANNOTATIONS_LIMIT} bytes")
    for finalizer in meta.finalizers:
        if "/" not in finalizer or not _is_key(finalizer):
            yield Problem("metadata.finalizers", finalizer, "write domain/name, as underlay.network/owner")
    if len(set(meta.finalizers)) != len(meta.finalizers):
        yield Problem("metadata.finalizers", list(meta.finalizers), "name each once")
    for i, owner in enumerate(meta.owner_references):
        for field in ("api_version", "kind", "name", "uid"):
            if not getattr(owner, field):
                yield Problem(f"metadata.ownerReferences[{i}].{field}", "", "an owner has all four: say which")


# -- addresses ----------------------------------------------------------------------------------------------------


def _network(text: str) -> Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and bool(cast(Any, one).overlaps(other))


def _inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and bool(cast(Any, inner).subnet_of(outer))


def _cidr(field: str, text: str, *, or_address: bool = False) -> Iterator[Problem]:
    """One spelling for each prefix: lower case, shortest form, no host bits, so that equal text is equal prefix."""
    network = _network(text)
    if network is None or "%" in text:
        yield Problem(field, text, "write an IPv4 or IPv6 prefix, as 10.244.0.0/16 or fd00:10:244::/48")
    elif network.version == 6 and network.network_address.ipv4_mapped is not None:
        yield Problem(field, text, "write an IPv4 prefix as IPv4")
    elif str(network) != text and not (or_address and text == str(network.network_address)):
        yield Problem(field, text, f"write {network}: one prefix has one spelling, without bits beyond its length")


def _cidrs(field: str, texts: tuple[str, ...], *, or_address: bool = False) -> Iterator[Problem]:
    for i, text in enumerate(texts):
        yield from _cidr(f"{field}[{i}]", text, or_address=or_address)
    if len(set(texts)) != len(texts):
        yield Problem(field, list(texts), "name each once")


def _address(field: str, text: str) -> Iterator[Problem]:
    try:
        address = ip_address(text)
    except ValueError:
        yield Problem(field, text, "write an IPv4 or IPv6 address")
        return
    if str(address) != text:
        yield Problem(field, text, f"write {address}")


def _selector(field: str, text: str) -> Iterator[Problem]:
    try:
        parse(text)
    except BadSelector as e:
        yield Problem(field, text, str(e))


_NO_OVERLAY = (
    "write Never or leave it out: Underlay has no overlay, the routers learn every block by BGP and carry pod "
    "addresses as they are; peer with them (BGPPeer) instead of tunnelling past them"
)


_SIZE_OF_POD_CIDRS = (
    "leave it out: with usePodCIDRs a block is a Node's podCIDR, of the size that kube-controller-manager gives it "
    "(--node-cidr-mask-size)"
)


def _pool(pool: IPPool) -> Iterator[Problem]:
    spec = pool.spec
    yield from _cidr("spec.cidr", spec.cidr)
    network = _network(spec.cidr)
    if network is not None:
        yield from _pool_range(spec.cidr, network)
        yield from _pool_block_size(spec, network)
    yield from _selector("spec.nodeSelector", spec.node_selector)
    for field, value in (("spec.ipipMode", spec.ipip_mode), ("spec.vxlanMode", spec.vxlan_mode)):
        if value != "Never":
            yield Problem(field, value, _NO_OVERLAY)
    if spec.nat_outgoing:
        yield Problem(
            "spec.natOutgoing",
            True,
            "write false or leave it out: it is not served, pods keep their own address on the whole way; "
            "translate at the border of your network where private addresses must not leave",
        )
    if spec.assignment_mode not in ("Automatic", "Manual"):
        yield Problem("spec.assignmentMode", spec.assignment_mode, "write Automatic or Manual")
    for use in spec.allowed_uses:
        # Calico writes [Workload, Tunnel] into every pool by itself: with no tunnel there is nothing to refuse.
        if use not in ("Workload", "Tunnel"):
            yield Problem("spec.allowedUses", use, "write Workload: addresses for other uses are not served")
    if "Workload" not in spec.allowed_uses:
        yield Problem("spec.allowedUses", list(spec.allowed_uses), "write [Workload]: pods are what pools are for")


def _pool_range(cidr: str, network: Network) -> Iterator[Problem]:
    special = (
        ("0.0.0.0/8", "this network"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/3", "multicast and reserved"),
        ("::/8", "loopback and reserved"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
    for text, what in special:
        if _overlap(network, ip_network(text)):
            yield Problem("spec.cidr", cidr, f"it contains {what} addresses ({text}), which cannot be routed to a pod")
            return


def _pool_block_size(spec: IPPoolSpec, network: Network) -> Iterator[Problem]:
    size, longest = spec.block_size, network.max_prefixlen
    shortest = max(network.prefixlen, longest - BLOCK_LIMIT.bit_length() + 1)
    if spec.use_pod_cidrs:
        if size:
            yield Problem("spec.blockSize", size, _SIZE_OF_POD_CIDRS)
    elif size == 0 and network.prefixlen > DEFAULT_BLOCK_SIZE[network.version]:
        default = DEFAULT_BLOCK_SIZE[network.version]
        yield Problem(
            "spec.blockSize",
            size,
            f"the pool is smaller than a block of the default size, /{default}: write {network.prefixlen}..{longest}",
        )
    elif size != 0 and not shortest <= size <= longest:
        remedy = (
            f"write {shortest}..{longest}: the prefix length of a block, which lies inside the pool and has at most "
            f"{BLOCK_LIMIT} addresses"
        )
        yield Problem("spec.blockSize", size, remedy)


def _reservation(reservation: IPReservation) -> Iterator[Problem]:
    yield from _cidrs("spec.reservedCIDRs", reservation.spec.reserved_cidrs, or_address=True)


def _ipam_configuration(configuration: IPAMConfiguration) -> Iterator[Problem]:
    spec = configuration.spec
    if configuration.name != "default":
        yield Problem("metadata.name", configuration.name, "write default: one configuration holds for all nodes")
    if not 0 <= spec.max_blocks_per_host <= MAX_BLOCKS:
        remedy = f"write 0..{MAX_BLOCKS}: the blocks that a node may have; 0 is no limit"
        yield Problem("spec.maxBlocksPerHost", spec.max_blocks_per_host, remedy)
    if not spec.strict_affinity:
        yield Problem(
            "spec.strictAffinity",
            False,
            "write true or leave it out: a node hands out addresses of its own blocks only, and never borrows from "
            "another's; where addresses are short, make the pool's blocks smaller (blockSize)",
        )


def _block(block: IPAMBlock) -> Iterator[Problem]:
    spec = block.spec
    yield from _cidr("spec.cidr", spec.cidr)
    network = _network(spec.cidr)
    for field, value in (("spec.pool", spec.pool), ("spec.node", spec.node)):
        if not _is_name(value):
            yield Problem(field, value, _NAME_REMEDY)
    if network is None:
        return
    if str(network) == spec.cidr and block.name != block_name(spec.cidr):
        remedy = f"write {block_name(spec.cidr)}: a block is named by its CIDR, so that each has one name"
        yield Problem("metadata.name", block.name, remedy)
    if str(network) == spec.cidr and spec.within not in ("", within_of(spec.cidr)):
        yield Problem(
            "spec.within", spec.within, f"leave it out, or write {within_of(spec.cidr)}: it follows from cidr"
        )
    yield from _allocations(block, network)


def _allocations(block: IPAMBlock, network: Network) -> Iterator[Problem]:
    first = int(network.network_address)
    last = int(network.broadcast_address)
    seen: set[str] = set()
    for i, allocation in enumerate(block.status.allocations):
        field = f"status.allocations[{i}]"
        wrong = tuple(_address(f"{field}.address", allocation.address))
        yield from wrong
        if wrong:
            continue
        address = ip_address(allocation.address)
        if address.version != network.version or not first <= int(address) <= last:
            yield Problem(f"{field}.address", allocation.address, f"it is outside the block {network}")
        if allocation.address in seen:
            yield Problem(f"{field}.address", allocation.address, "it is handed out twice: an address has one pod")
        seen.add(allocation.address)
        for part in ("network", "container", "interface"):
            if not getattr(allocation, part):
                yield Problem(f"{field}.{part}", "", "an attachment has network, container and interface: say which")
    for name, count in (("used", block.status.used), ("free", block.status.free)):
        if count < 0:
            yield Problem(f"status.{name}", count, "a count is 0 or more")


def _block_of_pool(block: IPAMBlock, pool: IPPool) -> Iterator[Problem]:
    mine, range_ = _network(block.spec.cidr), _network(pool.spec.cidr)
    if mine is None or range_ is None:
        return
    if not _inside(mine, range_):
        yield Problem("spec.cidr", block.spec.cidr, f"it is not inside its pool {pool.name} ({pool.spec.cidr})")
    elif (size := block_size(pool)) is not None and mine.prefixlen != size:
        yield Problem("spec.cidr", block.spec.cidr, f"blocks of pool {pool.name} are /{size}: one pool has one size")


# -- routing ------------------------------------------------------------------------------------------------------


def _as_number(field: str, number: int) -> Iterator[Problem]:
    why = as_number_problem(number)
    if why:
        yield Problem(field, number, why)


def _bgp_configuration(configuration: BGPConfiguration) -> Iterator[Problem]:
    spec = configuration.spec
    if configuration.name.startswith("node."):
        yield from _of_one_node(spec)
    elif configuration.name != "default":
        remedy = (
            f"write default, for all nodes, or node.NAME for one of them; for the AS number of one node set the "
            f"annotation {ANNOTATION_ASN} on it"
        )
        yield Problem("metadata.name", configuration.name, remedy)
    yield from _as_number("spec.asNumber", spec.as_number)
    yield from _cidrs("spec.importCIDRs", spec.import_cidrs)
    yield from _password("spec.nodeMeshPassword", spec.node_mesh_password)
    yield from _restart_time("spec.nodeMeshMaxRestartTime", spec.node_mesh_max_restart_time)
    if not 0 <= spec.listen_port <= 65535:
        yield Problem("spec.listenPort", spec.listen_port, "write a port, 1..65535; 0 is 179")
    for i, pattern in enumerate(spec.ignored_interfaces):
        yield from _interface(f"spec.ignoredInterfaces[{i}]", pattern)
    if len(spec.ignored_interfaces) > MAX_INTERFACES:
        yield Problem("spec.ignoredInterfaces", len(spec.ignored_interfaces), f"at most {MAX_INTERFACES}")
    if len(set(spec.ignored_interfaces)) != len(spec.ignored_interfaces):
        yield Problem("spec.ignoredInterfaces", list(spec.ignored_interfaces), "name each once")
    yield from _communities(spec)


def _interface(field: str, pattern: str) -> Iterator[Problem]:
    if not re.fullmatch(INTERFACE_PATTERN, pattern):
        remedy = "write an interface's name, '*' for any characters: letters, digits and '*:._-', at most 15 of them"
        yield Problem(field, pattern, remedy)


def _of_one_node(spec: BGPConfigurationSpec) -> Iterator[Problem]:
    for part in msgspec.structs.fields(BGPConfigurationSpec):
        value = getattr(spec, part.name)
        if part.name not in _OF_ONE_NODE and value != part.default:
            remedy = "leave it out: it holds for all nodes and stands in default"
            if part.name == "as_number":
                remedy += f"; for the AS number of one node set the annotation {ANNOTATION_ASN} on it"
            yield Problem(f"spec.{part.encode_name}", value, remedy)


_OF_ONE_NODE = ("listen_port", "communities", "prefix_advertisements")


def _communities(spec: BGPConfigurationSpec) -> Iterator[Problem]:
    names = [community.name for community in spec.communities]
    for i, community in enumerate(spec.communities):
        field = f"spec.communities[{i}]"
        if not _is_name(community.name) or len(community.name) > MAX_COMMUNITY_NAME:
            remedy = f"{_NAME_REMEDY}, at most {MAX_COMMUNITY_NAME} of them"
            yield Problem(f"{field}.name", community.name, remedy)
        yield from _community(f"{field}.value", community.value)
    if len(set(names)) != len(names):
        yield Problem("spec.communities", names, "name each once")
    for i, advertisement in enumerate(spec.prefix_advertisements):
        field = f"spec.prefixAdvertisements[{i}]"
        yield from _cidr(f"{field}.cidr", advertisement.cidr)
        for text in advertisement.communities:
            if text not in names and not is_community(text):
                remedy = "write a community as 65001:100 or 65001:1:100, or a name that stands in communities"
                yield Problem(f"{field}.communities", text, remedy)
        if len(advertisement.communities) > MAX_COMMUNITIES:
            yield Problem(f"{field}.communities", len(advertisement.communities), f"at most {MAX_COMMUNITIES}")
    for name, count in (("communities", len(names)), ("prefixAdvertisements", len(spec.prefix_advertisements))):
        if count > MAX_ADVERTISEMENTS:
            yield Problem(f"spec.{name}", count, f"at most {MAX_ADVERTISEMENTS}")


def _password(field: str, password: BGPPassword | None) -> Iterator[Problem]:
    if password is None:
        return
    ref = password.secret_key_ref
    if not _is_name(ref.name):
        yield Problem(f"{field}.secretKeyRef.name", ref.name, f"name a Secret: {_NAME_REMEDY}")
    if not _is_secret_key(ref.key):
        yield Problem(f"{field}.secretKeyRef.key", ref.key, _SECRET_KEY_REMEDY)


def _restart_time(field: str, text: str) -> Iterator[Problem]:
    try:
        if not 0 <= duration(text) <= 4095:
            yield Problem(field, text, "write 0s..4095s (RFC 4724 has 12 bits for it)")
    except ValueError as e:
        yield Problem(field, text, str(e))


def _bgp_peer(peer: BGPPeer) -> Iterator[Problem]:
    spec = peer.spec
    if spec.peer_selector:
        yield from _selector("spec.peerSelector", spec.peer_selector)
        for field, value in (("peerIP", spec.peer_ip), ("asNumber", spec.as_number), ("passive", spec.passive)):
            if value:
                yield Problem(f"spec.{field}", value, "leave it out, or peerSelector: nodes say where and who they are")
    else:
        try:
            peer_address(spec.peer_ip)
        except ValueError as e:
            yield Problem("spec.peerIP", spec.peer_ip, str(e))
        yield from _as_number("spec.asNumber", spec.as_number)
    if spec.node and not _is_name(spec.node):
        yield Problem("spec.node", spec.node, _NAME_REMEDY)
    if spec.node and spec.node_selector:
        remedy = f"leave it out, or leave out node ({spec.node}): a peer says its nodes in one way"
        yield Problem("spec.nodeSelector", spec.node_selector, remedy)
    yield from _selector("spec.nodeSelector", spec.node_selector)
    if not 0 <= spec.num_allowed_local_as_numbers <= 10:
        remedy = "write 0..10: how often our own AS may stand in a received path"
        yield Problem("spec.numAllowedLocalASNumbers", spec.num_allowed_local_as_numbers, remedy)
    yield from _restart_time("spec.maxRestartTime", spec.max_restart_time)
    if not 3 <= spec.hold_time <= 65535:
        remedy = "write 3..65535 seconds: 3 is RFC 4271's least, and a session without one finds no dead peer"
        yield Problem("spec.holdTime", spec.hold_time, remedy)
    if spec.max_prefixes < 1:
        yield Problem("spec.maxPrefixes", spec.max_prefixes, "write 1 or more: beyond it the peer is removed")
    yield from _cidrs("spec.importCIDRs", spec.import_cidrs)
    yield from _session(spec)
    for i, name in enumerate(spec.filters):
        if not _is_name(name):
            yield Problem(f"spec.filters[{i}]", name, f"name a BGPFilter: {_NAME_REMEDY}")
    if len(spec.filters) > MAX_FILTERS:
        yield Problem("spec.filters", len(spec.filters), f"a peer has at most {MAX_FILTERS} filters")
    if len(set(spec.filters)) != len(spec.filters):
        yield Problem("spec.filters", list(spec.filters), "name each once")
    if spec.default_route not in ("Never", "Fallback"):
        remedy = "write Never, or Fallback for a default route below every other one"
        yield Problem("spec.defaultRoute", spec.default_route, remedy)


def _session(spec: BGPPeerSpec) -> Iterator[Problem]:
    yield from _password("spec.password", spec.password)
    if spec.source_address not in ("", "UseNodeIP", "None"):
        yield Problem("spec.sourceAddress", spec.source_address, "write UseNodeIP or None, or leave it out")
    if spec.reachable_by:
        yield from _gateway(spec)
    if spec.local_as_number is not None:
        yield from _as_number("spec.localASNumber", spec.local_as_number)
    if not 0 <= spec.ttl_security <= 254:
        yield Problem("spec.ttlSecurity", spec.ttl_security, "write 1..254, the hops to the peer at most, or 0 for any")
    if spec.passive and spec.ttl_security:
        remedy = "leave it out, or passive: peers that are waited for share one socket, and its TTL would hold for all"
        yield Problem("spec.ttlSecurity", spec.ttl_security, remedy)
    if spec.passive and re.search(r"\]:|^[^:]*:[^:]*$", spec.peer_ip):
        remedy = "leave it out, or the port of peerIP: the peer connects to us, and its own port says nothing then"
        yield Problem("spec.passive", True, remedy)


def _gateway(spec: BGPPeerSpec) -> Iterator[Problem]:
    field, text = "spec.reachableBy", spec.reachable_by
    if spec.peer_selector:
        yield Problem(field, text, "leave it out, or peerSelector: it goes with one peer's address")
        return
    problems = tuple(_address(field, text))
    if problems:
        yield from problems
        return
    gateway = ip_address(text)
    if gateway.is_unspecified or gateway.is_multicast or gateway.is_loopback:
        yield Problem(field, text, "no gateway can have that address")
    elif gateway.version == 6 and gateway.is_link_local:
        yield Problem(field, text, "write the gateway's global or private address: a link-local one is on every link")
    try:
        host = peer_address(spec.peer_ip)[0]
    except ValueError:
        return  # said of peerIP already
    if ip_address(host).version != gateway.version:
        yield Problem(field, text, f"write an address of the family of peerIP ({host})")
    elif host == text:
        yield Problem(field, text, "write the gateway's address, or leave it out where the peer is on a link of ours")


def _bgp_filter(bgp_filter: BGPFilter) -> Iterator[Problem]:
    spec = bgp_filter.spec
    for field, version, rules in (
        ("spec.exportV4", 4, spec.export_v4),
        ("spec.importV4", 4, spec.import_v4),
        ("spec.exportV6", 6, spec.export_v6),
        ("spec.importV6", 6, spec.import_v6),
    ):
        if len(rules) > MAX_RULES:
            yield Problem(field, len(rules), f"a list has at most {MAX_RULES} rules: aggregate, or use a second filter")
        for i, rule in enumerate(rules):
            yield from _filter_rule(f"{field}[{i}]", version, rule)


def _filter_rule(field: str, version: int, rule: FilterRule) -> Iterator[Problem]:
    if rule.action not in ("Accept", "Reject"):
        yield Problem(f"{field}.action", rule.action, "write Accept or Reject")
    yield from _filter_cidr(field, version, rule)
    if rule.source not in ("", "RemotePeers"):
        yield Problem(f"{field}.source", rule.source, "write RemotePeers, or leave it out")
    if rule.interface:
        yield from _interface(f"{field}.interface", rule.interface)
    if rule.peer_type not in ("", "eBGP", "iBGP"):
        yield Problem(f"{field}.peerType", rule.peer_type, "write eBGP or iBGP, or leave it out")
    if rule.communities is not None:
        if len(rule.communities.values) != 1:
            remedy = "write one community; for another one write another rule"
            yield Problem(f"{field}.communities.values", list(rule.communities.values), remedy)
        for community in rule.communities.values:
            yield from _community(f"{field}.communities.values", community)
    yield from _as_numbers(f"{field}.asPathPrefix", rule.as_path_prefix, least=0)
    if rule.operations and rule.action != "Accept":
        remedy = "leave them out, or write action Accept: what is rejected is not changed"
        yield Problem(f"{field}.operations", len(rule.operations), remedy)
    if len(rule.operations) > MAX_OPERATIONS:
        yield Problem(f"{field}.operations", len(rule.operations), f"a rule has at most {MAX_OPERATIONS} operations")
    for i, operation in enumerate(rule.operations):
        where = f"{field}.operations[{i}]"
        if (operation.add_community is None) == (operation.prepend_as_path is None):
            yield Problem(where, "", "write one of addCommunity and prependASPath; for both, two operations")
        if operation.add_community is not None:
            yield from _community(f"{where}.addCommunity.value", operation.add_community.value)
        if operation.prepend_as_path is not None:
            yield from _as_numbers(f"{where}.prependASPath.prefix", operation.prepend_as_path.prefix, least=1)


def _filter_cidr(field: str, version: int, rule: FilterRule) -> Iterator[Problem]:
    if rule.match_operator not in ("", "Equal", "NotEqual", "In", "NotIn"):
        yield Problem(f"{field}.matchOperator", rule.match_operator, "write Equal, NotEqual, In or NotIn")
    if bool(rule.cidr) != bool(rule.match_operator):
        yield Problem(f"{field}.matchOperator", rule.match_operator, "write cidr and matchOperator, or neither")
    if rule.cidr:
        yield from _cidr(f"{field}.cidr", rule.cidr)
    network = _network(rule.cidr) if rule.cidr else None
    if network is not None and network.version != version:
        yield Problem(f"{field}.cidr", rule.cidr, f"write an IPv{version} prefix: the list is of IPv{version} rules")
        network = None
    length = rule.prefix_length
    if length is None:
        return
    if rule.match_operator not in ("In", "NotIn"):
        remedy = "leave it out: it goes with In and NotIn and a cidr; with Equal the length is the cidr's own"
        yield Problem(f"{field}.prefixLength", "", remedy)
    longest = 32 if version == 4 else 128
    least = network.prefixlen if network is not None else 0
    shortest = least if length.min is None else length.min
    if length.min is not None and not least <= length.min <= longest:
        yield Problem(f"{field}.prefixLength.min", length.min, f"write {least}..{longest}: lengths inside the cidr")
    if length.max is not None and not max(least, min(shortest, longest)) <= length.max <= longest:
        remedy = f"write {max(least, min(shortest, longest))}..{longest}: not below min, nor the cidr's own length"
        yield Problem(f"{field}.prefixLength.max", length.max, remedy)


def _community(field: str, text: str) -> Iterator[Problem]:
    if text not in WELL_KNOWN_COMMUNITIES and not is_community(text):
        remedy = (
            "write a community as 65001:100 (two numbers to 65535), as 65001:1:100 (three to 4294967295), "
            "or a well-known one by its name, as no-export"
        )
        yield Problem(field, text, remedy)


def is_community(text: str) -> bool:
    """A standard community or a large one, each number in its one spelling."""
    return re.fullmatch(COMMUNITY_PATTERN, text) is not None


def _as_numbers(field: str, numbers: tuple[int, ...], *, least: int) -> Iterator[Problem]:
    if not least <= len(numbers) <= MAX_AS_NUMBERS:
        yield Problem(field, list(numbers), f"write {least}..{MAX_AS_NUMBERS} AS numbers")
    for i, number in enumerate(numbers):
        yield from _as_number(f"{field}[{i}]", number)


def _node(node: Node) -> Iterator[Problem]:
    text = node.metadata.annotations.get(ANNOTATION_ASN)
    if text is not None:
        field = f"metadata.annotations[{ANNOTATION_ASN}]"
        if text.isascii() and text.isdigit() and len(text) <= 10:
            yield from (Problem(field, text, p.remedy) for p in _as_number(field, int(text)))
        else:
            yield Problem(field, text, "write an AS number, 1..4294967294")
    for version, key in ANNOTATION_ADDRESS.items():
        text = node.metadata.annotations.get(key)
        if text is not None and not is_address(text, version):
            yield Problem(f"metadata.annotations[{key}]", text, f"write an IPv{version} address in its one spelling")
    yield from _cidrs("spec.podCIDRs", node.spec.pod_cidrs)
    for i, address in enumerate(node.status.addresses):
        if address.type in ("InternalIP", "ExternalIP"):
            yield from _address(f"status.addresses[{i}].address", address.address)


def is_address(text: str, version: int) -> bool:
    """One of this IP version that a node can have, in its one spelling."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    nobody = address.is_unspecified or address.is_multicast or address.is_loopback or address.is_link_local
    return address.version == version and str(address) == text and not nobody


# -- Kubernetes' own ------------------------------------------------------------------------------------------------

_EVENT_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)", re.ASCII)


def _endpoint_slice(endpoints: EndpointSlice) -> Iterator[Problem]:
    version = {"IPv4": 4, "IPv6": 6, "FQDN": 0}.get(endpoints.address_type)
    if version is None:
        yield Problem("addressType", endpoints.address_type, "write IPv4, IPv6 or FQDN")
    for i, endpoint in enumerate(endpoints.endpoints):
        field = f"endpoints[{i}].addresses"
        if not 1 <= len(endpoint.addresses) <= 100:
            yield Problem(field, list(endpoint.addresses), "an endpoint has 1..100 addresses")
        for text in endpoint.addresses if version else ():
            network = _network(text)
            if network is None or "/" in text or network.version != version:
                yield Problem(field, text, f"write {endpoints.address_type} addresses, as addressType says")


def _event(event: KubeEvent) -> Iterator[Problem]:
    """As the API server holds events.k8s.io/v1 (pkg/apis/core/validation/events.go)."""
    yield from _event_time("eventTime", event.event_time)
    if event.type not in ("Normal", "Warning"):
        yield Problem("type", event.type, "write Normal or Warning")
    if not _is_key(event.reporting_controller):
        yield Problem("reportingController", event.reporting_controller, _KEY_REMEDY)
    for field, value in (
        ("reportingInstance", event.reporting_instance),
        ("action", event.action),
        ("reason", event.reason),
    ):
        if not 1 <= len(value) <= 128:
            yield Problem(field, value, "write 1..128 characters")
    if len(event.note.encode()) > 1024:
        yield Problem("note", event.note, "write at most 1024 bytes")
    regarding = event.regarding
    if regarding is None:
        yield Problem("regarding", None, "an event is about an object: say which")
    elif event.metadata.namespace != (regarding.namespace or "default"):
        remedy = f"write {regarding.namespace or 'default'}: an event lives where the object is, or in default"
        yield Problem("metadata.namespace", event.metadata.namespace, remedy)
    if event.series is not None:
        yield from _event_time("series.lastObservedTime", event.series.last_observed_time)
        if event.series.count < 2:
            yield Problem("series.count", event.series.count, "write 2 or more: the first one is no series")


def _event_time(field: str, text: str) -> Iterator[Problem]:
    if not _EVENT_TIME.fullmatch(text):
        yield Problem(field, text, "write RFC 3339 with six digits of a second, as 2026-01-01T00:00:00.000000Z")


def _secret(secret: Secret) -> Iterator[Problem]:
    for key in secret.data:
        if not _is_secret_key(key):
            yield Problem("data", key, _SECRET_KEY_REMEDY)
    if sum(map(len, secret.data.values())) > _SECRET_LIMIT:
        yield Problem("data", "(not shown)", f"all together hold at most {_SECRET_LIMIT} bytes")


def _config_map(config_map: ConfigMap) -> Iterator[Problem]:
    for key in config_map.data:
        if not _is_secret_key(key):
            yield Problem("data", key, _SECRET_KEY_REMEDY)
    if sum(len(value.encode()) for value in config_map.data.values()) > _SECRET_LIMIT:
        yield Problem("data", "(not shown)", f"all together hold at most {_SECRET_LIMIT} bytes")


# -- what never changes --------------------------------------------------------------------------------------------


def _immutable(obj: Resource, old: Resource) -> Iterator[Problem]:
    if isinstance(obj, IPPool) and isinstance(old, IPPool):
        if obj.spec.cidr != old.spec.cidr:
            yield _changed("spec.cidr", obj.spec.cidr, old.spec.cidr, "pool")
        if obj.spec.block_size != old.spec.block_size:
            yield _changed("spec.blockSize", obj.spec.block_size, old.spec.block_size, "pool")
        if obj.spec.use_pod_cidrs != old.spec.use_pod_cidrs:
            yield _changed("spec.usePodCIDRs", obj.spec.use_pod_cidrs, old.spec.use_pod_cidrs, "pool")
    if isinstance(obj, EndpointSlice) and isinstance(old, EndpointSlice) and obj.address_type != old.address_type:
        yield _changed("addressType", obj.address_type, old.address_type, "slice")
    if isinstance(obj, Secret) and isinstance(old, Secret) and obj.type != old.type:
        yield _changed("type", obj.type, old.type, "secret")
    if isinstance(obj, KubeEvent) and isinstance(old, KubeEvent):
        for part in msgspec.structs.fields(KubeEvent):
            value, before = getattr(obj, part.name), getattr(old, part.name)
            if value != before and part.name not in ("metadata", "series"):
                yield _changed(part.encode_name, value, before, "event")
    if isinstance(obj, IPAMBlock) and isinstance(old, IPAMBlock):
        for field in ("cidr", "pool", "node"):
            value, before = getattr(obj.spec, field), getattr(old.spec, field)
            if value != before:
                yield _changed(f"spec.{field}", value, before, "block")


def _changed(field: str, value: object, before: object, what: str) -> Problem:
    return Problem(field, value, f"it stays {before!r} as long as the {what} lives; make another {what} instead")


_CHECKS: Mapping[type[Resource], Callable[[Any], Iterator[Problem]]] = {
    IPPool: _pool,
    IPReservation: _reservation,
    IPAMConfiguration: _ipam_configuration,
    IPAMBlock: _block,
    BGPConfiguration: _bgp_configuration,
    BGPPeer: _bgp_peer,
    BGPFilter: _bgp_filter,
    Node: _node,
    EndpointSlice: _endpoint_slice,
    KubeEvent: _event,
    Secret: _secret,
    ConfigMap: _config_map,
}
