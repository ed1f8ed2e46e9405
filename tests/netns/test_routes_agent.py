"""The whole agent in a node's namespace: a SQLite store, the real speaker, BIRD as ToR, the real kernel."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from datetime import datetime
from ipaddress import ip_network
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent import waiting
from lab.net import Net
from store.base import Store, mutate
from store.model import BGPNodeStatus, IPAMBlock, block_name
from tests.bgp import routers
from tests.bgp.agents import OWN4, OWN6, Agent, block, peers
from tests.conftest import eventually
from tests.promtext import Labels, check, get, value

FAR = ("10.244.2.0/26", "10.244.3.0/26", "fd00:10:244::80/122", "192.0.2.0/24", "10.244.1.8/29")


WHOLE = [
    "10.244.2.0/26 via 10.0.1.2 dev up0 proto 143 src 10.0.1.1 metric 2048",
    "10.244.3.0/26 via 10.0.1.2 dev up0 proto 143 src 10.0.1.1 metric 2048",
    "blackhole 10.244.1.0/26 proto 142 metric 512",
    "blackhole fd00:10:244::40/122 dev lo proto 142 metric 512 pref medium",
    "fd00:10:244::80/122 via fd00:1::2 dev up0 proto 143 src fd00:1::1 metric 2048 pref medium",
]


class Beside(Agent):
    """An agent and the BIRD that it peers with."""

    def __init__(self, net: Net, folder: Path) -> None:
        routers.wire(net)
        super().__init__(net, folder, peers=peers())
        self.bird = routers.Bird(net, folder)


@pytest.fixture
def agent(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    monkeypatch.setenv("UNDERLAY_METRICS", str(tmp_path / "m.sock"))
    made = Beside(net, tmp_path)
    made.start_speaker()
    made.start()
    # Or a route into one of them would keep it from use.
    eventually(lambda: sum(line.startswith("blackhole") for line in made.routes()) == 2)
    made.bird.start(FAR)
    yield made
    for log in ("agent.log", "speaker.log"):
        print(f"--- {log}\n{(tmp_path / log).read_text()[-4000:]}")


STAMP = re.compile(r"(\d\d):(\d\d):(\d\d\.\d+)")


def same(one: str, two: str) -> bool:
    """BIRD says the same, with the same stamps: it works them out each time anew, and is off by a millisecond or so."""
    stamps = [[int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in STAMP.findall(text)] for text in (one, two)]
    assert STAMP.sub("", one) == STAMP.sub("", two)
    assert stamps[0] == pytest.approx(stamps[1], abs=0.05)
    return bool(stamps[0])


def settled(agent: Beside) -> bool:
    assert agent.routes() == WHOLE
    assert set(agent.bird.table()) == {OWN4, OWN6}
    return True


#: asm-generic/socket.h: each packet with the kernel's time of its arrival.
_SO_TIMESTAMPNS = 35


class Forgotten:
    """When the node's kernel lost a route."""

    def __init__(self, net: Net, prefix: str, log: Path) -> None:
        self._log = log
        self._line = re.compile(rf"^\[([^]]+)\] Deleted .*{re.escape(prefix)} ", re.MULTILINE)
        net.spawn("node", ["stdbuf", "-oL", "ip", "-ts", "monitor", "route"], log=log)

        def looks() -> bool:
            net.ip("node", ["route add 198.51.100.1 dev lo", "route del 198.51.100.1 dev lo"])
            return "198.51.100.1" in log.read_text()

        eventually(looks)

    def at(self) -> float | None:
        found = self._line.search(self._log.read_text())
        return datetime.fromisoformat(found[1]).timestamp() if found else None


class Withdrawn:
    """When the UPDATE that withdraws an IPv4 prefix came to the router's kernel (RFC 4271, 4.3)."""

    def __init__(self, net: Net, prefix: str) -> None:
        network = ip_network(prefix)
        routes = bytes([network.prefixlen]) + network.network_address.packed
        self._wanted = len(routes).to_bytes(2, "big") + routes
        with net.inside("tor"):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self._socket.bind(("down0", 0x0800))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.setblocking(False)

    def at(self) -> float | None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, ((_, _, stamp),), _, _ = self._socket.recvmsg(1 << 16, 64)
                if self._wanted in packet:
                    seconds, nanoseconds = struct.unpack("ll", stamp)
                    return float(seconds + nanoseconds / 1e9)
        return None


