"""Writes images without an engine: an OCI image layout (opencontainers/image-spec) in one tar, as ``ctr images import``
takes it. The same input gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


def write(target: Path, name: str, layers: Sequence[bytes], config: Mapping[str, Any]) -> None:
    """The image ``name`` for this machine, of layers (tars, the lowest first) and what its config says of how it is
    run. The file appears whole. Raises OSError."""
    entries = {"oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode()}

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = _digest(data)
        entries[f"blobs/sha256/{digest}"] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    system = {"architecture": ARCHITECTURES[platform.machine()], "os": "linux"}
    diffs = [f"sha256:{_digest(layer)}" for layer in layers]
    described = {**system, "config": dict(config), "rootfs": {"type": "layers", "diff_ids": diffs}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(described).encode()),
        "layers": [blob("layer.v1.tar", layer) for layer in layers],
    }
    entry = blob("manifest.v1+json", json.dumps(manifest).encode())
    entry |= {"platform": system, "annotations": {"io.containerd.image.name": name}}
    entries["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    part = target.with_name(f".{target.name}.part")
    with tarfile.open(part, "w") as tar:
        for path, data in entries.items():
            tar.addfile(file(path, len(data)), io.BytesIO(data))
    part.rename(target)


def file(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    """A tar's entry of a file, with no date and no owner."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, mode
    return entry


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
