"""What was handed out since this boot, on a file in memory (R3).

One record is one line: the CRC-32 of the rest in hex, a blank, JSON. A line that was cut short or damaged fails its
check and is left out; the lines around it stand. There is no fsync: if the machine dies, its pods die too, and the
file is named after the boot. ``cat`` shows it to people.
"""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import msgspec

from ipam.errors import JournalError
from ipam.model import Attachment, Lease

log = logging.getLogger(__name__)

#: Bytes; a shorter file is never compacted.
COMPACT_FROM: Final = 256 * 1024


class _Record(msgspec.Struct, frozen=True, tag_field="do", omit_defaults=True):
    pass


class Opened(_Record, frozen=True, tag="open"):
    """In which network namespace the addresses are wired: the only one where a sweep means anything (R7)."""

    netns: int


class Taken(_Record, frozen=True, tag="take"):
    """Addresses handed out, and beside each the uid of its block."""

    attachment: Attachment
    addresses: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    pod: str = ""
    since: str = ""
    pod_uid: str = ""


class Bound(_Record, frozen=True, tag="bind"):
    """The host veth of an attachment is there, and this is its index."""

    attachment: Attachment
    index: int


class GivenBack(_Record, frozen=True, tag="free"):
    """Addresses free again since ``at`` (seconds, monotonic: it holds for this boot). ``swept``: found leaked, so the
    runtime never said DEL."""

    attachment: Attachment
    at: float
    addresses: tuple[str, ...] = ()
    swept: bool = False


class Ended(_Record, frozen=True, tag="end"):
    """A block, by uid, that is given back for good, written before it goes: a store that is restored from a backup may
    say that it is ours still (R5)."""

    block: str


Record = Opened | Taken | Bound | GivenBack | Ended


class History(msgspec.Struct, frozen=True):
    """What the records add up to. ``leases`` in order of taking, ``freed`` in order of giving back."""

    netns: int | None = None
    leases: dict[Attachment, Lease] = {}
    blocks: dict[Attachment, tuple[str, ...]] = {}
    freed: tuple[GivenBack, ...] = ()
    #: Uids of blocks, in order of their end.
    ended: tuple[str, ...] = ()
    #: One line for each damaged place.
    damage: tuple[str, ...] = ()
    #: Bytes of half a record at the end.
    tail: int = 0


_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def read(path: Path) -> History:
    """What a journal's file adds up to, for who only looks: nothing is written, cut or removed. JournalError."""
    damage: list[str] = []
    try:
        data = path.read_bytes()
    except OSError as e:
        raise JournalError(f"journal {path} cannot be read: {e.strerror or e}") from e
    history = _add_up(_records(data, damage), damage)
    return msgspec.structs.replace(history, tail=len(data) - data.rfind(b"\n") - 1)


