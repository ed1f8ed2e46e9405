"""ipam release: addresses by asking their owner, blocks of the dead, and the leaks of a report."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ctl import look, release, report
from ctl.check import findings
from ctl.failures import Failure, Usage
from ctl.finding import KINDS, Finding, Local, View
from ipam.journal import Journal, Opened, Taken
from ipam.model import Attachment
from store.base import Store, mutate
from store.clock import SystemClock
from store.errors import NotFound, Unavailable
from store.memory import MemoryStore
from store.model import (
    ANNOTATION_RELEASE,
    ANNOTATION_RELEASE_REFUSED,
    FINALIZER_OWNER,
    IPAMBlock,
    IPAMBlockStatus,
    IPPool,
    Meta,
    Node,
    Pod,
    PodSpec,
    PodStatus,
    Resource,
    Writer,
    release_wanted,
)
from tests.ctl_fakes import Ctl, block, pool

BLOCK = "10-244-0-0-26"
NODE = Node(metadata=Meta(name="node-1"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "ANSWER", 0.3)
    monkeypatch.setattr(look, "SETTLE", 0.01)
    monkeypatch.setattr(look, "PATIENCE", {})
    for name in ("UNDERLAY_STORE", "UNDERLAY_NODE", "UNDERLAY_RUN"):
        monkeypatch.delenv(name, raising=False)


async def filled(store: Store, *objects: Resource) -> None:
    for obj in objects:
        created = await store.create(obj)
        if hasattr(obj, "status"):
            await store.update_status(msgspec.structs.replace(created, status=obj.status))


def on_store(
    work: Callable[[MemoryStore], Awaitable[Any]], *objects: Resource, owner: Callable[[Store], Awaitable[None]] | None
) -> Any:
    """Runs ``work`` on a store with these objects, beside an owner of blocks."""

    async def main() -> Any:
        store = MemoryStore(SystemClock())
        await filled(store, *objects)
        task = asyncio.create_task(owner(store)) if owner else None
        try:
            return await asyncio.wait_for(work(store), 60)  # type: ignore[arg-type]
        finally:
            if task:
                task.cancel()

    return asyncio.run(main())


async def obedient(store: Store, *, keeps: frozenset[str] = frozenset()) -> None:
    """Carries out each release that its annotation asks for, as an owner does: frees, and removes what it has read.
    What is in ``keeps`` has a link, so it stays."""
    async for event in store.watch(IPAMBlock):
        wanted = release_wanted(event.object) if event.object and event.type != "deleted" else ()
        if not wanted or event.object is None:
            continue

        def freed(b: IPAMBlock, wanted: tuple[str, ...] = wanted) -> IPAMBlock:
            left = tuple(a for a in b.status.allocations if a.address not in wanted or a.address in keeps)
            return msgspec.structs.replace(b, status=msgspec.structs.replace(b.status, allocations=left))

        def done(b: IPAMBlock, wanted: tuple[str, ...] = wanted) -> IPAMBlock:
            refused = "; ".join(f"{a}: its link is there; look" for a in wanted if a in keeps)
            annotations = {ANNOTATION_RELEASE_REFUSED: refused} if refused else {}
            return msgspec.structs.replace(b, metadata=msgspec.structs.replace(b.metadata, annotations=annotations))

        await mutate(store, IPAMBlock, event.object.name, freed, status=True)
        await mutate(store, IPAMBlock, event.object.name, done)


async def stubborn(store: Store) -> None:
    await obedient(store, keeps=frozenset({"10.244.0.1", "10.244.0.11"}))


def annotated(text: str, *addresses: str) -> IPAMBlock:
    made = block("10.244.0.0/26", BLOCK, "node-1", *addresses)
    annotations = {ANNOTATION_RELEASE: text} if text else {}
    return msgspec.structs.replace(made, metadata=Meta(name=BLOCK, annotations=annotations))


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_the_annotation_says_addresses_in_order_beside_those_asked_for_already(capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> tuple[int, IPAMBlock]:
        code = await release.release_addresses(store, ["10.244.0.20", "10.244.0.3", "10.244.0.3"])
        return code, await store.get(IPAMBlock, BLOCK)

    there = annotated("10.244.0.9, odd", "10.244.0.3", "10.244.0.9", "10.244.0.20")
    code, after = on_store(work, pool(), NODE, there, owner=None)
    assert after.metadata.annotations[ANNOTATION_RELEASE] == "10.244.0.3,10.244.0.9,10.244.0.20,odd"
    assert release_wanted(after) == ("10.244.0.3", "10.244.0.9", "10.244.0.20", "odd")
    assert len(after.status.allocations) == 3  # whose they are to write
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.count("node-1 was asked, and has not answered within 0.3 s") == 2


def test_an_owner_that_answers_has_released(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "ANSWER", 60)  # not waited for
    six = block("fd00:10:244::/122", "fd00-10-244--0-122", "node-2", "fd00:10:244::5")
    six = msgspec.structs.replace(six, spec=msgspec.structs.replace(six.spec, pool="pods-v6"))

    async def work(store: MemoryStore) -> int:
        code = await release.release_addresses(store, ["10.244.0.1", "fd00:10:244:0::5"])
        for name in (BLOCK, "fd00-10-244--0-122"):
            assert (await store.get(IPAMBlock, name)).metadata.annotations == {}
        return code

    objects = (pool(), pool("pods-v6", "fd00:10:244::/48"), NODE, Node(metadata=Meta(name="node-2")))
    assert on_store(work, *objects, annotated("", "10.244.0.1", "10.244.0.2"), six, owner=obedient) == 0
    assert capsys.readouterr().out == "10.244.0.1 released\nfd00:10:244::5 released\n"


def test_an_owner_keeps_what_is_in_use_and_says_why(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it said to an earlier wish does not count."""
    monkeypatch.setattr(release, "ANSWER", 60)  # not waited for
    addresses = ["10.244.0.1", "10.244.0.2", "10.244.0.11"]
    there = annotated("", *addresses)
    earlier = {ANNOTATION_RELEASE_REFUSED: "10.244.0.1: old; 10.244.0.2: old"}
    there = msgspec.structs.replace(there, metadata=Meta(name=BLOCK, annotations=earlier))
    work = lambda store: release.release_addresses(store, addresses)  # noqa: E731
    code = on_store(work, pool(), NODE, there, owner=stubborn)
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "10.244.0.2 released\n")
    assert captured.err.splitlines() == [
        "underlayctl: 10.244.0.1: node-1 keeps it for pod default/p0 (underlay/c0/eth0): its link is there; look",
        "underlayctl: 10.244.0.11: node-1 keeps it for pod default/p2 (underlay/c2/eth0): its link is there; look",
    ]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.244.9.9", "10.244.9.9: it is in no block: nobody has it"),
        ("fd00::1", "fd00::1: it is in no block: nobody has it"),
        ("10.244.0.7", "10.244.0.7: nobody has it: it is free, or rests, in block 10.244.0.0/26 of node-1"),
        ("10.244.1.1", "there is no node node-9 that could release it; .* ipam release --block 10.244.1.0/26"),
    ],
)
def test_what_cannot_be_released_is_refused_and_nothing_is_asked(address: str, words: str) -> None:
    async def work(store: MemoryStore) -> None:
        with pytest.raises(Failure, match=words):
            await release.release_addresses(store, ["10.244.0.1", address])
        for b in (await store.list(IPAMBlock)).items:
            assert b.metadata.annotations == {}

    dead = block("10.244.1.0/26", "10-244-1-0-26", "node-9", "10.244.1.1")
    on_store(work, pool(), NODE, annotated("", "10.244.0.1"), dead, owner=obedient)


