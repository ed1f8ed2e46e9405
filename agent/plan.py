"""The plan: from all that store, kernel, peers and speaker say to all that is wanted of them. Pure.

``plan`` reads one ``Snapshot`` and returns one ``Plan``; nothing is remembered between two. Order (R9) comes of that: a
block is announced only once its blackhole *is seen* in the kernel, and loses its blackhole only once its withdrawal *is
seen* to be sent. The page goes: who we are, sessions, blocks and announcements, imports, pods, sysctls, what may be
deleted, and what people should know.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from itertools import chain
from typing import Final, NamedTuple

import msgspec

from agent import filters
from agent.adjrib import FAMILIES, family_of
from agent.bgp.model import Announcement, Family, Session, SpeakerState
from agent.fib import KernelState, Link, NextHop, Route, RouteKey
from agent.prefix import PrefixSet, parse, subnet
from agent.rib import Peer, Policy, Refusal, Rib, Selection, count_refusals
from cni.marks import (
    LINK_GROUP,
    METRIC_BLOCKS,
    METRIC_FALLBACK,
    METRIC_IMPORTS,
    METRIC_PODS,
    PROTO_BLOCKS,
    PROTO_IMPORTS,
    PROTO_PODS,
)
from store.model import (
    ANNOTATION_ASN,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPFilter,
    BGPPassword,
    BGPPeer,
    Condition,
    IPAMBlock,
    IPPool,
    Meta,
    Node,
    Secret,
)
from store.selector import parse as parse_selector
from store.validate import as_number_problem, duration, peer_address, validate

#: Seconds from the report of a withdrawal to the removal of the blackhole: packets under way have arrived (R9).
SETTLE: Final = 1.0
#: Seconds that a pod's route must have been missing before it is repaired: the CNI server may be at work (R10).
REPAIR_AFTER: Final = 2.0
#: What holds where there is none.
NO_CONFIGURATION: Final = BGPConfiguration(metadata=Meta(name="default"))
#: Nodes in a full mesh beyond which it is warned of.
MESH_LIMIT: Final = 100


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """What the store says, as far as this node is concerned."""

    node: Node | None = None
    #: The others; only where the mesh is on, or a BGPPeer has a peerSelector.
    nodes: tuple[Node, ...] = ()
    configuration: BGPConfiguration | None = None
    #: Those of one node each, ``node.NAME``.
    node_configurations: tuple[BGPConfiguration, ...] = ()
    peers: tuple[BGPPeer, ...] = ()
    filters: tuple[BGPFilter, ...] = ()
    #: The Secrets that BGPPeers name, as far as they are there.
    secrets: tuple[Secret, ...] = ()
    pools: tuple[IPPool, ...] = ()
    #: This node's own blocks.
    blocks: tuple[IPAMBlock, ...] = ()
    #: CIDRs that were this node's blocks, and that another node was seen to own.
    taken: frozenset[str] = frozenset()
    #: What stands here as it last could be used, as ``BGPPeer tor-1``, and what is wrong with it now (R13).
    standing: Mapping[str, str] = {}
    #: Whether the store itself said it (False: it is the last good view, from disk).
    live: bool = True


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan is made of. ``rib`` is asked, never changed. ``now`` is monotonic, in seconds."""

    node: str
    now: float
    cluster: Cluster
    kernel: KernelState
    speaker: SpeakerState
    rib: Rib
    #: (container id, interface) -> the name of its veth.
    link_name: Callable[[str, str], str]
    #: Pod addresses whose route was already missing before, and since when.
    missing: Mapping[str, float] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is wanted. Each member is a whole set, not a change."""

    routes: Mapping[RouteKey, Route]
    #: (route protocol, family) of ours whose unwanted routes may go: every source of theirs has reported (R8).
    deletable: frozenset[tuple[int, Family]]
    sysctls: Mapping[str, str]
    #: None: unknown, the speaker keeps what it has.
    sessions: frozenset[Session] | None
    announcements: frozenset[Announcement] | None
    peers: tuple[Peer, ...]
    conditions: tuple[Condition, ...]
    selection: Selection
    local_as: int = 0
    router_id: str = ""
    #: Pod addresses whose route is missing.
    missing: frozenset[str] = frozenset()
    #: When time alone will make the plan another one.
    wake_at: float | None = None


class Notes:
    """What people should know: messages by condition type."""

    def __init__(self) -> None:
        self._messages: dict[str, list[str]] = {}

    def add(self, kind: str, message: str) -> None:
        self._messages.setdefault(kind, []).append(message)

    def conditions(self) -> tuple[Condition, ...]:
        return tuple(
            Condition(type=kind, status="True", reason=kind, message="; ".join(_some(sorted(messages))))
            for kind, messages in sorted(self._messages.items())
        )


def plan(snapshot: Snapshot) -> Plan:
    """The whole plan for this snapshot. Equal snapshots give equal plans."""
    notes = Notes()
    kernel, cluster = snapshot.kernel, snapshot.cluster
    me = identify(snapshot, notes)
    pools = [pool for pool in cluster.pools if usable(pool, notes)]

    wanted = wanted_sessions(me, snapshot, notes) if me.local_as else []
    peers = tuple(sorted((peering.peer for peering in wanted), key=lambda p: p.address))
    peerings = [peering for peering in wanted if below_maximum(peering.peer, snapshot.rib, notes)]
    sessions = [peering.session for peering in peerings]

    held = {prefix for prefix, protocol, _ in kernel.routes if protocol == PROTO_BLOCKS}
    standing = standing_blocks(snapshot, held)
    fresh = fresh_blocks(standing - held, snapshot)
    known = (standing - fresh) | {cidr for cidr in held - standing if still_announced(cidr, snapshot)}
    # R9: install, then announce.
    announcements = announce(standing & held, peerings, pools, advertisements(cluster, me.name, notes))

    policy = import_policy(me, peers, pools, known, snapshot)
    selection = snapshot.rib.select(policy)
    # R5: what others announce stays in the kernel, where the CNI server sees it, and the block has no blackhole.
    blackholes = known | (fresh - routed_elsewhere(fresh, selection, notes))
    missing = missing_pod_routes(snapshot)

    routes: dict[RouteKey, Route] = {}
    for route in (
        *(blackhole(cidr) for cidr in blackholes),
        *(route for address, route in missing.items() if overdue(address, snapshot)),
        *imports(selection, me, kernel.links),
    ):
        routes[route.key] = route

    note_standing(cluster, notes)
    note_speaker(snapshot, sessions, notes)
    note_refused_routes(peers, selection, notes)
    note_own_blocks(peers, selection, snapshot.rib, notes)
    note_forwarding(kernel, standing, notes)
    return Plan(
        routes=routes,
        deletable=deletable(snapshot, me, peers),
        sysctls=uplink_sysctls(uplinks(routes.values(), peers), kernel),
        sessions=frozenset(sessions) if me.local_as else None,
        announcements=frozenset(announcements) if me.local_as else None,
        peers=peers,
        conditions=notes.conditions(),
        selection=selection,
        local_as=me.local_as,
        router_id=me.router_id,
        missing=frozenset(missing),
        wake_at=wake_at(snapshot, held - standing, missing),
    )


# -- who we are ----------------------------------------------------------------------------------------------------


class Identity(msgspec.Struct, frozen=True):
    """This node as its peers know it. ``local_as`` 0: the store does not say, so that nothing is to be changed."""

    name: str
    local_as: int
    router_id: str
    #: Where the node is reached, by family; and where the kernel lets us use it as a source.
    addresses: Mapping[Family, str]
    sources: Mapping[Family, str]


def identify(snapshot: Snapshot, notes: Notes) -> Identity:
    """Node, AS number and router id. A node that cannot be read leaves its sessions as they are (R13)."""
    node = snapshot.cluster.node
    if node is None:
        notes.add("NodeNotUsable", f"the store has no Node {snapshot.node}: create it; sessions stay as they are")
        return Identity(snapshot.node, 0, "", {}, {})
    addresses = node_addresses(node)
    own = {a.address for a in snapshot.kernel.addresses if a.usable}
    for address in addresses.values():
        if address not in own:
            message = f"InternalIP {address} of Node {node.name} is on no interface: imports come without a source"
            notes.add("NodeAddressNotLocal", message)
    local_as = node_as(node, snapshot.cluster.configuration)
    why = as_number_problem(local_as)
    if why:
        notes.add(
            "NodeNotUsable", f"AS number of Node {node.name} ({ANNOTATION_ASN}): {why}; sessions stay as they are"
        )
        local_as = 0
    return Identity(
        name=node.name,
        local_as=local_as,
        router_id=router_id(node.name, addresses),
        addresses=addresses,
        sources={family: address for family, address in addresses.items() if address in own},
    )


def node_addresses(node: Node) -> dict[Family, str]:
    """The node's first InternalIP of each family."""
    found: dict[Family, str] = {}
    for entry in node.status.addresses:
        if entry.type == "InternalIP":
            found.setdefault(family_of(entry.address), entry.address)
    return found


