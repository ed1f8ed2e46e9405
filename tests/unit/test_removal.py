"""What an uninstall does in which order, by what is there."""

from __future__ import annotations

from agent import removal
from agent.fib import NextHop, Route
from agent.removal import Present, Removal, Wishes, plan
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from cni.sysctls import Former

POD = Route(prefix="10.244.1.5/32", protocol=PROTO_PODS, metric=32, nexthops=(NextHop("", 9),))
BLOCK = Route(prefix="10.244.1.0/26", protocol=PROTO_BLOCKS, metric=512, kind="blackhole")
IMPORT = Route(prefix="10.244.2.0/26", protocol=PROTO_IMPORTS, metric=2048, nexthops=(NextHop("192.0.2.1", 2),))
FORWARD = Former("net.ipv4.ip_forward", "0", "1")
FILTER = Former("net.ipv4.conf.eth0.rp_filter", "1", "2")
RUN = ("agent.lock", "cni.lock", "journal-1", "queue", "speaker", "store.db", "sysctls")
ALL = Present(
    doomed=1,
    routes=(BLOCK, IMPORT),
    groups=(8,),
    nexthops=(6, 7),
    source_check=True,
    sysctls=((FORWARD, "1"), (FILTER, "2")),
    conflist=True,
    binary=True,
    speaker=True,
    run=RUN,
    state=("snapshot.json",),
)


def steps(found: Removal) -> list[str]:
    return [type(step).__name__ for step in found.steps]


def test_nothing_is_left_of_nothing() -> None:
    assert plan(Present(), Wishes()) == Removal()


def test_peers_hear_before_routes_go_and_the_locks_go_last() -> None:
    found = plan(ALL, Wishes())
    assert steps(found) == [
        "RemoveConflist",
        "EndSessions",
        "DeleteRoutes",
        "DeleteNextHops",
        "Reap",
        "RemoveSourceCheck",
        "Restore",
        "RemoveBinary",
        "RemoveFiles",
        "RemoveFiles",
    ]
    assert found.steps[3] == removal.DeleteNextHops((8, 6, 7)), "a group before its members"
    (last,) = (step for step in found.steps[-1:] if isinstance(step, removal.RemoveFiles))
    assert last.directory == "run"
    assert "store.db" not in last.names
    assert "in the run directory, which is not ours: store.db" in found.kept


def test_forwarding_is_put_back_only_if_asked() -> None:
    assert any("net.ipv4.ip_forward=1, which was 0 before us" in line for line in plan(ALL, Wishes()).kept)
    asked = plan(ALL, Wishes(forwarding=True))
    assert removal.Restore("net.ipv4.ip_forward", "0") in asked.steps
    assert not any("ip_forward" in line for line in asked.kept)


def test_a_sysctl_of_somebody_else_or_of_no_interface_is_left() -> None:
    changed = plan(Present(sysctls=((FILTER, "0"),)), Wishes())
    assert changed.steps == (removal.Restore(FILTER.key, None),)
    assert "somebody has changed it since (before us: 1)" in changed.kept[0]
    gone = plan(Present(sysctls=((FILTER, None),)), Wishes())
    assert (gone.steps, gone.kept) == ((removal.Restore(FILTER.key, None),), ())


def test_living_pods_are_a_refusal_or_keep_what_is_theirs() -> None:
    there = Present(
        **{f: getattr(ALL, f) for f in ALL.__struct_fields__ if f not in ("pods", "routes")},
        pods={9: "ulabc"},
        routes=(POD, BLOCK, IMPORT),
    )
    refused = plan(there, Wishes())
    assert (refused.steps, refused.kept) == ((), ())
    assert "1 pod has our network (ulabc): nothing is changed" in refused.refusal
    kept = plan(there, Wishes(keep_pods=True, forwarding=True))
    assert removal.DeleteRoutes((BLOCK, IMPORT)) in kept.steps
    assert not {"RemoveSourceCheck", "RemoveBinary"} & set(steps(kept))
    assert any("ip_forward=1" in line and "those pods need it" in line for line in kept.kept)
    (files,) = (step.names for step in kept.steps if isinstance(step, removal.RemoveFiles) and step.directory == "run")
    assert not {"journal-1", "queue"} & set(files)


def test_a_pod_route_without_its_pod_goes() -> None:
    assert plan(Present(routes=(POD,)), Wishes()).steps == (removal.DeleteRoutes((POD,)),)
