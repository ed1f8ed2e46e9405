"""``underlay-cni``: the process that answers the shim and hands out this node's addresses."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from cni import podnet, server, sources, sysctls, verbs
from cni.endpoint import Address, AddressError, Lasting, Page, Reply, health, parse_address
from cni.errors import CNIError, first_of
from cni.kernel import NetlinkView
from cni.listener import Listener
from cni.lock import in_turn
from cni.metrics import Calls, State, families
from cni.netlink import Netlink
from cni.process import resident
from cni.prometheus import CONTENT_TYPE, render
from cni.queue import Queue
from cni.reaper import Reaper
from ipam.errors import IPAMError
from ipam.journal import Journal
from ipam.model import CONTROLLER, Attachment, News, Settings
from ipam.node import NodeIPAM
from store.base import Store
from store.clock import Clock, SystemClock
from store.counted import CountedStore
from store.errors import StoreError
from store.open import open_store
from store.recorder import Recorder, node_reference, pod_reference

if TYPE_CHECKING:
    from cni.annotations import Annotations

log = logging.getLogger(__name__)


class StartError(CNIError):
    """The server cannot start; the message says what is missing."""


class Runs(Protocol):
    """A part of the server: ``run`` goes on until cancelled."""

    async def run(self) -> None: ...


class Options(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    store: str
    run: Path
    boot_id: str
    log: str = "INFO"
    pods_may_choose: bool = False
    source_check: bool = True
    #: None: as the IPAMConfiguration says.
    max_blocks: int | None = None
    metrics: Address | None = None
    sysctls: Path = podnet.SYSCTLS


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0 at SIGTERM and 1, with one line, when it cannot start."""
    start(argv)


def start(
    argv: Sequence[str] | None = None,
    *,
    step: Callable[[str], None] = lambda _: None,
    settings: Settings | None = None,
) -> None:
    """``main`` with a witness of the steps (``verbs.STEPS`` and those of ipam) and with ipam's times, for tests."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv, os.environ)
        logging.basicConfig(
            level=options.log, stream=sys.stderr, format="%(asctime)s underlay-cni %(levelname)s %(message)s"
        )
        # Forked before there is a loop, and before the lock: the child must not keep it.
        with Reaper() as reaper:
            asyncio.run(serve(options, reaper=reaper, step=step, settings=settings))
    except (CNIError, IPAMError, StoreError, OSError) as e:
        print(f"underlay-cni: {e}", file=sys.stderr)
        sys.exit(1)


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Flags, and where one is missing the environment. Raises StartError; argparse exits with 2 at unknown flags."""
    parser = argparse.ArgumentParser(prog="underlay-cni", description="Answers the CNI shim on this node.")
    parser.add_argument("--node", default=environment.get("UNDERLAY_NODE", ""), help="this node's name (UNDERLAY_NODE)")
    parser.add_argument("--store", default=environment.get("UNDERLAY_STORE", ""), help="store URL (UNDERLAY_STORE)")
    parser.add_argument(
        "--run", default=environment.get("UNDERLAY_RUN", "/run/underlay"), help="run directory (UNDERLAY_RUN)"
    )
    parser.add_argument(
        "--boot-id", default="/proc/sys/kernel/random/boot_id", help="file that names this boot of the machine"
    )
    parser.add_argument("--log", default=environment.get("UNDERLAY_LOG", "INFO"), help="log level (UNDERLAY_LOG)")
    parser.add_argument(
        "--max-blocks",
        default=environment.get("UNDERLAY_MAX_BLOCKS", ""),
        help="blocks that this node may have, whatever the IPAMConfiguration says; 0: no limit (UNDERLAY_MAX_BLOCKS)",
    )
    parser.add_argument(
        "--metrics",
        default=environment.get("UNDERLAY_METRICS", ""),
        help="where to answer GET for metrics and health: ADDRESS:PORT or a unix socket's path (UNDERLAY_METRICS)",
    )
    parser.add_argument(
        "--pods-may-choose",
        default=environment.get("UNDERLAY_PODS_MAY_CHOOSE", "no"),
        help="yes: a pod's annotations, and its namespace's, choose its pools and addresses (UNDERLAY_PODS_MAY_CHOOSE)",
    )
    parser.add_argument(
        "--source-check",
        default=environment.get("UNDERLAY_SOURCE_CHECK", "on"),
        help="on: what a pod sends from an address that is not its own is dropped (UNDERLAY_SOURCE_CHECK)",
    )
    parser.add_argument(
        "--sysctls",
        default=environment.get("UNDERLAY_SYSCTLS", str(podnet.SYSCTLS)),
        help="where sysctls can be written, in a container that has them elsewhere (UNDERLAY_SYSCTLS)",
    )
    values = parser.parse_args(argv)
    for name in ("node", "store"):
        if not getattr(values, name):
            raise StartError(f"--{name} is missing; give it, or set UNDERLAY_{name.upper()}")
    level = values.log.upper()
    if level not in logging.getLevelNamesMapping():
        raise StartError(f"--log {values.log}: must be one of {', '.join(logging.getLevelNamesMapping())}")
    boot_id = Path(values.boot_id).read_text().strip()
    if not boot_id:
        raise StartError(f"--boot-id {values.boot_id}: the file is empty; it must name this boot of the machine")
    if values.max_blocks and not (values.max_blocks.isascii() and values.max_blocks.isdigit()):
        raise StartError(f"--max-blocks {values.max_blocks}: write a number; 0 is no limit")
    return Options(
        node=values.node,
        store=values.store,
        run=Path(values.run),
        boot_id=boot_id,
        log=level,
        pods_may_choose=_yes("--pods-may-choose", values.pods_may_choose),
        source_check=_on("--source-check", values.source_check),
        max_blocks=int(values.max_blocks) if values.max_blocks else None,
        metrics=_metrics(values.metrics),
        sysctls=Path(values.sysctls),
    )


