"""Alive, ready, and the agent's metrics: what is said of which state."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from agent import health, metrics
from agent.bgp.model import SessionDown, SpeakerLost
from agent.delta import AddRoute
from agent.metrics import Followed
from cni.prometheus import render
from tests.agent_fakes import bgp_peer, cluster
from tests.promtext import check, value
from tests.unit.test_reconcile import FAR4, FAR6, PEERS, World


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.kernel.close()


def state(world: World, **changes: object) -> health.State:
    agent = world.agent
    return replace(
        health.State(
            now=world.clock.time,
            turned=agent.figures.turned,
            viewed=world.view.now is not None,
            kernel_error=agent.kernel_error,
            seen=agent.seen,
            rib=agent.rib,
        ),
        **changes,
    )


# -- alive -------------------------------------------------------------------------------------------------------------


def test_a_loop_that_comes_round_is_alive_and_one_that_does_not_is_not(world: World) -> None:
    assert health.unhealthy(state(world)) == ""
    world.clock.time += health.TURN_LIMIT
    assert health.unhealthy(state(world)) == ""
    world.clock.time += 1
    assert "61 s" in health.unhealthy(state(world))


def test_what_others_must_mend_is_no_reason_to_be_started_anew(world: World) -> None:
    """No view, no kernel, no speaker: not ready, but alive."""
    world.kernel.unreadable = OSError(errno.EPERM, "no")
    world.speaker.known = False
    world.step()
    assert health.unready(state(world))
    assert health.unhealthy(state(world)) == ""


# -- ready -------------------------------------------------------------------------------------------------------------


def test_with_all_sessions_up_it_is_ready(world: World) -> None:
    world.step()
    world.up()
    world.step()
    assert health.unready(state(world)) == ""
    assert health.without(state(world)) == ""


def test_without_a_view_it_is_not_ready(world: World) -> None:
    world.view.now = None
    world.step()
    assert "store" in health.unready(state(world))


def test_before_the_first_plan_it_is_not_ready(world: World) -> None:
    assert health.unready(state(world)) == "no plan has been applied yet"


def test_while_the_kernel_cannot_be_read_it_is_not_ready(world: World) -> None:
    world.step()
    world.up()
    world.kernel.unreadable = OSError(errno.ENOBUFS, "no buffer")
    world.step()
    assert "no buffer" in health.unready(state(world))
    world.kernel.unreadable = None
    world.step()
    assert health.unready(state(world)) == ""


def test_a_node_that_the_store_does_not_know_is_not_ready(world: World) -> None:
    world.view.now = cluster(node=None)
    world.step()
    assert "node-1" in health.unready(state(world))


def test_without_the_speaker_it_is_not_ready_but_where_no_session_is_wanted_none_is_needed(world: World) -> None:
    world.speaker.known = False
    world.step()
    assert "speaker" in health.unready(state(world))
    world.view.now = cluster(peers=())
    world.step()
    assert health.unready(state(world)) == ""


def test_a_session_is_waited_for_its_restart_time_and_no_longer(world: World) -> None:
    """A dead ToR: its peers are named, and hold nobody up for ever."""
    world.view.now = cluster(
        peers=(bgp_peer("tor-1-v4", "10.0.1.0"), bgp_peer("tor-2-v4", "10.0.2.0", as_number=65002))
    )
    world.step()
    assert "tor-1-v4 (10.0.1.0) is waited for, 120 s" in health.unready(state(world))
    world.up()
    world.step()
    assert health.unready(state(world)) == ""
    world.agent.event(SessionDown(peer="10.0.2.0", generation=1, reason="hold timer"))
    world.step()
    assert health.unready(state(world)) == "tor-2-v4 (10.0.2.0) is waited for, 120 s more"
    world.clock.time += 120
    world.step()
    assert health.unready(state(world)) == ""
    assert health.without(state(world)) == "without tor-2-v4 (10.0.2.0)"


def test_speaker_and_peers_that_go_are_no_fault_of_the_agent(world: World) -> None:
    """As in an upgrade of the speaker: a probe that asks whether the agent does its work hears no no."""
    world.step()
    world.up()
    world.step()
    world.agent.event(SpeakerLost(reason="gone"))
    world.speaker.known = False
    world.step()
    assert health.unready(state(world))
    assert health.unfit(state(world)) == ""
    world.kernel.unreadable = OSError(errno.ENOBUFS, "no buffer")
    world.step()
    assert "no buffer" in health.unfit(state(world))


@pytest.mark.parametrize(("configured", "waited"), [("20s", 20), ("1h", 120)])
def test_the_time_is_the_peers_maximum_and_two_minutes_at_most(world: World, configured: str, waited: int) -> None:
    world.view.now = cluster(peers=(bgp_peer("tor-1-v4", "10.0.1.0", max_restart_time=configured),))
    world.step()
    start = world.clock.time
    assert health.unready(state(world, now=start + waited - 1))
    assert health.unready(state(world, now=start + waited)) == ""


def test_a_peer_that_was_removed_for_sending_too_much_is_not_waited_for(world: World) -> None:
    world.view.now = cluster(peers=(bgp_peer("tor-1-v4", "10.0.1.0", max_prefixes=1),))
    world.step()
    world.up(tor1=[FAR4, "10.244.3.0/26"])
    world.agent.event(SessionDown(peer="10.0.1.0", generation=1, reason="removed"))
    world.step()
    assert health.unready(state(world)) == ""
    assert health.without(state(world)) == "without tor-1-v4 (10.0.1.0)"


# -- metrics -----------------------------------------------------------------------------------------------------------


def page(world: World) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    agent = world.agent
    return check(
        render(
            metrics.families(
                metrics.State(
                    now=world.clock.time,
                    ready=not health.unready(state(world)),
                    live=world.view.now is not None and world.view.now.live,
                    figures=agent.figures,
                    status=agent.status,
                    seen=agent.seen,
                    rib=agent.rib,
                    followed=(Followed("ippools", True, 0.0), Followed("nodes", False, 2.5)),
                    last_good_age=7.0,
                    last_good_whole=True,
                    store_requests={"list": 3},
                    store_failures={"watch": 1},
                    status_writes=2,
                    status_failures=1,
                    relay_connections=4,
                    resident=1 << 26,
                )
            )
        )
    )


def test_a_page_is_well_formed_before_anything_is_known(world: World) -> None:
    found = page(world)
    assert value(found, "underlay_agent_ready") == 0
    assert value(found, "underlay_bgp_sessions_wanted") == 0
    assert value(found, "underlay_agent_passes_total") == 0


def test_a_page_has_what_each_peer_told_and_was_told(world: World) -> None:
    world.step()
    world.up(tor1=[FAR4, FAR6, "192.0.2.0/24"], tor2=[FAR4])
    world.step()
    world.speaker.report(world.clock.time)
    world.step()
    found = page(world)
    tor = {"peer": "tor-1-v4", "address": "10.0.1.0"}
    assert value(found, "underlay_agent_ready") == 1
    assert value(found, "underlay_bgp_sessions_wanted") == 4
    assert len(found["underlay_bgp_session_up"]) == len(PEERS)
    assert value(found, "underlay_bgp_session_up", **tor) == 1
    assert value(found, "underlay_bgp_session_graceful_restart", **tor) == 1
    assert value(found, "underlay_bgp_prefixes_received", **tor) == 2
    assert value(found, "underlay_bgp_prefixes_accepted", **tor) == 1
    assert value(found, "underlay_bgp_prefixes_refused", **tor, reason="OutsidePools") == 1
    assert len(found["underlay_bgp_prefixes_refused"]) == 1
    assert value(found, "underlay_bgp_prefixes_wanted", **tor) == 1
    assert value(found, "underlay_bgp_prefixes_sent", **tor) == 1
    assert value(found, "underlay_agent_routes", protocol="imports", family="ipv4") == 1
    assert value(found, "underlay_agent_routes", protocol="blocks", family="ipv6") == 1
    assert value(found, "underlay_agent_nexthop_groups") == len(world.kernel.groups) == 1
    assert value(found, "underlay_agent_kernel_operations_total", operation="AddGroup") == 1
    assert value(found, "underlay_agent_apply_seconds_count") >= 2
    assert value(found, "underlay_agent_plan_seconds_count") == value(found, "underlay_agent_passes_total") >= 3
    assert value(found, "underlay_store_failures_total", verb="watch") == 1
    assert value(found, "underlay_agent_informer_behind_seconds", kind="nodes") == 2.5
    assert value(found, "underlay_agent_last_good_age_seconds") == 7
    assert value(found, "process_resident_memory_bytes") == 1 << 26


def test_each_way_down_is_counted_and_its_time_begins(world: World) -> None:
    world.step()
    world.up()
    world.agent.event(SessionDown(peer="10.0.1.0", generation=1, reason="cease"))
    world.up(generation=2)
    world.clock.time += 5
    world.agent.event(SpeakerLost(reason="gone"))
    world.step()
    world.clock.time += 30
    found = page(world)
    tor = {"peer": "tor-1-v4", "address": "10.0.1.0"}
    assert value(found, "underlay_bgp_session_downs_total", **tor) == 2
    assert value(found, "underlay_bgp_session_downs_total", peer="tor-2-v4", address="10.0.2.0") == 1
    assert value(found, "underlay_bgp_session_age_seconds", **tor) >= 30
    assert value(found, "underlay_bgp_session_up", **tor) == 0


def test_what_the_kernel_refuses_and_what_holds_is_told(world: World) -> None:
    def refuse(operation: object) -> int:
        return errno.EPERM if isinstance(operation, AddRoute) and operation.route.prefix == FAR4 else 0

    world.kernel.refuse = refuse
    world.step()
    world.up(tor1=[FAR4])
    world.step()
    found = page(world)
    assert value(found, "underlay_agent_kernel_failures_total", operation="AddRoute") >= 1
    assert value(found, "underlay_agent_condition", type="KernelRefused") == 1


def test_labels_are_of_peers_and_never_of_prefixes(world: World) -> None:
    """However many routes there are, the page does not grow."""
    world.step()
    world.up(tor1=[FAR4])
    world.step()
    few = sum(map(len, page(world).values()))
    world.tell("10.0.1.0", [f"10.244.{i}.0/26" for i in range(2, 200)])
    world.step()
    assert sum(map(len, page(world).values())) == few
