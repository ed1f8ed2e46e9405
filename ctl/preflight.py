"""``install check``: what a machine must have, and must not have, for Underlay to work on it. Pure.

Each check looks at a ``Machine`` that was read before, and says one thing. What could not be read is no failure: the
check is skipped, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Literal

import msgspec

from cni.marks import NFT_TABLE, PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS

Result = Literal["ok", "warning", "failure", "skipped"]
VERSION: Final = "underlay.network/install-check/v1"

#: docs/install.md; the API's reasons are in docs/kubernetes.md.
LEAST_KERNEL: Final = (5, 10)
LEAST_KUBERNETES: Final = (1, 31)
LEAST_CONTAINERD: Final = (1, 6)
#: IPv6 is off on a link with less (RFC 8200, section 5).
LEAST_MTU: Final = 1280
BGP: Final = 179
CONFLIST: Final = "10-underlay.conflist"
#: What networks leave behind on a node, by the names of their links.
REMAINS: Final[Mapping[str, str]] = {
    r"cali.*|vxlan\.calico|vxlan-v6\.calico": "Calico",
    r"flannel.*": "Flannel",
    r"cilium_.*|lxc_health": "Cilium",
    r"weave|vethwe-.*|vxlan-6784": "Weave",
    r"kube-bridge|kube-dummy-if": "kube-router",
    r"antrea-.*": "Antrea",
    r"ovn-k8s-.*|br-int": "OVN-Kubernetes",
    r"cni0": "the bridge plugin (Flannel, k3s, CRI-O's own)",
}
_OURS: Final = frozenset({PROTO_PODS, PROTO_BLOCKS, PROTO_IMPORTS})


class Link(msgspec.Struct, frozen=True):
    name: str
    mtu: int
    up: bool = True


class Route(msgspec.Struct, frozen=True):
    """One of the main table. ``protocol`` is its number, ``device`` "" where there is none."""

    prefix: str
    device: str
    protocol: int


class Chain(msgspec.Struct, frozen=True):
    """A base chain of nftables at ``forward``; iptables' FORWARD is one, too."""

    table: str
    name: str
    drops: bool


class Listener(msgspec.Struct, frozen=True):
    """Who waits for TCP connections; ``process`` is "" where it cannot be seen."""

    address: str
    port: int
    process: str


class Peer(msgspec.Struct, frozen=True):
    """``problem``: "" if a connection could be made."""

    name: str
    address: str
    problem: str


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What the API server says; versions as the Node has them."""

    node: str
    found: bool
    kubernetes: str = ""
    runtime: str = ""
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()
    service_cidrs: tuple[str, ...] = ()
    #: Name and CIDR.
    pools: tuple[tuple[str, str], ...] = ()


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, at one moment. ``unseen`` says of a field why it could not be read."""

    kernel: str = ""
    #: Kernel feature, and what the kernel says when it is tried; "": it works.
    features: Mapping[str, str] = {}
    #: Dotted names.
    sysctls: Mapping[str, str] = {}
    links: tuple[Link, ...] = ()
    #: With prefix length, and device.
    addresses: tuple[tuple[str, str], ...] = ()
    routes: tuple[Route, ...] = ()
    chains: tuple[Chain, ...] = ()
    #: Names of nftables' tables.
    tables: tuple[str, ...] = ()
    #: File and plugin types.
    networks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    listeners: tuple[Listener, ...] = ()
    #: A speaker of ours answers in the run directory.
    speaker: bool = False
    ufw: bool = False
    peers: tuple[Peer, ...] = ()
    #: Where pods and our processes look for the API server, and why they do not reach it.
    api: str = ""
    api_problem: str = ""
    cluster: Cluster | None = None
    unseen: Mapping[str, str] = {}


class Check(msgspec.Struct, frozen=True):
    """``remedy`` is what to do; "" where nothing is."""

    name: str
    result: Result
    found: str
    expected: str = ""
    remedy: str = ""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    version: Literal["underlay.network/install-check/v1"] = VERSION
    machine: str
    at: str
    checks: tuple[Check, ...]


