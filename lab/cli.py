"""``underlay-lab``: a rack on one machine. Each command imports what it alone needs when it runs: most only ask the
supervisor, and scripts run many of them."""

from __future__ import annotations

import importlib
import os
import shutil
import signal as signals
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import msgspec

from lab import client, drilled, folder, matrix
from lab.errors import LabError, NetError
from lab.folder import Folder
from lab.matrix import Report
from lab.oob import CONTROL_PLANE
from lab.picture import picture
from lab.topology import Software, Topology, TopologyError
from lab.wire import (
    Cable,
    Drill,
    Follow,
    Installer,
    Kill,
    KubePart,
    Matrix,
    Part,
    Ping,
    PodAdd,
    PodDel,
    PodState,
    ProcessState,
    Program,
    Rename,
    RouterPart,
    State,
    Step,
    Switch,
    Visit,
)

if TYPE_CHECKING:
    from lab import drilling

_NARROW = 80


class _Group(click.Group):
    """A lab's errors are one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (LabError, NetError, TopologyError) as e:
            raise click.ClickException(str(e)) from e


def _folder(ctx: click.Context, _: click.Parameter, value: Path | None) -> Folder:
    return Folder(value.resolve()) if value else folder.default(os.environ, os.geteuid())


_dir = click.option(
    "--dir",
    "where",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_folder,
    help="The lab's folder; labs in different folders can be up side by side.",
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A virtual rack on this machine: BIRD or FRR on the routers, Underlay on the nodes, namespaces as pods."""


@main.command()
@click.option("--racks", type=int, help="Racks.  [default: 2]")
@click.option("--nodes", type=int, help="Nodes in each rack, or of the mesh.  [default: 2, or 4]")
@click.option("--pods", default=3, show_default=True, help="Pods on each node.")
@click.option("--dual-tor", is_flag=True, help="Two ToRs in each rack, each node linked to both.")
@click.option("--mesh", is_flag=True, help="No racks: nodes on one segment, every one a peer of every other.")
@click.option("--ipv6-only", is_flag=True, help="With --cluster --bare --mesh: IPv6 and nothing else.")
@click.option(
    "--tor",
    type=click.Choice(get_args(Software)),
    default="bird",
    show_default=True,
    help="What runs on ToRs and spines.",
)
@click.option(
    "--store",
    type=click.Choice(["sqlite", "kube"]),
    default="sqlite",
    show_default=True,
    help="Where objects live: a file, or an API server of the lab's own with our rights and policies.",
)
@click.option("--cluster", is_flag=True, help="A real cluster: kubelets and containerd, Underlay from its manifests.")
@click.option("--bare", is_flag=True, help="With --cluster: without Underlay, for you to install.")
@click.option(
    "--installer",
    type=click.Choice(get_args(Installer)),
    help="With --cluster: what says which addresses pods have, in place of pools of the lab's own. kubeadm: its "
    "ConfigMap, and the Nodes' podCIDRs; k3s: the podCIDRs.",
)
@_dir
def up(where: Folder, store: str, cluster: bool, bare: bool, installer: Installer | None, **asked: Any) -> None:
    """Builds the rack, draws it, and shows who reaches whom."""
    from lab import routers
    from lab.cluster import needs

    if bare and not cluster:
        raise LabError("--bare is for --cluster: any other lab is nothing without Underlay")
    if installer and not cluster:
        raise LabError("--installer is for --cluster: any other lab has its pools from the start")
    wanted = Topology.build(**asked).shape
    if wanted.ipv6_only and not bare:
        raise LabError("--ipv6-only is for --cluster --bare: any other lab asks its pods in both families")
    store = "kube" if cluster else store
    if client.alive(where):
        there = client.state(where)
        if (there.shape, there.store.partition(":")[0]) != (wanted, store):
            options = f"{there.shape.options} --store {there.store.partition(':')[0]}"
            raise LabError(f"a lab with {options} is up in {where.path}; {_down(where)} takes it away")
        click.echo(f"A lab is up already in {where.path}; {_down(where)} takes it away.\n")
        _follow(where, told=there.state == "building")
    else:
        begin = time.monotonic()
        if not wanted.mesh:
            routers.require(wanted.tor)
        programs = _programs() if store == "kube" else None
        more = needs.options(bare=bare, installer=installer) if cluster else []
        click.echo(f"A lab is being built in {where.path}; {_down(where)} takes it away.")
        client.start(where, wanted, programs=programs, cluster=more)
        _follow(where, told=True)
        click.echo(f"{time.monotonic() - begin:6.2f} s  in all\n")
    state = client.state(where)
    click.echo(picture(state, width=_width()) + "\n")
    if bare:
        click.echo(
            "No network yet:\n"
            "underlay-lab exec control-plane kubectl apply -k manifests/\n"
            f"underlay-lab exec control-plane underlayctl apply -f {where.path}/fabric.yaml"
        )
    else:
        _measure(where, 3, state)


