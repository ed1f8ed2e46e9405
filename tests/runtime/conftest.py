"""Real runtimes in namespaces of the test: what the tests of this folder share."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pytest

from cni import install
from ipam import journal
from lab import busybox, gobuild
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import NODE, Plugin
from tests.runtime import cnitool, sid
from tests.runtime.containerd import IMAGE, RELEASES, Containerd, Release, fetch

#: cgroup v1 has a folder a controller, v2 is one tree.
CGROUPS = Path("/sys/fs/cgroup")
#: For a test that runs with each release; and for one that runs with containerd 2 alone.
V2 = pytest.param("2", marks=pytest.mark.containerd_2)
BOTH = pytest.mark.parametrize("node", ["1.6", V2], indirect=True)
ONLY_V2 = pytest.mark.parametrize("node", [V2], indirect=True)
#: The reference plugins, as Debian has them.
REFERENCE = Path("/usr/lib/cni")
_FAILED = pytest.StashKey[bool]()


class Node:
    """A node that runs pods: its CNI server (ipam's times shortened) and its containerd."""

    addresses = ("198.51.100.1", "2001:db8:1::1")

    def __init__(self, folder: Path, shim: Path, tar: Path, release: Release = RELEASES["1.6"]) -> None:
        self.plugin = Plugin(Net(folder), folder, shim)
        self.plugin.net.address(NODE, "lo", [f"{a}/{128 if ':' in a else 32}" for a in self.addresses])
        self.plugin.start()
        self.containerd = Containerd(self.plugin.net, NODE, folder / "containerd", self.plugin.run, release)
        self.containerd.install(shim, self.plugin.run)
        self.containerd.start()
        self.containerd.load(tar)
        self.containerd.ready()

    def begin(self) -> None:
        """As by default again, and no call noted yet."""
        self.containerd.forget()
        self.reconfigure()

    def put(self, conflist: dict[str, Any]) -> None:
        """Rewrites the conflist, as an installer does."""
        shim = self.containerd.home / "witness"
        install.install(shim, self.containerd.bin, self.containerd.conf, configuration=conflist)

    def reconfigure(self, chain: Sequence[Mapping[str, Any]] = (), **more: Any) -> None:
        """Rewrites the conflist and waits until containerd goes by it."""
        wanted = install.conflist(chain=tuple(chain), **more)
        self.put(wanted)
        eventually(lambda: self.containerd.cri.network() == wanted)

    def waits(self, container: str) -> bool:
        """A shim has called for that container and has no answer yet."""
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                # By its name: it runs in another mount namespace, whose paths may begin elsewhere.
                shim = environment.with_name("exe").readlink().name == self.plugin.shim.name
                if shim and f"CNI_CONTAINERID={container}\0".encode() in environment.read_bytes():
                    return "unix_stream" in environment.with_name("wchan").read_text()
        return False

    def kill_server(self) -> None:
        """SIGKILL to the CNI server; the next one starts at once."""
        self.plugin.server.kill()
        self.plugin.server.wait(60)
        self.plugin.server = self.plugin.spawn()

    def fetch(self, address: str, port: int) -> str:
        """What a web server answers to the node; "" if there is none."""
        with self.plugin.net.inside(NODE):
            return fetch(address, port)

    def leases(self) -> int:
        """How many attachments have addresses, as the journal says."""
        return len(journal.read(next(self.plugin.run.glob("journal-*"))).leases)

    def clean(self) -> bool:
        """Nothing is left of any pod, anywhere."""
        assert not self.containerd.cri.sandboxes()
        assert not list((self.plugin.run / "queue").glob("*"))
        assert not self.leases()
        return self.plugin.nothing_left()

    def logs(self) -> str:
        logs = (self.plugin.log, self.containerd.log, self.containerd.home / "calls")
        return "\n".join(f"--- {log}\n{log.read_text()[-6000:]}" for log in logs)

    def close(self) -> None:
        self.containerd.close()
        self.plugin.net.close()


class Closes(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closes)


class Shared(Generic[T]):
    """One thing for many tests, and another one after a test that failed or did not leave it as it was."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: T | None = None

    def get(self) -> T:
        if self._made is None:
            self._made = self._make()
        return self._made

    def drop(self) -> None:
        if self._made is not None:
            self._made.close()
            self._made = None

    @contextlib.contextmanager
    def lend(self, test: pytest.Item, clean: Callable[[T], object], logs: Callable[[T], str]) -> Iterator[T]:
        """For one test, at whose end ``clean`` must not raise."""
        made = self.get()
        yield made
        failed = True
        try:
            failed = test.stash.get(_FAILED, False)
            clean(made)
        except BaseException:
            failed = True
            raise
        finally:
            if failed:
                print(logs(made))
                self.drop()


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "busybox.tar"
    busybox.write(path, IMAGE)
    return path


@pytest.fixture
def reference() -> Path:
    """The folder of the reference plugins."""
    return REFERENCE


@pytest.fixture(scope="session")
def nodes(
    tmp_path_factory: pytest.TempPathFactory, shim_c: Path, busybox_tar: Path
) -> Iterator[dict[str, Shared[Node]]]:
    """A node of each release of containerd."""

    def make(release: Release) -> Node:
        return Node(tmp_path_factory.mktemp("node"), shim_c, busybox_tar, release)

    made = {name: Shared(functools.partial(make, release)) for name, release in RELEASES.items()}
    yield made
    for each in made.values():
        each.drop()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "containerd_2: runs containerd 2, where it can be had")


@functools.cache
def _no_containers() -> str:
    """Why containerd cannot run here; "" if it can."""
    programs = ("containerd", "ctr", "runc", "/bin/busybox", "/usr/lib/cni/loopback", "/usr/lib/cni/portmap")
    if absent := [program for program in programs if not shutil.which(program)]:
        return f"no {', '.join(absent)} on this machine: 'sh lab/prepare.sh test' says what to install"
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        return "containers need root's own user namespace: run as root"
    folder = CGROUPS / "pids" if (CGROUPS / "pids").is_dir() else CGROUPS
    try:
        (folder / f"underlay-test-{os.getpid()}").mkdir()
        (folder / f"underlay-test-{os.getpid()}").rmdir()
    except OSError as e:
        return f"containers need cgroups, and none can be made: {e}"
    return ""


def _no_plugins() -> str:
    absent = [kind for kind in ("portmap", "bandwidth", "tuning") if not (REFERENCE / kind).exists()]
    return f"no {', '.join(absent)} in {REFERENCE}: 'sh lab/prepare.sh test' says what to install" if absent else ""


def _no_cnitool() -> str:
    folder = gobuild.cache(cnitool.module())
    return _no_plugins() or ("" if folder.is_dir() else f"{folder} is not there: 'make runtimes' builds it")


def _no_containerd_2() -> str:
    folder = sid.folder()
    return "" if folder.is_dir() else f"no {folder}: 'make runtimes' fills it, if Debian's unstable has containerd 2"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips here and not in the fixture: pytest says one line for all tests that are skipped in one place."""
    asked = getattr(item, "fixturenames", ())
    needs = {"busybox_tar": _no_containers, "cnitool": _no_cnitool, "reference": _no_plugins}
    if why := next((why for name, look in needs.items() if name in asked and (why := look())), ""):
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI skips nothing: {why}", pytrace=False)
        pytest.skip(why)
    # What Debian's unstable has is not ours to promise, so this is skipped in CI, too.
    if item.get_closest_marker("containerd_2") and (why := _no_containerd_2()):
        pytest.skip(why)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = report.failed or item.stash.get(_FAILED, False)
    return report


@pytest.fixture
def node(nodes: dict[str, Shared[Node]], request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node without pods, which must be left as it was; of the release that the test is parametrized with, or 1.6."""
    with nodes[getattr(request, "param", "1.6")].lend(request.node, Node.clean, Node.logs) as made:
        made.begin()
        yield made
