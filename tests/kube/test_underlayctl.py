"""underlayctl as an operator uses it: whole command lines on a real API server, beside servers of two nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ctl import look
from ctl.main import main
from ipam.errors import Exhausted
from ipam.model import Lease
from lab.kube.cluster import Cluster
from lab.kube.installed import Installed
from store.model import IPAMBlock, Node
from tests.ipam_fakes import attachment, link_name
from tests.ipam_fakes import pool as a_pool
from tests.kube.world import COLLECTED, World, run, soon

SMALL = a_pool("small", "10.1.0.0/24", 28)
PODS = "/api/v1/namespaces/default/pods"

Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def command(installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in a thread, as it has an event loop of its own. What it waits for is waited for shortly."""
    for name in ("UNDERLAY_STORE", "UNDERLAY_NODE", "UNDERLAY_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(look, "SETTLE", 0.5)
    monkeypatch.setattr(look, "PATIENCE", {"PodGone": 1.0})
    url = f"kube:{installed.cluster.kubeconfig()}"

    async def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(main, ["--store", url, *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def pod_of(cluster: Cluster, name: str, node: str, lease: Lease) -> None:
    """As its kubelet tells of it."""
    spec = {"nodeName": node, "containers": [{"name": "main", "image": "x"}]}
    cluster.request("POST", PODS, {"metadata": {"name": name}, "spec": spec})
    ips = [{"ip": address} for address in lease.addresses]
    told: dict[str, Any] = {"status": {"phase": "Running", "podIP": lease.addresses[0], "podIPs": ips}}
    cluster.request("PATCH", f"{PODS}/{name}/status", told, content_type="application/merge-patch+json")


def test_a_limit_that_is_configured_holds_at_once(installed: Installed, tmp_path: Path, command: Command) -> None:
    async def story(world: World) -> None:
        assert (await command("ipam", "configure", "--max-blocks-per-node", "1"))[1] == (
            "ipamconfiguration/default created\n"
        )
        rig = await world.node("node-1")
        for i in range(16):
            await rig.add(i)
        with pytest.raises(Exhausted, match="and may have 1 "):
            await rig.add("one-more")
        assert (await command("ipam", "configure", "--max-blocks-per-node", "2"))[0] == 0
        await rig.add("one-more")
        code, _, err = await command("ipam", "configure", "--max-blocks-per-node", "1")
        assert (code, "node-1 (2): they keep what they have" in err) == (0, True)
        code, _, err = await command("ipam", "configure", "--strictaffinity", "false")
        assert (code, "never borrows" in err) == (1, True)
        assert "maxBlocksPerHost  1" in (await command("ipam", "configure", "show"))[1]

    run(installed, tmp_path, story, SMALL)


def test_leaks_are_found_by_their_pods_and_released_by_report(
    installed: Installed, tmp_path: Path, command: Command
) -> None:
    async def story(world: World) -> None:
        rig = await world.node("node-1")
        living, leaked, gone = await rig.add(1), await rig.add(2), await rig.add(3)
        for number, lease in ((1, living), (2, leaked), (3, gone)):
            pod_of(world.cluster, f"p{number}", "node-1", lease)

        async def mirrored() -> bool:
            return len(await rig.mirror()) == 3

        await soon(mirrored)
        code, out, err = await command("ipam", "check")
        assert (code, err) == (0, ""), out
        assert " pods, " in out, "compared, not only left out"

        code, out, _ = await command("ipam", "show", "--ip", leaked.addresses[0])
        assert code == 0
        assert "is held by pod default/p2 on node node-1 since" in out
        assert "interface eth0 of container c2, network pods" in out

        for name in ("p2", "p3"):
            world.cluster.request("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
        rig.kernel.unwire(link_name(attachment(2)))  # its DEL got lost
        code, out, _ = await command("ipam", "check", "-o", "json")
        report = tmp_path / "report.json"
        report.write_text(out)
        found = json.loads(out)["findings"]
        assert (code, [(f["kind"], f["address"]) for f in found]) == (
            1,
            sorted(("PodGone", lease.addresses[0]) for lease in (leaked, gone)),
        )

        code, out, err = await command("ipam", "release", "--from-report", str(report), "--yes")
        assert code == 1
        assert f"{leaked.addresses[0]} released" in out
        assert f"{gone.addresses[0]}: node-1 keeps it for pod default/p3" in err
        assert living.addresses[0] not in out + err
        rig.delete(3)

        async def clean() -> bool:
            return (await command("ipam", "check"))[0] == 0

        await soon(clean)

    run(installed, tmp_path, story, SMALL)


def test_a_dead_nodes_block_is_shown_found_and_released(installed: Installed, tmp_path: Path, command: Command) -> None:
    async def story(world: World) -> None:
        rig = await world.node("node-2")
        lease = await rig.add(1)
        (cidr,) = await rig.own_blocks()

        async def mirrored() -> bool:
            return bool(await rig.mirror())

        await soon(mirrored)
        code, _, err = await command("ipam", "release", "--block", cidr, "--yes")
        assert (code, "its node node-2 is there" in err) == (1, True)
        await rig.down()
        await world.people.delete(Node, "node-2")

        async def marked() -> bool:
            block = await world.block(cidr)
            return block is not None and bool(block.metadata.deletion_timestamp)

        await soon(marked, COLLECTED)
        code, out, _ = await command("ipam", "show", "--block", cidr)
        assert code == 0
        assert "deleting,no-node" in out
        assert "there is no node/node-2" in out
        assert f"{lease.addresses[0]}" in out
        code, out, _ = await command("ipam", "check")
        assert (code, "BlockOfNoNode" in out) == (1, True)
        code, _, err = await command("ipam", "release", "--ip", lease.addresses[0])
        assert (code, f"underlayctl ipam release --block {cidr}" in err) == (1, True)
        code, out, _ = await command("ipam", "release", "--block", cidr, "--yes")
        assert (code, f"block {cidr} released" in out) == (0, True)
        assert (await world.people.list(IPAMBlock)).items == ()
        world.rigs.remove(rig)

    run(installed, tmp_path, story, SMALL)