def node_as(node: Node, configuration: BGPConfiguration | None) -> int:
    """The node's annotation, else the cluster's AS number; -1 for an annotation that is no number."""
    text = node.metadata.annotations.get(ANNOTATION_ASN)
    if text is None:
        return (configuration.spec if configuration else BGPConfigurationSpec()).as_number
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else -1


def router_id(name: str, addresses: Mapping[Family, str]) -> str:
    """The IPv4 address; without one, 32 bits of the name's hash (RFC 6286 asks only that they be unique in the AS)."""
    return addresses.get("ipv4 unicast") or str(IPv4Address(zlib.crc32(name.encode()) or 1))


def usable(obj: BGPPeer | BGPFilter | BGPConfiguration | IPPool, notes: Notes) -> bool:
    """R13: what cannot be read takes down only itself."""
    problems = validate(obj)
    if problems:
        notes.add("ObjectNotUsable", f"{obj.kind()} {obj.name}: {problems[0]}")
    return not problems


# -- sessions ------------------------------------------------------------------------------------------------------


class Peering(NamedTuple):
    """One session wanted, what its routes are judged by, and what ours are before they go out by it."""

    session: Session
    peer: Peer
    exports: filters.Filter = filters.EMPTY


def wanted_sessions(me: Identity, snapshot: Snapshot, notes: Notes) -> list[Peering]:
    """One session per BGPPeer that names this node, and per other node and family where the mesh is on. An address has
    one session: the first BGPPeer by name, before the mesh. It has none if that BGPPeer cannot have one now (R13)."""
    found: dict[str, Peering | None] = {}
    own = {a.address for a in snapshot.kernel.addresses} | set(me.addresses.values())
    known = {f.name: f for f in snapshot.cluster.filters if usable(f, notes)}
    taken: dict[str, str] = {}
    for peer in sorted(snapshot.cluster.peers, key=lambda p: p.name):
        if not usable(peer, notes):
            continue
        for at in remote_ends(peer, me, snapshot):
            if at.address in own:
                notes.add("PeerNotUsable", f"BGPPeer {peer.name}: {at.address} is an address of this node itself")
            elif at.address in taken:
                owner = taken[at.address]
                notes.add("PeerNotUsable", f"BGPPeer {peer.name}: {at.address} is the peer of {owner} already")
            else:
                peering, problem = peer_session(peer, at, me, snapshot, known)
                if problem:
                    notes.add("PeerNotUsable", f"BGPPeer {peer.name}: {problem}")
                found[at.address], taken[at.address] = peering, peer.name
    if mesh_enabled(snapshot.cluster.configuration):
        if len(snapshot.cluster.nodes) >= MESH_LIMIT:
            count = len(snapshot.cluster.nodes) + 1
            notes.add("MeshTooLarge", f"a full mesh of {count} nodes: peer with the ToRs or with route reflectors")
        for node in sorted(snapshot.cluster.nodes, key=lambda n: n.name):
            for peering in mesh_sessions(node, me, snapshot):
                if peering.session.address not in own:
                    found.setdefault(peering.session.address, peering)
    return [peering for peering in found.values() if peering is not None]


