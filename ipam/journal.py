"""What was handed out since this boot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Journal:
    def __init__(self, directory: Path, boot_id: str, *, step: Callable[[str], None] = lambda _: None) -> None:
        """Opens (makes) ``directory/journal-<boot_id>``; removes the files of other boots. JournalError."""

    def close(self) -> None: ...