def checks(machine: Machine) -> tuple[Check, ...]:
    """All of them, in the order in which one would mend things."""
    found: list[Check] = []
    for name, (needs, check) in CHECKS.items():
        why = next((machine.unseen[need] for need in needs if need in machine.unseen), "")
        if why:
            found.append(Check(name, "skipped", why))
            continue
        result, text, *rest = check(machine)
        found.append(Check(name, result, text, *rest))
    return tuple(found)


# -- the kernel ------------------------------------------------------------------------------------------------------

#: Result, what was found; expected, and what to do, where something is wrong.
_Answer = tuple[Result, str] | tuple[Result, str, str, str]


def _kernel(m: Machine) -> _Answer:
    if _version(m.kernel) >= LEAST_KERNEL:
        return "ok", m.kernel
    return "failure", m.kernel, f"Linux {_dotted(LEAST_KERNEL)} or newer", "upgrade the machine's kernel"


def _feature(name: str, remedy: str) -> Callable[[Machine], _Answer]:
    def check(m: Machine) -> _Answer:
        problem = m.features.get(name, "it was not tried")
        return ("ok", "works") if not problem else ("failure", problem, "it works", remedy)

    return check


def _ipv6(m: Machine) -> _Answer:
    off = [n for n in ("all", "default") if m.sysctls.get(f"net.ipv6.conf.{n}.disable_ipv6", "1") != "0"]
    if not off:
        return "ok", "on"
    return "warning", "off", "on, if pods are to have IPv6", "sysctl -w net.ipv6.conf.all.disable_ipv6=0, default too"


def _forwarding(m: Machine) -> _Answer:
    keys = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    off = [key for key in keys if m.sysctls.get(key, "1") != "1"]
    if not off:
        return "ok", "on"
    remedy = "nothing: underlay-cni switches it on; have it in /etc/sysctl.d, so that nobody switches it off"
    return "warning", f"{', '.join(off)} = 0", "1", remedy


def _rp_filter(m: Machine) -> _Answer:
    everywhere = m.sysctls.get("net.ipv4.conf.all.rp_filter", "0")
    values = {name: max(everywhere, m.sysctls.get(f"net.ipv4.conf.{name}.rp_filter", "0")) for name in _uplinks(m)}
    strict = sorted(name for name, value in values.items() if value == "1")
    if not strict:
        return "ok", ", ".join(f"{name}: {value}" for name, value in sorted(values.items())) or "no uplink is strict"
    remedy = "nothing: the agent sets uplinks to 2; is it set to 1 again by somebody, traffic by two ToRs is dropped"
    return "warning", f"strict on {', '.join(strict)}", "0 or 2 on uplinks", remedy


def _mtu(m: Machine) -> _Answer:
    mtus = {link.name: link.mtu for link in m.links if link.name in _uplinks(m)}
    said = ", ".join(f"{name}: {mtu}" for name, mtu in sorted(mtus.items())) or "no uplink is known"
    if any(mtu < LEAST_MTU for mtu in mtus.values()):
        return "failure", said, f"{LEAST_MTU} or more", "IPv6 is off on such a link: correct its MTU"
    if len(set(mtus.values())) > 1:
        return (
            "warning",
            said,
            "one MTU",
            "pods get the smallest; a packet of the other size is lost if a router drops it",
        )
    return "ok", said


# -- others on the machine -------------------------------------------------------------------------------------------


def _networks(m: Machine) -> _Answer:
    before = [f"{name} ({', '.join(types)})" for name, types in m.networks if name < CONFLIST]
    if before:
        remedy = "remove that network, or its file: a runtime takes the first by name"
        return "failure", f"sorts before {CONFLIST}: {', '.join(before)}", "none", remedy
    behind = [name for name, _ in m.networks if name > CONFLIST]
    return "ok", f"{', '.join(behind)}: not in use once {CONFLIST} is there" if behind else "no other"


