"""All that can be lost, lost together: the journal deleted, cut anywhere, or of another boot; a mirror that is behind,
void or gone; a store that is away at the start. What is left is the kernel, and no live address is handed out again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from ipam.errors import IPAMError, NotReady
from ipam.node import Request
from store.model import IPAMBlock, IPAMBlockStatus, Writer
from tests.ipam_fakes import Rig, attachment, link_name, pool, waited

#: Few, so that all of them are handed out: 4 blocks of 8 in each family.
POOLS = (pool("four", "10.1.0.0/27", 29), pool("six", "fd00:1::/123", 125))
MIRRORS = ("whole", "behind", "of another boot", "gone")


def deleted(journal: Path) -> None:
    journal.unlink()


def of_another_boot(journal: Path) -> None:
    journal.rename(journal.with_name("journal-boot-0"))


async def lived(folder: Path, mirror: str) -> Rig:
    """A node whose server was killed after pods came and went; the store has what ``mirror`` says."""
    rig = Rig(folder)
    await rig.create(*POOLS)
    await rig.up()
    leases = [await rig.add(i) for i in range(5)]
    await rig.clock.advance(1)
    if mirror == "behind":
        rig.memory.fail_with("away")
    # An address goes to another pod: what the mirror has of it, if that is behind, is another's.
    rig.delete(1)
    await rig.clock.advance(31)
    await rig.add("heir", addresses=leases[1].addresses)
    await rig.add(6)
    rig.delete(2)
    await rig.clock.advance(1)
    await rig.down()
    rig.memory.fail_with("")
    if mirror in ("of another boot", "gone"):
        for block in (await rig.store.list(IPAMBlock)).items:
            status = IPAMBlockStatus()
            if mirror == "of another boot":
                status = msgspec.structs.replace(block.status, writer=Writer(boot_id="boot-0", start=7))
            await rig.store.update_status(msgspec.structs.replace(block, status=status))
    return rig


def held(rig: Rig, living: Mapping[str, str], when: str) -> None:
    """Somebody has each address that lives, so that nobody gets it."""
    free = {address: link for address, link in living.items() if rig.ipam._ledger.owner(address) is None}
    assert not free, when


async def hands_out_nothing_that_lives(rig: Rig, *, away: bool) -> None:
    """Starts the server and has pods take all that there is; a second route to an address the kernel refuses, too."""
    living = rig.kernel.live()
    assert len(living) == 10
    rig.memory.fail_with("away" if away else "")
    await rig.up()
    if away:
        with pytest.raises(NotReady):
            await rig.ipam.take(Request(attachment("early")))
        rig.memory.fail_with("")
        await rig.clock.advance(3)
    given: set[str] = set()
    for i in range(40):
        try:
            given |= set((await waited(rig, rig.add(f"n{i}"))).addresses)
        except IPAMError:
            break
    assert not given & living.keys()
    assert len(given) >= 2 * (32 - 8), "what nobody has is handed out"
    # Sweeps look at what was found, twice; the mirror says it.
    await rig.clock.advance(70)
    assert living.items() <= rig.kernel.live().items()
    held(rig, living, "swept")
    assert living.keys() <= (await rig.mirror()).keys()
    rig.check_alive()
    await rig.down()


def play(folder: Path, mirror: str, damage: Callable[[Path], None], *, away: bool) -> None:
    async def main() -> None:
        rig = await lived(folder, mirror)
        damage(rig._journal.path)
        await hands_out_nothing_that_lives(rig, away=away)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("away", [False, True], ids=["store there", "store away"])
@pytest.mark.parametrize("mirror", MIRRORS)
@pytest.mark.parametrize("damage", [deleted, of_another_boot], ids=lambda d: d.__name__)
def test_a_journal_that_says_nothing(tmp_path: Path, damage: Callable[[Path], None], mirror: str, away: bool) -> None:
    play(tmp_path, mirror, damage, away=away)


@pytest.mark.parametrize("mirror", MIRRORS)
def test_a_journal_cut_at_every_byte(tmp_path: Path, mirror: str) -> None:
    """Each byte in one of these cases, for what the server knows when it has started; between lines in all, for what it
    hands out then."""

    async def main() -> None:
        rig = await lived(tmp_path, mirror)
        path, living = rig._journal.path, rig.kernel.live()
        whole = path.read_bytes()
        mirrored = {block.name: block.status for block in (await rig.store.list(IPAMBlock)).items}
        ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
        for at in sorted({*range(MIRRORS.index(mirror), len(whole), len(MIRRORS)), *ends}):
            path.write_bytes(whole[:at])
            for block in (await rig.store.list(IPAMBlock)).items:
                status = mirrored.get(block.name, IPAMBlockStatus())
                await rig.store.update_status(msgspec.structs.replace(block, status=status))
            await rig.up(run=at in ends)
            held(rig, living, f"cut at {at}")
            if at in ends:
                new = [await waited(rig, rig.add(f"n{at}-{i}")) for i in range(3)]
                if mirror == "behind":  # the journal may believe in pods that are gone, against the mirror
                    await rig.clock.advance(62)
                    held(rig, living, f"swept, cut at {at}")
                assert living.items() <= rig.kernel.live().items(), at
                for lease in new:
                    rig.kernel.unwire(link_name(lease.attachment))
            await rig.down()

    asyncio.run(asyncio.wait_for(main(), 120))
