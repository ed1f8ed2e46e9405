"""``underlayctl``: what people type. Each command imports what it needs when it runs, so that a bare ``get`` is quick.

Exit codes: 0 done, 1 refused or not found, 2 wrong command line, 3 the store cannot be reached.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ctl.failures import OK, USAGE, Failure, Usage, code_of, explain
from store.errors import StoreError, Unavailable

if TYPE_CHECKING:
    from ctl.documents import Mode
    from ctl.look import Here
    from store.base import Store

F = TypeVar("F", bound=Callable[..., Any])

NO_STORE = (
    "no store is named: give --store URL or set UNDERLAY_STORE (kube: for a cluster, sqlite:/path/store.db for a file)."
    " For the lab: export UNDERLAY_STORE=sqlite:/run/underlay-lab/store.db"
    " ('underlay-lab up' prints the line with its own path)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Problems are on stderr, a line each."""
    # The interpreter's last search for garbage, in all that was imported, would be a seventh of a command's time.
    atexit.register(gc.freeze)
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="underlayctl", standalone_mode=False
        )
    except click.ClickException as e:
        e.show()
        return USAGE
    except click.Abort:
        return 130
    except Failure as e:
        return _complain(e.lines, e.code)
    except StoreError as e:
        return _complain(explain(e), code_of(e))
    return code if isinstance(code, int) else OK


def store_option(command: F) -> F:
    """``--store``, on ``underlayctl`` and on each command, so that it may stand before or after the command's name."""
    return click.option(
        "--store",
        "url",
        metavar="URL",
        help="Where the objects live: kube: or sqlite:/path/store.db [env: UNDERLAY_STORE].",
    )(command)


def file_option(command: F, *, required: bool = True) -> F:
    return click.option(
        "-f",
        "--filename",
        "files",
        multiple=True,
        required=required,
        metavar="FILE",
        help="YAML or JSON, several documents allowed; - is stdin. May be given more than once.",
    )(command)


def namespace_option(command: F) -> F:
    return click.option(
        "-n", "--namespace", default="", metavar="NAME", help="Of pods, services and so on; without it: default."
    )(command)


