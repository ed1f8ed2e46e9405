"""Which IPPools a cluster begins with that has none: what is asked, and what follows from the answers. Pure.

The first source that says anything decides: the setting ``UNDERLAY_POOLS``; kubeadm's configuration (kubeadm.k8s.io,
ClusterConfiguration, ``networking.podSubnet``); k0s' (k0s.k0sproject.io, ClusterConfig, ``spec.network``); the Nodes'
``spec.podCIDRs``. What overlaps services or nodes is refused, and nothing is guessed (docs/zero-configuration.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final

import msgspec

from agent.errors import AgentError
from store.model import IPPool, IPPoolSpec, Meta
from store.validate import DEFAULT_BLOCK_SIZE, validate

#: The first pools' names, by IP version. A policy lets nodes create these and no others.
NAMES: Final = {4: "default-ipv4", 6: "default-ipv6"}
#: A pool has so many blocks at least (as a power of two), as long as a block keeps four addresses.
_BLOCKS: Final = 4
_SMALLEST: Final = 2
#: A podCIDR's pool has room for so many Nodes (as a power of two): a /24 is of a /16, a /64 of a /56, as installers
#: have them.
_NODES: Final = 8
_DO: Final = "create an IPPool, or say in UNDERLAY_POOLS (ConfigMap underlay-config) which the first ones are"

Network = IPv4Network | IPv6Network


class PoolsNotUsable(AgentError):
    """What was asked for is no set of first pools; the message says which part, and what to write."""


class Wish(msgspec.Struct, frozen=True):
    """A pool of the setting. ``block_size`` 0: as it fits."""

    cidr: str
    block_size: int = 0
    use_pod_cidrs: bool = False


class Ranges(msgspec.Struct, frozen=True):
    """What an installer's configuration says, as it is written there: nothing is checked yet."""

    pods: tuple[str, ...] = ()
    services: tuple[str, ...] = ()


class Member(msgspec.Struct, frozen=True):
    """A Node, by what it says of addresses."""

    name: str
    pod_cidrs: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known. An installer that left nothing in the cluster is None."""

    #: This node's name.
    node: str
    setting: tuple[Wish, ...] = ()
    kubeadm: Ranges | None = None
    k0s: Ranges | None = None
    nodes: tuple[Member, ...] = ()
    #: Addresses of services that are known besides, as the API server's.
    services: tuple[str, ...] = ()
    #: Prefixes that are on-link at this node, by the interface that they are on.
    subnets: tuple[tuple[str, str], ...] = ()


class Decision(msgspec.Struct, frozen=True):
    """The first pools and where they come from; or none, and why, with what to do."""

    pools: tuple[IPPool, ...] = ()
    source: str = ""
    reason: str = ""


def parse(text: str) -> tuple[Wish, ...] | None:
    """The setting: None for ``auto``, nothing for ``none``, else pools with commas between, each a CIDR and perhaps
    ``blockSize=N`` or ``usePodCIDRs``. Raises PoolsNotUsable."""
    word = text.strip()
    if word in ("auto", "none"):
        return None if word == "auto" else ()
    wishes = tuple(_wish(part.split()) for part in word.split(","))
    try:
        for wish in wishes:
            ip_network(wish.cidr)  # here nobody has a reason to mean another prefix than he writes
        _pools(wishes)
    except ValueError as e:
        raise PoolsNotUsable(f"{text!r}: {e}") from e
    return wishes


def decide(sources: Sources) -> Decision:
    """The pools, or the reason why there are none. Every pool of a decision is one that the store takes."""
    source, wishes = _asked(sources)
    if not wishes:
        return Decision(reason=f"{_nothing(sources)}: {_DO}")
    try:
        if source == _POD_CIDRS:
            wishes = tuple(_around(wish, sources) for wish in wishes)
        pools = _pools(wishes)
        for pool in pools:
            _refuse_overlap(pool, sources)
    except ValueError as e:
        return Decision(reason=f"no pool is made of {source}: {e}: {_DO}")
    return Decision(pools, source)


def kubeadm_ranges(configuration: Any) -> Ranges:
    """Of kubeadm's ClusterConfiguration. Raises PoolsNotUsable if it is none."""
    networking = _part(configuration, "networking", "kubeadm's ClusterConfiguration")
    return Ranges(_list(networking.get("podSubnet")), _list(networking.get("serviceSubnet")))


def k0s_ranges(spec: Any) -> Ranges:
    """Of the ``spec`` of k0s' ClusterConfig. Raises PoolsNotUsable if it is none."""
    network = _part(spec, "network", "k0s' ClusterConfig")
    dual = _part(network, "dualStack", "k0s' ClusterConfig")
    second = dual if dual.get("enabled") is True else {}
    return Ranges(
        (*_list(network.get("podCIDR")), *_list(second.get("IPv6podCIDR"))),
        (*_list(network.get("serviceCIDR")), *_list(second.get("IPv6serviceCIDR"))),
    )


# -- which source ------------------------------------------------------------------------------------------------------

_POD_CIDRS: Final = "the Nodes' podCIDRs"


def _asked(sources: Sources) -> tuple[str, tuple[Wish, ...]]:
    if sources.setting:
        return "UNDERLAY_POOLS", sources.setting
    for source, ranges in (("kubeadm's podSubnet", sources.kubeadm), ("k0s' podCIDR", sources.k0s)):
        if ranges is not None and ranges.pods:
            return source, tuple(Wish(cidr) for cidr in ranges.pods)
    return _POD_CIDRS, tuple(Wish(cidr, use_pod_cidrs=True) for cidr in _own_pod_cidrs(sources))


