"""underlayctl as people use it: whole command lines on a SQLite store of a test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ctl.main import main
from store.base import Store
from store.clock import SystemClock
from store.model import (
    Allocation,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    Meta,
    Resource,
    Writer,
)
from store.open import open_store

NOW = "2026-11-24T12:00:00Z"


class Ctl:
    """Runs command lines on one store, and looks at the store by itself."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.url = f"sqlite:{folder}/store.db"
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(["--store", self.url, *arguments])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def ok(self, *arguments: str) -> str:
        code, out, err = self(*arguments)
        assert (code, err) == (0, ""), (code, out, err)
        return out

    def file(self, text: str, name: str = "a.yaml") -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def on_store(self, work: Callable[[Store], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            store = open_store(self.url, clock=SystemClock())
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def put(self, *objects: Resource) -> None:
        async def work(store: Store) -> None:
            for obj in objects:
                made = await store.create(obj)
                if hasattr(obj, "status"):
                    await store.update_status(msgspec.structs.replace(made, status=obj.status))

        self.on_store(work)

    def all(self, kind: type[Resource]) -> tuple[Resource, ...]:
        return tuple(self.on_store(lambda store: store.list(kind)).items)


def pool(name: str = "pods-v4", cidr: str = "10.244.0.0/16", **spec: Any) -> IPPool:
    return IPPool(metadata=Meta(name=name), spec=IPPoolSpec(cidr=cidr, **spec))


def block(
    cidr: str = "10.244.0.0/26", name: str = "10-244-0-0-26", node: str = "node-1", *addresses: str, **status: Any
) -> IPAMBlock:
    held = tuple(
        Allocation(address=a, network="underlay", container=f"c{i}", interface="eth0", pod=f"default/p{i}", since=NOW)
        for i, a in enumerate(addresses)
    )
    said = IPAMBlockStatus(
        allocations=held, used=len(held), free=64 - len(held), writer=Writer(boot_id="b" * 36, start=2), **status
    )
    return IPAMBlock(metadata=Meta(name=name), spec=IPAMBlockSpec(cidr=cidr, pool="pods-v4", node=node), status=said)
