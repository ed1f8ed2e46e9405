"""``ipam release``: has addresses and blocks released that nobody uses any more.

An address is released by its block's owner alone (R2): we ask for it by an annotation, which the owner carries out and
removes. It keeps what is in use, and says why. A block of a node that is gone has no owner to ask: people end it (R5).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
from typing import Final

import click
import msgspec

from ctl import look
from ctl.addresses import refusal
from ctl.failures import OK, REFUSED, Failure, Usage, explain
from ctl.finding import Finding, Range, attachment_of, holder, number
from ctl.kinds import reference
from ctl.report import Report
from ipam.dead import let_go
from store.base import Store, mutate
from store.clock import Clock
from store.errors import Expired, NotFound, StoreError, Unavailable
from store.model import (
    ANNOTATION_RELEASE,
    FINALIZER_OWNER,
    Allocation,
    IPAMBlock,
    Node,
    block_name,
    release_wanted,
)

#: Seconds that we wait for an owner's answer; it may carry the release out later.
ANSWER: Final = 5.0
#: The kinds of findings that are leaks: what holds the address, or owns the block, is gone. The first is found, and
#: found again, on the node itself only.
LEAKED_HERE: Final = "AllocationWithoutRoute"
LEAKED_ADDRESSES: Final = (LEAKED_HERE, "PodGone")
LEAKED_BLOCK: Final = "BlockOfNoNode"


class _Held(msgspec.Struct, frozen=True):
    """An allocation, and the block that it is in."""

    block: IPAMBlock
    allocation: Allocation

    @property
    def address(self) -> str:
        return self.allocation.address

    def still(self, block: IPAMBlock) -> bool:
        """Whether the same holder has it in this block."""
        who = attachment_of(self.allocation)
        return any(a.address == self.address and attachment_of(a) == who for a in block.status.allocations)


async def release_addresses(store: Store, addresses: Sequence[str]) -> int:
    """Asks the owners to release these addresses, and says what became of each. Raises Usage, and Failure (nothing is
    asked then) if one of them cannot be released."""
    wanted = [_parse_address(text) for text in dict.fromkeys(addresses)]
    blocks = (await store.list(IPAMBlock)).items
    lines: list[str] = []
    found: list[_Held] = []
    for at in wanted:
        held = _find(at, blocks)
        why = await _why_not(store, at, held, blocks)
        if why or held is None:
            lines.append(f"{at}: {why}")
        else:
            found.append(held)
    if lines:
        raise Failure(lines)
    return await _ask_owners(store, found)


async def release_blocks(store: Store, cidrs: Sequence[str], *, yes: bool, force: bool) -> int:
    """Ends blocks whose node is gone, after asking. Raises Usage, and Failure (nothing is done then) if there is no
    such block, if its node is there and ``force`` is not given, or if people say no."""
    lines: list[str] = []
    said: list[str] = []
    blocks: list[IPAMBlock] = []
    for cidr in dict.fromkeys(_parse_cidr(text) for text in cidrs):
        try:
            block = await store.get(IPAMBlock, block_name(cidr))
        except NotFound:
            lines.append(f"{cidr}: there is no such block; those that there are: underlayctl ipam show --show-blocks")
            continue
        alive = await _is_there(store, block.spec.node)
        if alive and not force:
            lines.append(_owned(block))
        blocks.append(block)
        said.append(_consequence(block, alive=alive))
    if lines:
        raise Failure(lines)
    click.echo("\n".join(said))
    _confirm(len(blocks), yes=yes)
    return await _end_blocks(store, blocks, force=force)


async def release_report(store: Store, clock: Clock, report: Report, *, here: look.Here | None, yes: bool) -> int:
    """Releases the leaks of a report: those that a check finds now, exactly as they stand there, after asking. What is
    no longer so is said on stderr, and makes the exit code 1; what is no leak is left to people."""
    leaks = [f for f in report.findings if f.kind in (*LEAKED_ADDRESSES, LEAKED_BLOCK)]
    if len(leaks) < len(report.findings):
        click.echo(f"{len(report.findings) - len(leaks)} of {len(report.findings)} findings are no leaks: left alone")
    if not leaks:
        click.echo("no leak is in the report: nothing to release")
        return OK
    now = await look.check(store, clock, nodes=report.nodes, here=here)
    for line in now.unseen:
        click.echo(f"underlayctl: could not look again at {line}", err=True)
    blocks = {reference(b): b for b in (await store.list(IPAMBlock)).items}
    held: list[_Held] = []
    dead: list[IPAMBlock] = []
    code = OK
    for leak in leaks:
        block = blocks.get(leak.object)
        found = _find(leak.address, [block] if block else [])
        if leak not in now.findings or block is None or (leak.kind in LEAKED_ADDRESSES and found is None):
            click.echo(f"underlayctl: {leak.address}: {_not_again(leak, report, here)}", err=True)
            code = REFUSED
        elif found is not None:
            if found not in held:  # both kinds may have found it
                held.append(found)
            click.echo(f"{found.address} on {block.spec.node}: {leak.what}")
        else:
            dead.append(block)
            click.echo(_consequence(block, alive=False))
    if held or dead:
        _confirm(len(held) + len(dead), yes=yes)
        code = max(code, await _end_blocks(store, dead, force=False))
        code = max(code, await _ask_owners(store, held))
    return code


# -- addresses ---------------------------------------------------------------------------------------------------------


def _find(address: str, blocks: Iterable[IPAMBlock]) -> _Held | None:
    return next((_Held(b, a) for b in blocks for a in b.status.allocations if a.address == address), None)


async def _why_not(store: Store, address: str, held: _Held | None, blocks: Iterable[IPAMBlock]) -> str:
    """Why nobody could release the address; empty if its owner can."""
    if held is None:
        around = next((b for b in blocks if _holds(b.spec.cidr, address)), None)
        if around is None:
            return "it is in no block: nobody has it"
        return f"nobody has it: it is free, or rests, in block {around.spec.cidr} of {around.spec.node}"
    node = held.block.spec.node
    if not await _is_there(store, node):
        return (
            f"there is no node {node} that could release it; if that machine is gone for good, release its block: "
            f"underlayctl ipam release --block {held.block.spec.cidr}"
        )
    return ""


async def _ask_owners(store: Store, wanted: Sequence[_Held]) -> int:
    """Writes the annotations, waits for the answers and says them."""
    by_block: dict[str, list[_Held]] = {}
    for held in wanted:
        by_block.setdefault(held.block.name, []).append(held)
    for name, of_block in by_block.items():
        await _annotate(store, name, of_block)
    until = asyncio.get_running_loop().time() + ANSWER
    code = OK
    for name, of_block in by_block.items():
        block = await _answer(store, name, of_block, until)
        for held in of_block:
            code = max(code, _say_answer(held, block))
    return code


async def _annotate(store: Store, name: str, wanted: Sequence[_Held]) -> None:
    """Adds the addresses that still have their holder to those that people want released already."""

    def change(block: IPAMBlock) -> IPAMBlock | None:
        asked = {*release_wanted(block), *(held.address for held in wanted if held.still(block))}
        text = ",".join(sorted(asked, key=_order))
        if text == block.metadata.annotations.get(ANNOTATION_RELEASE, ""):
            return None
        annotations = {**block.metadata.annotations, ANNOTATION_RELEASE: text}
        return msgspec.structs.replace(block, metadata=msgspec.structs.replace(block.metadata, annotations=annotations))

    await mutate(store, IPAMBlock, name, change)


async def _answer(store: Store, name: str, wanted: Sequence[_Held], until: float) -> IPAMBlock | None:
    """The block once all of it is answered, or as it is at ``until`` (the event loop's time); None if it is gone."""
    events = store.watch(IPAMBlock, where={"metadata.name": name})
    # What was not answered in time, or fell out of the watch, is read below.
    with contextlib.suppress(TimeoutError, Expired):
        async with asyncio.timeout_at(until), contextlib.aclosing(events):
            async for event in events:
                block = event.object
                if event.type == "deleted" or (block and all(_is_answered(held, block) for held in wanted)):
                    break
    try:
        return await store.get(IPAMBlock, name)
    except NotFound:
        return None


def _is_answered(held: _Held, block: IPAMBlock) -> bool:
    """Released, or refused: a reason that stands there while the wish does is of an earlier one."""
    kept = held.address not in release_wanted(block) and refusal(block, held.address)
    return bool(kept) or not held.still(block)


def _say_answer(held: _Held, block: IPAMBlock | None) -> int:
    node = held.block.spec.node
    if block is None or not held.still(block):
        click.echo(f"{held.address} released")
        return OK
    if held.address in release_wanted(block):
        said = (
            f"{node} was asked, and has not answered within {ANSWER:g} s: it releases the address once underlay-cni "
            f"runs there and reaches the store"
        )
    else:
        said = f"{node} keeps it for {holder(held.allocation)}: {refusal(block, held.address) or 'it has not said why'}"
    click.echo(f"underlayctl: {held.address}: {said}", err=True)
    return REFUSED


# -- blocks ------------------------------------------------------------------------------------------------------------


async def _end_blocks(store: Store, blocks: Sequence[IPAMBlock], *, force: bool) -> int:
    """Ends each; what stands against it is said on stderr, and the others are ended all the same."""
    code = OK
    for block in blocks:
        try:
            await _end(store, block, force=force)
        except Unavailable:
            raise
        except (StoreError, Failure) as e:
            for line in e.lines if isinstance(e, Failure) else explain(e, block.spec.cidr):
                click.echo(f"underlayctl: {line}", err=True)
            code = REFUSED
        else:
            click.echo(f"block {block.spec.cidr} released")
    return code


async def _end(store: Store, block: IPAMBlock, *, force: bool) -> None:
    """Marks the block as it was looked at, then takes its owner's finalizer away, and so deletes it. Conflict: somebody
    has written it since, so its owner may live. Raises Failure if its node is there, or others hold the block."""
    if not force and await _is_there(store, block.spec.node):
        raise Failure([_owned(block)])
    meta = block.metadata
    try:
        await store.delete(IPAMBlock, block.name, uid=meta.uid, resource_version=meta.resource_version)
        marked = await store.get(IPAMBlock, block.name)
        if marked.metadata.uid != meta.uid:
            return  # gone, and claimed anew by somebody
        await let_go(store, marked)
        others = [f for f in marked.metadata.finalizers if f != FINALIZER_OWNER]
        if others:
            raise Failure(
                [f"{block.spec.cidr}: it is marked for deletion, and goes when {', '.join(others)} is removed"]
            )
    except NotFound:
        return


def _owned(block: IPAMBlock) -> str:
    cidr, node = block.spec.cidr, block.spec.node
    return (
        f"{cidr}: its node {node} is there, and looks after it: it gives the block back when its pods are gone. If the "
        f"machine is gone for good, delete its Node first; --force takes the block from a node that lives"
    )


def _consequence(block: IPAMBlock, *, alive: bool) -> str:
    used = block.status.used
    pods = ", ".join(a.pod or a.container for a in block.status.allocations[:3])
    pods += ", ..." if len(block.status.allocations) > 3 else ""
    held = (
        f"{used} of its addresses are recorded as in use ({pods})"
        if used
        else "none of its addresses is recorded in use"
    )
    node = f"{block.spec.node}, which is there" if alive else f"{block.spec.node}, which has no Node any more"
    return f"block {block.spec.cidr} of {node}: {held}"


def _confirm(number: int, *, yes: bool) -> None:
    """Asks people. Raises Failure unless they agree."""
    if yes:
        return
    text = (
        f"Release {'it' if number == 1 else f'all {number}'}? What still runs with these addresses shares them with "
        f"others from then on"
    )
    try:
        agreed = click.confirm(text, err=True)
    except click.Abort:
        raise Failure(["nothing was released: nobody answered; --yes answers beforehand"]) from None
    if not agreed:
        raise Failure(["nothing was released"])


# -- parts -------------------------------------------------------------------------------------------------------------


def _not_again(leak: Finding, report: Report, here: look.Here | None) -> str:
    if leak.kind == LEAKED_HERE and here is None:
        return f"only {report.local} itself can look again: run this there, with --run as for the check"
    return f"{leak.kind} is no longer so, as the report has it: check again"


async def _is_there(store: Store, node: str) -> bool:
    try:
        await store.get(Node, node)
    except NotFound:
        return False
    return True


def _parse_address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise Usage([f"--ip: {text!r} is no address: write it as 10.244.3.65, without a prefix"]) from None


def _parse_cidr(text: str) -> str:
    try:
        return str(ip_network(text))
    except ValueError as e:
        raise Usage([f"--block: {text!r} is no block's CIDR, as 10.244.3.64/26: {e}"]) from None


def _holds(cidr: str, address: str) -> bool:
    around, at = Range.of(cidr), number(address)
    return around is not None and at is not None and around.holds(at)


def _order(text: str) -> tuple[int, int, str]:
    at = number(text)
    return (at.version, at.first, "") if at else (9, 0, text)
