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
from tests.conftest import lab_ends_with_us


@functools.cache
def _missing() -> str:
    try:
        find()
        needs.options(bare=True)
    except (NotHere, LabError) as e:
        return str(e)
    return ""


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
    with _watched(tmp_path_factory.mktemp("cluster") / "lab") as made:
        made.up("--bare", "--racks", "2", "--nodes", "2")
        made.install()
        made.ready()
        yield made


@pytest.fixture
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """``bare("--mesh", "--nodes", "2")`` brings up a cluster for this test alone, on which nothing is installed."""
    with contextlib.ExitStack() as stack:

        def make(*options: str) -> Cluster:
            made = stack.enter_context(_watched(tmp_path_factory.mktemp("cluster") / "lab"))
            made.up("--bare", *options)
            return made

        yield make


@contextlib.contextmanager
def _watched(path: Path) -> Iterator[Cluster]:
    with lab_ends_with_us(path):
        yield Cluster(path)
