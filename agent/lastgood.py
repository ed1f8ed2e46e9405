"""The agent's last good view of the store, on disk: what it starts from when the store cannot be reached (R14)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from agent.errors import AgentError
from store.model import BGPConfiguration, BGPFilter, BGPNodeStatus, BGPPeer, IPAMBlock, IPPool, Node

Kept = BGPConfiguration | BGPFilter | BGPNodeStatus | BGPPeer | IPAMBlock | IPPool | Node


class Unreadable(AgentError):
    """The file is not what was written: cut short, changed, or of another version."""


class _File(msgspec.Struct, frozen=True):
    sha256: str
    objects: msgspec.Raw


def save(path: Path, objects: Iterable[Kept]) -> None:
    """Puts the objects in the file's place, whole or not at all. Raises OSError."""
    body = msgspec.json.encode(list(objects))
    text = msgspec.json.encode(_File(hashlib.sha256(body).hexdigest(), msgspec.Raw(body)))
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())  # it is read after a crash of the machine, too
    temporary.replace(path)


def load(path: Path) -> tuple[Kept, ...]:
    """The objects that were saved last; () if there is no file. Raises Unreadable, OSError."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        file = msgspec.json.decode(text, type=_File)
        if hashlib.sha256(bytes(file.objects)).hexdigest() != file.sha256:
            raise Unreadable(f"{path}: the checksum does not fit: it is left alone, and a new one written in its place")
        return tuple(msgspec.json.decode(file.objects, type=list[Kept]))
    except msgspec.MsgspecError as e:
        raise Unreadable(f"{path}: {e}: it is left alone, and a new one written in its place") from e
