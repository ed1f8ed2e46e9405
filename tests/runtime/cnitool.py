"""libcni's own ``cnitool``, and a command of ours for what that cannot say: built once, as ``make test`` does.

``python -m tests.runtime.cnitool`` prints the folder. Tests only look.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab import gobuild
from lab.gobuild import Module
from lab.net import Net

_HERE = Path(__file__).resolve().parent / "libcni"
_LIBCNI = "github.com/containernetworking/cni"

#: /var/lib/cni, where libcni keeps results, is a folder of the test for as long as the command runs.
_WITH_CACHE = 'mount --bind "$1" /var/lib && shift && exec "$@"'


def module() -> Module:
    packages = (f"{_LIBCNI}/cnitool", "./cmd/...")
    return Module("cnitool", gobuild.required(_HERE, _LIBCNI), _HERE, packages, takes="half a minute")


class Cnitool:
    """A runtime that is nothing but libcni: a node of ``net``, its plugins, its configuration, its cached results."""

    def __init__(self, net: Net, node: str, plugins: Path, conf: Path, run: Path, cache: Path) -> None:
        self._net, self._node, self.cache = net, node, cache
        cache.mkdir()
        self._folder = gobuild.cache(module())
        self._env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "CNI_PATH": str(plugins),
            "NETCONFPATH": str(conf),
            "UNDERLAY_RUN": str(run),
        }

    def __call__(self, verb: str, pod: str, network: str = "underlay", **more: str) -> tuple[int, str]:
        """Exit code, and what it printed, on either channel."""
        return self._run(["cnitool", verb, network, str(self._net.path(pod))], more)

    def gc(self, valid: str, network: str = "underlay") -> tuple[int, str]:
        """GC with these valid attachments, as JSON; "" for none given."""
        return self._run(["gc", network, valid], {})

    def _run(self, argv: list[str], more: Mapping[str, Any]) -> tuple[int, str]:
        command = [str(self._folder / argv[0]), *argv[1:]]
        inside = ["nsenter", f"--net={self._net.path(self._node)}", "unshare", "--mount", "sh", "-c", _WITH_CACHE, "sh"]
        done = subprocess.run(
            [*inside, str(self.cache), *command],
            env={**self._env, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(gobuild.main(lambda: gobuild.ensure(module())))