def figures(agent: Beside) -> dict[str, dict[Labels, float]]:
    """What is told where ``--metrics`` says."""
    code, page = get(agent.folder / "m.sock", "/metrics")
    assert code == 200
    return check(page)


def test_blocks_go_out_imports_come_in_and_nothing_else(agent: Beside) -> None:
    eventually(lambda: settled(agent))
    for name in ("m.sock", "run/agent.sock"):
        assert get(agent.folder / name, "/healthz") == (200, b"ok\n")
        eventually(lambda name=name: get(agent.folder / name, "/readyz") == (200, b"ok\n"))
    found = figures(agent)
    assert value(found, "underlay_agent_routes", protocol="imports", family="ipv4") == 2
    assert value(found, "underlay_agent_view_live") == 1
    refused = {dict(labels)["reason"]: count for labels, count in found["underlay_bgp_prefixes_refused"].items()}
    assert refused == {"OutsidePools": 1, "OwnBlock": 1}

    def told() -> bool:
        status = agent.status()
        assert status is not None
        sessions = {s.peer: s for s in status.status.sessions}
        four = sessions["tor-4"]
        assert (four.state, four.received, four.accepted, four.wanted, four.sent) == ("Established", 4, 2, 1, 1)
        assert four.graceful_restart
        assert sessions["tor-6"].sent == 1
        (condition,) = status.status.conditions
        assert condition.type == "ForeignRoute"
        assert "tor-4 announces 10.244.1.8/29" in condition.message
        return True

    eventually(lambda: told())
    read = agent.net.run("node", ["cat", "/proc/sys/net/ipv4/conf/up0/ignore_routes_with_linkdown"]).stdout
    assert read.strip() == "1"


def test_a_restart_touches_no_route_and_no_session(agent: Beside) -> None:
    eventually(lambda: settled(agent))
    before = agent.bird.ask("show", "protocols", "node4")
    logs = {name: agent.folder / f"monitor-{name}" for name in ("node", "tor")}
    monitors = [
        agent.net.spawn(name, ["stdbuf", "-oL", "ip", "monitor", "route", "nexthop"], log=log)
        for name, log in logs.items()
    ]

    def marked(number: int) -> bool:
        """A foreign route, made and removed, that both monitors must tell."""
        for name in logs:
            agent.net.ip(name, [f"route add 198.51.100.{number} dev lo", f"route del 198.51.100.{number} dev lo"])
        return all(f"198.51.100.{number}" in log.read_text() for log in logs.values())

    eventually(lambda: marked(1))
    for number in (signal.SIGKILL, signal.SIGTERM):
        agent.stop(number)
        written = agent.status()
        agent.start()
        eventually(lambda: (agent.folder / "state" / "snapshot.json").exists())

        def again(written: BGPNodeStatus | None = written) -> bool:
            # It has looked at everything when it has written its status anew (stamps are of its own life).
            status = agent.status()
            return (
                status != written
                and status is not None
                and all(
                    s.state == "Established" and s.accepted == (2 if s.peer == "tor-4" else 1)
                    for s in status.status.sessions
                )
            )

        eventually(again)
    # An upgrade: the newer one takes over; and a rollback by its death.
    old = agent.process
    agent.start()
    eventually(lambda: "standing by" in (agent.folder / "agent.log").read_text())
    eventually(lambda: waiting.missing(agent.folder / "run" / "agent.sock") == (True, ""))
    agent.stop(signal.SIGKILL)
    agent.process = old
    eventually(lambda: "working again" in (agent.folder / "agent.log").read_text())
    eventually(lambda: waiting.missing(agent.folder / "run" / "agent.sock") == (True, ""))
    eventually(lambda: marked(2))
    for log in logs.values():
        between = log.read_text().split("198.51.100.2")[0].split("198.51.100.1")[-1]
        assert [x for x in between.splitlines() if "10.244." in x or "fd00:10:" in x or "nexthop" in x] == []
    assert same(agent.bird.ask("show", "protocols", "node4"), before)
    for monitor in monitors:
        monitor.kill()
    assert settled(agent)


