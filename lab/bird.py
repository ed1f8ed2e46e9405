"""The configuration of a router of the lab, as BIRD 2 reads it. Pure.

An ordinary leaf and spine: eBGP on each link, a session per family over that family's addresses, ECMP into the kernel.
Timers are short (a lab is waited for): hold 9, retry and error wait 1. A ToR takes from a node what lies in the pools
and nothing else. It keeps a restarting node's routes as the node asks (RFC 4724, ``aware``: helper only), and uses a
way that is about to go only if there is no other (RFC 8326).
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Final

from lab.topology import End, Node, Pool, Router, Topology, Use, bare

HOLD: Final = 9
ECMP: Final = 16
#: As birdc takes it: every name that ``protocol_name`` gives.
EVERY_SESSION: Final = '"*_v?"'
_GRACEFUL_SHUTDOWN: Final = "(65535, 0)"
_FAMILIES: Final = (4, 6)


def configuration(topology: Topology, router: Router, *, use: Use = "normal") -> str:
    """The whole text of ``bird.conf`` for one router of the topology."""
    filters = _filters(topology.pools, use)
    return "\n".join([*_head(router), *_kernel(), *filters, *_sessions(topology, router)]) + "\n"


def protocol_name(peer: str, family: int) -> str:
    """What BIRD calls the session with ``peer`` (``birdc show protocols``): ``node_1_v4``."""
    return f"{peer.replace('-', '_')}_v{family}"


def _head(router: Router) -> Iterator[str]:
    yield f"# {router.name}, AS {router.asn}"
    yield "log stderr all;"
    yield f"router id {router.router_id};"
    yield "protocol device { scan time 1; }"
    # Links are announced, as a real fabric does: nodes reach each other, and must leave these routes to their default.
    yield "protocol direct { ipv4; ipv6; }"
    yield ""


def _kernel() -> Iterator[str]:
    for family in _FAMILIES:
        yield f"protocol kernel kernel{family} {{"
        yield f"  ipv{family} {{ import none; export where source = RTS_BGP; }};"
        yield f"  merge paths on limit {ECMP};"
        yield "  scan time 10;"
        yield "}"
    yield ""


def _filters(pools: tuple[Pool, ...], use: Use) -> Iterator[str]:
    condition = "" if use == "left" else f"if {_GRACEFUL_SHUTDOWN} ~ bgp_community then "
    yield f"function weigh() {{ {condition}bgp_local_pref = 0; }}"
    mark = "" if use == "normal" else f"bgp_community.add({_GRACEFUL_SHUTDOWN}); "
    yield f"filter told {{ {mark}accept; }}"
    yield "filter fabric { weigh(); accept; }"
    for family in _FAMILIES:
        inside = [f"{p.room}{{{p.block_size},{128 if family == 6 else 32}}}" for p in pools if _family(p) == family]
        test = f"if net ~ [ {', '.join(inside)} ] then accept; " if inside else ""
        yield f"filter pools{family} {{ weigh(); {test}reject; }}"
    yield ""


def _sessions(topology: Topology, router: Router) -> Iterator[str]:
    asn = {r.name: r.asn for r in topology.routers} | {n.name: n.asn for n in topology.nodes}
    for near, far in topology.ends(router.name):
        for family in _FAMILIES:
            yield from _session(router, near, far, family, asn[far.name], topology.node(far.name))


def _session(router: Router, near: End, far: End, family: int, asn: int, node: Node | None) -> Iterator[str]:
    here, there = (bare(end.addresses[_FAMILIES.index(family)]) for end in (near, far))
    yield f"protocol bgp {protocol_name(far.name, family)} {{"
    yield f"  local {here} as {router.asn};"
    yield f"  neighbor {there} as {asn};"
    yield f"  hold time {HOLD}; keepalive time {HOLD // 3};"
    yield "  connect delay time 1; connect retry time 1; error wait time 1, 1; error forget time 1;"
    yield "  check link yes; graceful restart aware;"
    if node:
        yield "  passive yes;"  # a node's speaker does not listen
    takes = f"pools{family}" if node else "fabric"
    yield f"  ipv{family} {{ import filter {takes}; export filter told; next hop self; }};"
    yield "}"


def _family(pool: Pool) -> int:
    return ip_network(pool.cidr).version