def _metrics(text: str) -> Address | None:
    try:
        return parse_address(text) if text else None
    except AddressError as e:
        raise StartError(f"--metrics {e}") from e


def _yes(flag: str, text: str) -> bool:
    if text.lower() not in ("yes", "no", ""):
        raise StartError(f"{flag} {text}: write yes or no")
    return text.lower() == "yes"


def _on(flag: str, text: str) -> bool:
    if text.lower() not in ("on", "off", ""):
        raise StartError(f"{flag} {text}: write on or off")
    return text.lower() != "off"


async def serve(
    options: Options,
    *,
    reaper: verbs.Reaps,
    step: Callable[[str], None] = lambda _: None,
    settings: Settings | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, from the end of an older server's work to the begin of a newer one's
    (``cni.lock``). Kernel state is left as it is (R14)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    options.run.mkdir(parents=True, exist_ok=True, mode=0o755)

    clock = SystemClock()
    front = Lasting(options.metrics, clock)
    told = asyncio.create_task(front.run())
    listener = Listener(options.run)
    turn = partial(_turn, options, clock, front, listener, reaper, step, settings)
    work = asyncio.create_task(in_turn(options.run / "cni.lock", clock, turn, ahead=listener.queue))
    ended = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, ended), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work  # raises what ended it
        log.info("stopping; pods keep their network")
    finally:
        ended.cancel()
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        listener.close()
        told.cancel()
        await asyncio.wait({told})


async def _turn(
    options: Options,
    clock: Clock,
    front: Lasting,
    listener: Listener,
    reaper: verbs.Reaps,
    step: Callable[[str], None],
    settings: Settings | None,
) -> None:
    """With the lock held."""
    # First of all: whoever calls waits in its queue, however long the rest takes.
    listener.open()
    number = count_start(options.run, options.boot_id)
    log.info("start %d of boot %s on node %s", number, options.boot_id, options.node)
    podnet.prepare_node(options.sysctls, options.run / sysctls.FOLDER)
    with contextlib.ExitStack() as resources:
        netlink = resources.enter_context(Netlink())
        podnet.reap(netlink)  # doomed by a server before us
        calls = Calls()
        timed = partial(calls.journal.timing, clock.monotonic)
        journal = Journal(options.run, options.boot_id, step=step, timed=timed)
        resources.callback(journal.close)
        store = CountedStore(open_store(options.store, clock=clock))
        try:
            await _run(options, clock, number, front, listener, netlink, store, journal, calls, reaper, step, settings)
        except BaseExceptionGroup as group:
            raise first_of(group) from group
        finally:
            front.stand_by()
            listener.close()
            await store.close()


