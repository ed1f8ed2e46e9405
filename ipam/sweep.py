"""Finds addresses whose link is gone, and lets them go (R7). Also holds live routes that no lease explains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ipam.errors import IPAMError, KernelUnavailable
from ipam.ledger import Ledger
from ipam.model import Attachment, KernelView, Lease, News, Settings
from store.clock import Clock

log = logging.getLogger(__name__)

#: So many may vanish at once whatever their share: a node with two pods may lose both.
FEW = 4
_MEND = "if that one is gone, stop the server and remove the journal"


class Sweep:
    """``release`` ends a lease whose leak is proven. ``taken`` says when (monotonic) a lease was taken, if it was since
    this process began."""

    def __init__(
        self,
        ledger: Ledger,
        kernel: KernelView,
        clock: Clock,
        settings: Settings,
        *,
        link_name: Callable[[Attachment], str],
        release: Callable[[Lease], None],
        taken: Mapping[Attachment, float],
    ) -> None:
        self._ledger = ledger
        self._kernel = kernel
        self._clock = clock
        self._settings = settings
        self._link_name = link_name
        self._release = release
        self._taken = taken
        #: The namespace in which the leases are wired; another's links say nothing about them.
        self.netns = 0
        self._missing: dict[Attachment, float] = {}  # since when
        self._routeless: dict[str, float] = {}  # strays

    async def run(self) -> None:
        """A sweep every ``settings.sweep`` seconds, until cancelled."""
        while True:
            await self._clock.sleep(self._settings.sweep)
            self.sweep()

    def sweep(self) -> tuple[Lease, ...]:
        """One look. Returns the leases that it ended: gone now, and in a look at least ``settings.sweep`` s ago."""
        try:
            elsewhere = self._elsewhere()
            if elsewhere:
                self._stop("WrongNamespace", f"{elsewhere}: nothing is swept; {_MEND}")
                return ()
            # Routes first: a pod that is wired between the two dumps then has its link in the second.
            routes = self._kernel.pod_routes()
            links = self._kernel.links()
            ended = self._sweep_leases(links)
            self._sweep_strays(routes, links)
        except KernelUnavailable as e:
            log.warning("no sweep this time: %s", e)
            return ()
        return ended

    def release(self, address: str) -> str:
        """Ends what has the address, if nothing uses it any more, at once. Returns why it does not; empty if nobody has
        the address (any longer)."""
        try:
            owner = self._ledger.owner(address)
            if owner is None:
                return ""
            elsewhere = self._elsewhere()
            if elsewhere:
                return f"{elsewhere}; {_MEND}"
            lease = self._ledger.leases.get(owner)
            if lease is None:
                return self._release_stray(address)
            if self._being_wired(lease, self._clock.monotonic()):
                return f"the ADD of {owner} is under way"
            if self._kernel.link(lease.index, self._link_name(owner)):
                return f"the link of {owner} is there: delete that pod"
            return "" if self._end(lease) else f"the journal could not be written for {owner}: see the log"
        except KernelUnavailable as e:
            return f"the kernel could not be read, ask again: {e}"
        except ValueError:
            return "that is no address"

    def add_strays(self) -> None:
        """Holds every address that has a pod route and no lease. KernelUnavailable."""
        self._add_strays(self._kernel.pod_routes(), self._kernel.links())

    def _elsewhere(self) -> str:
        """That this is not the namespace of the leases; empty if it is."""
        here = self._kernel.netns()
        if here == self.netns:
            return ""
        return f"this server runs in network namespace {here}, but the journal's addresses are wired in {self.netns}"

    def _release_stray(self, address: str) -> str:
        if address in self._kernel.pod_routes():
            return f"a route leads to it, of no pod that is known: see 'ip route get {address}'"
        self._ledger.end_stray(address, self._clock.monotonic())
        self._routeless.pop(address, None)
        return ""

    def _sweep_leases(self, links: Mapping[int, str]) -> tuple[Lease, ...]:
        now = self._clock.monotonic()
        names = set(links.values())
        missing = [
            lease
            for lease in self._ledger.leases.values()
            if not self._present(lease, links, names) and not self._being_wired(lease, now)
        ]
        self._missing = {lease.attachment: self._missing.get(lease.attachment, now) for lease in missing}
        if len(missing) > FEW and 2 * len(missing) > len(self._ledger.leases):
            self._stop(
                "TooManyGone",
                f"the links of {len(missing)} of {len(self._ledger.leases)} attachments are gone: nothing is swept, "
                f"as that looks like a mistake; if they are gone indeed, let the runtime delete or collect (GC) them",
            )
            return ()
        self._ledger.unsay("SweepStopped")
        ended = []
        for lease in missing:
            if now - self._missing[lease.attachment] < self._settings.sweep:
                continue
            if self._kernel.link(lease.index, self._link_name(lease.attachment)):
                log.warning("the link of %s is there, though the dump had none", lease.attachment)
                del self._missing[lease.attachment]
                continue
            if self._end(lease):
                ended.append(lease)
        return tuple(ended)

    def _end(self, lease: Lease) -> bool:
        try:
            self._release(lease)
        except IPAMError as e:
            log.warning("%s stays with %s for now: %s", ", ".join(lease.addresses), lease.attachment, e)
            return False
        what = f"{', '.join(lease.addresses)} free again: the link of {lease.attachment} is gone, and no DEL came"
        log.warning("%s", what)
        self._ledger.tell(News("LeakReleased", "Sweep", what, normal=True))
        self._missing.pop(lease.attachment, None)
        return True

    def _present(self, lease: Lease, links: Mapping[int, str], names: set[str]) -> bool:
        return (lease.index and lease.index in links) or self._link_name(lease.attachment) in names

    def _being_wired(self, lease: Lease, now: float) -> bool:
        """Its ADD may still be at work."""
        taken = self._taken.get(lease.attachment)
        return not lease.index and taken is not None and now - taken < self._settings.unwired

    def _sweep_strays(self, routes: Mapping[str, int], links: Mapping[int, str]) -> None:
        now = self._clock.monotonic()
        gone = [address for address in self._ledger.strays if address not in routes]
        self._routeless = {address: self._routeless.get(address, now) for address in gone}
        for address in gone:
            if now - self._routeless[address] >= self._settings.sweep:
                log.info("%s: its route is gone, it is free again", address)
                self._ledger.end_stray(address, now)
                del self._routeless[address]
        self._add_strays(routes, links)

    def _add_strays(self, routes: Mapping[str, int], links: Mapping[int, str]) -> None:
        leased = {address for lease in self._ledger.leases.values() for address in lease.addresses}
        for address, index in routes.items():
            if address not in leased and address not in self._ledger.strays:
                log.warning("%s has a live route and no lease: it is handed out to nobody", address)
                self._ledger.add_stray(address, links.get(index, ""))

    def _stop(self, reason: str, message: str) -> None:
        self._ledger.say("SweepStopped", reason, message, self._clock.now())
