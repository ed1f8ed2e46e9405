"""NodeIPAM through random histories: adds, deletes, leaks, kills at named steps, boots, a store that comes and goes, a
journal cut short, damaged or gone. No address ever has two live owners; what is kept is found again."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ipam.errors import Exhausted, IPAMError, NotReady
from ipam.node import Lease, Request
from tests.ipam_fakes import Rig, attachment, link_name, pool

T = TypeVar("T")

REST = 30.0
STEPS = [
    "journal-written",
    "journal-copied",
    "journal-renamed",
    "block-created",
    "block-marked",
    "block-deleted",
    "mirrored",
]


class Killed(BaseException):
    pass


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        self.live: dict[str, Lease] = {}  # answered and not deleted, by container
        self.freed: dict[str, float] = {}  # address -> when its DEL was
        self.n = 0
        self.sure = True  # the journal has never lost a line, so every lease must be known

    def go(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        async def main() -> None:
            self.rig = Rig(self.directory)
            # Small, so that blocks come and go and addresses run out: 6 blocks of 4, 4 of 8.
            await self.rig.create(pool("a", "10.7.0.0/28", 30), pool("b", "10.7.1.0/29", 30))
            await self.rig.create(pool("six", "fd07::/123", 125))
            await self.rig.up()

        self.go(main())

    def teardown(self) -> None:
        self.go(self.rig.down())
        self.loop.close()
        shutil.rmtree(self.directory)

    # -- the runtime

    @rule()
    def add(self) -> None:
        self.n += 1
        name = str(self.n)
        resting = self.must_rest()
        task = self.loop.create_task(self.rig.add(name))
        self.go(self.until_done(task))
        error = task.exception()
        if error is None:
            lease = task.result()
            assert len(lease.addresses) == 2
            if self.sure:
                assert not resting & set(lease.addresses), "it rests, and others are free"
            self.live[lease.attachment.container] = lease
        elif not isinstance(error, Exhausted | NotReady):
            raise error

    async def until_done(self, task: asyncio.Task[Lease]) -> None:
        for _ in range(70):
            await self.rig.clock.advance(0.0 if task.done() else 0.1)
            if task.done():
                return
        raise AssertionError("an ADD has no limit")

    def must_rest(self) -> set[str]:
        """Addresses that rest, of families in which a ready block has a fresh one at this moment."""
        now = self.rig.clock.monotonic()
        resting = {a for a, at in self.freed.items() if now - at < REST}
        fresh = {4: 0, 6: 0}
        for view in self.rig.ipam.blocks():
            if view.phase == "ready":
                network = ip_network(view.cidr)
                held = {a for a in resting if ip_address(a) in network}
                fresh[network.version] += network.num_addresses - view.used - len(held)
        return {a for a in resting if fresh[ip_address(a).version] > 0}

    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        """The runtime did not hear the answer."""
        if self.live and self.sure:
            name = data.draw(st.sampled_from(sorted(self.live)))
            lease = self.live[name]
            assert self.go(self.rig.ipam.take(Request(lease.attachment))).addresses == lease.addresses

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if self.live:
            name = data.draw(st.sampled_from(sorted(self.live)))
            lease = self.live.pop(name)
            gone = self.rig.delete(name[1:])
            assert gone is not None or not self.sure
            if gone is not None:
                self.freed |= dict.fromkeys(lease.addresses, self.rig.clock.monotonic())

    @rule(data=st.data())
    def leak(self, data: st.DataObject) -> None:
        """A link goes with no DEL; the sweep may end the lease from here on."""
        if self.live:
            name = data.draw(st.sampled_from(sorted(self.live)))
            lease = self.live.pop(name)
            self.rig.kernel.unwire(link_name(lease.attachment))

    @rule(point=st.sampled_from(STEPS), wire=st.booleans())
    def die_in_an_add(self, point: str, wire: bool) -> None:
        """kill -9 at a step, with or without the link made; then a new server, and the runtime tries again."""
        self.n += 1
        which = attachment(self.n)

        def step(name: str) -> None:
            if name == point:
                raise Killed

        async def main() -> None:
            self.rig.step = step
            try:
                task = self.loop.create_task(self.rig.ipam.take(Request(which)))
                await self.until_done(task)
                lease = task.result()
                if wire:
                    self.rig.kernel.wire(link_name(which), lease.addresses)
                await self.rig.clock.advance(1)
            except (IPAMError, Killed):
                pass
            self.rig.step = lambda _: None
            await self.rig.restart()

        self.go(main())
        task = self.loop.create_task(self.rig.add(self.n))
        self.go(self.until_done(task))
        if task.exception() is None:
            self.live[which.container] = task.result()
        elif not isinstance(task.exception(), Exhausted | NotReady):
            raise task.exception()  # type: ignore[misc]

    # -- the server's life

    @rule()
    def restart(self) -> None:
        self.go(self.rig.restart())

    @rule(cut=st.integers(1, 400))
    def restart_with_a_journal_cut_short(self, cut: int) -> None:
        self.go(self.rig.down())
        path = self.rig._journal.path
        path.write_bytes(path.read_bytes()[:-cut])
        self.unsure()
        self.go(self.up())

    @rule(at=st.integers(0, 5000), garbage=st.binary(min_size=1, max_size=30))
    def restart_with_a_damaged_journal(self, at: int, garbage: bytes) -> None:
        self.go(self.rig.down())
        path = self.rig._journal.path
        data = path.read_bytes()
        at %= len(data) + 1
        path.write_bytes(data[:at] + garbage + data[at + len(garbage) :])
        self.unsure()
        self.go(self.up())

    @rule()
    def restart_without_a_journal(self) -> None:
        self.go(self.rig.down())
        self.rig._journal.path.unlink()
        self.unsure()
        self.go(self.up())

    async def up(self) -> None:
        await self.rig.up()

    def unsure(self) -> None:
        self.sure = False
        self.freed.clear()

    @rule()
    def boot(self) -> None:
        self.go(self.rig.reboot())
        self.live.clear()
        self.freed.clear()
        self.sure = True

    # -- the world

    @rule(seconds=st.sampled_from([0.05, 0.2, 1.0, 6.0, 31.0, 62.0]))
    def wait(self, seconds: float) -> None:
        self.go(self.rig.clock.advance(seconds))
        self.rig.check_alive()

    @rule(away=st.booleans())
    def store(self, away: bool) -> None:
        self.rig.memory.fail_with("away" if away else "")

    @rule(works=st.booleans())
    def agent(self, works: bool) -> None:
        self.rig.agent = works

    # -- what always holds

    @invariant()
    def no_address_has_two_owners(self) -> None:
        if not hasattr(self, "rig"):
            return
        leased = [a for lease in self.rig.ipam.leases() for a in lease.addresses]
        assert len(leased) == len(set(leased))
        # FakeKernel.wire refuses a second link for a live address; here: what is live is held for nobody else.
        for address, link in self.rig.kernel.live().items():
            owner = self.rig.ipam._ledger.owner(address)
            assert owner is None or link in (link_name(owner), owner.interface) or not self.sure

    @invariant()
    def what_lives_is_known(self) -> None:
        if hasattr(self, "rig") and self.sure:
            known = {lease.attachment.container: lease.addresses for lease in self.rig.ipam.leases()}
            for name, lease in self.live.items():
                assert known.get(name) == lease.addresses


Histories.TestCase.settings = settings(max_examples=40, stateful_step_count=30, suppress_health_check=list(HealthCheck))
TestHistories = Histories.TestCase
