"""The plugin through random histories on a real kernel, against a model of what a runtime may expect.

A history is data: it comes from a seed, is carried out on a node of its own, and when it fails is cut down to the
shortest one that still does, which is printed. UNDERLAY_SEED repeats one, UNDERLAY_STEPS makes it longer.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from cni import verbs
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import Plugin

STEPS: Final = int(os.environ.get("UNDERLAY_STEPS", "120"))
SEED: Final = int(os.environ.get("UNDERLAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
#: Seconds for making a failing history shorter; the test's own limit is 180.
SHRINK_LIMIT: Final = 60.0
PODS: Final = 6

#: A verb of a history and its numbers: pod, and what else it needs.
Step = tuple[Any, ...]

_WEIGHTS: Final = {
    "add": 30,
    "del": 22,
    "check": 16,
    "gc": 5,
    "kill-shim": 12,
    "lose": 4,
    "kill": 3,
    "kill-at": 4,
}


def history(seed: int, length: int) -> list[Step]:
    chance = random.Random(seed)
    found: list[Step] = []
    for verb in chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=length):
        pod = chance.randrange(PODS)
        match verb:
            case "del":
                found.append((verb, pod, chance.random() < 0.5))
            case "gc":
                found.append((verb, chance.choice([None, chance.getrandbits(PODS)])))
            case "kill-shim":
                found.append((verb, pod, chance.choice(["ADD", "DEL"]), round(chance.random() * 0.004, 5)))
            case "kill-at":
                found.append((verb, pod, chance.choice(verbs.STEPS)))
            case "kill":
                found.append((verb,))
            case _:
                found.append((verb, pod))
    return found


class World:
    """A node, and what its pods must have. A pod is known to have addresses (``live``), to have none, or in doubt: its
    call was killed, or its namespace went without a DEL."""

    def __init__(self, net: Net, folder: Path, shim: Path) -> None:
        self.plugin = Plugin(net, folder, shim)
        self.net = net
        for pod in range(PODS):
            net.add(f"pod-{pod}")
        self.server = self.plugin.start()
        self.live: dict[int, dict[str, Any]] = {}
        self.doubt: set[int] = set()

    def go(self, step: Step) -> None:
        getattr(self, "do_" + step[0].replace("-", "_"))(*step[1:])

    # -- steps -------------------------------------------------------------------------------------------------------

    def do_add(self, pod: int) -> None:
        answer = self.plugin.call("ADD", f"c{pod}", f"pod-{pod}")
        if answer.json.get("msg") == "no server":
            # A drowned machine: the server needed more than 5 s to start.
            eventually(self.plugin.answers)
            answer = self.plugin.call("ADD", f"c{pod}", f"pod-{pod}")
        assert answer.code == 0, f"ADD of pod {pod}: {answer.text}"
        self.added(pod, answer.json)

    def added(self, pod: int, result: dict[str, Any]) -> None:
        if pod in self.live:
            assert result == self.live[pod], f"ADD of pod {pod} again: {result}, before: {self.live[pod]}"
        for other, had in self.live.items():
            shared = addresses(had) & addresses(result) if other != pod else set()
            assert not shared, f"pods {pod} and {other} share {shared}"
        self.live[pod] = result
        self.doubt.discard(pod)

    def do_del(self, pod: int, there: bool) -> None:
        answer = self.plugin.call("DEL", f"c{pod}", f"pod-{pod}" if there else "")
        assert (answer.code, answer.text) == (0, ""), f"DEL of pod {pod}: {answer.text}"
        self.live.pop(pod, None)
        self.doubt.discard(pod)

    def do_check(self, pod: int) -> None:
        if pod in self.doubt:
            return
        known = self.live.get(pod) or {"interfaces": [{"name": "x"}, {"name": "eth0", "sandbox": "/x"}]}
        answer = self.plugin.call("CHECK", f"c{pod}", f"pod-{pod}", self.plugin.conf(prevResult=known))
        if answer.json.get("msg") == "no server":
            eventually(self.plugin.answers)
            return
        assert (answer.code == 0) == (pod in self.live), f"CHECK of pod {pod}: {answer.text}"

    def do_gc(self, mask: int | None) -> None:
        keep = range(PODS) if mask is None else [pod for pod in range(PODS) if mask & 1 << pod]
        entries = None if mask is None else [{"containerID": f"c{pod}", "ifname": "eth0"} for pod in keep]
        conf = {**self.plugin.conf("1.1.0"), "cni.dev/valid-attachments": entries}
        answer = self.plugin.call("GC", conf=conf)
        if answer.json.get("msg") == "no server":
            eventually(self.plugin.answers)
            answer = self.plugin.call("GC", conf=conf)
        assert answer.code == 0, f"GC: {answer.text}"
        for pod in set(range(PODS)) - set(keep):
            self.live.pop(pod, None)

    def do_kill(self) -> None:
        self.server.kill()
        self.server.wait()
        self.server = self.plugin.spawn()

    def do_kill_at(self, pod: int, step: str) -> None:
        """The server ends at a step of this pod's ADD or DEL, if it comes to that; the shim goes on to the next."""
        self.server.kill()
        self.server.wait()
        self.server = self.plugin.spawn(step)
        # It may end before it answers: at a queued DEL.
        eventually(lambda: self.server.poll() is not None or self.plugin.answers())
        verb = step.partition("-")[0].upper()
        shim = self.plugin.popen(verb, f"c{pod}", f"pod-{pod}")
        while shim.poll() is None and self.server.poll() is None:
            time.sleep(0.001)
        if self.server.poll() is None:
            # Answered first, or not at all on its way past that step: a killed one is what comes next.
            self.server.kill()
        self.server.wait()
        self.server = self.plugin.spawn()
        printed = shim.communicate(timeout=60)[0]
        if verb == "ADD":
            result = json.loads(printed)
            if result.get("msg") == "no server":
                self.doubted(pod)
                eventually(self.plugin.answers)
            else:
                assert "ips" in result, f"ADD of pod {pod} while the server was killed at {step}: {result}"
                self.added(pod, result)
        else:
            assert (shim.returncode, printed) == (0, b""), f"DEL of pod {pod}, killed at {step}: {printed!r}"
            self.live.pop(pod, None)
            self.doubt.discard(pod)

    def do_kill_shim(self, pod: int, verb: str, delay: float) -> None:
        shim = self.plugin.popen(verb, f"c{pod}", f"pod-{pod}")
        time.sleep(delay)
        shim.send_signal(signal.SIGKILL)
        shim.communicate(timeout=60)
        self.doubted(pod)

    def do_lose(self, pod: int) -> None:
        """The namespace goes, and nobody says so. What comes under its name is another."""
        self.net.remove(f"pod-{pod}")
        self.net.add(f"pod-{pod}")
        self.doubted(pod)

    def doubted(self, pod: int) -> None:
        self.live.pop(pod, None)
        self.doubt.add(pod)

    # -- what holds --------------------------------------------------------------------------------------------------

    def holds(self) -> bool:
        """Each pod that is known to live has its routes; nobody but it and the doubtful has any."""
        routed, wanted = self.plugin.routed(), {a for result in self.live.values() for a in addresses(result)}
        assert wanted <= routed, f"no routes to {wanted - routed}"
        if not self.doubt:
            assert routed == wanted, f"routes to {routed - wanted}, of nobody"
        return True

    def end(self) -> None:
        """Every pod is looked at, then taken away; then nothing is left, in kernel, store and server."""
        eventually(self.plugin.answers)
        eventually(self.holds)
        for pod in range(PODS):
            self.do_check(pod)
        for pod in range(PODS):
            self.do_del(pod, pod % 2 == 0)
        eventually(self.plugin.nothing_left)
        # What a shim that was killed left there is found at the next look into it.
        eventually(lambda: not list((self.plugin.run / "queue").glob("*.del")))
        assert self.server.poll() is None, self.plugin.log.read_text()[-2000:]
        log = self.plugin.log.read_text()
        assert "defect of ours" not in log, log[-4000:]
        assert "Traceback" not in log, log[-4000:]


