"""The configuration of a router of the lab, as FRR's bgpd reads it. Pure.

The same leaf and spine as ``lab.bird`` writes: eBGP on each link, a session per family over that family's addresses,
ECMP into the kernel, the same timers, and from a node what lies in the pools and nothing else. FRR helps a restarting
peer unless told otherwise (docs.frrouting.org, BGP, "Graceful Restart").
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Final

from lab.bird import ECMP, HOLD
from lab.topology import Router, Topology, Use, bare

_LEAVING: Final = "LEAVING"
_FAMILIES: Final = {4: ("ip", "ipv4"), 6: ("ipv6", "ipv6")}


def configuration(topology: Topology, router: Router) -> str:
    """The whole text of ``bgpd.conf`` for one router of the topology; zebra needs none."""
    return "\n".join([*_lists(topology), *_head(router), *_sessions(topology, router)]) + "\n"


def change(topology: Topology, router: Router, *, use: Use) -> tuple[str, ...]:
    """The lines below ``configure terminal`` after which the router is used like that, whatever it was before."""
    lines = [f"router bgp {router.asn}", f"{'' if use == 'left' else 'no '}bgp graceful-shutdown"]
    for place, (_, name) in enumerate(_FAMILIES.values()):
        lines.append(f"address-family {name} unicast")
        for _, far in topology.ends(router.name):
            word = "no " if use == "normal" else ""
            lines.append(f"{word}neighbor {bare(far.addresses[place])} route-map {_LEAVING} out")
        lines.append("exit-address-family")
    return tuple(lines)


def _lists(topology: Topology) -> Iterator[str]:
    for family, (word, _) in _FAMILIES.items():
        for number, pool in enumerate((p for p in topology.pools if ip_network(p.cidr).version == family), 1):
            rule = f"permit {pool.room} ge {pool.block_size} le {128 if family == 6 else 32}"
            yield f"{word} prefix-list pools{family} seq {number} {rule}"
        # A list that does not exist lets everything through.
        yield f"{word} prefix-list pools{family} seq 99 deny any"
    yield f"route-map {_LEAVING} permit 1"
    yield " set community graceful-shutdown additive"


def _head(router: Router) -> Iterator[str]:
    yield f"hostname {router.name}"
    yield f"router bgp {router.asn}"
    yield f" bgp router-id {router.router_id}"
    yield " bgp log-neighbor-changes"
    yield " no bgp ebgp-requires-policy"
    yield " no bgp default ipv4-unicast"
    yield " bgp bestpath as-path multipath-relax"


def _sessions(topology: Topology, router: Router) -> Iterator[str]:
    asn = {r.name: r.asn for r in topology.routers} | {n.name: n.asn for n in topology.nodes}
    ends = topology.ends(router.name)
    for place in range(len(_FAMILIES)):
        for near, far in ends:
            here, there = bare(near.addresses[place]), bare(far.addresses[place])
            yield f" neighbor {there} remote-as {asn[far.name]}"
            yield f" neighbor {there} description {far.name}"
            yield f" neighbor {there} update-source {here}"
            yield f" neighbor {there} timers {HOLD // 3} {HOLD}"
            yield f" neighbor {there} timers connect 1"
            yield f" neighbor {there} advertisement-interval 0"
            if topology.node(far.name):
                yield f" neighbor {there} passive"  # a node's speaker does not listen
    for place, (family, (_, name)) in enumerate(_FAMILIES.items()):
        yield f" address-family {name} unicast"
        # Links are announced, as a real fabric does.
        yield "  redistribute connected"
        yield f"  maximum-paths {ECMP}"
        for _, far in ends:
            there = bare(far.addresses[place])
            yield f"  neighbor {there} activate"
            if topology.node(far.name):
                yield f"  neighbor {there} prefix-list pools{family} in"
        yield " exit-address-family"
