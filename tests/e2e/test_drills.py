"""Drills as a person calls them: what is planned loses nothing, and what is lost otherwise is seen.

The long form, every drill in every kind of lab, runs with UNDERLAY_DRILLS=1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import msgspec
import pytest

from lab.drill import DRILLS
from lab.drilled import Report
from tests.e2e.conftest import Lab

SMALL = ("up", "--racks", "1", "--nodes", "2", "--pods", "1")
LABS = {
    "single": ("--pods", "2"),
    "single-frr": ("--pods", "2", "--tor", "frr"),
    "dual": ("--pods", "2", "--dual-tor"),
    "dual-frr": ("--pods", "2", "--dual-tor", "--tor", "frr"),
    "mesh": ("--pods", "2", "--mesh"),
}


@pytest.fixture(scope="module")
def small(lab: Lab) -> Lab:
    lab.command(*SMALL)
    return lab


def drilled(lab: Lab, name: str) -> tuple[Report, int, str]:
    """What the drill found, its exit code, and what it printed."""
    done = lab.command("drill", name, "--away", "0.5", "--calm", "1", "-o", "json", check=False, timeout=170)
    assert done.stdout, done.stderr
    return msgspec.json.decode(done.stdout, type=Report), done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["kill-agent", "kill-speaker", "config-change", "upgrade"])
def test_a_planned_drill_loses_nothing(small: Lab, name: str) -> None:
    report, code, said = drilled(small, name)
    assert code == 0, said
    # Two pods and a node to each, both families; at least a second before and after.
    assert len(report.paths) == 2 * (2 + 2)
    assert all(path.sent > 100 for path in report.paths), said
    assert (report.lost, report.wrongly_lost, report.unrest, report.dropped) == (0, 0, "", 0)


def test_a_cut_uplink_is_seen_path_by_path_and_mended(small: Lab) -> None:
    report, code, said = drilled(small, "cut-uplink")
    assert code == 0, said  # all paths of this lab are node-1's
    for path in report.paths:
        assert path.lost > 10
        assert 0.4 < path.gap < 30
    assert all(link.up for link in small.state().links)


def test_drills_are_listed_and_a_wrong_one_is_refused(small: Lab) -> None:
    said = small.command("drill").stdout
    assert [line.split()[0] for line in said.splitlines()] == [drill.name for drill in DRILLS]
    for name, why in (("kill-all", "no drill is called kill-all"), ("drain-tor", "underlay-lab up --dual-tor")):
        done = small.command("drill", name, check=False)
        assert done.returncode == 1
        assert why in done.stderr


def test_pings_go_on_until_they_are_interrupted_and_tell_what_was_lost(small: Lab) -> None:
    argv = [sys.executable, "-m", "lab.cli", "ping", "--dir", str(small.folder.path), "-o", "json"]
    # A shell's background job, as these tests may be, has it ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        assert process.stderr
        assert "packets on every path" in process.stderr.readline()
        small.command("link", "cut", "node-1", "tor-1")
        small.command("link", "mend", "node-1", "tor-1")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    report = msgspec.json.decode(said, type=Report)
    assert process.returncode == 1
    assert report.lost == report.wrongly_lost > 0
    assert len(report.paths) == 2 * (2 + 2)


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("d") / "lab")
    try:
        lab.command("up", *LABS[request.param])
        yield lab
    finally:
        lab.command("down", check=False)


@pytest.mark.skipif("UNDERLAY_DRILLS" not in os.environ, reason="minutes: UNDERLAY_DRILLS=1")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("whole", LABS, indirect=True)
def test_every_drill_in_every_lab(whole: Lab) -> None:
    done = whole.command("drill", "--all", "-o", "json", check=False, timeout=850)
    reports = msgspec.json.decode(done.stdout, type=list[Report])
    assert [(report.drill, report.wrongly_lost, report.unrest) for report in reports if not report.good] == []
    assert done.returncode == 0
