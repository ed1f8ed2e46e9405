"""How long a bare ``underlayctl get ippools`` takes to answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.spawn import timed
from bench.stats import Times

CTL = str(Path(sys.executable).parent / "underlayctl")
RUNS = 20
WARM_UP = 2

POOL = "apiVersion: underlay.network/v1\nkind: IPPool\nmetadata: {name: pods}\nspec: {cidr: 10.244.0.0/16}\n"


def figures(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """``ctl.get_s``: the median, in seconds."""
    say(f"ctl: {RUNS} times get")
    folder.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:{folder}/store.db"
    subprocess.run([CTL, "--store", store, "apply", "-f", "-"], input=POOL, text=True, check=True, capture_output=True)
    argv = [CTL, "get", "ippools", "--store", store]
    times = [timed(argv, os.environ, stdin=Path(os.devnull), stdout=folder / "out") for _ in range(WARM_UP + RUNS)]
    return {"ctl.get_s": Times(tuple(times[WARM_UP:])).p50}
