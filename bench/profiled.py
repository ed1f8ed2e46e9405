"""``underlay-cni`` with a clock at each part of a call, for ``bench.profile``.

Run by its path, with the working copy to be measured as PYTHONPATH: so it imports nothing of ``bench``. Calls must come
one after another. Each one is a line of JSON in the file named first: the command, when its request was there and when
it was answered (nanoseconds, monotonic), and what each part took besides the parts within it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cni import daemon, message, netlink, netns, podnet, rtnl, spec
from ipam import journal, node

#: What is timed, and the part that it is of.
PARTS = (
    (message, "decode", "decode"),
    (spec, "parse", "parse"),
    (node.NodeIPAM, "take", "take an address"),
    (node.NodeIPAM, "bind", "note the link"),
    (node.NodeIPAM, "give_back", "give back"),
    (journal.Journal, "append", "journal"),
    (podnet, "wire", "wire: the rest"),
    (podnet, "unwire", "unwire: the rest"),
    (podnet, "pair", "pack"),
    (podnet, "pod_end", "pack"),
    (podnet, "node_end", "pack"),
    (netns, "setns", "enter and leave the pod"),
    (netlink.Netlink, "__init__", "socket in the pod"),
    (netlink.Netlink, "close", "close that socket"),
    (netlink.Netlink, "make", "kernel: make the pair"),
    (netlink.Netlink, "batch", "kernel: batch"),
    (netlink.Netlink, "get", "kernel: find the link"),
    (netlink.Netlink, "carrier", "kernel: carrier"),
    (rtnl, "read_link", "read the link"),
    (spec, "result", "result"),
    (message, "encode_answer", "encode the answer"),
)


class Clock:
    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", buffering=1)  # noqa: SIM115 - as long as the process
        self._within = [0]  # what parts within took, for each open part
        self._parts: dict[str, int] = {}
        self._batches = 0
        self._began = 0

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            begin = time.monotonic_ns()
            self._began = self._began or begin
            self._within.append(0)
            try:
                return function(*arguments, **more)
            finally:
                self._end(name, begin)

        async def timed_async(*arguments: Any, **more: Any) -> Any:
            begin = time.monotonic_ns()
            self._within.append(0)
            try:
                return await function(*arguments, **more)
            finally:
                self._end(name, begin)

        return timed_async if name.startswith("take") else timed

    def _end(self, name: str, begin: int) -> None:
        took = time.monotonic_ns() - begin
        inner = self._within.pop()
        self._within[-1] += took
        if name == "kernel: batch":
            self._batches += 1
            name = f"{name} {self._batches}"
        self._parts[name] = self._parts.get(name, 0) + took - inner

    def step(self, name: str) -> None:
        command, _, what = name.partition("-")
        if what != "answered":
            return
        now = time.monotonic_ns()
        if self._began:
            record = {"command": command.upper(), "began": self._began, "ended": now, "parts": self._parts}
            self._file.write(json.dumps(record) + "\n")
        self._parts, self._within, self._batches, self._began = {}, [0], 0, 0


def main() -> None:
    clock = Clock(sys.argv[1])
    for owner, name, part in PARTS:
        # Another working copy may be without it: then it counts as what calls it.
        if (function := getattr(owner, name, None)) is not None:
            setattr(owner, name, clock.part(part, function))
    daemon.start(sys.argv[2:], step=clock.step)


if __name__ == "__main__":
    main()
