"""What the relay sends, as events. Pure.

Nothing that ExaBGP writes can raise here: a line that is not understood becomes a ``Problem``, so that one odd route
does not cost the session's others. Attributes are interned: 100k routes share some hundred values (exabgp.md).
"""

from __future__ import annotations

from typing import Any, cast

import msgspec

from agent.bgp.model import Attributes, EndOfRib, Family, Received, Update
from agent.bgp.wire import FAMILIES

#: Attribute sets remembered, and their bytes as ExaBGP writes them (six in memory for each); beyond that they are still
#: right, only no longer shared.
INTERNED, INTERNED_BYTES = 50_000, 16 << 20

_ORIGINS = {"igp": "igp", "egp": "egp", "incomplete": "incomplete"}


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A line that was not understood: why, and how it begins."""

    reason: str
    line: str


class _Nlri(msgspec.Struct, frozen=True):
    nlri: str


class _Segment(msgspec.Struct, frozen=True):
    element: str
    value: tuple[int, ...]


class _Attribute(msgspec.Struct, frozen=True, rename="kebab"):
    """As ExaBGP names them (bgp/message/update/attribute/attributes.py)."""

    origin: str = "incomplete"
    as_path: dict[str, _Segment] | None = None
    med: int = 0
    local_preference: int | None = None
    community: tuple[tuple[int, ...], ...] = ()
    large_community: tuple[tuple[int, ...], ...] = ()
    originator_id: str = ""
    cluster_list: tuple[str, ...] = ()


class _Update(msgspec.Struct, frozen=True):
    # Kept as bytes: equal bytes are equal attributes, and most were seen before.
    attribute: msgspec.Raw = msgspec.Raw(b"{}")
    announce: dict[str, dict[str, tuple[_Nlri, ...]]] = {}
    withdraw: dict[str, tuple[_Nlri, ...]] = {}


class _End(msgspec.Struct, frozen=True):
    afi: str
    safi: str


class _Message(msgspec.Struct, frozen=True):
    update: _Update | None = None
    eor: _End | None = None


class _Neighbor(msgspec.Struct, frozen=True):
    address: dict[str, str]
    message: _Message


class _Line(msgspec.Struct, frozen=True):
    neighbor: _Neighbor


class Decoder:
    """Decodes ExaBGP's received UPDATEs; owns the interned attributes of one driver."""

    def __init__(self) -> None:
        self._lines = msgspec.json.Decoder(_Line)
        self._attributes = msgspec.json.Decoder(_Attribute)
        self._interned: dict[bytes, Attributes] = {}
        self._bytes = 0

    def update(self, generation: int, line: bytes) -> Update | EndOfRib | Problem | None:
        """The event in one ``update`` line; None if it is of a family that we do not speak, or holds nothing."""
        try:
            neighbor = self._lines.decode(line).neighbor
            peer, message = neighbor.address["peer"], neighbor.message
            if message.eor is not None:
                family = f"{message.eor.afi} {message.eor.safi}"
                if family not in FAMILIES:
                    return None
                return EndOfRib(peer=peer, generation=generation, family=cast(Family, family))
            if message.update is None:
                return Problem(reason="neither update nor End-of-RIB", line=_start(line))
            return self._update(peer, generation, message.update)
        except (msgspec.MsgspecError, ValueError, KeyError) as e:
            return Problem(reason=str(e), line=_start(line))

    def _update(self, peer: str, generation: int, update: _Update) -> Update | None:
        announced: dict[str, Received] = {}
        attributes = self._intern(bytes(update.attribute)) if update.announce else None
        for family, hops in update.announce.items():
            if family not in FAMILIES or attributes is None:
                continue
            # A route with a global and a link-local next hop is reported under both (fault 14): one path, by the
            # global one, as a link-local says nothing without an interface. Global ones come last here and stay.
            for hop in sorted(hops, key=lambda h: not _link_local(h)):
                for route in hops[hop]:
                    announced[route.nlri] = Received(prefix=route.nlri, next_hop=hop, attributes=attributes)
        withdrawn = tuple(
            route.nlri for family, routes in update.withdraw.items() if family in FAMILIES for route in routes
        )
        if not announced and not withdrawn:
            return None
        return Update(peer=peer, generation=generation, announced=tuple(announced.values()), withdrawn=withdrawn)

    def _intern(self, raw: bytes) -> Attributes:
        known = self._interned.get(raw)
        if known is None:
            known = _attributes(self._attributes.decode(raw))
            self._bytes += len(raw)
            if len(self._interned) >= INTERNED or self._bytes > INTERNED_BYTES:
                self._interned.clear()
                self._bytes = len(raw)
            self._interned[raw] = known
        return known


def _attributes(found: _Attribute) -> Attributes:
    sequence: list[int] = []
    loose: list[int] = []
    segments = sorted((found.as_path or {}).items(), key=lambda item: int(item[0]))
    for _, segment in segments:
        # Confederation segments are not part of the path that eBGP compares (RFC 5065), but hold AS numbers all the
        # same: as with a set, such a path is not for us to use.
        (sequence if segment.element == "as-sequence" else loose).extend(segment.value)
    return Attributes(
        as_path=tuple(sequence),
        as_set=tuple(loose),
        origin=cast(Any, _ORIGINS.get(found.origin, "incomplete")),
        med=found.med,
        local_pref=found.local_preference,
        communities=tuple(":".join(map(str, c)) for c in found.community),
        large_communities=tuple(":".join(map(str, c)) for c in found.large_community),
        originator_id=found.originator_id,
        cluster_list=found.cluster_list,
    )


def _link_local(address: str) -> bool:
    return address.lower().startswith(("fe8", "fe9", "fea", "feb")) and ":" in address


def _start(line: bytes) -> str:
    return line[:200].decode("utf-8", "replace")