def _remains(m: Machine) -> _Answer:
    found = {
        f"{link.name} of {whose}"
        for link in m.links
        for names, whose in REMAINS.items()
        if re.fullmatch(names, link.name)
    }
    found |= {f"nftables table {table}" for table in m.tables if re.search("cali|cilium|flannel|kube-router", table)}
    if not found:
        return "ok", "none"
    remedy = "take that network away as its makers say, and reboot: its rules and routes would meet pods' packets"
    return "warning", ", ".join(sorted(found)), "no other network for pods", remedy


def _forward(m: Machine) -> _Answer:
    dropping = [f"{c.table} {c.name}" for c in m.chains if c.drops and c.table != NFT_TABLE]
    if not dropping:
        return "ok", "nothing is dropped by default"
    remedy = "let through what pods send and get: iptables -I FORWARD -s POOL -j ACCEPT, and -d POOL (Docker sets this)"
    return "warning", f"what no rule accepts is dropped: {', '.join(dropping)}", "policy accept", remedy


def _firewall(m: Machine) -> _Answer:
    found = ["firewalld"] if any("firewalld" in table for table in m.tables) else []
    found += ["ufw"] if m.ufw else []
    if not found:
        return "ok", "neither firewalld nor ufw"
    remedy = f"switch it off on nodes, or let it pass TCP port {BGP} of peers, and all that pods send and get"
    return "warning", ", ".join(found), "none", remedy


def _port(m: Machine) -> _Answer:
    waiting = [one for one in m.listeners if one.port == BGP]
    if not waiting:
        return "ok", f"nobody waits at port {BGP}"
    said = ", ".join(f"{one.process or 'a process'} at {one.address}" for one in waiting)
    if m.speaker:
        return "ok", f"our speaker: {said}"
    remedy = (
        "end that BGP daemon, or let it peer with Underlay and all BGPPeers be active: only the mesh needs the port"
    )
    return "failure", said, f"nobody, or Underlay's speaker, waits at port {BGP}", remedy


# -- the network around ----------------------------------------------------------------------------------------------


def _peers(m: Machine) -> _Answer:
    if not m.peers:
        return "ok", "no BGPPeer of this node has an address"
    bad = [f"{p.name} ({p.address}): {p.problem}" for p in m.peers if p.problem]
    if not bad:
        return "ok", f"{len(m.peers)} answer at port {BGP}"
    remedy = "does the address lead there, is BGP on, does it know this node as a peer? Then a firewall between"
    return "failure", "; ".join(bad), f"each answers at port {BGP}", remedy


def _api(m: Machine) -> _Answer:
    if not m.api_problem:
        return "ok", f"{m.api} answers"
    remedy = (
        "without kube-proxy nothing makes that address work: set KUBERNETES_SERVICE_HOST and _PORT in the "
        "ConfigMap underlay-config"
    )
    return "failure", f"{m.api}: {m.api_problem}", "the API server answers", remedy


# -- the cluster -----------------------------------------------------------------------------------------------------


def _node(m: Machine) -> _Answer:
    cluster = _of(m)
    if cluster.found:
        return "ok", f"{cluster.node}: {', '.join(cluster.addresses) or 'no InternalIP'}"
    remedy = "--node says which Node this machine is; a kubelet that has not registered yet has none"
    return "failure", f"there is no Node {cluster.node}", "a Node of this machine", remedy


def _kubernetes(m: Machine) -> _Answer:
    said = _of(m).kubernetes
    if _version(said) >= LEAST_KUBERNETES:
        return "ok", said
    return "failure", said or "unknown", f"{_dotted(LEAST_KUBERNETES)} or newer", "upgrade the cluster"


def _runtime(m: Machine) -> _Answer:
    name, _, version = _of(m).runtime.partition("://")
    if name != "containerd" or _version(version) >= LEAST_CONTAINERD:
        return "ok", _of(m).runtime or "unknown"
    return "failure", _of(m).runtime, f"containerd {_dotted(LEAST_CONTAINERD)} or newer", "upgrade it"


