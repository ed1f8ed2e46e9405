"""Why a command ended badly: exit codes, and one line on stderr for each problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from store.errors import Invalid, StoreError, Unavailable

OK: Final = 0
#: The store or a rule refused something, or there is no such object.
REFUSED: Final = 1
#: The command line is wrong. (click's own number too)
USAGE: Final = 2
#: ``ipam check`` could not look at everything. (Not ``UNAVAILABLE``: who runs checkers knows 0, 1 and 2)
UNSEEN: Final = 2
#: The store cannot be reached, or is broken.
UNAVAILABLE: Final = 3


class Failure(Exception):
    """Root of what a command ends with. ``lines`` is what people read, a problem each; ``code`` the exit code."""

    code = REFUSED

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


class Usage(Failure):
    """The command line asks for something that there is not."""

    code = USAGE


def explain(error: StoreError, where: str = "") -> tuple[str, ...]:
    """The lines for what a store raised. ``where`` says which file, document or object it was about."""
    begin = f"{where}: " if where else ""
    if isinstance(error, Invalid):
        return tuple(f"{begin or f'{error.what}: '}{problem}" for problem in error.problems)
    return (f"{begin}{error}",)


def code_of(error: StoreError) -> int:
    return UNAVAILABLE if isinstance(error, Unavailable) else REFUSED
