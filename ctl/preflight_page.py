"""``install check``, shown: a row for each check, and below what to do."""

from __future__ import annotations

from collections.abc import Mapping

import click
import msgspec

from ctl.failures import OK, REFUSED
from ctl.machine import Where, read
from ctl.preflight import Page, checks
from store.clock import Clock


async def show(where: Where, clock: Clock, environment: Mapping[str, str], form: str) -> int:
    """1 if a check failed. Warnings and what was skipped are no failures."""
    found = Page(machine=where.node, at=clock.now(), checks=checks(await read(where, clock, environment)))
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    elif form == "yaml":
        click.echo(msgspec.yaml.encode(found).decode(), nl=False)
    else:
        _table(found)
    return REFUSED if any(check.result == "failure" for check in found.checks) else OK


def _table(page: Page) -> None:
    from tabulate import tabulate

    rows = [(check.name, check.result, check.found) for check in page.checks]
    click.echo(tabulate(rows, headers=("CHECK", "RESULT", "FOUND"), tablefmt="plain", disable_numparse=True))
    wrong = [check for check in page.checks if check.remedy]
    for check in wrong:
        click.echo(f"\n{check.name}: expected: {check.expected}\n  {check.remedy}")
    count = {result: sum(c.result == result for c in page.checks) for result in ("failure", "warning", "skipped")}
    said = ", ".join(f"{number} {result}" for result, number in count.items() if number)
    click.echo(f"\n{page.machine}: {said or 'all is well'}")
