"""A store in one SQLite file (WAL) that several processes of a machine share, with no daemon.

Writers ring a bell: after each commit they write a byte into ``<file>-bell``, on which every watching process has an
inotify watch. So a change is heard in about a millisecond, and nobody polls; a look once a second makes up for a writer
that died between commit and bell.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
from asyncinotify import Inotify, Mask

from store.base import T
from store.clock import Clock
from store.errors import Expired, Unavailable
from store.local import BATCH, HISTORY, Decide, LocalStore, Recent, beside, new_uuid
from store.model import Resource
from store.semantics import Change

log = logging.getLogger(__name__)

#: Seconds that a call waits for other processes' writes before it gives up.
BUSY_LIMIT = 10.0
#: Seconds after which a watch looks even if no bell rang.
LOOK_EVERY = 1.0
#: Layout of the file; another one is refused.
SCHEMA_VERSION = 1
#: SQLite's application_id: "ULST".
APPLICATION_ID = 0x554C5354

_SCHEMA = f"""
CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, trimmed INTEGER NOT NULL);
INSERT INTO head VALUES (1, :first, :first);
-- name: the key, with its namespace where there is one
CREATE TABLE objects (kind TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL, UNIQUE (kind, name));
CREATE TABLE changes (version INTEGER PRIMARY KEY, kind TEXT NOT NULL, type TEXT NOT NULL, was BLOB NOT NULL,
                      body BLOB NOT NULL);
CREATE INDEX changes_by_kind ON changes (kind, version);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

V = TypeVar("V")


