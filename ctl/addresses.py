"""``ipam show``: pools, blocks and single addresses as the store knows them, for people. Pure.

The store's knowledge of allocations is the mirror that each block's owner writes (R2), so it is up to 200 ms old, and
older while the owner cannot reach the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_address, ip_network

from ctl.tables import Table
from ctl.words import count, listed, share
from store.model import IPAMBlock, IPPool, IPReservation, Node

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def pools_table(pools: Sequence[IPPool], blocks: Sequence[IPAMBlock], reservations: Sequence[IPReservation]) -> Table:
    """A row for each pool. Free is what is neither handed out nor reserved, in blocks or not yet in any."""
    rows = []
    for pool in pools:
        net = ip_network(pool.spec.cidr)
        own = [b for b in blocks if b.spec.pool == pool.name]
        reserved = _reserved_within(net, reservations)
        handed_out = [ip_address(a.address) for b in own for a in b.status.allocations]
        both = sum(1 for address in handed_out if any(_within(address, r) for r in reserved))
        used = sum(b.status.used for b in own)
        set_apart = sum(r.num_addresses for r in reserved)
        free = max(0, net.num_addresses - used - set_apart + both)
        rows.append(
            (
                pool.name,
                pool.spec.cidr,
                str(len(own)),
                count(net.num_addresses),
                share(used, net.num_addresses),
                count(set_apart),
                share(free, net.num_addresses),
            )
        )
    return Table(("POOL", "CIDR", "BLOCKS", "ADDRESSES", "USED", "RESERVED", "FREE"), tuple(rows))


def blocks_table(blocks: Iterable[IPAMBlock]) -> Table:
    """A row for each block, in order of address. Used and free are the owner's own words."""
    rows = []
    for block in sorted(blocks, key=lambda b: _order(ip_network(b.spec.cidr))):
        size = ip_network(block.spec.cidr).num_addresses
        state = ["releasing"] if block.status.releasing else []
        state += ["deleting"] if block.metadata.deletion_timestamp else []
        said = block.status.writer is not None
        rows.append(
            (
                block.spec.cidr,
                block.spec.pool,
                block.spec.node,
                count(size),
                share(block.status.used, size) if said else "not said yet",
                share(block.status.free, size) if said else "",
                listed(state),
            )
        )
    return Table(("BLOCK", "POOL", "NODE", "ADDRESSES", "USED", "FREE", "STATE"), tuple(rows))


def describe(
    address: Address,
    pools: Iterable[IPPool],
    blocks: Iterable[IPAMBlock],
    reservations: Iterable[IPReservation],
    nodes: Iterable[Node],
) -> list[str]:
    """What is known of one address, a line each: its holder or its state, its reservations, its block and pool."""
    pool = next((p for p in pools if _within(address, ip_network(p.spec.cidr))), None)
    block = next((b for b in blocks if _within(address, ip_network(b.spec.cidr))), None)
    lines = [
        f"{address} is an address of node {node.name} itself"
        for node in nodes
        if any(_same(address, a.address) for a in node.status.addresses)
    ]
    lines += _holders(address, block)
    reserving = [r.name for r in reservations if any(_within(address, ip_network(c)) for c in r.spec.reserved_cidrs)]
    lines += [f"{address} is reserved by ipreservation/{name}" for name in reserving]
    if block is None and pool is None:
        return [*lines, f"{address} is outside every pool"]
    if block is None and pool is not None:
        return [*lines, f"{address} is in ippool/{pool.name} ({pool.spec.cidr}) and in no block: no node hands it out"]
    assert block is not None
    if not lines:
        lines.append(f"{address} is held by nobody: it is free, or rests for up to 30 s after its last pod")
    where = f"block {block.spec.cidr} of node {block.spec.node}, ippool/{block.spec.pool}"
    gone = "" if pool is not None else " (which no longer exists)"
    return [*lines, f"{address} is in {where}{gone}"]


def _holders(address: Address, block: IPAMBlock | None) -> list[str]:
    if block is None:
        return []
    lines = []
    for a in block.status.allocations:
        if not _same(address, a.address):
            continue
        pod = f"pod {a.pod}" if a.pod else "a pod whose name the runtime did not say"
        since = f" since {a.since}" if a.since else ""
        lines.append(f"{address} is held by {pod} on node {block.spec.node}{since}")
        lines.append(f"{address} is on interface {a.interface} of container {a.container}, network {a.network}")
    return lines


def _reserved_within(net: Network, reservations: Iterable[IPReservation]) -> list[Network]:
    """What the reservations take of this network, as networks that do not overlap."""
    cidrs = [ip_network(c) for r in reservations for c in r.spec.reserved_cidrs]
    parts: list[Network] = []
    for cidr in cidrs:
        if cidr.version != net.version or not cidr.overlaps(net):
            continue
        parts.append(cidr if cidr.prefixlen >= net.prefixlen else net)
    return list(collapse_addresses(parts))  # type: ignore[type-var]


def _within(address: Address, net: Network) -> bool:
    return address.version == net.version and address in net


def _same(address: Address, text: str) -> bool:
    """Whether the text is this address; a node's addresses may also be names, which are none."""
    try:
        return address == ip_address(text)
    except ValueError:
        return False


def _order(net: Network) -> tuple[int, int, int]:
    return (net.version, int(net.network_address), net.prefixlen)
