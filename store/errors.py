"""What a store can refuse. One root, few leaves; each message names the object, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with an object: the field's path, its value, and what to write instead."""

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r}: {self.remedy}"


class StoreError(Exception):
    """Root of everything that a store raises."""


class NotFound(StoreError):
    """No object of that kind has that name."""


class AlreadyExists(StoreError):
    """A create met an object of that name."""


class Conflict(StoreError):
    """The version or uid that a change was decided on is no longer the current one: read again, decide again."""


class Expired(StoreError):
    """A watch asked for changes that the store no longer keeps: list again."""


class Unavailable(StoreError):
    """The store cannot be reached, or is broken; the message says which and what to do."""


class Invalid(StoreError):
    """An object was refused; nothing was changed."""

    def __init__(self, what: str, problems: Sequence[Problem]) -> None:
        self.what = what
        self.problems = tuple(problems)
        super().__init__(f"{what} is refused: " + "; ".join(str(p) for p in self.problems))


class BadSelector(StoreError):
    """A selector's text does not parse. ``position`` counts characters from 1."""

    def __init__(self, text: str, position: int, what: str) -> None:
        self.position = position
        super().__init__(f"selector {text!r}, character {position}: {what}")
