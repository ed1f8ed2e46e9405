"""``ipam show``: pools, blocks and single addresses as the store knows them, as facts and in words. Pure.

The store's knowledge of allocations is the mirror that each block's owner writes (R2), so it is up to 200 ms old, and
older while the owner cannot reach the store. What rests is the owner's memory alone: here it is free.

The facts are what ``-o json`` prints; their form is a promise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_address, ip_network
from typing import Any, Final, Literal, cast

import msgspec

from ctl.tables import Table
from ctl.words import age, count, listed, share
from store.model import ANNOTATION_RELEASE_REFUSED, IPAMBlock, IPPool, IPReservation, Node, release_wanted

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

VERSION: Final = "underlay.network/ipam-show/v1"


class PoolUse(msgspec.Struct, frozen=True, rename="camel"):
    """``free`` is what is neither handed out nor reserved, in blocks or not yet in any. ``state`` is of disabled and
    deleting."""

    name: str
    cidr: str
    blocks: int
    addresses: int
    used: int
    reserved: int
    free: int
    state: tuple[str, ...]


class BlockUse(msgspec.Struct, frozen=True, rename="camel"):
    """``used`` and ``free`` are the owner's own words, None before it has said anything. ``state``: releasing,
    deleting, no-node (its node has no Node), and the types of the conditions that hold."""

    cidr: str
    pool: str
    node: str
    addresses: int
    used: int | None
    free: int | None
    state: tuple[str, ...]
    #: Since when it is marked for deletion; "" if it is not.
    deleting: str
    #: Addresses that people want released, which the owner has not dealt with.
    release_wanted: tuple[str, ...]


class Holder(msgspec.Struct, frozen=True, rename="camel"):
    """Who has an address. ``pod`` is namespace/name, "" where the runtime did not say it."""

    address: str
    pod: str
    node: str
    network: str
    container: str
    interface: str
    since: str


class AddressUse(msgspec.Struct, frozen=True, rename="camel"):
    """One address.

    held       a pod has it
    reserved   nobody has it, and a reservation keeps it from who does not ask for it by name
    free       nobody has it, or it rests
    unknown    the block's owner has never said what it handed out
    unclaimed  in a pool, and in no block: no node hands it out
    outside    in no pool and no block
    """

    address: str
    state: Literal["held", "reserved", "free", "unknown", "unclaimed", "outside"]
    #: One; more if it is handed out twice.
    holders: tuple[Holder, ...]
    reservations: tuple[str, ...]
    #: Nodes that have it themselves.
    nodes: tuple[str, ...]
    pool: str
    pool_cidr: str
    block: BlockUse | None
    #: Why the owner did not release it when people last asked.
    release_refused: str


# -- facts -------------------------------------------------------------------------------------------------------------


def pool_uses(
    pools: Iterable[IPPool], blocks: Sequence[IPAMBlock], reservations: Sequence[IPReservation]
) -> tuple[PoolUse, ...]:
    found = []
    for pool in pools:
        net = ip_network(pool.spec.cidr)
        own = [b for b in blocks if b.spec.pool == pool.name]
        reserved = _reserved_within(net, reservations)
        handed_out = [ip_address(a.address) for b in own for a in b.status.allocations]
        both = sum(1 for address in handed_out if any(_within(address, r) for r in reserved))
        used = sum(b.status.used for b in own)
        set_apart = sum(r.num_addresses for r in reserved)
        state = ("disabled",) * pool.spec.disabled + ("deleting",) * bool(pool.metadata.deletion_timestamp)
        free = max(0, net.num_addresses - used - set_apart + both)
        found.append(PoolUse(pool.name, pool.spec.cidr, len(own), net.num_addresses, used, set_apart, free, state))
    return tuple(found)


def block_uses(blocks: Iterable[IPAMBlock], nodes: Collection[str] | None = None) -> tuple[BlockUse, ...]:
    """In order of address. ``nodes`` are the names of the Nodes that there are; None: not known."""
    return tuple(_use(b, nodes) for b in sorted(blocks, key=lambda b: _order(ip_network(b.spec.cidr))))


def holders(block: IPAMBlock) -> tuple[Holder, ...]:
    """Everybody who has an address of the block, in order of address."""
    found = sorted(block.status.allocations, key=lambda a: int(ip_address(a.address)))
    return tuple(Holder(a.address, a.pod, block.spec.node, a.network, a.container, a.interface, a.since) for a in found)


def holders_of(blocks: Iterable[IPAMBlock]) -> tuple[Holder, ...]:
    """Everybody who has an address of one of the blocks, in order of address."""
    in_order = sorted(blocks, key=lambda b: _order(ip_network(b.spec.cidr)))
    return tuple(holder for block in in_order for holder in holders(block))


def address_use(
    address: Address,
    pools: Iterable[IPPool],
    blocks: Iterable[IPAMBlock],
    reservations: Iterable[IPReservation],
    nodes: Sequence[Node],
) -> AddressUse:
    pool = next((p for p in pools if _within(address, ip_network(p.spec.cidr))), None)
    block = next((b for b in blocks if _within(address, ip_network(b.spec.cidr))), None)
    have = tuple(h for h in holders(block) if _same(address, h.address)) if block else ()
    reserving = tuple(
        r.name for r in reservations if any(_within(address, ip_network(c)) for c in r.spec.reserved_cidrs)
    )
    state: Literal["held", "reserved", "free", "unknown", "unclaimed", "outside"]
    if have:
        state = "held"
    elif block is None:
        state = "unclaimed" if pool else "outside"
    elif block.status.writer is None:
        state = "unknown"
    else:
        state = "reserved" if reserving else "free"
    return AddressUse(
        str(address),
        state,
        have,
        reserving,
        tuple(n.name for n in nodes if any(_same(address, a.address) for a in n.status.addresses)),
        block.spec.pool if block else pool.name if pool else "",
        pool.spec.cidr if pool else "",
        _use(block, {n.name for n in nodes}) if block else None,
        refusal(block, str(address)) if block else "",
    )


def refusal(block: IPAMBlock, address: str) -> str:
    """Why the block's owner did not release the address when it was last asked; "" if it says nothing of it."""
    text = block.metadata.annotations.get(ANNOTATION_RELEASE_REFUSED, "")
    found = re.search(rf"(?:^|; ){re.escape(address)}: (.*?)(?=; [0-9a-f.:]+: |$)", text)
    return found[1] if found else ""


