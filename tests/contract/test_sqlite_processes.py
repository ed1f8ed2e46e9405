"""One SQLite file under several processes, and on its bad days: killed writers, damage, a full disk."""
# ruff: noqa: ASYNC240  (what a test does to files is quick, and meant to be in step with the store's calls)

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import store.sqlite
from store.clock import SystemClock
from store.errors import Expired, Unavailable
from store.model import IPAMBlock, IPAMBlockSpec, IPPool, IPPoolSpec, Meta, block_name
from store.sqlite import SqliteStore

#: What each child begins with; ``FILE`` is its first argument.
PRELUDE = """
import asyncio, os, signal, sys, time
from pathlib import Path
import msgspec
from store.base import mutate
from store.clock import SystemClock
from store.errors import StoreError
from store.model import *
from store.sqlite import SqliteStore
FILE = Path(sys.argv[1])
store = SqliteStore(FILE, SystemClock())
def block(i, **meta):
    cidr = f"10.{i >> 10}.{i >> 2 & 255}.{(i & 3) * 64}/26"
    return IPAMBlock(metadata=Meta(name=block_name(cidr), **meta),
                     spec=IPAMBlockSpec(cidr=cidr, pool="pool", node=f"node-{os.getpid()}"))
"""


def child(path: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + code, str(path), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(path, SystemClock(), **options)
    try:
        async with asyncio.timeout(60):
            yield opened
    finally:
        await opened.close()


def pool(name: str, cidr: str) -> IPPool:
    return IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr))


def block(cidr: str) -> IPAMBlock:
    return IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=IPAMBlockSpec(cidr=cidr, pool="pool", node="node-1"))


def sound(path: Path) -> None:
    """SQLite finds no damage, and the log ends at the head, whole."""
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        version, trimmed = db.execute("SELECT version, trimmed FROM head").fetchone()
        rows = [v for (v,) in db.execute("SELECT version FROM changes ORDER BY version")]
        assert rows == list(range(trimmed + 1, version + 1))
    finally:
        db.close()


# -- several processes --------------------------------------------------------------------------------------------


def test_a_watch_hears_of_another_process_by_the_bell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.sqlite, "LOOK_EVERY", 600.0)  # so that only the bell can have told it

    async def main() -> list[float]:
        delays = []
        async with opened(path) as ours, aclosing(ours.watch(IPAMBlock)) as events:
            assert (await anext(events)).type == "synced"
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.01)
            writer = child(
                path,
                """
async def main():
    for i in range(25):
        await asyncio.sleep(0.02)
        await store.create(block(i, annotations={"at": repr(time.monotonic())}))
asyncio.run(main())
""",
            )
            for _ in range(25):
                event = await waiting
                assert event.object is not None
                delays.append(time.monotonic() - float(event.object.metadata.annotations["at"]))
                waiting = asyncio.ensure_future(anext(events))
            assert writer.wait(60) == 0
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        return delays

    delays = sorted(asyncio.run(main()))
    print(f"heard after {delays[12] * 1000:.1f} ms (median), {delays[-1] * 1000:.1f} ms (worst)")
    assert delays[-1] < 60


def test_a_watch_hears_of_a_writer_that_died_before_it_rang(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as ours, aclosing(ours.watch(IPAMBlock)) as events:
            assert (await anext(events)).type == "synced"
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.01)
            writer = child(
                path,
                """
store._ring_all = lambda: os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(store.create(block(0)))
""",
            )
            event = await waiting
            assert event.object is not None
            assert event.object.spec.node == f"node-{writer.pid}"
            assert writer.wait(60) == -signal.SIGKILL

    asyncio.run(main())
    sound(path)


def test_processes_that_start_together_make_one_file_and_lose_no_update(path: Path) -> None:
    code = """
async def main():
    created = 0
    try:
        await store.create(block(0)); created = 1
    except StoreError as e:
        assert type(e).__name__ == "AlreadyExists", e
    def one_more(b):
        return msgspec.structs.replace(b, status=IPAMBlockStatus(used=b.status.used + 1))
    done = 0
    while done < 20:
        try:
            await mutate(store, IPAMBlock, "10-0-0-0-26", one_more, status=True); done += 1
        except StoreError as e:
            assert type(e).__name__ == "Conflict", e
    print(created)
    await store.close()
asyncio.run(main())
"""
    children = [child(path, code) for _ in range(4)]
    outcomes = [(c.communicate(timeout=60)[0].strip(), c.returncode) for c in children]
    assert sorted(outcomes) == [("0", 0)] * 3 + [("1", 0)]

    async def main() -> int:
        async with opened(path) as ours:
            return (await ours.get(IPAMBlock, "10-0-0-0-26")).status.used

    assert asyncio.run(main()) == 80
    sound(path)


