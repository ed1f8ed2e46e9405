"""An image of one static program: what sandboxes and test pods of a cluster run."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab import oci

BUSYBOX: Final = Path("/bin/busybox")
_APPLETS: Final = ("sh", "sleep", "httpd", "wget", "nc", "ping", "ip", "cat", "echo", "dd")


def write(target: Path, name: str, busybox: Path = BUSYBOX, *, applets: Sequence[str] = _APPLETS) -> None:
    """The image ``name``: it sleeps, unless told otherwise; ``/www`` has a page. Raises OSError."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "dev", "etc", "proc", "sys", "tmp", "www"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        program = busybox.read_bytes()
        tar.addfile(oci.file("bin/busybox", len(program), 0o755), io.BytesIO(program))
        for applet in applets:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
        page = b"hello\n"
        tar.addfile(oci.file("www/index.html", len(page)), io.BytesIO(page))
    config = {"Entrypoint": ["/bin/sleep", "2147483647"], "Env": ["PATH=/bin"]}
    oci.write(target, name, [layer.getvalue()], config)
