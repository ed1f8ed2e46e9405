"""The two ways to the image: the script that needs no engine, whose image is looked into, and the Dockerfile, which is
held to it (no engine builds it here)."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from manifests import image

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def programs() -> dict[str, str]:
    """Name -> module of those that are not the lab's."""
    entries = importlib.metadata.distribution("underlay").entry_points.select(group="console_scripts")
    return {e.name: e.module for e in entries if e.module.partition(".")[0] in image.PACKAGES}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config and what each layer's files are, of an image that has just been made."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "shim").write_bytes(b"a program")
    image.build(folder / "image.tar", name="underlay.test/underlay:1", shim=folder / "shim")
    with tarfile.open(folder / "image.tar") as tar:

        def blob(digest: str) -> bytes:
            found = tar.extractfile(f"blobs/sha256/{digest.removeprefix('sha256:')}")
            assert found is not None
            return found.read()

        index = tar.extractfile("index.json")
        assert index is not None
        (described,) = json.load(index)["manifests"]
        manifest = json.loads(blob(described["digest"]))
        files: dict[str, tarfile.TarInfo] = {}
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=io.BytesIO(blob(layer["digest"]))) as entries:
                files |= {entry.name: entry for entry in entries.getmembers()}
        name = described["annotations"]["io.containerd.image.name"]
        return {"name": name, "config": json.loads(blob(manifest["config"]["digest"])), "files": files}


def test_the_image_has_what_the_manifests_call(layout: dict[str, Any]) -> None:
    files = layout["files"]
    called = set()
    for document in yaml.safe_load_all((ROOT / "manifests/underlay.yaml").read_text()):
        if document["kind"] == "DaemonSet":
            spec = document["spec"]["template"]["spec"]
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                called.add(container["command"][0])
                assert container["image"] == image.NAME
    assert called <= programs().keys()
    assert all(files[f"usr/bin/{program}"].mode == 0o755 for program in called)
    assert files["opt/cni/underlay"].mode & 0o111
    assert {f"opt/underlay/{package}" for package in image.PACKAGES} <= files.keys()
    assert "opt/underlay/lab" not in files
    assert not any("/bin/gcc" in name or name.endswith("/pytest") for name in files)


def test_the_image_says_what_it_is_and_is_nobody_s_file(layout: dict[str, Any]) -> None:
    assert layout["name"] == "underlay.test/underlay:1"
    assert layout["config"]["config"]["Labels"] == image.labels()
    assert all((f.uid, f.gid, f.mtime) == (0, 0, 0) for f in layout["files"].values())


def test_without_a_shim_there_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(image.ImageError, match="make shim"):
        image.build(tmp_path / "image.tar", shim=tmp_path / "none")
    assert not (tmp_path / "image.tar").exists()


def test_the_dockerfile_makes_the_same() -> None:
    assert dict(re.findall(r"(underlay[a-z-]*):([a-z.]+)", DOCKERFILE)) == programs()
    assert f"COPY --from=packages {image.LIBRARY} {image.LIBRARY}" in DOCKERFILE
    assert f"COPY --from=shim /underlay-shim {image.SHIM}" in DOCKERFILE
    assert f"PYTHONPATH={image.LIBRARY}" in DOCKERFILE
    said = dict(re.findall(r'(org\.opencontainers\.image\.\w+)="([^"]*)"', DOCKERFILE))
    assert said == image.labels()
    copied = set(re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE))
    assert copied == {*image.PACKAGES, "lab"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} >= {*copied, "setup.cfg", "pyproject.toml"}