def test_a_killed_writer_leaves_a_good_file_with_all_that_it_was_told_was_stored(path: Path) -> None:
    chance = random.Random(7)
    code = """
async def main():
    i = int(sys.argv[2]) * 16384
    while True:
        made = await store.create(block(i))
        print(made.name, flush=True)
        i += 1
asyncio.run(main())
"""
    acknowledged: set[str] = set()
    for round_ in range(5):
        writer = child(path, code, str(round_))
        assert writer.stdout is not None
        acknowledged |= {writer.stdout.readline().strip() for _ in range(5)}
        time.sleep(chance.uniform(0.0, 0.15))
        writer.kill()
        # The last line may have been cut by the kill.
        acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        writer.wait(60)

        async def main() -> set[str]:
            async with opened(path) as ours:
                return {b.name for b in (await ours.list(IPAMBlock)).items}

        stored = asyncio.run(main())
        assert acknowledged <= stored
        # One write at most was done and not yet reported.
        assert len(stored - acknowledged) <= round_ + 1
    sound(path)
    assert len(acknowledged) > 20


def test_calls_wait_asleep_while_another_process_writes(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as ours:
            await ours.create(pool("a", "10.0.0.0/16"))
            holder = sqlite3.connect(path, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(ours.create(pool("b", "10.1.0.0/16")))
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert (await ours.get(IPPool, "a")).name == "a"  # reading needs no lock
            assert not writing.done()
            holder.execute("ROLLBACK")
            holder.close()
            assert (await writing).name == "b"

    asyncio.run(main())


def test_a_file_that_stays_held_is_unavailable_and_then_works_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.sqlite, "BUSY_LIMIT", 0.2)

    async def main() -> None:
        async with opened(path) as ours:
            await ours.create(pool("a", "10.0.0.0/16"))
            holder = sqlite3.connect(path, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable, match="another process"):
                await ours.create(pool("b", "10.1.0.0/16"))
            holder.execute("ROLLBACK")
            holder.close()
            await ours.create(pool("b", "10.1.0.0/16"))

    asyncio.run(main())


def test_only_its_owner_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:

        async def main() -> None:
            async with opened(path) as ours:
                await ours.create(pool("a", "10.0.0.0/16"))
                modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
                assert modes.keys() >= {"store.db", "store.db-wal", "store.db-shm", "store.db-bell"}
                assert set(modes.values()) == {0o600}

        asyncio.run(main())
    finally:
        os.umask(before)


def descriptors() -> list[str]:
    return sorted(str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())


def test_nothing_stays_open_after_close(path: Path) -> None:
    async def main() -> None:
        before = descriptors()
        for _ in range(3):
            async with opened(path) as ours, aclosing(ours.watch(IPPool)) as events:
                await anext(events)
                waiting = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.01)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
        assert descriptors() == before

    asyncio.run(main())


# -- bad days -----------------------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> None:
    async def main() -> None:
        async with opened(path) as ours:
            for call in (ours.get(IPPool, "a"), ours.list(IPPool), ours.create(pool("z", "10.99.0.0/16"))):
                with pytest.raises(Unavailable, match=match) as caught:
                    await call
                assert str(path) in str(caught.value)
            with pytest.raises(Unavailable, match=match):
                await anext(ours.watch(IPPool))

    asyncio.run(main())


@pytest.fixture
def filled(path: Path) -> Path:
    async def main() -> None:
        async with opened(path) as ours:
            await ours.create(pool("a", "10.0.0.0/16"))
            for i in range(200):
                await ours.create(block(f"10.0.{i}.0/26"))

    asyncio.run(main())
    return path


def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"this is somebody's letter, not a database\n" * 50)
    before = path.read_bytes()
    refused(path, "no SQLite database")
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE songs (title)")
    db.commit()
    db.close()
    before = path.read_bytes()
    refused(path, "another program's database")
    assert path.read_bytes() == before


def test_another_layout_is_left_alone(filled: Path) -> None:
    db = sqlite3.connect(filled)
    db.execute("PRAGMA user_version = 2")
    db.close()
    before = filled.read_bytes()
    refused(filled, "layout is number 2")
    assert filled.read_bytes() == before


