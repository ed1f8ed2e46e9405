"""The RIB of a leaf: what peers told, what of it is let in, and which paths win. Pure.

A route goes down this page: ``AdjRibIn`` (agent/adjrib.py) holds it as the peer told it, the rules refuse it or let
it in (R11), ``DECISION`` picks the best paths of its prefix, and ``ecmp`` makes them one set of next hops. ``Rib``
joins the parts and looks again only at what changed. Time is an argument: seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address
from typing import Final, NamedTuple

import msgspec

from agent.adjrib import SPEAKER_RESTART, AdjRibIn
from agent.bgp.model import (
    Attributes,
    EndOfRib,
    Event,
    Family,
    Received,
    Resync,
    SessionChanges,
    SessionDown,
    SessionUp,
    SpeakerLost,
    Update,
)
from agent.fib import NextHop
from agent.filters import EMPTY, Candidate, Filter, Rule, split_communities
from agent.prefix import Prefix, PrefixSet, address_number, parse
from store.validate import WELL_KNOWN_COMMUNITIES

#: Members of one ECMP route at most.
ECMP_LIMIT: Final = 16
#: What a path without LOCAL_PREF, or from an external peer, is worth (RFC 4271, 5.1.5).
LOCAL_PREF: Final = 100

#: Whoever announces the route is about to go (RFC 8326): it is worth no LOCAL_PREF at all.
GRACEFUL_SHUTDOWN: Final = WELL_KNOWN_COMMUNITIES["graceful-shutdown"]
#: Whoever announces it lost its own source and keeps it for want of a better one (RFC 9494).
LLGR_STALE: Final = WELL_KNOWN_COMMUNITIES["llgr-stale"]

#: Attributes with a next hop whose verdict is remembered, per peer.
_WAYS_KEPT: Final = 4096

IPv6_LINK_LOCAL: Final = PrefixSet(["fe80::/10"])

_ORIGINS: Final = {"igp": 0, "egp": 1, "incomplete": 2}


class Peer(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """What the RIB needs to know of a peer that is configured. ``address`` is the key, as in ``Session``."""

    address: str
    name: str
    peer_as: int
    local_as: int
    families: tuple[Family, ...]
    #: Interface that the peer is on, for link-local next hops; 0 where it is on none.
    interface: int = 0
    #: Where the peer is on none: the gateway, on a link of ours, that leads to it, and to where its routes lead that
    #: have its own address as next hop. "" where its BGPPeer names none.
    gateway: str = ""
    #: The node's own AS, where ``local_as`` is another one for this peer alone; 0: it is not.
    node_as: int = 0
    allowed_own_as: int = 0
    max_prefixes: int = 100_000
    #: Seconds that its routes may outlive its session, whatever it asks for itself.
    max_restart_time: float = 120.0
    import_cidrs: tuple[str, ...] = ()
    #: Whether a default route is let in, as a fallback.
    default_route: bool = False
    #: Import rules of its filters.
    imports: Filter = EMPTY

    @property
    def external(self) -> bool:
        return self.peer_as != self.local_as


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """All that import depends on, besides the route."""

    peers: tuple[Peer, ...] = ()
    #: Pools (disabled ones too) and the cluster's importCIDRs.
    allowed: frozenset[str] = frozenset()
    own_blocks: frozenset[str] = frozenset()
    own_addresses: frozenset[str] = frozenset()
    router_id: str = ""
    #: Connected subnets, and the interface that each is on.
    on_link: frozenset[tuple[str, int]] = frozenset()
    #: Names of interfaces, where a filter asks for them.
    interfaces: frozenset[tuple[int, str]] = frozenset()


# -- import: one function per reason to refuse (R11) --------------------------------------------------------------


class Refusal(enum.Enum):
    """Why a route is not let in. The name is the rule, the value what it means for people."""

    InvalidPrefix = "the prefix is not one"
    DefaultRouteRefused = "a default route comes in only from a peer with defaultRoute: Fallback"
    OutsidePools = "the prefix is inside no pool and no importCIDRs"
    InsideLink = "the prefix is inside a connected subnet and holds a peer's address there, or ours: it would lead away"
    OwnBlock = "the prefix is equal to or inside a block of this node: somebody else announces it too"
    ASSet = "the AS_PATH has an AS_SET (RFC 9774)"
    OwnASInPath = "our AS is in the AS_PATH more often than numAllowedLocalASNumbers"
    FirstASNotPeer = "the AS_PATH does not begin with the peer's AS"
    OwnOriginator = "ORIGINATOR_ID is our router id: the route is our own"
    OwnClusterList = "our router id is in CLUSTER_LIST: the route went in a circle"
    NextHopInvalid = "the next hop is no address that a packet can be sent to"
    NextHopFamily = "an IPv6 prefix with an IPv4 next hop"
    NextHopIsSelf = "the next hop is an address of this node"
    NextHopNotOnLink = "the next hop is on no connected subnet of this node"
    RejectedByFilter = "a rule of the peer's filters rejects it"


class Context:
    """A peer and what its routes are judged by, prepared for many look-ups."""

    def __init__(
        self, peer: Peer, policy: Policy, allowed: PrefixSet, own: PrefixSet, inside_links: frozenset[Prefix]
    ) -> None:
        self.peer = peer
        self.inside_links = inside_links
        self.router_id = policy.router_id
        self.own_addresses = policy.own_addresses
        self.allowed = allowed
        self.own = own
        # The most specific subnet first: it is where the kernel would send.
        self._on_link = [(PrefixSet([cidr]), interface) for cidr, interface in sorted(policy.on_link, key=_by_length)]
        self.interfaces = dict(policy.interfaces)
        # Routes share attributes and next hops by the thousand. Attributes are known by the object, which is kept so
        # that its id stays its own.
        self._ways: dict[tuple[int, str, int], tuple[Attributes, NextHop | Refusal, Worth]] = {}

    def way(self, route: Received, bits: int) -> tuple[Attributes, NextHop | Refusal, Worth]:
        """The route's attributes; where a route of that family (32, 128) with them leads, or why it is refused,
        whatever its prefix; and what it is worth. Each is worked out once."""
        attributes = route.attributes
        key = (id(attributes), route.next_hop, bits)
        found = self._ways.get(key)
        if found is None:
            if len(self._ways) >= _WAYS_KEPT:
                self._ways.clear()
            way = self._find_way(attributes, route.next_hop, bits)
            found = self._ways[key] = (attributes, way, worth(attributes, external=self.peer.external))
        return found

    def rule(self, route: Received, prefix: Prefix, hop: NextHop) -> Rule:
        """The first rule of the peer's filters that the route meets."""
        attributes = route.attributes
        communities = attributes.communities + attributes.large_communities
        interface = self.interfaces.get(hop.interface, "")
        return self.peer.imports.decide(Candidate(prefix, attributes.as_path, communities, interface))

    def _find_way(self, attributes: Attributes, next_hop: str, bits: int) -> NextHop | Refusal:
        for refusal, applies in PATH_RULES:
            if applies(attributes, self):
                return refusal
        if bits == 128 and ":" not in next_hop:  # the other way round is RFC 8950
            return Refusal.NextHopFamily
        return self._find_hop(next_hop)

    def _find_hop(self, next_hop: str) -> NextHop | Refusal:
        if is_martian(next_hop):
            return Refusal.NextHopInvalid
        if next_hop in self.own_addresses:
            return Refusal.NextHopIsSelf
        if next_hop == self.peer.address and self.peer.gateway:
            next_hop = self.peer.gateway
        if IPv6_LINK_LOCAL.covers_address(next_hop):
            return NextHop(next_hop, self.peer.interface) if self.peer.interface else Refusal.NextHopNotOnLink
        for subnets, interface in self._on_link:
            if subnets.covers_address(next_hop):
                return NextHop(next_hop, interface)
        return Refusal.NextHopNotOnLink


