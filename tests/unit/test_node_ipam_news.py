"""What an operator hears of: conditions as they come, go on and go, and what befalls a pod."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ipam.errors import Exhausted, JournalError, WrongPool
from ipam.journal import Journal
from ipam.model import CONDITIONS, News, Request
from store.model import IPAMBlock, IPAMBlockSpec, IPPool, Meta, block_name, within_of
from tests.ipam_fakes import V4, Rig, attachment, link_name, play, pool, waited

TINY = pool("tiny", "10.1.0.0/30", 30)  # one block of four


def foreign(cidr: str, of: str) -> IPAMBlock:
    """A block of another node."""
    spec = IPAMBlockSpec(cidr=cidr, pool=of, node="node-2", within=within_of(cidr))
    return IPAMBlock(metadata=Meta(name=block_name(cidr)), spec=spec)


def run(directory: Path, story: Callable[[Rig, list[News]], Awaitable[None]], *objects: IPPool | IPAMBlock) -> None:
    """Runs the story on a node whose server writes its news into the list."""

    async def main() -> None:
        rig, heard = Rig(directory), list[News]()
        rig.tell = heard.append
        for obj in objects:
            await rig.store.create(obj)
        await rig.up()
        try:
            await story(rig, heard)
            rig.check_alive()
        finally:
            await rig.down()

    play(main())


def test_a_condition_is_told_as_it_comes_and_while_it_goes_on(tmp_path: Path) -> None:
    """Here of a node that never got a block, so it has no status to say it in."""

    async def story(rig: Rig, heard: list[News]) -> None:
        assert await rig.own_blocks() == []
        assert [(n.reason, n.action, n.normal) for n in heard] == [("PoolExhausted", "NoFreeBlock", False)]
        assert "tiny" in heard[0].note
        await rig.clock.advance(2 * rig.settings.retell)
        assert heard == heard[:1] * 3

    run(tmp_path, story, TINY, foreign("10.1.0.0/30", "tiny"))


def test_the_end_of_a_condition_is_no_warning(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        rig.kernel.move_to(7)
        await rig.clock.advance(31)
        rig.kernel.move_to(4026531840)
        await rig.clock.advance(31)
        assert [(n.reason, n.normal) for n in heard] == [("SweepStopped", False), ("SweepStopped", True)]
        assert heard[1].note == f"over: {heard[0].note}"

    run(tmp_path, story, V4)


def test_a_pod_hears_why_it_got_no_address(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        for i in range(4):
            await rig.add(i)
        heard.clear()
        with pytest.raises(Exhausted) as failed:
            await waited(rig, rig.ipam.take(Request(attachment(9), pod="shop/web-0", pod_uid="u9")), 8)
        of_pod = [n for n in heard if n.pod]
        assert of_pod == [News("NoAddress", "HandOut", str(failed.value), "shop/web-0", "u9")]
        with pytest.raises(WrongPool):
            await rig.ipam.take(Request(attachment(10), pod="shop/web-1", pod_uid="u10", pools=("none",)))
        assert heard[-1].pod == "shop/web-1"

    run(tmp_path, story, TINY)


def test_an_add_that_names_no_pod_is_told_of_to_none(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        with pytest.raises(WrongPool):
            await rig.ipam.take(Request(attachment(1), pools=("none",)))
        assert heard == []

    run(tmp_path, story, V4)


def test_pods_hear_that_their_address_is_another_nodes_by_now_with_their_uid_also_after_a_restart(
    tmp_path: Path,
) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        lease = await rig.ipam.take(Request(attachment(1), pod="shop/web-0", pod_uid="u1"))
        rig.ipam.bind(attachment(1), rig.kernel.wire(link_name(attachment(1)), lease.addresses))
        (cidr,) = await rig.own_blocks()
        await rig.restart()
        await rig.wipe(cidr)
        await rig.store.create(foreign(cidr, "v4"))
        await rig.clock.advance(5)
        told = {(n.reason, n.pod, n.pod_uid) for n in heard}
        assert told == {("BlockMarked", "", ""), ("BlockLost", "", ""), ("AddressLost", "shop/web-0", "u1")}

    run(tmp_path, story, V4)


def test_a_leak_that_a_sweep_ends_is_told_of(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        for i in range(6):
            await rig.add(i)
        rig.kernel.unwire(link_name(attachment(1)))
        await rig.clock.advance(65)
        (leak,) = heard
        assert (leak.reason, leak.normal) == ("LeakReleased", True)
        assert str(attachment(1)) in leak.note

    run(tmp_path, story, V4)


def test_a_marked_block_is_told_of(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        await rig.add(1)
        (cidr,) = await rig.own_blocks()
        await rig.store.delete(IPAMBlock, block_name(cidr))
        await rig.clock.advance(1)
        assert [n.reason for n in heard if cidr in n.note] == ["BlockMarked"]

    run(tmp_path, story, V4)


def test_a_new_block_that_overlaps_another_is_told_of(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        await rig.store.create(foreign("10.1.0.0/24", "old"))
        await rig.store.delete(IPPool, "old")
        await rig.create(pool("new", "10.1.0.0/24", 28))
        await rig.clock.advance(5)
        overlap = next(n for n in heard if n.reason == "BlockOverlaps")
        assert "10.1.0.0/24 of node node-2" in overlap.note

    run(tmp_path, story, pool("old", "10.1.0.0/24", 24, node_selector="!all()"))


def test_a_journal_that_cannot_be_written_is_a_condition_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def story(rig: Rig, heard: list[News]) -> None:
        await rig.add(1)
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "_write", full)
            with pytest.raises(JournalError):
                await rig.add(2)
            assert [c.type for c in rig.ipam.conditions()] == ["JournalFailed"]
            await rig.clock.advance(6)
            assert [c.type for c in rig.ipam.conditions()] == ["JournalFailed"]
        await rig.clock.advance(6)  # no ADD is needed to find that there is room again
        assert rig.ipam.conditions() == ()
        assert [(n.reason, n.normal) for n in heard] == [("JournalFailed", False), ("JournalFailed", True)]
        (block,) = (await rig.store.list(IPAMBlock)).items
        assert block.status.conditions == ()

    run(tmp_path, story, V4)


def test_figures_are_those_of_the_moment(tmp_path: Path) -> None:
    async def story(rig: Rig, heard: list[News]) -> None:
        rig.memory.fail_with("it is away")
        await rig.add(1)
        await rig.clock.advance(30)
        figures = rig.ipam.figures()
        assert figures.leases == 1
        assert figures.journal_bytes == (rig.directory / f"journal-{rig.boot_id}").stat().st_size
        assert figures.mirror_lag == pytest.approx(30, abs=1)
        rig.memory.fail_with("")
        await rig.clock.advance(20)
        assert rig.ipam.figures().mirror_lag == 0

    run(tmp_path, story, V4)


def test_every_condition_that_is_raised_has_its_metric() -> None:
    root = Path(__file__).parents[2] / "ipam"
    code = "".join(path.read_text() for path in root.glob("*.py"))
    assert set(re.findall(r'(?:(?<!un)say\(|type=)\s*"([A-Z][A-Za-z]+)"', code)) == set(CONDITIONS)
