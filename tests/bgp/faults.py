"""What the tests of ExaBGP's faults share (exabgp.md; docs/exabgp.md lists them).

Each fault is provoked for real, twice: with what we do about it, and with that alone switched off (``careless.py``, or
a function of ours replaced), when the fault is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agent.bgp.model import Event, SessionDown, SessionUp
from tests.bgp.conftest import announce

Without = Callable[[str], None]

handled = pytest.mark.parametrize("handled", [True, False], ids=["handled", "not"])

#: Prefixes that say how far ExaBGP is: what was said before them is on the wire when they are.
FIRST, SECOND = announce("10.250.0.0/24"), announce("10.250.1.0/24")


def ups(events: list[Event]) -> list[str]:
    return [e.peer for e in events if isinstance(e, SessionUp)]


def downs(events: list[Event]) -> list[str]:
    """Of sessions that were up."""
    known = {(e.peer, e.generation) for e in events if isinstance(e, SessionUp)}
    return [e.peer for e in events if isinstance(e, SessionDown) and (e.peer, e.generation) in known]
