"""Root of everything that the CNI plugin raises; the leaves stand beside what raises them."""

from __future__ import annotations


class CNIError(Exception):
    """Root. A message names the thing, what was expected and what to do."""


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of several things that failed together, the first: what one clear line can be about."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
