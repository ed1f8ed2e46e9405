"""``ipam configure``: how all nodes hand out addresses (the IPAMConfiguration ``default``), shown and changed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import ip_network
from typing import Any, Final

import click
import msgspec

from ctl import edit
from ctl.failures import OK
from ctl.kinds import reference
from ctl.show import print_table
from ctl.tables import Table
from store.base import Store
from store.errors import NotFound
from store.model import IPAMBlock, IPAMConfiguration, IPAMConfigurationSpec, Meta, Resource

#: What holds where nobody has configured anything.
DEFAULT: Final = IPAMConfiguration(metadata=Meta(name="default"))
#: Nodes that a line names.
_NAMED: Final = 5


async def show(store: Store, form: str) -> int:
    """Prints what holds."""
    try:
        spec, made = (await store.get(IPAMConfiguration, DEFAULT.name)).spec, True
    except NotFound:
        spec, made = DEFAULT.spec, False
    if form == "json":
        click.echo(json.dumps(_said(spec), indent=2))
        return OK
    rows = [(name, json.dumps(value)) for name, value in _said(spec).items()]
    print_table(Table(("PROPERTY", "VALUE"), tuple(rows)))
    if not made:
        click.echo(f"note: there is no {reference(DEFAULT)}: these are the defaults", err=True)
    return OK


async def change(store: Store, *, max_blocks: int | None, strict: bool | None) -> int:
    """Changes what is given (not None) and says what became of it; names the nodes that have reached a limit. Raises
    Invalid for what is not served."""
    wanted: dict[str, Any] = {"max_blocks_per_host": max_blocks, "strict_affinity": strict}
    given = {name: value for name, value in wanted.items() if value is not None}

    def changed(current: Resource) -> Resource:
        assert isinstance(current, IPAMConfiguration)
        return msgspec.structs.replace(current, spec=msgspec.structs.replace(current.spec, **given))

    verb = await edit.amend(store, DEFAULT, changed)
    click.echo(f"{reference(DEFAULT)} {verb}")
    if max_blocks:
        full = at_limit((await store.list(IPAMBlock)).items, max_blocks)
        if full:
            click.echo(f"note: {_named(full)}: they keep what they have, and claim no more", err=True)
    return OK


def at_limit(blocks: Iterable[IPAMBlock], limit: int) -> list[tuple[str, int]]:
    """Nodes that have so many blocks or more, those of single addresses left out, and how many; the most first."""
    counts: dict[str, int] = {}
    for block in blocks:
        if ip_network(block.spec.cidr).num_addresses > 1:
            counts[block.spec.node] = counts.get(block.spec.node, 0) + 1
    return sorted(((n, c) for n, c in counts.items() if c >= limit), key=lambda item: (-item[1], item[0]))


def _named(full: list[tuple[str, int]]) -> str:
    names = ", ".join(f"{node} ({number})" for node, number in full[:_NAMED])
    more = f" and {len(full) - _NAMED} more" if len(full) > _NAMED else ""
    return f"nodes with that many blocks: {names}{more}"


def _said(spec: IPAMConfigurationSpec) -> dict[str, Any]:
    """Every property, defaults too."""
    return {f.encode_name: getattr(spec, f.name) for f in msgspec.structs.fields(spec)}
