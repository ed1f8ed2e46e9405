"""ipam/journal.py: what is written is read again, whatever happens to the file."""

from __future__ import annotations

import os
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import netns
from ipam.errors import JournalError
from ipam.journal import COMPACT_FROM, Bound, GivenBack, Journal, Opened, Record, Taken
from ipam.model import Attachment
from tests.ipam_fakes import attachment

A, B, C = attachment("a"), attachment("b"), attachment("c")

STORY: list[Record] = [
    Opened(4026531840),
    Taken(A, ("10.0.0.1", "fd00::1"), ("u1", "u2"), "default/a", "2026-01-01T00:00:00Z"),
    Bound(A, 12),
    Taken(B, ("10.0.0.2",), ("u1",)),
    GivenBack(A, 100.5, ("10.0.0.1", "fd00::1")),
    Taken(C, ("10.0.0.3",), ("u1",)),
    Bound(C, 13),
]


def write(directory: Path, records: list[Record], boot: str = "boot-1") -> Path:
    journal = Journal(directory, boot)
    for record in records:
        journal.append(record)
    journal.close()
    return journal.path


def leases(directory: Path, boot: str = "boot-1") -> dict[str, tuple[tuple[str, ...], int]]:
    journal = Journal(directory, boot)
    try:
        return {a.container: (lease.addresses, lease.index) for a, lease in journal.history().leases.items()}
    finally:
        journal.close()


def test_the_story_adds_up(tmp_path: Path) -> None:
    path = write(tmp_path / "run", STORY)
    assert path.name == "journal-boot-1"
    assert path.stat().st_mode & 0o777 == 0o600
    journal = Journal(tmp_path / "run", "boot-1")
    history = journal.history()
    assert history.netns == 4026531840
    assert list(history.leases) == [B, C]
    assert history.leases[C].index == 13
    assert history.leases[B].index == 0
    assert history.blocks == {B: ("u1",), C: ("u1",)}
    assert history.freed == (GivenBack(A, 100.5, ("10.0.0.1", "fd00::1")),)
    assert history.damage == ()
    journal.close()


def test_a_lease_keeps_its_pod_and_since(tmp_path: Path) -> None:
    write(tmp_path, STORY[:3])
    journal = Journal(tmp_path, "boot-1")
    lease = journal.history().leases[A]
    assert (lease.pod, lease.since, lease.addresses) == ("default/a", "2026-01-01T00:00:00Z", ("10.0.0.1", "fd00::1"))
    journal.close()


def test_cut_at_every_byte_the_whole_records_stand_and_writing_goes_on(tmp_path: Path) -> None:
    data = write(tmp_path / "whole", STORY).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        directory = tmp_path / "cut"
        directory.mkdir(exist_ok=True)
        path = directory / "journal-boot-1"
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        journal = Journal(directory, "boot-1")
        history = journal.history()
        assert bool(history.damage) == (cut not in (0, *ends)), cut
        journal.append(Taken(attachment("later"), ("10.0.0.9",)))
        journal.close()
        expected = leases_of(STORY[:whole]) | {"clater": (("10.0.0.9",), 0)}
        assert leases(directory) == expected, cut


def leases_of(records: list[Record]) -> dict[str, tuple[tuple[str, ...], int]]:
    found: dict[str, tuple[tuple[str, ...], int]] = {}
    for record in records:
        match record:
            case Taken():
                found[record.attachment.container] = (record.addresses, 0)
            case Bound():
                found[record.attachment.container] = (found[record.attachment.container][0], record.index)
            case GivenBack():
                found.pop(record.attachment.container, None)
    return found


@settings(max_examples=60)
@given(at=st.integers(0, 10_000), garbage=st.binary(min_size=1, max_size=40), insert=st.booleans())
def test_garbage_in_the_middle_costs_only_the_lines_it_touches(
    tmp_path_factory: pytest.TempPathFactory, at: int, garbage: bytes, insert: bool
) -> None:
    directory = tmp_path_factory.mktemp("garbage")
    records: list[Record] = [Taken(attachment(i), (f"10.0.0.{i}",)) for i in range(20)]
    path = write(directory, records)
    data = path.read_bytes()
    at %= len(data)
    end = at if insert else min(at + len(garbage), len(data))
    path.write_bytes(data[:at] + garbage + data[end:])
    lines = data.splitlines(keepends=True)
    untouched, begin = set(), 0
    for i, line in enumerate(lines):
        # A line's newline is its end, so one whose neighbour's newline was hit may be lost as well.
        if begin + len(line) <= at or begin > end + 1:
            untouched.add(f"c{i}")
        begin += len(line)
    found = leases(directory)
    assert untouched <= set(found) <= {f"c{i}" for i in range(20)}
    assert all(found[f"c{i}"] == ((f"10.0.0.{i}",), 0) for i in range(20) if f"c{i}" in found)


def test_damage_is_told_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, STORY)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"10.0.0.1", b"10.0.0.7")
    path.write_bytes(b"".join(lines) + b"0000")
    journal = Journal(tmp_path, "boot-1")
    assert len(journal.history().damage) == 2
    assert "line 2 is damaged" in caplog.text
    assert "line 8 is cut short" in caplog.text
    journal.close()


def test_an_address_handed_out_again_shows_that_a_line_is_lost(tmp_path: Path) -> None:
    write(tmp_path, [Taken(A, ("10.0.0.1", "fd00::1")), Taken(B, ("10.0.0.1",))])
    journal = Journal(tmp_path, "boot-1")
    history = journal.history()
    assert list(history.leases) == [B]
    assert "10.0.0.1" in history.damage[0]
    journal.close()


