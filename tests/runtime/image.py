"""The one image of these tests: busybox, as an OCI image layout (opencontainers/image-spec) in a tar."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any, Final

NAME: Final = "underlay.test/busybox:1"
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_APPLETS: Final = ("sleep", "httpd")


def write(path: Path, busybox: Path) -> None:
    """A sandbox of it sleeps; a container of it is a web server."""
    layer = _layer(busybox)
    entries = {"oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode()}

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        entries[f"blobs/sha256/{digest}"] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    target = {"architecture": _ARCHITECTURES[platform.machine()], "os": "linux"}
    config = {
        **target,
        "config": {"Entrypoint": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": [blob("layer.v1.tar", layer)],
    }
    index = {
        "schemaVersion": 2,
        "manifests": [
            blob("manifest.v1+json", json.dumps(manifest).encode())
            | {"platform": target, "annotations": {"io.containerd.image.name": NAME}}
        ],
    }
    entries["index.json"] = json.dumps(index).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in entries.items():
            tar.addfile(_file(name, len(data)), io.BytesIO(data))


def _layer(busybox: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in ("bin", "dev", "etc", "proc", "sys", "tmp", "www"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        program = busybox.read_bytes()
        tar.addfile(_file("bin/busybox", len(program), 0o755), io.BytesIO(program))
        for name in _APPLETS:
            entry = tarfile.TarInfo(f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
        page = b"hello\n"
        tar.addfile(_file("www/index.html", len(page)), io.BytesIO(page))
    return out.getvalue()


def _file(name: str, size: int, mode: int = 0o644) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, mode
    return entry
