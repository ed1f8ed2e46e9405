"""BGPFilters as decisions: which rule of a peer's filters a route meets first, and what that rule makes of it. Pure.

Meaning of the fields: Calico's documentation, "BGP filter". What no rule matches is accepted. A filter is asked about
what is let through already, so it narrows and never widens (R11).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal, NamedTuple

import msgspec

from agent.prefix import Prefix, parse
from store.model import BGPFilter, FilterRule
from store.validate import WELL_KNOWN_COMMUNITIES

Direction = Literal["import", "export"]


class Candidate(NamedTuple):
    """A route as the rules see it. A block of our own has neither AS_PATH nor interface."""

    prefix: Prefix
    as_path: Sequence[int] = ()
    #: Standard and large ones, as 65001:100 and 65001:1:100.
    communities: Sequence[str] = ()
    #: Name of the interface that the next hop is on.
    interface: str = ""


class Rule(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One rule, ready for many look-ups. ``name`` says where it stands, as ``BGPFilter deny, importV4[2]``."""

    name: str
    accept: bool
    #: Of a prefix inside this one, with a length from ``min`` to ``max``; ``negated``: of every other.
    within: Prefix | None = None
    min: int = 0
    max: int = 128
    negated: bool = False
    interface: str = ""
    community: str = ""
    as_path: tuple[int, ...] = ()
    #: What an accepted route gets: AS numbers before its path, and communities.
    prepend: tuple[int, ...] = ()
    add: tuple[str, ...] = ()

    def matches(self, route: Candidate) -> bool:
        return (
            (self.within is None or self._inside(route.prefix, self.within) != self.negated)
            and (not self.interface or fnmatchcase(route.interface, self.interface))
            and (not self.community or self.community in route.communities)
            and (not self.as_path or tuple(route.as_path[: len(self.as_path)]) == self.as_path)
        )

    def _inside(self, prefix: Prefix, within: Prefix) -> bool:
        if prefix.bits != within.bits or not max(within.length, self.min) <= prefix.length <= self.max:
            return False
        shift = within.bits - within.length
        return prefix.network >> shift == within.network >> shift


#: After the last rule.
NO_RULE: Final = Rule(name="no rule", accept=True)


class Filter(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """All rules of one peer in one direction, by family and in order."""

    v4: tuple[Rule, ...] = ()
    v6: tuple[Rule, ...] = ()

    def decide(self, route: Candidate) -> Rule:
        """The first rule that matches; ``NO_RULE`` if none does."""
        rules = self.v4 if route.prefix.bits == 32 else self.v6
        return next((rule for rule in rules if rule.matches(route)), NO_RULE)

    def applies_to(self, prefix: Prefix) -> bool:
        """Whether there is any rule for the prefix's family."""
        return bool(self.v4 if prefix.bits == 32 else self.v6)


EMPTY: Final = Filter()


def compiled(filters: Iterable[BGPFilter], direction: Direction, *, external: bool) -> Filter:
    """The rules of these filters, one after the other, for a peer that is ``external`` (eBGP) or not. Filters are valid
    (``store.validate``)."""
    v4: list[Rule] = []
    v6: list[Rule] = []
    for one in filters:
        spec = one.spec
        pairs = (
            (("importV4", spec.import_v4, v4), ("importV6", spec.import_v6, v6))
            if direction == "import"
            else (("exportV4", spec.export_v4, v4), ("exportV6", spec.export_v6, v6))
        )
        for field, rules, found in pairs:
            for i, rule in enumerate(rules):
                if _concerns(rule, direction, external=external):
                    found.append(_compiled(rule, f"BGPFilter {one.name}, {field}[{i}]"))
    return Filter(v4=tuple(v4), v6=tuple(v6))


def _concerns(rule: FilterRule, direction: Direction, *, external: bool) -> bool:
    """Whether any route of this direction and peer can meet the rule: nothing that was received is announced (R12)."""
    if rule.source == "RemotePeers" and direction == "export":
        return False
    return not rule.peer_type or (rule.peer_type == "eBGP") == external


def _compiled(rule: FilterRule, name: str) -> Rule:
    within = parse(rule.cidr) if rule.cidr else None
    shortest, longest = 0, 128
    if within is not None:
        lengths = rule.prefix_length
        shortest = lengths.min if lengths and lengths.min is not None else within.length
        longest = lengths.max if lengths and lengths.max is not None else within.bits
        if rule.match_operator in ("Equal", "NotEqual"):
            shortest = longest = within.length
    prepend: tuple[int, ...] = ()
    add: tuple[str, ...] = ()
    for operation in rule.operations:
        if operation.prepend_as_path is not None:
            prepend = operation.prepend_as_path.prefix + prepend
        if operation.add_community is not None:
            add += (canonical(operation.add_community.value),)
    return Rule(
        name=name,
        accept=rule.action == "Accept",
        within=within,
        min=shortest,
        max=longest,
        negated=rule.match_operator in ("NotEqual", "NotIn"),
        interface=rule.interface,
        community=canonical(rule.communities.values[0]) if rule.communities else "",
        as_path=rule.as_path_prefix,
        prepend=prepend,
        add=add,
    )


def canonical(community: str) -> str:
    """A community in numbers, which is how ExaBGP tells those that it receives; a well-known name is one of them."""
    return WELL_KNOWN_COMMUNITIES.get(community, community)


def split_communities(communities: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Standard and large ones apart (RFC 1997, RFC 8092), each once and sorted."""
    texts = sorted(set(communities))
    return tuple(t for t in texts if t.count(":") == 1), tuple(t for t in texts if t.count(":") == 2)