def selects(peer: BGPPeer, node: Node | None) -> bool:
    """By name, by selector, or every node."""
    if node is None:
        return False
    if peer.spec.node:
        return peer.spec.node == node.name
    return not peer.spec.node_selector or parse_selector(peer.spec.node_selector).matches(node.metadata.labels)


class RemoteEnd(NamedTuple):
    """Where a session of a BGPPeer ends. ``name`` is that of the session."""

    name: str
    address: str
    port: int
    peer_as: int
    passive: bool
    #: It ends at another node, which expects ours at this node's InternalIP.
    is_node: bool = False


def remote_ends(peer: BGPPeer, me: Identity, snapshot: Snapshot) -> Iterable[RemoteEnd]:
    """Whom this node peers with by this BGPPeer: its address, or the nodes that it selects, and those that it has peer
    with this one (Calico's reversePeering: Auto)."""
    spec, cluster, here = peer.spec, snapshot.cluster, snapshot.cluster.node
    if here is None:
        return
    if not spec.peer_selector:
        if selects(peer, here):
            address, port = peer_address(spec.peer_ip)
            port = listen_port(cluster, me.name) if spec.passive else port
            yield RemoteEnd(peer.name, address, port, spec.as_number, spec.passive)
        return
    chosen = parse_selector(spec.peer_selector)
    for node in sorted(cluster.nodes, key=lambda n: n.name):
        forth = selects(peer, here) and chosen.matches(node.metadata.labels)
        back = selects(peer, node) and chosen.matches(here.metadata.labels)
        peer_as = node_as(node, cluster.configuration)
        if (forth or back) and not as_number_problem(peer_as):
            for family, address in node_addresses(node).items():
                if family in me.addresses:
                    passive = waits(me.name, node.name)
                    port = listen_port(cluster, me.name if passive else node.name)
                    yield RemoteEnd(f"{peer.name}-{node.name}", address, port, peer_as, passive, is_node=True)


