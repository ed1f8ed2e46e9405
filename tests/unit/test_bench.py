"""The arithmetic of the figures, and that a program that fails is no figure."""

from __future__ import annotations

import asyncio
import os
import struct
import time
import zlib
from pathlib import Path

import pytest

from bench import cluster, ipam, plot, process, profile, rack, scale
from bench.__main__ import measure
from bench.cni import BRIDGE, CURRENT, DUAL, PTP, US, Serial
from bench.plugins import BenchError
from bench.spawn import Call, SpawnError, flood, timed
from bench.stats import Times, percentile
from lab.kube.audit import Asked
from lab.kube.build import NotHere
from store.model import Allocation, IPAMBlock, IPAMBlockSpec, IPAMBlockStatus, Meta, block_name


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (50, 50), (50.5, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_the_nearest_rank(percent: float, value: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


def test_percentile_of_one_value() -> None:
    assert percentile([7.0], 99) == 7.0
    assert Times((7.0,)).p50 == Times((7.0,)).p99 == 7.0


def test_a_program_is_timed_with_what_it_reads_and_prints(tmp_path: Path) -> None:
    said, out = tmp_path / "in", tmp_path / "out"
    said.write_text("hello")
    assert 0 < timed(["/bin/cat"], {}, stdin=said, stdout=out) < 10
    assert out.read_text() == "hello"


def test_a_program_that_fails_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(SpawnError, match="ended with 3: why"):
        timed(["/bin/sh", "-c", "echo why; exit 3"], {}, stdin=Path(os.devnull), stdout=tmp_path / "out")


@pytest.mark.parametrize(("width", "at_once"), [(1, 1), (3, 3), (9, 4)])
def test_of_a_flood_so_many_run_at_once(tmp_path: Path, width: int, at_once: int) -> None:
    (tmp_path / "running").mkdir()
    script = 'cd "$WHERE"; touch running/$$; sleep 0.2; ls running | wc -l; sleep 0.1; rm running/$$'
    outs = [tmp_path / f"out-{i}" for i in range(4)]
    calls = [({"WHERE": str(tmp_path), "PATH": os.environ["PATH"]}, out) for out in outs]
    done = flood(["/bin/sh", "-c", script], calls, stdin=Path(os.devnull), width=width)
    assert len(done.times) == 4
    assert max(int(out.read_text()) for out in outs) == at_once
    assert max(done.times) <= done.seconds <= sum(done.times) + 1


def test_a_flood_with_one_that_fails_is_no_figure(tmp_path: Path) -> None:
    calls = [({"CODE": str(code)}, tmp_path / "out") for code in (0, 0, 4)]
    with pytest.raises(SpawnError, match="ended with 4"):
        flood(["/bin/sh", "-c", "exit $CODE"], calls, stdin=Path(os.devnull), width=1)


def test_ratios_are_ours_against_theirs() -> None:
    def times(milliseconds: float, slow: float = 0) -> Times:
        return Times(tuple([milliseconds / 1000] * 99 + [(slow or milliseconds) / 1000] * 2))

    current = f"{PTP} {CURRENT}"
    serial = Serial(
        {US: times(1, slow=2), DUAL: times(1.5), PTP: times(5), BRIDGE: times(8), current: times(4)},
        {US: times(0.6), DUAL: times(0.7), PTP: times(30), BRIDGE: times(40), current: times(20)},
        {US: times(3), DUAL: times(3.5)},
    )
    found = serial.figures()
    wanted = {
        "cni.add.p50.vs_ptp": 0.2,
        "cni.add.p50.vs_bridge": 0.125,
        "cni.add.p50.vs_ptp_current": 0.25,
        "cni.add.p99.vs_p50": 2,
        "cni.del.reply.vs_ptp": 0.02,
        "cni.del.gone.vs_ptp": 0.1,
        "cni.add.p99_ms": 2,
        "cni.add.dual.p50_ms": 1.5,
        "ptp.del.p50_ms": 30,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert "ptp current" in serial.table()


def test_a_text_plot_has_every_series_on_one_axis() -> None:
    rows = {"fast": Times((0.001, 0.0011, 0.002)), "slow": Times((0.01, 0.02, 0.1))}
    fast, slow, axis = plot.text(rows, width=41).splitlines()
    assert fast.startswith("fast ")
    assert fast.index("|") < slow.index("|")
    # Two powers of ten on 41 characters: 20 are one.
    assert (axis.index("1 "), axis.index("10 "), axis.index("100")) == (5, 25, 45)
    assert slow.index("|") == 5 + 26
    assert plot.text({"one": Times((0.005,))}).count("|") == 1


def test_a_picture_is_a_png_with_a_dot_where_a_value_is() -> None:
    data = plot.png({"add one": Times((0.001,) * 5 + (0.01,)), "del one": Times((0.1,))}, "Title (ms)")
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + length
    width, height, depth, color = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    assert (depth, color) == (8, 2)
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (3 * width + 1)
    blue, orange = set(), set()
    for y in range(height):
        line = raw[y * (3 * width + 1) + 1 :][: 3 * width]
        for x in range(width):
            r, _, b = line[3 * x : 3 * x + 3]
            blue |= {x} if b > r + 60 else set()
            orange |= {x} if r > b + 60 else set()
    # The first series is at the left end and in the middle of the axis, the second at its right end.
    left, middle, right = min(blue), max(blue), max(orange)
    assert middle - left == pytest.approx(right - middle, abs=4)


def test_a_profile_splits_each_call() -> None:
    calls = [(1000 * i, 1000 * i + 900) for i in range(profile.WARM_UP + 3)]
    records = [{"began": b + 300, "ended": e - 100, "parts": {"a": 200, "b": 50}} for b, e in calls]
    del records[-1]["parts"]["b"]  # not in every call
    parts = profile.split(calls, records)
    assert parts == {profile.START: 0.3, "a": 0.2, "b": 0.05, profile.REST: 0.25, profile.END: 0.1, profile.WHOLE: 0.9}
    shown = profile.table({profile.HERE: parts, profile.THERE: {"c": 7.0, profile.WHOLE: 8.0}})
    assert shown.splitlines()[-1].split()[-1] == "8"
    assert any(line.startswith("c ") for line in shown.splitlines())
    with pytest.raises(BenchError, match="12 timed"):
        profile.split(calls, records[:-1])


def test_memory_is_read_from_smaps() -> None:
    text = (
        "Rss:        2048 kB\nPss:    1 kB\nPrivate_Clean:    4 kB\nPrivate_Dirty:      8 kB\nPrivate_Hugetlb: 1 kB\n"
    )
    assert rack.kib(text, "Rss") == 2048
    assert rack.kib(text, "Private_Clean|Private_Dirty") == 12


def test_programs_that_run_beside_each_other_are_timed_each(tmp_path: Path) -> None:
    null = Path(os.devnull)

    async def main() -> None:
        began = time.monotonic()
        go = tmp_path / "go"
        wait = f"while ! [ -e {go} ]; do sleep 0.05; done; sleep 0.3"
        slow = Call(["/bin/sh", "-c", wait], {}, stdin=null, stdout=tmp_path / "slow")
        quick = Call(["/bin/true"], {}, stdin=null, stdout=tmp_path / "quick")
        bad = Call(["/bin/sh", "-c", "echo why; exit 3"], {}, stdin=null, stdout=tmp_path / "bad")
        first = await quick.ended()
        go.touch()
        last = await slow.ended()
        assert first < last
        assert last - began >= 0.3
        with pytest.raises(SpawnError, match="ended with 3: why"):
            await bad.ended()

    asyncio.run(main())


def test_a_programs_name_does_not_move_its_times() -> None:
    fields = ["S", "1", "1", "1", "0", "-1", "4194304", "9", "0", "0", "0", "250", "50", "0", "0"]
    assert process._ticks(f"4711 (a b) c) {' '.join(fields)}") == 300


def test_pairs_are_compared_each_for_itself() -> None:
    assert ipam.paired([1.0, 10.0, 90.0], [1.0, 5.0, 100.0]) == 1


def test_a_group_whose_programs_are_missing_is_left_out_and_one_that_fails_is_not(tmp_path: Path) -> None:
    def missing(folder: Path, say: object) -> dict[str, float]:
        raise NotHere("no API server on this machine: type 'make apiserver'")

    def broken(folder: Path, say: object) -> dict[str, float]:
        raise ValueError

    said: list[str] = []
    groups = {"missing": missing, "broken": broken, "good": lambda folder, say: {"x": 1.0}}
    assert measure(groups, tmp_path, said.append) == ({"x": 1.0}, ["broken"])
    assert said == ["missing: left out: no API server on this machine: type 'make apiserver'"]


# -- addresses of many nodes ----------------------------------------------------------------------------------------


def block(cidr: str, node: str, **held: str) -> IPAMBlock:
    """``held``: container -> address."""
    allocations = tuple(
        Allocation(address=address, network="n", container=f"{node}-{pod}", interface="eth0")
        for pod, address in held.items()
    )
    spec = IPAMBlockSpec(cidr=cidr, pool="pods", node=node)
    return IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=spec, status=IPAMBlockStatus(allocations=allocations))


GIVEN = {"10.0.0.1": "a-0", "10.0.0.65": "b-0"}
ONE, OTHER = block("10.0.0.0/26", "a", **{"0": "10.0.0.1"}), block("10.0.0.64/26", "b", **{"0": "10.0.0.65"})


def test_what_was_given_once_and_is_so_in_the_store_is_right() -> None:
    assert scale.check([OTHER, ONE], dict(GIVEN)) == 0


@pytest.mark.parametrize(
    ("blocks", "given"),
    [
        ([ONE], GIVEN),  # b-0 is in no block
        ([ONE, OTHER], {"10.0.0.1": "a-0"}),  # one too many in the store
        ([ONE, OTHER], {"10.0.0.1": "a-0", "10.0.0.65": "a-1"}),  # another pod has it
        ([ONE, OTHER, block("10.0.0.0/24", "c")], GIVEN),  # overlaps
        ([ONE, OTHER, block("10.0.1.0/26", "a", **{"0": "10.0.0.1"})], GIVEN),  # twice, once in a wrong block
        ([ONE, block("10.0.0.64/26", "c", **{"0": "10.0.0.65"})], GIVEN),  # of a node that has not given it
    ],
)
def test_what_is_not_so_is_counted(blocks: list[IPAMBlock], given: dict[str, str]) -> None:
    assert scale.check(blocks, dict(given)) > 0


def test_the_figures_of_a_stage_are_by_node() -> None:
    def asked(verb: str, code: int = 200) -> Asked:
        return Asked("u", "a", verb, "ipamblocks", "", "", code, 0.0)

    requests = (asked("list"), asked("create", 409), asked("create", 201), asked("update", 500))
    growth = scale.Growth(
        nodes=2, pods=40, seconds=3.0, requests=requests, api_cpu=0.5, etcd_cpu=0.1, api_mb=300.0
    ).figures("nodes2")
    assert growth["scale.nodes2.requests_per_node"] == 2
    assert growth["scale.nodes2.writes_per_node"] == 1.5
    assert growth["scale.nodes2.conflicts"] == 1
    assert growth["scale.nodes2.refused"] == 1
    assert growth["scale.nodes2.api_cpu_ms_per_node"] == 250


METRICS = """\
# TYPE containerd_cri_sandbox_runtime_create_seconds histogram
containerd_cri_sandbox_runtime_create_seconds_bucket{runtime="runc",le="+Inf"} 4
containerd_cri_sandbox_runtime_create_seconds_sum{runtime="runc"} 1.25
containerd_cri_sandbox_runtime_create_seconds_count{runtime="runc"} 4
containerd_cri_network_plugin_operations_duration_seconds_seconds_bucket{operation_type="set_up_pod",le="+Inf"} 3
containerd_cri_network_plugin_operations_duration_seconds_seconds_sum{operation_type="set_up_pod"} 0.5
containerd_cri_network_plugin_operations_duration_seconds_seconds_count{operation_type="set_up_pod"} 3
containerd_cri_network_plugin_operations_duration_seconds_seconds_sum{operation_type="tear_down_pod"} 9
containerd_cri_network_plugin_operations_duration_seconds_seconds_count{operation_type="tear_down_pod"} 9
"""


def test_clocks_of_containerd_are_summed_over_nodes() -> None:
    plugins = "network_plugin_operations_duration_seconds_seconds"
    assert cluster.read_clock(METRICS, "sandbox_runtime_create_seconds", "") == (1.25, 4)
    assert cluster.read_clock(METRICS + METRICS, plugins, 'operation_type="set_up_pod"') == (1.0, 6)
    assert cluster.read_clock(METRICS, plugins, 'operation_type="no_call_yet"') == (0, 0)
    with pytest.raises(BenchError, match="no clock container_start_seconds"):
        cluster.read_clock(METRICS, "container_start_seconds", "")
