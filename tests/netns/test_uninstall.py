"""A node as it was before: everything of ours goes, whatever kills the uninstall, and nothing of anybody else's."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from agent import uninstall
from agent.errors import AgentError
from cni import install, netns
from cni.marks import NEXTHOP_BASE
from lab.net import Net
from store.clock import SystemClock
from store.model import BGPPeerSpec
from tests.bgp import routers
from tests.bgp.agents import OWN4, OWN6, Agent, peers
from tests.bgp.routers import SECOND
from tests.conftest import eventually

ROOT = Path(__file__).resolve().parents[2]
FAR = ("10.244.2.0/26", "fd00:10:244::80/122")
OTHER = '{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge"}]}'
#: Somebody else's, of kinds that we have too.
THEIRS = (
    "route add 203.0.113.0/24 via 10.0.1.2 proto 144",
    "route add blackhole 198.51.100.0/24 proto static metric 512",
    "nexthop add id 7 via 10.0.1.2 dev up0 proto 143",
    "nexthop add id 0x554C7777 via 10.0.1.2 dev up0 proto static",
    "route add 203.0.114.0/24 nhid 7",
    "link add cali0 type veth peer name cali1",
    "link set cali1 up",
    "link set cali0 up",
    "rule add from 192.0.2.1 table 77",
    "route add 2001:db8:77::/64 dev cali0 proto 142 table 77",
)
SYSCTLS = (
    *("ip_forward", "conf/*/forwarding", "conf/*/rp_filter", "conf/*/ignore_routes_with_linkdown", "conf/*/accept_ra"),
)


class Machine(Agent):
    """A node with all three processes and a pod, between two ToRs; what is not ours was there before."""

    def __init__(self, net: Net, folder: Path, shim: Path) -> None:
        self.bin, self.conf, self.shim = folder / "bin", folder / "net.d", shim
        net.add("node")
        for tor, port, ends in (("tor", "up0", routers.FIRST), ("tor2", "up1", SECOND)):
            routers.attach(net, tor, port, ends)
        net.sysctl("node", {f"net.ipv4.conf.{name}.rp_filter": "1" for name in ("all", "up0", "up1")})
        second = {f"{name}-b": _at(spec, SECOND) for name, spec in peers().items()}
        super().__init__(net, folder, peers={**peers(), **second})
        for command in THEIRS:  # one by one: in a batch, ip takes the protocol of the line before
            net.ip("node", [command])
        net.run("node", ["nft", "add table inet other; add chain inet other c { type filter hook input priority 0; }"])
        for path, text in ((self.bin / "bridge", "theirs"), (self.conf / "99-other.conflist", OTHER)):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        self.before = self.snapshot()
        self.tors = [routers.Bird(net, folder), routers.Bird(net, folder, "tor2", SECOND)]
        self.net.add("pod-1")

    def begin(self) -> None:
        """Everything is installed, and works."""
        self.start_speaker()
        self.start()
        self.start_cni()
        for tor in self.tors:
            tor.start(FAR)
        install.install(self.shim, self.bin, self.conf, run=self.folder / "run")
        self.address = str(self.call("ADD")["ips"][0]["address"]).partition("/")[0]
        eventually(lambda: all({OWN4, OWN6} <= tor.table().keys() for tor in self.tors))
        eventually(self._is_ecmp)
        found = self.snapshot()
        same = [what for what in found if found[what] == self.before[what]]
        assert same == ["rule"], "what of the others is as before proves nothing"

    def _is_ecmp(self) -> bool:
        """Both imports go through a group of ours."""
        found = [line for f in ("-4", "-6") for line in self.ip(f, "route", "show", "proto", "143").splitlines()]
        groups = re.findall(r"^id (\d+) group", self.ip("nexthop"), re.MULTILINE)
        assert all(int(group) >= NEXTHOP_BASE for group in groups)
        through = [line for line in found if any(f"nhid {group}" in line for group in groups)]
        assert len(through) == len(FAR), (found, self.ip("nexthop"))
        return True

    def start_cni(self) -> None:
        (self.folder / "boot_id").write_text("boot-1\n")
        argv = [sys.executable, "-P", "-m", "cni.daemon", "--node", "node-1", "--store", self.url]
        argv += ["--run", str(self.folder / "run"), "--boot-id", str(self.folder / "boot_id")]
        self.cni = self.net.spawn("node", argv, log=self.folder / "cni.log", cwd=ROOT)
        eventually(lambda: "no server" not in json.dumps(self.call("STATUS")))

    def end_servers(self) -> None:
        """As the deletion of their DaemonSets does."""
        self.stop(signal.SIGTERM)
        self.cni.terminate()
        self.cni.wait(timeout=60)

    def end_speaker(self, number: int) -> None:
        assert self.speaker is not None
        self.speaker.send_signal(number)
        self.speaker.wait(timeout=60)

    def call(self, verb: str) -> dict[str, Any]:
        """The runtime executes the shim; what that answers."""
        env = {
            "PATH": os.environ["PATH"],
            "UNDERLAY_RUN": str(self.folder / "run"),
            **{"CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"},
            "CNI_NETNS": str(self.net.path("pod-1")),
        }
        version = "1.1.0" if verb == "STATUS" else "1.0.0"
        text = json.dumps({"cniVersion": version, "name": "underlay", "type": "underlay"}).encode()
        done = subprocess.run([self.shim], input=text, env=env, capture_output=True, timeout=60, check=False)
        return json.loads(done.stdout) if done.stdout else {}

    def end_pod(self) -> None:
        """DEL, and its namespace goes."""
        assert self.call("DEL") == {}
        self.net.remove("pod-1")

    def ip(self, *words: str) -> str:
        return self.net.run("node", ["ip", *words]).stdout

    def snapshot(self) -> dict[str, Any]:
        """All that an operator would look at."""
        both = [self.ip("-N", "-d", family, "route", "show", "table", "all") for family in ("-4", "-6")]
        with self.net.inside("node"):
            values = {
                str(path): path.read_text().strip()
                for version in ("ipv4", "ipv6")
                for pattern in SYSCTLS
                for path in sorted(Path(f"/proc/sys/net/{version}").glob(pattern))
            }
        folders = (self.bin, self.conf, self.folder / "run", self.folder / "state")
        return {
            # Table local is the kernel's own: it follows addresses and sysctls, when duplicate detection is over.
            "route": [line for line in "\n".join(both).splitlines() if not re.search("fe80::|table 255", line)],
            "link": re.sub(r"\b(qlen|state) \S+", "", self.ip("-d", "link")),
            "nexthop": sorted(self.ip("-N", "-d", "nexthop").splitlines()),
            "rule": self.ip("rule") + self.ip("-6", "rule"),
            "nft": self.net.run("node", ["nft", "list", "ruleset"]).stdout,
            "sysctls": values,
            # What ends in .new a server is just writing.
            "folders": {
                str(f): sorted(p.name for p in f.iterdir() if p.suffix != ".new") for f in folders if f.is_dir()
            },
        }

    def changed(self) -> dict[str, Any]:
        """What is not as before."""
        now = self.snapshot()
        return {what: now[what] for what in now if now[what] != self.before[what]}

    def difference(self) -> list[str]:
        """The same, line by line."""
        one, two = (
            msgspec.json.format(msgspec.json.encode(s), indent=1).decode() for s in (self.before, self.snapshot())
        )
        return [line for line in difflib.ndiff(one.splitlines(), two.splitlines()) if line[0] in "+-"]

    def uninstall(self, *words: str, kill: bool = False) -> tuple[int, list[str]]:
        """In a process of its own: exit code (-9: it was killed after the first step that it did) and what it said."""
        said = self.folder / "said"
        folders = {"--run": "run", "--state": "state", "--bin": "bin", "--conf": "net.d"}
        options = uninstall.parse([*words, *(w for k, v in folders.items() for w in (k, str(self.folder / v)))], {})
        child = os.fork()
        if child == 0:
            code = 2
            try:
                with self.net.inside("node"), said.open("w") as out:
                    work = uninstall.uninstall(
                        options,
                        SystemClock(),
                        say=lambda line: print(line, file=out, flush=True),
                        step=lambda _: os.kill(os.getpid(), signal.SIGKILL) if kill else None,
                    )
                    asyncio.run(work)
                code = 0
            except AgentError as e:
                said.write_text(str(e))
                code = 1
            except BaseException as e:
                said.write_text(repr(e))
                raise
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text().splitlines()


def _at(spec: BGPPeerSpec, ends: routers.Ends) -> BGPPeerSpec:
    return replace(spec, peer_ip={routers.TOR4: ends.tor4, routers.TOR6: ends.tor6}[spec.peer_ip])


@pytest.fixture
def machine(net: Net, tmp_path: Path, shim_c: Path) -> Iterator[Machine]:
    made = Machine(net, tmp_path, shim_c)
    made.begin()
    yield made
    for log in ("agent.log", "speaker.log", "cni.log", "said"):
        if (tmp_path / log).exists():
            print(f"--- {log}\n{(tmp_path / log).read_text()[-3000:]}")


def test_a_node_is_as_before_and_peers_were_told(machine: Machine) -> None:
    machine.end_pod()
    machine.end_servers()
    code, said = machine.uninstall("--restore-forwarding")
    assert code == 0, said
    assert machine.changed() == {}, machine.difference()
    for tor in machine.tors:
        assert tor.table() == {}
        assert tor.ask("show", "protocols").count("Connection closed") == 2
    assert said[0] == "removed: the conflist: no new pod is ours"
    assert "removed: nftables table inet underlay" in said
    assert said[-1] == "the runtime's network from now on: 99-other.conflist"
    assert not any(line.startswith("kept") for line in said)
    assert machine.uninstall() == (0, ["nothing of ours was there", said[-1]])
    # Its DaemonSet goes last: it leaves nothing behind either.
    machine.end_speaker(signal.SIGTERM)
    assert machine.changed() == {}, machine.difference()


def test_forwarding_stays_on_and_is_told(machine: Machine) -> None:
    machine.end_pod()
    machine.end_servers()
    machine.net.sysctl("node", {"net.ipv4.conf.up0.rp_filter": "0"})
    code, said = machine.uninstall()
    assert code == 0, said
    kept = [line for line in said if line.startswith("kept")]
    why = "another network of this machine may need it by now"
    assert {
        "kept: sysctl net.ipv4.conf.up0.rp_filter=0: somebody has changed it since (before us: 1)",
        f"kept: sysctl net.ipv4.ip_forward=1, which was 0 before us: {why}; sysctl -w net.ipv4.ip_forward=0",
    } <= set(kept)
    commands = {line.rpartition("sysctl -w ")[2] for line in kept if why in line}
    assert "net.ipv6.conf.all.forwarding=0" in commands
    assert machine.changed().keys() == {"sysctls"}, machine.difference()
    for command in (*commands, "net.ipv4.conf.up0.rp_filter=1"):
        machine.net.run("node", ["sysctl", "-w", command])
    assert machine.changed() == {}, machine.difference()


def test_a_kill_after_each_step_and_it_goes_on_where_it_was(machine: Machine) -> None:
    machine.end_pod()
    machine.end_servers()
    machine.end_speaker(signal.SIGKILL)
    kills = 0
    while (done := machine.uninstall("--restore-forwarding", kill=True))[0] == -signal.SIGKILL:
        kills += 1
    assert done[0] == 0, done
    assert kills >= 8
    assert machine.changed() == {}, machine.difference()


def test_nothing_is_touched_while_pods_live_or_our_servers_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uninstall, "LOCK_LIMIT", 0.2)
    before = machine.snapshot()
    code, said = machine.uninstall("--keep-pods")
    assert (code, said[0].startswith("the CNI server of this node runs")) == (1, True)
    assert machine.snapshot() == before
    machine.end_servers()
    before = machine.snapshot()
    code, said = machine.uninstall()
    assert (code, said[0].startswith("1 pod has our network (ul")) == (1, True)
    assert machine.snapshot() == before
    # The pod may end meanwhile: its DEL waits in the queue, and is of no use any more.
    machine.end_pod()
    eventually(lambda: machine.uninstall("--restore-forwarding")[0] == 0)
    assert machine.changed() == {}, machine.difference()


def test_pods_may_keep_their_wiring(machine: Machine) -> None:
    machine.end_servers()
    code, said = machine.uninstall("--keep-pods", "--restore-forwarding")
    assert code == 0, said
    assert all(tor.table() == {} for tor in machine.tors)
    kept = "\n".join(line for line in said if line.startswith("kept"))
    assert "kept: 1 pods: link, routes and source check of each, ul" in kept
    assert "those pods need it" in kept
    machine.net.run("node", ["ping", "-c", "1", "-W", "20", machine.address])
    now = machine.snapshot()
    more = [line for line in now["route"] if line not in machine.before["route"]]
    assert len(more) == 2
    assert all("dev ul" in line and "proto 141" in line for line in more)
    assert now["folders"][str(machine.bin)] == ["bridge", "underlay"]
    assert "journal-boot-1" in now["folders"][str(machine.folder / "run")]
    # Once the pod is gone, so is the rest.
    machine.end_pod()
    eventually(lambda: machine.uninstall()[0] == 0)
    assert machine.changed().keys() <= {"sysctls"}


def test_a_directory_that_is_mounted_is_emptied(machine: Machine) -> None:
    state = machine.folder / "state"
    eventually(lambda: (state / "snapshot.json").exists())
    machine.end_pod()
    machine.end_servers()
    netns.mount(str(state), state, flags=netns.MS_BIND)
    try:
        code, said = machine.uninstall("--restore-forwarding")
        assert code == 0, said
        assert list(state.iterdir()) == []
        assert machine.uninstall()[1][0] == "nothing of ours was there"
    finally:
        netns.unmount(state)
