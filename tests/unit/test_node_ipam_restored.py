"""A store that is put back from a backup says of blocks what was true once (R5): nobody takes what is another's now."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipam.errors import IPAMError
from ipam.ledger import Phase
from ipam.model import ForeignRoute
from store.memory import MemoryStore
from store.model import IPAMBlock, block_name
from tests.ipam_fakes import FakeClock, Rig, attachment, play, pool, waited

ADDRESS, CIDR = "10.8.0.7", "10.8.0.7/32"
SINGLE = pool("single", "10.8.0.0/24", 32)


def put_back(store: MemoryStore, block: IPAMBlock) -> None:
    """As etcd's restore does: no event, no say of anybody."""
    store._objects[IPAMBlock][block.name] = block


@pytest.mark.parametrize("restart", [False, True], ids=["runs on", "starts again"])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "silent"])
def test_a_block_given_back_since_the_backup_is_given_back_again(
    tmp_path: Path, restart: bool, announced: bool
) -> None:
    """Without a route to it, its node's own memory alone says so."""

    async def main() -> None:
        clock = FakeClock()
        first = Rig(tmp_path, node="node-1", clock=clock)
        second = Rig(tmp_path, node="node-2", clock=clock, store=first.store)
        await first.create(SINGLE)
        await first.up()
        await second.up()
        await waited(first, first.add(1, addresses=(ADDRESS,)))
        await clock.advance(1)
        backup = await first.store.get(IPAMBlock, block_name(CIDR))
        assert [a.address for a in backup.status.allocations] == [ADDRESS]
        first.delete(1)
        await clock.advance(20)
        lease = await waited(second, second.add(2, addresses=(ADDRESS,)))
        await clock.advance(1)

        if announced:
            first.kernel.foreign = {ForeignRoute(CIDR)}
        if restart:
            await first.restart()  # which writes the journal anew
        put_back(first.memory, backup)
        if restart:
            await first.restart()
        for i in range(220):
            await clock.advance(1.5)
            assert Phase.READY not in first.phases().values()
            if i % 40:
                continue
            if announced:
                with pytest.raises(IPAMError):
                    await waited(first, first.add("again", addresses=(ADDRESS,)))
        assert second.ipam.lease(attachment(2)) == lease
        block = await first.store.get(IPAMBlock, block_name(CIDR))
        assert block.spec.node == "node-2"
        assert [a.container for a in block.status.allocations] == ["c2"]
        assert second.phases() == {CIDR: Phase.READY}
        assert second.ipam.conditions() == ()
        for rig in (first, second):
            rig.check_alive()
            await rig.down()

    play(main())


def test_a_block_that_another_node_lets_go_of_is_ours_again_soon(tmp_path: Path) -> None:
    async def main() -> None:
        rig = Rig(tmp_path)
        await rig.create(SINGLE)
        await rig.up()
        await waited(rig, rig.add(1, addresses=(ADDRESS,)))
        await rig.wipe(CIDR)
        other = Rig(tmp_path, node="node-2", clock=rig.clock, store=rig.store)
        await rig.down()
        await other.up()
        await waited(other, other.add(2, addresses=(ADDRESS,)))
        await rig.up()
        await rig.clock.advance(10)
        assert [c.type for c in rig.ipam.conditions()] == ["BlockLost"]
        other.delete(2)
        await rig.clock.advance(40)
        assert rig.ipam.conditions() == ()
        assert rig.phases() == {CIDR: Phase.READY}
        assert (await rig.store.get(IPAMBlock, block_name(CIDR))).spec.node == "node-1"
        await rig.down()
        await other.down()

    play(main())