@main.command()
@_dir
def down(where: Folder) -> None:
    """Takes the rack away, also what a kill left."""
    click.echo(f"The lab in {where.path} is gone." if client.stop(where) else f"No lab in {where.path}.")


@main.command()
@click.option("-o", "output", type=click.Choice(["json"]), help="For programs.")
@_dir
def status(output: str | None, where: Folder) -> None:
    """Nodes with rack, blocks, pods and processes; the processes of routers and control plane, if there are any."""
    state = client.state(where)
    if output:
        click.echo(msgspec.json.format(msgspec.json.encode(state)).decode())
        return
    click.echo(picture(state, width=_width()) if state.nodes else f"{state.state}, no node yet")
    click.echo()
    members: list[tuple[str, Mapping[Any, ProcessState]]] = [(m.name, m.processes) for m in state.routers]
    members += [(m.name, m.processes) for m in state.nodes]
    if state.control_plane:
        members.append((CONTROL_PLANE, state.control_plane))
    wide = max(len(name) for name, _ in members)
    for name, processes in members:
        told = (f"{part} {_process(process)}" for part, process in processes.items())
        click.echo(f"{name:<{wide}} {'; '.join(told)}")


@main.command("matrix")
@click.option("--wait", default=3.0, show_default=True, help="Seconds to wait until every route is everywhere.")
@_dir
def show_matrix(wait: float, where: Folder) -> None:
    """Asks every pod for every other, again."""
    _measure(where, wait)


@main.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_dir
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def execute(name: str, command: tuple[str, ...], where: Folder) -> None:
    """Runs a command in a node, a pod, a ToR, the spine, the switch or control-plane. In a router, birdc and vtysh find
    its BIRD or FRR; in a node, UNDERLAY_NODE, UNDERLAY_RUN and UNDERLAY_STORE are set."""
    words = client.enter(where, name, command)
    sys.stdout.flush()
    os.execvp(words[0], words)


@main.group()
def pod() -> None:
    """Attaches or detaches a pod, through the shim."""


@pod.command("add")
@click.argument("name")
@_dir
def pod_add(name: str, where: Folder) -> None:
    """Attaches a pod: pod-1-4 on node-1."""
    added = client.ask(where, PodAdd(name), PodState)
    click.echo(f"{added.name}  {'  '.join(added.addresses)}")


@pod.command("del")
@click.argument("name")
@_dir
def pod_del(name: str, where: Folder) -> None:
    """Detaches a pod and ends it."""
    client.ask(where, PodDel(name), type(None))
    click.echo(f"{name} is gone.")


@main.command()
@click.argument("member")
@click.argument(
    "process", type=click.Choice([*get_args(Part), *get_args(RouterPart), *get_args(Program), *get_args(KubePart)])
)
@click.option("--signal", default="9", show_default=True, help="By number or name.")
@click.option("--restart-after", default=1.0, show_default=True, help="Seconds until it is started again.")
@_dir
def kill(member: str, process: Any, signal: str, restart_after: float, where: Folder) -> None:
    """Kills a process of a node, of a router, or of control-plane; the lab starts it again."""
    client.ask(where, Kill(member, process, _signal(signal), restart_after), type(None))
    click.echo(f"{process} of {member}: signal {_signal(signal)}; when it has ended, again in {restart_after:g} s.")


