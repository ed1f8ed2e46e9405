"""underlay-cni with ipam's times shortened, which ends itself by SIGKILL when it first passes a step.

faulty_cni.py STEP|none FLAGS...

While the file that UNDERLAY_TEST_INTERRUPTED names is there, every dump of the kernel says that it was interrupted.
UNDERLAY_TEST_SETTINGS holds, as JSON, other times of ipam's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cni import daemon, netlink
from ipam.model import Settings

#: An address rests longer than any test takes: that it is not handed out again is no matter of the machine's load.
FAST = Settings(sweep=0.2, unwired=0.4, rest=3600.0, blackhole_limit=0.3, batch=0.05)


def interrupt(flag: Path) -> None:
    """Adds to every end of a dump what the kernel says there when its tables changed meanwhile."""
    receive = netlink.Netlink._receive

    def interrupted(self: netlink.Netlink) -> Iterator[tuple[int, int, bytes, int]]:
        for kind, sequence, body, flags in receive(self):
            more = netlink.NLM_F_DUMP_INTR if kind == netlink._DONE and flag.exists() else 0
            yield kind, sequence, body, flags | more

    netlink.Netlink._receive = interrupted  # type: ignore[method-assign]


def main() -> None:
    fatal = sys.argv[1]
    if flag := os.environ.get("UNDERLAY_TEST_INTERRUPTED"):
        interrupt(Path(flag))

    def step(name: str) -> None:
        if name == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = msgspec.structs.replace(FAST, **json.loads(os.environ.get("UNDERLAY_TEST_SETTINGS", "{}")))
    daemon.start(sys.argv[2:], step=step, settings=settings)


if __name__ == "__main__":
    main()
