"""How much a node asks of the store: times thousands, that is what a cluster costs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from store.counted import CountedStore
from store.memory import MemoryStore
from store.model import Meta, Node
from tests.ipam_fakes import FakeClock, Rig, play, pool, settle

#: Pools, reservations, configuration, Node, own blocks.
WATCHES = 5


def test_a_node_that_joins_asks_for_nothing_twice(tmp_path: Path) -> None:
    async def main() -> None:
        rig, store = await joined(tmp_path)
        # The claim reads the Node and creates; then pools, and blocks around, of today and of older releases.
        expected = {"watch": WATCHES, "get": 1, "create": 1, "list": 3, "update_status": 1}
        assert store.requests == expected
        for i in range(20):
            await rig.add(i)
        await rig.clock.advance(1)
        assert store.requests == expected | {"update_status": 2}
        await rig.down()

    play(main())


def test_a_node_at_rest_asks_who_owns_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        rig, store = await joined(tmp_path)
        await rig.add(1)
        await rig.clock.advance(1)
        before = dict(store.requests)
        await rig.clock.advance(3600)
        rig.check_alive()
        assert store.requests == before | {"list": before["list"] + 12}
        await rig.down()

    play(main())


def test_a_node_that_comes_back_asks_for_no_more_than_a_new_one(tmp_path: Path) -> None:
    async def main() -> None:
        rig, store = await joined(tmp_path)
        await rig.add(1)
        await rig.clock.advance(1)
        await rig.down()
        store.requests.clear()
        await up(rig)
        # It says who writes the block from now on.
        assert store.requests == {"watch": WATCHES, "update_status": 1}
        await rig.down()

    play(main())


async def joined(folder: Path) -> tuple[Rig, CountedStore]:
    """A node that has its first block, and all that it asked for. Its agent asks for nothing."""
    clock = FakeClock()
    store = CountedStore(MemoryStore(clock))
    rig = Rig(folder, store=store, clock=clock)
    for obj in (pool("v4", "10.244.0.0/16"), Node(metadata=Meta(name=rig.node))):
        await store.create(cast(Any, obj))
    store.requests.clear()
    await up(rig)
    return rig, store


async def up(rig: Rig) -> None:
    await rig.up(run=False)
    rig._running = asyncio.create_task(rig.ipam.run())
    await settle()
    await rig.clock.advance(3)
