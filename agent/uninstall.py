"""``underlay-uninstall``: takes from this node what Underlay made there, once agent and CNI server are gone.

To be run as root in the node's own network namespace, again as often as need be: ``agent.removal`` says what is to be
done, and what is done already is not done twice. The speaker may run; then peers are told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent import removal
from agent.bgp.driver import Driver
from agent.bgp.model import Event, SessionDown, SessionUp, SpeakerLost
from agent.errors import AgentError
from agent.kernel import nexthops, routes
from agent.removal import Present, Step, Wishes
from cni import install, podnet, rtnl, sources, sysctls
from cni.errors import CNIError
from cni.lock import taken
from cni.marks import LINK_GROUP, LINK_GROUP_DOOMED
from cni.netlink import Message, Netlink
from cni.peer import answers
from store.clock import Clock, SystemClock

#: Seconds: for a process of ours to end, for the speaker to answer, and for it to say goodbye to all peers.
LOCK_LIMIT: Final = 30.0
SPEAKER_LIMIT: Final = 2.0
GOODBYE_LIMIT: Final = 10.0
_POLL: Final = 0.05
#: As much as a kubelet takes of a container's last words (pkg/kubelet/container, MaxContainerTerminationMessageLength).
REPORT_BYTES: Final = 4096
_LOCKS: Final = {"cni.lock": "CNI server", "agent.lock": "agent"}


class UninstallError(AgentError):
    """It cannot be done, or not to its end; the message says what to do, and it may be run again."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    run: Path
    state: Path
    bin_dir: Path
    conf_dir: Path
    sysctls: Path
    report: Path | None
    stay: bool
    wishes: Wishes


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 when nothing of ours is left but what is said, 1 with one line otherwise."""
    options = parse(sys.argv[1:] if argv is None else argv, os.environ)
    if options.stay:
        return _stay()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    try:
        asyncio.run(uninstall(options, SystemClock(), say=say))
    except (AgentError, CNIError, OSError) as e:
        lines.append(f"failed: {e}")
        print(f"underlay-uninstall: {e}", file=sys.stderr)
        return 1
    finally:
        if options.report:
            options.report.write_bytes("\n".join(lines).encode()[:REPORT_BYTES])
    return 0


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Flags, and where one is missing the environment. argparse exits with 2 at unknown flags."""
    parser = argparse.ArgumentParser(prog="underlay-uninstall", description="Takes Underlay from this node.")
    folders = (
        ("run", "UNDERLAY_RUN", "/run/underlay", "run directory of agent and CNI server"),
        ("state", "UNDERLAY_STATE", "/var/lib/underlay", "the agent's state directory"),
        ("bin", "", "/opt/cni/bin", "the runtime's folder of plugins"),
        ("conf", "", "/etc/cni/net.d", "its folder of configurations"),
        ("sysctls", "UNDERLAY_SYSCTLS", "/proc/sys", "where sysctls can be written"),
    )
    for name, variable, default, text in folders:
        said = f"{text} ({variable})" if variable else text
        parser.add_argument(f"--{name}", type=Path, default=Path(environment.get(variable) or default), help=said)
    parser.add_argument(
        "--keep-pods", action="store_true", help="go on although pods have our network; they keep their wiring"
    )
    parser.add_argument(
        "--restore-forwarding", action="store_true", help="put forwarding back, too, if it was off before us"
    )
    parser.add_argument("--report", type=Path, help="a file for what was done and kept")
    parser.add_argument("--stay", action="store_true", help="do nothing, until SIGTERM")
    found = parser.parse_args(argv)
    return Options(
        run=found.run,
        state=found.state,
        bin_dir=found.bin,
        conf_dir=found.conf,
        sysctls=found.sysctls,
        report=found.report,
        stay=found.stay,
        wishes=Wishes(keep_pods=found.keep_pods, forwarding=found.restore_forwarding),
    )


