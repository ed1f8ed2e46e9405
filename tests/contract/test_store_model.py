"""Random histories: whatever is done to a store, it answers like a dictionary that knows the rules, and whoever watched
can tell its state without having read it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from store.base import Event, Store
from store.clock import SystemClock
from store.errors import AlreadyExists, Conflict, Expired, Invalid, NotFound, StoreError
from store.memory import MemoryStore
from store.model import IPAMBlock, IPAMBlockSpec, IPAMBlockStatus, Meta, block_name
from store.sqlite import SqliteStore

HISTORY = 12
CIDRS = tuple(f"10.0.{i}.0/26" for i in range(3))
OWNER = "underlay.network/owner"


class Machine(RuleBasedStateMachine):
    """Three blocks, few values: so that names are taken, versions are stale, and updates are equal, often."""

    seen = Bundle("seen")

    def open(self, folder: Path) -> Store:
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.store = self.runner.run(self._opened())
        self.model: dict[str, IPAMBlock] = {}
        self.writes = 0
        self.watch: AsyncGenerator[Event[IPAMBlock], None] | None = None
        self.told: dict[str, IPAMBlock] = {}
        self.at = ""
        self.at_write = 0

    async def _opened(self) -> Store:
        return self.open(Path(self.folder.name))

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self._close())
            self.runner.close()
            self.folder.cleanup()

    async def _close(self) -> None:
        if self.watch is not None:
            await self.watch.aclose()
        await self.store.close()

    def outcome(self, call: Any) -> Any:
        """What the call returns, or the class of what it raises."""

        async def within() -> Any:
            async with asyncio.timeout(60):
                return await call

        try:
            return self.runner.run(within())
        except StoreError as e:
            return type(e)

    # -- what is done ----------------------------------------------------------------------------------------------

    @rule(target=seen, cidr=st.sampled_from(CIDRS), node=st.sampled_from("ab"), held=st.booleans())
    def create(self, cidr: str, node: str, held: bool) -> IPAMBlock:
        wanted = IPAMBlock(
            metadata=Meta(name=block_name(cidr), finalizers=(OWNER,) if held else ()),
            spec=IPAMBlockSpec(cidr=cidr, pool="pool", node=node),
            status=IPAMBlockStatus(used=9),
        )
        made = self.outcome(self.store.create(wanted))
        if wanted.name in self.model:
            assert made is AlreadyExists
            return self.model[wanted.name]
        assert (made.spec, made.status, made.metadata.finalizers) == (
            wanted.spec,
            IPAMBlockStatus(),
            wanted.metadata.finalizers,
        )
        self.wrote(made)
        return made

    @rule(target=seen, old=seen, label=st.sampled_from("xy"), held=st.booleans())
    def update(self, old: IPAMBlock, label: str, held: bool) -> IPAMBlock:
        finalizers = (OWNER,) if held else ()
        meta = msgspec.structs.replace(old.metadata, labels={"l": label}, finalizers=finalizers)
        result = self.outcome(self.store.update(msgspec.structs.replace(old, metadata=meta)))
        present = self.model.get(old.name)
        refused = self.refused(old)
        if refused or present is None:
            assert result is refused
            return old
        if present.metadata.deletion_timestamp and held and not present.metadata.finalizers:
            assert result is Invalid
            return present
        if (present.metadata.labels, present.metadata.finalizers) == ({"l": label}, finalizers):
            assert result == present
            return present
        assert result.metadata.labels == {"l": label}
        assert (result.spec, result.status, result.metadata.uid) == (present.spec, present.status, present.metadata.uid)
        if present.metadata.deletion_timestamp and not held:
            del self.model[old.name]
            self.writes += 1
        else:
            self.wrote(result)
        return result

    @rule(target=seen, old=seen, used=st.integers(0, 2))
    def update_status(self, old: IPAMBlock, used: int) -> IPAMBlock:
        wanted = msgspec.structs.replace(old, status=IPAMBlockStatus(used=used))
        result = self.outcome(self.store.update_status(wanted))
        present = self.model.get(old.name)
        refused = self.refused(old)
        if refused or present is None:
            assert result is refused
            return old
        if present.status.used == used:
            assert result == present
            return present
        assert msgspec.structs.replace(result, metadata=present.metadata) == msgspec.structs.replace(
            present, status=wanted.status
        )
        self.wrote(result)
        return result

    @rule(old=seen, exact=st.booleans())
    def delete(self, old: IPAMBlock, exact: bool) -> None:
        guard = {"uid": old.metadata.uid, "resource_version": old.metadata.resource_version} if exact else {}
        result = self.outcome(self.store.delete(IPAMBlock, old.name, **guard))
        present = self.model.get(old.name)
        if present is None:
            assert result is NotFound
        elif exact and present.metadata.resource_version != old.metadata.resource_version:
            assert result is Conflict
        else:
            assert result is None
            if not present.metadata.finalizers:
                del self.model[old.name]
                self.writes += 1
            elif not present.metadata.deletion_timestamp:
                marked = self.outcome(self.store.get(IPAMBlock, old.name))
                assert marked.metadata.deletion_timestamp
                self.wrote(marked)

    # -- who watches -----------------------------------------------------------------------------------------------

    @rule()
    def begin_watch(self) -> None:
        self.end_watch()
        self.watch, self.told = self.store.watch(IPAMBlock), {}
        while True:
            event = self.outcome(anext(self.watch))
            if event.type == "synced":
                break
            assert event.type == "added"
            self.told[event.object.name] = event.object
        self.at, self.at_write = event.version, self.writes
        assert self.told == self.model

    @rule()
    def end_watch(self) -> None:
        if self.watch is not None:
            self.runner.run(self.watch.aclose())
            self.watch = None

    @precondition(lambda self: self.watch is None and self.at != "")
    @rule()
    def resume_watch(self) -> None:
        self.watch = self.store.watch(IPAMBlock, since=self.at)
        self.catch_up()

    @precondition(lambda self: self.watch is not None)
    @rule()
    def catch_up(self) -> None:
        """Reads as many events as there were writes since; they must add up to what is there."""
        assert self.watch is not None
        while self.told != self.model or self.at_write != self.writes:
            event = self.outcome(anext(self.watch))
            if event is Expired:
                assert self.writes - self.at_write > HISTORY
                self.begin_watch()
                return
            name = event.object.name
            if event.type == "deleted":
                del self.told[name]
            else:
                assert (event.type == "added") is (name not in self.told)
                self.told[name] = event.object
            assert int(event.version) > int(self.at)
            # Every write of this machine is of one kind, so each is one event.
            self.at, self.at_write = event.version, self.at_write + 1

    @invariant()
    def lists_what_is_there(self) -> None:
        if hasattr(self, "model"):
            listing = self.outcome(self.store.list(IPAMBlock))
            assert listing.items == tuple(self.model[name] for name in sorted(self.model))
            for name, obj in self.model.items():
                assert self.outcome(self.store.get(IPAMBlock, name)) == obj

    def wrote(self, obj: IPAMBlock) -> None:
        before = self.model.get(obj.name)
        assert before is None or int(obj.metadata.resource_version) > int(before.metadata.resource_version)
        self.model[obj.name] = obj
        self.writes += 1

    def refused(self, old: IPAMBlock) -> type[StoreError] | None:
        present = self.model.get(old.name)
        if present is None:
            return NotFound
        return Conflict if present.metadata.resource_version != old.metadata.resource_version else None


class MemoryMachine(Machine):
    def open(self, folder: Path) -> Store:
        return MemoryStore(SystemClock(), history=HISTORY)


class SqliteMachine(Machine):
    def open(self, folder: Path) -> Store:
        return SqliteStore(folder / "store.db", SystemClock(), history=HISTORY)


LIMITS = settings(max_examples=30, stateful_step_count=40)
TestMemory = MemoryMachine.TestCase
TestMemory.settings = LIMITS
TestSqlite = SqliteMachine.TestCase
TestSqlite.settings = LIMITS