class SqliteStore(LocalStore):
    """``path`` is made at first use, with mode 0600, in a folder that must exist. Each process opens its own.

    Calls run on the event loop and take well under a millisecond; while another process writes they wait asleep. After
    ``Unavailable`` the next call opens the file afresh, so a repaired file needs no restart.
    """

    def __init__(
        self, path: Path, clock: Clock, *, history: int = HISTORY, new_uid: Callable[[], str] = new_uuid
    ) -> None:
        super().__init__(clock, new_uid=new_uid)
        self._path = path
        self._history = history
        self._closed = False
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._bell = -1
        self._inotify: Inotify | None = None
        self._deaf = False

    async def close(self) -> None:
        self._closed = True
        self._drop()

    # -- what LocalStore asks --------------------------------------------------------------------------------------

    async def _get(self, kind: type[T], key: str) -> T | None:
        return await self._patiently(lambda db: _load(db, kind, key))

    async def _all(self, kind: type[T]) -> tuple[Sequence[T], int]:
        def read(db: sqlite3.Connection) -> tuple[Sequence[T], int]:
            rows = db.execute("SELECT name, body FROM objects WHERE kind = ? ORDER BY name", (kind.kind(),)).fetchall()
            return [_decode(body, kind, key) for key, body in rows], _head(db)[0]

        return await self._patiently(_reading(read))

    async def _write(self, kind: type[T], key: str, decide: Decide[T], *, durable: bool) -> T | None:
        def write(db: sqlite3.Connection) -> tuple[T | None, bool]:
            # Not inside the transaction: SQLite ignores it there. NORMAL loses the last writes in a power cut, no more.
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            version = _head(db)[0] + 1
            current = _load(db, kind, key)
            other = beside(kind)
            change = decide(current, _load_all(db, other) if other else (), str(version))
            if change is None:
                db.execute("ROLLBACK")
                return current, False
            _save(db, change, version)
            _trim(db, version - self._history)
            db.execute("COMMIT")
            return change.object, True

        written, changed = await self._patiently(write)
        if changed:
            self._ring_all()
        return written

    async def _recent(self, kind: type[T], since: int) -> Recent[T]:
        def read(db: sqlite3.Connection) -> Recent[T]:
            head, trimmed = _head(db)
            if not trimmed <= since <= head:
                raise Expired(
                    f"{self._path}: version {since} is no longer kept (there are {trimmed}..{head}): list again"
                )
            rows = db.execute(
                "SELECT version, type, was, body FROM changes WHERE kind = ? AND version > ? ORDER BY version LIMIT ?",
                (kind.kind(), since, BATCH),
            ).fetchall()
            changes = tuple(
                Change(type_, _decode(body, kind, f"of change {version}"), msgspec.json.decode(was))
                for version, type_, was, body in rows
            )
            return Recent(changes, rows[-1][0] if len(rows) == BATCH else head)

        return await self._patiently(_reading(read))

    async def _heard(self, news: asyncio.Event) -> None:
        try:
            self._listen()
        except OSError as e:
            if not self._deaf:
                self._deaf = True
                log.warning(
                    "%s: no inotify watch, changes of other processes are heard late: %s; "
                    "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches",
                    self._bell_path,
                    e,
                )
        try:
            async with asyncio.timeout(LOOK_EVERY):
                await news.wait()
        except TimeoutError:
            return

    # -- the file --------------------------------------------------------------------------------------------------

    async def _patiently(self, call: Callable[[sqlite3.Connection], V]) -> V:
        """Runs ``call``, again and again while other processes hold the file. There is no await inside ``call``, so a
        transaction of ours is never interleaved with another."""
        end = self._clock.monotonic() + BUSY_LIMIT
        pause = 0.001
        while True:
            if self._closed:
                raise Unavailable(f"{self._path}: the store is closed")
            try:
                self._check_files()
                return call(self._db or self._open())
            except sqlite3.Error as e:
                self._rollback()
                if not _is_busy(e):
                    self._drop()
                    raise Unavailable(f"{self._path}: {_explain(e)}") from e
                if self._clock.monotonic() > end:
                    raise Unavailable(
                        f"{self._path}: another process has held it for {BUSY_LIMIT:.0f} s: find it with fuser"
                    ) from e
            except BaseException:
                self._rollback()
                raise
            await self._clock.sleep(pause)
            pause = min(pause * 2, 0.02)

    def _open(self) -> sqlite3.Connection:
        """A connection to a file of ours, made if it is missing. ``Unavailable``, or ``sqlite3.Error`` when busy."""
        try:
            self._make_file()
            stat = self._path.stat()
            if self._bell < 0:
                self._bell = os.open(self._bell_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise Unavailable(f"{self._path}: {_explain_os(e, self._path)}") from e
        db = sqlite3.connect(self._path, timeout=0, isolation_level=None)
        try:
            _prepare(db, self._path, first=_milliseconds(self._clock.now()))
        except BaseException:
            db.close()
            raise
        self._db, self._file = db, (stat.st_dev, stat.st_ino)
        return db

    def _make_file(self) -> None:
        """With a mode that SQLite then gives to the files beside it. A file that is there is not opened here: closing
        it again would drop the locks that another connection of this process has on it (POSIX fcntl)."""
        if self._path.exists():
            return
        if self._file is not None:
            raise Unavailable(
                f"{self._path}: it was removed while it was in use: put it back, or restart to begin with an empty one"
            )
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def _rollback(self) -> None:
        if self._db is not None and self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except sqlite3.Error:
                # It has rolled back by itself, or the file is beyond that: a new connection starts clean.
                self._drop()

    def _drop(self) -> None:
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        if self._db is not None:
            db, self._db = self._db, None
            db.close()
        # Whoever watches looks again, and learns what is the matter.
        self._ring()

    # -- the bell --------------------------------------------------------------------------------------------------

    @property
    def _bell_path(self) -> Path:
        return self._path.with_name(self._path.name + "-bell")

    def _ring_all(self) -> None:
        """Tells the watches of this process and of the others that there is a new version."""
        self._ring()
        try:
            os.pwrite(self._bell, b".", 0)
        except OSError as e:
            # The write itself is done; the others find it at their next look.
            log.warning("%s: the bell cannot be rung, watchers hear of changes late: %s", self._bell_path, e)

    def _listen(self) -> None:
        """Has the event loop hear the bell, from the first watch on."""
        if self._inotify is not None or self._bell < 0:
            return
        inotify = Inotify()
        try:
            inotify.add_watch(f"/proc/self/fd/{self._bell}", Mask.MODIFY)
        except BaseException:
            inotify.close()
            raise
        self._inotify = inotify
        asyncio.get_running_loop().add_reader(inotify.fd, self._on_bell, inotify.fd)
        # A bell between the last look and this moment would be missed: have everybody look once more.
        self._ring()

    def _on_bell(self, fd: int) -> None:
        try:
            os.read(fd, 65536)
        except BlockingIOError:
            return
        self._ring()

    def _check_files(self) -> None:
        """Notices that somebody has put other files in the place of ours: nothing that we write into the old ones would
        ever be read."""
        if self._db is None:
            return
        try:
            found = self._path.stat()
            same = (found.st_dev, found.st_ino) == self._file
            same = same and os.path.samestat(self._bell_path.stat(), os.fstat(self._bell))
        except OSError:
            same = False
        if not same:
            self._drop()
            raise Unavailable(f"{self._path}: the file, or its bell, was replaced or removed while it was in use")


# -- reading and writing rows --------------------------------------------------------------------------------------


def _reading(read: Callable[[sqlite3.Connection], V]) -> Callable[[sqlite3.Connection], V]:
    """``read`` in one transaction: all its queries see the same moment."""

    def call(db: sqlite3.Connection) -> V:
        db.execute("BEGIN")
        result = read(db)
        db.execute("COMMIT")
        return result

    return call


def _head(db: sqlite3.Connection) -> tuple[int, int]:
    """The number of the last write, and of the last one whose change is no longer kept."""
    version, trimmed = db.execute("SELECT version, trimmed FROM head").fetchone()
    return version, trimmed


def _load(db: sqlite3.Connection, kind: type[T], key: str) -> T | None:
    row = db.execute("SELECT body FROM objects WHERE kind = ? AND name = ?", (kind.kind(), key)).fetchone()
    return None if row is None else _decode(row[0], kind, key)


def _load_all(db: sqlite3.Connection, kind: type[Resource]) -> list[Resource]:
    rows = db.execute("SELECT name, body FROM objects WHERE kind = ?", (kind.kind(),)).fetchall()
    return [_decode(body, kind, key) for key, body in rows]


def _save(db: sqlite3.Connection, change: Change[T], version: int) -> None:
    kind, key, body = change.object.kind(), change.object.key, msgspec.json.encode(change.object)
    if change.type == "deleted":
        db.execute("DELETE FROM objects WHERE kind = ? AND name = ?", (kind, key))
    else:
        db.execute(
            "INSERT INTO objects VALUES (?, ?, ?) ON CONFLICT (kind, name) DO UPDATE SET body = excluded.body",
            (kind, key, body),
        )
    was = msgspec.json.encode(change.was)
    db.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?)", (version, kind, change.type, was, body))
    db.execute("UPDATE head SET version = ?", (version,))