def test_a_block_is_withdrawn_then_its_blackhole_goes(agent: Beside, tmp_path: Path) -> None:
    eventually(lambda: settled(agent))

    async def release(store: Store) -> None:
        def change(b: IPAMBlock) -> IPAMBlock:
            return replace(b, status=replace(b.status, releasing=True))

        await mutate(store, IPAMBlock, block_name(OWN4), change, status=True)

    withdrawn, forgotten = Withdrawn(agent.net, OWN4), Forgotten(agent.net, OWN4, tmp_path / "node.log")
    agent.store(release)
    came, went = eventually(withdrawn.at), eventually(forgotten.at)
    assert went - came > 0.9, "its blackhole stays for a second"
    eventually(lambda: OWN4 not in agent.bird.table())
    assert f"blackhole {OWN4} proto 142 metric 512" not in agent.routes()
    # Needed again: but somebody else routes into it now, and it is as new.

    async def need(store: Store) -> None:
        def change(b: IPAMBlock) -> IPAMBlock:
            return replace(b, status=replace(b.status, releasing=False))

        await mutate(store, IPAMBlock, block_name(OWN4), change, status=True)

    agent.store(need)

    def withheld() -> bool:
        status = agent.status()
        assert status is not None
        said = {c.type: c.message for c in status.status.conditions}
        return f"10.244.1.8/29 via {routers.TOR4} is in the new block {OWN4}" in said.get("ForeignRoute", "")

    eventually(withheld)
    assert f"blackhole {OWN4} proto 142 metric 512" not in agent.routes()
    assert OWN4 not in agent.bird.table()
    agent.bird.ask("disable", "s4")
    eventually(lambda: OWN4 in agent.bird.table())
    agent.bird.ask("enable", "s4")
    eventually(lambda: settled(agent))


def test_a_blackhole_that_somebody_removes_comes_back_without_a_withdrawal(agent: Beside) -> None:
    eventually(lambda: settled(agent))
    before = agent.bird.ask("show", "route", OWN4, "all")
    agent.net.ip("node", [f"route del blackhole {OWN4} proto 142"])
    eventually(lambda: agent.routes() == WHOLE)
    # What is announced after it has arrived, so a withdrawal would have, too.
    agent.store(lambda store: store.create(block("10.244.1.64/26")))
    eventually(lambda: "10.244.1.64/26" in agent.bird.table())
    assert same(agent.bird.ask("show", "route", OWN4, "all"), before)


def test_without_store_it_starts_from_its_last_good_view(agent: Beside) -> None:
    eventually(lambda: settled(agent))
    eventually(lambda: (agent.folder / "state" / "snapshot.json").exists())
    agent.stop()
    for name in ("store.db", "store.db-wal", "store.db-shm"):
        (agent.folder / name).unlink(missing_ok=True)
    (agent.folder / "store.db").mkdir()
    agent.net.ip("node", [f"route del blackhole {OWN4} proto 142", "route flush proto 143"])
    agent.start()
    eventually(lambda: settled(agent))
    # It is ready all the same: what it knew last is in place.
    eventually(lambda: get(agent.folder / "m.sock", "/readyz") == (200, b"ok\n"))
    found = figures(agent)
    assert value(found, "underlay_agent_view_live") == 0
    assert value(found, "underlay_agent_informer_synced", kind="ippools") == 0
    assert value(found, "underlay_agent_informer_behind_seconds", kind="ippools") > 0
    assert value(found, "underlay_agent_last_good_age_seconds") > 0
    assert value(found, "underlay_store_failures_total", verb="watch") > 0


def test_it_says_in_one_line_what_it_lacks(net: Net, tmp_path: Path) -> None:
    net.add("node")
    argv = [sys.executable, "-c", "import sys; from agent.daemon import main; sys.exit(main())", "--node", "node-1"]
    done = net.run("node", [*argv, "--store", "nonsense:"], check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "nonsense:" in done.stderr
    assert net.run("node", argv, check=False).returncode == 2


def test_a_second_agent_waits_for_the_end_of_the_first(agent: Beside) -> None:
    eventually(lambda: settled(agent))

    def said() -> bool:
        status = agent.status()
        return (
            status is not None
            and [c.type for c in status.status.conditions] == ["ForeignRoute"]
            and all(s.sent for s in status.status.sessions)
        )

    eventually(said)
    first = agent.process
    assert first is not None
    # So that whatever is written from here on is the second's.
    first.send_signal(signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(") ")[2].startswith("T"))
    before = agent.status()
    agent.start()
    log = agent.folder / "agent.log"
    eventually(lambda: "waiting for its end" in log.read_text())
    second = agent.process
    assert second is not None
    assert second.poll() is None
    assert agent.status() == before, "the second one has written"
    first.send_signal(signal.SIGCONT)
    agent.process = first
    agent.stop(signal.SIGTERM)
    eventually(lambda: agent.status() != before)
    agent.process = second
    assert agent.stop(signal.SIGTERM) == 0
