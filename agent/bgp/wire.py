"""How relay and agent talk, and what both read in ExaBGP's lines. Pure; standard library only, for the relay.

On ``relay.sock`` everything is a line. Agent to relay: one JSON object. Relay to agent: ``NUMBER KIND PAYLOAD``,
numbered from 0 without a gap for each connection, so that a loss cannot pass unseen. The payload is JSON, but for
``KIND_UPDATE``: ``GENERATION`` and ExaBGP's line as it came (parsing it is the agent's work, the relay has to keep up).
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

VERSION = 1
#: Longest line that either side accepts, in bytes: a table of 100,000 routes fits.
MAX_LINE = 32 * 1024 * 1024
#: A description that says which configuration a neighbor was loaded from; ``show neighbor configuration`` repeats it.
MARK = "underlay:"

FAMILIES = ("ipv4 unicast", "ipv6 unicast")

KIND_HELLO = "hello"  # all the relay knows: conf, table, peers and their past, pairs wanted, held and confirmed
KIND_UP = "up"
KIND_DOWN = "down"  # a session ended, or a connection that never became one
KIND_UPDATE = "update"  # a peer's UPDATE or End-of-RIB
KIND_RESYNC = "resync"  # a peer's routes of one family come again from here ...
KIND_END = "end"  # ... to here
KIND_SENT = "sent"  # what changed in what a peer may hold of us
KIND_REFUSED = "refused"  # ExaBGP refused a route
KIND_TABLE = "table"  # the table with this generation is on disk
KIND_CONF = "conf"  # the configuration with this mark is loaded, or why it is not
KIND_ERROR = "error"  # a request of the agent was not understood


class Peering(NamedTuple):
    """What one session agreed on."""

    families: tuple[str, ...] = ()
    #: Families whose routes outlive the peer's own restart, and the seconds it asked for (RFC 4724).
    graceful: tuple[str, ...] = ()
    restart_time: int = 0
    #: The peer keeps our routes while *we* restart: it has the capability at all, and we sent it (section 4.2).
    helper: bool = False
    #: The peer takes a ROUTE-REFRESH (RFC 2918), and brackets its answer (RFC 7313).
    refresh: bool = False
    enhanced: bool = False
    #: AS numbers of four bytes in AS_PATH (RFC 6793).
    asn4: bool = False
    #: Families whose next hop may be of the other family (RFC 8950), as ``ipv4 unicast ipv6``.
    extended_next_hop: tuple[str, ...] = ()
    #: Seconds: the smaller of the two ends' (RFC 4271, 4.2); 0: silence never ends the session.
    hold_time: int = 0
    #: The peer's.
    router_id: str = ""
    #: Families in which the peer can be told anything: to one that names none, and so has IPv4 unicast (RFC 4760,
    #: section 8), ExaBGP sends neither routes nor an End-of-RIB.
    told: tuple[str, ...] = ()


class Head(NamedTuple):
    kind: str
    peer: str
    direction: str


# ExaBGP writes its envelope with these very spaces (reactor/api/response/json.py).
_HEAD = re.compile(
    rb'"type": "([a-z-]+)", "neighbor": \{ "address": \{ "local": "[^"]*", "peer": "([0-9a-fA-F:.]+)" \}, '
    rb'"asn": \{[^}]*\}(?:, "router-id": "[^"]*")? (?:, )?(?:"direction": "(send|receive)")?'
)
_END = re.compile(rb'"message": \{ "eor": \{ "afi" : "([a-z0-9-]+)", "safi" : "([a-z0-9-]+)" \}')


def head(line: bytes) -> Head | None:
    """Kind, peer and direction of an ExaBGP line without parsing it; None if it has no such envelope."""
    found = _HEAD.search(line, 0, 1024)
    if found is None:
        return None
    kind, peer, direction = found.groups()
    return Head(kind.decode(), peer.decode(), (direction or b"").decode())


def end_of_rib(line: bytes) -> str:
    """The family whose End-of-RIB an ``update`` line of ExaBGP is; empty for an UPDATE."""
    found = _END.search(line, 0, 1024)
    return "" if found is None else b" ".join(found.groups()).decode()


def names(line: bytes, family: str) -> bool:
    """Whether an ``update`` line of ExaBGP says anything of this family, without parsing it."""
    return b'"%s"' % family.encode() in line


def frame(number: int, kind: str, payload: bytes) -> bytes:
    return b"%d %s %s\n" % (number, kind.encode(), payload)


def pack(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def family_of(prefix: str) -> str:
    return "ipv6 unicast" if ":" in prefix else "ipv4 unicast"


def peering(sent: Any, received: Any) -> Peering:
    """What two OPEN messages, as ExaBGP's ``open`` objects, agree on. Unknown shapes count as absent.

    ExaBGP labels the graceful restart flags the wrong way round (exabgp.md), so they are not looked at: a family that
    is listed takes part, whatever its flag (RFC 4724, section 3: no flag means that forwarding state was not kept in
    the *last* restart).
    """
    ours, theirs = _families(sent), _families(received)
    restart = _capability(received, "64", "graceful-restart")
    graceful: tuple[str, ...] = ()
    time = 0
    if restart is not None:
        flags = restart.get("address-family-flags")
        listed = {str(name).replace("/", " ") for name in flags} if isinstance(flags, dict) else set()
        graceful = tuple(f for f in FAMILIES if f in listed and f in ours)
        time = restart["time"] if isinstance(restart.get("time"), int) else 0
    return Peering(
        families=tuple(f for f in FAMILIES if f in ours and f in theirs),
        graceful=graceful,
        restart_time=time,
        helper=restart is not None and _capability(sent, "64", "graceful-restart") is not None,
        refresh=_capability(received, "2", "route-refresh") is not None,
        enhanced=_capability(received, "70", "enhanced-route-refresh") is not None,
        asn4=all(_capability(message, "65", "asn4") is not None for message in (sent, received)),
        extended_next_hop=tuple(sorted(_next_hops(sent) & _next_hops(received))),
        hold_time=min(_number(sent, "hold_time"), _number(received, "hold_time")),
        router_id=str(received.get("router_id", "")) if isinstance(received, dict) else "",
        told=tuple(f for f in FAMILIES if f in ours and f in theirs) if _names_families(received) else (),
    )


def _number(message: Any, key: str) -> int:
    value = message.get(key) if isinstance(message, dict) else None
    return value if isinstance(value, int) else 0


def _next_hops(message: Any) -> set[str]:
    found = (_capability(message, "5", "nexthop") or {}).get("conversion")
    return {str(one).replace("/", " ") for one in found} if isinstance(found, list) else set()


def _capability(message: Any, number: str, name: str) -> dict[str, Any] | None:
    """ExaBGP keys the capabilities of an OPEN it sent by name, of one it received by number."""
    found = message.get("capabilities") if isinstance(message, dict) else None
    value = found.get(number, found.get(name)) if isinstance(found, dict) else None
    return value if isinstance(value, dict) else None


def _names_families(message: Any) -> bool:
    return _capability(message, "1", "multiprotocol") is not None


def _families(message: Any) -> set[str]:
    multi = _capability(message, "1", "multiprotocol")
    if multi is None:
        return {FAMILIES[0]}  # RFC 4760, section 8: without the capability a speaker has IPv4 unicast
    listed = multi.get("families")
    return {str(name).replace("/", " ") for name in listed} if isinstance(listed, list) else set()