def test_an_address_that_has_another_holder_by_now_is_not_asked_for(capsys: pytest.CaptureFixture) -> None:
    class Moving(MemoryStore):
        """The address goes to another pod once it has been looked at."""

        async def get(self, kind: Any, name: str) -> Any:
            if kind is IPAMBlock:
                now = await super().get(kind, name)
                a = msgspec.structs.replace(now.status.allocations[0], container="newcomer")
                status = msgspec.structs.replace(now.status, allocations=(a,))
                await self.update_status(msgspec.structs.replace(now, status=status))
            return await super().get(kind, name)

    async def main() -> IPAMBlock:
        store = Moving(SystemClock())
        await filled(store, pool(), NODE, annotated("", "10.244.0.1"))
        assert await release.release_addresses(store, ["10.244.0.1"]) == 0
        return await store.get(IPAMBlock, BLOCK)

    assert asyncio.run(main()).metadata.annotations == {}
    assert capsys.readouterr().out == "10.244.0.1 released\n"  # its old holder no longer has it


# -- blocks ------------------------------------------------------------------------------------------------------------


def held_by(*finalizers: str, node: str = "node-9") -> IPAMBlock:
    made = block("10.244.0.0/26", BLOCK, node, "10.244.0.1")
    return msgspec.structs.replace(made, metadata=Meta(name=BLOCK, finalizers=finalizers))