def test_files_of_other_boots_are_removed_and_say_nothing(tmp_path: Path) -> None:
    old = write(tmp_path, STORY, "boot-0")
    (tmp_path / "journal-boot-1.new").write_text("half")
    (tmp_path / "starts-boot-0").write_text("3")
    assert leases(tmp_path) == {}
    assert not old.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal-boot-1", "starts-boot-0"]


def test_a_kind_of_record_that_is_not_known_is_damage_not_death(tmp_path: Path) -> None:
    path = write(tmp_path, STORY)
    body = b'{"do":"dance"}'
    path.write_bytes(path.read_bytes() + b"%08x %b\n" % (zlib.crc32(body), body))
    assert leases(tmp_path) == leases_of(STORY)


def test_rewrite_replaces_everything_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "boot-1")
    for record in STORY:
        journal.append(record)
    journal.rewrite([Opened(7), Taken(C, ("10.0.0.3",)), Bound(C, 13)])
    journal.append(Taken(A, ("10.0.0.4",)))
    journal.close()
    assert leases(tmp_path) == {"cc": (("10.0.0.3",), 13), "ca": (("10.0.0.4",), 0)}
    assert [p.name for p in tmp_path.iterdir()] == ["journal-boot-1"]


@pytest.mark.parametrize("point", ["journal-copied", "journal-renamed"])
def test_killed_while_rewriting_nothing_is_lost(tmp_path: Path, point: str) -> None:
    class Killed(BaseException):
        pass

    def step(name: str) -> None:
        if name == point:
            raise Killed

    journal = Journal(tmp_path, "boot-1", step=step)
    for record in STORY:
        journal.append(record)
    with pytest.raises(Killed):
        journal.rewrite([Opened(7), Taken(B, ("10.0.0.2",)), Taken(C, ("10.0.0.3",)), Bound(C, 13)])
    journal.close()
    assert leases(tmp_path) == leases_of(STORY)


def test_a_long_history_or_a_removed_file_wants_a_rewrite(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "boot-1")
    assert not journal.wants_rewrite
    n = 0
    while not journal.wants_rewrite:
        journal.append(Taken(attachment(n % 7), (f"10.0.0.{n % 7}",)))
        n += 1
    assert journal.path.stat().st_size > COMPACT_FROM
    journal.rewrite([Taken(attachment(i), (f"10.0.0.{i}",)) for i in range(7)])
    assert not journal.wants_rewrite
    journal.path.unlink()
    assert journal.wants_rewrite
    journal.rewrite([Taken(A, ("10.0.0.1",))])
    assert not journal.wants_rewrite
    journal.close()
    assert leases(tmp_path) == {"ca": (("10.0.0.1",), 0)}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few pages."""
    target = tmp_path / "tiny"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tiny", str(target)], check=True)
    try:
        yield target
    finally:
        netns.unmount(target)


def fill(directory: Path) -> Path:
    """Takes all the space that is left."""
    path = directory / "filler"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(fd, b"x" * 512):
            pass
    except OSError:
        pass
    finally:
        os.close(fd)
    return path


def test_a_full_disk_fails_the_append_and_leaves_no_half_record(tiny: Path) -> None:
    journal = Journal(tiny, "boot-1")
    filler = fill(tiny)
    written = 0
    with pytest.raises(JournalError, match=r"journal-boot-1 cannot be written: .*space"):
        for i in range(10_000):
            journal.append(Taken(attachment(i), (f"fd00::{i:x}",), ("u" * 36,)))
            written += 1
    data = journal.path.read_bytes()
    assert data.endswith(b"\n") or not data
    assert len(journal.history().leases) == written
    with pytest.raises(JournalError, match="anew"):
        journal.rewrite([Taken(attachment(i), ("fd00::1",), ("u" * 8000,)) for i in range(3)])
    assert len(journal.history().leases) == written
    assert sorted(p.name for p in tiny.iterdir()) == ["filler", "journal-boot-1"]
    filler.unlink()
    journal.append(Taken(attachment("last"), ("fd00::ffff",)))
    assert len(journal.history().leases) == written + 1
    assert journal.history().damage == ()
    journal.close()


def test_half_a_record_that_cannot_be_cut_at_once_is_cut_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "boot-1")
    journal.append(STORY[1])
    write_, cut = os.write, os.ftruncate

    def half(fd: int, data: bytes) -> int:
        return write_(fd, data[: len(data) // 2])

    def fail(fd: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(JournalError):
        journal.append(STORY[3])
    monkeypatch.setattr(os, "write", write_)
    with pytest.raises(JournalError):
        journal.append(STORY[3])
    monkeypatch.setattr(os, "ftruncate", cut)
    journal.append(STORY[5])
    history = journal.history()
    assert list(history.leases) == [A, C]
    assert history.damage == ()
    journal.close()


def test_a_directory_that_cannot_be_made_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="journal-boot-1"):
        Journal(tmp_path / "file", "boot-1")


def test_names_may_be_anything(tmp_path: Path) -> None:
    odd = Attachment('net"work\n', "c\\ \x00é", "eth0 ")
    write(tmp_path, [Taken(odd, ("10.0.0.1",), pod="ns/\n")])
    journal = Journal(tmp_path, "boot-1")
    assert list(journal.history().leases) == [odd]
    journal.close()