def waits(here: str, there: str) -> bool:
    """Of two nodes the one whose name sorts first connects, the other waits."""
    return here > there


def listen_port(cluster: Cluster, node: str) -> int:
    """Where that node is found by those who connect to it."""
    own = next((c.spec.listen_port for c in cluster.node_configurations if c.name == f"node.{node}"), 0)
    return own or (cluster.configuration.spec.listen_port if cluster.configuration else 0) or 179


def mesh_enabled(configuration: BGPConfiguration | None) -> bool:
    return (configuration.spec if configuration else BGPConfigurationSpec()).node_to_node_mesh_enabled


def peer_session(
    peer: BGPPeer, at: RemoteEnd, me: Identity, snapshot: Snapshot, known: Mapping[str, BGPFilter]
) -> tuple[Peering | None, str]:
    """The session that a BGPPeer asks for; None, and why, if it cannot have one. ``known`` are the filters by name."""
    local, interface = local_end(at.address, me, snapshot.kernel)
    if at.is_node or peer.spec.source_address == "UseNodeIP":
        local = me.addresses.get(family_of(at.address), "")
    if not local:
        return None, f"this node has no address of the family of {at.address}"
    missing = [name for name in peer.spec.filters if name not in known]
    if missing:
        return None, (
            f"there is no usable BGPFilter {', '.join(missing)}: without its filters the session stays down; "
            f"create it, or take its name out of filters"
        )
    family = family_of(at.address)
    local_as = peer.spec.local_as_number or me.local_as
    external = at.peer_as != local_as
    secret, value = password_of(peer.spec.password, snapshot.cluster.secrets)
    rules = [known[name] for name in peer.spec.filters]
    session = Session(
        name=at.name,
        address=at.address,
        port=at.port,
        local_address=local,
        local_as=local_as,
        peer_as=at.peer_as,
        router_id=me.router_id,
        hold_time=peer.spec.hold_time,
        families=(family,),
        passive=at.passive,
        hops=peer.spec.ttl_security,
        secret=secret,
        password=value,
    )
    judged = Peer(
        address=at.address,
        name=at.name,
        peer_as=at.peer_as,
        local_as=local_as,
        node_as=me.local_as,
        families=(family,),
        interface=interface,
        allowed_own_as=peer.spec.num_allowed_local_as_numbers,
        max_prefixes=peer.spec.max_prefixes,
        max_restart_time=duration(peer.spec.max_restart_time),
        import_cidrs=peer.spec.import_cidrs,
        default_route=peer.spec.default_route == "Fallback",
        imports=filters.compiled(rules, "import", external=external),
    )
    return Peering(session, judged, filters.compiled(rules, "export", external=external)), ""


