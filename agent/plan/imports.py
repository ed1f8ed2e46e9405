"""What comes in: the import policy, and the routes and sysctls that follow of it (R11). Pure.

What the policy refuses, and which of the paths that it lets in are best, is in agent/rib.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from agent.adjrib import family_of
from agent.fib import KernelState, Link, NextHop, Route
from agent.plan.identity import Identity
from agent.plan.model import Cluster, Notes, Snapshot
from agent.prefix import PrefixSet, is_inside, is_prefix, length_of, parse
from agent.rib import Peer, Policy, Selection
from cni.marks import METRIC_FALLBACK, METRIC_IMPORTS, PROTO_IMPORTS
from store.model import IPPool


def import_policy(
    me: Identity, peers: tuple[Peer, ...], pools: Iterable[IPPool], blocks: set[str], snapshot: Snapshot
) -> Policy:
    """Only prefixes inside pools, disabled ones too, and the importCIDRs; never what is in an own block; only next hops
    on a subnet of an interface that is up (R11)."""
    configuration, kernel = snapshot.cluster.configuration, snapshot.kernel
    extra = configuration.spec.import_cidrs if configuration else ()
    return Policy(
        peers=peers,
        allowed=frozenset(pool.spec.cidr for pool in pools) | {cidr for cidr in extra if is_prefix(cidr)},
        own_blocks=frozenset(blocks),
        own_addresses=frozenset(a.address for a in kernel.addresses) | frozenset(me.addresses.values()),
        router_id=me.router_id,
        on_link=frozenset((a.subnet, a.interface) for a in me.connected if _is_up(a.interface, kernel.links)),
        interfaces=interface_names(peers, kernel),
    )


def inhabited(cluster: Cluster, blocks: Iterable[str], selection: Selection) -> frozenset[str]:
    """The deleted pools that a block of ours is in, or a route that is let in."""
    gone = {p.name: PrefixSet([p.spec.cidr]) for p in cluster.pools if p.name in cluster.deleted_pools}
    if not gone:
        return frozenset()
    prefixes = [parse(cidr) for cidr in chain(blocks, selection.best)]
    return frozenset(name for name, pool in gone.items() if any(map(pool.covers, prefixes)))


def interface_names(peers: Iterable[Peer], kernel: KernelState) -> frozenset[tuple[int, str]]:
    """Names of the interfaces that next hops can be on, if any import rule looks at them."""
    if not any(rule.interface for peer in peers for rule in (*peer.imports.v4, *peer.imports.v6)):
        return frozenset()
    return frozenset(
        (a.interface, kernel.links[a.interface].name) for a in kernel.addresses if a.interface in kernel.links
    )


def ways_to_peers(
    peers: Iterable[Peer], me: Identity, blocks: Iterable[str], kernel: KernelState, notes: Notes
) -> Iterable[Route]:
    """A host route to each peer that is on no link of ours, where its BGPPeer names a gateway (``reachableBy``). None
    into an own block, where it would take an address from the pods."""
    own = {a.address for a in kernel.addresses}
    for peer in peers:
        if not peer.gateway:
            continue
        ways = [a for a in me.connected if _is_up(a.interface, kernel.links) and is_inside(peer.gateway, a.subnet)]
        best = max(ways, key=lambda a: (length_of(a.subnet), a.address), default=None)
        block = next((cidr for cidr in blocks if is_inside(peer.address, cidr)), "")
        if best is None or peer.gateway in own:
            why = "an address of this node itself" if peer.gateway in own else "on no connected subnet of this node"
            notes.add("NextHopNotOnLink", f"{peer.name}: reachableBy {peer.gateway} is {why}: there is no route to it")
        elif block:
            notes.add("PeerNotUsable", f"{peer.name}: {peer.address} is in block {block} of this node: no route to it")
        else:
            yield Route(
                prefix=f"{peer.address}/{128 if ':' in peer.address else 32}",
                protocol=PROTO_IMPORTS,
                metric=METRIC_IMPORTS,
                nexthops=(NextHop(peer.gateway, best.interface),),
                src=me.sources.get(family_of(peer.address), ""),
            )


def imports(selection: Selection, me: Identity, links: Mapping[int, Link]) -> Iterable[Route]:
    """One route per prefix that is let in, with the node's address as its source."""
    ready: dict[int, tuple[NextHop, ...]] = {}  # by the id of the set: the RIB keeps equal sets as one object
    sources = me.sources
    for prefix, hops in selection.best.items():
        nexthops = ready.get(id(hops))
        if nexthops is None:
            nexthops = ready[id(hops)] = alive(hops, links)
        yield Route(
            prefix=prefix,
            protocol=PROTO_IMPORTS,
            metric=METRIC_FALLBACK if prefix.endswith("/0") else METRIC_IMPORTS,
            nexthops=nexthops,
            src=sources.get(family_of(prefix), ""),
        )


def alive(hops: Sequence[NextHop], links: Mapping[int, Link]) -> tuple[NextHop, ...]:
    """The next hops with carrier: the kernel refuses others in a group. Without any, the first stays as a plain route,
    which the kernel passes over (ignore_routes_with_linkdown) and takes up again by itself."""
    ready = tuple(hop for hop in hops if hop.interface in links and links[hop.interface].carrier)
    return ready or tuple(hops[:1])


# -- sysctls -------------------------------------------------------------------------------------------------------


def uplinks(routes: Iterable[Route], peers: Iterable[Peer]) -> set[int]:
    """Interfaces that packets of imports go through, now or soon."""
    found = {hop.interface for route in routes if route.protocol == PROTO_IMPORTS for hop in route.nexthops}
    return found | {peer.interface for peer in peers if peer.interface}


def uplink_sysctls(interfaces: Iterable[int], kernel: KernelState) -> dict[str, str]:
    """A dead link's routes are passed over, and packets may come in by one uplink and leave by another (R11)."""
    wanted: dict[str, str] = {}
    for index in interfaces:
        link = kernel.links.get(index)
        if link is None:
            continue
        name = sysctl_name(link.name)
        for version in ("ipv4", "ipv6"):
            key = f"net.{version}.conf.{name}.ignore_routes_with_linkdown"
            if key in kernel.sysctls:  # IPv6 may be switched off
                wanted[key] = "1"
        # The kernel takes the larger of the two: 1 is strict, 2 loose (ip-sysctl.rst).
        mine = f"net.ipv4.conf.{name}.rp_filter"
        if max(kernel.sysctls.get(mine, "0"), kernel.sysctls.get("net.ipv4.conf.all.rp_filter", "0")) == "1":
            wanted[mine] = "2"
    return wanted


def sysctl_name(interface: str) -> str:
    """An interface's name inside a sysctl's, as sysctl(8) writes it."""
    return interface.replace(".", "/")


def _is_up(interface: int, links: Mapping[int, Link]) -> bool:
    return interface in links and links[interface].up
