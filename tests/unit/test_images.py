"""Images that are unpacked once a machine: who has them, and what is taken away. The unpacking is a stand-in here; the
real one is what each cluster of tests/cluster begins with."""

from __future__ import annotations

import asyncio
import os
import tarfile
import time
from pathlib import Path

import pytest

from lab.cluster import images
from store.clock import SystemClock

RECORD = "io.containerd.metadata.v1.bolt/meta.db"
BLOBS = "io.containerd.content.v1.content/blobs/sha256"
OLD = time.time() - 2 * 3600


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Each unpacking that was asked for."""
    asked: list[Path] = []

    async def unpack(root: Path, *_: object) -> None:
        asked.append(root)
        for name in (*images._RECORDS, *(f"{part}/one" for part in images._PARTS)):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("first")

    monkeypatch.setattr(images, "_import", unpack)
    return asked


def tar(folder: Path, text: str) -> Path:
    index = folder / "index.json"
    index.write_text(text)
    path = folder / f"{text}.tar"
    with tarfile.open(path, "w") as made:
        made.add(index, "index.json")
    return path


def unpacked(cache: Path, image: Path) -> tuple[Path, int]:
    return asyncio.run(images.unpacked(cache, [image], SystemClock()))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def test_the_same_image_is_unpacked_once_and_another_apart(cache: Path, tmp_path: Path, imports: list[Path]) -> None:
    first, again, other = (unpacked(cache, tar(tmp_path, name)) for name in ("a", "a", "b"))
    assert first[0] == again[0] != other[0]
    assert len(imports) == 2
    assert {path.name for path in cache.iterdir()} == {first[0].name, other[0].name}
    for _, fd in (first, again, other):
        os.close(fd)


def test_what_nobody_has_goes_after_an_hour(cache: Path, tmp_path: Path, imports: list[Path]) -> None:
    had, fd = unpacked(cache, tar(tmp_path, "had"))
    for name in ("images-old", "images-young", ".images-half"):
        (cache / name / "root").mkdir(parents=True)
    for folder in (had, cache / "images-old", cache / ".images-half"):
        os.utime(folder, (OLD, OLD))
    new, other = unpacked(cache, tar(tmp_path, "new"))
    assert {path.name for path in cache.iterdir()} == {had.name, new.name, "images-young"}
    os.close(fd)
    os.close(other)
    unpacked(cache, tar(tmp_path, "last"))
    assert not had.exists()


def test_a_node_has_records_of_its_own_and_the_blobs_of_all(cache: Path, tmp_path: Path, imports: list[Path]) -> None:
    folder, fd = unpacked(cache, tar(tmp_path, "a"))
    roots = [tmp_path / name for name in ("node-1", "node-2")]
    for root in roots:
        images.link(folder, root)
    (roots[0] / RECORD).write_text("changed")
    (roots[0] / BLOBS / "two").write_text("its own")
    assert (roots[1] / RECORD).read_text() == (folder / RECORD).read_text() == "first"
    assert (roots[1] / BLOBS / "one").resolve() == folder / BLOBS / "one"
    assert not (folder / BLOBS / "two").exists()
    os.close(fd)
