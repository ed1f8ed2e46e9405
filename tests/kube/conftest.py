"""A real API server for tests: ``cluster`` is shared and put back before each, ``spare`` makes one of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.kube.build import Programs
from lab.kube.cluster import Cluster
from lab.kube.installed import Installed, crds, install


@pytest.fixture(scope="session")
def _shared(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), programs)
    try:
        cluster.start(crds())
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(_shared: Cluster) -> Cluster:
    """The cluster of this session with our kinds, no policies, and nothing of any other test in it."""
    _shared.reset()
    return _shared


@pytest.fixture(scope="session")
def _installed(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    with install(tmp_path_factory.mktemp("installed"), programs, audit=True) as made:
        yield made


@pytest.fixture
def installed(_installed: Installed) -> Installed:
    """A cluster of this session as an operator has it, with an audit log, and nothing of any other test in it."""
    _installed.cluster.reset()
    return _installed


@pytest.fixture
def spare(programs: Programs, tmp_path: Path) -> Iterator[Callable[[], Cluster]]:
    """Makes clusters that are not shared and not started: for two at once, or to break beyond repair."""
    made: list[Cluster] = []

    def make() -> Cluster:
        made.append(Cluster(tmp_path / f"cluster-{len(made)}", programs))
        return made[-1]

    try:
        yield make
    finally:
        for cluster in made:
            cluster.close()
