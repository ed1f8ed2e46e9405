"""Helm, built once of its Go module, as ``make test`` does: 80 s on two idle cores. Tests only look.

``python -m tests.cluster.helm`` prints the folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lab import gobuild
from lab.gobuild import Module
from lab.kube import build

_HERE: Final = Path(__file__).resolve().parent / "gohelm"
_HELM: Final = "helm.sh/helm/v3"
#: What it takes a cluster for when it is asked of none (its own Makefile sets these).
_CAPABILITIES: Final = f"{_HELM}/pkg/chartutil"


def module() -> Module:
    _, minor, _ = build.version().split(".")
    stamps = [
        f"-X {_CAPABILITIES}.{key}={value}" for key, value in (("k8sVersionMajor", "1"), ("k8sVersionMinor", minor))
    ]
    flags = " ".join(["-s -w", *stamps])
    return Module("helm", gobuild.required(_HERE, _HELM), _HERE, (f"{_HELM}/cmd/helm",), flags, takes="two minutes")


def folder(env: Mapping[str, str] = os.environ) -> Path | None:
    """Where the program is; None if it is not built."""
    found = gobuild.cache(module(), env)
    return found if found.is_dir() else None


if __name__ == "__main__":
    sys.exit(gobuild.main(lambda: gobuild.ensure(module())))