class Journal:
    """The file of one boot. One process writes it: the CNI server, which holds its lock as long as it lives."""

    def __init__(
        self,
        directory: Path,
        boot_id: str,
        *,
        step: Callable[[str], None] = lambda _: None,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Opens (makes) ``directory/journal-<boot_id>``; removes the files of other boots. JournalError.

        ``step`` is called with the name of each point at which a crash would leave a different file; each record is
        written inside ``timed``.
        """
        self.path = directory / f"journal-{boot_id}"
        self._step, self._timed = step, timed
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for other in directory.glob("journal-*"):
                if other != self.path:
                    other.unlink(missing_ok=True)
            self._fd = self._open()
            self._size = os.fstat(self._fd).st_size
        except OSError as e:
            raise self._error("cannot be opened", e) from e
        self._compact_at = COMPACT_FROM

    def close(self) -> None:
        os.close(self._fd)

    def history(self) -> History:
        """Reads the file from its beginning. Whatever is damaged is left out, told of in ``damage`` and logged; half a
        record at the end is cut off by the next write. JournalError."""
        history = read(self.path)
        self._size = os.fstat(self._fd).st_size - history.tail
        for line in history.damage:
            log.warning("journal %s: %s", self.path, line)
        return history

    def append(self, record: Record) -> None:
        """Writes one record, whole or not at all. JournalError: it is not in the file."""
        line = _line(record)
        try:
            self._check_end()
            with self._timed():
                self._write(self._fd, line)
        except OSError as e:
            self._cut()
            raise self._error("cannot be written", e) from e
        self._size += len(line)
        self._step("journal-written")

    def rewrite(self, records: Iterable[Record]) -> None:
        """Puts these records in the place of all that there are, at once (rename). JournalError: the old ones stand."""
        data = b"".join(map(_line, records))
        new = self.path.with_name(self.path.name + ".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                self._write(fd, data)
            finally:
                os.close(fd)
            self._step("journal-copied")
            new.rename(self.path)
            self._step("journal-renamed")
            fd = self._open()
        except OSError as e:
            new.unlink(missing_ok=True)
            self._compact_at = max(self._compact_at, 2 * self._size)
            raise self._error("cannot be written anew", e) from e
        os.close(self._fd)
        self._fd, self._size = fd, len(data)
        self._compact_at = max(COMPACT_FROM, 4 * self._size)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def wants_rewrite(self) -> bool:
        """Most of the file is history, or somebody has removed it."""
        return self._size > self._compact_at or os.fstat(self._fd).st_nlink == 0

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _check_end(self) -> None:
        """A half record that could not be cut off must go before the next one is written behind it."""
        if os.fstat(self._fd).st_size != self._size:
            os.ftruncate(self._fd, self._size)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as e:
            log.warning("journal %s: half a record cannot be cut off yet: %s", self.path, e)

    @staticmethod
    def _write(fd: int, data: bytes) -> None:
        written = os.write(fd, data)
        if written != len(data):
            raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes were written")

    def _error(self, what: str, e: OSError) -> JournalError:
        return JournalError(
            f"journal {self.path} {what}: {e.strerror or e}; it needs a little space and write access there"
        )


def _line(record: Record) -> bytes:
    body = _encode(record)
    return b"%08x %b\n" % (zlib.crc32(body), body)


def _records(data: bytes, damage: list[str]) -> Iterator[Record]:
    lines = data.split(b"\n")
    tail = lines.pop()
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            damage.append(f"line {number} is damaged ({len(line)} bytes) and left out")
        else:
            yield record
    if tail:
        damage.append(f"line {len(lines) + 1} is cut short ({len(tail)} bytes) and left out")


def _parse(line: bytes) -> Record | None:
    check, _, body = line.partition(b" ")
    if check != b"%08x" % zlib.crc32(body):
        return None
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError:
        return None  # whole, but of a version that we don't know


def _add_up(records: Iterable[Record], damage: list[str]) -> History:
    netns: int | None = None
    leases: dict[Attachment, Lease] = {}
    blocks: dict[Attachment, tuple[str, ...]] = {}
    holders: dict[str, Attachment] = {}
    freed: list[GivenBack] = []
    ended: dict[str, None] = {}

    def drop(attachment: Attachment) -> None:
        lease = leases.pop(attachment, None)
        blocks.pop(attachment, None)
        for address in lease.addresses if lease else ():
            holders.pop(address, None)

    for record in records:
        match record:
            case Opened():
                netns = record.netns
            case Taken():
                for address in record.addresses:
                    holder = holders.get(address)
                    if holder is not None and holder != record.attachment:
                        # It was handed out again, so it had been given back: that line is lost.
                        damage.append(f"{address} of {holder} went to {record.attachment} with no record between")
                        drop(holder)
                drop(record.attachment)
                leases[record.attachment] = Lease(
                    record.attachment, record.pod, record.addresses, since=record.since, pod_uid=record.pod_uid
                )
                blocks[record.attachment] = record.blocks
                holders.update(dict.fromkeys(record.addresses, record.attachment))
            case Bound():
                if record.attachment in leases:
                    leases[record.attachment] = msgspec.structs.replace(leases[record.attachment], index=record.index)
            case GivenBack():
                drop(record.attachment)
                freed.append(record)
            case Ended():
                ended[record.block] = None
    return History(netns, leases, blocks, tuple(freed), tuple(ended), tuple(damage))
