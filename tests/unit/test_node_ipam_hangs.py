"""A store that takes each call and never answers: worse than one that refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ipam.errors import NotReady
from ipam.ledger import Phase
from ipam.model import Settings
from store.base import Event, T
from store.memory import MemoryStore
from store.model import Meta, Node, R
from tests.ipam_fakes import FakeClock, Rig, attachment, play, pool, waited

SMALL = pool("small", "10.1.0.0/24", 30)  # blocks of 4
NODE = Node(metadata=Meta(name="node-1"))


class Hanging(MemoryStore):
    """``answers`` is cleared to have it hang, all calls or those of which ``hangs`` says so."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.answers = asyncio.Event()
        self.answers.set()
        self.hangs: Callable[[str], bool] = lambda _: True

    async def _wait(self, call: str) -> None:
        if self.hangs(call):
            await self.answers.wait()

    async def _get(self, kind: type[T], key: str) -> T | None:
        await self._wait("get")
        return await super()._get(kind, key)

    async def _all(self, kind: type[T]) -> Any:
        await self._wait("list")
        return await super()._all(kind)

    async def watch(self, kind: type[R], **how: Any) -> AsyncGenerator[Event[R], None]:
        await self._wait("watch")
        async for event in super().watch(kind, **how):
            yield event

    async def create(self, obj: R) -> R:
        await self._wait("create")
        return await super().create(obj)


def hanging(directory: Path, test: Callable[[Rig, Hanging], Awaitable[None]], **settings: float) -> None:
    async def main() -> None:
        clock = FakeClock()
        store = Hanging(clock)
        rig = Rig(directory, store=store, clock=clock, settings=Settings(**settings))  # type: ignore[arg-type]
        await rig.create(SMALL, NODE)
        await rig.up()
        try:
            await test(rig, store)
            rig.check_alive()
        finally:
            await rig.down()

    play(main())


@pytest.mark.parametrize("blackhole", [True, False], ids=["with its blackhole", "without"])
def test_a_new_block_becomes_ready_while_a_call_to_the_store_hangs(tmp_path: Path, blackhole: bool) -> None:
    async def test(rig: Rig, store: Hanging) -> None:
        await rig.clock.advance(1)
        rig.agent = False
        for i in range(4):
            await rig.add(i)
        await rig.clock.advance(0.5)
        assert sorted(phase.value for phase in rig.phases().values()) == ["new", "ready"]
        store.answers.clear()
        own = next(own for own in rig.ipam._ledger.blocks.values() if own.phase is Phase.READY)
        rig.ipam._keeper.vanished(own)  # which has the keeper ask for it
        await rig.clock.advance(0.1)
        if blackhole:
            rig.kernel.set_blackholes(set(rig.phases()))
        lease = await waited(rig, rig.add("more"), 0.4 if blackhole else 2.5)
        assert lease.addresses[0]
        store.answers.set()

    hanging(tmp_path, test)


def test_a_start_does_not_hold_up_the_socket_for_a_store_that_hangs(tmp_path: Path) -> None:
    """DEL works, ADD is to be tried again, and it goes on by itself once the store answers."""

    async def test(rig: Rig, store: Hanging) -> None:
        lease = await rig.add(1)
        await rig.clock.advance(1)
        await rig.down()
        store.answers.clear()
        await asyncio.wait_for(rig.up(), 60)
        assert rig.ipam.lease(attachment(1)) == lease
        with pytest.raises(NotReady, match="cannot be read yet: no answer from the store"):
            await rig.add(2)
        assert rig.delete(1) == lease
        store.answers.set()
        await rig.clock.advance(1)
        await rig.add(3)

    hanging(tmp_path, test, start_limit=0.05)


def test_a_start_whose_claim_hangs_hands_out_what_it_has(tmp_path: Path) -> None:
    async def test(rig: Rig, store: Hanging) -> None:
        for i in range(3):
            await rig.add(i)
        await rig.clock.advance(1)
        await rig.down()
        # It has a block, and the next one is due: three of four are in use, and one more.
        await rig.store.create(pool("other", "10.2.0.0/24", 30))
        store.answers.clear()
        store.hangs = lambda call: call == "create"
        await asyncio.wait_for(rig.up(), 60)
        await rig.clock.advance(3)
        assert rig.ipam.refusal() == ""
        assert (await rig.add("last")).addresses
        store.answers.set()
        await rig.clock.advance(1)
        assert {view.pool for view in rig.ipam.blocks()} == {"small", "other"}

    hanging(tmp_path, test, start_limit=0.05)