def contexts(policy: Policy) -> dict[str, Context]:
    """One context per peer, by address."""
    allowed, own, inside = PrefixSet(policy.allowed), PrefixSet(policy.own_blocks), inside_links(policy)
    return {
        p.address: Context(
            p, policy, PrefixSet(policy.allowed | set(p.import_cidrs)) if p.import_cidrs else allowed, own, inside
        )
        for p in policy.peers
    }


def _by_length(item: tuple[str, int]) -> tuple[int, str, int]:
    return -int(item[0].partition("/")[2]), *item


def inside_links(policy: Policy) -> frozenset[Prefix]:
    """Every prefix that is more specific than a connected subnet and holds an address at which a session ends there."""
    subnets = sorted({cidr for cidr, _ in policy.on_link}, key=lambda cidr: -parse(cidr).length)
    tested = [(PrefixSet([cidr]), parse(cidr).length) for cidr in subnets]
    found = set()
    for address in policy.own_addresses | {p.address for p in policy.peers}:
        bits, number = address_number(address)
        length = next((length for subnet, length in tested if subnet.covers_address(address)), bits)
        for longer in range(length + 1, bits + 1):
            found.add(Prefix(bits, number >> (bits - longer) << (bits - longer), longer))
    return frozenset(found)


def is_martian(address: str) -> bool:
    """Not an address that a packet can be sent to (RFC 6890): unspecified, loopback, multicast, IPv4's class E."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return True
    never = parsed.is_unspecified or parsed.is_loopback or parsed.is_multicast
    return never or (parsed.version == 4 and parsed.is_reserved) or "%" in address


def is_default(prefix: Prefix) -> bool:
    return prefix.length == 0


def refused_default(prefix: Prefix, context: Context) -> bool:
    return is_default(prefix) and not context.peer.default_route


def outside_pools(prefix: Prefix, context: Context) -> bool:
    # A default route has a switch of its own.
    return not is_default(prefix) and not context.allowed.covers(prefix)


def inside_link(prefix: Prefix, context: Context) -> bool:
    return prefix in context.inside_links


def has_as_set(path: Attributes, context: Context) -> bool:
    return bool(path.as_set)


def own_as_in_path(path: Attributes, context: Context) -> bool:
    peer = context.peer
    count = path.as_path.count(peer.local_as)
    if peer.node_as not in (0, peer.local_as):
        count += path.as_path.count(peer.node_as)
    return count > peer.allowed_own_as


def first_as_not_peer(path: Attributes, context: Context) -> bool:
    return context.peer.external and path.as_path[:1] != (context.peer.peer_as,)


def own_originator(path: Attributes, context: Context) -> bool:
    return path.originator_id == context.router_id != ""


def own_cluster_list(path: Attributes, context: Context) -> bool:
    return context.router_id in path.cluster_list


#: In this order, prefix before path before next hop before own blocks; the first rule that says yes is the reason.
PREFIX_RULES: Final[tuple[tuple[Refusal, Callable[[Prefix, Context], bool]], ...]] = (
    (Refusal.DefaultRouteRefused, refused_default),
    (Refusal.OutsidePools, outside_pools),
    (Refusal.InsideLink, inside_link),
)
PATH_RULES: Final[tuple[tuple[Refusal, Callable[[Attributes, Context], bool]], ...]] = (
    (Refusal.ASSet, has_as_set),
    (Refusal.OwnASInPath, own_as_in_path),
    (Refusal.FirstASNotPeer, first_as_not_peer),
    (Refusal.OwnOriginator, own_originator),
    (Refusal.OwnClusterList, own_cluster_list),
)


def admit(route: Received, prefix: Prefix, context: Context) -> Path | Refusal:
    """The path that the route is for the choice among paths, as the peer's filters leave it; else why it is refused.
    Filters come last, so that they can let in nothing that the rules refuse (R11)."""
    for refusal, applies in PREFIX_RULES:
        if applies(prefix, context):
            return refusal
    _, hop, value = context.way(route, prefix.bits)
    if isinstance(hop, Refusal):
        return hop
    # Behind the others, so that it is said of others' routes only, and not of our own that came back.
    if context.own.covers(prefix):
        return Refusal.OwnBlock
    if not context.peer.imports.applies_to(prefix):
        return Path(route, hop, value)
    rule = context.rule(route, prefix, hop)
    if not rule.accept:
        return Refusal.RejectedByFilter
    if not rule.prepend and not rule.add:
        return Path(route, hop, value)
    changed = decorated(route, rule)
    return Path(changed, hop, worth(changed.attributes, external=context.peer.external))


def decorated(route: Received, rule: Rule) -> Received:
    """The route with what the rule gives it."""
    before = route.attributes
    communities, large = split_communities((*before.communities, *before.large_communities, *rule.add))
    attributes = msgspec.structs.replace(
        before, as_path=rule.prepend + before.as_path, communities=communities, large_communities=large
    )
    return msgspec.structs.replace(route, attributes=attributes)


# -- best path (RFC 4271, 9.1.2.2): each step keeps the better ones ------------------------------------------------


class Worth(NamedTuple):
    """All that the choice looks at."""

    llgr_stale: bool
    local_pref: int
    as_path: int
    origin: int
    med: int
    external: bool


def worth(attributes: Attributes, *, external: bool) -> Worth:
    """What a path with these attributes is worth, from a peer that is ``external`` (eBGP) or not."""
    local_pref = attributes.local_pref
    if local_pref is None or external:  # from an external peer it is to be ignored (RFC 4271, 5.1.5)
        local_pref = LOCAL_PREF
    return Worth(
        llgr_stale=LLGR_STALE in attributes.communities,
        local_pref=0 if GRACEFUL_SHUTDOWN in attributes.communities else local_pref,
        as_path=len(attributes.as_path),
        origin=_ORIGINS[attributes.origin],
        med=attributes.med,
        external=external,
    )


class Path(NamedTuple):
    """A route that was let in, where it leads, and what it is worth."""

    route: Received
    hop: NextHop
    worth: Worth


def fresh_over_llgr_stale(paths: list[Path]) -> list[Path]:
    """RFC 9494, 4.3: the least preferred of all, whatever else is said for it."""
    return [p for p in paths if not p.worth.llgr_stale] or paths


def highest_local_pref(paths: list[Path]) -> list[Path]:
    best = max(p.worth.local_pref for p in paths)
    return [p for p in paths if p.worth.local_pref == best]


def shortest_as_path(paths: list[Path]) -> list[Path]:
    best = min(p.worth.as_path for p in paths)
    return [p for p in paths if p.worth.as_path == best]


def lowest_origin(paths: list[Path]) -> list[Path]:
    best = min(p.worth.origin for p in paths)
    return [p for p in paths if p.worth.origin == best]


def lowest_med(paths: list[Path]) -> list[Path]:
    """MED compares only paths through the same neighbouring AS."""
    best: dict[tuple[int, ...], int] = {}
    for path in paths:
        neighbour, med = path.route.attributes.as_path[:1], path.worth.med
        best[neighbour] = min(best.get(neighbour, med), med)
    return [p for p in paths if p.worth.med == best[p.route.attributes.as_path[:1]]]


def external_over_internal(paths: list[Path]) -> list[Path]:
    return [p for p in paths if p.worth.external] or paths


#: What is equal after the last step is ECMP.
DECISION: Final = (
    fresh_over_llgr_stale,
    highest_local_pref,
    shortest_as_path,
    lowest_origin,
    lowest_med,
    external_over_internal,
)


def best_paths(paths: list[Path]) -> list[Path]:
    """The paths that are equally good and better than the others."""
    for step in DECISION:
        first = paths[0].worth
        if all(path.worth == first for path in paths):  # as the paths through two ToRs mostly are
            break
        paths = step(paths)
    return paths


def ecmp(paths: Iterable[Path]) -> tuple[NextHop, ...]:
    """The next hops of these paths, each once, in an order that does not depend on who came first."""
    return tuple(sorted({p.hop for p in paths})[:ECMP_LIMIT])


# -- the whole -----------------------------------------------------------------------------------------------------


class Selection(msgspec.Struct, frozen=True):
    """What is let in. ``best``: prefix -> next hops. ``refused``: peer's address -> prefix -> why.

    Both are the RIB's own, and good until the next event.
    """

    best: Mapping[str, tuple[NextHop, ...]]
    refused: Mapping[str, Mapping[str, Refusal]]


class Rib:
    """All peers' routes and the choice among them.

    ``apply`` takes the speaker's events, ``advance`` the time, ``configure`` the peers that are wanted; ``select``
    gives what a policy lets in, which depends on nothing but these: only the work is saved from one call to the next.
    """

    def __init__(self) -> None:
        self.peers: dict[str, AdjRibIn] = {}
        self._configured: dict[str, Peer] = {}
        self._changed: set[str] = set()
        self._policy = Policy()
        self._contexts: dict[str, Context] = {}
        self._best: dict[str, tuple[NextHop, ...]] = {}
        self._refused: dict[str, dict[str, Refusal]] = {}
        self._sets: dict[tuple[NextHop, ...], tuple[NextHop, ...]] = {}

    def apply(self, event: Event, now: float) -> None:
        """Takes one event in. One of a session that has ended since changes nothing."""
        if isinstance(event, SpeakerLost):
            for peer in self.peers.values():
                self._changed |= peer.speaker_lost(event.reason, now)
            return
        if isinstance(event, SessionChanges):  # for people
            return
        known = self.peers.get(event.peer)
        if known is None:  # told before the configuration is read: kept, and judged when it is
            known = self.peers[event.peer] = AdjRibIn(now)
        config = self._configured.get(event.peer)
        match event:
            case SessionUp():
                self._changed |= known.session_up(event, now)
            case SessionDown():
                limit = config.max_restart_time if config else SPEAKER_RESTART
                self._changed |= known.session_down(event, now, limit)
            case Update():
                self._changed |= known.update(event, config.max_prefixes if config else 1 << 32)
            case EndOfRib():
                self._changed |= known.end_of_rib(event)
            case Resync():
                known.resync(event)

    def advance(self, now: float) -> None:
        """Lets time pass: what is stale for too long is swept."""
        for peer in self.peers.values():
            self._changed |= peer.advance(now)

    def configure(self, peers: Iterable[Peer], now: float) -> None:
        """The whole set of peers that are wanted. Others are forgotten; one whose configuration changed and that had
        exceeded its maximum may try again."""
        wanted = {p.address: p for p in peers}
        for address in self.peers.keys() - wanted.keys():
            self._changed |= self.peers.pop(address).routes.keys()
        for address, peer in wanted.items():
            known = self.peers.get(address)
            if known is None:
                known = self.peers[address] = AdjRibIn(now)
            if not _same(self._configured.get(address), peer):
                known.exceeded = ""
                known.expect(peer.max_restart_time)
                self._changed |= known.enforce(peer.max_prefixes)
        self._configured = wanted

    def reported(self, peer: Peer, family: Family, now: float) -> bool:
        """Whether the peer has told all it has for the family, or never will (R8)."""
        known = self.peers.get(peer.address)
        return known is not None and known.reported(family, now)

    def exceeded(self, peer: Peer) -> str:
        """In what way the peer, as it is configured, exceeded its maximum; "" if it did not."""
        known = self.peers.get(peer.address)
        return known.exceeded if known and _same(self._configured.get(peer.address), peer) else ""

    def awaited(self, address: str, now: float) -> bool:
        """Whether a peer that is configured is up, or has routes left, or may still come up and tell some."""
        known, peer = self.peers.get(address), self._configured.get(address)
        if known is None or peer is None:
            return False
        return known.up or bool(known.routes) or not all(known.reported(f, now) for f in peer.families)

    def explain(self, prefix: str) -> list[Fate]:
        """What became of the prefix as each peer told it, under the policy of the last ``select``."""
        told = {
            address: (self.peers[address].routes[prefix], context)
            for address, context in self._contexts.items()
            if address in self.peers and prefix in self.peers[address].routes
        }
        return explain(told, prefix)

    def deadline(self, now: float) -> float | None:
        """The next moment at which ``advance`` or ``reported`` may say something new."""
        return min((at for p in self.peers.values() for at in p.deadlines(now)), default=None)

    def select(self, policy: Policy) -> Selection:
        """What comes in under this policy."""
        if policy != self._policy:
            self._policy = policy
            self._contexts = contexts(policy)
            self._best, self._refused, self._sets = {}, {a: {} for a in self._contexts}, {}
            self._changed = {prefix for a in self._contexts if a in self.peers for prefix in self.peers[a].routes}
        self._decide(self._changed)
        self._changed = set()
        return Selection(self._best, self._refused)

    def _decide(self, prefixes: Iterable[str]) -> None:
        told = [
            (context, self.peers[address].routes if address in self.peers else {}, self._refused[address])
            for address, context in self._contexts.items()
        ]
        for prefix in prefixes:
            try:
                parsed: Prefix | None = parse(prefix)
            except ValueError:
                parsed = None
            paths: list[Path] = []
            for context, routes, refused in told:
                route = routes.get(prefix)
                if route is not None:
                    path = admit(route, parsed, context) if parsed else Refusal.InvalidPrefix
                    if isinstance(path, Path):
                        paths.append(path)
                    else:
                        refused[prefix] = path
                        continue
                refused.pop(prefix, None)
            if paths:
                self._best[prefix] = self._hops(best_paths(paths) if len(paths) > 1 else paths)
            else:
                self._best.pop(prefix, None)

    def _hops(self, paths: list[Path]) -> tuple[NextHop, ...]:
        """As ``ecmp``, and equal sets are one object."""
        as_told = tuple([p.hop for p in paths])
        found = self._sets.get(as_told)
        if found is None:
            hops = ecmp(paths)
            found = self._sets[as_told] = self._sets.setdefault(hops, hops)
        return found


class Fate(NamedTuple):
    """What became of a peer's route: ``best``, ``worse`` (by the step of the choice that ``why`` names) or ``refused``
    (by the rule that ``why`` names)."""

    peer: str
    route: Received
    state: str
    why: str = ""


def explain(told: Mapping[str, tuple[Received, Context]], prefix: str) -> list[Fate]:
    """What became of the prefix as each of these peers (by address) told it."""
    try:
        parsed = parse(prefix)
    except ValueError:
        return [Fate(peer, route, "refused", Refusal.InvalidPrefix.value) for peer, (route, _) in told.items()]
    admitted = {peer: admit(route, parsed, context) for peer, (route, context) in told.items()}
    left = {peer: path for peer, path in admitted.items() if isinstance(path, Path)}
    lost: dict[str, str] = {}
    for step in DECISION:
        kept = step(list(left.values())) if left else []
        for peer in [peer for peer, path in left.items() if not any(path is k for k in kept)]:
            lost[peer] = step.__name__.replace("_", " ")
            del left[peer]
    fates = []
    for peer, (route, context) in told.items():
        path = admitted[peer]
        if isinstance(path, Refusal):
            fates.append(Fate(peer, route, "refused", _refused_by(path, route, parsed, context)))
        else:
            fates.append(Fate(peer, route, "worse" if peer in lost else "best", lost.get(peer, "")))
    return fates


def _refused_by(refusal: Refusal, route: Received, prefix: Prefix, context: Context) -> str:
    """The reason in words, with the filter's rule if it was one."""
    hop = context.way(route, prefix.bits)[1]
    if refusal is not Refusal.RejectedByFilter or not isinstance(hop, NextHop):
        return refusal.value
    return f"{context.rule(route, prefix, hop).name} rejects it"


def _same(a: Peer | None, b: Peer) -> bool:
    """Configured alike: which interface the peer is on is the kernel's news, not the administrator's."""
    return a is not None and msgspec.structs.replace(a, interface=b.interface) == b


def count_refusals(refused: Mapping[str, Refusal]) -> Counter[Refusal]:
    """How many prefixes each rule refuses."""
    return Counter(refused.values())
