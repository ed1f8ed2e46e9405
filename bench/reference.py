"""The reference plugins of their current release, which ``reference/go.mod`` names: what we are measured by."""

from __future__ import annotations

from pathlib import Path

from lab import gobuild
from lab.gobuild import Module

HERE = Path(__file__).with_suffix("")
SOURCE = "github.com/containernetworking/plugins"


def ensure() -> Path:
    """The folder of ptp, bridge and host-local, built if need be. NoGo, BuildFailed."""
    # The programs are go.mod's tools: no source of ours names them.
    return gobuild.ensure(Module("reference", gobuild.required(HERE, SOURCE), HERE, ("tool",), takes="half a minute"))