def _trim(db: sqlite3.Connection, last: int) -> None:
    if db.execute("DELETE FROM changes WHERE version <= ?", (last,)).rowcount:
        db.execute("UPDATE head SET trimmed = ?", (last,))


def _decode(body: bytes, kind: type[T], key: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as e:
        raise Unavailable(
            f"{kind.kind()} {key} cannot be read: {e}; the file is damaged, or a newer release wrote it"
        ) from e


# -- opening -------------------------------------------------------------------------------------------------------


def _prepare(db: sqlite3.Connection, path: Path, *, first: int) -> None:
    """Makes the tables where there are none, and refuses a file that is not ours. ``first`` is a new file's version."""
    empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not empty:
        _check_schema(db, path)
    mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise Unavailable(f"{path}: SQLite's WAL does not work on this file system ({mode}): choose a local one")
    db.execute(f"PRAGMA journal_size_limit = {8 << 20}")
    if empty:
        db.execute("BEGIN IMMEDIATE")
        # Another process may have been first.
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _SCHEMA.split(";"):
                db.execute(statement, {"first": first} if ":first" in statement else {})
        db.execute("COMMIT")
        _check_schema(db, path)


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    layout = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise Unavailable(f"{path}: this is another program's database, it was not touched: choose another file")
    if layout != SCHEMA_VERSION:
        raise Unavailable(
            f"{path}: its layout is number {layout}, this release knows {SCHEMA_VERSION}: use the release that wrote it"
        )


def _milliseconds(stamp: str) -> int:
    """A new file counts its versions from the time of its birth, so that a version that a watcher knows from the file
    that lay here before is too old, and never taken for one of this file."""
    return int(datetime.fromisoformat(stamp).timestamp()) * 1000


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; the extended ones have more above the lowest byte."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _explain(error: sqlite3.Error) -> str:
    remedy = {
        sqlite3.SQLITE_FULL: "the disk is full, nothing was changed: make room",
        sqlite3.SQLITE_IOERR: "the disk cannot be read or written, or is full; nothing was changed: see dmesg and df",
        sqlite3.SQLITE_CORRUPT: "the file is damaged and was left as it is: restore a copy, or move it away",
        sqlite3.SQLITE_NOTADB: "this is no SQLite database and was left as it is: choose another file, or move it away",
        sqlite3.SQLITE_READONLY: "it can only be read: check the owner and mode of the file and its folder",
        sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that its folder exists and may be written",
        sqlite3.SQLITE_PERM: "access is refused: check its owner and mode",
    }.get(_code(error), "SQLite refused")
    return f"{remedy} ({error})"


def _explain_os(error: OSError, path: Path) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return f"the folder {path.parent} does not exist: make it"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"it may not be written by this user: {error.strerror}"
        case errno.ENOSPC:
            return "the disk is full: make room"
    return error.strerror or str(error)
