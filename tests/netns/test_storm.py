"""32 runtimes at once: kills throughout, and nothing leaks; an upgrade in the middle, and nothing fails.

UNDERLAY_PODS makes the storm longer (10000 takes minutes).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from cni import install
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import ROOT, Answer, Plugin

PODS: Final = int(os.environ.get("UNDERLAY_PODS", "300"))
SEED: Final = int(os.environ.get("UNDERLAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
WORKERS: Final = 32


class Runtimes:
    """32 of them, each with a namespace in which its pods come and go. They share only what is counted here."""

    def __init__(self, net: Net, folder: Path, shim: Path) -> None:
        self.plugin = Plugin(net, folder, shim)
        # What is remembered for a time is not to look like a leak: addresses that rest, and DELs.
        self.plugin.settings = {"rest": 1.0, "remember_deleted": 2.0}
        for worker in range(WORKERS):
            net.add(f"pod-{worker}")
        self.server = self.plugin.start()
        self.lock = threading.Lock()
        self.added = self.killed = 0
        self.refused: list[str] = []
        self.wrong: list[str] = []
        self.held: set[str] = set()

    def pods(self, first: int, count: int, kills: float) -> None:
        """ADD and DEL of so many pods; of each 1 / ``kills`` shims one is killed on its way."""
        share = [range(first + worker, first + count, WORKERS) for worker in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda worker: self._work(worker, share[worker], kills), range(WORKERS)))

    def _work(self, worker: int, numbers: range, kills: float) -> None:
        chance = random.Random(SEED + numbers.start)
        for number in numbers:
            self._pod(f"c{number}", f"pod-{worker}", chance, kills)

    def _pod(self, container: str, pod: str, chance: random.Random, kills: float) -> None:
        """As a runtime does: an ADD that fails or does not come back is followed by a DEL."""
        answer = self._call("ADD", container, pod, chance.random() * 0.02 if chance.random() < kills else None)
        mine: set[str] = set()
        if answer is not None and answer.code == 0:
            mine = {a.partition("/")[0] for a in answer.addresses}
            with self.lock:
                self.added += 1
                if shared := mine & self.held:
                    self.wrong.append(f"{container} got {shared}, which somebody has")
                self.held |= mine
        elif answer is not None:
            self.refused.append(answer.text)
        with self.lock:
            # From here on another may have it: the DEL is on its way.
            self.held -= mine
        while self._call("DEL", container, pod, chance.random() * 0.02 if chance.random() < kills else None) is None:
            pass

    def _call(self, verb: str, container: str, pod: str, kill_after: float | None) -> Answer | None:
        """None if it was killed; a DEL that is answered has succeeded."""
        shim = self.plugin.popen(verb, container, pod)
        if kill_after is not None:
            time.sleep(kill_after)
            shim.kill()
        out, err = shim.communicate(timeout=60)
        if shim.returncode == -9:
            with self.lock:
                self.killed += 1
            return None
        answer = Answer(subprocess.CompletedProcess([], shim.returncode, out, err))
        if verb == "DEL" and (answer.code, answer.text) != (0, ""):
            self.wrong.append(f"DEL of {container}: {answer.text}")
        return answer

    def restart(self) -> None:
        self.server.kill()
        self.server.wait()
        self.server = self.plugin.spawn()
        eventually(self.plugin.answers)

    def upgrade(self) -> None:
        """The new server waits for the old one's lock, then the old one is told to end."""
        said = self.plugin.log.read_text().count("waiting for its end")
        new = self.plugin.spawn()
        eventually(lambda: self.plugin.log.read_text().count("waiting for its end") > said)
        self.server.terminate()
        assert self.server.wait(60) == 0
        self.server = new

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.server.pid}/fd").iterdir()))

    def resident(self) -> int:
        """KiB that the server alone has in memory, but for what it shares with its reaper and with files."""
        lines = Path(f"/proc/{self.server.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    def nothing_is_left(self) -> None:
        eventually(self.plugin.answers)
        eventually(self.plugin.nothing_left)
        # What a shim that was killed left there is found at the next look into it.
        eventually(lambda: not list((self.plugin.run / "queue").glob("*.del")))
        for worker in range(WORKERS):
            shown = json.loads(self.plugin.net.run(f"pod-{worker}", ["ip", "-j", "link"]).stdout)
            assert [link["ifname"] for link in shown if link["ifname"] != "lo"] == []
        log = self.plugin.log.read_text()
        assert "defect of ours" not in log, log[-4000:]
        assert "Traceback" not in log, log[-4000:]


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[threading.Event]:
    """Does it in the background; gives an event that says when it is done. Servers are the main thread's: they die with
    the one that started them."""
    done = threading.Event()
    problems: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:
            problems.append(e)
        finally:
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        thread.join(600)
    if problems:
        raise problems[0]


_INSTALLS = """
import os, sys, itertools, time
from pathlib import Path
from cni import install
*versions, folder = map(Path, sys.argv[1:])
for version in itertools.cycle(versions):
    install.install_binary(version, folder)
    os.write(1, b".")
    time.sleep(0.01)
"""


@pytest.fixture
def runtimes(net: Net, tmp_path: Path, shim_c: Path) -> Runtimes:
    return Runtimes(net, tmp_path, shim_c)


@pytest.mark.timeout(180 + PODS)
def test_kills_throughout_leak_nothing(runtimes: Runtimes) -> None:
    """First server and shims are killed; then the shims alone, so that one server lives long enough to be measured."""
    half = PODS // 2
    began = time.monotonic()
    kills = 0
    with meanwhile(lambda: runtimes.pods(0, half, 0.1)) as done:
        while not done.wait(0.3):
            runtimes.restart()
            kills += 1
    eventually(runtimes.plugin.answers)
    runtimes.nothing_is_left()
    first = runtimes.descriptors()
    sizes = []
    for part in range(4):
        runtimes.pods(half + part * half // 4, half // 4, 0.1)
        runtimes.nothing_is_left()
        sizes.append(runtimes.resident())
    print(
        f"\nseed {SEED}: {PODS} pods in {time.monotonic() - began:.0f} s, {runtimes.added} added, "
        f"{runtimes.killed} shims and {kills} servers killed, {len(runtimes.refused)} ADDs refused; "
        f"descriptors {first} -> {runtimes.descriptors()}, resident KiB {sizes}"
    )
    assert not runtimes.wrong, f"seed {SEED}: {runtimes.wrong[:5]}"
    assert not runtimes.held
    assert kills >= 1
    assert runtimes.descriptors() == first
    # The first part is warm-up. SQLite's page cache of 2 MB fills as its file grows; a cluster's server has none.
    assert sizes[-1] - sizes[0] <= 2048 + 512, sizes
    # Only a server that was away for 5 s may have refused one.
    assert all('"no server"' in text for text in runtimes.refused), runtimes.refused[:3]


@pytest.mark.timeout(180 + PODS)
def test_an_upgrade_of_server_and_shim_fails_nothing(runtimes: Runtimes, tmp_path: Path, shim_c: Path) -> None:
    """Servers take turns, and the shim's binary is replaced while it is executed, under a storm of ADD and DEL."""
    versions = []
    for number in range(2):
        versions.append(tmp_path / f"shim-{number}")
        versions[-1].write_bytes(shim_c.read_bytes() + bytes(number))
    runtimes.plugin.shim = install.install_binary(versions[0], tmp_path / "bin")
    # A process of its own, as an installer is: what it has open for writing is inherited by nobody who executes it.
    program = [sys.executable, "-c", _INSTALLS, *map(str, versions), str(tmp_path / "bin")]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE) as installer:
        upgrades = 0
        with meanwhile(lambda: runtimes.pods(0, PODS, 0.0)) as done:
            while not done.wait(0.2):
                runtimes.upgrade()
                upgrades += 1
        assert installer.poll() is None
        installer.kill()
        assert installer.stdout is not None
        replaced = len(installer.stdout.read())
    assert runtimes.refused == []
    assert runtimes.wrong == []
    assert runtimes.added == PODS
    assert upgrades >= 1
    assert replaced > 10
    assert runtimes.server.poll() is None
    runtimes.nothing_is_left()


def test_a_storm_would_notice_a_lost_del(runtimes: Runtimes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others are worth: one DEL that is not sent is seen at the end."""
    call = Runtimes._call

    def forgets(self: Runtimes, verb: str, container: str, pod: str, kill_after: float | None) -> Answer | None:
        if (verb, container) == ("DEL", "c7"):
            return Answer(subprocess.CompletedProcess([], 0, b"", b""))
        return call(self, verb, container, pod, kill_after)

    monkeypatch.setattr(Runtimes, "_call", forgets)
    runtimes.pods(0, WORKERS, 0.0)
    assert len(runtimes.plugin.routed()) == 2
