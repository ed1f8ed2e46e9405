"""containerd 2 and the reference plugins of its time, from Debian's unstable packages: unpacked in a folder, never
installed.

``python -m tests.runtime.sid`` gets them, once, and prints the folder. Tests only look.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("containerd", "containernetworking-plugins")
#: Debian's own, so that what comes is Debian's.
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: Seconds.
LIMIT = 300


class NotThere(Exception):
    """The packages cannot be had; the message says why."""


def folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where they are, if they are there: their ``/``."""
    root = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache")
    return root / "underlay" / "containerd-2"


def ensure() -> Path:
    """``folder``, filled if need be. NotThere."""
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name("containerd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _fetch(target)
    return target


def _fetch(target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for path in ("lists/partial", "cache/archives/partial", "packages", "root"):
            (part / path).mkdir(parents=True)
        source = f"[signed-by={KEYS}]" if KEYS.exists() else ""
        (part / "sources.list").write_text(f"deb {source} {_mirror()} sid main\n")
        print("getting containerd 2 from Debian's unstable packages, once", file=sys.stderr, flush=True)
        _apt(part, "update")
        _apt(part, "download", *PACKAGES)
        for package in (part / "packages").glob("*.deb"):
            _run(["dpkg", "-x", str(package), str(part / "root")], part)
        _run([str(part / "root/usr/bin/containerd"), "--version"], part)
        (part / "root").rename(target)
    except OSError as e:
        raise NotThere(f"containerd 2: {e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _mirror() -> str:
    """Where this machine's own packages come from."""
    for line in _run(["apt-get", "indextargets", "--format", "$(SITE)"], Path("/")).splitlines():
        if line.startswith("http") and not line.endswith("security"):
            return line
    raise NotThere("containerd 2: this machine has no source of Debian packages")


def _apt(part: Path, *words: str) -> None:
    options = {
        "Dir::State::lists": part / "lists",
        "Dir::Cache": part / "cache",
        "Dir::Etc::sourcelist": part / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    argv = ["apt-get", *(word for key, value in options.items() for word in ("-o", f"{key}={value}")), *words]
    _run(argv, part / "packages")


def _run(argv: list[str], cwd: Path) -> str:
    try:
        done = subprocess.run(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NotThere(f"containerd 2: {e}") from e
    if done.returncode != 0:
        raise NotThere(f"containerd 2: {argv[0]} {argv[-1]}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def main() -> int:
    """0: the folder is on stdout, or why there is none on stderr: unstable changes, and is no reason to fail."""
    try:
        print(ensure())
    except NotThere as e:
        print(f"{e}; tests that need it are skipped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
