"""underlay-cni with ipam's times shortened, which ends itself by SIGKILL when it first passes a step.

faulty_cni.py STEP|none FLAGS...
"""

from __future__ import annotations

import os
import signal
import sys

from cni import daemon
from ipam.model import Settings

FAST = Settings(sweep=0.2, unwired=0.4, rest=1.0, blackhole_limit=0.3, batch=0.05)


def main() -> None:
    fatal = sys.argv[1]

    def step(name: str) -> None:
        if name == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    daemon.start(sys.argv[2:], step=step, settings=FAST)


if __name__ == "__main__":
    main()
