"""NodeIPAM: the blocks of this node, and the only code that hands out their addresses (R2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ipam.errors import NotReady
from ipam.model import Attachment, BlockView, KernelView, Lease, Request, Settings
from store.base import Store
from store.clock import Clock
from store.model import Condition

if TYPE_CHECKING:
    from ipam.journal import Journal

__all__ = ["Attachment", "BlockView", "KernelView", "Lease", "NodeIPAM", "Request", "Settings"]


class NodeIPAM:
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
    ) -> None: ...

    async def start(self) -> None:
        """Finds out what is handed out (union of journal, mirror and pod routes) and claims a first block per family.

        With the store away it returns all the same: leases are known, DEL works, and ``take`` of something new raises
        NotReady until ``run`` has read the blocks. KernelUnavailable, JournalError."""

    async def run(self) -> None:
        """Mirror, claims, give-back, sweeps, watches. Runs until cancelled."""

    async def take(self, request: Request) -> Lease:
        """The attachment's addresses, the same ones if it has them. The journal is written before this returns.

        Deleted, Exhausted, JournalError, NotReady, WrongPool; nothing is changed then."""
        raise NotReady("not built yet")

    def bind(self, attachment: Attachment, index: int) -> Lease:
        """Notes the host veth's index, after the link exists. Deleted if the attachment has no lease. JournalError."""
        raise NotReady("not built yet")

    def lease(self, attachment: Attachment) -> Lease | None:
        raise NotReady("not built yet")

    def leases(self) -> tuple[Lease, ...]:
        raise NotReady("not built yet")

    def give_back(self, attachment: Attachment) -> Lease | None:
        """To be called when the link is gone. The addresses rest; a later ``take`` of the attachment is refused (also
        when it had no lease: None). JournalError: nothing is changed; the sweep will find what the DEL could not."""
        raise NotReady("not built yet")

    def retain(self, network: str, keep: frozenset[Attachment]) -> tuple[Lease, ...]:
        """Leases of that network that are not in ``keep`` (GC); the caller unwires them and gives them back."""
        raise NotReady("not built yet")

    def free(self) -> int:
        """How many attachments could have addresses now, without a claim: free addresses of the scarcest family."""
        raise NotReady("not built yet")

    def blocks(self) -> tuple[BlockView, ...]:
        raise NotReady("not built yet")

    def conditions(self) -> tuple[Condition, ...]:
        """What is wrong at present, for STATUS and people; each message says what to do."""
        raise NotReady("not built yet")

    def refusal(self) -> str:
        """Why ``take`` refuses everything new at present (STATUS: not available); empty if it does not."""
        raise NotReady("not built yet")