def addresses(result: dict[str, Any]) -> set[str]:
    return {ip["address"].partition("/")[0] for ip in result["ips"]}


def problem(steps: Sequence[Step], folder: Path, shim: Path) -> str:
    """What goes wrong in this history; "" if nothing."""
    folder.mkdir()
    net = Net(folder)
    number = -1
    try:
        world = World(net, folder, shim)
        for number, step in enumerate(steps):
            world.go(step)
            if number % 10 == 9:
                eventually(world.holds)
        number = len(steps)
        world.end()
    except (AssertionError, subprocess.TimeoutExpired) as e:
        return f"step {number}: {e}"
    finally:
        net.close()
    return ""


def shortest(steps: list[Step], fails: Callable[[list[Step]], str], limit: float) -> tuple[list[Step], str]:
    """Leaves out halves, quarters... as long as what is left still fails, for ``limit`` seconds."""
    end, said, size = time.monotonic() + limit, "", max(1, len(steps) // 2)
    while size:
        start = 0
        while start < len(steps) and time.monotonic() < end:
            less = steps[:start] + steps[start + size :]
            if found := fails(less):
                steps, said = less, found
            else:
                start += size
        size //= 2
    return steps, said


@pytest.mark.timeout(180 + STEPS)
def test_a_random_history_is_as_the_model_says(tmp_path: Path, shim_c: Path) -> None:
    steps = history(SEED, STEPS)
    said = problem(steps, tmp_path / "node", shim_c)
    if said:
        numbers = itertools.count()
        less, why = shortest(steps, lambda less: problem(less, tmp_path / f"{next(numbers)}", shim_c), SHRINK_LIMIT)
        lines = "\n  ".join(str(step) for step in less)
        seed = f"UNDERLAY_SEED={SEED} UNDERLAY_STEPS={STEPS}"
        pytest.fail(f"{seed}: {said}\nshorter: {why or said}\n  {lines}", pytrace=False)


def test_a_failing_history_is_cut_down_to_what_fails() -> None:
    steps = history(7, 100)
    wrong = [step for step in steps if step[0] == "check"]
    assert len(wrong) > 2

    def fails(some: list[Step]) -> str:
        return "two" if sum(step in wrong for step in some) >= 2 else ""

    less, said = shortest(steps, fails, 10)
    assert (len(less), said) == (2, "two")
    assert all(step in wrong for step in less)
    assert history(7, 100) == steps


def test_a_history_that_goes_wrong_is_found(tmp_path: Path, shim_c: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is able to see: here it is made to remember another address."""
    other = {"interfaces": [], "ips": [{"address": "192.0.2.1/32"}]}
    monkeypatch.setattr(World, "do_lose", lambda self, pod: self.live.update({pod: other}))
    steps: list[Step] = [("add", 1), ("lose", 1), ("add", 1)]
    assert problem(steps, tmp_path / "node", shim_c).startswith("step 2: ADD of pod 1 again")
