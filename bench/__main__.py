"""``make bench``: measures, prints a table, writes build/bench.json."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tabulate import tabulate

from bench import bgp, cluster, cni, command, ipam, profile, rack, scale
from lab.kube.build import NotHere
from lab.net import enter_sandbox

RESULT = Path(__file__).parents[1] / "build" / "bench.json"
Group = Callable[[Path, Callable[[str], None]], dict[str, float]]
#: What is measured if no group is named.
USUAL: Mapping[str, Group] = {
    "ctl": command.figures,
    "cni": cni.figures,
    "ipam": ipam.figures,
    "bgp": bgp.figures,
    "lab": rack.figures,
}
#: And what looks closer, or takes more than a minute or two.
GROUPS: Mapping[str, Group] = {**USUAL, "profile": profile.figures, "scale": scale.figures, "cluster": cluster.figures}


def main() -> None:
    """Exits with 1 if a group could not be measured; the others are printed and written all the same. A group whose
    programs this machine does not have is left out."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures; writes build/bench.json.")
    parser.add_argument("group", nargs="*", help=f"{', '.join(GROUPS)}; none is {', '.join(USUAL)}")
    parser.add_argument("--against", type=Path, metavar="TREE", help="profile: another working copy, in turn with this")
    asked = parser.parse_args()
    chosen = asked.group or list(USUAL)
    groups = {**GROUPS, "profile": partial(profile.figures, against=asked.against)}
    for name in chosen:
        if name not in GROUPS:
            parser.error(f"there is no group {name}: {', '.join(GROUPS)}")
    enter_sandbox()
    # Also one that is ended under way takes down what it brought up.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="ulbench-") as folder:
        found, failed = measure({name: groups[name] for name in chosen}, Path(folder), say)
    rows = [(name, f"{value:.3g}") for name, value in found.items()]
    print(
        tabulate(rows, headers=("figure", "value"), tablefmt="plain", disable_numparse=True, colalign=("left", "right"))
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def measure(
    groups: Mapping[str, Group], folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """The figures, and the groups that failed; each has a folder of its own."""
    found: dict[str, float] = {}
    failed: list[str] = []
    for name, group in groups.items():
        try:
            found |= group(folder / name, say)
        except NotHere as e:
            say(f"{name}: left out: {e}")
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return found, failed


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