def password_of(password: BGPPassword | None, secrets: Iterable[Secret]) -> tuple[str, str]:
    """Where the password is, in words, and its value in base64, "" if it is not there. Both "" if none is asked for."""
    if password is None:
        return "", ""
    ref = password.secret_key_ref
    value = next((s.data.get(ref.key, b"") for s in secrets if s.name == ref.name), b"")
    return f"Secret {ref.name}, key {ref.key}", base64.b64encode(value).decode()


def mesh_sessions(node: Node, me: Identity, snapshot: Snapshot) -> Iterable[Peering]:
    """Sessions to another node."""
    peer_as = node_as(node, snapshot.cluster.configuration)
    if as_number_problem(peer_as):
        return
    name, spec = f"mesh-{node.name}", (snapshot.cluster.configuration or NO_CONFIGURATION).spec
    secret, value = password_of(spec.node_mesh_password, snapshot.cluster.secrets)
    passive = waits(me.name, node.name)
    for family, address in node_addresses(node).items():
        local = me.addresses.get(family)
        if local is None:
            continue
        _, interface = local_end(address, me, snapshot.kernel)
        yield Peering(
            Session(
                name=name,
                address=address,
                local_address=local,
                local_as=me.local_as,
                peer_as=peer_as,
                router_id=me.router_id,
                families=(family,),
                passive=passive,
                port=listen_port(snapshot.cluster, me.name if passive else node.name),
                secret=secret,
                password=value,
            ),
            Peer(
                address=address,
                name=name,
                peer_as=peer_as,
                local_as=me.local_as,
                families=(family,),
                interface=interface,
                max_restart_time=duration(spec.node_mesh_max_restart_time),
            ),
        )


def local_end(peer: str, me: Identity, kernel: KernelState) -> tuple[str, int]:
    """Our address and interface towards a peer: on the subnet that both are on, else the node's address. ("", 0) if
    there is neither."""
    node_address = me.addresses.get(family_of(peer), "")
    shared = [a for a in kernel.addresses if _inside(peer, a.subnet)]
    if not shared:
        return node_address, 0
    best = max(shared, key=lambda a: (_length(a.subnet), a.address == node_address, a.address))
    return best.address, best.interface


def below_maximum(peer: Peer, rib: Rib, notes: Notes) -> bool:
    """R11: a peer with more prefixes than its maximum is removed, until it is configured anew."""
    count = rib.exceeded(peer)
    if count:
        notes.add(
            "MaxPrefixesExceeded",
            f"{peer.name} sent {count} prefixes, {peer.max_prefixes} are allowed: it is removed; "
            f"raise maxPrefixes, or have the peer send less and change its BGPPeer",
        )
    return not count


# -- blocks and announcements --------------------------------------------------------------------------------------


def standing_blocks(snapshot: Snapshot, held: set[str]) -> set[str]:
    """The blocks that are to be announced: our own that are not on their way out, and any with live pods (R14)."""
    blocks = [b for b in snapshot.cluster.blocks if _is_prefix(b.spec.cidr)]
    own, leaving = {b.spec.cidr for b in blocks}, {b.spec.cidr for b in blocks if is_leaving(b)}
    if not snapshot.cluster.live:
        own |= held  # claimed since the view was written, perhaps
    in_question = (held | leaving) - (own - leaving)
    return (own - leaving) | (with_live_pods(in_question, snapshot.kernel) - snapshot.cluster.taken)


def fresh_blocks(cidrs: set[str], snapshot: Snapshot) -> set[str]:
    """Those of these blocks without blackhole that no pod of ours lives in and no peer was told of: newly claimed, or
    from before a boot, or from a backup of the store."""
    announced = {prefix for _, prefix in snapshot.speaker.sent}
    return cidrs - announced - with_live_pods(cidrs, snapshot.kernel)


