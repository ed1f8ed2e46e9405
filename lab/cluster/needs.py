"""What this machine has to have for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lab.busybox import BUSYBOX
from lab.errors import LabError
from lab.kube.build import NotHere, find_node
from lab.wire import Installer

#: Underlay's image, as ``make image`` leaves it.
_IMAGE: Final = Path(__file__).resolve().parents[2] / "build" / "underlay-image.tar"
#: user_namespaces(7): what root sees who is root everywhere.
_OURS: Final = ["0", "0", "4294967295"]
_PROGRAMS: Final = (Path("/usr/bin/containerd"), Path("/usr/lib/cni/loopback"), BUSYBOX)


def options(*, bare: bool, installer: Installer | None = None) -> list[str]:
    """What makes a cluster of a lab, as options of its supervisor. Raises LabError, which says what to type."""
    if Path("/proc/self/uid_map").read_text().split() != _OURS:
        raise LabError("--cluster needs root's own user namespace, for containers: run it as root")
    try:
        found = [f"--of-nodes={find_node().folder}", f"--image={_IMAGE}"]
    except NotHere as e:
        raise LabError(str(e)) from e
    if not _IMAGE.exists():
        raise LabError(f"{_IMAGE} is not built: make image")
    for program in _PROGRAMS:
        if not program.exists():
            raise LabError(
                f"--cluster needs {program}: apt-get install containerd runc containernetworking-plugins busybox-static"
            )
    return found + (["--bare"] if bare else []) + ([f"--installer={installer}"] if installer else [])
