"""Pages of ``docs/``, run as they stand: ``docpages.py`` says what a page has to keep to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cluster import helm
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import watched
from tests.cluster.docpages import SHARED, Page, Player, chains, pages

# tests/unit/test_docpages.py refuses what is left out here.
_PAGES = list(chains(pages(strict=False)))


class Stage:
    """The cluster that pages are played on now: the next one's takes its place."""

    def __init__(self, request: pytest.FixtureRequest, paths: pytest.TempPathFactory) -> None:
        self._request, self._paths = request, paths
        self._played: list[Page] = []
        self._player: Player | None = None
        self._stack = ExitStack()

    def play(self, page: Page, before: list[Page]) -> None:
        wanted = [*before, page]
        if self._player is None or self._played != wanted[: len(self._played)] or len(self._played) >= len(wanted):
            self.close()
            self._player = Player(
                self._cluster(wanted[0].on),
                self._paths.mktemp("page") / "tree",
                programs=tuple(filter(None, [helm.folder()])),
            )
        for one in wanted[len(self._played) :]:
            self._played.append(one)
            try:
                self._player.play(one)
            except BaseException:
                # Whatever comes after it begins anew.
                self.close()
                raise

    def close(self) -> None:
        self._played, self._player = [], None
        self._stack.close()

    def _cluster(self, options: str) -> Cluster:
        if options == SHARED:
            shared: Cluster = self._request.getfixturevalue("cluster")
            return shared
        made = self._stack.enter_context(watched(self._paths.mktemp("cluster") / "lab"))
        made.lab("up", *options.split(), limit=300)
        return made


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with contextlib.closing(Stage(request, tmp_path_factory)) as made:
        yield made


# A cluster, and all that a page waits for: on a machine that is shared the usual limit is not enough.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("page", "before"), _PAGES, ids=lambda v: v.name if isinstance(v, Page) else "")
def test_a_page_is_true(stage: Stage, page: Page, before: list[Page]) -> None:
    stage.play(page, before)
