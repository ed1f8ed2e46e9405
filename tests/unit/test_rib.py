"""Import policy, best path and Adj-RIB-In: one test per rule, and what must hold for any sequence of events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.adjrib import REPORT_LIMIT, SPEAKER_RESTART
from agent.bgp.model import (
    Attributes,
    EndOfRib,
    Event,
    Received,
    Resync,
    SessionDown,
    SessionUp,
    SpeakerLost,
    Update,
)
from agent.fib import NextHop
from agent.filters import Filter, Rule
from agent.prefix import PrefixSet, parse
from agent.rib import ECMP_LIMIT, Path, Peer, Policy, Refusal, Rib, admit, contexts

V4, V6 = "ipv4 unicast", "ipv6 unicast"
A, B = "10.0.1.0", "10.0.2.0"
US, TOR = 65100, 65001


def peer(address: str = A, **changes: Any) -> Peer:
    values: dict[str, Any] = {
        "address": address,
        "name": f"tor-{address}",
        "peer_as": TOR,
        "local_as": US,
        "families": (V4, V6),
        "interface": 2,
    }
    return Peer(**{**values, **changes})


def policy(*peers: Peer, **changes: Any) -> Policy:
    values: dict[str, Any] = {
        "peers": peers or (peer(),),
        "allowed": frozenset({"10.244.0.0/16", "fd00:10:244::/48"}),
        "own_blocks": frozenset({"10.244.1.0/26"}),
        "own_addresses": frozenset({"10.0.1.1", "10.0.2.1"}),
        "router_id": "10.0.1.1",
        "on_link": frozenset({("10.0.1.0/31", 2), ("10.0.2.0/31", 3), ("fd00:1::/127", 2)}),
    }
    return Policy(**{**values, **changes})


def route(prefix: str = "10.244.2.0/26", next_hop: str = A, **attributes: Any) -> Received:
    return Received(
        prefix=prefix, next_hop=next_hop, attributes=Attributes(**{"as_path": (TOR,), "origin": "igp", **attributes})
    )


def up(address: str = A, generation: int = 1, **changes: Any) -> SessionUp:
    values: dict[str, Any] = {"families": (V4, V6), "graceful_restart": (V4, V6), "restart_time": 60}
    return SessionUp(peer=address, generation=generation, **{**values, **changes})


def told(rib: Rib, *routes: Received, address: str = A, generation: int = 1, now: float = 0.0) -> None:
    rib.apply(Update(peer=address, generation=generation, announced=routes), now)


def rib_of(*routes: Received, at: Policy | None = None) -> tuple[Rib, Policy]:
    """A RIB with the peers of the policy up, and these routes from the first."""
    at = at or policy()
    rib = Rib()
    rib.configure(at.peers, 0.0)
    for p in at.peers:
        rib.apply(up(p.address), 0.0)
    told(rib, *routes, address=at.peers[0].address)
    return rib, at


def verdict(received: Received, **changes: Any) -> Refusal | tuple[NextHop, ...]:
    peers = changes.pop("peers", (peer(),))
    rib, at = rib_of(received, at=policy(*peers, **changes))
    selection = rib.select(at)
    refused = selection.refused[at.peers[0].address]
    if received.prefix in refused:
        assert received.prefix not in selection.best
        return refused[received.prefix]
    return selection.best[received.prefix]


# -- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (route(), (NextHop(A, 2),)),
        (route("10.244.0.0/16"), (NextHop(A, 2),)),
        (route("10.244.1.0/25"), (NextHop(A, 2),)),  # holds an own block, which is more specific
        (route("fd00:10:244:1::/122", "fd00:1::"), (NextHop("fd00:1::", 2),)),
        (route("fd00:10:244:1::/122", "fe80::1"), (NextHop("fe80::1", 2),)),
        (route("10.244.2.0/26", "fd00:1::"), (NextHop("fd00:1::", 2),)),  # RFC 8950
        (route("10.245.0.0/26"), Refusal.OutsidePools),
        (route("10.0.0.0/8"), Refusal.OutsidePools),
        (route("fd00:10:245::/122", "fd00:1::"), Refusal.OutsidePools),
        (route("0.0.0.0/0"), Refusal.DefaultRouteRefused),
        (route("::/0", "fd00:1::"), Refusal.DefaultRouteRefused),
        (route("10.244.1.0/26"), Refusal.OwnBlock),
        (route("10.244.1.7/32"), Refusal.OwnBlock),
        (route(as_set=(65002,)), Refusal.ASSet),
        (route(as_path=(TOR, US)), Refusal.OwnASInPath),
        (route(as_path=(65002, TOR)), Refusal.FirstASNotPeer),
        (route(as_path=()), Refusal.FirstASNotPeer),
        (route(originator_id="10.0.1.1"), Refusal.OwnOriginator),
        (route(cluster_list=("10.9.9.9", "10.0.1.1")), Refusal.OwnClusterList),
        (route(next_hop="10.0.1.1"), Refusal.NextHopIsSelf),
        (route(next_hop="10.0.2.1"), Refusal.NextHopIsSelf),
        (route(next_hop="10.9.0.1"), Refusal.NextHopNotOnLink),
        (route("fd00:10:244:1::/122", "10.0.1.0"), Refusal.NextHopFamily),
        *((route(next_hop=bad), Refusal.NextHopInvalid) for bad in ("0.0.0.0", "127.0.0.1", "224.0.0.5", "240.0.0.1")),
        *(
            (route(next_hop=bad), Refusal.NextHopInvalid)
            for bad in ("255.255.255.255", "::", "ff02::1", "x", "fe80::1%2")
        ),
        *((route(bad), Refusal.InvalidPrefix) for bad in ("10.244.2.1/26", "10.244.2.0/33", "nonsense", "10.244.2.0")),
    ],
)
def test_import(received: Received, expected: Refusal | tuple[NextHop, ...]) -> None:
    assert verdict(received) == expected


def test_the_node_s_own_as_counts_too_where_the_session_has_another() -> None:
    with_local = peer(local_as=64999, node_as=US)
    assert verdict(route(as_path=(TOR, US)), peers=(with_local,)) is Refusal.OwnASInPath
    assert verdict(route(as_path=(TOR, 64999)), peers=(with_local,)) is Refusal.OwnASInPath
    allowed = peer(local_as=64999, node_as=US, allowed_own_as=1)
    assert verdict(route(as_path=(TOR, US)), peers=(allowed,)) == (NextHop(A, 2),)
    assert verdict(route(as_path=(TOR, US, 64999)), peers=(allowed,)) is Refusal.OwnASInPath


#: Accepts everything, in words; and nothing.
ALL = Filter(v4=(Rule(name="all", accept=True),), v6=(Rule(name="all", accept=True),))
NOTHING = Filter(v4=(Rule(name="none", accept=False),), v6=(Rule(name="none", accept=False),))


@pytest.mark.parametrize(
    "received",
    [
        route("10.245.0.0/26"),
        route("0.0.0.0/0"),
        route("10.244.1.7/32"),
        route(as_path=(TOR, US)),
        route(as_path=(65002, TOR)),
        route(next_hop="10.9.0.1"),
        route("fd00:10:244:1::/122", "10.0.1.0"),
    ],
)
def test_a_filter_lets_in_nothing_that_is_refused_without_it(received: Received) -> None:
    refused = verdict(received)
    assert isinstance(refused, Refusal)
    assert verdict(received, peers=(peer(imports=ALL),)) is refused
    assert verdict(received, peers=(peer(imports=NOTHING),)) is refused, "and says why as before"


def test_a_filter_keeps_out_what_is_let_in_without_it() -> None:
    assert verdict(route(), peers=(peer(imports=ALL),)) == (NextHop(A, 2),)
    assert verdict(route(), peers=(peer(imports=NOTHING),)) is Refusal.RejectedByFilter
    v6 = route("fd00:10:244:1::/122", "fd00:1::")
    assert verdict(v6, peers=(peer(imports=Filter(v4=NOTHING.v4)),)) == (NextHop("fd00:1::", 2),)


def test_what_a_filter_prepends_counts_in_the_choice_of_paths() -> None:
    longer = Filter(v4=(Rule(name="longer", accept=True, prepend=(65009,), add=("65001:1", "65001:1:1")),))
    at = policy(peer(A, imports=longer), peer(B))
    rib, _ = rib_of(route(), at=at)
    assert rib.select(at).best == {"10.244.2.0/26": (NextHop(A, 2),)}
    told(rib, route(next_hop=B), address=B)
    assert rib.select(at).best == {"10.244.2.0/26": (NextHop(B, 3),)}
    judged = contexts(at)[A]
    path = admit(route(communities=("65001:2",)), parse("10.244.2.0/26"), judged)
    assert isinstance(path, Path)
    attributes = path.route.attributes
    assert (attributes.as_path, attributes.communities) == ((65009, TOR), ("65001:1", "65001:2"))
    assert attributes.large_communities == ("65001:1:1",)


def test_a_filter_that_changes_is_asked_about_what_is_there_already() -> None:
    rib, at = rib_of(route())
    assert rib.select(at).best
    assert rib.select(policy(peer(imports=NOTHING))).best == {}
    assert rib.select(at).best


def test_own_as_is_allowed_as_often_as_the_peer_says() -> None:
    twice = route(as_path=(TOR, US, US))
    assert verdict(twice, peers=(peer(allowed_own_as=1),)) is Refusal.OwnASInPath
    assert verdict(twice, peers=(peer(allowed_own_as=2),)) == (NextHop(A, 2),)


def test_an_internal_peer_s_path_may_begin_with_any_as() -> None:
    assert verdict(route(as_path=()), peers=(peer(peer_as=US),)) == (NextHop(A, 2),)


def test_a_peer_s_import_cidrs_widen_for_it_alone() -> None:
    received = route("192.0.2.0/24")
    assert verdict(received, peers=(peer(import_cidrs=("192.0.2.0/24",)), peer(B))) == (NextHop(A, 2),)
    assert verdict(received, peers=(peer(), peer(B, import_cidrs=("192.0.2.0/24",)))) is Refusal.OutsidePools


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("10.0.0.0/8", (NextHop(A, 2),)),
        ("10.0.2.0/31", (NextHop(A, 2),)),  # the subnet itself: the kernel's own route to it comes first
        ("10.0.2.0/32", Refusal.InsideLink),  # the other ToR
        ("10.0.1.1/32", Refusal.InsideLink),  # ourselves
        ("10.0.9.0/24", (NextHop(A, 2),)),
        ("10.0.9.128/25", Refusal.InsideLink),
        ("10.0.9.0/25", (NextHop(A, 2),)),  # on a link of ours, and nobody's that we know
        ("10.0.9.200/32", Refusal.InsideLink),
        ("10.0.77.1/32", (NextHop(A, 2),)),  # a peer that is on no link is reached by any route
    ],
)
def test_an_import_leads_no_session_away_from_its_link(prefix: str, expected: Refusal | tuple[NextHop, ...]) -> None:
    """Whatever importCIDRs let in."""
    peers = (peer(import_cidrs=("10.0.0.0/8",)), peer(B), peer("10.0.9.200"), peer("10.0.77.1"))
    on_link = frozenset({("10.0.1.0/31", 2), ("10.0.2.0/31", 3), ("10.0.9.0/24", 4)})
    assert verdict(route(prefix), peers=peers, on_link=on_link) == expected


def test_a_default_route_comes_in_where_the_peer_may_give_one() -> None:
    assert verdict(route("0.0.0.0/0"), peers=(peer(default_route=True),)) == (NextHop(A, 2),)


def test_a_link_local_next_hop_needs_the_peer_s_interface() -> None:
    received = route("fd00:10:244:1::/122", "fe80::1")
    assert verdict(received, peers=(peer(interface=0),)) is Refusal.NextHopNotOnLink


def test_the_most_specific_subnet_says_the_interface() -> None:
    on_link = frozenset({("10.0.0.0/8", 9), ("10.0.1.0/31", 2)})
    assert verdict(route(), on_link=on_link) == (NextHop(A, 2),)


def test_a_changed_policy_is_applied_to_what_is_known() -> None:
    rib, at = rib_of(route(), route("10.244.3.0/26"))
    assert set(rib.select(at).best) == {"10.244.2.0/26", "10.244.3.0/26"}
    assert set(rib.select(replace(at, own_blocks=frozenset({"10.244.3.0/26"}))).best) == {"10.244.2.0/26"}
    assert set(rib.select(replace(at, allowed=frozenset())).best) == set()
    assert set(rib.select(at).best) == {"10.244.2.0/26", "10.244.3.0/26"}


# -- best path ------------------------------------------------------------------------------------------------------


def chosen(one: Received, two: Received, *peers: Peer) -> tuple[NextHop, ...]:
    at = policy(*(peers or (peer(), peer(B, peer_as=65002))))
    rib, _ = rib_of(one, at=at)
    told(rib, two, address=at.peers[1].address)
    return rib.select(at).best["10.244.2.0/26"]


ONE, TWO = NextHop(A, 2), NextHop(B, 3)


def other(**attributes: Any) -> Received:
    return route(next_hop=B, **{"as_path": (65002,), **attributes})


def test_equal_paths_are_ecmp_in_a_fixed_order() -> None:
    assert chosen(route(), other()) == (ONE, TWO)


def test_shorter_as_path_wins() -> None:
    assert chosen(route(as_path=(TOR, 1)), other()) == (TWO,)


def test_origin_wins_after_the_as_path() -> None:
    assert chosen(route(origin="incomplete"), other(origin="egp")) == (TWO,)
    assert chosen(route(origin="igp", as_path=(TOR, 1)), other(origin="incomplete")) == (TWO,)


def test_med_compares_only_paths_through_the_same_as() -> None:
    assert chosen(route(med=5), other(med=1)) == (ONE, TWO)
    same = (peer(), peer(B))
    assert chosen(route(med=5), other(as_path=(TOR,), med=1), *same) == (TWO,)


def test_local_pref_counts_between_internal_paths_and_not_from_external_peers() -> None:
    internal = (peer(peer_as=US), peer(B, peer_as=US))
    assert chosen(route(as_path=(), local_pref=200), other(as_path=(1, 2), local_pref=300), *internal) == (TWO,)
    assert chosen(route(local_pref=50), other(local_pref=300)) == (ONE, TWO)


SHUTDOWN, STALE = "65535:0", "65535:6"


@pytest.mark.parametrize("as_number", [TOR, US], ids=["external", "internal"])
def test_a_peer_that_shuts_down_gracefully_is_left_before_its_session_goes(as_number: int) -> None:
    """RFC 8326: worth no LOCAL_PREF at all, whoever says it; and better than nothing."""
    both = (peer(peer_as=as_number), peer(B, peer_as=as_number))
    path = (TOR,)
    leaving = route(as_path=path, communities=("65001:1", SHUTDOWN), local_pref=500)
    assert chosen(leaving, other(as_path=(TOR, 1, 2), local_pref=50), *both) == (TWO,)
    assert chosen(route(as_path=(TOR, 1)), other(as_path=path, communities=(SHUTDOWN,)), *both) == (ONE,)
    assert chosen(leaving, other(as_path=path, communities=(SHUTDOWN,)), *both) == (ONE, TWO)
    rib, at = rib_of(leaving, at=policy(*both))
    assert rib.select(at).best == {"10.244.2.0/26": (ONE,)}


def test_one_that_says_it_later_and_takes_it_back() -> None:
    at = policy(peer(), peer(B))
    rib, _ = rib_of(route(), at=at)
    told(rib, route(next_hop=B), address=B)
    assert rib.select(at).best["10.244.2.0/26"] == (ONE, TWO)
    told(rib, route(communities=(SHUTDOWN,)))
    assert rib.select(at).best["10.244.2.0/26"] == (TWO,)
    told(rib, route())
    assert rib.select(at).best["10.244.2.0/26"] == (ONE, TWO)


def test_our_own_filter_may_drain_a_peer() -> None:
    drained = Filter(v4=(Rule(name="drain", accept=True, add=(SHUTDOWN,)),))
    assert chosen(route(), other(as_path=(65002, 1, 2)), peer(imports=drained), peer(B, peer_as=65002)) == (TWO,)


def test_a_long_lived_stale_route_is_the_last_resort() -> None:
    """RFC 9494, 4.3: less than any other, also than one with a graceful shutdown."""
    stale = route(communities=(STALE,))
    assert chosen(stale, other(as_path=(65002, 1, 2), communities=(SHUTDOWN,))) == (TWO,)
    internal = (peer(peer_as=US), peer(B, peer_as=US))
    assert chosen(route(local_pref=900, communities=(STALE,)), other(local_pref=1), *internal) == (TWO,)
    assert chosen(stale, other(communities=(STALE,))) == (ONE, TWO)


def test_external_over_internal_when_all_else_is_equal() -> None:
    assert chosen(route(), other(as_path=(7,)), peer(), peer(B, peer_as=US)) == (ONE,)


def test_a_refused_path_does_not_compete() -> None:
    assert chosen(route(as_path=(TOR, 1, 2)), other(as_path=(65002, US))) == (ONE,)


def test_ecmp_has_a_limit_and_counts_a_next_hop_once() -> None:
    peers = tuple(peer(f"10.0.9.{i}") for i in range(20))
    at = policy(*peers, on_link=frozenset({("10.0.9.0/24", 2)}))
    rib, _ = rib_of(at=at)
    for p in peers:
        told(rib, route(next_hop=p.address), address=p.address)
    assert len(rib.select(at).best["10.244.2.0/26"]) == ECMP_LIMIT
    for p in peers:
        told(rib, route(next_hop="10.0.9.0"), address=p.address)
    assert rib.select(at).best["10.244.2.0/26"] == (NextHop("10.0.9.0", 2),)


# -- Adj-RIB-In ------------------------------------------------------------------------------------------------------


def known(rib: Rib, address: str = A) -> set[str]:
    return set(rib.peers[address].routes)


def test_an_older_generation_is_dropped() -> None:
    rib, _ = rib_of(route())
    rib.apply(up(generation=3), 1.0)
    told(rib, route("10.244.9.0/26"), generation=2)
    rib.apply(EndOfRib(peer=A, generation=2, family=V4), 1.0)
    rib.apply(SessionDown(peer=A, generation=2, reason="old"), 1.0)
    assert known(rib) == {"10.244.2.0/26"}
    assert rib.peers[A].up


def test_withdrawals() -> None:
    rib, at = rib_of(route(), route("10.244.3.0/26"))
    rib.select(at)
    rib.apply(Update(peer=A, generation=1, withdrawn=("10.244.2.0/26", "10.244.99.0/26")), 1.0)
    assert set(rib.select(at).best) == {"10.244.3.0/26"}


def test_without_graceful_restart_a_dead_peer_s_routes_go_at_once() -> None:
    rib, at = rib_of()
    rib.apply(up(generation=2, graceful_restart=(V6,)), 0.0)
    told(rib, route(), route("fd00:10:244:1::/122", "fd00:1::"), generation=2)
    rib.apply(SessionDown(peer=A, generation=2, reason="hold timer"), 5.0)
    assert set(rib.select(at).best) == {"fd00:10:244:1::/122"}
    assert rib.reported(at.peers[0], V4, 5.0)


@pytest.mark.parametrize(("asked", "limit", "kept"), [(60, 120.0, 60.0), (600, 120.0, 120.0), (0, 120.0, 0.0)])
def test_with_graceful_restart_they_stay_for_the_restart_time_and_no_longer(
    asked: int, limit: float, kept: float
) -> None:
    rib, at = rib_of(at=policy(peer(max_restart_time=limit)))
    rib.apply(up(generation=2, restart_time=asked), 0.0)
    told(rib, route(), generation=2)
    rib.apply(SessionDown(peer=A, generation=2, reason=""), 100.0)
    if kept:
        rib.advance(100.0 + kept - 0.1)
        assert set(rib.select(at).best) == {"10.244.2.0/26"}
        assert rib.deadline(101.0) == 100.0 + kept
    rib.advance(100.0 + kept)
    assert set(rib.select(at).best) == set()


def test_end_of_rib_sweeps_what_was_not_told_again_in_its_family() -> None:
    rib, _ = rib_of(route(), route("10.244.3.0/26"), route("fd00:10:244:1::/122", "fd00:1::"))
    rib.apply(SessionDown(peer=A, generation=1, reason=""), 10.0)
    rib.apply(up(generation=2), 12.0)
    told(rib, route(), generation=2)
    assert len(known(rib)) == 3
    rib.apply(EndOfRib(peer=A, generation=2, family=V4), 13.0)
    assert known(rib) == {"10.244.2.0/26", "fd00:10:244:1::/122"}
    rib.advance(12.0 + REPORT_LIMIT)  # no End-of-RIB for IPv6 ever came
    assert known(rib) == {"10.244.2.0/26"}


def test_a_family_that_the_new_session_does_not_carry_goes() -> None:
    rib, _ = rib_of(route(), route("fd00:10:244:1::/122", "fd00:1::"))
    rib.apply(up(generation=2, families=(V4,)), 1.0)
    assert known(rib) == {"10.244.2.0/26"}


def test_a_resync_keeps_everything_until_its_end_however_long_it_takes() -> None:
    rib, _ = rib_of(route(), route("10.244.3.0/26"))
    rib.apply(Resync(peer=A, generation=1, family=V4), 29.0)
    rib.advance(1000.0)
    assert len(known(rib)) == 2
    told(rib, route("10.244.3.0/26"))
    rib.apply(EndOfRib(peer=A, generation=1, family=V4), 1001.0)
    assert known(rib) == {"10.244.3.0/26"}


def test_when_our_speaker_is_lost_peers_keep_their_routes_also_without_graceful_restart() -> None:
    rib, at = rib_of()
    rib.apply(up(generation=2, graceful_restart=()), 0.0)
    told(rib, route(), generation=2)
    rib.apply(SpeakerLost(reason="killed"), 10.0)
    rib.advance(10.0 + SPEAKER_RESTART - 1)
    assert set(rib.select(at).best) == {"10.244.2.0/26"}
    # The new speaker counts its generations from the beginning.
    rib.apply(up(generation=1), 20.0)
    told(rib, route("10.244.3.0/26"), generation=1, now=20.0)
    rib.apply(EndOfRib(peer=A, generation=1, family=V4), 21.0)
    assert known(rib) == {"10.244.3.0/26"}


def test_a_speaker_that_does_not_come_back_loses_the_routes_in_the_end() -> None:
    rib, at = rib_of(route())
    rib.apply(SpeakerLost(reason="killed"), 10.0)
    rib.advance(10.0 + SPEAKER_RESTART)
    assert set(rib.select(at).best) == set()


def test_reported() -> None:
    at = policy(peer(max_restart_time=50.0))
    rib, (p,) = Rib(), at.peers
    assert not rib.reported(p, V4, 0.0)
    rib.configure(at.peers, 10.0)
    assert not rib.reported(p, V4, 59.0), "never up: it may be restarting"
    assert rib.reported(p, V4, 60.0)
    rib.apply(up(), 20.0)
    assert not rib.reported(p, V4, 49.0)
    assert rib.reported(p, V4, 50.0), "30 s after it came up"
    rib.apply(EndOfRib(peer=A, generation=1, family=V4), 21.0)
    assert rib.reported(p, V4, 21.0)
    assert not rib.reported(p, V6, 21.0)
    rib.apply(up(generation=2), 22.0)
    assert rib.reported(p, V4, 22.0), "once is for good"


def test_events_before_the_configuration_are_kept_and_do_not_count_as_a_report() -> None:
    at = policy()
    rib = Rib()
    rib.apply(SessionDown(peer=A, generation=0, reason="refused"), 0.0)
    rib.advance(1.0)
    assert not rib.reported(at.peers[0], V4, 1.0)
    rib.apply(up(), 2.0)
    told(rib, route())
    assert set(rib.select(policy(peer(B))).best) == set()
    rib.configure(at.peers, 3.0)
    assert not rib.reported(at.peers[0], V4, 3.0)
    assert set(rib.select(at).best) == {"10.244.2.0/26"}


def test_a_peer_that_is_no_longer_configured_is_forgotten() -> None:
    rib, at = rib_of(route())
    assert rib.select(at).best
    rib.configure((), 1.0)
    assert not rib.select(policy()).best
    assert rib.peers == {}


def test_too_many_prefixes_are_counted_before_filters_and_remembered_until_the_peer_is_changed() -> None:
    at = policy(peer(max_prefixes=2))
    outside = [route(f"192.0.{i}.0/24") for i in range(3)]
    rib, _ = rib_of(*outside, at=at)
    (p,) = at.peers
    assert rib.exceeded(p) == "3 prefixes received, 2 are allowed"
    assert known(rib) == set()
    rib.apply(SessionDown(peer=A, generation=1, reason="removed"), 1.0)
    rib.configure((replace(p, interface=7),), 1.5)
    assert rib.exceeded(p), "another interface is no other configuration"
    rib.apply(up(generation=2), 2.0)
    told(rib, route(), generation=2)
    assert known(rib) == set()
    changed = replace(p, max_prefixes=10)
    assert rib.exceeded(changed) == ""
    rib.configure((changed,), 3.0)
    rib.apply(up(generation=3), 4.0)
    told(rib, *outside, generation=3)
    assert len(known(rib)) == 3


def test_a_maximum_that_is_lowered_counts_at_once() -> None:
    rib, at = rib_of(route(), route("10.244.3.0/26"))
    lower = replace(at.peers[0], max_prefixes=1)
    rib.configure((lower,), 1.0)
    assert rib.exceeded(lower) == "2 prefixes received, 1 are allowed"


def full(number: int) -> Attributes:
    """As much as goes into a message of 4 KB."""
    return Attributes(as_path=(TOR,), communities=tuple(f"{number}:{i}" for i in range(899)))


def test_attributes_that_say_more_than_so_many_prefixes_need_count_as_too_many() -> None:
    """Each prefix with 4 KB of communities of its own: 70 KB in memory, which maxPrefixes alone would let be told
    100,000 times."""
    at = policy(peer(max_prefixes=1000))
    (p,) = at.peers
    told_ = [replace(route(f"10.244.{i}.0/24"), attributes=full(i)) for i in range(112)]
    rib, _ = rib_of(*told_[:111], at=at)
    assert rib.peers[A].marks == 99_900
    told(rib, *(replace(r, attributes=told_[0].attributes) for r in told_[1:111]))
    assert rib.peers[A].marks == 900, "what routes share counts once"
    told(rib, *told_[1:111])
    rib.apply(Update(peer=A, generation=1, withdrawn=(told_[0].prefix,)), 1.0)
    told(rib, told_[0])
    assert rib.exceeded(p) == ""
    told(rib, told_[111])
    assert rib.exceeded(p) == "100800 AS numbers and communities received, 100000 are allowed"
    assert known(rib) == set()
    assert rib.peers[A].marks == 0


# -- any sequence ------------------------------------------------------------------------------------------------------

PREFIXES = ("10.244.2.0/26", "10.244.3.0/26", "10.244.1.0/26", "192.0.2.0/24", "fd00:10:244:1::/122")


@st.composite
def events(draw: st.DrawFn) -> list[Event]:
    found: list[Event] = []
    for _ in range(draw(st.integers(0, 25))):
        p, g = draw(st.sampled_from((A, B))), draw(st.integers(1, 3))
        family = draw(st.sampled_from((V4, V6)))
        match draw(st.integers(0, 6)):
            case 0:
                graceful = draw(st.sampled_from(((), (V4, V6))))
                found.append(up(p, g, graceful_restart=graceful))
            case 1:
                found.append(SessionDown(peer=p, generation=g, reason=""))
            case 2:
                found.append(EndOfRib(peer=p, generation=g, family=family))
            case 3:
                found.append(Resync(peer=p, generation=g, family=family))
            case 4:
                found.append(SpeakerLost(reason=""))
            case _:
                names = draw(st.lists(st.sampled_from(PREFIXES), max_size=3))
                gone = tuple(draw(st.lists(st.sampled_from(PREFIXES), max_size=2)))
                hops = {x: "fd00:1::" if ":" in x else p for x in names}
                routes = tuple(route(x, hops[x], med=draw(st.integers(0, 2))) for x in names)
                found.append(Update(peer=p, generation=g, announced=routes, withdrawn=gone))
    return found


@settings(max_examples=200)
@given(events(), st.integers(0, 1000))
def test_work_that_is_saved_changes_nothing(sequence: list[Event], stops: int) -> None:
    """Asking after every event, with policies in between, gives what asking once at the end does."""
    at = policy(peer(), peer(B))
    narrow = replace(at, allowed=frozenset({"10.244.2.0/24"}))
    often, once = Rib(), Rib()
    for rib in (often, once):
        rib.configure(at.peers, 0.0)
    for i, event in enumerate(sequence):
        often.apply(event, float(i))
        once.apply(event, float(i))
        often.select(narrow if (stops >> (i % 10)) & 1 else at)
    last, first = often.select(at), once.select(at)
    assert dict(last.best) == dict(first.best)
    assert {a: dict(r) for a, r in last.refused.items()} == {a: dict(r) for a, r in first.refused.items()}
    assert not any(PrefixSet(["10.244.1.0/26", "192.0.2.0/24"]).covers(parse(p)) for p in last.best)
    for address, known_ in often.peers.items():
        assert set(last.refused[address]) <= set(known_.routes)
        different = {id(r.attributes): r.attributes for r in known_.routes.values()}
        assert known_.marks == sum(a.marks for a in different.values())


@settings(max_examples=100)
@given(events())
def test_after_a_full_report_the_past_does_not_matter(sequence: list[Event]) -> None:
    """A new session, all its routes and the End-of-RIBs: whatever was before is gone."""
    at = policy(peer(), peer(B))
    rib, fresh = Rib(), Rib()
    for r in (rib, fresh):
        r.configure(at.peers, 0.0)
    for i, event in enumerate(sequence):
        rib.apply(event, float(i))
        rib.advance(float(i))
    for r in (rib, fresh):
        for p in (A, B):
            r.apply(up(p, 9), 100.0)
            told(r, route("10.244.7.0/26", p), address=p, generation=9)
            for family in (V4, V6):
                r.apply(EndOfRib(peer=p, generation=9, family=family), 101.0)
    assert dict(rib.select(at).best) == dict(fresh.select(at).best)
    assert {a: p.routes for a, p in rib.peers.items()} == {a: p.routes for a, p in fresh.peers.items()}


# -- prefixes ----------------------------------------------------------------------------------------------------------


def naive(prefix: str, others: Iterable[str]) -> bool:
    import ipaddress

    mine = ipaddress.ip_network(prefix)
    return any(
        mine.version == o.version and mine.subnet_of(o)  # type: ignore[arg-type]
        for o in map(ipaddress.ip_network, others)
    )


@st.composite
def prefixes(draw: st.DrawFn) -> str:
    import ipaddress

    six = draw(st.booleans())
    bits, length = (128, draw(st.integers(0, 128))) if six else (32, draw(st.integers(0, 32)))
    # Few networks, so that they meet.
    number = draw(st.integers(0, 7)) << (bits - 3) | draw(st.integers(0, 7))
    kind = ipaddress.IPv6Network if six else ipaddress.IPv4Network
    return str(kind((number, length), strict=False))


@settings(max_examples=300)
@given(prefixes(), st.lists(prefixes(), max_size=6))
def test_a_prefix_set_says_what_ipaddress_says(prefix: str, others: list[str]) -> None:
    assert PrefixSet(others).covers(parse(prefix)) == naive(prefix, others)
