"""The sessions that this node is to have: those of BGPPeers, and the mesh. Pure."""

from __future__ import annotations

import base64
from collections.abc import Container, Iterable, Mapping
from typing import Final, NamedTuple

from agent import filters
from agent.adjrib import family_of
from agent.bgp.model import Session
from agent.fib import KernelState
from agent.plan.identity import Identity, node_as
from agent.plan.model import Cluster, Notes, Snapshot, usable
from agent.prefix import is_inside, length_of
from agent.rib import Peer, Rib
from store.model import BGPConfiguration, BGPConfigurationSpec, BGPFilter, BGPPassword, BGPPeer, Meta, Node, Secret
from store.selector import parse as parse_selector
from store.validate import as_number_problem, duration, peer_address

#: What holds where there is none.
NO_CONFIGURATION: Final = BGPConfiguration(metadata=Meta(name="default"))
#: Nodes in a full mesh beyond which it is warned of.
MESH_LIMIT: Final = 100


class Peering(NamedTuple):
    """One session wanted, what its routes are judged by, and what ours are before they go out by it."""

    session: Session
    peer: Peer
    exports: filters.Filter = filters.EMPTY


def peer_sessions(me: Identity, snapshot: Snapshot, notes: Notes) -> dict[str, Peering | None]:
    """One session per BGPPeer that names this node, by the peer's address. An address has one session: that of the
    first BGPPeer by name. It has none (None) if that BGPPeer cannot have one now (R13)."""
    found: dict[str, Peering | None] = {}
    own = own_addresses(me, snapshot.kernel)
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
    return found


def mesh_sessions(me: Identity, snapshot: Snapshot, peered: Container[str], notes: Notes) -> list[Peering]:
    """One session per other node and family where the mesh is on, but to the addresses that BGPPeers have to
    themselves (``peered``)."""
    cluster = snapshot.cluster
    if not mesh_enabled(cluster.configuration):
        return []
    if len(cluster.nodes) >= MESH_LIMIT:
        count = len(cluster.nodes) + 1
        notes.add("MeshTooLarge", f"a full mesh of {count} nodes: peer with the ToRs or with route reflectors")
    own = own_addresses(me, snapshot.kernel)
    found: dict[str, Peering] = {}
    for node in sorted(cluster.nodes, key=lambda n: n.name):
        for peering in node_sessions(node, me, snapshot):
            address = peering.session.address
            if address not in own and address not in peered:
                found.setdefault(address, peering)
    return list(found.values())


def own_addresses(me: Identity, kernel: KernelState) -> set[str]:
    return {a.address for a in kernel.addresses} | set(me.addresses.values())


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
            for family, address in me.others.get(node.name, {}).items():
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
    local, interface = local_end(at.address, me)
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
        gateway="" if interface else peer.spec.reachable_by,
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


def node_sessions(node: Node, me: Identity, snapshot: Snapshot) -> Iterable[Peering]:
    """The mesh's sessions to another node."""
    peer_as = node_as(node, snapshot.cluster.configuration)
    if as_number_problem(peer_as):
        return
    name, spec = f"mesh-{node.name}", (snapshot.cluster.configuration or NO_CONFIGURATION).spec
    secret, value = password_of(spec.node_mesh_password, snapshot.cluster.secrets)
    passive = waits(me.name, node.name)
    for family, address in me.others.get(node.name, {}).items():
        local = me.addresses.get(family)
        if local is None:
            continue
        session = Session(
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
            mesh=True,
        )
        yield mesh_peering(session, me, snapshot)


def mesh_peering(session: Session, me: Identity, snapshot: Snapshot) -> Peering:
    """A session of the mesh, and what its routes are judged by."""
    _, interface = local_end(session.address, me)
    spec = (snapshot.cluster.configuration or NO_CONFIGURATION).spec
    peer = Peer(
        address=session.address,
        name=session.name,
        peer_as=session.peer_as,
        local_as=session.local_as,
        families=session.families,
        interface=interface,
        max_restart_time=duration(spec.node_mesh_max_restart_time),
    )
    return Peering(session, peer)


def local_end(peer: str, me: Identity) -> tuple[str, int]:
    """Our address and interface towards a peer: on the subnet that both are on, else the node's address. ("", 0) if
    there is neither."""
    node_address = me.addresses.get(family_of(peer), "")
    shared = [a for a in me.connected if is_inside(peer, a.subnet)]
    if not shared:
        return node_address, 0
    best = max(shared, key=lambda a: (length_of(a.subnet), a.address == node_address, a.address))
    return best.address, best.interface


def below_maximum(peer: Peer, rib: Rib, notes: Notes) -> bool:
    """R11: a peer with more prefixes than its maximum is removed, until it is configured anew."""
    exceeded = rib.exceeded(peer)
    if exceeded:
        notes.add(
            "MaxPrefixesExceeded",
            f"{peer.name}: {exceeded}: it is removed; "
            f"raise maxPrefixes, or have the peer send less and change its BGPPeer",
        )
    return not exceeded
