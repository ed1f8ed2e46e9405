"""Pools that change under way: docs/pools.md as it stands, with packets on all paths meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import msgspec
import pytest

from tests.cluster.calm import nothing_lost
from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.docpages import Commands, Page, Player, read
from tests.conftest import eventually

#: Those that stay: two of the old pool, and one of the new.
STAY, COME = ("pod-1-1", "pod-3-1"), "pod-4-1"


@pytest.fixture
def stayers(cluster: Cluster) -> Iterator[None]:
    for pod in STAY:
        cluster.lab("pod", "add", pod)
    yield
    for pod in (*STAY, COME):
        cluster.lab("pod", "del", pod, check=False)


@pytest.mark.skipif(os.environ.get("UNDERLAY_LONG") != "1", reason="UNDERLAY_LONG=1 has it run")
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("stayers")
def test_pods_move_to_another_pool_and_nothing_is_lost_between_both(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    page = read("pools.md", (ROOT / "docs/pools.md").read_text())
    assert page
    player = Player(cluster, tmp_path_factory.mktemp("page") / "tree")
    moving, back = (
        next(i for i, s in enumerate(page.steps) if isinstance(s, Commands) and words in s.text)
        for words in ("rollout restart", "delete deployment")
    )
    with nothing_lost(cluster):
        player.play(_part(page, 0, moving))
    assert "10.245." in cluster.lab("pod", "add", COME)
    with nothing_lost(cluster):
        player.play(_part(page, moving, back))
    sizes = {
        b["spec"]["cidr"].partition("/")[2] for b in cluster.get("ipamblocks") if b["spec"]["pool"] == "pods-new-v4"
    }
    assert sizes == {"28"}
    left = cluster.underlayctl("ipam", "show", "--pool", "pods-v4")
    assert all(f"default/{pod}" in left for pod in STAY)
    assert "default/web" not in left, left
    # Its deletion is refused, and takes nothing from those that stay.
    said = cluster.underlayctl("delete", "ippool", "pods-v4", check=False)
    assert "pods hold" in said
    cluster.lab("pod", "del", COME)
    begin = time.monotonic()
    with nothing_lost(cluster):
        player.play(_part(page, back, len(page.steps)))
    print(f"back, and the new pool deleted: {time.monotonic() - begin:.0f} s")
    assert not any(b["spec"]["pool"] == "pods-new-v4" for b in cluster.get("ipamblocks"))
    assert "clean" in eventually(lambda: _clean(cluster), every=1)


def _clean(cluster: Cluster) -> str:
    said = cluster.underlayctl("ipam", "check", check=False)
    assert "clean" in said, said
    return said


def _part(page: Page, first: int, end: int) -> Page:
    return msgspec.structs.replace(page, steps=page.steps[first:end])