def routed_elsewhere(fresh: set[str], selection: Selection, notes: Notes) -> set[str]:
    """Those of the new blocks that a peer's route is equal to or inside of: somebody else uses them (R5)."""
    if not fresh:
        return set()
    blocks, found = PrefixSet(fresh), set()
    for prefix, hops in selection.best.items():
        if blocks.covers(parse(prefix)):
            cidr = next(c for c in fresh if PrefixSet([c]).covers(parse(prefix)))
            found.add(cidr)
            notes.add(
                "ForeignRoute",
                f"{prefix} via {' and '.join(h.gateway for h in hops)} is in the new block {cidr}, which is neither "
                f"used nor announced until that route is gone: does another cluster have a pool here?",
            )
    return found


def is_leaving(block: IPAMBlock) -> bool:
    """The owner gives it back (R4), or somebody deleted it (R5)."""
    return block.status.releasing or bool(block.metadata.deletion_timestamp)


def with_live_pods(cidrs: set[str], kernel: KernelState) -> set[str]:
    """Those in which a pod has its route."""
    lengths = {(family_of(cidr), _length(cidr)) for cidr in cidrs}
    populated = set()
    for prefix, protocol, _ in kernel.routes:
        if protocol == PROTO_PODS:
            address = prefix.partition("/")[0]
            populated |= {subnet(address, length) for family, length in lengths if family == family_of(address)}
    return cidrs & populated


def still_announced(cidr: str, snapshot: Snapshot) -> bool:
    """R9: withdrawn means that every peer that is up was told, and a second passed."""
    speaker = snapshot.speaker
    if not speaker.known or any(prefix == cidr for _, prefix in speaker.sent):
        return True
    at = speaker.withdrawn_at.get(cidr)
    return at is not None and snapshot.now < at + SETTLE


def blackhole(cidr: str) -> Route:
    """What is in no pod's route goes nowhere, instead of back to the ToR."""
    return Route(prefix=cidr, protocol=PROTO_BLOCKS, metric=METRIC_BLOCKS, kind="blackhole")


class Advertisement(NamedTuple):
    """What every peer hears blocks inside a prefix with."""

    within: PrefixSet
    communities: tuple[str, ...]


def advertisements(cluster: Cluster, node: str, notes: Notes) -> list[Advertisement]:
    """The node's own prefixAdvertisements if it has any, else the cluster's; names become what they stand for."""
    own = [c for c in cluster.node_configurations if c.name == f"node.{node}"]
    for configuration in (*own, cluster.configuration):
        if configuration is None or not configuration.spec.prefix_advertisements or not usable(configuration, notes):
            continue
        named = {c.name: c.value for c in configuration.spec.communities}
        return [
            Advertisement(PrefixSet([one.cidr]), tuple(named.get(text, text) for text in one.communities))
            for one in configuration.spec.prefix_advertisements
        ]
    return []


def announce(
    blocks: set[str], peerings: Iterable[Peering], pools: Iterable[IPPool], advertised: Sequence[Advertisement] = ()
) -> list[Announcement]:
    """Each block to each peer of its family, next hop our end of the session; not those of disableBGPExport pools, nor
    what the peer's filters reject (R12)."""
    private = PrefixSet(pool.spec.cidr for pool in pools if pool.spec.disable_bgp_export)
    exported = []
    for cidr in blocks:
        prefix = parse(cidr)
        if not private.covers(prefix):
            given = (one.communities for one in advertised if one.within.covers(prefix))
            exported.append((cidr, filters.Candidate(prefix, communities=tuple(chain.from_iterable(given)))))
    found = []
    for session, _, exports in peerings:
        for cidr, candidate in exported:
            if family_of(cidr) not in session.families:
                continue
            rule = exports.decide(candidate)
            if rule.accept:
                found.append(announcement(cidr, session, rule, candidate.communities))
    return found


def announcement(cidr: str, session: Session, rule: filters.Rule, given: Sequence[str] = ()) -> Announcement:
    """The block as this peer is to hear of it: with the communities ``given`` to all, and what the export rule adds."""
    communities, large = filters.split_communities((*given, *rule.add))
    # An AS_PATH that is said is sent as it is; an eBGP peer expects our AS first (RFC 4271, 5.1.2).
    own = (session.local_as,) if session.peer_as != session.local_as else ()
    return Announcement(
        peer=session.address,
        prefix=cidr,
        next_hop=session.local_address,
        communities=communities,
        large_communities=large,
        as_path=own + rule.prepend if rule.prepend else (),
    )


