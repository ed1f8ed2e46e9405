"""What agent and speaker say to each other, as frozen values. Pure.

The agent hands the driver two whole sets, ``Session`` and ``Announcement``; the driver hands back events.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Family = Literal["ipv4 unicast", "ipv6 unicast"]


class Session(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One session wanted. ``name`` is for people (BGPPeer's name, or ``mesh-NODE``); ``address`` is the key."""

    name: str
    address: str
    port: int = 179
    local_address: str
    local_as: int
    peer_as: int
    router_id: str
    hold_time: int = 9
    families: tuple[Family, ...]
    #: Seconds that we ask the peer to keep our routes while our speaker restarts (RFC 4724); 0 switches it off.
    restart_time: int = 60
    #: Wait for the peer to connect instead of connecting (mesh: one of the two sides).
    passive: bool = False
    #: Of the node-to-node mesh.
    mesh: bool = False
    #: Hops to the peer at most, by the TTL of its packets (RFC 5082); 0: any number.
    hops: int = 0
    #: Where the password is, for people; "" for a session without one.
    secret: str = ""
    #: For TCP MD5 (RFC 2385), in base64; "" where ``secret`` says that there is one: it is not known (R13).
    password: str = ""

    def __repr__(self) -> str:
        return f"Session({self.name}, {self.address}{', password not shown' if self.password else ''})"


class Announcement(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One prefix wanted at one peer. The next hop is always explicit (exabgp.md, fault 13)."""

    peer: str  # Session.address
    prefix: str
    next_hop: str
    communities: tuple[str, ...] = ()
    large_communities: tuple[str, ...] = ()
    med: int | None = None
    #: The whole AS_PATH where it is not the usual one; towards an eBGP peer it begins with the local AS (fault 16).
    as_path: tuple[int, ...] = ()


class Attributes(msgspec.Struct, frozen=True, kw_only=True):
    """Path attributes; one value is shared by all the routes that carry it."""

    #: AS_SEQUENCE flattened, in order; an AS_SET stands as ``as_set`` apart (it makes a path ineligible, RFC 9774).
    as_path: tuple[int, ...] = ()
    as_set: tuple[int, ...] = ()
    origin: Literal["igp", "egp", "incomplete"] = "incomplete"
    med: int = 0
    local_pref: int | None = None
    communities: tuple[str, ...] = ()
    large_communities: tuple[str, ...] = ()
    originator_id: str = ""
    cluster_list: tuple[str, ...] = ()

    @property
    def marks(self) -> int:
        """How many numbers there are in the lists."""
        lists = (self.as_path, self.as_set, self.communities, self.large_communities, self.cluster_list)
        return sum(map(len, lists))


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """One route of a peer: where the peer says it goes."""

    prefix: str
    next_hop: str
    attributes: Attributes


# -- events, in the order in which the speaker saw them. ``generation`` counts a peer's sessions: what carries an
# older one than the last ``SessionUp`` is dropped by whoever reads it. ---------------------------------------------


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends of a session agreed on, beside families and graceful restart."""

    #: Route refresh (RFC 2918), and with its begin and end marked (RFC 7313).
    refresh: bool = False
    enhanced: bool = False
    #: AS numbers of four bytes (RFC 6793).
    asn4: bool = False
    #: Families whose next hop may be of the other family (RFC 8950), as ``ipv4 unicast ipv6``.
    extended_next_hop: tuple[str, ...] = ()
    #: Seconds; 0: silence never ends the session.
    hold_time: int = 0
    #: The peer's.
    router_id: str = ""


class Notification(msgspec.Struct, frozen=True, kw_only=True):
    """A NOTIFICATION (RFC 4271, 4.5). ``sent``: we said it. ``text`` is its data, as far as people can read it."""

    sent: bool
    code: int
    subcode: int
    text: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a session, or (``failed``) a connection that never became one. ``reason`` is ExaBGP's. It was seen
    ``times`` times, from ``at`` to ``last``, in seconds since 1970."""

    state: Literal["up", "down", "failed"]
    generation: int
    at: int
    last: int
    times: int = 1
    reason: str = ""
    notification: Notification | None = None


class SessionUp(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    peer: str
    generation: int
    #: Families negotiated for the session, and those for which the peer negotiated graceful restart.
    families: tuple[Family, ...]
    graceful_restart: tuple[Family, ...] = ()
    #: Seconds that the peer asked for in its own capability: how long its routes outlive it.
    restart_time: int = 0
    #: The peer keeps *our* routes while our speaker restarts (RFC 4724, 4.2); if not: GracefulRestartNotNegotiated.
    helper: bool = False
    #: None: the relay is older than this agent, and does not say.
    capabilities: Capabilities | None = None


class SessionDown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    peer: str
    generation: int
    reason: str


class Update(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    peer: str
    generation: int
    announced: tuple[Received, ...] = ()
    withdrawn: tuple[str, ...] = ()


class EndOfRib(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The peer has sent all it has for this family (RFC 4724), or all of it again (end of a resynchronisation):
    what was not (re)sent in this generation since the start or ``Resync`` is gone."""

    peer: str
    generation: int
    family: Family


class Resync(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The peer's routes are about to be told again, from the first to the last (agent restart, overflow): keep what
    is known until the ``EndOfRib`` that follows, then sweep what was not told again."""

    peer: str
    generation: int
    family: Family


class SpeakerLost(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The relay is gone: every session is down, or will be."""

    reason: str


class SessionChanges(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """For people: what changed with a peer now, or all that the relay remembers of it. What follows of it for routes
    is in the other events."""

    peer: str
    changes: tuple[Change, ...]


Event = SessionUp | SessionDown | Update | EndOfRib | Resync | SpeakerLost | SessionChanges


class SpeakerState(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver knows of the speaker at one moment; part of the agent's Snapshot.

    ``sent``: (peer, prefix) pairs that a peer that is up may still hold of us: put on the wire, or about to be by a
    table that is being replaced, and not yet reported withdrawn. ``confirmed``: pairs whose UPDATE was reported as sent
    (what people are shown as sent). ``table``: pairs of the last table that the speaker was given, by this agent or, as
    long as it has given none, by one before it; what is sent and not in it is on its way out. All are empty until the
    relay has told its table (``known`` is False until then, and nothing may be deleted).
    """

    known: bool = False
    sent: frozenset[tuple[str, str]] = frozenset()
    confirmed: frozenset[tuple[str, str]] = frozenset()
    table: frozenset[tuple[str, str]] = frozenset()
    #: Pair -> monotonic time at which the newest announcement of it was reported as sent; those of ``confirmed`` whose
    #: announcement has not changed since.
    confirmed_at: dict[tuple[str, str], float] = {}
    #: Prefix -> monotonic time at which its withdrawal was reported as sent to every peer that is up (R9).
    withdrawn_at: dict[str, float] = {}
    #: Session.address -> why its configuration was not taken (R13).
    refused: dict[str, str] = {}
    #: (peer, prefix) -> why this announcement cannot be made.
    unsendable: dict[tuple[str, str], str] = {}
    #: The sessions that it was asked for last; ``inherited``: by an agent before this one, which has not asked yet.
    sessions: frozenset[Session] = frozenset()
    inherited: bool = False