def test_a_cut_file_is_left_alone(filled: Path) -> None:
    size = filled.stat().st_size
    os.truncate(filled, size // 3)
    before = filled.read_bytes()
    refused(filled, "damaged")
    assert filled.read_bytes() == before


def test_a_damaged_page_is_said_and_a_repaired_file_is_used_without_a_restart(filled: Path) -> None:
    good = filled.read_bytes()
    bad = bytearray(good)
    for page in range(1, len(bad) // 4096):
        bad[page * 4096 : page * 4096 + 64] = b"\xa5" * 64

    async def main() -> None:
        async with opened(filled) as ours:
            filled.write_bytes(bad)
            with pytest.raises(Unavailable, match="damaged"):
                await ours.list(IPAMBlock)
            filled.write_bytes(good)
            assert len((await ours.list(IPAMBlock)).items) == 200

    asyncio.run(main())


def test_one_unreadable_object_harms_only_its_own_kind(filled: Path) -> None:
    db = sqlite3.connect(filled)
    db.execute("UPDATE objects SET body = '{\"kind\": \"IPAMBlock\"' WHERE name = '10-0-7-0-26'")
    db.commit()
    db.close()

    async def main() -> None:
        async with opened(filled) as ours:
            with pytest.raises(Unavailable, match="IPAMBlock 10-0-7-0-26 cannot be read"):
                await ours.list(IPAMBlock)
            assert (await ours.get(IPAMBlock, "10-0-8-0-26")).spec.cidr == "10.0.8.0/26"
            assert (await ours.get(IPPool, "a")).name == "a"

    asyncio.run(main())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere" / "store.db", "nowhere does not exist: make it")


def test_a_folder_in_place_of_the_file(path: Path) -> None:
    path.mkdir()
    refused(path, "cannot be opened")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    path = small_disk / "store.db"

    async def main() -> None:
        stored: dict[str, str] = {}
        async with opened(path) as ours:
            filler = small_disk / "filler"
            filler.write_bytes(b"x" * (200 << 10))
            full = None
            for i in range(2000):
                try:
                    made = await ours.create(block(f"10.{i // 256}.{i % 256}.0/26"))
                except Unavailable as e:
                    full = e
                    break
                stored[made.name] = made.metadata.uid
            assert full is not None, "the disk did not fill up"
            assert "full" in str(full)
            assert str(path) in str(full)
            # Everything that was said to be stored is there, for us and for another reader, and nothing more.
            assert {b.name: b.metadata.uid for b in (await ours.list(IPAMBlock)).items} == stored
            filler.unlink()
            made = await ours.create(block("10.250.0.0/26"))
            stored[made.name] = made.metadata.uid
        sound(path)
        async with opened(path) as again:
            assert {b.name: b.metadata.uid for b in (await again.list(IPAMBlock)).items} == stored

    asyncio.run(main())


def test_a_new_file_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "store.db"
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="space"):
        filler.write_bytes(b"x" * (2 << 20))
    refused(path, "full")
    filler.unlink()

    async def main() -> None:
        async with opened(path) as ours:
            await ours.create(pool("a", "10.0.0.0/16"))

    asyncio.run(main())


def test_a_file_that_is_replaced_while_open_is_noticed(filled: Path, tmp_path: Path) -> None:
    async def main() -> None:
        other = tmp_path / "other.db"
        async with opened(other) as theirs:
            await theirs.create(pool("b", "10.1.0.0/16"))
        async with opened(filled) as ours:
            version = (await ours.list(IPPool)).version
            events = ours.watch(IPPool)
            await anext(events)
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.01)
            for name in ("store.db-wal", "store.db-shm"):
                (tmp_path / name).unlink()
            other.replace(filled)
            with pytest.raises(Unavailable, match="replaced"):
                await waiting
            assert [p.name for p in (await ours.list(IPPool)).items] == ["b"]
            assert int(version) > 0

    asyncio.run(main())


def test_a_file_that_is_removed_while_open_is_not_made_anew(filled: Path) -> None:
    async def main() -> None:
        async with opened(filled) as ours:
            await ours.get(IPPool, "a")
            kept = filled.with_name("kept.db")
            filled.rename(kept)
            for _ in range(3):
                with pytest.raises(Unavailable, match="removed"):
                    await ours.list(IPPool)
            assert not filled.exists()
            kept.rename(filled)
            assert (await ours.get(IPPool, "a")).name == "a"

    asyncio.run(main())


def test_a_version_of_the_file_that_was_here_before_is_expired(path: Path) -> None:
    class Later(SystemClock):
        def now(self) -> str:
            return "2090-01-01T00:00:00Z"

    async def main() -> None:
        async with opened(path) as ours:
            await ours.create(pool("a", "10.0.0.0/16"))
            version = (await ours.list(IPPool)).version
        for file in path.parent.iterdir():
            file.unlink()
        later = SqliteStore(path, Later())
        await later.create(pool("b", "10.1.0.0/16"))
        with pytest.raises(Expired):
            async with asyncio.timeout(60):
                await anext(later.watch(IPPool, since=version))
        await later.close()

    asyncio.run(main())


def test_without_inotify_changes_are_still_heard(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(store.sqlite, "Inotify", none_left)
    monkeypatch.setattr(store.sqlite, "LOOK_EVERY", 0.1)

    async def main() -> None:
        async with opened(path) as ours, opened(path) as theirs, aclosing(ours.watch(IPPool)) as events:
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.3)
            await theirs.create(pool("a", "10.0.0.0/16"))
            assert (await waiting).type == "added"

    asyncio.run(main())
    assert [r.message for r in caplog.records if "max_user_instances" in r.message] != []
    assert len(caplog.records) == 1