def _stay() -> int:
    """In a pod: the container that says by running that the one before it is done."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    while True:
        signal.pause()


async def uninstall(
    options: Options,
    clock: Clock,
    *,
    say: Callable[[str], None],
    step: Callable[[str], None] = lambda _: None,
) -> None:
    """``say`` is told each line of what is gone and kept, ``step`` the name of each step that is done, for tests.

    Raises UninstallError if pods live and are not to be kept, if agent or CNI server run, or if something is left
    after all; CNIError or OSError if the kernel refuses."""
    async with _locks(options.run, clock):
        found = removal.plan(_look(options, clock), options.wishes)
        if found.refusal:
            raise UninstallError(found.refusal)
        for one in found.steps:
            async for line in _carry_out(one, options, clock):
                say(f"kept: {line}")
            say(f"removed: {removal.in_words(one)}")
            step(type(one).__name__)
        left = removal.plan(_look(options, clock), options.wishes)
        # What the speaker keeps of itself is no more than an empty table.
        still = [removal.in_words(s) for s in left.steps if not isinstance(s, removal.EndSessions)]
        if still:
            raise UninstallError(f"still there: {'; '.join(still)}: does a process of ours run? Then end it, and again")
        for line in found.kept:
            say(f"kept: {line}")
        if not found.steps:
            say("nothing of ours was there")
        others = install.others(options.conf_dir)
        say(f"the runtime's network from now on: {others[0] if others else 'none'}")


@contextlib.asynccontextmanager
async def _locks(run: Path, clock: Clock) -> AsyncIterator[None]:
    """Holds the locks of CNI server and agent, where they ever ran: no pod gets our network meanwhile."""
    with contextlib.ExitStack() as stack:
        for name, who in _LOCKS.items():
            if not (run / name).exists():
                continue
            lock = stack.enter_context((run / name).open("a"))
            end = clock.monotonic() + LOCK_LIMIT
            while not taken(lock):
                if clock.monotonic() > end:
                    raise UninstallError(
                        f"the {who} of this node runs, it holds {run / name}: end it first "
                        f"(kubectl delete -n underlay-system daemonset underlay-cni underlay-agent)"
                    )
                await clock.sleep(_POLL)
        yield


# -- look ------------------------------------------------------------------------------------------------------------


def _look(options: Options, clock: Clock) -> Present:
    with Netlink() as netlink:
        links = rtnl.links(netlink)
        there = routes.dump(netlink)
        objects = nexthops.dump(netlink)
    conflist, binary = install.is_installed(options.bin_dir, options.conf_dir)
    return Present(
        pods={link.index: link.name for link in links if link.group == LINK_GROUP},
        doomed=sum(link.group == LINK_GROUP_DOOMED for link in links),
        routes=tuple(route for route, _ in there.values()),
        groups=tuple(objects.groups),
        nexthops=tuple(objects.nexthops),
        source_check=sources.is_there(),
        sysctls=tuple(_sysctls(options)),
        conflist=conflist,
        binary=binary,
        speaker=answers(options.run / "speaker" / "relay.sock", limit=SPEAKER_LIMIT),
        run=_names(options.run),
        state=_names(options.state),
    )


def _sysctls(options: Options) -> Iterator[tuple[sysctls.Former, str | None]]:
    for former in sysctls.changed(options.run / sysctls.FOLDER):
        try:
            yield former, sysctls.path(former.key, options.sysctls).read_text().strip()
        except FileNotFoundError:
            yield former, None


def _names(folder: Path) -> tuple[str, ...] | None:
    """None also for a mount point that is empty: whoever mounted it takes it away."""
    names = tuple(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else None
    return None if names == () and _is_mount_point(folder) else names


def _is_mount_point(folder: Path) -> bool:
    """Also where the same file system is mounted, which stat(2) does not tell (proc(5), mountinfo)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return str(folder.resolve()) in (line.split()[4] for line in lines)


# -- do --------------------------------------------------------------------------------------------------------------


async def _carry_out(step: Step, options: Options, clock: Clock) -> AsyncIterator[str]:
    """Does it; what cannot be done, but does not stand against the rest, is a line. Raises what the kernel refuses."""
    match step:
        case removal.RemoveConflist():
            install.remove_conflist(options.conf_dir)
        case removal.EndSessions():
            problem = await _goodbye(options.run / "speaker", clock)
            if problem:
                yield problem
        case removal.DeleteRoutes(gone):
            _tell_kernel([routes.delete(route) for route in gone])
        case removal.DeleteNextHops(ids):
            _tell_kernel([nexthops.delete(id_) for id_ in ids])
        case removal.Reap():
            with Netlink() as netlink:
                podnet.reap(netlink)
        case removal.RemoveSourceCheck():
            sources.remove()
        case removal.Restore(key, value):
            if value is not None:
                sysctls.change(key, value, options.sysctls)
            sysctls.forget(key, options.run / sysctls.FOLDER)
        case removal.RemoveBinary():
            install.remove_binary(options.bin_dir)
        case removal.RemoveFiles(directory, names):
            _remove(options.run if directory == "run" else options.state, names)


def _tell_kernel(messages: Sequence[Message]) -> None:
    """What is gone already, as a route with its nexthop, is no error."""
    with Netlink() as netlink:
        for error in netlink.batch(messages):
            if error is not None and error.number not in (errno.ESRCH, errno.ENOENT):
                raise error


def _remove(folder: Path, names: Sequence[str]) -> None:
    # Locks last: as long as there are others of ours, nobody takes the folder for a new one.
    for name in sorted(names, key=lambda name: name.endswith(".lock")):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=False)
        else:
            path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as e:
        # Somebody else's file in it, or a mount point.
        if e.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EBUSY):
            raise


async def _goodbye(folder: Path, clock: Clock) -> str:
    """Has the speaker withdraw everything, then end its sessions; what did not work, "" if all did.

    ExaBGP closes the connection of a peer that is taken out, and says no NOTIFICATION (5.0.15, Peer.remove). A peer in
    graceful restart would keep what it was told for that time: so there must be nothing, which the barrier shows."""
    up: set[str] = set()

    def hear(event: Event) -> None:
        match event:
            case SessionUp(peer=peer):
                up.add(peer)
            case SessionDown(peer=peer):
                up.discard(peer)
            case SpeakerLost():
                up.clear()

    driver = Driver(folder, clock, hear)
    driver.set_announcements(frozenset())
    talking = asyncio.create_task(driver.run())
    try:
        if not await _until(lambda: driver.state().known, driver, clock, SPEAKER_LIMIT):
            return "sessions: the speaker does not answer; they end with its pod"
        # Before the sessions go (R9).
        told = await _until(lambda: not driver.state().sent, driver, clock, GOODBYE_LIMIT)
        driver.set_sessions(frozenset())
        if not await _until(lambda: driver.configured and not up, driver, clock, GOODBYE_LIMIT):
            return f"sessions with {', '.join(sorted(up)) or 'peers'}: the speaker did not end them in time"
        return "" if told else "not every peer took the withdrawals: it may keep routes for a graceful restart's time"
    finally:
        talking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await talking


async def _until(probe: Callable[[], bool], driver: Driver, clock: Clock, limit: float) -> bool:
    end = clock.monotonic() + limit
    while not probe():
        left = end - clock.monotonic()
        if left <= 0:
            return False
        driver.changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left, 0.5)):
                await driver.changed.wait()
    return True


if __name__ == "__main__":
    sys.exit(main())
