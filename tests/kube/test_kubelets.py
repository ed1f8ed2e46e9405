"""What the lab does in a kubelet's place: tokens that are renewed in time, Pods that follow what is attached."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.kube import installed
from lab.kube.build import Programs
from lab.kube.cluster import Cluster, Refused
from lab.kube.plane import Plane
from lab.kubelets import ACCOUNTS, TOKEN_LIFE, Credentials, Kubelets
from lab.runtime import Sandbox
from store.kubeaccess import find_access
from store.kubehttp import Http, Limits
from tests.conftest import eventually
from tests.ipam_fakes import FakeClock

PODS = "/api/v1/namespaces/default/pods"
LIMIT = 60


class Desk:
    """The kubelets of a cluster with node-1, at work, in a time of their own."""

    def __init__(self, cluster: Cluster, programs: Programs) -> None:
        self.clock = FakeClock()
        self._http = Http(find_access(str(cluster.kubeconfig())), self.clock, random.Random(1), Limits(connect=30))
        plane = Plane(programs=programs, folder=cluster.folder, admin_token="", address="192.0.2.7")
        self.kubelets = Kubelets(self._http, self.clock, plane)

    async def run(self, doing: Callable[[], Awaitable[None]]) -> None:
        keeper = asyncio.create_task(self.kubelets.run())
        try:
            async with asyncio.timeout(LIMIT):
                await doing()
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            await self._http.close()

    async def until(self, probe: Callable[[], bool], *, step: float = 0.0) -> None:
        """Lets requests come and go, and time pass by ``step`` each time, until it is so."""
        async with asyncio.timeout(60):
            while not probe():
                await self.clock.advance(step)
                await asyncio.sleep(0.02)


@pytest.fixture
def desk(cluster: Cluster, programs: Programs) -> Desk:
    cluster.apply(d for d in installed.documents() if d["kind"] in ("Namespace", "ServiceAccount"))
    cluster.request("POST", "/api/v1/nodes", installed.node("node-1"))
    return Desk(cluster, programs)


def pod(cluster: Cluster, name: str) -> tuple[str, str, tuple[str, ...]] | None:
    """Its uid, node and addresses; None if it is not there."""
    try:
        said = cluster.request("GET", f"{PODS}/{name}")
    except Refused as e:
        assert e.code == 404, e
        return None
    return (
        said["metadata"]["uid"],
        said["spec"]["nodeName"],
        tuple(ip["ip"] for ip in said["status"].get("podIPs") or ()),
    )


def test_a_token_is_renewed_before_it_ends(desk: Desk, cluster: Cluster, tmp_path: Path) -> None:
    credentials = {part: Credentials(tmp_path / part) for part in ACCOUNTS}

    def tokens() -> list[str]:
        return [c.token.read_text() for c in credentials.values()]

    async def doing() -> None:
        await desk.kubelets.admit("node-1", credentials)
        first = tokens()
        await desk.clock.advance(0.75 * TOKEN_LIFE)
        await asyncio.sleep(0.2)
        assert tokens() == first
        cluster.kill("kube-apiserver")
        await desk.clock.advance(0.15 * TOKEN_LIFE)  # it is time, and nobody is there to ask
        await desk.until(lambda: not cluster.is_ready())
        assert tokens() == first
        cluster.start_apiserver()
        await desk.until(lambda: not set(tokens()) & set(first), step=1)
        # Both are good as long as they live: who has read the old one goes on with it.
        for token in [*first, *tokens()]:
            assert cluster.request("GET", "/api", token=token)

    asyncio.run(desk.run(doing))
    for where in credentials.values():
        assert [f.name for f in sorted(where.folder.iterdir())] == ["kubeconfig", "token"]
        assert all(f.stat().st_mode & 0o777 == 0o600 for f in where.folder.iterdir())
        assert find_access(str(where.kubeconfig)).server == "https://192.0.2.7:6443"


def test_a_pod_of_ours_that_was_deleted_comes_back(desk: Desk, cluster: Cluster, tmp_path: Path) -> None:
    where = Credentials(tmp_path / "agent")
    path = f"/api/v1/namespaces/{installed.NAMESPACE}/pods/{installed.AGENT}-node-1"

    async def doing() -> None:
        await desk.kubelets.admit("node-1", {"agent": where})
        first = where.token.read_text()
        cluster.request("DELETE", path, {"gracePeriodSeconds": 0})
        await desk.until(lambda: where.token.read_text() != first, step=1)
        assert cluster.request("GET", path)["status"]["phase"] == "Running"
        # The old one is bound to the Pod that is gone.
        with pytest.raises(Refused, match="401"):
            cluster.request("GET", "/api", token=first)
        assert cluster.request("GET", "/api", token=where.token.read_text())

    asyncio.run(desk.run(doing))


def test_pods_follow_what_is_attached(desk: Desk, cluster: Cluster) -> None:
    async def doing() -> None:
        desk.kubelets.attached("node-1", Sandbox("pod-1-1", "aa", ("10.0.0.1", "fd00::1"), {}))
        desk.kubelets.attached("node-1", Sandbox("pod-1-2", "bb", ("10.0.0.2",), {}))
        await desk.kubelets.settled(limit=60)
        first = pod(cluster, "pod-1-1")
        assert first is not None
        assert first[1:] == ("node-1", ("10.0.0.1", "fd00::1"))
        desk.kubelets.detached("pod-1-2")
        # The same name again is another Pod: another sandbox, other addresses.
        desk.kubelets.attached("node-1", Sandbox("pod-1-1", "cc", ("10.0.0.3",), {}))
        await desk.kubelets.settled(limit=60)
        assert pod(cluster, "pod-1-2") is None
        second = pod(cluster, "pod-1-1")
        assert second is not None
        assert second[1:] == ("node-1", ("10.0.0.3",))
        assert second[0] != first[0]

    asyncio.run(desk.run(doing))


def test_what_is_attached_while_the_api_server_is_away_is_written_later(desk: Desk, cluster: Cluster) -> None:
    async def doing() -> None:
        desk.kubelets.attached("node-1", Sandbox("pod-1-1", "aa", ("10.0.0.1",), {}))
        await desk.kubelets.settled(limit=60)
        cluster.kill("kube-apiserver")
        desk.kubelets.attached("node-1", Sandbox("pod-1-2", "bb", ("10.0.0.2",), {}))
        desk.kubelets.detached("pod-1-1")
        with pytest.raises(LabError, match=r"has no Pod pod-1-2"):
            await desk.kubelets.settled(limit=0.5)
        cluster.start_apiserver()
        await desk.until(lambda: pod(cluster, "pod-1-1") is None and pod(cluster, "pod-1-2") is not None, step=1)

    asyncio.run(desk.run(doing))
    eventually(lambda: (pod(cluster, "pod-1-2") or ())[2:] == (("10.0.0.2",),))
