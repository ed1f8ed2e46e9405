"""What can go wrong with a lab. One root; each message says what to do."""

from __future__ import annotations


class LabError(Exception):
    """Root of what the lab raises, apart from ``NetError`` and ``lab.topology.TopologyError``."""


class NoLab(LabError):
    """Nobody answers at this folder's socket."""


class Refused(LabError):
    """The supervisor said no; the message is its own."""


class NetError(Exception):
    """A namespace, link or process could not be made; the message has the command and what it printed."""