def overlapping(network: Network, blocks: Iterable[IPAMBlock]) -> tuple[IPAMBlock, ...]:
    """The blocks that share addresses with the network, in order of address."""
    found = [b for b in blocks if _overlap(network, ip_network(b.spec.cidr))]
    return tuple(sorted(found, key=lambda b: _order(ip_network(b.spec.cidr))))


def _use(block: IPAMBlock, nodes: Collection[str] | None) -> BlockUse:
    status, deleting = block.status, block.metadata.deletion_timestamp
    state = ["releasing"] if status.releasing else []
    state += ["deleting"] if deleting else []
    state += ["no-node"] if nodes is not None and block.spec.node not in nodes else []
    state += [c.type for c in status.conditions if c.status == "True"]
    said = status.writer is not None
    return BlockUse(
        block.spec.cidr,
        block.spec.pool,
        block.spec.node,
        ip_network(block.spec.cidr).num_addresses,
        status.used if said else None,
        status.free if said else None,
        tuple(state),
        deleting,
        release_wanted(block),
    )


# -- words -------------------------------------------------------------------------------------------------------------


def pools_table(pools: Iterable[PoolUse]) -> Table:
    rows = tuple(
        (
            p.name,
            p.cidr,
            str(p.blocks),
            count(p.addresses),
            share(p.used, p.addresses),
            count(p.reserved),
            share(p.free, p.addresses),
            listed(p.state),
        )
        for p in pools
    )
    return Table(("POOL", "CIDR", "BLOCKS", "ADDRESSES", "USED", "RESERVED", "FREE", "STATE"), rows)


def blocks_table(blocks: Iterable[BlockUse]) -> Table:
    rows = tuple(
        (
            b.cidr,
            b.pool,
            b.node,
            count(b.addresses),
            "not said yet" if b.used is None else share(b.used, b.addresses),
            "" if b.free is None else share(b.free, b.addresses),
            listed(b.state),
        )
        for b in blocks
    )
    return Table(("BLOCK", "POOL", "NODE", "ADDRESSES", "USED", "FREE", "STATE"), rows)


def holders_table(who: Iterable[Holder], *, now: str) -> Table:
    """``now`` is what ages are counted to (RFC 3339)."""
    rows = tuple((h.address, h.pod, h.container, h.interface, h.network, h.since, age(h.since, now)) for h in who)
    return Table(("ADDRESS", "POD", "CONTAINER", "INTERFACE", "NETWORK", "SINCE", "AGE"), rows)


def pool_holders_table(who: Iterable[Holder], *, now: str) -> Table:
    """Holders on many nodes; one whose pod the runtime did not say is known by its container."""
    rows = tuple((h.address, h.pod or f"container {h.container}", h.node, age(h.since, now)) for h in who)
    return Table(("ADDRESS", "POD", "NODE", "AGE"), rows)