def _pools(m: Machine) -> _Answer:
    cluster = _of(m)
    if not cluster.pools:
        return "ok", "there is no pool yet"
    pools = [(name, ip_network(cidr)) for name, cidr in cluster.pools]
    bad = [
        f"pool {name} ({pool}) and {what} ({other})"
        for name, pool in pools
        for what, other in _taken(m, pools)
        if pool.version == other.version and pool.overlaps(other) and what != f"pool {name}"
    ]
    if not bad:
        return "ok", ", ".join(f"{name} ({pool})" for name, pool in pools)
    remedy = "give the pool a range that nothing else uses, or remove the other"
    return "failure", "; ".join(dict.fromkeys(bad)), "a pool shares addresses with nothing", remedy


def _pod_cidr(m: Machine) -> _Answer:
    cluster = _of(m)
    if not cluster.pod_cidrs or not cluster.pools:
        return "ok", ", ".join(cluster.pod_cidrs) or "the Node has no podCIDR"
    pools = [ip_network(cidr) for _, cidr in cluster.pools]
    outside = [
        cidr
        for cidr in cluster.pod_cidrs
        if not any(pool.version == ip_network(cidr).version and ip_network(cidr).overlaps(pool) for pool in pools)
    ]
    if not outside:
        return "ok", ", ".join(cluster.pod_cidrs)
    remedy = "kube-proxy's clusterCIDR should hold the pools, or it masquerades what pods send to Services"
    return "warning", f"no pool lies in {', '.join(outside)}", "pools lie in the cluster's own CIDR", remedy


#: Name: the fields that it needs, and what looks.
CHECKS: Final[Mapping[str, tuple[tuple[str, ...], Callable[[Machine], _Answer]]]] = {
    "kernel": (("kernel",), _kernel),
    "veth": (("features",), _feature("veth", "modprobe veth; the kernel needs CONFIG_VETH")),
    "nexthop-objects": (("features",), _feature("nexthop", "the kernel is older than 5.3: upgrade it")),
    "ecmp": (("features",), _feature("group", "the kernel needs CONFIG_IP_ROUTE_MULTIPATH")),
    "nftables-fib": (("features",), _feature("nftables", "modprobe nft_fib_inet; else the source check is missing")),
    "ipv6": (("sysctls",), _ipv6),
    "forwarding": (("sysctls",), _forwarding),
    "rp-filter": (("sysctls", "links"), _rp_filter),
    "mtu": (("links",), _mtu),
    "other-networks": (("networks",), _networks),
    "remains": (("links",), _remains),
    "forward-policy": (("chains",), _forward),
    "firewall": (("tables",), _firewall),
    "port-179": (("listeners",), _port),
    "peers": (("peers",), _peers),
    "api-server": (("api",), _api),
    "node": (("cluster",), _node),
    "kubernetes": (("cluster", "node"), _kubernetes),
    "runtime": (("cluster", "node"), _runtime),
    "pools": (("cluster", "routes"), _pools),
    "pod-cidr": (("cluster", "node"), _pod_cidr),
}


def _of(m: Machine) -> Cluster:
    return m.cluster or Cluster(node="", found=False)


def _taken(
    m: Machine, pools: Iterable[tuple[str, IPv4Network | IPv6Network]]
) -> Iterator[tuple[str, IPv4Network | IPv6Network]]:
    """What uses addresses, but for ourselves."""
    for name, pool in pools:
        yield f"pool {name}", pool
    cluster = _of(m)
    for address in cluster.addresses:
        yield "the node's address", ip_network(address)
    for cidr in cluster.service_cidrs:
        yield "the Services", ip_network(cidr)
    for route in m.routes:
        length = int(route.prefix.partition("/")[2] or 128)
        if route.protocol not in _OURS and length and not ip_address(route.prefix.partition("/")[0]).is_link_local:
            yield f"a route{f' by {route.device}' if route.device else ''}", ip_network(route.prefix, strict=False)


def _uplinks(m: Machine) -> set[str]:
    """What default routes leave by, and what has the Node's addresses."""
    found = {route.device for route in m.routes if route.prefix.endswith("/0") and route.device}
    own = set(_of(m).addresses)
    return found | {device for address, device in m.addresses if address.partition("/")[0] in own}


def _version(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
