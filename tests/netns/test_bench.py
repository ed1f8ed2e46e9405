"""That the bench of the plugin measures what it says, with numbers that are too small to mean anything."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import bgp, cni, profile, profiled
from bench.plugins import PLUGINS
from lab.gobuild import NoGo
from lab.net import Net

ROOT = Path(__file__).resolve().parents[2]
TINY = cni.Size(rounds=2, widths=(2,), batches=1, batch=3, blocks=1, block=2, connects=5, warm_up=1)


def nowhere() -> Path:
    raise NoGo("this test builds nothing")


def test_every_figure_is_measured_and_in_the_docs(tmp_path: Path, shim_c: Path) -> None:
    said: list[str] = []
    # Debian's plugins stand in for the current release, whose build needs a network.
    found = cni.figures(
        tmp_path / "cni", said.append, size=TINY, shim=shim_c, results=tmp_path / "out", current=lambda: PLUGINS
    )
    assert found["cni.first_syn.lost_of_5"] == 0
    assert found["ptp.first_syn.lost_of_5"] == 0
    positive = {name: value for name, value in found.items() if ".first_syn." not in name}
    assert min(positive.values()) > 0
    docs = (ROOT / "docs/bench.md").read_text()
    for name in found:
        general = re.sub(r"parallel\d+", "parallelN", name)
        general = re.sub(r"lost_of_\d+", "lost_of_200", general)
        assert f"`{general}`" in docs
    assert "add bridge current" in (tmp_path / "out/cni.txt").read_text()
    assert (tmp_path / "out/cni.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_build_of_the_current_release_the_rest_is_measured(tmp_path: Path, net: Net, shim_c: Path) -> None:
    said: list[str] = []
    made = cni._plugins(net, tmp_path, shim_c, nowhere, said.append)
    assert list(made) == [cni.US, cni.DUAL, cni.PTP, cni.BRIDGE]
    assert said == ["cni: the reference plugins' current release is left out: this test builds nothing"]


def test_a_profile_has_every_part(tmp_path: Path, shim_c: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "WARM_UP", 0)
    said: list[str] = []
    found = profile.figures(tmp_path / "p", said.append, rounds=2, shim=shim_c)
    assert found.keys() == {"profile.add.p50_ms", "profile.del.p50_ms"}
    log = (tmp_path / "p/here.log").read_text().splitlines()
    seen = {part.rstrip(" 12") for line in log for part in json.loads(line)["parts"]}
    assert seen == {part for _, _, part in profiled.PARTS}
    for owner, name, _ in profiled.PARTS:
        assert hasattr(owner, name)


def test_every_figure_of_routing_is_measured_and_in_the_docs(tmp_path: Path) -> None:
    found = bgp.measure(tmp_path, lambda _: None, announced=2, cuts=1, loads=1, rounds=1, table=500)
    docs = (ROOT / "docs/bench.md").read_text()
    for name, value in found.items():
        assert f"`{name}`" in docs
        assert value > 0 or "lost" in name