@main.command()
@click.argument("node")
@click.argument("on", type=click.Choice(["on", "off"]), metavar="on|off")
@_dir
def power(node: str, on: str, where: Folder) -> None:
    """Switches the machine of a cluster's node off, or on again, with nothing of its processes and its kernel left."""
    client.ask(where, Switch(node, on == "on"), type(None))
    click.echo(f"{node}: {on}.")


@main.command()
@click.argument("node")
@click.option("--away", default=0.0, show_default=True, help="Seconds until it is on again.")
@_dir
def reboot(node: str, away: float, where: Folder) -> None:
    """Switches the machine of a cluster's node off and on: it has a new boot id, and its kubelet starts its pods."""
    client.ask(where, Switch(node, False), type(None))
    time.sleep(away)
    client.ask(where, Switch(node, True), type(None))
    click.echo(f"{node}: booted.")


@main.command()
@click.argument("node")
@click.argument("name")
@_dir
def rename(node: str, name: str, where: Folder) -> None:
    """Gives the machine of a cluster's node another host name: its kubelet starts anew, for a Node of that name."""
    client.ask(where, Rename(node, name), type(None))
    click.echo(f"{node}: its Node is {name}.")


@main.command("visitor")
@click.argument("how", type=click.Choice(["come", "go"]), metavar="come|go")
@_dir
def visitor(how: str, where: Folder) -> None:
    """A ToR comes to the segment of a mesh, for its nodes to peer with, or goes."""
    from lab.visitor import ADDRESSES, ASN, NAME

    client.ask(where, Visit(how == "come"), type(None))
    click.echo(f"{NAME}: {' and '.join(ADDRESSES)}, AS {ASN}." if how == "come" else f"{NAME} is gone.")


@main.group()
def link() -> None:
    """Takes the carrier from a link, or gives it back."""


@link.command("cut")
@click.argument("a")
@click.argument("b")
@_dir
def link_cut(a: str, b: str, where: Folder) -> None:
    """Takes the carrier from the link between A and B."""
    client.ask(where, Cable(a, b, False), type(None))
    click.echo(f"{a} and {b}: cut.")


@link.command("mend")
@click.argument("a")
@click.argument("b")
@_dir
def link_mend(a: str, b: str, where: Folder) -> None:
    """Gives the link between A and B its carrier back."""
    client.ask(where, Cable(a, b, True), type(None))
    click.echo(f"{a} and {b}: mended.")


@main.command("ping")
@click.option("--rate", default=100.0, show_default=True, help="Packets a second along each path.")
@click.option("--seconds", type=float, default=0, help="For how long.  [default: until it is interrupted]")
@click.option("--paths", is_flag=True, help="Each path, not only the groups.")
@click.option("-o", "output", type=click.Choice(["json"]), help="For programs.")
@_dir
def do_ping(paths: bool, output: str | None, where: Folder, **how: float) -> None:
    """Counts packets on all paths, whatever happens meanwhile, and says what was lost."""

    def heard(step: Step) -> None:
        click.echo(step.text if how["seconds"] else f"{step.text}; Ctrl-C ends it", err=True)

    # A shell's job in the background is deaf to SIGINT.
    signals.signal(signals.SIGTERM, signals.default_int_handler)
    report = client.ask(where, Ping(**how), drilled.Report, heard=heard, interruptible=True)
    if output:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        click.echo(drilled.text(report, each=paths))
    if not report.good:
        sys.exit(1)


