"""Keeps the right number of blocks: claims ahead, makes new ones ready, gives idle ones back (R1, R4, R5, R9)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from ipam import lost
from ipam.claims import Claims
from ipam.errors import Exhausted, IPAMError, KernelUnavailable, NotReady, in_words
from ipam.foreign import Foreign
from ipam.ledger import Ledger, Own, Phase, count
from ipam.mirror import Superseded
from ipam.model import KernelView, News, Settings
from ipam.pool import Pools, Want, claim_ahead, surplus
from store.clock import Clock
from store.errors import Invalid, StoreError
from store.model import FINALIZER_OWNER, IPAMBlock, Writer
from store.waiting import Moved, until

log = logging.getLogger(__name__)

#: Seconds between two looks when nothing calls: rests end, pauses pass.
IDLE = 5.0
#: Seconds after which a pending change is looked at every second, not every 100 ms: the agent seems to be away.
PATIENCE = 30.0
#: Verdicts kept; fixed addresses make many.
VERDICTS = 256
#: Seconds before an exhausted pool is tried again; doubled each time, up to ``backoff_max``.
FIRST_PAUSE = 1.0


class Verdict(msgspec.Struct, frozen=True):
    """How often somebody has tried to find a block for a want, and what the last try came to (None: it is there)."""

    attempts: int = 0
    error: IPAMError | None = None


class _Refused(msgspec.Struct, frozen=True):
    """A claim that found nothing is not tried again before ``until``."""

    until: float
    pause: float
    why: str


class Keeper:
    """One loop, the only one that changes which blocks we have. ``pools``, ``reserved`` and ``max_blocks`` are set from
    outside; ``poke`` makes it look. ``moved`` rings when a wait for a block may be over."""

    def __init__(
        self,
        ledger: Ledger,
        claims: Claims,
        foreign: Foreign,
        kernel: KernelView,
        writer: Writer,
        clock: Clock,
        settings: Settings,
        *,
        add_strays: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._claims = claims
        self._foreign = foreign
        self._foreign_looked = 0.0
        self._kernel = kernel
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._add_strays = add_strays
        self._news = asyncio.Event()
        self._stepping = asyncio.Event()
        self._wants: dict[Want, None] = {}
        self._verdicts: dict[Want, Verdict] = {}
        self._vanished: dict[str, None] = {}
        self._lost_looked = 0.0
        self._returned: dict[str, IPAMBlock] = {}  # by CIDR: given back before, and in the store again
        self._refused: dict[str, _Refused] = {}  # by pool and CIDR
        self._away_until = 0.0
        self._pause = 0.0
        self.lost = lost.Lost(ledger, clock)
        self.pools = Pools()
        self.reserved: tuple[str, ...] = ()
        #: Blocks that a node may have by the cluster's wish, those of single addresses left out; 0: no limit.
        self.max_blocks = 0
        self.moved = Moved()
        #: The blocks are to be looked at for finalizer and owner.
        self.untied = True
        self._node_uid = ""  # of our Node, as it was seen last
        #: Set when a newer server was met: nothing is claimed, released or deleted any more.
        self.stopped = False

    # -- called by others -----------------------------------------------------------------------------------------

    def poke(self) -> None:
        self._news.set()

    def see_node(self, uid: str) -> None:
        """Of our Node; "": there is none."""
        if uid != self._node_uid:
            self._node_uid, self.untied = uid, True
            self._claims.node_needed = True

    def want(self, wants: tuple[Want, ...]) -> None:
        """Somebody waits for these."""
        self._wants.update(dict.fromkeys(wants))
        self._news.set()

    def verdict(self, want: Want) -> Verdict:
        return self._verdicts.get(want, Verdict())

    def vanished(self, own: Own) -> None:
        """The block's object is no longer in the store, or is another."""
        self._vanished[own.cidr] = None
        self._news.set()

    def mark(self, own: Own, seen: IPAMBlock) -> None:
        """Notes that the block's object is being deleted, if it is: it hands out nothing more (R5)."""
        if seen.metadata.deletion_timestamp and own.phase not in (Phase.MARKED, Phase.LOST, Phase.DELETING):
            what = f"block {own.cidr} is marked for deletion: nothing more is handed out of it"
            log.warning("%s", what)
            self._ledger.tell(News("BlockMarked", "Delete", f"{what}, and it goes once its last pod is gone"))
            own.enter(Phase.MARKED, self._clock.monotonic())
            self._news.set()

    def found(self, obj: IPAMBlock) -> None:
        """The store shows a block of ours that we may not know: an answer to a create was lost. A marked one is ours as
        long as it has our finalizer."""
        meta = obj.metadata
        if obj.spec.cidr not in self._ledger.blocks and not (
            meta.deletion_timestamp and FINALIZER_OWNER not in meta.finalizers
        ):
            if meta.uid in self._ledger.ended:
                self._returned[obj.spec.cidr] = obj
            else:
                self._claims.pending.setdefault(obj.spec.cidr, obj)
            self._news.set()

    def is_short(self, pool: str) -> bool:
        """The pool's next block is to be claimed now (R4). Cheap enough to ask after every take."""
        if pool not in self.pools.ahead:
            return False
        used = free = 0
        for own in self._ledger.of_pool(pool):
            if own.phase in (Phase.NEW, Phase.READY) and self.pools.has(pool, own.cidr):
                used += own.block.used
                free += own.block.free
        if pool in self.pools.pod_cidrs and not self._unclaimed(pool):
            return not free  # as many as it can have: said when it is felt
        return claim_ahead(used=used, free=free)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs until cancelled, or until ``stopped``."""
        async with asyncio.TaskGroup() as group:
            beside = group.create_task(self._look_meanwhile())
            while not self.stopped:
                await until(self._clock, self._news, self._next_look())
                self._news.clear()
                self._stepping.set()
                await self.step()
                self._stepping.clear()
            beside.cancel()

    async def _look_meanwhile(self) -> None:
        """While a step waits for the store, which may hang: a block becomes ready by the kernel alone."""
        while True:
            await self._stepping.wait()
            await self._clock.sleep(self._settings.poll)
            if self._stepping.is_set():
                self._look_at_kernel()

    async def step(self) -> None:
        """Does what is to be done now. A store that is away is tried again later, with growing pauses."""
        if self.stopped:
            return
        self._look_at_kernel()
        wants = tuple(self._wants)
        self._wants.clear()
        now = self._clock.monotonic()
        if now < self._away_until and not wants:
            return
        try:
            await self._end_returned()
            await self._recover()
            await self._tie()
            for want in wants:
                await self._serve(want)
            for cidr in tuple(self._claims.pending):
                self.untied = True  # it may be of an older release
                with contextlib.suppress(Exhausted):  # which has been logged, and the block given back
                    await self._claims.settle(cidr)
            await self._claim_ahead()
            self._release()
            await self._delete()
            await self._look_at_foreign()
        except Superseded:
            self.stopped = True
        except (StoreError, TimeoutError) as e:
            self._pause = min(max(2 * self._pause, self._settings.backoff_min), self._settings.backoff_max)
            self._away_until = self._clock.monotonic() + self._pause
            log.warning("blocks are not looked after for %.1f s: %s", self._pause, in_words(e))
            for want in wants:
                self._judge(want, NotReady(f"no block could be claimed: {in_words(e)}"))
        else:
            self._pause = self._away_until = 0.0
        self.moved.ring()

    def _next_look(self) -> float:
        """Seconds until something may be due without anybody calling."""
        now = self._clock.monotonic()
        blocks = self._ledger.blocks.values()
        pending = self._pending(now)
        looks = [IDLE]
        if pending:
            lively = any(own.gone_at is not None or now - own.since < PATIENCE for own in pending)
            looks.append(self._settings.poll if lively else 1.0)
        if self.untied or self._vanished or self._claims.pending or any(own.phase is Phase.DELETING for own in blocks):
            looks.append(self._settings.poll)
        if now < self._away_until:
            looks = [min(self._away_until - now, *looks[:2])]
        return min(looks)

    # -- new blocks become ready, released ones may go ---------------------------------------------------------------

    def _look_at_kernel(self) -> None:
        now = self._clock.monotonic()
        pending = self._pending(now)
        if not pending:
            return
        blackholes: frozenset[str] | None
        try:
            blackholes = self._kernel.blackholes()
        except KernelUnavailable as e:
            log.warning("the blackholes cannot be read: %s", e)
            blackholes = None
        for own in pending:
            if own.phase is Phase.NEW:
                seen = blackholes is not None and own.cidr in blackholes and not own.obj.status.releasing
                if seen or now - own.since >= self._settings.blackhole_limit:
                    self._make_ready(own, now)
            else:
                self._watch_withdrawal(own, blackholes is None or own.cidr in blackholes, now)

    def _pending(self, now: float) -> list[Own]:
        """The blocks whose next step the kernel decides."""
        return [
            own
            for own in self._ledger.blocks.values()
            if own.phase in (Phase.NEW, Phase.RELEASING) or (own.phase is Phase.MARKED and self._is_drained(own, now))
        ]

    def _is_drained(self, own: Own, now: float) -> bool:
        """Nobody has an address of it, or had one lately."""
        return not own.block.used if own.pool in self.pools.single else count(own, now).idle

    def _make_ready(self, own: Own, now: float) -> None:
        """From here on it hands out, but for what lives in it already, if it was ours before."""
        try:
            self._add_strays()
            # One in which something of ours lives is ours, whoever else routes there (R11).
            problem = "" if own.block.used else self._foreign.look(own.cidr)
        except KernelUnavailable as e:
            log.warning("block %s is not used yet, as the routes cannot be read: %s", own.cidr, e)
            return
        if problem:
            log.error("%s", problem)
            own.enter(Phase.RELEASING, now)
            own.barred = problem
            self._ledger.changed(own)
            self._news.set()
            return
        own.enter(Phase.READY, now)
        self.moved.ring()

    def _watch_withdrawal(self, own: Own, blackhole: bool, now: float) -> None:
        """The agent takes the blackhole away once the block is withdrawn (R9); counted only after it could know: of a
        release by the block's status, of a mark from the mark itself."""
        if own.block.used:  # a live route was found in it
            own.enter(Phase.NEW, now)
            self._ledger.changed(own)
            return
        told = own.phase is Phase.MARKED or (own.obj.status.releasing and own.obj.status.writer == self._writer)
        if blackhole or not told:
            own.gone_at = None
        elif own.gone_at is None:
            own.gone_at = now
        elif now - own.gone_at >= self._settings.withdrawn:
            own.enter(Phase.DELETING, now)

    # -- more blocks --------------------------------------------------------------------------------------------------

    async def _serve(self, want: Want) -> None:
        """Finds a block for who waits, in the first pool that has one."""
        error: IPAMError | None = None
        for name in want.pools:
            pool = self.pools.all.get(name)
            cidr = self.pools.block_at(pool, want.address) if pool and want.address else ""
            if pool is None or (want.address and not cidr):
                error = NotReady(f"IPPool {name} was deleted, or has no such block any more: try again")
                continue
            try:
                await self._open(name, cidr)
            except KeyError:
                error = NotReady(f"IPPool {name} was deleted in the meantime: try again")
            except (Exhausted, NotReady) as e:
                error = e
            else:
                error = None
                break
        self._judge(want, error)

    async def _open(self, pool: str, cidr: str = "") -> None:
        """One more block of the pool, or exactly this one: one that is on its way, one taken back from its release, or
        a claimed one."""
        mine = [o for o in self._ledger.of_pool(pool) if cidr in ("", o.cidr) and self.pools.has(pool, o.cidr)]
        if cidr and mine and mine[0].barred:
            raise Exhausted(mine[0].barred)
        if cidr and any(own.phase in (Phase.MARKED, Phase.LOST) for own in mine):
            raise Exhausted(f"block {cidr} is being deleted, or belongs to another node by now")
        if any(own.phase is Phase.NEW and (cidr or own.block.free) for own in mine):
            return
        if any(
            own.phase is Phase.READY and (cidr or own.block.choose(self._clock.monotonic()) is not None) for own in mine
        ):
            return
        if cidr and any(own.phase is Phase.DELETING for own in mine):
            return  # it can be claimed once it is gone
        await self._more(pool, cidr)

    async def _claim(self, pool: str, cidr: str = "") -> None:
        if pool in self.pools.pod_cidrs:
            cidr = cidr or self._next_pod_cidr(pool)
        now = self._clock.monotonic()
        key = f"{pool} {cidr}"
        known = self._refused.get(key)
        if known is not None and now < known.until:
            raise Exhausted(known.why)
        own = self._settings.max_blocks
        limit = self.max_blocks if own is None else own
        if limit and pool not in self.pools.single and self._counted() >= limit:
            raise Exhausted(
                f"node {self._claims.node} has {self._counted()} blocks, and may have {limit} "
                f"({'underlayctl ipam configure' if own is None else '--max-blocks'}): raise the limit, or run its "
                f"pods elsewhere"
            )
        try:
            await self._claims.claim(self.pools.all[pool], self.reserved, cidr)
        except (Exhausted, Invalid) as e:
            pause = min(2 * known.pause, self._settings.backoff_max) if known else FIRST_PAUSE
            if len(self._refused) >= VERDICTS:
                self._refused.pop(next(iter(self._refused)))
            self._refused[key] = _Refused(self._clock.monotonic() + pause, pause, str(e))
            raise Exhausted(str(e)) from e
        self._refused.pop(key, None)

    def _unclaimed(self, pool: str) -> tuple[str, ...]:
        """podCIDRs of our Node that are no blocks of ours yet."""
        return tuple(cidr for cidr in self.pools.pod_cidrs[pool] if cidr not in self._ledger.blocks)

    def _next_pod_cidr(self, pool: str) -> str:
        cidr = next(iter(self._unclaimed(pool)), "")
        if not cidr:
            raise Exhausted(self._no_pod_cidr(pool) or self._pod_cidrs_used_up(pool))
        return cidr

    def _no_pod_cidr(self, pool: str) -> str:
        """Why there can be no block of the pool; empty if there can."""
        if self.pools.pod_cidrs.get(pool) != ():
            return ""
        inside = self.pools.all[pool].spec.cidr
        return (
            f"node {self._claims.node} has no podCIDR inside {inside}, from which IPPool {pool} hands out: run "
            f"kube-controller-manager with --allocate-node-cidrs=true and --cluster-cidr={inside}, and see its log if "
            f"it does; or use a pool with blocks of its own"
        )

    def _pod_cidrs_used_up(self, pool: str) -> str:
        blocks = ", ".join(f"{own.cidr} {own.phase.value}" for own in self._ledger.of_pool(pool))
        return (
            f"IPPool {pool} has no free address for node {self._claims.node}, and no other podCIDR ({blocks}): run its "
            f"pods elsewhere, or add a pool"
        )

    def _counted(self) -> int:
        """Our blocks that count for the limit."""
        blocks = self._ledger.blocks.values()
        return sum(own.pool not in self.pools.single and own.phase is not Phase.LOST for own in blocks)

    async def _claim_ahead(self) -> None:
        problems = []
        missing = [why for name in self.pools.ahead if (why := self._no_pod_cidr(name))]
        if missing:
            self._say("NoPodCIDR", "NotAssigned", "; ".join(missing))
        else:
            self._ledger.unsay("NoPodCIDR")
        for name in self.pools.ahead if self._node_uid or not self._claims.node_needed else ():
            if not self._no_pod_cidr(name) and self.is_short(name):
                try:
                    await self._more(name)
                except Exhausted as e:
                    problems.append(str(e))
                except NotReady as e:  # the watch has not told yet
                    log.info("%s", e)
        if problems:
            self._say("PoolExhausted", "NoFreeBlock", "; ".join(problems))
        else:
            self._ledger.unsay("PoolExhausted")

    async def _more(self, pool: str, cidr: str = "") -> None:
        """Takes a block back from its release, or claims one."""
        for own in self._ledger.of_pool(pool):
            if (
                own.phase is Phase.RELEASING
                and not own.barred
                and cidr in ("", own.cidr)
                and self.pools.has(pool, own.cidr)
            ):
                own.enter(Phase.NEW, self._clock.monotonic())
                self._ledger.changed(own)
                return
        await self._claim(pool, cidr)

    # -- fewer blocks -------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Starts to give back what is not needed."""
        now = self._clock.monotonic()
        for pool in tuple(self._ledger.pools()):
            ready = [own for own in self._ledger.of_pool(pool) if own.phase is Phase.READY]
            for own in self._not_needed(pool, ready, now):
                # Whoever waited for it must have had the time to take from it.
                if now - own.since >= self._settings.take_limit:
                    own.enter(Phase.RELEASING, now)
                    self._ledger.changed(own)
        for own in [o for o in self._ledger.blocks.values() if o.phase is Phase.LOST and not o.block.used]:
            self._ledger.drop(own)
        self.lost.forget()

    def _not_needed(self, pool: str, ready: list[Own], now: float) -> list[Own]:
        if not self.pools.serves(pool):
            return [own for own in ready if count(own, now).idle]
        if pool in self.pools.single:
            # A fixed address may be wanted elsewhere at once: it does not rest here.
            return [own for own in ready if not own.block.used]
        if pool in self.pools.pod_cidrs:
            # Nobody else can have it as long as it is the Node's.
            return [own for own in ready if not self.pools.has(pool, own.cidr) and count(own, now).idle]
        keep = 1 if self.pools.is_automatic(pool) else 0
        return [ready[i] for i in surplus([count(own, now) for own in ready], keep=keep)]

    async def _delete(self) -> None:
        for own in [o for o in self._ledger.blocks.values() if o.phase is Phase.DELETING]:
            if await self._claims.end(own):
                self._ledger.drop(own)

    # -- blocks that somebody else took away (R5) ----------------------------------------------------------------------

    async def _look_at_foreign(self) -> None:
        """Says what is known of foreign routes, and looks now and then whether they are still there."""
        now = self._clock.monotonic()
        if self._foreign.found and now - self._foreign_looked >= self._settings.foreign_look:
            await self._claims.forget_foreign()
            self._foreign_looked = now
        message = self._foreign.message()
        if message:
            self._say("ForeignRoute", "InUseElsewhere", message)
        else:
            self._ledger.unsay("ForeignRoute")

    async def _end_returned(self) -> None:
        for cidr, obj in tuple(self._returned.items()):
            if cidr not in self._ledger.blocks and cidr not in self._claims.pending:
                await self._claims.end_again(obj)
            self._returned.pop(cidr, None)

    async def _recover(self) -> None:
        now = self._clock.monotonic()
        if now - self._lost_looked >= self._settings.lost_look:
            # Whoever has it may have given it back: then it is ours again, with all that lives in it.
            self._lost_looked = now
            self._vanished.update(
                dict.fromkeys(o.cidr for o in self._ledger.blocks.values() if o.phase is Phase.LOST and o.block.used)
            )
            if self.lost.without_block():
                await self.house()
        for cidr in tuple(self._vanished):
            own = self._ledger.blocks.get(cidr)
            if own is not None:
                await self._recover_one(own)
            self._vanished.pop(cidr, None)

    async def _recover_one(self, own: Own) -> None:
        if await self._claims.is_there(own):
            return
        if own.phase is Phase.DELETING or not own.block.used:
            self._ledger.drop(own)
            return
        living = f"{own.block.used} addresses"
        try:
            obj = await self._claims.recreate(own.pool, own.cidr)
        except Invalid as e:
            self._lose(own, lost.refused(own.cidr, living, e))
            return
        if not self._claims.is_ours(obj):
            self._lose(own, lost.of_other(obj, living))
            return
        log.warning("block %s was deleted while in use, and is there again", own.cidr)
        own.obj, own.written = obj, False
        own.enter(Phase.NEW, self._clock.monotonic())
        self.mark(own, obj)
        self.lost.found(own.cidr)
        self._ledger.changed(own)

    def _lose(self, own: Own, why: str) -> None:
        if own.phase is not Phase.LOST:
            own.enter(Phase.LOST, self._clock.monotonic())
        self.lost.add([own.cidr], why)

    async def house(self) -> None:
        """Creates the blocks again in which something of ours lives and which the store no longer has. Where none can
        be, what lives there is lost."""
        places: dict[tuple[str, str], dict[str, str]] = {}
        for address, who in self._ledger.homeless().items():
            pool = self.pools.of(address)
            place = (pool.name, self.pools.block_at(pool, address)) if pool else ("", "")
            places.setdefault(place, {})[address] = who
        for (name, cidr), users in places.items():
            if cidr:
                await self._restore(name, cidr, lost.some(users))
            elif name:
                self.lost.add(users, lost.of_no_pod_cidr(lost.some(users), self.pools.pod_cidrs[name]))
            else:
                self.lost.add(users, lost.of_no_pool(lost.some(users)))

    async def _restore(self, pool: str, cidr: str, living: str) -> None:
        try:
            obj = await self._claims.recreate(pool, cidr)
        except Invalid as e:
            self.lost.add([cidr], lost.refused(cidr, living, e))
            return
        now = self._clock.monotonic()
        if self._claims.is_ours(obj):
            log.warning("block %s was gone from the store though %s live in it: created again", cidr, living)
            self.mark(self._ledger.adopt(obj, Phase.NEW, now), obj)
            self.lost.found(cidr)
        else:
            self._ledger.adopt(obj, Phase.LOST, now)
            self.lost.add([cidr], lost.of_other(obj, living))

    async def _tie(self) -> None:
        if self.untied:
            self.untied = False  # what becomes known while we write counts for the next round
            blocks = [o for o in self._ledger.blocks.values() if o.phase in (Phase.NEW, Phase.READY)]
            done = False
            try:
                done = not blocks or await self._claims.tie(blocks, self._node_uid)
            finally:
                self.untied = self.untied or not done

    # -- parts --------------------------------------------------------------------------------------------------------

    def _judge(self, want: Want, error: IPAMError | None) -> None:
        before = self._verdicts.pop(want, Verdict())
        if len(self._verdicts) >= VERDICTS:
            self._verdicts.pop(next(iter(self._verdicts)))
        self._verdicts[want] = Verdict(before.attempts + 1, error)

    def _say(self, kind: str, reason: str, message: str) -> None:
        self._ledger.say(kind, reason, message, self._clock.now())