async def _run(
    options: Options,
    clock: Clock,
    number: int,
    told: Lasting,
    listener: Listener,
    netlink: Netlink,
    store: CountedStore,
    journal: Journal,
    calls: Calls,
    reaper: verbs.Reaps,
    step: Callable[[str], None],
    settings: Settings | None,
) -> None:
    recorder = Recorder(store, clock, controller=CONTROLLER, instance=options.node)
    node = node_reference(options.node)

    def tell(news: News) -> None:
        about = pod_reference(news.pod, news.pod_uid) if news.pod else node
        recorder.say(about, news.reason, news.note, action=news.action, normal=news.normal)

    ipam = NodeIPAM(
        node=options.node,
        store=store,
        journal=journal,
        kernel=NetlinkView(netlink),
        clock=clock,
        boot_id=options.boot_id,
        start=number,
        link_name=_link_name,
        settings=settings or Settings(max_blocks=options.max_blocks, node_needed=options.store.startswith("kube:")),
        step=step,
        tell=tell,
    )
    check = _source_check(options, clock, tell)
    annotations = _annotations(options, store, clock)
    handler = verbs.Verbs(
        node=options.node,
        ipam=ipam,
        store=store,
        netlink=netlink,
        reaper=reaper,
        clock=clock,
        settings=verbs.Settings(sysctls=options.sysctls),
        step=step,
        choose=annotations.choice if annotations else None,
    )
    queue = Queue(directory=options.run, carry_out=handler.carry_out, clock=clock)
    front = server.Server(listener=listener, carry_out=handler.carry_out, step=step, observe=calls.observe)

    def metrics(_: Mapping[str, str]) -> Reply:
        return Reply(render((*calls.families(), *families(_state(ipam, store, recorder, check)))), CONTENT_TYPE)

    pages: dict[str, Page] = {
        "/metrics": metrics,
        # Whoever gets an answer knows that the loop turns: a part that failed would have ended the process.
        "/healthz": lambda _: health(""),
        "/readyz": lambda _: health(ipam.refusal()),
    }
    parts: list[Runs] = [ipam, handler, queue, recorder]
    if annotations:
        parts.append(annotations)
    if check:
        parts.append(check)
    await ipam.start()
    await queue.drain()
    await told.tell(pages)
    # What is there by now stays: a full collection then takes half a millisecond of a pod's time, and not ten.
    gc.collect()
    gc.freeze()
    async with asyncio.TaskGroup() as group:
        behind = tuple(group.create_task(part.run()) for part in parts)
        try:
            # Cancelled first: it ends the calls that are under way, which need those behind it.
            await front.run()
        finally:
            for task in behind:
                task.cancel()


def _source_check(options: Options, clock: Clock, tell: Callable[[News], None]) -> sources.SourceCheck | None:
    """The check, in place unless the kernel refuses it; where it is switched off, none, and its table is gone."""
    if not options.source_check:
        sources.remove()
        return None
    check = sources.SourceCheck(clock, tell)
    check.look()
    return check


def _state(ipam: NodeIPAM, store: CountedStore, recorder: Recorder, check: sources.SourceCheck | None) -> State:
    return State(
        blocks=ipam.blocks(),
        conditions=frozenset(condition.type for condition in ipam.conditions()),
        figures=ipam.figures(),
        ready=not ipam.refusal(),
        source_check=check is not None and check.in_place,
        source_check_drops=check.drops() if check else 0,
        store_requests=store.requests,
        store_failures=store.failures,
        events_written=recorder.written,
        events_dropped=recorder.dropped,
        resident=resident(),
    )


def _annotations(options: Options, store: Store, clock: Clock) -> Annotations | None:
    """What reads annotations, where pods may choose. Loaded there only, as hardly any node needs it."""
    if not options.pods_may_choose:
        return None
    from cni.annotations import Annotations

    return Annotations(options.node, store, clock)


def count_start(directory: Path, boot_id: str) -> int:
    """Which start in this boot this is: 1, 2...; kept in ``directory``/starts-<boot_id>, other boots' are removed.

    To be called with the lock held. Raises StartError, OSError.
    """
    path = directory / f"starts-{boot_id}"
    for other in directory.glob("starts-*"):
        if other != path:
            other.unlink(missing_ok=True)
    try:
        last = int(path.read_text())
    except FileNotFoundError:
        last = 0
    except ValueError as e:
        raise StartError(f"{path} holds no number: write one that is higher than any start so far of this boot") from e
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(f"{last + 1}\n")
    temporary.replace(path)
    return last + 1


def _link_name(attachment: Attachment) -> str:
    return podnet.link_name(attachment.container, attachment.interface)


if __name__ == "__main__":
    main()
