"""Many connections from one process."""

from __future__ import annotations

import resource


def raise_limit() -> None:
    """As many open files as this process may have; its children may have as many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
