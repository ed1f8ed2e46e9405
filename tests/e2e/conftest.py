"""A lab under test, spoken to through its command as a person would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lab import client
from lab.folder import Folder
from lab.wire import NodeState, State
from tests.conftest import eventually, lab_ends_with_us

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
LAST_LINE = re.compile(
    r"^lab: (?P<pods>\d+) pods on (?P<nodes>\d+) nodes, (?P<answered>\d+)/(?P<paths>\d+) paths answered "
    r"\(IPv4 and IPv6\), (?P<lost>\d+) lost$"
)


class Lab:
    """One lab by its folder; ``prefix`` stands before each command (setpriv, unshare)."""

    def __init__(self, path: Path, prefix: Sequence[str] = ()) -> None:
        self.folder = Folder(path)
        self._prefix = list(prefix)

    def command(self, *words: str, check: bool = True, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        verb = 2 if words[0] in ("pod", "link") else 1
        argv = [*self._prefix, str(BIN / "underlay-lab"), *words[:verb], "--dir", str(self.folder.path), *words[verb:]]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, cwd="/")
        assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def inside(self, name: str, *words: str, check: bool = True) -> str:
        """What the command prints in the namespace."""
        return self.command("exec", name, *words, check=check).stdout

    def spawn(self, name: str, *words: str) -> subprocess.Popen[str]:
        """Starts a command in the namespace; it is ours to end."""
        argv = [w for w in client.enter(self.folder, name, words) if w != "--pid"]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def state(self) -> State:
        return msgspec.json.decode(self.command("status", "-o", "json").stdout, type=State)

    def node(self, name: str) -> NodeState:
        return next(node for node in self.state().nodes if node.name == name)

    def address(self, pod: str, family: int) -> str:
        addresses = {p.name: p.addresses for node in self.state().nodes for p in node.pods}[pod]
        return next(a for a in addresses if (":" in a) == (family == 6))

    def routes(self, name: str, *words: str) -> list[dict[str, Any]]:
        """Routes of both families as ``ip -j`` tells them, ``dst`` with its prefix length."""
        found = []
        for family, length in (("-4", 32), ("-6", 128)):
            for route in json.loads(self.inside(name, "ip", family, "-j", "-N", "route", "show", *words) or "[]"):
                if route["dst"] != "default" and "/" not in route["dst"]:
                    route["dst"] += f"/{length}"
                found.append(route)
        return found

    def restarted(self, node: str, part: str, before: int, *, limit: float = 60) -> None:
        """Waits until the process has been started more than ``before`` times again."""

        def probe() -> bool:
            process = self.node(node).processes[part]
            return process.state == "running" and process.restarts > before

        eventually(probe, limit=limit)

    def whole(self, *, limit: float = 60) -> None:
        """Waits until every pod reaches every other."""
        eventually(lambda: self.command("matrix", check=False).returncode == 0, limit=limit)


class Ping:
    """50 a second from one pod to another, both families, until ``lost()`` is asked."""

    def __init__(self, lab: Lab, sender: str, receiver: str) -> None:
        self._processes = [
            lab.spawn(sender, "ping", f"-{family}", "-n", "-i", "0.02", "-W", "2", lab.address(receiver, family))
            for family in (4, 6)
        ]
        self._said: list[list[str]] = [[], []]
        self._readers = [
            threading.Thread(target=lambda p=p, said=said: said.extend(p.stdout), daemon=True)
            for p, said in zip(self._processes, self._said, strict=True)
        ]
        for reader in self._readers:
            reader.start()
        eventually(lambda: all(len(said) > 10 for said in self._said))

    def lost(self) -> list[int]:
        """Ends it; how many got no answer, IPv4 and IPv6."""
        for process in self._processes:
            process.send_signal(2)
        lost = []
        for process, reader, said in zip(self._processes, self._readers, self._said, strict=True):
            process.wait(timeout=60)
            reader.join(timeout=60)
            counts = re.search(r"(\d+) packets transmitted, (\d+) received", "".join(said[-5:]))
            assert counts, "".join(said[-5:])
            sent, received = map(int, counts.groups())
            assert sent > 20
            # The one that was under way when it was told to end has no answer yet.
            numbers = [int(n) for n in re.findall(r"icmp_seq=(\d+)", "".join(said))]
            lost.append(sent - received - (1 if max(numbers) < sent else 0))
        return lost


class Silence:
    """Listens to ``ip monitor route`` in some namespaces."""

    def __init__(self, lab: Lab, *names: str) -> None:
        self._monitors = {name: lab.spawn(name, "ip", "monitor", "route") for name in names}
        # A monitor that does not listen yet would hear nothing: a route that comes and goes shows that it does.
        for name, monitor in self._monitors.items():
            os.set_blocking(monitor.stdout.fileno(), False)  # type: ignore[union-attr]
            heard: list[str] = []

            def listens(name: str = name, heard: list[str] = heard) -> bool:
                lab.inside(name, "ip", "route", "replace", "blackhole", "192.0.2.0/32")
                lab.inside(name, "ip", "route", "del", "blackhole", "192.0.2.0/32")
                heard.append(self._read(name))
                return "Deleted blackhole 192.0.2.0" in "".join(heard)

            eventually(listens)
        for name in names:
            # What it says of the last mark is all that it says of any.
            lab.inside(name, "ip", "route", "replace", "blackhole", "192.0.2.1/32")
            lab.inside(name, "ip", "route", "del", "blackhole", "192.0.2.1/32")
            said: list[str] = []

            def told(name: str = name, said: list[str] = said) -> bool:
                said.append(self._read(name))
                return "Deleted blackhole 192.0.2.1" in "".join(said)

            eventually(told)

    def _read(self, name: str) -> str:
        try:
            return os.read(self._monitors[name].stdout.fileno(), 1 << 16).decode()  # type: ignore[union-attr]
        except BlockingIOError:
            return ""

    def heard(self) -> dict[str, str]:
        """Ends the listening; what each heard, the silent ones left out."""
        heard = {}
        for name, monitor in self._monitors.items():
            text = self._read(name)
            monitor.kill()
            monitor.wait()
            monitor.stdout.close()  # type: ignore[union-attr]
            if text:
                heard[name] = text
        return heard


def processes(folder: Folder) -> list[str]:
    """Command lines of every process that was started for the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes()
        except OSError:
            continue  # it has ended
        if os.fsencode(folder.path) in words:
            found.append(words.replace(b"\0", b" ").decode())
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("e2e") / "lab")
    with lab_ends_with_us(lab.folder.path):
        yield lab
