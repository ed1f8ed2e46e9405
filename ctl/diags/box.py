"""What goes into an archive for help, each item bounded, and what could not be had, in words. Pure.

Names are the same each time. ``index.txt`` says what each file is, ``errors.txt`` what is missing and why.
"""

from __future__ import annotations

import io
import json
import tarfile
from gzip import GzipFile
from typing import Any, Final, Literal, NamedTuple

from ctl.diags import redact

#: Bytes of one item, and of all together.
ITEM: Final = 4 << 20
TOTAL: Final = 64 << 20


class Item(NamedTuple):
    """``note`` says whether something was cut off."""

    text: str
    what: str
    note: str


class Box:
    """Takes items by the path that they are to have. A secret that any item shows is left out of all."""

    def __init__(self, *, item: int = ITEM, total: int = TOTAL) -> None:
        self._items: dict[str, Item] = {}
        self._missing: dict[str, str] = {}
        self._secrets: set[str] = set()
        self._item, self._left = item, total

    def put(self, path: str, what: str, text: str, *, keep: Literal["head", "tail"] = "head") -> None:
        """A text; of one that is too long its ``head`` or ``tail``."""
        self._take(path, what, redact.text(text, self._secrets), keep)

    def put_object(self, path: str, what: str, value: Any, *, harmless: tuple[str, ...] = ()) -> None:
        """Plain JSON types. Fields called as in ``harmless`` are no secrets, whatever their name."""
        shown = redact.structured(value, self._secrets, harmless=harmless)
        self._take(path, what, json.dumps(shown, indent=1, ensure_ascii=False) + "\n", "head")

    def miss(self, path: str, why: object) -> None:
        """What could not be had; ``why`` for people, on one line."""
        self._missing[path] = " ".join(redact.text(str(why), self._secrets).split()) or type(why).__name__

    def know(self, secret: str) -> None:
        """A secret of this machine, to be left out wherever it stands."""
        self._secrets.add(secret)

    def files(self) -> dict[str, str]:
        """All files of the archive."""
        found = {path: redact.scrub(item.text, self._secrets) for path, item in sorted(self._items.items())}
        lines = [f"{path}: {redact.scrub(why, self._secrets)}" for path, why in sorted(self._missing.items())]
        index = [
            "What is in here. Passwords, tokens and keys were left out: look before you send it, all the same.",
            "errors.txt says what could not be had.",
            "",
            *(
                f"{path}  {len(found[path].encode())} bytes  {item.what}{f'  ({item.note})' if item.note else ''}"
                for path, item in sorted(self._items.items())
            ),
        ]
        return {"index.txt": "\n".join(index) + "\n", "errors.txt": "".join(f"{line}\n" for line in lines)} | found

    def _take(self, path: str, what: str, text: str, keep: Literal["head", "tail"]) -> None:
        if path in self._items:
            raise ValueError(f"two items are called {path}")
        limit, note, size = min(self._item, self._left), "", len(text)
        if limit <= 0:
            self.miss(path, "the archive is full")
            return
        if size > limit:
            text = text[:limit] if keep == "head" else text[-limit:]
            note = f"cut: the {'first' if keep == 'head' else 'last'} {limit} of {size} letters"
        self._left -= len(text)
        self._items[path] = Item(text, what, note)


def pack(files: dict[str, str], name: str) -> bytes:
    """A tar.gz with all files below a folder ``name``. The same files give the same bytes."""
    raw = io.BytesIO()
    with GzipFile(fileobj=raw, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for path, text in sorted(files.items()):
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return raw.getvalue()
