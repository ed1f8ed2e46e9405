"""``python3 -m agent.waiting``: a container's postStart hook. It returns when the agent of this very container does its
work and is settled, so that no probe asks before, and an upgrade goes on to the next node only then.

``--wait`` seconds after that agent has begun it returns all the same, and says what is missing: who waits for a dead
router, or for an API server, is not to be ended for that. From then on the probes tell.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cni.peer import is_visible

_POLL: Final = 0.1
_REQUEST: Final = b"GET /settled HTTP/1.0\r\n\r\n"


def main(argv: Sequence[str] | None = None) -> None:
    run = os.environ.get("UNDERLAY_RUN") or "/run/underlay"
    parser = argparse.ArgumentParser(prog="agent.waiting", description="Waits for the agent of this container.")
    parser.add_argument("--run", type=Path, default=Path(run), help="run directory of the agent (UNDERLAY_RUN)")
    parser.add_argument("--wait", type=float, default=150.0, help="seconds to wait")
    asked = parser.parse_args(argv)
    end = float("inf")
    while True:
        here, problem = missing(asked.run / "agent.sock")
        if here:
            end = min(end, time.monotonic() + asked.wait)
        if not problem:
            return
        if time.monotonic() > end:
            print(f"not settled after {asked.wait:.0f} s: {problem}")
            return
        time.sleep(_POLL)


def missing(path: Path, *, limit: float = 5.0) -> tuple[bool, str]:
    """Whether the agent behind this socket is ours, and why it is not settled; "" if it is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(str(path))
            if not is_visible(connection):
                return False, "another container's agent works still"
            connection.sendall(_REQUEST)
            said = connection.makefile("rb").read()
        except OSError as e:
            return False, f"{path}: {e.strerror or e}"
    head, _, body = said.partition(b"\r\n\r\n")
    settled = head.split(b" ")[1:2] == [b"200"]
    return True, "" if settled else body.decode(errors="replace").strip() or "no answer"


if __name__ == "__main__":
    main()
