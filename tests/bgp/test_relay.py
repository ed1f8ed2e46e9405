"""The relay by itself: what strangers say to it, and what it finds on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.bgp.model import SessionUp
from agent.bgp.speaker import RELAY, relay_command
from tests.bgp.conftest import SESSIONS, Node, announce, blocks, run, session, until
from tests.bgp.routers import NODE4, TOR4, Bird


async def connect(node: Node) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the relay, once it is there."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await asyncio.open_unix_connection(str(node.folder / "relay.sock"))
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.02)


async def told(reader: asyncio.StreamReader, kind: str) -> Any:
    """The payload of the next line of this kind."""
    async with asyncio.timeout(60):
        while True:
            line = await reader.readline()
            assert line, "the relay closed the connection"
            _, found, payload = line.split(b" ", 2)
            if found.decode() == kind:
                return json.loads(payload)


GARBAGE = [
    b"\n",
    b"hello\n",
    b"\x00\xff" * 3000 + b"\n",
    b"{" * 100_000,
    b'{"do":"table","generation":1,"routes":[]}\n',
    b'{"do":"hello","version":99}\n',
    b'{"do":"hello"}\n',
    b"[" * 4000 + b"\n",
    b"null\n",
]


def test_garbage_from_strangers(bird: Bird, node: Node) -> None:
    """Nothing that a stranger says reaches the agent, its table or ExaBGP."""

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
            relay = node.relay()
            for data in GARBAGE:
                reader, writer = await connect(node)
                writer.write(data)
                async with asyncio.timeout(60):
                    with contextlib.suppress(ConnectionError):
                        assert await reader.read() == b""
                writer.close()
            idle = [await connect(node) for _ in range(30)]  # more than it keeps
            driver.set_announcements(blocks(6))
            await until(lambda: len(driver.state().confirmed) == 6)
            assert node.relay() == relay
            for _, writer in idle:
                writer.close()
        assert [type(e) for e in events].count(SessionUp) == 2

    run(main())


@pytest.mark.parametrize(
    "row",
    [
        [TOR4, "10.244.0.0/26 next-hop 1.1.1.1", NODE4, None, [], []],
        [TOR4, "10.244.0.0/26", "self", None, [], []],
        [TOR4, "10.244.0.0/26", "fd00::1", None, [], []],
        ["10.0.1.2 announce route 0.0.0.0/0", "10.244.0.0/26", NODE4, None, [], []],
        [TOR4, "10.244.0.0/26", NODE4, -1, [], []],
        [TOR4, "10.244.0.0/26", NODE4, None, ["1:1] nlri 0.0.0.0/0"], []],
        [TOR4, "10.244.0.0/26", NODE4, None, [], ["1:1"]],
        [TOR4],
        "x",
    ],
)
def test_bad_table_changes_nothing(node: Node, bird: Bird, row: object) -> None:
    async def main() -> None:
        node.write_conf(frozenset())
        node.start()
        reader, writer = await connect(node)
        writer.write(b'{"do":"hello","version":1}\n')
        await told(reader, "hello")
        good = [TOR4, "10.244.9.0/26", NODE4, None, [], []]
        writer.write(json.dumps({"do": "table", "generation": 7, "routes": [good]}).encode() + b"\n")
        await told(reader, "table")
        before = (node.folder / "table.json").read_bytes()
        writer.write(json.dumps({"do": "table", "generation": 8, "routes": [good, row]}).encode() + b"\n")
        assert "row" in (await told(reader, "error"))["problem"]
        assert (node.folder / "table.json").read_bytes() == before
        writer.close()

    run(main())


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "flipped", "folder"])
def test_table_on_disk_is_damaged(bird: Bird, node: Node, damage: str) -> None:
    """It says so, announces nothing, and takes the next table as if it were the first."""
    node.write_conf(SESSIONS)
    path = node.folder / "table.json"

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(blocks(4))
            await until(lambda: len(driver.state().confirmed) == 4)
        relay = node.relay()
        node.kill()
        # The old relay answers until it has seen the end of ExaBGP.
        await until(lambda: not Path(f"/proc/{relay}/fd").exists() or not list(Path(f"/proc/{relay}/fd").iterdir()))
        whole = path.read_bytes()
        match damage:
            case "missing":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
            case "short":
                path.write_bytes(whole[: len(whole) // 2])
            case "flipped":
                path.write_bytes(whole.replace(b"10.244.0.0/26", b"10.244.0.0/25"))
            case "folder":
                path.unlink()
                path.mkdir()
        node.start()
        reader, writer = await connect(node)
        writer.write(b'{"do":"hello","version":1}\n')
        hello = await told(reader, "hello")
        assert hello["table"] is None
        assert hello["problem"]
        writer.close()
        if damage == "folder":
            path.rmdir()
        async with node.driver() as (driver, _):
            driver.set_announcements(blocks(2))
            await until(lambda: bird.table().keys() == {a.prefix for a in blocks(2)})
            await until(lambda: driver.state().confirmed == {(a.peer, a.prefix) for a in blocks(2)})

    run(main())


def test_full_disk_stops_no_route(bird: Bird, node: Node) -> None:
    """A table that cannot be written is announced all the same, and said not to be kept."""

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(2))
            await until(lambda: len(driver.state().confirmed) == 2)
            (node.folder / "table.tmp").mkdir()
            driver.set_announcements(blocks(4))
            await until(lambda: bird.table().keys() == {a.prefix for a in blocks(4)})
            assert "cannot be written" in (node.folder.parent.parent / "speaker.log").read_text()
            (node.folder / "table.tmp").rmdir()
            driver.set_announcements(blocks(6))
            await until(lambda: "10.244.0.128/26" in (node.folder / "table.json").read_text())

    run(main())


def test_agent_before_speaker(bird: Bird, node: Node) -> None:
    """Who starts first does not matter, and neither overwrites what the other made."""

    async def main() -> None:
        bird.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(blocks(2))
            await until(lambda: TOR4 in (node.folder / "exabgp.conf").read_text() if node.folder.exists() else False)
            assert not driver.state().known
            node.start()
            await until(lambda: len(driver.state().confirmed) == 2)
            assert "SIGUSR1" not in (node.folder / "exabgp.log").read_text(), "nothing to reload"

    run(main())


def test_passive_session_listens(bird: Bird, node: Node) -> None:
    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(frozenset({session("4", passive=True), session("6")}))
            driver.set_announcements(blocks(4))
            await until(lambda: bird.table().keys() == {a.prefix for a in blocks(4)})
            await until(lambda: len(driver.state().confirmed) == 4)
            driver.set_announcements(frozenset())
            await until(lambda: bird.table() == {})

    run(main())


def test_withdrawal_is_reported_to_go_out_before_it_counts(bird: Bird, node: Node) -> None:
    """R9: a prefix leaves ``sent`` only when no peer that is up may hold it."""

    async def main() -> None:
        bird.start()
        node.start()
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            both = frozenset({announce("10.244.0.0/26"), announce("10.244.0.0/26", peer=next(iter(SESSIONS)).address)})
            driver.set_announcements(both | blocks(2))
            await until(lambda: driver.state().confirmed >= {(a.peer, a.prefix) for a in both})
            relay = node.relay()
            os.kill(relay, signal.SIGSTOP)  # nothing can be told to ExaBGP
            driver.set_announcements(frozenset())
            await asyncio.sleep(0.3)
            assert driver.state().sent >= {(a.peer, a.prefix) for a in both}
            assert driver.state().withdrawn_at == {}
            os.kill(relay, signal.SIGCONT)
            await until(lambda: driver.state().sent == frozenset())
            assert "10.244.0.0/26" in driver.state().withdrawn_at
            await until(lambda: bird.table() == {})

    run(main())


def test_relay_starts_without_any_package() -> None:
    """As ExaBGP starts it: no site packages."""
    done = subprocess.run([sys.executable, "-ISEs", str(RELAY), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: Stands for an ExaBGP that has lost its peers (fault 4) or does not: runs the relay as its helper, answers its
#: commands, and ends when the relay does.
PARENT = """
import subprocess, sys
peers, command = sys.argv[1].split(), sys.argv[2:]
relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
for line in relay.stdout:
    if line.strip() == "show neighbor summary":
        print("asked", flush=True)
        relay.stdin.write("Peer            AS        up/down state       |     #sent     #recvd\\n")
        for peer in peers:
            relay.stdin.write(f"{peer}      65001 0:00:01 established 1 1\\n")
    relay.stdin.write("done\\n")
    relay.stdin.flush()
"""


@pytest.mark.parametrize(
    ("configured", "running", "killed"),
    [([TOR4], [], True), ([TOR4], [TOR4], False), ([], [], False)],
    ids=["lost", "well", "none"],
)
def test_watchdog(node: Node, configured: list[str], running: list[str], killed: bool) -> None:
    """Fault 4: an ExaBGP that runs none of its peers is killed, and only such a one."""
    node.options = ("--watch-every", "0.05")
    node.write_conf(frozenset({session("4")} if configured else ()))
    argv = [sys.executable, "-c", PARENT, " ".join(running), *relay_command(node.folder, *node.options)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        if killed:
            assert parent.wait(60) == -signal.SIGKILL
        else:
            assert [parent.stdout.readline() for _ in range(5)] == ["asked\n"] * 5
            assert parent.poll() is None
            parent.kill()