@main.command("drill")
@click.argument("name", required=False, default="")
@click.option("--all", "everything", is_flag=True, help="Every drill that this lab's topology allows, one by one.")
@click.option("--paths", is_flag=True, help="Each path, not only the groups.")
@click.option("--rate", default=100.0, show_default=True, help="Packets a second along each path.")
@click.option("--away", default=5.0, show_default=True, help="Seconds for which what is taken away stays away.")
@click.option("--calm", default=4.0, show_default=True, help="Seconds without a loss, all as before, until it is over.")
@click.option("-o", "output", type=click.Choice(["json", "markdown"]), help="For programs; or a table for a page.")
@_dir
def do_drill(name: str, everything: bool, paths: bool, output: str | None, where: Folder, **how: float) -> None:
    """Does what happens to a rack sooner or later, counts packets on all paths meanwhile, and says what was lost.
    Without NAME: which drills there are."""
    from lab import drill

    if everything == bool(name):
        if everything:
            raise LabError("--all and a name: leave one of them out")
        for one in drill.DRILLS:
            click.echo(f"{one.name:<{max(len(d.name) for d in drill.DRILLS)}}  {one.sentence}{_may_lose(one)}")
        return
    topology = _topology(where)
    asked = [one for one in drill.DRILLS if not one.refusal(topology)] if everything else [drill.find(name)]
    reports = []
    for one in asked:
        try:
            heard = None if output else _progress
            report = client.ask(where, Drill(one.name, **how), drilled.Report, heard=heard)
        except KeyboardInterrupt:
            raise LabError("interrupted; the drill goes on to its end, which takes back what it did") from None
        reports.append(report)
        if not output:
            click.echo(f"\n{drilled.text(report, each=paths)}\n")
    if output == "markdown":
        click.echo(drilled.markdown(reports))
    elif output:
        encoded = msgspec.json.encode(reports if everything else reports[0])
        click.echo(msgspec.json.format(encoded).decode())
    if not all(report.good for report in reports):
        sys.exit(1)


def _may_lose(one: drilling.Drill) -> str:
    return " Nothing may be lost." if one.planned else ""


def _topology(where: Folder) -> Topology:
    return Topology.build(**msgspec.to_builtins(client.state(where).shape))


def _programs() -> Path:
    """Where the control plane's programs are. Raises LabError, which says what to type."""
    from lab.kube.build import NotHere, find

    try:
        importlib.import_module("lab.control")
        return find().folder
    except ModuleNotFoundError as e:
        raise LabError(f"--store kube needs {e.name}: pip install 'underlay[kube]'") from e
    except NotHere as e:
        raise LabError(str(e)) from e


def _follow(where: Folder, *, told: bool) -> None:
    """Returns when the lab is built; what is done is told meanwhile."""
    try:
        client.ask(where, Follow(), type(None), heard=_progress if told else None)
    except KeyboardInterrupt:
        raise LabError(f"interrupted; the lab goes on, and {_down(where)} takes it away") from None
    except LabError as e:
        raise LabError(f"{e}\n{_down(where)} takes away what is there") from e


def _measure(where: Folder, wait: float, state: State | None = None) -> None:
    report = client.ask(where, Matrix(wait), Report)
    click.echo(matrix.table(report))
    if state:
        click.echo(f"\nexport UNDERLAY_STORE={state.store}   # then: underlayctl get blocks; underlayctl node status")
    click.echo(matrix.summary(report))
    if not report.good:
        sys.exit(1)


def _process(process: ProcessState) -> str:
    again = f", {process.restarts} restarts" if process.restarts else ""
    return f"pid {process.pid}{again}" if process.state == "running" else f"{process.state}{again}"


def _progress(step: Step) -> None:
    """On a terminal the step under way is shown, and overwritten by its line once it is done."""
    if step.seconds is not None:
        click.echo(f"{step.seconds:6.2f} s  {step.text}")
    elif sys.stdout.isatty():
        click.echo(f"     ...  {step.text}\r", nl=False)


def _signal(text: str) -> int:
    try:
        return int(text) if text.isdigit() else signals.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value
    except KeyError:
        raise LabError(f"--signal {text}: no such signal; a number or a name as KILL, TERM, STOP") from None


def _width() -> int:
    return max(_NARROW, shutil.get_terminal_size((160, 24)).columns)


def _down(where: Folder) -> str:
    other = where.path != folder.default(os.environ, os.geteuid()).path
    return f"'underlay-lab down{f' --dir {where.path}' if other else ''}'"


if __name__ == "__main__":
    main()
