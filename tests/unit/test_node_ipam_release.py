"""Addresses that people ask to have released, by an annotation on the block (R2)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ipam.node import Request
from store.errors import Unavailable
from store.memory import MemoryStore
from store.model import ANNOTATION_RELEASE, ANNOTATION_RELEASE_REFUSED, IPAMBlock, block_name
from tests.ipam_fakes import FakeClock, Rig, attachment, link_name, play, pool, run

SMALL = pool("small", "10.1.0.0/24", 28)


async def the_block(rig: Rig) -> IPAMBlock:
    (view,) = rig.ipam.blocks()
    return await rig.store.get(IPAMBlock, block_name(view.cidr))


async def ask(rig: Rig, *addresses: str) -> None:
    block = await the_block(rig)
    annotations = {**block.metadata.annotations, ANNOTATION_RELEASE: ",".join(addresses)}
    meta = msgspec.structs.replace(block.metadata, annotations=annotations)
    await rig.store.update(msgspec.structs.replace(block, metadata=meta))


def test_what_leaked_is_released_at_once_and_what_lives_is_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        leaked, live = await rig.add(1), await rig.add(2)
        await rig.clock.advance(1)
        rig.kernel.unwire(link_name(attachment(1)))
        await ask(rig, *leaked.addresses, *live.addresses, "10.99.0.1", "nonsense")
        await rig.clock.advance(0.5)
        assert rig.ipam.leases() == (live,)
        block = await the_block(rig)
        assert ANNOTATION_RELEASE not in block.metadata.annotations
        told = block.metadata.annotations[ANNOTATION_RELEASE_REFUSED]
        assert f"{live.addresses[0]}: the link of pods/c2/eth0 is there: delete that pod" in told
        assert "nonsense: that is no address" in told
        assert leaked.addresses[0] not in told
        assert [a.container for a in block.status.allocations] == ["c2"]
        rig.delete(2)
        await ask(rig, *live.addresses)
        await rig.clock.advance(0.5)
        assert (await the_block(rig)).metadata.annotations == {}
        await rig.restart()
        assert rig.ipam.leases() == (), "the journal has it too"

    run(tmp_path, test, SMALL)


def test_an_add_that_is_under_way_is_refused(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.ipam.take(Request(attachment(1)))
        await rig.clock.advance(1)
        await ask(rig, *lease.addresses)
        await rig.clock.advance(0.5)
        assert rig.ipam.leases() == (lease,)
        assert "under way" in (await the_block(rig)).metadata.annotations[ANNOTATION_RELEASE_REFUSED]

    run(tmp_path, test, SMALL)


def test_a_server_in_a_wrong_namespace_and_one_that_cannot_look_release_nothing(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        await rig.clock.advance(1)
        rig.kernel.unwire(link_name(attachment(1)))
        rig.kernel.broken = True
        await ask(rig, *lease.addresses)
        await rig.clock.advance(0.5)
        assert "could not be read" in (await the_block(rig)).metadata.annotations[ANNOTATION_RELEASE_REFUSED]
        rig.kernel.broken = False
        rig.kernel.move_to(7)
        await ask(rig, *lease.addresses)
        await rig.clock.advance(0.5)
        assert "namespace 7" in (await the_block(rig)).metadata.annotations[ANNOTATION_RELEASE_REFUSED]
        assert rig.ipam.leases() == (lease,)

    run(tmp_path, test, SMALL)


def test_an_address_that_only_a_route_tells_of_is_released_once_the_route_is_gone(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await rig.clock.advance(1)
        address = rig.ipam.blocks()[0].cidr.partition("/")[0]
        rig.kernel.wire("ulstray", (address,))
        await rig.clock.advance(31)
        await ask(rig, address)
        await rig.clock.advance(0.5)
        assert "a route leads to it" in (await the_block(rig)).metadata.annotations[ANNOTATION_RELEASE_REFUSED]
        rig.kernel.unwire("ulstray")
        await ask(rig, address)
        await rig.clock.advance(0.5)
        assert (await the_block(rig)).status.used == 0

    run(tmp_path, test, SMALL)


def test_what_was_asked_while_the_server_was_away_is_answered_at_its_start(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        lease = await rig.add(1)
        await rig.clock.advance(1)
        await rig.down()
        rig.kernel.unwire(link_name(attachment(1)))
        await ask(rig, *lease.addresses)
        await rig.up()
        await rig.clock.advance(0.5)
        assert rig.ipam.leases() == ()
        assert (await the_block(rig)).metadata.annotations == {}

    run(tmp_path, test, SMALL)


def test_an_answer_that_the_store_does_not_take_is_given_again(tmp_path: Path) -> None:
    class Shut(MemoryStore):
        shut = False

        async def update(self, obj):  # type: ignore[no-untyped-def]
            if self.shut:
                raise Unavailable("no writes at present")
            return await super().update(obj)

    async def main() -> None:
        clock = FakeClock()
        store = Shut(clock)
        rig = Rig(tmp_path, store=store, clock=clock)
        await rig.create(SMALL)
        await rig.up()
        lease = await rig.add(1)
        await clock.advance(1)
        rig.kernel.unwire(link_name(attachment(1)))
        await ask(rig, *lease.addresses)
        store.shut = True
        await clock.advance(60)
        assert rig.ipam.leases() == ()
        store.shut = False
        await clock.advance(11)
        assert (await the_block(rig)).metadata.annotations == {}
        rig.check_alive()
        await rig.down()

    play(main())
