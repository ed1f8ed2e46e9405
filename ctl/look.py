"""``ipam check``: reads the store, and one node's journal and kernel, until what is only on its way has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from ctl.check import findings
from ctl.check_events import is_condition
from ctl.check_pods import is_told_of
from ctl.failures import Usage
from ctl.finding import PATIENCE, SETTLE, Finding, Local, View, attachment_of
from ctl.report import VERSION, Report
from ipam import journal
from ipam.errors import JournalError, KernelUnavailable
from ipam.model import Attachment
from store.base import Store
from store.clock import Clock
from store.errors import StoreError
from store.model import IPAMBlock, IPPool, IPReservation, KubeEvent, Node, Pod, R, Writer

#: Seconds for one list of one kind: a cluster of 5,000 nodes takes some.
LIMIT: Final = 60.0
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: Where the Events of objects without a namespace are, as those of Nodes.
_OF_NODES: Final = {"metadata.namespace": "default"}


class Here(msgspec.Struct, frozen=True):
    """The node that the check runs on, and the run directory of its CNI server."""

    node: str
    run: Path


class _Look(msgspec.Struct, frozen=True):
    """``view`` is None if there are no blocks to judge."""

    view: View | None
    looked: tuple[str, ...]
    unseen: tuple[str, ...]


async def check(store: Store, clock: Clock, *, nodes: Sequence[str] = (), here: Here | None = None) -> Report:
    """Looks once; where something is wrong, again after ``SETTLE`` seconds (some kinds: ``PATIENCE``): findings are
    what every look showed. What cannot be looked at is in ``Report.unseen``; nothing of the store is raised.

    Raises Usage for a node that nobody knows."""
    began = clock.monotonic()
    lasting: set[tuple[str, str, str]] | None = None
    unseen: dict[str, None] = {}
    while True:
        look = await _look(store, clock, here)
        unseen.update(dict.fromkeys(look.unseen))
        found: tuple[Finding, ...] = ()
        if look.view is not None:
            _refuse_unknown(look.view, nodes)
            found = findings(look.view, frozenset(nodes))
        present = {f.key for f in found}
        lasting = present if lasting is None else lasting & present
        found = tuple(f for f in found if f.key in lasting)
        waited = clock.monotonic() - began
        left = [wait - waited for f in found if (wait := PATIENCE.get(f.kind, SETTLE)) > waited]
        if not left:
            return Report(
                version=VERSION,
                at=clock.now(),
                nodes=tuple(nodes),
                local=here.node if here else "",
                looked=look.looked,
                unseen=tuple(unseen),
                findings=found,
            )
        await clock.sleep(min(left))


async def _look(store: Store, clock: Clock, here: Here | None) -> _Look:
    looked: list[str] = []
    unseen: list[str] = []
    # First: an address is handed out before its pod tells of it.
    pods = await _list(store, Pod, looked, unseen)
    if not is_told_of(pods or ()):
        looked.clear()  # no kubelet tells of pods here: there is nothing to compare
        pods = None
    events = await _list(store, KubeEvent, looked, unseen, where=_OF_NODES, which=is_condition)
    blocks = await _list(store, IPAMBlock, looked, unseen)
    if blocks is None:
        return _Look(None, (), (*unseen, "nothing else was looked at, as all of it is about blocks"))
    looked.append(f"{sum(len(b.status.allocations) for b in blocks)} allocations")
    pools = await _list(store, IPPool, looked, unseen)
    reservations = await _list(store, IPReservation, looked, unseen)
    nodes = await _list(store, Node, looked, unseen)
    local = _read_local(here, blocks, looked, unseen) if here else None
    names = None if nodes is None else frozenset(n.name for n in nodes)
    view = View(clock.now(), blocks, pools, reservations, names, local, pods, events)
    return _Look(view, tuple(looked), tuple(unseen))


async def _list(
    store: Store,
    kind: type[R],
    looked: list[str],
    unseen: list[str],
    *,
    where: Mapping[str, str] | None = None,
    which: Callable[[R], bool] = lambda _: True,
) -> tuple[R, ...] | None:
    try:
        async with asyncio.timeout(LIMIT):
            found = tuple(obj for obj in (await store.list(kind, where=where)).items if which(obj))
    except (StoreError, TimeoutError) as e:
        unseen.append(f"{kind.PLURAL}: {str(e) or f'no answer within {LIMIT:g} s'}")
        return None
    looked.append(f"{len(found)} {kind.PLURAL}")
    return found


def _refuse_unknown(view: View, nodes: Iterable[str]) -> None:
    known = {b.spec.node for b in view.blocks} | (view.nodes or frozenset())
    for name in nodes:
        if name not in known and view.nodes is not None:
            raise Usage(
                [f"there is no node {name!r} and no block of it; there are {', '.join(sorted(known)) or 'none'}"]
            )


# -- one node's own words ----------------------------------------------------------------------------------------------


def _read_local(here: Here, blocks: Sequence[IPAMBlock], looked: list[str], unseen: list[str]) -> Local | None:
    try:
        path = _journal_in(here.run)
        history = journal.read(path)
    except (OSError, JournalError) as e:
        unseen.append(f"journal of {here.node}: {e}")
        return None
    owner = _whose(history, blocks)
    if owner not in ("", here.node):
        unseen.append(
            f"journal of {here.node}: the one in {here.run} is of {owner}: name the node that this is (--node)"
        )
        return None
    looked.append(f"journal of {here.node}")
    boot_id = path.name.removeprefix("journal-")
    local = Local(
        here.node,
        Writer(boot_id=boot_id, start=_start(here.run, boot_id)),
        {address: lease.attachment for lease in history.leases.values() for address in lease.addresses},
        damage=history.damage,
    )
    said = {attachment_of(a) for b in blocks if b.spec.node == here.node for a in b.status.allocations}
    try:
        routes, linked = _read_kernel(history, said)
    except KernelUnavailable as e:
        unseen.append(f"kernel of {here.node}: {e}")
        return local
    looked.append(f"kernel of {here.node}")
    return msgspec.structs.replace(local, routes=routes, linked=linked)


def _journal_in(run: Path) -> Path:
    """The journal of this boot. OSError, saying what is there instead."""
    found = {p.name: p for p in run.iterdir() if p.name.startswith("journal-") and not p.name.endswith(".new")}
    if len(found) > 1:
        found = {name: p for name, p in found.items() if name == f"journal-{BOOT_ID.read_text().strip()}"}
    if not found:
        raise FileNotFoundError(f"{run} has none of this boot: is that the run directory of underlay-cni (--run)?")
    return next(iter(found.values()))


def _start(run: Path, boot_id: str) -> int:
    try:
        return int((run / f"starts-{boot_id}").read_text())
    except (OSError, ValueError):
        return 0  # not known: only boots are compared then


def _whose(history: journal.History, blocks: Sequence[IPAMBlock]) -> str:
    """The node whose blocks the journal hands out of, by the uids of the blocks; "" if none is known."""
    nodes = {b.metadata.uid: b.spec.node for b in blocks}
    uids = [uid for of_lease in history.blocks.values() for uid in of_lease]
    return next((nodes[uid] for uid in reversed(uids) if uid in nodes), "")


def _read_kernel(history: journal.History, said: Iterable[Attachment]) -> tuple[frozenset[str], frozenset[Attachment]]:
    """Addresses with a pod route, and the holders whose link is there. KernelUnavailable."""
    from cni.errors import CNIError
    from cni.kernel import NetlinkView
    from cni.netlink import Netlink
    from cni.podnet import link_name

    try:
        with Netlink() as netlink:
            kernel = NetlinkView(netlink)
            if kernel.netns() != history.netns:
                raise KernelUnavailable(
                    f"this is network namespace {kernel.netns()}, and the journal's addresses are wired in "
                    f"{history.netns or 'one that it does not name'}: run the check in the node's own"
                )
            routes = frozenset(kernel.pod_routes())
            links = kernel.links()
    except (CNIError, OSError) as e:
        raise KernelUnavailable(f"it cannot be asked: {e}") from e
    names = set(links.values())
    indices = {a: lease.index for a, lease in history.leases.items()}
    holders = {*said, *indices}
    linked = (a for a in holders if indices.get(a, 0) in links or link_name(a.container, a.interface) in names)
    return routes, frozenset(linked)