def pool_notes(name: str, pool: PoolUse | None, blocks: Sequence[BlockUse], who: Sequence[Holder]) -> list[str]:
    """How far a pool is from being out of use, a sentence each. ``pool`` is None if it no longer exists."""
    lines = []
    if who:
        pods, nodes = len({h.pod or (h.container, h.interface) for h in who}), len({h.node for h in who})
        lines.append(
            f"held of ippool/{name}: {_many(len(who), 'address')}, by {_many(pods, 'pod')} on {_many(nodes, 'node')}"
        )
    silent = [b.cidr for b in blocks if b.used is None]
    if silent:
        lines.append(f"what is held of {', '.join(silent)} is not known: its node has not said it yet")
    if pool is None:
        lines.append(f"ippool/{name} no longer exists: its blocks go with their last pods")
    elif "disabled" not in pool.state:
        lines.append(f"ippool/{name} is in use: pods get addresses of it, unless it is disabled (spec.disabled: true)")
    elif who:
        lines.append(f"ippool/{name} is disabled: a pod that is made anew gets an address of another pool")
    elif blocks and not silent:
        lines.append(f"no pod holds an address of ippool/{name}: its nodes give its blocks back within a minute")
    elif not blocks:
        lines.append(f"nothing is left of ippool/{name}: underlayctl delete ippool {name}")
    return lines


def describe(use: AddressUse, *, now: str) -> list[str]:
    """What is known of one address, a line each: its holder or its state, its reservations, its block and pool."""
    address, block = use.address, use.block
    lines = [f"{address} is an address of node {name} itself" for name in use.nodes]
    for h in use.holders:
        pod = f"pod {h.pod}" if h.pod else "a pod whose name the runtime did not say"
        since = f" since {h.since} ({age(h.since, now)})" if h.since else ""
        lines.append(f"{address} is held by {pod} on node {h.node}{since}")
        lines.append(f"{address} is on interface {h.interface} of container {h.container}, network {h.network}")
    lines += [f"{address} is reserved by ipreservation/{name}" for name in use.reservations]
    if use.state == "free":
        lines.append(f"{address} is held by nobody: it is free, or rests for up to 30 s after its last pod")
    elif use.state == "reserved":
        lines.append(f"{address} is held by nobody: only a pod that asks for it by name gets it")
    elif use.state == "unclaimed":
        lines.append(f"{address} is in ippool/{use.pool} ({use.pool_cidr}) and in no block: no node hands it out")
    elif use.state == "outside":
        lines.append(f"{address} is outside every pool")
    if block is None:
        return lines
    if use.state == "unknown":
        lines.append(f"{block.node} has never said what it handed out of the block: whether a pod has it is not known")
    if address in block.release_wanted:
        lines.append(f"{block.node} is asked to release {address}, and has not done it yet")
    elif use.release_refused:
        lines.append(f"{block.node} did not release {address} when it was last asked: {use.release_refused}")
    gone = "" if use.pool_cidr else " (which no longer exists)"
    lines.append(f"{address} is in block {block.cidr} of node {block.node}, ippool/{block.pool}{gone}")
    return [*lines, *notes(block)]


def notes(block: BlockUse) -> list[str]:
    """What an operator should know of the block, a sentence each."""
    lines = []
    if "no-node" in block.state:
        lines.append(f"block {block.cidr} is of nobody: there is no node/{block.node}; see: underlayctl ipam check")
    if block.deleting and "no-node" in block.state:
        lines.append(
            f"block {block.cidr} is marked for deletion since {block.deleting}: a node that needs it frees it, 10 min "
            f"after it saw {block.node} gone; at once: underlayctl ipam release --block {block.cidr}"
        )
    elif block.deleting:
        lines.append(
            f"block {block.cidr} is marked for deletion since {block.deleting}: nothing more is handed out of it, and "
            f"it goes with its last pod"
        )
    elif "releasing" in block.state:
        lines.append(f"block {block.cidr} is being given back by {block.node}: it is withdrawn first")
    return lines


# -- parts -------------------------------------------------------------------------------------------------------------


def _reserved_within(net: Network, reservations: Iterable[IPReservation]) -> list[Network]:
    """What the reservations take of this network, as networks that do not overlap."""
    cidrs = [ip_network(c) for r in reservations for c in r.spec.reserved_cidrs]
    parts: list[Network] = []
    for cidr in cidrs:
        if not _overlap(cidr, net):
            continue
        parts.append(cidr if cidr.prefixlen >= net.prefixlen else net)
    return list(collapse_addresses(parts))  # type: ignore[type-var]


def _many(number: int, what: str) -> str:
    return f"{count(number)} {what}" if number == 1 else f"{count(number)} {what}{'es' if what.endswith('s') else 's'}"


def _within(address: Address, net: Network) -> bool:
    return address.version == net.version and address in net


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and bool(cast(Any, one).overlaps(other))


def _same(address: Address, text: str) -> bool:
    """Whether the text is this address; a node's addresses may also be names, which are none."""
    try:
        return address == ip_address(text)
    except ValueError:
        return False


def _order(net: Network) -> tuple[int, int, int]:
    return (net.version, int(net.network_address), net.prefixlen)
