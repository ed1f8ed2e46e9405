"""The groups of ``make bench`` that need an API server run, and say all that the docs promise. No figure is judged but
those that count."""

from __future__ import annotations

from pathlib import Path

from bench import ipam, scale
from lab.kube.installed import Installed


def test_the_group_ipam_runs(installed: Installed, tmp_path: Path, shim_c: Path) -> None:
    found = ipam.measure(installed, tmp_path, print, shim=shim_c, pairs=1, rounds=2, burst=20, bursts=1)
    assert {
        "ipam.api_down.add.vs_up",
        "ipam.api_down.del.vs_up",
        "ipam.writes_per_100_adds",
        "ipam.visible_p99_ms",
    } <= found.keys()
    assert all(value > 0 for value in found.values()), found
    # One write for 20 pods, two if the batch's end falls among them.
    assert found["ipam.writes_per_100_adds.max"] <= 15, found


def test_the_group_scale_runs(installed: Installed, tmp_path: Path) -> None:
    found = scale.measure(
        installed.cluster,
        tmp_path,
        print,
        stages=(2, 8),
        resting=2,
        faster=300,
        rest=1,
        watchers=5,
        writes=5,
        agents=False,
    )
    assert found["scale.nodes2.duplicates"] == found["scale.nodes8.duplicates"] == 0
    # 16 without a conflict; the mirror writes once or twice.
    for size in (2, 8):
        assert 16 <= found[f"scale.nodes{size}.requests_per_node"] <= 20, found
        assert found[f"scale.nodes{size}.refused"] == 0
    assert found["scale.rest.nodes"] == 2
