"""BGPFilters: which rule a route meets, whatever rules and routes there are, and what it makes of the route."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.filters import NO_RULE, Candidate, Filter, compiled, split_communities
from agent.prefix import parse
from store.model import (
    AddCommunity,
    BGPFilter,
    BGPFilterSpec,
    CommunityMatch,
    FilterOperation,
    FilterRule,
    FilterRuleV4,
    FilterRuleV6,
    Meta,
    PrefixLength,
    PrependASPath,
)
from store.validate import validate


def rule(action: str = "Reject", **changes: Any) -> FilterRuleV4:
    return FilterRuleV4(action=action, **changes)


def bgp_filter(*rules: FilterRuleV4, name: str = "f", field: str = "import_v4") -> BGPFilter:
    made = BGPFilter(metadata=Meta(name=name), spec=BGPFilterSpec(**{field: rules}))
    assert validate(made) == ()
    return made


def importing(*rules: FilterRuleV4, external: bool = True) -> Filter:
    return compiled([bgp_filter(*rules)], "import", external=external)


def route(prefix: str = "10.244.2.0/26", **changes: Any) -> Candidate:
    return Candidate(parse(prefix), **changes)


@pytest.mark.parametrize(
    ("changes", "prefix", "meets"),
    [
        ({}, "10.0.0.0/8", True),
        ({"match_operator": "Equal", "cidr": "10.244.0.0/16"}, "10.244.0.0/16", True),
        ({"match_operator": "Equal", "cidr": "10.244.0.0/16"}, "10.244.0.0/17", False),
        ({"match_operator": "NotEqual", "cidr": "10.244.0.0/16"}, "10.244.0.0/16", False),
        ({"match_operator": "NotEqual", "cidr": "10.244.0.0/16"}, "10.244.0.0/17", True),
        ({"match_operator": "In", "cidr": "10.244.0.0/16"}, "10.244.0.0/16", True),
        ({"match_operator": "In", "cidr": "10.244.0.0/16"}, "10.244.2.0/26", True),
        ({"match_operator": "In", "cidr": "10.244.0.0/16"}, "10.245.2.0/26", False),
        ({"match_operator": "In", "cidr": "10.244.0.0/16"}, "10.0.0.0/8", False),
        ({"match_operator": "NotIn", "cidr": "10.244.0.0/16"}, "10.244.2.0/26", False),
        ({"match_operator": "NotIn", "cidr": "10.244.0.0/16"}, "10.0.0.0/8", True),
        ({"match_operator": "In", "cidr": "0.0.0.0/0"}, "10.0.0.0/8", True),
        ({"match_operator": "In", "cidr": "10.0.0.0/8", "prefix_length": PrefixLength(min=16)}, "10.2.0.0/15", False),
        ({"match_operator": "In", "cidr": "10.0.0.0/8", "prefix_length": PrefixLength(min=16)}, "10.1.0.0/16", True),
        ({"match_operator": "In", "cidr": "10.0.0.0/8", "prefix_length": PrefixLength(max=24)}, "10.1.0.0/24", True),
        ({"match_operator": "In", "cidr": "10.0.0.0/8", "prefix_length": PrefixLength(max=24)}, "10.1.0.0/25", False),
        ({"match_operator": "NotIn", "cidr": "10.0.0.0/8", "prefix_length": PrefixLength(max=24)}, "10.1.0.0/25", True),
    ],
)
def test_by_prefix(changes: dict[str, Any], prefix: str, meets: bool) -> None:
    met = importing(rule(**changes)).decide(route(prefix))
    assert met.accept is not meets


@pytest.mark.parametrize(
    ("changes", "given_by", "meets"),
    [
        ({"interface": "up1"}, {"interface": "up1"}, True),
        ({"interface": "up*"}, {"interface": "up1"}, True),
        ({"interface": "up"}, {"interface": "up1"}, False),
        ({"interface": "*.calico"}, {}, False),
        ({"as_path_prefix": (65001,)}, {"as_path": (65001, 65002)}, True),
        ({"as_path_prefix": (65001, 65002)}, {"as_path": (65001, 65002)}, True),
        ({"as_path_prefix": (65002,)}, {"as_path": (65001, 65002)}, False),
        ({"as_path_prefix": (65001, 65002)}, {"as_path": (65001,)}, False),
        ({"communities": CommunityMatch(values=("65001:1",))}, {"communities": ("65001:1", "65001:2")}, True),
        ({"communities": CommunityMatch(values=("65001:1:2",))}, {"communities": ("65001:1:2",)}, True),
        ({"communities": CommunityMatch(values=("65001:1",))}, {"communities": ("65001:1:2", "65001:12")}, False),
        ({"communities": CommunityMatch(values=("no-export",))}, {"communities": ("65535:65281",)}, True),
        ({"source": "RemotePeers"}, {}, True),
        ({"peer_type": "eBGP"}, {}, True),
        ({"peer_type": "iBGP"}, {}, False),
        # All that is said must hold.
        ({"interface": "up1", "as_path_prefix": (1,)}, {"interface": "up1", "as_path": (2,)}, False),
    ],
)
def test_by_what_else_a_route_has(changes: dict[str, Any], given_by: dict[str, Any], meets: bool) -> None:
    assert importing(rule(**changes)).decide(route(**given_by)).accept is not meets


def test_the_peer_s_type_is_asked_of_both() -> None:
    assert importing(rule(peer_type="iBGP"), external=False).decide(route()).accept is False
    assert importing(rule(peer_type="eBGP"), external=False).decide(route()) is NO_RULE


def test_nothing_that_is_announced_was_received() -> None:
    exports = bgp_filter(rule(source="RemotePeers"), field="export_v4")
    assert compiled([exports], "export", external=True).decide(route()) is NO_RULE


def test_rules_of_several_filters_hold_in_order_and_each_family_and_direction_has_its_own() -> None:
    both = compiled(
        [
            bgp_filter(rule("Accept", match_operator="In", cidr="10.244.2.0/24"), name="first"),
            bgp_filter(rule(), name="second"),
        ],
        "import",
        external=True,
    )
    assert both.decide(route("10.244.2.0/26")).name == "BGPFilter first, importV4[0]"
    assert both.decide(route("10.244.3.0/26")).name == "BGPFilter second, importV4[0]"
    assert both.decide(route("fd00::/64")) is NO_RULE
    assert compiled([bgp_filter(rule())], "export", external=True) == Filter()


@pytest.mark.parametrize("field", ["import_v4", "import_v6", "export_v4", "export_v6"])
def test_each_list_is_for_its_family_and_direction(field: str) -> None:
    direction, _, family = field.partition("_")
    made = FilterRuleV6(action="Reject") if family == "v6" else rule()
    one = BGPFilter(metadata=Meta(name="f"), spec=BGPFilterSpec(**{field: (made,)}))
    for asked in ("import", "export"):
        for kind, prefix in (("v4", "10.244.2.0/26"), ("v6", "fd00::/64")):
            met = compiled([one], asked, external=True).decide(route(prefix))  # type: ignore[arg-type]
            assert met.accept is not (asked == direction and kind == family)


def test_operations_are_done_in_order() -> None:
    operations = (
        FilterOperation(prepend_as_path=PrependASPath(prefix=(1, 2))),
        FilterOperation(add_community=AddCommunity(value="65001:1")),
        FilterOperation(prepend_as_path=PrependASPath(prefix=(3,))),
        FilterOperation(add_community=AddCommunity(value="65001:1:1")),
    )
    met = importing(rule("Accept", operations=operations)).decide(route())
    assert (met.prepend, met.add) == ((3, 1, 2), ("65001:1", "65001:1:1"))


@pytest.mark.parametrize("text", ["no-export", "65535:65281"])
def test_a_well_known_community_is_the_same_by_name_and_by_number(text: str) -> None:
    add = (FilterOperation(add_community=AddCommunity(value=text)),)
    met = importing(rule("Accept", operations=add)).decide(route())
    assert split_communities(met.add) == (("65535:65281",), ())


def test_communities_are_told_apart_by_their_numbers() -> None:
    assert split_communities(["2:2", "1:1:1", "1:1", "2:2"]) == (("1:1", "2:2"), ("1:1:1",))


# -- against the plainest reading of the rules -------------------------------------------------------------------------

Network = IPv4Network | IPv6Network
OPERATORS = ("Equal", "NotEqual", "In", "NotIn")


@st.composite
def networks(draw: st.DrawFn, version: int) -> Network:
    """Few bits, so that they meet often."""
    bits = 32 if version == 4 else 128
    length = draw(st.integers(0, 6))
    number = draw(st.integers(0, (1 << length) - 1)) << (bits - length) if length else 0
    return IPv4Network((number, length)) if version == 4 else IPv6Network((number, length))


@st.composite
def rules(draw: st.DrawFn, version: int) -> FilterRule:
    kind = FilterRuleV4 if version == 4 else FilterRuleV6
    cidr = draw(st.none() | networks(version))
    operator = draw(st.sampled_from(OPERATORS)) if cidr is not None else ""
    lengths = None
    if cidr is not None and operator in ("In", "NotIn") and draw(st.booleans()):
        low = draw(st.none() | st.integers(cidr.prefixlen, 8))
        high = draw(st.none() | st.integers(cidr.prefixlen if low is None else low, 8))
        lengths = PrefixLength(min=low, max=high)
    return kind(
        action=draw(st.sampled_from(("Accept", "Reject"))),
        cidr=str(cidr) if cidr is not None else "",
        match_operator=operator,
        prefix_length=lengths,
        peer_type=draw(st.sampled_from(("", "eBGP", "iBGP"))),
    )


def plainly(rule: FilterRule, network: Any, external: bool) -> bool:
    if rule.peer_type and rule.peer_type != ("eBGP" if external else "iBGP"):
        return False
    if not rule.cidr:
        return True
    cidr: Any = ip_network(rule.cidr)
    inside = network.subnet_of(cidr)
    if rule.prefix_length is not None:
        low, high = rule.prefix_length.min, rule.prefix_length.max
        inside = inside and (low is None or low <= network.prefixlen) and (high is None or network.prefixlen <= high)
    return bool(
        {"Equal": network == cidr, "NotEqual": network != cidr, "In": inside, "NotIn": not inside}[rule.match_operator]
    )


@given(st.data(), st.sampled_from((4, 6)), st.booleans())
def test_the_first_rule_that_matches_decides(data: st.DataObject, version: int, external: bool) -> None:
    given_rules = data.draw(st.lists(rules(version), max_size=4))
    network = data.draw(networks(version))
    spec = BGPFilterSpec(**{f"import_v{version}": tuple(given_rules)})
    made = BGPFilter(metadata=Meta(name="f"), spec=spec)
    assert validate(made) == ()
    expected = next((r.action == "Accept" for r in given_rules if plainly(r, network, external)), True)
    assert compiled([made], "import", external=external).decide(route(str(network))).accept is expected