def _own_pod_cidrs(sources: Sources) -> tuple[str, ...]:
    return next((node.pod_cidrs for node in sources.nodes if node.name == sources.node), ())


def _nothing(sources: Sources) -> str:
    said = [
        "ConfigMap kube-system/kubeadm-config has no podSubnet" if sources.kubeadm else "kubeadm has left nothing here",
        "k0s' ClusterConfig has no podCIDR" if sources.k0s else "nor has k0s",
        f"Node {sources.node} has no podCIDR",
    ]
    return f"the cluster does not say which addresses its pods have ({', '.join(said)})"


def _around(wish: Wish, sources: Sources) -> Wish:
    """The pool of a podCIDR. Which range the Nodes' are cut from is not to be had (kube-controller-manager keeps it to
    itself), so it is the podCIDRs' own, with room for more of them where nothing else is. Room takes no address: blocks
    are the Nodes' podCIDRs and nothing else; it is where routes of other nodes are taken from."""
    own = _network(wish.cidr)
    same = [n for node in sources.nodes for n in map(_network, node.pod_cidrs) if n.version == own.version]
    least = min((own, *same), key=lambda n: n.prefixlen)
    common = own
    while not all(_inside(n, common) for n in same):
        common = common.supernet()
    for length in range(max(0, min(common.prefixlen, least.prefixlen - _NODES)), common.prefixlen):
        wide = common.supernet(new_prefix=length)
        if not any(_overlaps(wide, taken) for taken, _ in _taken(sources)) and not _problem(wide):
            return Wish(str(wide), use_pod_cidrs=True)
    return Wish(str(common), use_pod_cidrs=True)


def _problem(network: Network) -> bool:
    return bool(validate(_pool(Wish(str(network), use_pod_cidrs=True))))


# -- from ranges to pools ----------------------------------------------------------------------------------------------


def _pools(wishes: Iterable[Wish]) -> tuple[IPPool, ...]:
    """ValueError says which wish cannot be had."""
    found: dict[str, IPPool] = {}
    for wish in wishes:
        pool = _pool(wish)
        if pool.name in found:
            both = f"{found[pool.name].spec.cidr} and {pool.spec.cidr}"
            raise ValueError(f"{both} are of one family, and the first pools are one of each")
        problems = validate(pool)
        if problems:
            raise ValueError(f"{wish.cidr}: {problems[0]}")
        found[pool.name] = pool
    return tuple(found[name] for name in NAMES.values() if name in found)


def _pool(wish: Wish) -> IPPool:
    network = _network(wish.cidr)
    size = 0 if wish.use_pod_cidrs else wish.block_size or block_size(network)
    return IPPool(
        metadata=Meta(name=NAMES[network.version]),
        spec=IPPoolSpec(cidr=str(network), block_size=size, use_pod_cidrs=wish.use_pod_cidrs),
    )


def block_size(network: Network) -> int:
    """Calico's default, /26 and /122; shorter blocks where the range has less than 16 of them, as a node needs one at
    least. ValueError for a range of less than four addresses."""
    smallest = network.max_prefixlen - _SMALLEST
    if network.prefixlen > smallest:
        raise ValueError(f"{network} has {network.num_addresses} addresses, a pod network needs more")
    return min(max(network.prefixlen + _BLOCKS, DEFAULT_BLOCK_SIZE[network.version]), smallest)


def _refuse_overlap(pool: IPPool, sources: Sources) -> None:
    network = _network(pool.spec.cidr)
    for taken, what in _taken(sources):
        if _overlaps(network, taken):
            raise ValueError(f"{network} overlaps {what}; pods need addresses that nothing else has")


def _taken(sources: Sources) -> Iterator[tuple[Network, str]]:
    """What is not for pods, and what it is."""
    for ranges in (sources.kubeadm, sources.k0s):
        for text in ranges.services if ranges else ():
            yield _network(text), f"the services' {text}"
    for text in sources.services:
        yield _network(text), f"the service at {text}"
    for node in sources.nodes:
        for text in node.addresses:
            yield _network(text), f"{text} of Node {node.name}"
    for text, interface in sources.subnets:
        yield _network(text), f"{text} on interface {interface} of Node {sources.node}"


# -- parts -------------------------------------------------------------------------------------------------------------


def _wish(words: list[str]) -> Wish:
    match words:
        case [cidr]:
            return Wish(cidr)
        case [cidr, "usePodCIDRs"]:
            return Wish(cidr, use_pod_cidrs=True)
        case [cidr, size] if size.startswith("blockSize=") and size[10:].isascii() and size[10:].isdigit():
            return Wish(cidr, int(size[10:]))
    raise PoolsNotUsable(
        f"{' '.join(words)!r}: write auto, none, or CIDRs with commas between, each alone, with blockSize=26 or with "
        f"usePodCIDRs behind it"
    )


def _network(text: str) -> Network:
    """A prefix, or an address, as kube-controller-manager reads them: bits outside the mask are none of the prefix.
    ValueError says what is wrong with it."""
    return ip_network(text if "/" in text else ip_address(text), strict=False)


def _overlaps(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def _inside(one: Network, other: Network) -> bool:
    return _overlaps(one, other) and one.prefixlen >= other.prefixlen


def _part(value: Any, name: str, what: str) -> Mapping[str, Any]:
    part = value.get(name) if isinstance(value, Mapping) else value
    if part is not None and not isinstance(part, Mapping):
        raise PoolsNotUsable(f"{what} cannot be read: expected {name} to be a mapping, not {part!r:.80}")
    return part or {}


def _list(value: object) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else ()
