"""What this package can refuse. One root, few leaves; each message names the thing and what to do about it."""

from __future__ import annotations


class IPAMError(Exception):
    """Root of everything that ipam raises."""


class Exhausted(IPAMError):
    """No address is left for the request: the pool has no free block, or the address asked for is in use."""


class NotReady(IPAMError):
    """This server hands out nothing at present: it has not read its blocks yet, or a newer server has taken over."""


class JournalError(IPAMError):
    """The journal could not be written (most often: no space under the run directory); nothing was changed."""


class KernelUnavailable(IPAMError):
    """The kernel's links or routes could not be read whole; nothing may be concluded from what was read."""


class WrongPool(IPAMError):
    """The request names a pool or an address that it cannot have: unknown, disabled, or of no pool."""


class Deleted(IPAMError):
    """The attachment was deleted before (R7): a container id is not used twice."""


def in_words(error: Exception) -> str:
    """The error in words; one without any is a TimeoutError: the store did not answer."""
    return str(error) or "no answer from the store"
