"""That nothing was lost, nothing failed and nothing leaked, whatever was done to a cluster meanwhile."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from lab.drilled import Report
from lab.oob import CONTROL_PLANE
from tests.cluster.cluster import BIN, LIMIT, ROOT, Cluster, Wire
from tests.conftest import eventually

#: Said at the start of a kubelet, of the machine that the tests run on.
_OF_THE_MACHINE: Final = {"CgroupV1", "InvalidDiskCapacity", "PossibleMemoryBackedVolumesOnDisk"}


class Pings:
    """Packets on every path of the lab's pods and nodes, 100 a second on each."""

    def __init__(self, cluster: Cluster) -> None:
        argv = [str(BIN / "underlay-lab"), "ping", "--dir", str(cluster.folder.path), "-o", "json"]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stderr
        said = self._process.stderr.readline()
        assert "packets on every path" in said, said + self._process.stderr.read()

    def end(self) -> Report:
        """Their account."""
        self._process.terminate()  # a job in the background, as of `make test`, is deaf to SIGINT
        said, problem = self._process.communicate(timeout=LIMIT)
        assert said, problem
        return msgspec.json.decode(said, type=Report)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def nothing_lost(cluster: Cluster) -> Iterator[None]:
    """No packet is, on any path, while the block runs."""
    pings = Pings(cluster)
    try:
        yield
        report = pings.end()
    finally:
        pings.kill()
    lost = [path for path in report.paths if path.lost]
    print(f"{report.sent} packets on {len(report.paths)} paths, {report.lost} lost, late {report.late:.2f} s")
    assert not lost, lost
    assert all(path.sent for path in report.paths), [path for path in report.paths if not path.sent]


@contextmanager
def no_warnings(cluster: Cluster, *, allowed: tuple[str, ...] = ()) -> Iterator[None]:
    """No Event of type Warning is told while the block runs, of anything, by anybody."""
    before = _warnings(cluster)
    yield
    more = {
        key: text
        for key, text in _warnings(cluster).items()
        if key not in before and not any(word in text for word in allowed)
    }
    assert not more, "\n".join(more.values())


def _warnings(cluster: Cluster) -> dict[tuple[str, int], str]:
    """By the Event's uid and how often it was said."""
    found: dict[tuple[str, int], str] = {}
    for event in cluster.get("events", "-A", "--field-selector", "type=Warning"):
        if event["reason"] not in _OF_THE_MACHINE:
            count = (event.get("series") or event).get("count") or 1
            found[event["metadata"]["uid"], count] = _text(event)
    return found


def _text(event: Wire) -> str:
    about = event["involvedObject"]
    return (
        f"{about['kind']} {about.get('namespace', '')}/{about['name']}: {event['reason']}: {event.get('message', '')}"
    )


def no_leak(cluster: Cluster) -> None:
    """Store, journals and kernels agree, and every address that is taken is a Pod's."""

    def clean() -> bool:
        for node in cluster.get("nodes"):
            name = node["metadata"]["name"]
            store = f"kube:{cluster.folder.member(CONTROL_PLANE) / 'admin.kubeconfig'}"
            check = (str(BIN / "underlayctl"), "--store", store, "ipam", "check", "--run", "/run/underlay")
            said = cluster.node_exec(name, *check, "--node", name, check=False)
            assert said.startswith("clean"), said
        return True

    eventually(clean, limit=LIMIT, every=1)
