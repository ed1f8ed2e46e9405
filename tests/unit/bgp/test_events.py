from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bgp import events as module
from agent.bgp import wire
from agent.bgp.events import INTERNED, Decoder, Problem
from agent.bgp.model import Attributes, EndOfRib, Update

# As ExaBGP 5.0.15 printed it.
ENVELOPE = (
    '{ "exabgp": "5.0.0", "time": 1795544741.07, "host" : "vm", "pid" : 3824, "ppid" : 3815, "counter": 5, '
    '"type": "update", "neighbor": { "address": { "local": "10.0.1.1", "peer": "10.0.1.2" }, '
    '"asn": { "local": 65100, "peer": 65001 }, "router-id": "10.0.1.1" , "direction": "receive", "message": %s } }'
)


def line(message: str) -> bytes:
    return (ENVELOPE % message).encode()


def update(**parts: Any) -> bytes:
    return line(json.dumps({"update": parts}))


def test_announced_routes() -> None:
    event = Decoder().update(
        7,
        line(
            '{ "update": { "attribute": { "origin": "igp", "as-path": {"0": {"element": "as-sequence", "value": '
            '[65001, 65100]}}, "med": 7, "community": [ [ 65100, 1 ] ], "large-community": [ [ 65100, 1 , 2 ] ] }, '
            '"announce": { "ipv4 unicast": { "10.0.1.2": [ { "nlri": "10.9.0.0/24" }, { "nlri": "10.9.1.0/24" } ] } '
            "} } }"
        ),
    )
    assert isinstance(event, Update)
    assert (event.peer, event.generation, event.withdrawn) == ("10.0.1.2", 7, ())
    assert [(r.prefix, r.next_hop) for r in event.announced] == [
        ("10.9.0.0/24", "10.0.1.2"),
        ("10.9.1.0/24", "10.0.1.2"),
    ]
    assert event.announced[0].attributes == Attributes(
        as_path=(65001, 65100),
        origin="igp",
        med=7,
        communities=("65100:1",),
        large_communities=("65100:1:2",),
    )


def test_withdrawn_routes() -> None:
    event = Decoder().update(1, update(withdraw={"ipv6 unicast": [{"nlri": "fd09::/64"}]}))
    assert event == Update(peer="10.0.1.2", generation=1, withdrawn=("fd09::/64",))


def test_end_of_rib() -> None:
    event = Decoder().update(1, line('{ "eor": { "afi" : "ipv6", "safi" : "unicast" } }'))
    assert event == EndOfRib(peer="10.0.1.2", generation=1, family="ipv6 unicast")
    assert wire.end_of_rib(line('{ "eor": { "afi" : "ipv6", "safi" : "unicast" } }')) == "ipv6 unicast"


def test_family_of_an_update_is_found_without_parsing() -> None:
    six = update(withdraw={"ipv6 unicast": [{"nlri": "fd09::/64"}]})
    assert wire.end_of_rib(six) == ""
    assert [f for f in wire.FAMILIES if wire.names(six, f)] == ["ipv6 unicast"]
    assert wire.names(update(announce={"ipv4 unicast": {"10.0.1.2": [{"nlri": "10.9.0.0/24"}]}}), "ipv4 unicast")


@pytest.mark.parametrize("hops", [["fd00::2", "fe80::1"], ["fe80::1", "fd00::2"]])
def test_global_and_link_local_are_one_path(hops: list[str]) -> None:
    """Fault 14."""
    event = Decoder().update(
        1, update(attribute={}, announce={"ipv6 unicast": {hop: [{"nlri": "fd09::/64"}] for hop in hops}})
    )
    assert isinstance(event, Update)
    assert [(r.prefix, r.next_hop) for r in event.announced] == [("fd09::/64", "fd00::2")]


def test_link_local_alone_stays() -> None:
    event = Decoder().update(1, update(attribute={}, announce={"ipv6 unicast": {"fe80::1": [{"nlri": "fd09::/64"}]}}))
    assert isinstance(event, Update)
    assert event.announced[0].next_hop == "fe80::1"


def test_sets_stand_apart_from_the_sequence() -> None:
    path = {
        "0": {"element": "as-sequence", "value": [1, 2]},
        "1": {"element": "as-set", "value": [3]},
        "2": {"element": "as-sequence", "value": [4]},
    }
    event = Decoder().update(
        1,
        update(
            attribute={"as-path": path, "originator-id": "1.1.1.1", "cluster-list": ["2.2.2.2"]},
            announce={"ipv4 unicast": {"10.0.1.2": [{"nlri": "10.9.0.0/24"}]}},
        ),
    )
    assert isinstance(event, Update)
    attributes = event.announced[0].attributes
    assert attributes.as_path == (1, 2, 4)
    assert attributes.as_set == (3,)
    assert (attributes.originator_id, attributes.cluster_list) == ("1.1.1.1", ("2.2.2.2",))


def test_equal_attributes_are_one_object() -> None:
    decoder = Decoder()
    events = [
        decoder.update(1, update(attribute={"med": i % 2}, announce={"ipv4 unicast": {"10.0.1.2": [{"nlri": p}]}}))
        for i, p in enumerate(["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24"])
    ]
    first, second, third = [e.announced[0].attributes for e in events if isinstance(e, Update)]
    assert first is third
    assert first != second
    assert INTERNED > 1000


