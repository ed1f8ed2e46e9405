"""Keeps the right number of blocks: claims ahead, makes new ones ready, gives idle ones back (R1, R4, R5, R9)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from ipam.claims import Claims
from ipam.errors import Exhausted, IPAMError, KernelUnavailable, NotReady
from ipam.ledger import Ledger, Own, Phase, count
from ipam.mirror import Superseded
from ipam.model import KernelView, Settings
from ipam.pool import Pools, Want, block_at, claim_ahead, surplus
from ipam.waiting import Moved, until
from store.clock import Clock
from store.errors import Invalid, StoreError
from store.model import Condition, IPAMBlock, Writer

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
    """One loop, the only one that changes which blocks we have. ``pools`` and ``reserved`` are set from outside;
    ``poke`` makes it look. ``moved`` rings when a wait for a block may be over."""

    def __init__(
        self,
        ledger: Ledger,
        claims: Claims,
        kernel: KernelView,
        writer: Writer,
        clock: Clock,
        settings: Settings,
        *,
        add_strays: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._claims = claims
        self._kernel = kernel
        self._writer = writer
        self._clock = clock
        self._settings = settings
        self._add_strays = add_strays
        self._news = asyncio.Event()
        self._wants: dict[Want, None] = {}
        self._verdicts: dict[Want, Verdict] = {}
        self._vanished: dict[str, None] = {}
        self._refused: dict[str, _Refused] = {}  # by pool and CIDR
        self._away_until = 0.0
        self._pause = 0.0
        self.pools = Pools()
        self.reserved: tuple[str, ...] = ()
        self.moved = Moved()
        #: Set when a newer server was met: nothing is claimed, released or deleted any more.
        self.stopped = False

    # -- called by others -----------------------------------------------------------------------------------------

    def poke(self) -> None:
        self._news.set()

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
            log.warning("block %s is marked for deletion: nothing more is handed out of it", own.cidr)
            own.enter(Phase.MARKED, self._clock.monotonic())

    def lost(self, cidr: str, what: str) -> None:
        """A block of ours belongs to another node by now; ``what`` lives in it here."""
        self._say(
            "BlockLost",
            "OwnedByAnotherNode",
            f"block {cidr} belongs to another node, but {what}: delete these pods, or the other node's block",
        )

    def found(self, obj: IPAMBlock) -> None:
        """The store shows a block of ours that we may not know: an answer to a create was lost."""
        if obj.spec.cidr not in self._ledger.blocks and not obj.metadata.deletion_timestamp:
            self._claims.pending.setdefault(obj.spec.cidr, obj)
            self._news.set()

    def is_short(self, pool: str) -> bool:
        """The pool's next block is to be claimed now (R4). Cheap enough to ask after every take."""
        if pool not in self.pools.ahead:
            return False
        used = free = 0
        for own in self._ledger.of_pool(pool):
            if own.phase in (Phase.NEW, Phase.READY):
                used += own.block.used
                free += own.block.free
        return claim_ahead(used=used, free=free)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs until cancelled, or until ``stopped``."""
        while not self.stopped:
            await until(self._clock, self._news, self._next_look())
            self._news.clear()
            await self.step()

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
            await self._recover()
            for want in wants:
                await self._serve(want)
            for cidr in tuple(self._claims.pending):
                with contextlib.suppress(Exhausted):  # which has been logged, and the block given back
                    await self._claims.settle(cidr)
            await self._claim_ahead()
            self._release()
            await self._delete()
        except Superseded:
            self.stopped = True
        except (StoreError, TimeoutError) as e:
            self._pause = min(max(2 * self._pause, self._settings.backoff_min), self._settings.backoff_max)
            self._away_until = self._clock.monotonic() + self._pause
            log.warning("blocks are not looked after for %.1f s: %s", self._pause, e or "no answer from the store")
            for want in wants:
                self._judge(want, NotReady(f"no block could be claimed: {e or 'no answer from the store'}"))
        else:
            self._pause = self._away_until = 0.0
        self.moved.ring()

    def _next_look(self) -> float:
        """Seconds until something may be due without anybody calling."""
        now = self._clock.monotonic()
        blocks = self._ledger.blocks.values()
        pending = [own for own in blocks if own.phase in (Phase.NEW, Phase.RELEASING)]
        looks = [IDLE]
        if pending:
            lively = any(own.gone_at is not None or now - own.since < PATIENCE for own in pending)
            looks.append(self._settings.poll if lively else 1.0)
        if self._vanished or self._claims.pending or any(own.phase is Phase.DELETING for own in blocks):
            looks.append(self._settings.poll)
        if now < self._away_until:
            looks = [min(self._away_until - now, *looks[:2])]
        return min(looks)

    # -- new blocks become ready, released ones may go ---------------------------------------------------------------

    def _look_at_kernel(self) -> None:
        now = self._clock.monotonic()
        pending = [own for own in self._ledger.blocks.values() if own.phase in (Phase.NEW, Phase.RELEASING)]
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

    def _make_ready(self, own: Own, now: float) -> None:
        """From here on it hands out, but for what lives in it already, if it was ours before."""
        try:
            self._add_strays()
        except KernelUnavailable as e:
            log.warning("block %s is not used yet, as the pod routes cannot be read: %s", own.cidr, e)
            return
        own.enter(Phase.READY, now)
        self.moved.ring()

    def _watch_withdrawal(self, own: Own, blackhole: bool, now: float) -> None:
        """The agent takes the blackhole away once the block is withdrawn (R9); counted only after it could know."""
        if own.block.used:  # a live route was found in it
            own.enter(Phase.NEW, now)
            self._ledger.changed(own)
            return
        told = own.obj.status.releasing and own.obj.status.writer == self._writer
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
            try:
                await self._open(name, block_at(self.pools.all[name], want.address) if want.address else "")
            except KeyError:
                error = NotReady(f"IPPool {name} was deleted in the meantime: try again")
            except Exhausted as e:
                error = e
            else:
                error = None
                break
        self._judge(want, error)

    async def _open(self, pool: str, cidr: str = "") -> None:
        """One more block of the pool, or exactly this one: one that is on its way, one taken back from its release, or
        a claimed one."""
        mine = [own for own in self._ledger.of_pool(pool) if cidr in ("", own.cidr)]
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
        now = self._clock.monotonic()
        key = f"{pool} {cidr}"
        known = self._refused.get(key)
        if known is not None and now < known.until:
            raise Exhausted(known.why)
        try:
            await self._claims.claim(self.pools.all[pool], self.reserved, cidr)
        except (Exhausted, Invalid) as e:
            pause = min(2 * known.pause, self._settings.backoff_max) if known else FIRST_PAUSE
            if len(self._refused) >= VERDICTS:
                self._refused.pop(next(iter(self._refused)))
            self._refused[key] = _Refused(self._clock.monotonic() + pause, pause, str(e))
            raise Exhausted(str(e)) from e
        self._refused.pop(key, None)

    async def _claim_ahead(self) -> None:
        problems = []
        for name in self.pools.ahead:
            if self.is_short(name):
                try:
                    await self._more(name)
                except Exhausted as e:
                    problems.append(str(e))
        if problems:
            self._say("PoolExhausted", "NoFreeBlock", "; ".join(problems))
        else:
            self._ledger.unsay("PoolExhausted")

    async def _more(self, pool: str, cidr: str = "") -> None:
        """Takes a block back from its release, or claims one."""
        for own in self._ledger.of_pool(pool):
            if own.phase is Phase.RELEASING and cidr in ("", own.cidr):
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

    def _not_needed(self, pool: str, ready: list[Own], now: float) -> list[Own]:
        if not self.pools.serves(pool):
            return [own for own in ready if count(own, now).idle]
        if pool in self.pools.single:
            # A fixed address may be wanted elsewhere at once: it does not rest here.
            return [own for own in ready if not own.block.used]
        keep = 1 if self.pools.is_automatic(pool) else 0
        return [ready[i] for i in surplus([count(own, now) for own in ready], keep=keep)]

    async def _delete(self) -> None:
        for own in [o for o in self._ledger.blocks.values() if o.phase is Phase.DELETING]:
            if await self._claims.end(own):
                self._ledger.drop(own)

    # -- blocks that somebody else took away (R5) ----------------------------------------------------------------------

    async def _recover(self) -> None:
        for cidr in tuple(self._vanished):
            own = self._ledger.blocks.get(cidr)
            if own is not None and own.phase is not Phase.LOST:
                await self._recover_one(own)
            self._vanished.pop(cidr, None)

    async def _recover_one(self, own: Own) -> None:
        if await self._claims.is_there(own):
            return
        now = self._clock.monotonic()
        if own.phase is Phase.DELETING or not own.block.used:
            self._ledger.drop(own)
            return
        obj = await self._claims.recreate(own.pool, own.cidr)
        if obj is None:
            own.enter(Phase.LOST, now)
            self.lost(own.cidr, f"{own.block.used} addresses of it are in use here")
            return
        log.warning("block %s was deleted while in use, and is there again", own.cidr)
        own.obj, own.written = obj, False
        own.enter(Phase.NEW, now)
        self._ledger.changed(own)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _judge(self, want: Want, error: IPAMError | None) -> None:
        before = self._verdicts.pop(want, Verdict())
        if len(self._verdicts) >= VERDICTS:
            self._verdicts.pop(next(iter(self._verdicts)))
        self._verdicts[want] = Verdict(before.attempts + 1, error)

    def _say(self, kind: str, reason: str, message: str) -> None:
        self._ledger.say(
            Condition(type=kind, status="True", reason=reason, message=message, last_transition_time=self._clock.now())
        )
