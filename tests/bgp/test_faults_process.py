"""ExaBGP's faults 3 to 7 and 10 (exabgp.md), each provoked twice (faults.py): the process, its helper, signals."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import signal
import sys
from pathlib import Path

import pytest

from agent.bgp import speaker
from agent.bgp.model import EndOfRib, Resync, SessionDown, SessionUp, SpeakerLost, Update
from lab.net import Net
from tests.bgp.conftest import SESSIONS, Node, Witness, blocks, run, session, until
from tests.bgp.faults import Without, downs, handled, ups
from tests.bgp.routers import TOR4, TOR6, Bird

GONE = "10.0.1.99"


def next_relay(node: Node, killed: set[int]) -> int:
    try:
        found = node.relay()
    except (StopIteration, FileNotFoundError):
        return 0
    return 0 if found in killed else found


@handled
def test_fault_3_an_unreadable_file_kills_the_helper(bird: Bird, node: Node, without: Without, handled: bool) -> None:
    """Whoever wrote it: a truncated file and a SIGUSR1 leave an ExaBGP without helper and with a broken parser."""
    if not handled:
        without("farewell")
    log = node.folder / "exabgp.log"

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            relay = node.relay()
            path = node.folder / "exabgp.conf"
            whole = path.read_text()
            path.write_text(whole[:-40])
            os.kill(node.process.pid, signal.SIGUSR1)
            if not handled:
                await until(lambda: not driver.state().known)
                await until(lambda: not running(relay))
                path.write_text(whole)
                os.kill(node.process.pid, signal.SIGUSR1)
                # Deaf for good, or dead if there is something that it would have told its helper.
                await until(
                    lambda: (
                        log.read_text().count("could not load/reload") > 1
                        or (node.process.poll() is not None and "KeyError: 'relay'" in node.log.read_text())
                    )
                )
                assert not driver.state().known
                return
            await until(lambda: node.process.poll() is not None)  # the relay saw to it
            assert bird.table().keys() == {a.prefix for a in blocks(4)}
            # The agent puts the file right whatever it finds, and a supervisor starts the speaker.
            await until(lambda: not driver.state().known)
            driver.set_sessions(SESSIONS | {session(name="other", address=GONE)})
            await until(lambda: GONE in path.read_text())
            node.start()
            await until(lambda: len(driver.state().confirmed) == 4)
            await until(lambda: not bird.stale())
            assert bird.table().keys() == {a.prefix for a in blocks(4)}

    run(main())


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("care", ["", "record", "watchdog"], ids=["handled", "by the watchdog alone", "not"])
def test_fault_4_a_helper_dies_while_it_is_written_to(
    bird: Bird, node: Node, net: Net, without: Without, tmp_path: Path, care: str
) -> None:
    """ExaBGP stops all its peers for good, and lives on."""
    node.options = ("--watch-every", "0.3")
    log = node.folder / "exabgp.log"
    if care:
        without(care)

    def stopped() -> bool:
        return "lost the helper process for this peer" in log.read_text()

    async def main() -> None:
        bird.start([f"10.{100 + i // 250}.{i % 250}.0/24" for i in range(3000)])
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            await until(lambda: any(isinstance(e, EndOfRib) for e in events))
            await witness.begin({a.prefix for a in blocks(4)})
            first, dead = node.process, set[int]()
            # Mostly ExaBGP is at a peer's routes when it notices; it may be elsewhere, and then nothing comes of it.
            while not stopped() and len(dead) < 5:
                relay = await until(lambda: next_relay(node, dead))
                # The relay is stopped, ExaBGP fills the pipe and blocks on it, the relay dies.
                os.kill(relay, signal.SIGSTOP)
                bird.ask("reload", "out", "node4")
                bird.ask("reload", "out", "node6")
                await until(lambda: stopped() or "pipe_write" in Path(f"/proc/{first.pid}/wchan").read_text())
                if stopped():
                    os.kill(relay, signal.SIGCONT)
                    break
                os.kill(relay, signal.SIGKILL)
                dead.add(relay)
                await until(lambda: next_relay(node, dead) or first.poll() is not None)
                if first.poll() is not None:
                    break
            if care == "watchdog":
                # Its helper is there again, and sees this over and over.
                await until(lambda: node.log.read_text().count("left alone: its peers are configured") > 4)
                assert first.poll() is None
                return
            await until(lambda: first.poll() is not None)
            node.start()
            await until(lambda: driver.state().known and len(driver.state().confirmed) == 4)
            await until(lambda: not bird.stale())
            assert bird.table().keys() == {a.prefix for a in blocks(4)}
            assert witness.seen() == []

    run(main())


@handled
def test_fault_5_a_helper_that_does_not_read(bird: Bird, node: Node, without: Without, handled: bool) -> None:
    """ExaBGP stands still, and every session ends at its hold time. Our relay reads whatever its agent does, and an
    agent that was behind is told everything again."""
    routes = [f"10.{100 + i // 250}.{i % 250}.0/24" for i in range(4000)]
    node.options = ("--buffer", "20000")
    if not handled:
        without("patience")
    quick = frozenset({session("4", hold_time=6, families=("ipv4 unicast",))})

    async def main() -> None:
        bird.start(routes)
        node.write_conf(quick)
        node.start()
        await until(lambda: (node.folder / "relay.sock").exists())
        _, writer = await asyncio.open_unix_connection(str(node.folder / "relay.sock"), limit=1024)
        writer.write(b'{"do":"hello","version":1}\n')
        await until(lambda: "Established" in bird.ask("show", "protocols", "node4"))
        connected = (node.folder / "exabgp.log").read_text().count("connected to peer")
        # Not one byte is read from here on, for longer than the hold time, while BIRD tells it all over and over.
        end = asyncio.get_running_loop().time() + 7
        while asyncio.get_running_loop().time() < end:
            bird.ask("reload", "out", "node4")
            await asyncio.sleep(0.2)
        if not handled:
            await until(lambda: "node4: Error: Hold timer expired" in (bird.folder / "log").read_text())
            writer.close()
            return
        assert (node.folder / "exabgp.log").read_text().count("connected to peer") == connected
        assert "Established" in bird.ask("show", "protocols", "node4")
        writer.close()
        async with node.driver() as (_, events):
            await until(lambda: sum(isinstance(e, EndOfRib) for e in events) >= 1)
            got = {r.prefix for e in events if isinstance(e, Update) for r in e.announced}
            assert got >= set(routes)
            # This one stands still too, then reads on: it is told of the gap, and everything again.
            events.clear()
            for _ in range(500):
                bird.ask("reload", "out", "node4")  # the event loop does not run meanwhile
                if node.log.read_text().count("bytes behind") >= 2:
                    break

            def whole() -> bool:
                starts = [i for i, e in enumerate(events) if isinstance(e, Resync)]
                after = events[starts[-1] :] if starts else []
                told = {r.prefix for e in after if isinstance(e, Update) for r in e.announced}
                return told >= set(routes) and any(isinstance(e, EndOfRib) for e in after)

            await until(whole)
            assert not any(isinstance(e, SessionDown | SessionUp) for e in events)
        assert node.log.read_text().count("bytes behind") >= 2

    run(main())


@handled
def test_fault_6_helpers_that_die_take_exabgp_with_them(
    bird: Bird, node: Node, net: Net, without: Without, tmp_path: Path, handled: bool
) -> None:
    """At the sixth in 64 s it exits. Ours ends it at the first, and either way its supervisor starts it again and no
    route is touched."""
    if not handled:
        without("record")
    wanted = blocks(4)

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            witness = Witness(net, tmp_path / "monitor")
            driver.set_announcements(wanted)
            await until(lambda: len(driver.state().confirmed) == 4)
            await witness.begin({a.prefix for a in wanted})
            killed: set[int] = set()
            while node.process.poll() is None and len(killed) < 12:
                fresh = await until(lambda: next_relay(node, killed) or node.process.poll() is not None)
                if fresh is not True:
                    os.kill(fresh, signal.SIGKILL)
                    killed.add(fresh)
                if handled:
                    break
            await until(lambda: node.process.poll() is not None)
            if handled:
                assert node.process.returncode == -signal.SIGKILL
            else:
                assert node.process.returncode == 1
                assert len(killed) >= 6
            node.start()
            await until(lambda: driver.state().known and len(driver.state().confirmed) == 4)
            await until(lambda: not bird.stale())
            assert bird.table().keys() == {a.prefix for a in wanted}
            assert witness.seen() == []

    run(main())


@pytest.mark.parametrize("care", ["", "sighup", "sigalrm"], ids=["handled", "SIGHUP", "SIGALRM"])
def test_fault_7_signals_that_end_or_flap_every_session(bird: Bird, node: Node, without: Without, care: str) -> None:
    """Sent in place of SIGUSR1 when a peer is added, and what becomes of the one that was there."""
    if care:
        without(care)

    async def main() -> None:
        bird.start()
        node.write_conf(frozenset({session("4")}))
        node.start()
        async with node.driver() as (driver, events):
            await until(lambda: ups(events) == [TOR4])
            driver.set_sessions(SESSIONS)
            if not care:
                await until(lambda: set(ups(events)) == {TOR4, TOR6})
                assert ups(events).count(TOR4) == 1
                assert downs(events) == []
                return
            await until(lambda: any(isinstance(e, SpeakerLost) for e in events) or TOR4 in downs(events))
            assert TOR6 not in ups(events)
            if care == "sighup":
                await until(lambda: node.process.poll() == 0)

    run(main())


def user_of(pid: int) -> int:
    return int(re.findall(r"^Uid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])


@handled
def test_fault_10_root_becomes_nobody(bird: Bird, node: Node, net: Net, handled: bool) -> None:
    """Who cannot read a 0600 file when it reloads, nor run a helper in a 0700 folder."""

    async def main() -> None:
        bird.start()
        if handled:
            node.start()
        else:
            path = speaker.prepare(node.folder)
            settings = speaker.environment(node.folder, os.environ)
            del settings["exabgp.daemon.user"]
            argv = [sys.executable, "-P", "-m", "exabgp", "server", str(path)]
            node.process = net.spawn("node", argv, log=node.log, env=settings)
        async with node.driver() as (driver, events):
            driver.set_sessions(frozenset({session("4")}))
            if not handled:
                await until(lambda: user_of(node.process.pid) == pwd.getpwnam("nobody").pw_uid)
                # No helper either: nobody may look into the folder.
                os.kill(node.process.pid, signal.SIGUSR1)
                await until(lambda: "could not load/reload" in node.log.read_text())
                assert not driver.state().known
                assert ups(events) == []
                return
            await until(lambda: ups(events) == [TOR4])
            driver.set_sessions(SESSIONS)
            await until(lambda: set(ups(events)) == {TOR4, TOR6})
            assert (node.folder / "exabgp.conf").stat().st_mode & 0o777 == 0o600
            assert {user_of(node.process.pid), user_of(node.relay())} == {os.geteuid()}

    run(main())