def test_attributes_are_remembered_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERNED_BYTES", 4000)
    decoder = Decoder()

    def said(med: int) -> Attributes:
        attribute = {"med": med, "community": [[65100, i] for i in range(100)]}
        event = decoder.update(1, update(attribute=attribute, announce={"ipv4 unicast": {"10.0.1.2": [{"nlri": "x"}]}}))
        assert isinstance(event, Update)
        return event.announced[0].attributes

    first = said(1)
    assert said(1) is first
    for med in range(2, 6):
        said(med)
    assert said(1) == first
    assert said(1) is not first


def test_other_families_are_left_out() -> None:
    decoder = Decoder()
    assert decoder.update(1, line('{ "eor": { "afi" : "l2vpn", "safi" : "evpn" } }')) is None
    assert decoder.update(1, update(attribute={}, announce={"ipv4 multicast": {"10.0.1.2": [{"nlri": "x"}]}})) is None


@given(st.binary(max_size=200))
def test_no_bytes_raise(data: bytes) -> None:
    assert isinstance(Decoder().update(1, data), Problem)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["update", "eor", "attribute", "announce", "withdraw", "ipv4 unicast", "nlri", "as-path", "0"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(JSON)
def test_no_message_raises(message: Any) -> None:
    Decoder().update(1, line(json.dumps(message)))


@given(JSON, JSON)
def test_no_open_raises(sent: Any, received: Any) -> None:
    wire.peering(sent, received)
    wire.peering({"capabilities": sent}, {"capabilities": received})


# -- OPEN messages, as ExaBGP 5.0.15 printed them ------------------------------------------------------------------

SENT: dict[str, Any] = {
    "capabilities": {
        "multiprotocol": {"name": "multiprotocol", "families": ["ipv4/unicast", "ipv6/unicast"]},
        "graceful-restart": {
            "name": "graceful restart",
            "time": 60,
            "address-family-flags": {"ipv4/unicast": ["restart"], "ipv6/unicast": ["restart"]},
            "restart-flags": ["forwarding"],
        },
        "route-refresh": {"name": "route-refresh", "variant": "RFC"},
        "enhanced-route-refresh": {"name": "enhanced-route-refresh"},
        "asn4": {"name": "asn4", "asn4": 65100},
        "nexthop": {"name": "nexthop", "conversion": ["ipv4/unicast/ipv6", "ipv6/unicast/ipv4"]},
    },
    "hold_time": 9,
    "router_id": "10.0.1.1",
}
BIRD: dict[str, Any] = {
    "hold_time": 240,
    "router_id": "10.0.1.2",
    "capabilities": {
        "65": {"name": "asn4", "asn4": 65001},
        "1": {"name": "multiprotocol", "families": ["ipv4/unicast", "ipv6/unicast"]},
        "2": {"name": "route-refresh", "variant": "RFC"},
        "64": {
            "name": "graceful restart",
            "time": 60,
            "address-family-flags": {"ipv4/unicast": [], "ipv6/unicast": []},
            "restart-flags": [],
        },
        "70": {"name": "enhanced-route-refresh"},
    },
}
BOTH = ("ipv4 unicast", "ipv6 unicast")


def without(message: dict[str, Any], *numbers: str) -> dict[str, Any]:
    return {**message, "capabilities": {k: v for k, v in message["capabilities"].items() if k not in numbers}}


def test_all_agreed() -> None:
    agreed = wire.Peering(BOTH, BOTH, 60, helper=True, refresh=True, enhanced=True, asn4=True, told=BOTH)
    assert wire.peering(SENT, BIRD) == agreed._replace(hold_time=9, router_id="10.0.1.2")


def test_next_hops_of_the_other_family_are_what_both_offer() -> None:
    offers = {"5": {"name": "nexthop", "conversion": ["ipv4/unicast/ipv6"]}}
    peer = {**BIRD, "capabilities": {**BIRD["capabilities"], **offers}}
    assert wire.peering(SENT, peer).extended_next_hop == ("ipv4 unicast ipv6",)
    assert wire.peering(without(SENT, "nexthop"), peer).extended_next_hop == ()


def test_helper_without_a_family_of_its_own() -> None:
    """BIRD's default ("aware"): it keeps our routes while we restart, and asks nothing for itself."""
    aware = {"capabilities": {**BIRD["capabilities"], "64": {"time": 0, "address-family-flags": {}}}}
    agreed = wire.peering(SENT, aware)
    assert (agreed.graceful, agreed.restart_time, agreed.helper) == ((), 0, True)


def test_capabilities_left_out() -> None:
    agreed = wire.peering(SENT, without(BIRD, "1", "2", "64", "65", "70"))
    assert agreed == wire.Peering(families=("ipv4 unicast",), hold_time=9, router_id="10.0.1.2")
    assert agreed.told == (), "and ExaBGP tells it nothing"
    assert not wire.peering(without(SENT, "graceful-restart"), BIRD).helper


def test_head_is_read_without_parsing() -> None:
    assert wire.head(line("{}")) == wire.Head("update", "10.0.1.2", "receive")
    state = ENVELOPE.replace('"update"', '"state"').replace('"direction": "receive", "message": %s', '"state": "up"')
    assert wire.head(state.encode()) == wire.Head("state", "10.0.1.2", "")
    assert wire.head(b"{}") is None
