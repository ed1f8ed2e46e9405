"""What changes in a kernel: links, addresses, routes, next hops, rules, neighbours, nftables."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from lab import client
from tests.cluster.cluster import LIMIT, Cluster
from tests.conftest import eventually

_WHAT: Final = ("link", "address", "route", "nexthop", "rule", "neigh")
_NEIGHBOUR: Final = re.compile(r"^(\S+) dev (\S+) (?:proto \S+ )?lladdr (\S+)")


class Monitor:
    """Of one node or router."""

    def __init__(self, cluster: Cluster, member: str) -> None:
        self._cluster, self.member = cluster, member
        self._neighbours = set(_neighbours(cluster.node_exec(member, "ip", "neigh")))
        self._processes = [self._follow("ip", "-o", "monitor", *_WHAT), self._follow("nft", "monitor")]
        self._marks = 0

    def begin(self) -> None:
        """Returns once all of them tell what happens."""
        self._said = [b"" for _ in self._processes]
        eventually(self._mark, limit=LIMIT)

    def changes(self) -> list[str]:
        """Everything since ``begin``, but what a neighbour that was there before is asked and answers."""
        eventually(self._mark, limit=LIMIT)
        self.kill()
        lines = [line for said in self._said for line in said.decode(errors="replace").splitlines()]
        return [line for line in lines if not _OURS.search(line) and not self._is_known(line) and _is_news(line)]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def _follow(self, *words: str) -> subprocess.Popen[bytes]:
        argv = client.enter(self._cluster.folder, self.member, ("stdbuf", "-oL", *words))
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def _mark(self) -> bool:
        """Something of our own, that each must tell."""
        self._marks += 1
        table, route = f"{_MARK}{self._marks}", f"198.51.100.{self._marks % 256}"
        done = " && ".join(f"nft {how} table ip {table}" for how in ("add", "delete"))
        done += "".join(f" && ip route {how} {route} dev lo" for how in ("add", "delete"))
        self._cluster.node_exec(self.member, "sh", "-c", done)
        for place, process in enumerate(self._processes):
            assert process.stdout
            self._said[place] += process.stdout.read() or b""
        return all(mark.encode() in said for mark, said in zip((route, table), self._said, strict=True))

    def _is_known(self, line: str) -> bool:
        return bool(self._neighbours.intersection(_neighbours(line)))


_MARK: Final = "ulmark"
_OURS: Final = re.compile(rf"{_MARK}|198\.51\.100\.")


def _neighbours(text: str) -> Iterator[tuple[str, ...]]:
    for line in text.splitlines():
        found = _NEIGHBOUR.match(line)
        if found:
            yield found.groups()


def _is_news(line: str) -> bool:
    """Neither what nft says of the process behind a change, nor what the kernel forgets of groups and of itself, which
    nobody resolves (neigh, NUD_NOARP)."""
    return bool(line.strip()) and not line.startswith("# new generation") and "NOARP" not in line


@contextmanager
def nothing_changes(cluster: Cluster, *members: str) -> Iterator[None]:
    """In the kernel of these while the block runs."""
    monitors: list[Monitor] = []
    try:
        for member in members:
            monitors.append(Monitor(cluster, member))
            monitors[-1].begin()
        yield
        found = {monitor.member: monitor.changes() for monitor in monitors}
    finally:
        for monitor in monitors:
            monitor.kill()
    assert not any(found.values()), found
