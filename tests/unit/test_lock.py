"""Who works when several processes of a kind are there: the newest, and the one before when that ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cni.lock import in_turn
from store.clock import SystemClock


class Worker:
    """A process, as far as the lock knows: flock(2) goes by open file, not by process."""

    def __init__(self, path: Path, journal: list[str], name: str, *, slow: float = 0) -> None:
        self._journal, self._name, self._slow = journal, name, slow
        self.fails = asyncio.Event()
        self.task = asyncio.create_task(in_turn(path, SystemClock(), self._work))

    async def _work(self) -> None:
        self._journal.append(f"{self._name} begins")
        try:
            await self.fails.wait()
            raise ValueError(self._name)
        finally:
            await asyncio.sleep(self._slow)
            self._journal.append(f"{self._name} ends")

    async def end(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
def journal() -> list[str]:
    return []


async def until(journal: list[str], *wanted: str) -> None:
    await _eventually(lambda: journal[-len(wanted) :] == [*wanted])


async def _eventually(true: Callable[[], bool]) -> None:
    end = asyncio.get_running_loop().time() + 60
    while not true():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.01)


def test_a_newer_process_works_once_the_older_one_has_ended_its_work(tmp_path: Path, journal: list[str]) -> None:
    async def story() -> None:
        old = Worker(tmp_path / "lock", journal, "old", slow=0.3)
        await until(journal, "old begins")
        new = Worker(tmp_path / "lock", journal, "new")
        await until(journal, "old begins", "old ends", "new begins")
        # The older one stands by, and asks for nothing.
        await asyncio.sleep(0.5)
        assert journal == ["old begins", "old ends", "new begins"]
        await old.end()
        await new.end()

    asyncio.run(story())
    assert journal == ["old begins", "old ends", "new begins", "new ends"]


def test_the_older_process_works_again_if_the_newer_one_ends_first(tmp_path: Path, journal: list[str]) -> None:
    async def story() -> None:
        old = Worker(tmp_path / "lock", journal, "old")
        await until(journal, "old begins")
        new = Worker(tmp_path / "lock", journal, "new")
        await until(journal, "new begins")
        new.fails.set()
        with pytest.raises(ValueError, match="new"):
            await new.task
        await until(journal, "new ends", "old begins")
        again = Worker(tmp_path / "lock", journal, "again")
        await until(journal, "old ends", "again begins")
        await again.end()
        await old.end()

    asyncio.run(story())


def test_of_many_that_come_at_once_one_works_at_a_time(tmp_path: Path, journal: list[str]) -> None:
    async def story() -> None:
        workers = [Worker(tmp_path / "lock", journal, f"w{n}") for n in range(4)]
        await _eventually(lambda: len({line for line in journal if line.endswith("begins")}) == 4)
        await asyncio.gather(*(worker.end() for worker in workers))

    asyncio.run(story())
    # Each begin but the first comes right after an end.
    assert [line.split()[1] for line in journal] == ["begins", "ends"] * (len(journal) // 2)


def test_who_ends_while_it_waits_or_works_leaves_nothing_behind(tmp_path: Path, journal: list[str]) -> None:
    async def story() -> None:
        old = Worker(tmp_path / "lock", journal, "old", slow=0.5)
        await until(journal, "old begins")
        new = Worker(tmp_path / "lock", journal, "new")
        await asyncio.sleep(0.2)
        await new.end()
        await until(journal, "old begins", "old ends", "old begins")
        await old.end()
        last = Worker(tmp_path / "lock", journal, "last")
        await until(journal, "last begins")
        await last.end()

    asyncio.run(story())