async def gone(store: Store, name: str = BLOCK) -> bool:
    try:
        await store.get(IPAMBlock, name)
    except NotFound:
        return True
    return False


@pytest.mark.parametrize("finalizers", [(), (FINALIZER_OWNER,)])
@pytest.mark.parametrize("marked", [False, True])
def test_a_block_of_the_dead_is_ended(finalizers: tuple[str, ...], marked: bool, capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> int:
        if marked and finalizers:
            await store.delete(IPAMBlock, BLOCK)
        code = await release.release_blocks(store, ["10.244.0.0/26"], yes=True, force=False)
        assert await gone(store)
        return code

    assert on_store(work, pool(), NODE, held_by(*finalizers), owner=None) == 0
    assert capsys.readouterr().out == (
        "block 10.244.0.0/26 of node-9, which has no Node any more: 1 of its addresses are recorded as in use "
        "(default/p0)\nblock 10.244.0.0/26 released\n"
    )


def test_a_finalizer_of_others_is_theirs(capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> int:
        code = await release.release_blocks(store, ["10.244.0.0/26"], yes=True, force=False)
        left = await store.get(IPAMBlock, BLOCK)
        assert left.metadata.finalizers == ("example.org/audit",)
        assert left.metadata.deletion_timestamp
        return code

    assert on_store(work, pool(), held_by("example.org/audit", FINALIZER_OWNER), owner=None) == 1
    assert "goes when example.org/audit is removed" in capsys.readouterr().err


def test_a_block_of_a_node_that_lives_is_left_unless_forced(capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> None:
        with pytest.raises(Failure, match="its node node-1 is there"):
            await release.release_blocks(store, ["10.244.0.0/26"], yes=True, force=False)
        assert not (await store.get(IPAMBlock, BLOCK)).metadata.deletion_timestamp
        assert await release.release_blocks(store, ["10.244.0.0/26"], yes=True, force=True) == 0
        assert await gone(store)

    on_store(work, pool(), NODE, held_by(FINALIZER_OWNER, node="node-1"), owner=None)
    assert "node-1, which is there" in capsys.readouterr().out


def test_a_node_that_comes_back_while_people_are_asked_keeps_its_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    async def work(store: MemoryStore) -> int:
        await store.create(Node(metadata=Meta(name="node-9")))
        return await release._end_blocks(store, (await store.list(IPAMBlock)).items, force=False)

    assert on_store(work, pool(), held_by(FINALIZER_OWNER), owner=None) == 1
    assert "its node node-9 is there" in capsys.readouterr().err


def test_a_block_that_is_written_meanwhile_has_an_owner_that_lives(capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> int:
        seen = (await store.list(IPAMBlock)).items
        await mutate(
            store, IPAMBlock, BLOCK, lambda b: msgspec.structs.replace(b, status=IPAMBlockStatus()), status=True
        )
        code = await release._end_blocks(store, seen, force=False)
        assert not (await store.get(IPAMBlock, BLOCK)).metadata.deletion_timestamp
        return code

    assert on_store(work, pool(), held_by(FINALIZER_OWNER), owner=None) == 1
    assert "decide again" in capsys.readouterr().err


def test_a_block_that_another_has_claimed_meanwhile_is_not_touched() -> None:
    class Quick(MemoryStore):
        async def delete(self, kind: Any, name: str, **given: str) -> None:
            await super().delete(kind, name, **given)
            await self.create(held_by(FINALIZER_OWNER, node="node-1"))

    async def main() -> IPAMBlock:
        store = Quick(SystemClock())
        await filled(store, pool(), NODE, held_by())
        assert await release.release_blocks(store, ["10.244.0.0/26"], yes=True, force=False) == 0
        return await store.get(IPAMBlock, BLOCK)

    after = asyncio.run(main())
    assert (after.spec.node, after.metadata.finalizers) == ("node-1", (FINALIZER_OWNER,))
    assert not after.metadata.deletion_timestamp


def test_a_store_that_goes_away_ends_it() -> None:
    async def work(store: MemoryStore) -> None:
        seen = (await store.list(IPAMBlock)).items
        store.fail_with("gone")
        with pytest.raises(Unavailable):
            await release._end_blocks(store, seen, force=True)

    on_store(work, pool(), held_by(), owner=None)


# -- reports -----------------------------------------------------------------------------------------------------------


def of(*found: Finding, local: str = "") -> report.Report:
    return report.Report(version=report.VERSION, at="", nodes=(), local=local, looked=(), unseen=(), findings=found)


async def found_now(store: Store, here: look.Here | None = None) -> report.Report:
    return await look.check(store, SystemClock(), here=here)


def test_a_reports_dead_blocks_are_released_and_what_is_no_leak_is_left(capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> int:
        before = await found_now(store)
        assert sorted(f.kind for f in before.findings) == ["BlockOfNoNode", "PoolMissing"]
        code = await release.release_report(store, SystemClock(), before, here=None, yes=True)
        assert await gone(store)
        assert not await gone(store, "10-99-0-0-26")
        return code

    strange = block("10.99.0.0/26", "10-99-0-0-26", "node-1")
    strange = msgspec.structs.replace(strange, spec=msgspec.structs.replace(strange.spec, pool="gone"))
    assert on_store(work, pool(), NODE, held_by(FINALIZER_OWNER), strange, owner=None) == 0
    out = capsys.readouterr().out
    assert "1 of 2 findings are no leaks: left alone" in out
    assert "block 10.244.0.0/26 released" in out


@pytest.mark.parametrize("change", ["node came back", "another holds it", "gone", "in use by others"])
def test_what_is_no_longer_so_is_left(change: str, capsys: pytest.CaptureFixture) -> None:
    async def work(store: MemoryStore) -> int:
        before = await found_now(store)
        assert [f.kind for f in before.findings] == ["BlockOfNoNode"]
        if change == "node came back":
            await store.create(Node(metadata=Meta(name="node-9")))
        elif change == "in use by others":
            more = block("10.244.0.0/26", BLOCK, "node-9", "10.244.0.1", "10.244.0.2").status
            await mutate(store, IPAMBlock, BLOCK, lambda b: msgspec.structs.replace(b, status=more), status=True)
        else:
            await store.delete(IPAMBlock, BLOCK)
            if change == "another holds it":
                await filled(store, held_by(node="node-1"))
        there = (await store.list(IPAMBlock)).items
        code = await release.release_report(store, SystemClock(), before, here=None, yes=True)
        assert (await store.list(IPAMBlock)).items == there
        return code

    assert on_store(work, pool(), NODE, held_by(), owner=None) == 1
    captured = capsys.readouterr()
    assert "10.244.0.0/26: BlockOfNoNode is no longer so" in captured.err
    assert "released" not in captured.out


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A journal in which two attachments of node-1 have an address; their links and routes are gone."""
    journal = Journal(tmp_path / "run", "b" * 36)
    journal.append(Opened(1))
    for i, address in enumerate(("10.244.0.1", "10.244.0.2")):
        journal.append(Taken(Attachment("underlay", f"c{i}", "eth0"), (address,), (), f"default/p{i}"))
    journal.close()
    yield tmp_path / "run"


def leaking(monkeypatch: pytest.MonkeyPatch, *alive: str) -> None:
    """The kernel has routes and links for ``alive`` alone."""
    linked = frozenset(Attachment("underlay", f"c{int(a[-1]) - 1}", "eth0") for a in alive)
    monkeypatch.setattr(look, "_read_kernel", lambda history, said: (frozenset(alive), linked))


@pytest.mark.parametrize("back", [False, True])
def test_an_address_whose_pod_is_gone_is_released_from_anywhere(
    back: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(look, "PATIENCE", {})

    async def pod(store: MemoryStore, name: str) -> None:
        made = await store.create(Pod(metadata=Meta(name=name, namespace="default"), spec=PodSpec(node_name="node-1")))
        await store.update_status(msgspec.structs.replace(made, status=PodStatus(phase="Running")))

    async def work(store: MemoryStore) -> int:
        await pod(store, "p1")
        before = await found_now(store)
        assert [(f.kind, f.address) for f in before.findings] == [("PodGone", "10.244.0.1")]
        if back:
            await pod(store, "p0")
        return await release.release_report(store, SystemClock(), before, here=None, yes=True)

    there = annotated("", "10.244.0.1", "10.244.0.2")
    assert on_store(work, pool(), NODE, there, owner=obedient) == int(back)
    captured = capsys.readouterr()
    assert ("10.244.0.1 released" in captured.out) is not back
    assert ("PodGone is no longer so" in captured.err) is back


def test_a_reports_leaked_addresses_are_released_if_they_leak_still(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    here = look.Here("node-1", run)

    async def work(store: MemoryStore) -> int:
        leaking(monkeypatch)
        before = await found_now(store, here)
        assert [(f.kind, f.address) for f in before.findings] == [
            ("AllocationWithoutRoute", "10.244.0.1"),
            ("AllocationWithoutRoute", "10.244.0.2"),
        ]
        leaking(monkeypatch, "10.244.0.2")
        return await release.release_report(store, SystemClock(), before, here=here, yes=True)

    there = annotated("", "10.244.0.1", "10.244.0.2")
    assert on_store(work, pool(), NODE, there, owner=obedient) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "10.244.0.1 on node-1: pod default/p0 (underlay/c0/eth0) has it, and there is neither a link nor a route",
        "10.244.0.1 released",
    ]
    assert captured.err.splitlines() == [
        "underlayctl: 10.244.0.2: AllocationWithoutRoute is no longer so, as the report has it: check again"
    ]


def test_a_leak_of_a_node_is_looked_at_again_on_that_node(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    async def work(store: MemoryStore) -> int:
        leaking(monkeypatch)
        before = await found_now(store, look.Here("node-1", run))
        code = await release.release_report(store, SystemClock(), before, here=None, yes=True)
        assert (await store.get(IPAMBlock, BLOCK)).metadata.annotations == {}
        return code

    assert on_store(work, pool(), NODE, annotated("", "10.244.0.1", "10.244.0.2"), owner=obedient) == 1
    assert capsys.readouterr().err.count("only node-1 itself can look again: run this there, with --run") == 2


def test_a_report_without_leaks_asks_nobody(capsys: pytest.CaptureFixture) -> None:
    work = lambda store: release.release_report(store, SystemClock(), of(), here=None, yes=False)  # noqa: E731
    assert on_store(work, pool(), owner=None) == 0
    assert "nothing to release" in capsys.readouterr().out


def test_the_kinds_that_are_leaks_are_kinds() -> None:
    dead = held_by()
    orphan = findings(View("2026-11-24T12:00:00Z", (dead,), nodes=frozenset()))
    assert release.LEAKED_BLOCK in [f.kind for f in orphan]
    local = Local("node-9", Writer(boot_id="b" * 36, start=2), {}, frozenset(), frozenset())
    assert release.LEAKED_HERE in [f.kind for f in findings(View("", (dead,), local=local))]
    assert set(release.LEAKED_ADDRESSES) <= set(KINDS)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    made = Ctl(tmp_path, capsys)
    made.on_store(lambda store: store.list(IPPool))
    return made


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--ip", "10.244.0.1", "--block", "10.244.0.0/26"),
        ("--ip", "10.244.0.1", "--from-report", "x"),
        ("--ip", "10.244.0.1", "--force"),
        ("--ip", "10.244.0.0/26"),
        ("--ip", "pod"),
        ("--block", "10.244.0.1/26"),
        ("--block", "10-244-0-0-26"),
        ("--from-report", "/nonexistent/report.json"),
    ],
)
def test_a_wrong_command_line_is_exit_2(ctl: Ctl, words: tuple[str, ...]) -> None:
    ctl.put(pool(), NODE, held_by())
    code, out, err = ctl("ipam", "release", *words)
    assert (code, out) == (2, ""), err
    assert len(ctl.all(IPAMBlock)) == 1


def answer(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize(("text", "words"), [("n\n", "nothing was released"), ("", "--yes answers beforehand")])
def test_without_a_yes_nothing_is_released(ctl: Ctl, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl.put(pool(), NODE, held_by(FINALIZER_OWNER))
    answer(text, monkeypatch)
    code, out, err = ctl("ipam", "release", "--block", "10.244.0.0/26")
    assert (code, words in err) == (1, True)
    assert "1 of its addresses are recorded as in use (default/p0)" in out
    assert ctl.all(IPAMBlock)[0].metadata.finalizers == (FINALIZER_OWNER,)


def test_a_yes_releases(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl.put(pool(), NODE, held_by(FINALIZER_OWNER))
    answer("y\n", monkeypatch)
    code, out, err = ctl("ipam", "release", "--block", "10.244.0.0/26")
    assert (code, out.splitlines()[-1]) == (0, "block 10.244.0.0/26 released")
    assert "shares them with others" in err
    assert ctl.all(IPAMBlock) == ()
    code, _, err = ctl("ipam", "release", "--block", "10.244.0.0/26", "--yes")
    assert (code, "there is no such block" in err) == (1, True)


def test_an_address_is_asked_for_without_a_question(ctl: Ctl) -> None:
    ctl.put(pool(), NODE, annotated("", "10.244.0.1"))
    code, out, err = ctl("ipam", "release", "--ip", "10.244.0.1")
    assert (code, out, "node-1 was asked" in err) == (1, "", True)
    assert release_wanted(ctl.all(IPAMBlock)[0]) == ("10.244.0.1",)  # type: ignore[arg-type]
    code, out, _ = ctl("ipam", "check")
    assert (code, out.splitlines()[1].split()[0]) == (1, "ReleasePending")


def test_check_then_release_from_its_report(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl.put(pool(), NODE, held_by(FINALIZER_OWNER))
    code, text, _ = ctl("ipam", "check", "-o", "json")
    assert code == 1
    path = ctl.file(text, "report.json")
    answer("y\n", monkeypatch)
    code, out, _ = ctl("ipam", "release", "--from-report", path)
    assert (code, out.splitlines()[-1]) == (0, "block 10.244.0.0/26 released")
    assert ctl("ipam", "check")[0] == 0
    code, _, err = ctl("ipam", "release", "--from-report", path, "-y")
    assert (code, "no longer so" in err) == (1, True)
    with pytest.raises(Usage):
        report.read(b"", "x")
