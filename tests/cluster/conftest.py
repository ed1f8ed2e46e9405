"""Real clusters: ``cluster`` is this session's, with Underlay installed; ``bare`` makes one of a test's own.

They are labs (docs/lab.md). None outlives this process, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.cluster import needs
from lab.errors import LabError
from lab.kube.build import NotHere, find
from tests.cluster.cluster import Cluster
from tests.cluster.docpages import SHARED, Page
from tests.conftest import lab_ends_with_us

HERE = Path(__file__).parent


@functools.cache
def _missing() -> str:
    try:
        find()
        needs.options(bare=True)
    except (NotHere, LabError) as e:
        return str(e)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole clusters come up within some of these tests, beside the other parts of ``make test``. Those that do without
    ``cluster`` come first: once it is up, its four nodes take half a core until the session ends."""
    places = [place for place, item in enumerate(items) if item.path.is_relative_to(HERE)]
    here = [items[place] for place in places]
    for place, item in zip(places, sorted(here, key=_shares), strict=True):
        items[place] = item
    for item in here:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


def _shares(item: pytest.Item) -> bool:
    """Whether it is a test on the cluster of this session."""
    asked: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    page = asked.get("page")
    return "cluster" in getattr(item, "fixturenames", ()) or (isinstance(page, Page) and page.on == SHARED)


def pytest_runtest_setup() -> None:
    """Here and not in a fixture: pytest says one line for all tests that are skipped in one place."""
    if _missing() and os.environ.get("CI") == "true":
        pytest.fail(f"CI skips nothing: {_missing()}", pytrace=False)
    if _missing():
        pytest.skip(_missing())


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two racks of two nodes (node-1 and node-2 behind tor-1, the others behind tor-2), Underlay from ``manifests/``.
    Shared by all: a test has a Namespace of its own, and leaves nodes and Underlay as it found them."""
    with watched(tmp_path_factory.mktemp("cluster") / "lab") as made:
        made.up("--bare", "--racks", "2", "--nodes", "2")
        made.install()
        made.ready()
        yield made


@pytest.fixture
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """``bare("--mesh", "--nodes", "2")`` brings up a cluster for this test alone, on which nothing is installed."""
    with contextlib.ExitStack() as stack:

        def make(*options: str) -> Cluster:
            made = stack.enter_context(watched(tmp_path_factory.mktemp("cluster") / "lab"))
            made.up("--bare", *options)
            return made

        yield make


@contextlib.contextmanager
def watched(path: Path) -> Iterator[Cluster]:
    """A cluster to be brought up in this folder; it ends with this process at the latest."""
    with lab_ends_with_us(path):
        yield Cluster(path)