# -- imports (what is refused is in agent/rib.py) --------------------------------------------------------------------


def import_policy(
    me: Identity, peers: tuple[Peer, ...], pools: Iterable[IPPool], blocks: set[str], snapshot: Snapshot
) -> Policy:
    """Only prefixes inside pools, disabled ones too, and the importCIDRs; never what is in an own block; only next hops
    on a subnet of an interface that is up (R11)."""
    configuration, kernel = snapshot.cluster.configuration, snapshot.kernel
    extra = configuration.spec.import_cidrs if configuration else ()
    return Policy(
        peers=peers,
        allowed=frozenset(pool.spec.cidr for pool in pools) | {cidr for cidr in extra if _is_prefix(cidr)},
        own_blocks=frozenset(blocks),
        own_addresses=frozenset(a.address for a in kernel.addresses) | frozenset(me.addresses.values()),
        router_id=me.router_id,
        on_link=frozenset((a.subnet, a.interface) for a in kernel.addresses if _is_up(a.interface, kernel.links)),
        interfaces=interface_names(peers, kernel),
    )


def interface_names(peers: Iterable[Peer], kernel: KernelState) -> frozenset[tuple[int, str]]:
    """Names of the interfaces that next hops can be on, if any import rule looks at them."""
    if not any(rule.interface for peer in peers for rule in (*peer.imports.v4, *peer.imports.v6)):
        return frozenset()
    return frozenset(
        (a.interface, kernel.links[a.interface].name) for a in kernel.addresses if a.interface in kernel.links
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


# -- pods (R10: the CNI server writes their routes; here they are only repaired) ---------------------------------------


def missing_pod_routes(snapshot: Snapshot) -> dict[str, Route]:
    """Routes that the store says and the kernel lacks, of pods whose veth is there and not about to be deleted."""
    kernel = snapshot.kernel
    veths = {link.name: link.index for link in kernel.links.values() if link.group == LINK_GROUP}
    found: dict[str, Route] = {}
    for block in snapshot.cluster.blocks if veths else ():
        for allocation in block.status.allocations:
            address = allocation.address
            prefix = f"{address}/{128 if ':' in address else 32}"
            if (prefix, PROTO_PODS, METRIC_PODS) in kernel.routes:
                continue
            index = veths.get(snapshot.link_name(allocation.container, allocation.interface))
            if index is not None:
                found[address] = Route(
                    prefix=prefix, protocol=PROTO_PODS, metric=METRIC_PODS, nexthops=(NextHop("", index),)
                )
    return found


def overdue(address: str, snapshot: Snapshot) -> bool:
    """Missing for long enough that nobody else can be about to write it."""
    return snapshot.now >= snapshot.missing.get(address, snapshot.now) + REPAIR_AFTER


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


# -- when ----------------------------------------------------------------------------------------------------------


def deletable(snapshot: Snapshot, me: Identity, peers: Iterable[Peer]) -> frozenset[tuple[int, Family]]:
    """R8: nothing is deleted before every source has reported once. For blocks the sources are the store and the
    speaker; for imports also each peer of the family. Pod routes are the CNI server's to delete (R10)."""
    if not (snapshot.cluster.live and snapshot.speaker.known):
        return frozenset()
    blocks = {(PROTO_BLOCKS, family) for family in FAMILIES}
    if not me.local_as:
        return frozenset(blocks)
    peers = tuple(peers)
    return frozenset(blocks) | {
        (PROTO_IMPORTS, family)
        for family in FAMILIES
        if all(snapshot.rib.reported(p, family, snapshot.now) for p in peers if family in p.families)
    }


def wake_at(snapshot: Snapshot, going: Iterable[str], missing: Iterable[str]) -> float | None:
    """The first moment from now on at which time alone changes the plan."""
    at = [snapshot.rib.deadline(snapshot.now)]
    at += [t + SETTLE for cidr in going if (t := snapshot.speaker.withdrawn_at.get(cidr)) is not None]
    at += [snapshot.missing.get(address, snapshot.now) + REPAIR_AFTER for address in missing]
    return min((t for t in at if t is not None and t > snapshot.now), default=None)


# -- what people should know -----------------------------------------------------------------------------------------


def note_standing(cluster: Cluster, notes: Notes) -> None:
    """R13: what cannot be used any more stands as it last could be."""
    for what, why in cluster.standing.items():
        notes.add("ObjectNotUsable", f"{what}: {why}; it stands as it last could be used")


def note_speaker(snapshot: Snapshot, sessions: Iterable[Session], notes: Notes) -> None:
    """Sessions that are refused, and peers that would drop our routes when the speaker restarts (R14)."""
    if not snapshot.cluster.live:
        notes.add(
            "StoreUnreachable", "the store cannot be reached: working from the last good view; nothing is deleted"
        )
    if not snapshot.speaker.known:
        notes.add("SpeakerUnreachable", "the speaker has not told its table: is underlay-speaker running?")
    for (peer, prefix), why in sorted(snapshot.speaker.unsendable.items()):
        notes.add("NotAnnounced", f"{prefix} to {peer}: {why}")
    for session in sessions:
        if session.address in snapshot.speaker.refused:
            notes.add("SessionRefused", f"{session.name}: {snapshot.speaker.refused[session.address]}")
        known = snapshot.rib.peers.get(session.address)
        if known and known.up and not known.helper:
            message = f"{session.name}: a restart of the speaker loses packets; switch graceful restart on at the peer"
            notes.add("GracefulRestartNotNegotiated", message)


#: Refusals that are worth a look; the others are what the policy is for.
_TELLING: Final = (
    Refusal.InvalidPrefix,
    Refusal.FirstASNotPeer,
    Refusal.OwnOriginator,
    Refusal.OwnClusterList,
    Refusal.NextHopInvalid,
    Refusal.NextHopFamily,
    Refusal.NextHopIsSelf,
)


def note_refused_routes(peers: Iterable[Peer], selection: Selection, notes: Notes) -> None:
    for peer in peers:
        counts = count_refusals(selection.refused.get(peer.address, {}))
        if not counts:
            continue
        for refusal, count in counts.items():
            if refusal is Refusal.NextHopNotOnLink:
                notes.add("NextHopNotOnLink", f"{peer.name}: {count} prefixes: {refusal.value}")
            elif refusal in _TELLING:
                notes.add("RoutesRefused", f"{peer.name}: {count} prefixes, {refusal.name}: {refusal.value}")


def note_own_blocks(peers: Iterable[Peer], selection: Selection, rib: Rib, notes: Notes) -> None:
    """Somebody else announces what is in a block that is in use here. Our own announcement that comes back (where
    numAllowedLocalASNumbers lets it) has our AS in its path."""
    for peer in peers:
        prefixes = sorted(
            prefix
            for prefix, why in selection.refused.get(peer.address, {}).items()
            if why is Refusal.OwnBlock
            and peer.local_as not in rib.peers[peer.address].routes[prefix].attributes.as_path
        )
        if prefixes:
            notes.add(
                "ForeignRoute",
                f"{peer.name} announces {', '.join(_some(prefixes))}, in a block of this node: refused, but pods of "
                f"that block are perhaps not reached from elsewhere; another cluster with a pool here, or a node that "
                f"the store knows no more, is to be given other addresses",
            )


def note_forwarding(kernel: KernelState, blocks: Iterable[str], notes: Notes) -> None:
    """A node that does not forward has pods that nobody reaches."""
    families = {family_of(cidr) for cidr in blocks}
    for family, key in (("ipv4 unicast", "net.ipv4.ip_forward"), ("ipv6 unicast", "net.ipv6.conf.all.forwarding")):
        if family in families and kernel.sysctls.get(key) == "0":
            notes.add("ForwardingOff", f"{key} is 0: pods are reached by this node alone; set it to 1")


def _some(messages: list[str], limit: int = 8) -> list[str]:
    return messages if len(messages) <= limit else [*messages[:limit], f"and {len(messages) - limit} more"]


def _is_up(interface: int, links: Mapping[int, Link]) -> bool:
    return interface in links and links[interface].up


def _inside(address: str, cidr: str) -> bool:
    return subnet(address, _length(cidr)) == cidr if family_of(address) == family_of(cidr) else False


def _length(cidr: str) -> int:
    return int(cidr.partition("/")[2])


def _is_prefix(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