def dry_run_option(command: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Check and say what would happen; write nothing.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@store_option
@click.pass_context
def cli(ctx: click.Context, url: str | None) -> None:
    """Shows and changes what Underlay keeps in its store."""
    ctx.obj = url or os.environ.get("UNDERLAY_STORE", "")


@cli.command()
@click.argument("kind")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-o", "--output", "form", type=click.Choice(["table", "wide", "name", "yaml", "json"]), default="table")
@click.option("-l", "--selector", "selector", default="", help="Only objects with these labels: rack == 'rack-1'.")
@namespace_option
@click.option("-A", "--all-namespaces", is_flag=True, help="Objects of all namespaces.")
@store_option
@click.pass_context
def get(
    ctx: click.Context,
    kind: str,
    names: tuple[str, ...],
    form: str,
    selector: str,
    namespace: str,
    all_namespaces: bool,
    url: str | None,
) -> int:
    """Shows objects. KIND may be several, as ippools,bgppeers."""
    from ctl.show import get_objects

    return _on_store(
        ctx,
        url,
        lambda store: get_objects(
            store, kind, names, form=form, selector=selector, namespace=namespace, everywhere=all_namespaces
        ),
    )


def _edit_command(mode: Mode, help_text: str) -> None:
    @cli.command(mode, help=help_text)
    @file_option
    @namespace_option
    @dry_run_option
    @store_option
    @click.pass_context
    def command(ctx: click.Context, files: tuple[str, ...], namespace: str, dry_run: bool, url: str | None) -> int:
        from ctl.documents import read_all, write_all

        documents = read_all(files, namespace)
        may_make = mode != "replace" and not dry_run
        return _on_store(ctx, url, lambda store: write_all(store, documents, mode, dry_run=dry_run), may_make=may_make)


_edit_command("apply", "Creates the objects of the files, or changes those that exist.")
_edit_command("create", "Creates the objects of the files; those that exist are refused.")
_edit_command("replace", "Makes existing objects exactly those of the files.")


@cli.command()
@click.argument("kind", required=False)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@lambda command: file_option(command, required=False)
@namespace_option
@click.option("--ignore-not-found", is_flag=True, help="What is gone already is no error.")
@click.option("--force", is_flag=True, help="Also pools and blocks of which pods hold addresses.")
@store_option
@click.pass_context
def delete(
    ctx: click.Context,
    kind: str | None,
    names: tuple[str, ...],
    files: tuple[str, ...],
    namespace: str,
    ignore_not_found: bool,
    force: bool,
    url: str | None,
) -> int:
    """Deletes objects by KIND and NAME, or those of the files."""
    from ctl.documents import delete_all, to_delete

    targets = to_delete(kind, names, files, namespace)
    return _on_store(ctx, url, lambda store: delete_all(store, targets, ignore_not_found=ignore_not_found, force=force))


@cli.group()
def node() -> None:
    """What nodes say of themselves."""


@node.command("status")
@click.argument("name", required=False, metavar="[NODE]", envvar="UNDERLAY_NODE")
@click.option("--all-nodes", is_flag=True, help="Every node that has an agent.")
@store_option
@click.pass_context
def node_status(ctx: click.Context, name: str | None, all_nodes: bool, url: str | None) -> int:
    """Sessions and conditions of NODE (default: UNDERLAY_NODE, else this machine if it is a node, else all)."""
    from ctl.show import show_node_status

    return _on_store(ctx, url, lambda store: show_node_status(store, name or "", all_nodes=all_nodes))


@node.command("drain-routes")
@click.argument("name", metavar="NODE")
@click.option("--undo", is_flag=True, help="Have it announce its blocks as before.")
@click.option("--wait", default=60.0, show_default=True, help="Seconds until the command gives up; the node goes on.")
@click.option("--force", is_flag=True, help="Withdraw also the blocks in which pods live, after asking.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@store_option
@click.pass_context
def node_drain_routes(
    ctx: click.Context, name: str, undo: bool, wait: float, force: bool, yes: bool, url: str | None
) -> int:
    """Takes NODE out of the routes: peers are asked to use other ways (GRACEFUL_SHUTDOWN, RFC 8326), and after 5 s its
    blocks are withdrawn, but for those in which pods live. It cordons nothing and ends no pod."""
    from ctl import drain
    from store.clock import SystemClock

    if undo:
        if force:
            raise Usage(["--undo and --force: one of the two"])
        return _on_store(ctx, url, lambda store: drain.undo(store, SystemClock(), name, wait=wait))
    return _on_store(
        ctx, url, lambda store: drain.drain_routes(store, SystemClock(), name, wait=wait, force=force, yes=yes)
    )


@cli.group()
def bgp() -> None:
    """What this node's agent sees of BGP. To be run on the node, as root."""


_agent_run = click.option(
    "--run",
    metavar="DIR",
    envvar="UNDERLAY_RUN",
    default="/run/underlay",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Run directory of this node's underlay-agent.",
)
_as_json = click.option("-o", "output", type=click.Choice(["json"]), help="For programs.")


def _bgp_command(what: str, help_text: str, *, prefixes: bool) -> None:
    """``bgp WHAT``. Where there are ``prefixes`` one of them can be chosen."""

    def options(command: F) -> F:
        chosen = (
            click.option("--prefix", default="", help="An address or prefix; what covers it too.")(command)
            if prefixes
            else command
        )
        return click.option("--peer", default="", help="One peer, by name or address.")(chosen)

    @bgp.command(what, help=help_text)
    @options
    @click.option("--limit", default=1000, show_default=True, help="Rows at most.")
    @_as_json
    @_agent_run
    def command(peer: str, limit: int, output: str | None, run: Path, prefix: str = "") -> int:
        from ctl import bgp as page
        from store.clock import SystemClock

        now = SystemClock().now()
        return page.show(what, run, now=now, output=output or "", peer=peer, prefix=prefix, limit=limit)


_bgp_command("peers", "Sessions: what was agreed on, what was said last, what became of them.", prefixes=False)
_bgp_command("routes", "Prefixes that are let in: the paths that are used, and the kernel's word.", prefixes=True)
_bgp_command("received", "All that peers told, and which rule or filter refuses it.", prefixes=True)
_bgp_command("advertised", "What peers are told, and what keeps the rest back.", prefixes=True)


@bgp.command("diff")
@click.option("--node", "name", default="", metavar="NODE", help="Another node, by what its agent wrote to the store.")
@click.option("--all-nodes", is_flag=True, help="Every node, by what their agents wrote to the store.")
@_as_json
@_agent_run
@store_option
@click.pass_context
def bgp_diff(ctx: click.Context, name: str, all_nodes: bool, output: str | None, run: Path, url: str | None) -> int:
    """What is wanted and not so: at peers, and in the kernel. The exit code is 1 if anything is."""
    from ctl.bgp import show_diff, show_diff_of

    if name and all_nodes:
        raise Usage(["--node and --all-nodes are two answers: ask for one"])
    if name or all_nodes:
        return _on_store(ctx, url, lambda store: show_diff_of(store, name, output=output or ""))
    return show_diff(run, output=output or "")


@cli.group()
def ipam() -> None:
    """Addresses: pools, blocks, who holds what."""


@ipam.command("show")
@click.option("--show-blocks", is_flag=True, help="Also each block with its node.")
@click.option("--ip", "address", metavar="ADDRESS", help="Who holds this address.")
@click.option("--block", metavar="CIDR", help="One block, and who holds which of its addresses.")
@click.option("--pool", metavar="NAME", help="One pool: its blocks, and which pods hold addresses of it.")
@click.option("--show-configuration", is_flag=True, help="How all nodes hand out addresses.")
@click.option("-o", "--output", "form", type=click.Choice(["table", "json"]), default="table")
@store_option
@click.pass_context
def ipam_show(
    ctx: click.Context,
    show_blocks: bool,
    address: str | None,
    block: str | None,
    pool: str | None,
    show_configuration: bool,
    form: str,
    url: str | None,
) -> int:
    """Pools with their use, blocks, one pool, block or address, or the configuration."""
    from ctl import show

    if sum((address is not None, block is not None, pool is not None, show_blocks, show_configuration)) > 1:
        raise Usage(["--show-blocks, --pool, --block, --ip and --show-configuration are five questions: ask one"])
    if show_configuration:
        from ctl import configure

        return _on_store(ctx, url, lambda store: configure.show(store, form))
    if address is not None:
        return _on_store(ctx, url, lambda store: show.show_address(store, address, form))
    if block is not None:
        return _on_store(ctx, url, lambda store: show.show_block(store, block, form))
    if pool is not None:
        return _on_store(ctx, url, lambda store: show.show_pool(store, pool, form))
    return _on_store(ctx, url, lambda store: show.show_ipam(store, form, show_blocks=show_blocks))


@ipam.command("configure")
@click.argument("what", required=False, type=click.Choice(["show"]), metavar="[show]")
@click.option(
    "--max-blocks-per-node",
    "--max-blocks-per-host",
    "max_blocks",
    type=int,
    metavar="NUMBER",
    help="Blocks that each node may have; 0: no limit.",
)
@click.option("--strictaffinity", "strict", type=bool, metavar="true", help="Always true: no node borrows.")
@store_option
@click.pass_context
def ipam_configure(
    ctx: click.Context, what: str | None, max_blocks: int | None, strict: bool | None, url: str | None
) -> int:
    """How all nodes hand out addresses: changes what is given, else shows it."""
    from ctl import configure

    given = max_blocks is not None or strict is not None
    if what and given:
        raise Usage(["'show' only shows: leave it out to change something"])
    if not given:
        return _on_store(ctx, url, lambda store: configure.show(store, "table"))
    return _on_store(ctx, url, lambda store: configure.change(store, max_blocks=max_blocks, strict=strict))


def run_option(command: F) -> F:
    return click.option(
        "--run",
        metavar="DIR",
        envvar="UNDERLAY_RUN",
        help="Run directory of this node's underlay-cni: its journal and this kernel are looked at too.",
    )(command)


@ipam.command("check")
@click.option("-o", "--output", "form", type=click.Choice(["table", "json"]), default="table")
@click.option("--node", "nodes", multiple=True, metavar="NODE", help="Only what concerns its blocks. May be repeated.")
@run_option
@store_option
@click.pass_context
def ipam_check(ctx: click.Context, form: str, nodes: tuple[str, ...], run: str | None, url: str | None) -> int:
    """Compares pools, blocks, nodes and, on a node, its journal and kernel. Exits with 1 for findings, 2 if something
    could not be looked at."""
    from ctl.show import show_check, show_unseen

    here = _here(run, nodes[0] if len(nodes) == 1 else "")
    try:
        return _on_store(ctx, url, lambda store: show_check(store, form, nodes=nodes, here=here))
    except StoreError as e:
        return show_unseen(form, nodes, [f"the store: {line}" for line in explain(e)])


@ipam.command("release")
@click.option("--ip", "addresses", multiple=True, metavar="ADDRESS", help="Asks its node to release it.")
@click.option("--block", "blocks", multiple=True, metavar="CIDR", help="Ends a block whose node is gone.")
@click.option("--from-report", "report", metavar="FILE", help="The leaks of 'ipam check -o json'; - is stdin.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="With --block: also of a node that is there.")
@run_option
@store_option
@click.pass_context
def ipam_release(
    ctx: click.Context,
    addresses: tuple[str, ...],
    blocks: tuple[str, ...],
    report: str | None,
    yes: bool,
    force: bool,
    run: str | None,
    url: str | None,
) -> int:
    """Releases addresses that nobody uses, or blocks whose node is gone."""
    from ctl import release

    if sum(map(bool, (addresses, blocks, report))) != 1:
        raise Usage(["say what to release, in one way: --ip ADDRESS, --block CIDR or --from-report FILE"])
    if force and not blocks:
        raise Usage(["--force goes with --block only"])
    if addresses:
        return _on_store(ctx, url, lambda store: release.release_addresses(store, addresses))
    if blocks:
        return _on_store(ctx, url, lambda store: release.release_blocks(store, blocks, yes=yes, force=force))

    from ctl.documents import read_file
    from ctl.report import read
    from store.clock import SystemClock

    found = read(read_file(report or ""), report or "")
    here = _here(run, found.local) if found.local else None
    return _on_store(ctx, url, lambda store: release.release_report(store, SystemClock(), found, here=here, yes=yes))


@cli.command()
@click.option("-o", "--output", default="", metavar="FILE", help="Where it goes; - is stdout. Without it: a file here.")
@click.option(
    "--state",
    metavar="DIR",
    envvar="UNDERLAY_STATE",
    default="/var/lib/underlay",
    show_default=True,
    type=click.Path(path_type=Path),
    help="State directory of this node's underlay-agent.",
)
@click.option("--limit", default=120.0, show_default=True, help="Seconds for all of it.")
@_agent_run
@store_option
@click.pass_context
def diags(ctx: click.Context, output: str, state: Path, limit: float, run: Path, url: str | None) -> int:
    """One archive to send when asking for help: what this node and the store say. Passwords, tokens and keys are left
    out. On a node to be run as root; anywhere else it has what the store says."""
    import socket

    from ctl.diags import node
    from ctl.diags.collect import Asked, diags
    from store.clock import SystemClock

    asked = Asked(output=output, url=url or ctx.find_root().obj, limit=limit)
    return diags(
        asked, node.default(run, state), SystemClock(), os.environ.get("UNDERLAY_NODE") or socket.gethostname()
    )


@cli.group()
def install() -> None:
    """Before an installation, and after."""


@install.command("check")
@click.option("-o", "--output", "form", type=click.Choice(["table", "json", "yaml"]), default="table")
@click.option("--node", "name", default="", metavar="NODE", help="Which Node this is [env: UNDERLAY_NODE].")
@click.option("--peer", "peers", multiple=True, metavar="ADDRESS", help="Also try this peer. May be repeated.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path("/"),
    help="Where this machine's files are: /host in a container of underlay-cni.",
)
@_agent_run
@store_option
@click.pass_context
def install_check(
    ctx: click.Context, form: str, name: str, peers: tuple[str, ...], root: Path, run: Path, url: str | None
) -> int:
    """Looks whether this machine is fit for Underlay: kernel, other networks, firewalls, peers, and with a store the
    cluster's pools. To be run on a node, as root. It changes nothing. Exits with 1 if a check fails."""
    import asyncio
    import socket

    from ctl.machine import Where
    from ctl.preflight_page import show
    from store.clock import SystemClock

    node = name or os.environ.get("UNDERLAY_NODE") or socket.gethostname()
    where = Where(root=root, run=run, node=node, store=url or ctx.find_root().obj or "", peers=peers)
    return asyncio.run(show(where, SystemClock(), os.environ, form))


@cli.command()
@click.option("--keep-pods", is_flag=True, help="Go on although pods have our network; they keep their wiring.")
@click.option("--restore-forwarding", is_flag=True, help="Put forwarding of nodes back, too, if it was off before us.")
@click.option("--without", "without", multiple=True, metavar="NODE", help="Do not wait for this one: it is gone.")
@click.option(
    "--image", default="", metavar="NAME", help="The image for the pods that clean the nodes: ours, unless said."
)
@click.option("--wait", default=180.0, show_default=True, help="Seconds for each step, until the command gives up.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@store_option
@click.pass_context
def uninstall(
    ctx: click.Context,
    keep_pods: bool,
    restore_forwarding: bool,
    without: tuple[str, ...],
    image: str,
    wait: float,
    yes: bool,
    url: str | None,
) -> int:
    """Takes Underlay from all nodes of a cluster: routes, nftables, sessions, files, blocks. It refuses while pods have
    its network. What was applied (manifests, chart) is deleted as it came, afterwards."""
    import asyncio

    from ctl import uninstall as page
    from ctl.uninstalling import Asked
    from store.clock import SystemClock

    where = url or ctx.find_root().obj
    if not where:
        raise Usage([NO_STORE])
    asked = Asked(keep_pods=keep_pods, restore_forwarding=restore_forwarding)
    return asyncio.run(page.uninstall(where, SystemClock(), asked, image=image, without=without, wait=wait, yes=yes))


@cli.command()
@store_option
@click.pass_context
def version(ctx: click.Context, url: str | None) -> int:
    """Versions of this client and of the store."""
    from ctl.show import show_store, show_version

    show_version()
    where = url or ctx.find_root().obj
    if not where:
        click.echo(f"store   none ({NO_STORE})")
        return OK
    return _on_store(ctx, where, lambda store: show_store(store, where))


def _here(run: str | None, node: str) -> Here | None:
    """This node, if its run directory is given: the one that is named, else UNDERLAY_NODE, else this machine."""
    if not run:
        return None
    import socket

    from ctl.look import Here

    return Here(node or os.environ.get("UNDERLAY_NODE") or socket.gethostname(), Path(run))


def _on_store(
    ctx: click.Context, url: str | None, work: Callable[[Store], Awaitable[int]], *, may_make: bool = False
) -> int:
    import asyncio

    from store.clock import SystemClock
    from store.open import open_store

    where = url or ctx.find_root().obj
    if not where:
        raise Usage([NO_STORE])
    path = where.removeprefix("sqlite:")
    if path != where and not may_make and not Path(path).exists():
        # opening would make an empty store there, and a slip of the pen would look like a cluster without objects
        raise Unavailable(f"store {where}: there is no such file: is the path right? 'apply' and 'create' make it")

    async def run() -> int:
        store = open_store(where, clock=SystemClock(), agent="underlayctl")
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def _complain(lines: Sequence[str], code: int) -> int:
    for line in lines:
        click.echo(f"underlayctl: {line}", err=True)
    return code
