"""NodeIPAM: the blocks of this node, and the only code that hands out their addresses (R2).

The way of an ADD is ``take``, from memory, with one write to the journal; everything else here is behind it:

    truth    what is handed out, at start          ledger   what is in memory
    keeper   how many blocks, and which            claims   makes one ours, or ends it
    mirror   memory into the blocks' status        sweep    what leaked
    watches  what people wish, and what they did to our blocks
    releases what they want ended                  lost     what lives here and is not ours
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import msgspec

from ipam import truth
from ipam.claims import Claims
from ipam.errors import Deleted, Exhausted, JournalError, KernelUnavailable, NotReady, WrongPool, in_words
from ipam.foreign import Foreign
from ipam.journal import Bound, Ended, GivenBack, History, Journal, Record
from ipam.keeper import IDLE, Keeper
from ipam.ledger import Ledger, Phase, of_condition
from ipam.mirror import Mirror
from ipam.model import Attachment, BlockView, Family, Figures, KernelView, Lease, News, Request, Settings
from ipam.pool import Want, family_of
from ipam.releases import Releases
from ipam.sweep import Sweep
from ipam.watches import Watches
from store.base import Store
from store.clock import Clock
from store.errors import StoreError
from store.model import FINALIZER_OWNER, Condition, IPAMBlock, Writer

__all__ = ["Attachment", "BlockView", "KernelView", "Lease", "NodeIPAM", "Request", "Settings"]

log = logging.getLogger(__name__)


class NodeIPAM:
    """``start`` counts the starts of this server in this boot; ``link_name`` is the host veth's name for an attachment.
    ``step`` is called with the name of each point at which a crash leaves a different state behind, ``tell`` with what
    operators should hear of: it must not wait."""

    def __init__(
        self,
        *,
        node: str,
        store: Store,
        journal: Journal,
        kernel: KernelView,
        clock: Clock,
        boot_id: str,
        start: int,
        link_name: Callable[[Attachment], str],
        settings: Settings | None = None,
        step: Callable[[str], None] = lambda _: None,
        tell: Callable[[News], None] = lambda _: None,
    ) -> None:
        self._node = node
        self._store = store
        self._journal = journal
        self._kernel = kernel
        self._clock = clock
        self._link_name = link_name
        self._settings = settings or Settings()
        self._step = step
        self._tell = tell
        self._writer = Writer(boot_id=boot_id, start=start)
        self._history = History()
        self._why_not = "this server has not started yet"
        self._loaded = False
        self._deleted: dict[Attachment, float] = {}  # since when, oldest first
        self._taken: dict[Attachment, float] = {}  # when, for those not wired yet

        self._mirror = Mirror(
            store,
            self._writer,
            clock,
            self._settings,
            vanished=lambda own: self._keeper.vanished(own),
            superseded=self._stop,
            step=step,
        )
        self._ledger = Ledger(rest=self._settings.rest, changed=self._mirror.touch, tell=self._heard)
        self._mirror.ledger = self._ledger
        foreign = Foreign(kernel)
        self._claims = Claims(
            node,
            store,
            self._ledger,
            foreign,
            clock,
            self._settings,
            check=self._mirror.check,
            ending=self._note_ended,
            step=step,
        )
        self._sweep = Sweep(
            self._ledger,
            kernel,
            clock,
            self._settings,
            link_name=link_name,
            release=lambda lease: self._end(lease.attachment, lease, swept=True),
            taken=self._taken,
        )
        self._keeper = Keeper(
            self._ledger,
            self._claims,
            foreign,
            kernel,
            self._writer,
            clock,
            self._settings,
            add_strays=self._sweep.add_strays,
        )
        self._releases = Releases(
            store, self._ledger, clock, self._settings, release=self._sweep.release, check=self._mirror.check
        )
        self._watches = Watches(
            node,
            store,
            self._ledger,
            self._keeper,
            clock,
            self._settings,
            superseded=self._mirror.is_superseded,
            seen=self._releases.see,
        )

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Finds out what is handed out (union of journal, mirror and pod routes) and claims a first block per family.

        With the store away it returns all the same, after ``start_limit`` at most: leases are known, DEL works, and
        ``take`` of something new raises NotReady until ``run`` has read the blocks. KernelUnavailable, JournalError."""
        self._remember()
        self._why_not = "the blocks have not been read from the store yet"
        try:
            async with asyncio.timeout(self._settings.start_limit):
                await self._load()
                await self._keeper.step()
        except (StoreError, TimeoutError) as e:
            if not self._loaded:
                self._away(e)

    async def run(self) -> None:
        """Mirror, claims, give-back, sweeps, watches. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep.run())
            group.create_task(self._tend_journal())
            group.create_task(self._tell_again())
            await self._load_at_last()
            group.create_task(self._watches.run())
            group.create_task(self._mirror.run())
            group.create_task(self._releases.run())
            group.create_task(self._keeper.run())

    # -- the way of an ADD and a DEL ---------------------------------------------------------------------------------

    async def take(self, request: Request) -> Lease:
        """The attachment's addresses, the same ones if it has them. The journal is written before this returns.

        Waits only when no block has an address for it, at most ``settings.take_limit``.
        Deleted, Exhausted, JournalError, NotReady, WrongPool; nothing is changed then."""
        try:
            outcome = self._take_now(request)
            return outcome if isinstance(outcome, Lease) else await self._wait_and_take(request, outcome)
        except (Exhausted, NotReady, WrongPool) as e:
            self.tell_no_address(request, e)
            raise

    def tell_no_address(self, request: Request, why: Exception) -> None:
        """Tells the pod why it gets no address, as ``take`` does: for who refuses it before that, or knows more."""
        if request.pod:
            self._tell(News("NoAddress", "HandOut", str(why), request.pod, request.pod_uid))

    def bind(self, attachment: Attachment, index: int) -> Lease:
        """Notes the host veth's index, after the link exists. Deleted if the attachment has no lease. JournalError."""
        lease = self._ledger.leases.get(attachment)
        if lease is None:
            raise Deleted(f"{attachment} has no addresses any more: a DEL or a sweep came before its link")
        if lease.index == index:
            return lease
        self._append(Bound(attachment, index))
        lease = self._ledger.leases[attachment] = msgspec.structs.replace(lease, index=index)
        self._taken.pop(attachment, None)
        return lease

    def give_back(self, attachment: Attachment, *, deleted: bool = True, asked: float | None = None) -> Lease | None:
        """To be called when the link is gone. The addresses rest. A ``take`` of the attachment that was not asked for
        after the DEL was (``asked``, as in Request; None: now) is refused from here on, also when there was no lease
        (None), unless this is no DEL (``deleted`` False: an ADD failed, and may be tried again).
        JournalError: nothing is changed; the sweep will find what the DEL could not."""
        lease = self._ledger.leases.get(attachment)
        if lease is None and (not deleted or self._was_deleted(attachment, asked)):
            return None
        self._end(attachment, lease, swept=not deleted, asked=asked)
        return lease

    def lease(self, attachment: Attachment) -> Lease | None:
        return self._ledger.leases.get(attachment)

    def check_family(self, pools: Iterable[str], family: Family) -> None:
        """WrongPool if one of these names or CIDRs is no pool of that family that serves. NotReady."""
        if self._why_not:
            raise NotReady(f"no new addresses: {self._why_not}")
        self._keeper.pools.check_family(pools, family)

    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._ledger.leases.values())

    def retain(self, network: str, keep: frozenset[Attachment]) -> tuple[Lease, ...]:
        """Leases of that network that are not in ``keep`` (GC); the caller unwires them and gives them back."""
        leases = self._ledger.leases.values()
        return tuple(each for each in leases if each.attachment.network == network and each.attachment not in keep)

    def problem(self, attachment: Attachment) -> str:
        """Why the attachment's addresses are no longer its own, though it has them (CHECK); empty if all is well."""
        lease = self._ledger.leases.get(attachment)
        found = (self._keeper.lost.at(address) for address in (lease.addresses if lease else ()))
        return "; ".join(dict.fromkeys(why for why in found if why))

    # -- for STATUS and people ---------------------------------------------------------------------------------------

    def free(self) -> int:
        """How many attachments could have addresses now, without a claim: free addresses of the scarcest family."""
        families = [names for names in self._keeper.pools.automatic.values() if names]
        phases = (Phase.NEW, Phase.READY)
        counts = [
            sum(own.block.free for name in names for own in self._ledger.of_pool(name) if own.phase in phases)
            for names in families
        ]
        return min(counts, default=0)

    def blocks(self) -> tuple[BlockView, ...]:
        return self._ledger.views()

    def conditions(self) -> tuple[Condition, ...]:
        """What is wrong at present, for STATUS and people; each message says what to do."""
        return tuple(self._ledger.conditions.values())

    def figures(self) -> Figures:
        return Figures(len(self._ledger.leases), self._journal.size, self._mirror.lag())

    def refusal(self) -> str:
        """Why ``take`` refuses everything new at present (STATUS: not available); empty if it does not."""
        unassigned = self._ledger.conditions.get("NoPodCIDR")
        return self._why_not or (unassigned.message if unassigned and not self.free() else "")

    # -- taking -------------------------------------------------------------------------------------------------------

    def _take_now(self, request: Request) -> Lease | tuple[Want, ...]:
        """The lease, or what no block has an address for."""
        attachment = request.attachment
        ledger = self._ledger
        lease = ledger.leases.get(attachment)
        if lease is not None:
            return lease
        if self._why_not:
            raise NotReady(f"no new addresses: {self._why_not}")
        if self._deleted and self._was_deleted(attachment, request.asked):
            raise Deleted(f"{attachment}: its DEL came before this ADD, which is older; the runtime must ask again")
        now = self._clock.monotonic()
        # A live link of this attachment whose lease was lost keeps its addresses.
        inherited = ledger.strays_behind(self._link_name(attachment)) if ledger.strays else ()
        addresses, missing = [], []
        for want in self._keeper.pools.wants(request):
            address = self._inherit(want, inherited) or self._place(want, now)
            if address is None:
                missing.append(want)
            else:
                addresses.append(address)
        if missing:
            return tuple(missing)
        lease = Lease(attachment, request.pod, tuple(addresses), since=self._clock.now(), pod_uid=request.pod_uid)
        self._append(truth.taken(lease, ledger))
        for address in inherited:
            if address in addresses:
                ledger.end_stray(address, None)
        ledger.put(lease)
        self._taken[attachment] = now
        self._deleted.pop(attachment, None)
        self._claim_ahead(lease)
        return lease

    def _inherit(self, want: Want, inherited: tuple[str, ...]) -> str | None:
        if not inherited:
            return None
        if want.address:
            return want.address if want.address in inherited else None
        family = family_of(self._keeper.pools.all[want.pools[0]].spec.cidr)
        return next((a for a in inherited if family_of(a) == family), None)

    def _place(self, want: Want, now: float) -> str | None:
        """An address for the want, from a block that is ready: a fresh one, then one that rests."""
        if want.address:
            return self._fixed(want.address)
        for resting in (False, True):
            for pool in want.pools:
                for own in self._ledger.of_pool(pool):
                    if own.phase is Phase.READY and self._keeper.pools.has(pool, own.cidr):
                        offset = own.block.choose(now, resting=resting)
                        if offset is not None:
                            return own.block.address(offset)
        return None

    def _fixed(self, address: str) -> str | None:
        found = self._ledger.find(address)
        if found is None:
            return None
        own, offset = found
        owner = own.block.owners.get(offset)
        if owner is not None:
            raise Exhausted(f"address {address} is in use by {owner}: delete that pod first")
        if own.phase is Phase.LOST:
            raise Exhausted(f"address {address} is in block {own.cidr}, which belongs to another node by now")
        return address if own.phase is Phase.READY else None

    async def _wait_and_take(self, request: Request, missing: tuple[Want, ...]) -> Lease:
        end = self._clock.monotonic() + self._settings.take_limit
        before: dict[Want, int] = {}
        while True:
            for want in missing:
                verdict = self._keeper.verdict(want)
                if verdict.error is not None and verdict.attempts > before.get(want, verdict.attempts):
                    raise type(verdict.error)(str(verdict.error))
                before.setdefault(want, verdict.attempts)
            left = end - self._clock.monotonic()
            if left <= 0:
                names = ", ".join(want.address or "/".join(want.pools) for want in missing)
                raise Exhausted(f"no block of {names} was ready within {self._settings.take_limit:g} s: try again")
            self._keeper.want(missing)
            await self._keeper.moved.wait(self._clock, left)
            outcome = self._take_now(request)
            if isinstance(outcome, Lease):
                return outcome
            missing = outcome

    def _claim_ahead(self, lease: Lease) -> None:
        for address in lease.addresses:
            found = self._ledger.find(address)
            if found and self._keeper.is_short(found[0].pool):
                self._keeper.poke()

    # -- ending -------------------------------------------------------------------------------------------------------

    def _end(self, attachment: Attachment, lease: Lease | None, *, swept: bool, asked: float | None = None) -> None:
        now = self._clock.monotonic()
        addresses = lease.addresses if lease else ()
        self._append(GivenBack(attachment, now, addresses, swept))
        self._ledger.remove(attachment, now)
        self._taken.pop(attachment, None)
        if not swept:
            self._note_deleted(attachment, now if asked is None else asked)
        if any(found and not found[0].block.used for found in map(self._ledger.find, addresses)):
            self._keeper.poke()

    def _note_deleted(self, attachment: Attachment, at: float) -> None:
        self._deleted.pop(attachment, None)
        self._deleted[attachment] = at
        while self._deleted:
            oldest, then = next(iter(self._deleted.items()))
            if len(self._deleted) <= self._settings.deleted_limit and at - then < self._settings.remember_deleted:
                break
            del self._deleted[oldest]

    def _was_deleted(self, attachment: Attachment, asked: float | None) -> bool:
        """Whether a DEL has overtaken what was asked for then (None: at some time before)."""
        at = self._deleted.get(attachment)
        if at is None or (asked is not None and asked > at):
            return False
        return self._clock.monotonic() - at < self._settings.remember_deleted

    # -- at start -----------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """What needs no store: the journal's leases and rests, and the kernel's routes."""
        history = self._history = self._journal.history()
        now = self._clock.monotonic()
        for lease in history.leases.values():
            self._ledger.put(lease)
        leased = {address for lease in history.leases.values() for address in lease.addresses}
        for record in history.freed:
            at = min(record.at, now)
            for address in record.addresses:
                if address not in leased:
                    self._ledger.rest(address, at)
            if not record.swept and record.attachment not in history.leases:
                self._note_deleted(record.attachment, at)
        for uid in history.ended:
            self._ledger.note_ended(uid)
        self._sweep.netns = self._kernel.netns() if history.netns is None else history.netns
        self._sweep.add_strays()
        try:
            self._rewrite_journal()
        except JournalError:
            if history.netns is None:
                raise
            log.exception("the journal stays as it is for now")

    async def _load(self) -> None:
        """Reads, uncached, what the store says of this node and its blocks. Superseded counts as loaded."""
        async with asyncio.timeout(self._settings.store_limit):
            blocks = await self._watches.read()
        self._adopt_all(blocks)
        if not self._keeper.stopped:
            self._add_mirrored(blocks)
            await self._keeper.house()
            self._why_not = ""
        self._loaded = True

    def _adopt_all(self, blocks: tuple[IPAMBlock, ...]) -> None:
        """Takes up the blocks that are ours already. One that was never mirrored and holds nothing has perhaps not been
        looked at for overlaps."""
        now = self._clock.monotonic()
        known = {*self._ledger.strays, *(a for lease in self._ledger.leases.values() for a in lease.addresses)}
        pools = self._keeper.pools
        cidrs = {pools.block_at(pool, a) for a in known if (pool := pools.of(a))}
        for obj in blocks:
            if obj.spec.cidr in self._ledger.blocks:
                continue
            marked = bool(obj.metadata.deletion_timestamp)
            if obj.spec.cidr not in cidrs and obj.metadata.uid in self._ledger.ended:
                self._keeper.found(obj)
                continue
            if obj.spec.cidr not in cidrs and (
                FINALIZER_OWNER not in obj.metadata.finalizers if marked else obj.status.writer is None
            ):
                self._keeper.found(obj)
                continue
            own = self._ledger.adopt(obj, Phase.NEW, now)
            self._keeper.mark(own, obj)
            if own.phase is Phase.NEW and obj.status.releasing:
                own.enter(Phase.RELEASING, now)
            if self._mirror.is_superseded(own, obj):
                return

    def _add_mirrored(self, blocks: tuple[IPAMBlock, ...]) -> None:
        found = truth.mirrored(blocks, self._writer.boot_id)
        added = truth.add_mirrored(self._ledger, found, self._history, self._kernel.links(), self._link_name)
        if added:
            self._rewrite_journal()

    async def _load_at_last(self) -> None:
        pause = self._settings.backoff_min
        while not self._loaded:
            await self._clock.sleep(pause)
            pause = min(2 * pause, self._settings.backoff_max)
            try:
                await self._load()
            except (StoreError, TimeoutError, KernelUnavailable, JournalError) as e:
                self._away(e)
            self._keeper.poke()

    def _away(self, e: Exception) -> None:
        self._why_not = f"the blocks cannot be read yet: {in_words(e)}"
        log.warning("%s", self._why_not)

    # -- while it runs ------------------------------------------------------------------------------------------------

    def _stop(self, reason: str) -> None:
        """A newer server writes our blocks: nothing new from here on (R2)."""
        self._why_not = reason
        self._keeper.stopped = True
        self._say("Superseded", "NewerWriter", reason)
        self._keeper.moved.ring()
        log.error("%s", reason)

    async def _tend_journal(self) -> None:
        while True:
            await self._clock.sleep(IDLE)
            if self._journal.wants_rewrite or "JournalFailed" in self._ledger.conditions:
                try:
                    self._rewrite_journal()
                except JournalError as e:
                    log.warning("%s", e)

    def _rewrite_journal(self) -> None:
        records = truth.records(self._ledger, self._sweep.netns, self._deleted)
        self._journalled(lambda: self._journal.rewrite(records))

    def _append(self, record: Record) -> None:
        self._journalled(lambda: self._journal.append(record))

    def _note_ended(self, uid: str) -> None:
        """Of a block that is about to be given back."""
        if uid not in self._ledger.ended:
            self._ledger.note_ended(uid)
            try:
                self._append(Ended(uid))
            except JournalError as e:
                log.warning("a block is given back all the same: %s", e)

    def _journalled(self, write: Callable[[], None]) -> None:
        try:
            write()
        except JournalError as e:
            if "JournalFailed" not in self._ledger.conditions:
                self._say("JournalFailed", "NotWritten", str(e))
            raise
        if "JournalFailed" in self._ledger.conditions:
            self._ledger.unsay("JournalFailed")

    # -- what people hear of ------------------------------------------------------------------------------------------

    def _say(self, kind: str, reason: str, message: str) -> None:
        self._ledger.say(kind, reason, message, self._clock.now())

    def _heard(self, news: News) -> None:
        self._tell(news)
        if news.reason == "BlockLost" and not news.normal:
            self._tell_pods()

    def _tell_pods(self) -> None:
        """Tells each pod here whose address is no longer this node's to use."""
        for lease in self._ledger.leases.values():
            why = self.problem(lease.attachment) if lease.pod else ""
            if why:
                self._tell(News("AddressLost", "Own", why, lease.pod, lease.pod_uid))

    async def _tell_again(self) -> None:
        """A node without a block has no status to say its conditions in: its Events stand for it, so they must not run
        out while a condition holds."""
        while True:
            await self._clock.sleep(self._settings.retell)
            for condition in tuple(self._ledger.conditions.values()):
                self._heard(of_condition(condition))
