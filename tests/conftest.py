"""Every test runs in mount and network namespaces of the test process: nothing reaches the machine, nothing stays."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

from lab.kube.build import NotHere, Programs, find
from lab.net import Net, enter_sandbox

T = TypeVar("T")
_ROOT = Path(__file__).resolve().parents[1]


# How long an example takes is the machine's matter, which may be busy.
settings.register_profile("underlay", deadline=None)
settings.load_profile("underlay")


def pytest_configure(config: pytest.Config) -> None:
    # Where the machine has this set, each of a thousand agents, servers and labs would compile all of us anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if os.geteuid() != 0:
        raise pytest.UsageError("tests need root in a namespace: run 'make test', or 'unshare -Ur pytest ...'")
    enter_sandbox()


@functools.cache
def _looked() -> Programs | str:
    """The programs of a control plane, or why there are none."""
    try:
        return find()
    except NotHere as e:
        return str(e)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips here and not in the fixture: pytest says one line for all tests that are skipped in one place."""
    found = _looked() if "programs" in getattr(item, "fixturenames", ()) else None
    if isinstance(found, str):
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI skips nothing: {found}", pytrace=False)
        pytest.skip(found)


@pytest.fixture(scope="session")
def programs() -> Programs:
    """etcd, API server and controller-manager. Tests that ask for them, or for a cluster, are skipped without."""
    found = _looked()
    assert not isinstance(found, str), found
    return found


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    network = Net(tmp_path)
    try:
        yield network
    finally:
        network.close()


@pytest.fixture(scope="session")
def shim_c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shim.c, built as the Makefile does."""
    return build_shim("gcc", tmp_path_factory.mktemp("shim") / "underlay")


def build_shim(compiler: str, program: Path) -> Path:
    source = _ROOT / "cni/shim"
    subprocess.run([compiler, f"@{source}/flags", "-Werror", "-o", program, source / "shim.c"], check=True)
    return program


def eventually(probe: Callable[[], T], *, limit: float = 60, every: float = 0.05) -> T:
    """Polls until ``probe`` returns something true without raising AssertionError; at the limit its last failure is
    the test's. The limit is for what would never come: on a machine with other work everything comes later."""
    end = time.monotonic() + limit
    while True:
        try:
            value = probe()
            if value:
                return value
            problem: AssertionError | None = None
        except AssertionError as e:
            problem = e
        if time.monotonic() > end:
            raise problem or AssertionError(f"still {value!r} after {limit} s")
        time.sleep(every)


def usable(net: Net, *names: str) -> None:
    """Waits for the namespaces' IPv6 addresses: without duplicate detection, too, a worker of the kernel's does it."""
    show = ["ip", "-6", "-oneline", "address", "show", "scope", "global", "tentative"]
    eventually(lambda: not any(net.run(name, show).stdout for name in names))


#: Is told a command line, waits until nobody has the other end any more, then runs it. It is not told as an argument:
#: tests look for processes that name a lab's folder.
_WATCHER = "import json, subprocess, sys; subprocess.run(json.loads(sys.stdin.read()), check=False)"


@contextlib.contextmanager
def lab_ends_with_us(path: Path) -> Iterator[None]:
    """The lab of that folder is down at the end; also at the end of this process, if it is killed before."""
    down = [str(Path(sys.executable).parent / "underlay-lab"), "down", "--dir", str(path)]
    argv = [sys.executable, "-c", _WATCHER]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as watcher:
        assert watcher.stdin
        watcher.stdin.write(json.dumps(down).encode())
        watcher.stdin.flush()
        try:
            yield
        finally:
            watcher.stdin.close()
            watcher.wait()
