"""Parts of the lab in a few namespaces: the prober sees a wrong source, the runtime behaves as kubelet would."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cni.errors import CNIError
from lab import building
from lab.errors import LabError
from lab.folder import Folder, claim, make_on_machine, remove
from lab.matrix import Pod, Report
from lab.net import Net
from lab.probe import Prober
from lab.processes import Daemon, children_of
from lab.runtime import Runtime
from lab.topology import Topology
from store.clock import SystemClock
from tests.conftest import usable

A = Pod("a", ("192.0.2.1", "2001:db8::1"))
B = Pod("b", ("192.0.2.2", "2001:db8::2"))


@pytest.fixture
def pair(net: Net) -> Net:
    for pod in (A, B):
        net.add(pod.name)
    net.link("a", "b", "b", "a")
    for pod, port in ((A, "b"), (B, "a")):
        net.address(pod.name, port, [f"{pod.addresses[0]}/24", f"{pod.addresses[1]}/64"])
    usable(net, A.name, B.name)
    return net


def measure(net: Net, *pods: Pod, limit: float = 60) -> Report:
    async def run() -> Report:
        return await Prober(net).measure(pods, nodes=2, probes=3, limit=limit)

    return asyncio.run(run())


def test_the_prober_finds_every_path_good(pair: Net) -> None:
    report = measure(pair, A, B)
    assert (report.answered, len(report.paths), report.lost, report.good) == (4, 4, 0, True)


def test_the_prober_sees_that_a_source_is_not_the_senders_own(pair: Net) -> None:
    pair.ip("a", ["addr add 192.0.2.77/24 dev b", "route add 192.0.2.2/32 dev b src 192.0.2.77"])
    report = measure(pair, A, B)
    wrong = {(p.sender, p.receiver, p.family): p.problem for p in report.paths if p.problem}
    assert wrong[("a", "b", 4)] == "was seen as 192.0.2.77, is 192.0.2.1"
    # The answer to b comes from there, too.
    assert wrong[("b", "a", 4)] == "was answered by 192.0.2.77, asked 192.0.2.1"
    assert {p.family for p in report.paths if p.good} == {6}
    assert not report.good


def test_the_prober_counts_what_is_lost(pair: Net) -> None:
    pair.ip("b", ["route add blackhole 2001:db8::1/128"])
    report = measure(pair, A, B, limit=5)
    assert {(p.sender, p.family): p.sent - p.answered for p in report.paths} == {
        ("a", 4): 0,
        ("b", 4): 0,
        ("a", 6): 3,
        ("b", 6): 3,
    }
    assert report.lost == 6


async def until(probe: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if probe():
                return
            await asyncio.sleep(0.01)


PLUGIN = """#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID" >>{log}
[ "$CNI_COMMAND" = DEL ] && exit 0
[ -s {answers} ] || exit 0
code=$(head -n 1 {answers}); sed -i 1d {answers}
[ "$code" = 0 ] && {{ echo '{{"cniVersion":"1.0.0","ips":[{{"address":"10.0.0.9/32"}}]}}'; exit 0; }}
echo '{{"code":'"$code"',"msg":"no luck"}}'; exit 1
"""


class Plugged:
    """A runtime over a plugin that answers what it is told: 0, or an error code, one a line."""

    def __init__(self, net: Net, folder: Path) -> None:
        for name in ("node", "pod"):
            net.add(name)
        self.log, self._answers = folder / "log", folder / "answers"
        program = folder / "fake"
        program.write_text(PLUGIN.format(log=self.log, answers=self._answers))
        program.chmod(0o755)
        conflist = folder / "net.conflist"
        conflist.write_text(json.dumps({"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "fake"}]}))
        ids = iter("abcdef")
        self.runtime = Runtime(
            net,
            SystemClock(),
            node="node",
            conflist=conflist,
            plugins=folder,
            environment={"PATH": "/usr/bin:/bin"},
            new_id=lambda: next(ids),
        )

    def answers(self, *codes: int) -> None:
        self._answers.write_text("".join(f"{code}\n" for code in codes))

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


def test_try_again_later_is_followed_with_a_new_sandbox(net: Net, tmp_path: Path) -> None:
    plugged = Plugged(net, tmp_path)
    plugged.answers(11, 0)
    sandbox = asyncio.run(plugged.runtime.attach("pod"))
    assert (sandbox.container, sandbox.addresses) == ("b", ("10.0.0.9",))
    assert plugged.calls() == ["ADD a", "DEL a", "ADD b"]


def test_another_error_is_deleted_and_told(net: Net, tmp_path: Path) -> None:
    plugged = Plugged(net, tmp_path)
    plugged.answers(7, 0)
    with pytest.raises(LabError, match=r"pod: ADD on node: no luck \(code 7\)"):
        asyncio.run(plugged.runtime.attach("pod"))
    assert plugged.calls() == ["ADD a", "DEL a"]


def test_a_daemon_comes_back_after_the_time_that_was_asked_for(net: Net, tmp_path: Path) -> None:
    net.add("node")
    daemon = Daemon(
        net,
        SystemClock(),
        member="node",
        name="sleeper",
        argv=["/bin/sleep", "100"],
        environment={},
        log=tmp_path / "log",
    )

    async def life() -> None:
        keeper = asyncio.create_task(daemon.run())
        loop = asyncio.get_running_loop()
        await until(lambda: daemon.state().state == "running")
        first = daemon.state().pid
        begin = loop.time()
        daemon.kill(9, restart_after=0.3)
        await until(lambda: daemon.state().state == "restarting")
        with pytest.raises(LabError, match="is down"):
            daemon.kill(9)
        await until(lambda: daemon.state().pid not in (0, first))
        assert loop.time() - begin >= 0.3
        assert daemon.state().restarts == 1
        daemon.kill(9)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_signal_is_for_the_program_behind_nsenter(net: Net, tmp_path: Path) -> None:
    """Killed itself, nsenter leaves the program alive."""
    net.add("node")
    daemon = Daemon(
        net,
        SystemClock(),
        member="node",
        name="sleeper",
        # It forks and waits, as nsenter does.
        argv=["/bin/sh", "-c", "/bin/sleep 100; exit"],
        environment={},
        log=tmp_path / "log",
        behind=True,
    )

    def program() -> tuple[int, ...]:
        return children_of(daemon.state().pid)

    async def life() -> None:
        keeper = asyncio.create_task(daemon.run())
        await until(lambda: bool(program()))
        (first,) = program()
        daemon.kill(9, restart_after=0.1)
        await until(lambda: program() not in ((), (first,)))
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        daemon.kill(9)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    asyncio.run(asyncio.wait_for(life(), 60))


def test_a_lab_that_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise CNIError("no room for the plugin")

    monkeypatch.setattr("cni.install.install", refuses)
    lab = building.Lab(Folder(tmp_path), Topology.build(racks=1, nodes=1, pods=1), SystemClock())
    told: list[str] = []

    async def life() -> None:
        keeper = asyncio.create_task(lab.run())
        with pytest.raises(LabError, match=r"no room for the plugin\n.*log"):
            async for step in lab.steps():
                told.append(step.text)
        assert (await lab.state()).state == "failed"
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    asyncio.run(asyncio.wait_for(life(), 60))
    assert any("1 node" in text for text in told)
    assert not any("attached" in text for text in told)


def test_folders_that_were_made_on_the_machine_go_with_the_last_lab_that_has_them(tmp_path: Path) -> None:
    machine, labs = tmp_path / "machine", [Folder(tmp_path / name) for name in ("one", "two")]
    machine.mkdir()
    (machine / "there").mkdir()
    (machine / "full").mkdir()
    places = [machine / name for name in ("there", "new/a/b", "new/c", "full")]
    held = []
    for lab in labs:
        lock = claim(lab)
        assert lock is not None
        held.append([*make_on_machine(lab, map(str, places)), lock])
    (machine / "full" / "file").touch()
    assert all(place.is_dir() for place in places)
    for fd in held[0]:
        os.close(fd)
    assert remove(labs[0])
    assert all(place.is_dir() for place in places), "they are another lab's, too, whose mounts would end"
    again = claim(labs[0])
    assert again is not None
    for fd in (*held[1], again, *make_on_machine(labs[0], [str(machine / "later" / "x")])):
        os.close(fd)
    assert sorted(p.name for p in machine.iterdir()) == ["full", "later", "new", "there"]
    assert remove(labs[0])
    assert sorted(p.name for p in machine.iterdir()) == ["full", "new", "there"]


def test_a_lab_that_was_killed_leaves_no_folder_on_the_machine_once_there_is_another(tmp_path: Path) -> None:
    lab, place = Folder(tmp_path / "lab"), tmp_path / "machine" / "x"
    for _ in range(2):
        lock = claim(lab)
        assert lock is not None
        assert not place.parent.exists()
        for fd in (*make_on_machine(lab, [str(place)]), lock):
            os.close(fd)
        assert place.exists()
    assert remove(lab)
    assert not place.parent.exists()
