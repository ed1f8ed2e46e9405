"""The commands that only read: get, node status, ipam show, version. Each writes to stdout and returns an exit code."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ctl.failures import OK, REFUSED, UNSEEN, Failure, Usage
from ctl.kinds import NAMESPACE, UnknownKind, find_kinds, key_of, reference, reference_to
from ctl.tables import Table, table
from store.base import Store
from store.clock import SystemClock
from store.errors import BadSelector, NotFound
from store.model import BGPNodeStatus, BGPPeer, IPAMBlock, IPPool, IPReservation, Node, Resource

if TYPE_CHECKING:
    from ctl.look import Here
    from ctl.report import Report

_KUBECTL_TERM = re.compile(r"\s*([A-Za-z0-9_./-]+)\s*(=|==|!=)\s*([A-Za-z0-9_.-]*)\s*")


async def get_objects(
    store: Store, kind: str, names: Sequence[str], *, form: str, selector: str, namespace: str, everywhere: bool
) -> int:
    """Prints objects of one kind or several; names that are missing are said on stderr and make the exit code 1.
    Those of a kind that has namespaces are of ``namespace`` ("": ``default``), or of all with ``everywhere``."""
    try:
        kinds = find_kinds(kind)
    except UnknownKind as e:
        raise Usage([str(e)]) from None
    if names and selector:
        raise Usage(["names and a selector are two ways to choose: give one"])
    if everywhere and (names or namespace):
        raise Usage(["-A asks for all objects of all namespaces: leave it out, or names and -n"])
    found: list[Resource] = []
    missing: list[str] = []
    for wanted in kinds:
        if names:
            objects, gone = await _named(store, wanted, [key_of(wanted, name, namespace) for name in names])
        else:
            objects, gone = await _labelled(store, wanted, selector, "" if everywhere else namespace or NAMESPACE), []
        found += objects
        missing += gone
    if form in ("yaml", "json"):
        _print_documents(found, form, single=len(kinds) == 1 and len(names) == 1)
    elif form == "name":
        for obj in found:
            click.echo(reference(obj))
    elif found:
        _print_tables(found, wide=form == "wide", full_names=len(kinds) > 1, namespaces=everywhere)
    elif not missing:
        place = f" in namespace {namespace or NAMESPACE}" if not everywhere else ""
        lacking = " and no ".join(k.kind() + (place if k.NAMESPACED else "") for k in kinds)
        click.echo(f"nothing found: there is no {lacking}", err=True)
    for name in missing:
        click.echo(f"underlayctl: {name}: not found", err=True)
    return REFUSED if missing else OK


async def show_node_status(store: Store, name: str, *, all_nodes: bool) -> int:
    """Prints sessions and conditions of one node or of all; without a name of this machine, if it is a node."""
    from ctl.sessions import conditions, headline, sessions_table

    if not name and not all_nodes:
        name = socket.gethostname()
        all_nodes = not await _is_node(store, name)
    if all_nodes:
        known = {s.name: s for s in (await store.list(BGPNodeStatus)).items}
        nodes = [n.name for n in (await store.list(Node)).items]
        wanted = sorted({*known, *nodes})
        if not wanted:
            raise Failure(["the store knows no node"])
    else:
        wanted = [name]
        known = {}
        try:
            known[wanted[0]] = await store.get(BGPNodeStatus, wanted[0])
        except NotFound:
            await _refuse_unknown_node(store, name)
    blocks = (await store.list(IPAMBlock)).items if all_nodes else await _blocks_of(store, wanted[0])
    silent = False
    for i, node in enumerate(wanted):
        if i:
            click.echo()
        status = known.get(node)
        if status is None:
            silent = True
            click.echo(f"{node}: its agent has not said anything yet: is it running?")
        else:
            click.echo(headline(status))
            if status.status.sessions:
                print_table(sessions_table(status, now=SystemClock().now()))
        for line in conditions(status, [b for b in blocks if b.spec.node == node]):
            click.echo(f"  {line}")
    return REFUSED if silent else OK


async def show_ipam(store: Store, form: str, *, show_blocks: bool) -> int:
    """Prints the pools with what is used of them; with ``show_blocks`` every block too."""
    from ctl import addresses

    pools = (await store.list(IPPool)).items
    blocks = (await store.list(IPAMBlock)).items
    reservations = (await store.list(IPReservation)).items
    of_pools = addresses.pool_uses(pools, blocks, reservations)
    nodes = {n.name for n in (await store.list(Node)).items} if show_blocks else None
    of_blocks = addresses.block_uses(blocks, nodes) if show_blocks else ()
    if form == "json":
        return _print_json(addresses.VERSION, pools=of_pools, **({"blocks": of_blocks} if show_blocks else {}))
    if not pools and not blocks:
        click.echo("nothing found: there is no IPPool", err=True)
        return OK
    print_table(addresses.pools_table(of_pools))
    if show_blocks:
        click.echo()
        print_table(addresses.blocks_table(of_blocks))
    _print_conditions(blocks)
    orphans = sorted({b.spec.pool for b in blocks} - {p.name for p in pools})
    for pool in orphans:
        click.echo(f"blocks of ippool/{pool} are left, but the pool no longer exists", err=True)
    return OK


async def show_address(store: Store, text: str, form: str) -> int:
    """Prints what the store knows of one address."""
    from ipaddress import ip_address

    from ctl import addresses

    try:
        address = ip_address(text)
    except ValueError:
        raise Usage(
            [
                f"--ip: {text!r} is no address: write it as 10.244.3.65 or fd00:10:244::5, without a prefix; --block "
                f"shows a block"
            ]
        ) from None
    pools = (await store.list(IPPool)).items
    blocks = (await store.list(IPAMBlock)).items
    reservations = (await store.list(IPReservation)).items
    nodes = (await store.list(Node)).items
    use = addresses.address_use(address, pools, blocks, reservations, nodes)
    if form == "json":
        return _print_json(addresses.VERSION, address=use)
    for line in addresses.describe(use, now=SystemClock().now()):
        click.echo(line)
    return OK


async def show_pool(store: Store, name: str, form: str) -> int:
    """Prints what there is of one pool: its blocks, and who has an address of it. Raises Failure if neither it nor a
    block of it is there."""
    from ctl import addresses

    pools = [p for p in (await store.list(IPPool)).items if p.name == name]
    blocks = [b for b in (await store.list(IPAMBlock)).items if b.spec.pool == name]
    if not pools and not blocks:
        raise Failure([f"there is no ippool/{name}, nor a block of it; see: underlayctl ipam show"])
    of_pool = addresses.pool_uses(pools, blocks, (await store.list(IPReservation)).items)
    of_blocks = addresses.block_uses(blocks, {n.name for n in (await store.list(Node)).items})
    who = addresses.holders_of(blocks)
    if form == "json":
        return _print_json(addresses.VERSION, pools=of_pool, blocks=of_blocks, holders=who)
    if of_pool:
        print_table(addresses.pools_table(of_pool))
    if of_blocks:
        click.echo()
        print_table(addresses.blocks_table(of_blocks))
    if who:
        click.echo()
        print_table(addresses.pool_holders_table(who, now=SystemClock().now()))
    _print_conditions(blocks)
    click.echo()
    for line in addresses.pool_notes(name, of_pool[0] if of_pool else None, of_blocks, who):
        click.echo(line)
    return OK


async def show_block(store: Store, text: str, form: str) -> int:
    """Prints one block, and who has which of its addresses. Raises Failure if there is no such block."""
    from ipaddress import ip_network

    from ctl import addresses

    try:
        network = ip_network(text)
    except ValueError as e:
        raise Usage([f"--block: {text!r} is no block's CIDR, as 10.244.3.64/26: {e}"]) from None
    found = addresses.overlapping(network, (await store.list(IPAMBlock)).items)
    block = next((b for b in found if b.spec.cidr == str(network)), None)
    if block is None:
        near = ", ".join(f"{b.spec.cidr} of {b.spec.node}" for b in found[:3]) + (", ..." if len(found) > 3 else "")
        where = f"there is {near}" if found else "no node has claimed any of its addresses"
        raise Failure([f"{network}: there is no such block; {where}"])
    (use,) = addresses.block_uses([block], {n.name for n in (await store.list(Node)).items})
    who = addresses.holders(block)
    if form == "json":
        return _print_json(addresses.VERSION, block=use, holders=who)
    print_table(addresses.blocks_table([use]))
    for line in addresses.notes(use):
        click.echo(line)
    _print_conditions([block])
    if who:
        click.echo()
        print_table(addresses.holders_table(who, now=SystemClock().now()))
    return OK


def _print_conditions(blocks: Sequence[IPAMBlock]) -> None:
    """What the nodes of the blocks say themselves, once each: every block of a node repeats it."""
    from ctl.sessions import conditions

    lines = []
    for node in sorted({b.spec.node for b in blocks if b.status.conditions}):
        lines += [f"{node}: {line}" for line in conditions(None, [b for b in blocks if b.spec.node == node])]
    if lines:
        click.echo()
    for line in lines:
        click.echo(line)


def _print_json(version: str, **parts: Any) -> int:
    import json

    click.echo(json.dumps({"version": version, **{k: msgspec.to_builtins(v) for k, v in parts.items()}}, indent=2))
    return OK


async def show_check(store: Store, form: str, *, nodes: Sequence[str], here: Here | None) -> int:
    """Prints what a check found, and what it could not look at. 0 clean, 1 findings, 2 not all could be looked at."""
    from ctl.look import check

    return _print_report(await check(store, SystemClock(), nodes=tuple(dict.fromkeys(nodes)), here=here), form)


def show_unseen(form: str, nodes: Sequence[str], lines: Sequence[str]) -> int:
    """Prints that nothing at all could be looked at, in the form of a check."""
    from ctl import report

    nothing = report.Report(
        version=report.VERSION,
        at=SystemClock().now(),
        nodes=tuple(nodes),
        local="",
        looked=(),
        unseen=tuple(lines),
        findings=(),
    )
    return _print_report(nothing, form)


def show_version() -> None:
    """Prints the version of this client."""
    from importlib.metadata import version

    click.echo(f"client  underlay {version('underlay')}")


async def show_store(store: Store, url: str) -> int:
    """Prints which store it is, that it answers, and at which version of its contents."""
    listing = await store.list(BGPPeer)
    click.echo(f"store   {url}, answers, at version {listing.version}")
    return OK


async def _labelled(store: Store, kind: type[Resource], selector: str, namespace: str) -> list[Resource]:
    """The objects of a kind; of one namespace if the kind has them and ``namespace`` is not ""."""
    matches = _label_selector(selector)
    where = {"metadata.namespace": namespace} if kind.NAMESPACED and namespace else None
    return [obj for obj in (await store.list(kind, where=where)).items if matches.matches(obj.metadata.labels)]


async def _named(store: Store, kind: type[Resource], keys: Sequence[str]) -> tuple[list[Resource], list[str]]:
    """The objects, and references of those that there are not."""
    found: list[Resource] = []
    missing = []
    for key in keys:
        try:
            found.append(await store.get(kind, key))
        except NotFound:
            missing.append(reference_to(kind, key))
    return found, missing


def _label_selector(text: str) -> Any:
    """Calico's selector language, or kubectl's ``rack=rack-1,tier!=edge``. Raises Usage."""
    from store.selector import parse

    terms = [_KUBECTL_TERM.fullmatch(term) for term in text.split(",")]
    if text and all(terms):
        text = " && ".join(f'{t[1]} {"!=" if t[2] == "!=" else "=="} "{t[3]}"' for t in terms if t)
    try:
        return parse(text)
    except BadSelector as e:
        raise Usage([f"--selector: {e}"]) from None


async def _blocks_of(store: Store, node: str) -> tuple[IPAMBlock, ...]:
    return (await store.list(IPAMBlock, where={"spec.node": node})).items


async def _is_node(store: Store, name: str) -> bool:
    try:
        await store.get(Node, name)
    except NotFound:
        return False
    return True


async def _refuse_unknown_node(store: Store, name: str) -> None:
    if not await _is_node(store, name):
        names = [n.name for n in (await store.list(Node)).items]
        raise Failure([f"there is no node {name!r}; there are {', '.join(names) or 'none'}"])


def _print_report(found: Report, form: str) -> int:
    from ctl import report

    if form == "json":
        click.echo(report.write(found), nl=False)
    else:
        if found.findings:
            print_table(report.page(found))
            click.echo()
        for line in report.remedies(found):
            click.echo(line)
        click.echo(report.summary(found))
    for line in found.unseen:
        click.echo(f"underlayctl: could not look at {line}", err=True)
    return UNSEEN if found.unseen else REFUSED if found.findings else OK


def _print_documents(objects: Sequence[Resource], form: str, *, single: bool) -> None:
    from store.files import dump_json, dump_yaml

    if form == "json":
        click.echo(dump_json(objects, always_list=not single), nl=False)
    elif objects:
        click.echo(dump_yaml(_without_stamps(obj) for obj in objects), nl=False)


def _without_stamps(obj: Resource) -> Resource:
    """The object without what the store sets in ``metadata``, so that it can be applied, here or elsewhere."""
    meta = msgspec.structs.replace(
        obj.metadata, uid="", resource_version="", generation=0, creation_timestamp="", deletion_timestamp=""
    )
    return msgspec.structs.replace(obj, metadata=meta)


def _print_tables(objects: Sequence[Resource], *, wide: bool, full_names: bool, namespaces: bool) -> None:
    now = SystemClock().now()
    kinds = list(dict.fromkeys(type(obj) for obj in objects))
    for i, kind in enumerate(kinds):
        if i:
            click.echo()
        of_kind = [obj for obj in objects if type(obj) is kind]
        print_table(table(kind, of_kind, now=now, wide=wide, full_names=full_names, namespaces=namespaces))


def print_table(page: Table) -> None:
    """Writes the table to stdout, its columns aligned."""
    from tabulate import tabulate

    text = tabulate(page.rows, headers=page.titles, tablefmt="plain", disable_numparse=True)
    click.echo("\n".join(line.rstrip() for line in text.splitlines()))
