"""The source check on a real kernel: what a pod may send, and whose hand the table is in."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni import nft, sources
from cni.netlink import NLM_F_CREATE, Netlink, NetlinkError
from cni.podnet import GATEWAY4, GATEWAY6
from ipam.model import News
from lab.net import Net
from store.clock import SystemClock
from tests.conftest import eventually, usable
from tests.netns.plugin import NODE, Plugin

NODE4, NODE6 = "10.0.0.1", "fd00::1"
TOR4, TOR6 = "10.0.0.2", "fd00::2"
OUTSIDE4, OUTSIDE6 = "192.0.2.7", "2001:db8::7"
#: As nft(8) says our table.
WANTED = r"""
table inet underlay {
    chain prerouting {
        type filter hook prerouting priority raw; policy accept;
        iifgroup 0x554c-0x554d fib saddr . iif oif missing counter drop \
            comment "a pod sends only from its own addresses"
    }
}
"""
FOREIGN = "table inet foreign { chain prerouting { type filter hook prerouting priority 0; policy accept; counter; }; }"


class Rack:
    """A node with two pods, and an uplink with everything else behind it."""

    def __init__(self, plugin: Plugin) -> None:
        self.plugin, self.net = plugin, plugin.net
        self.net.add("tor-1")
        self.net.link(NODE, "up", "tor-1", "south")
        self.net.address(NODE, "up", [f"{NODE4}/24", f"{NODE6}/64"])
        self.net.address("tor-1", "south", [f"{TOR4}/24", f"{TOR6}/64"])
        self.net.ip(NODE, [f"route add default via {TOR4}", f"route add ::/0 via {TOR6}"])
        self.net.ip("tor-1", [f"route add 10.244.0.0/16 via {NODE4}", f"route add fd00:10:244::/48 via {NODE6}"])

    def start(self) -> None:
        self.plugin.start()
        self.pods = [self.pod(1), self.pod(2)]
        # What it forwards the node asks for from its link-local address.
        eventually(lambda: not self.tentative(NODE, "up"))
        usable(self.net, "tor-1")

    def pod(self, number: int) -> tuple[str, str]:
        """Its IPv4 and its IPv6 address."""
        self.net.add(f"pod-{number}")
        answer = self.plugin.call("ADD", f"c{number}", f"pod-{number}")
        assert answer.code == 0, answer.text
        four, six = (address.partition("/")[0] for address in answer.addresses)
        return four, six

    def tentative(self, where: str, interface: str) -> bool:
        return "tentative" in self.net.run(where, ["ip", "-6", "address", "show", "dev", interface]).stdout

    def ping(self, where: str, target: str, *more: str) -> bool:
        return self.net.run(where, ["ping", "-c", "1", "-W", "20", *more, target], check=False).returncode == 0

    def table(self) -> str:
        return self.net.run(NODE, ["nft", "list", "table", "inet", "underlay"], check=False).stdout

    def drops(self) -> int:
        (count,) = re.findall(r"counter packets (\d+)", self.table())
        return int(count)

    def nft(self, text: str) -> None:
        self.net.run(NODE, ["nft", "-f", "-"], stdin=text)

    def hears(self, where: str, address: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.net.inside(where):
            listener = socket.socket(family, socket.SOCK_DGRAM)
        listener.bind((address, 9))
        listener.settimeout(30)
        return listener

    def send(self, source: str, target: str, what: bytes) -> None:
        """From pod-1; the kernel needs not know the source."""
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        level, option = (41, 75) if ":" in source else (socket.SOL_IP, 19)  # IPV6_TRANSPARENT, IP_TRANSPARENT
        with self.net.inside("pod-1"), socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(level, option, 1)
            # A link-local address has its interface beside it.
            sender.bind((source, 0, 0, socket.if_nametoindex("eth0")) if source.startswith("fe80") else (source, 0))
            sender.sendto(what, (target, 9))


@pytest.fixture
def rack(net: Net, tmp_path: Path, shim_c: Path) -> Rack:
    return Rack(Plugin(net, tmp_path, shim_c))


@pytest.fixture
def inside(net: Net) -> Iterator[Netlink]:
    net.add(NODE)
    with net.inside(NODE), Netlink(sources.NETFILTER) as netlink:
        yield netlink


def test_nothing_that_a_pod_sends_from_its_own_addresses_is_dropped(rack: Rack) -> None:
    rack.start()
    for family, flag in enumerate(("-4", "-6")):
        one, two = rack.pods[0][family], rack.pods[1][family]
        node, outside = ((NODE4, TOR4), (NODE6, TOR6))[family]
        assert rack.ping("pod-1", two)
        assert rack.ping("pod-1", node)
        assert rack.ping("pod-1", outside)
        assert rack.ping("tor-1", one)
        assert rack.ping(NODE, one)
        assert rack.ping("pod-1", one), "through its own loopback"
        rack.net.ip("pod-1", ["neigh flush all nud permanent", "neigh flush all"])
        assert rack.ping("pod-1", two), f"asks for its gateway and is answered ({flag})"
        rack.net.run(NODE, ["ip", flag, "neigh", "flush", "all"])
        assert rack.ping("pod-2", one), f"is asked for by the node ({flag})"
    assert rack.ping("pod-1", "fe80::ecee:eeff:feee:eeee%eth0")
    assert rack.drops() == 0


def test_a_pod_is_reached_through_a_service_of_its_own(rack: Rack) -> None:
    """The hairpin of kube-proxy: to a service's address, and back to the sender with the node's as source."""
    rack.start()
    one = rack.pods[0][0]
    rack.nft(
        "table ip nat { chain pre { type nat hook prerouting priority dstnat; "
        f"ip daddr 10.96.0.1 dnat to {one}; }}\n chain post {{ type nat hook postrouting priority srcnat; "
        f"ip saddr {one} ip daddr {one} masquerade; }}\n }}"
    )
    assert rack.ping("pod-1", "10.96.0.1")
    assert rack.drops() == 0


def test_what_a_pods_kernel_sends_without_an_address_passes(rack: Rack) -> None:
    """Duplicate detection and multicast reports come from ::, DHCP from 0.0.0.0 to everybody."""
    rack.start()
    rack.net.ip("pod-1", ["address add fe80::77/64 dev eth0"])
    eventually(lambda: not rack.tentative("pod-1", "eth0"))
    send_raw(rack.net, "255.255.255.255")
    assert rack.ping("pod-1", "fe80::ecee:eeff:feee:eeee%eth0", "-I", "fe80::77%eth0")
    assert rack.drops() == 0
    send_raw(rack.net, rack.pods[1][0])
    assert rack.drops() == 1, "0.0.0.0 to somebody"


@pytest.mark.parametrize("family", [0, 1])
def test_what_a_pod_sends_from_another_address_is_dropped(rack: Rack, family: int) -> None:
    rack.start()
    own, two, three = rack.pods[0][family], rack.pods[1][family], rack.pod(3)[family]
    node, tor = ((NODE4, TOR4), (NODE6, TOR6))[family]
    gateway, outside = ((GATEWAY4, OUTSIDE4), (GATEWAY6, OUTSIDE6))[family]
    dropped = 0
    for where, target in (("pod-2", two), (NODE, node), ("tor-1", tor)):
        with rack.hears(where, target) as listener:
            for false in (three, node, gateway, outside):
                rack.send(false, target, b"false")
                rack.send(own, target, b"own")
                heard, (sender, *_) = listener.recvfrom(64)
                assert (heard, sender) == (b"own", own), f"from {false} to {target}"
                dropped += 1
                assert rack.drops() == dropped


def test_arp_gets_a_pod_nothing_that_is_anothers(rack: Rack) -> None:
    """Neighbours are known by interface: what a pod claims by ARP counts on its own veth, where no other pod's route
    leads."""
    rack.start()
    two = rack.pods[1][0]
    with rack.net.inside("pod-1"), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0x0806))
        mac = raw.getsockname()[4]
        head = b"\xff" * 6 + mac + b"\x08\x06" + struct.pack("!HHBB", 1, 0x0800, 6, 4)
        for operation in (1, 2):
            claim = struct.pack("!H", operation) + mac + socket.inet_aton(two)
            raw.send(head + claim + b"\xff" * 6 + socket.inet_aton(two))
    rack.net.ip(NODE, ["neigh flush all"])
    with rack.hears("pod-2", two) as listener:
        with rack.net.inside(NODE), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"for two", (two, 9))
        assert listener.recv(64) == b"for two"


def test_a_flushed_table_comes_back_while_the_server_runs(rack: Rack) -> None:
    rack.plugin.start()
    whole = rack.table()
    assert whole
    rack.nft(f"flush ruleset\n{FOREIGN}")
    eventually(lambda: rack.table() == whole)
    assert "foreign" in rack.net.run(NODE, ["nft", "list", "tables"]).stdout
    assert "made anew" in rack.plugin.log.read_text()


def test_pods_start_where_the_kernel_refuses_the_table_and_are_held_once_it_does_not(rack: Rack) -> None:
    with rack.net.inside(NODE):
        other = Netlink(sources.NETFILTER)
    owned = ((nft.TABLE_NAME, nft.text("underlay")), (nft.TABLE_FLAGS, nft.u32(2)))  # NFT_TABLE_F_OWNER
    other.transaction(nft.SUBSYSTEM, (nft.message(nft.NEWTABLE, owned, NLM_F_CREATE),))
    rack.start()
    assert rack.ping("pod-1", rack.pods[1][0])
    said = "nftables table inet underlay: Operation not permitted (EPERM); pods can send from any address"
    assert rack.plugin.log.read_text().count(said) == 1
    other.close()
    eventually(lambda: "fib saddr" in rack.table())
    eventually(lambda: "the source check is in place" in rack.plugin.log.read_text())


def test_switched_off_it_is_gone_and_on_again_it_holds_for_the_pods_that_are_there(
    rack: Rack, monkeypatch: pytest.MonkeyPatch
) -> None:
    rack.start()
    two = rack.pods[1][0]
    rack.nft(FOREIGN)
    with rack.hears("pod-2", two) as listener:
        for setting in ("off", "on", "off"):
            monkeypatch.setenv("UNDERLAY_SOURCE_CHECK", setting)
            rack.plugin.server.send_signal(signal.SIGTERM)
            rack.plugin.server.wait(60)
            assert (rack.table() != "") == (setting != "on"), "an end changes nothing"
            rack.plugin.start()
            assert (rack.table() != "") == (setting == "on")
            assert "foreign" in rack.net.run(NODE, ["nft", "list", "tables"]).stdout
            rack.send(OUTSIDE4, two, b"false")
            rack.send(rack.pods[0][0], two, b"own")
            heard = listener.recv(64)
            assert heard == (b"own" if setting == "on" else b"false")
            if setting == "off":
                assert listener.recv(64) == b"own"


def test_a_restart_and_a_kill_leave_the_table_and_what_it_counted(rack: Rack) -> None:
    rack.start()
    rack.send(OUTSIDE4, NODE4, b"false")
    before = rack.table()
    assert rack.drops() == 1
    for number in (signal.SIGTERM, signal.SIGKILL):
        rack.plugin.server.send_signal(number)
        rack.plugin.server.wait(60)
        assert rack.table() == before
        rack.plugin.start()
        assert rack.table() == before


def test_an_older_table_is_changed_without_a_packet_between(rack: Rack) -> None:
    rack.start()
    two = rack.pods[1][0]
    old = WANTED.replace("0x554c-0x554d", "0x554c").replace("underlay {", "underlay {\n set old { type ipv4_addr; }")
    clock = SystemClock()
    with rack.hears("pod-2", two) as listener, rack.net.inside("pod-1"):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.setsockopt(socket.SOL_IP, 19, 1)
        sender.bind((OUTSIDE4, 0))
        child = os.fork()
        if child == 0:
            while True:
                sender.sendto(b"false", (two, 9))
        try:
            for _ in range(20):
                rack.nft(f"table inet underlay\ndelete table inet underlay\n{old}")
                with rack.net.inside(NODE):
                    sources.SourceCheck(clock, lambda _: None).look()
                assert "set old" not in rack.table()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert rack.drops() > 0
        rack.send(rack.pods[0][0], two, b"own")
        assert listener.recv(64) == b"own"


def test_a_kill_in_the_middle_of_a_change_leaves_the_old_table_or_the_new_one(net: Net) -> None:
    net.add(NODE)
    old = WANTED.replace("0x554c-0x554d", "0x554c")

    def listed() -> str:
        return net.run(NODE, ["nft", "list", "table", "inet", "underlay"]).stdout

    shown = []
    for text in (old, WANTED):
        net.run(NODE, ["nft", "-f", "-"], stdin=f"flush ruleset\n{text}")
        shown.append(re.sub(r"packets \d+ bytes \d+", "", listed()))
    for i in range(30):
        net.run(NODE, ["nft", "-f", "-"], stdin=f"flush ruleset\n{old}")
        child = os.fork()
        if child == 0:
            with net.inside(NODE), Netlink(sources.NETFILTER) as netlink:
                while True:
                    sources.make(netlink)
        time.sleep(i * 0.0005)  # where in its work the kill meets it is the point
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert re.sub(r"packets \d+ bytes \d+", "", listed()) in shown


# -- the table, byte by byte -------------------------------------------------------------------------------------------


def test_it_is_the_table_that_nft_makes(inside: Netlink, net: Net) -> None:
    sources.make(inside)
    (ours,) = sources._rules(inside)
    net.run(NODE, ["nft", "-f", "-"], stdin=f"flush ruleset\n{WANTED}")
    (theirs,) = sources._rules(inside)
    assert sources._whole(inside, sources._table(inside))
    handle = re.compile(re.escape(struct.pack("=HH", 12, 3)) + b".{8}", re.DOTALL)
    bodies = [handle.sub(b"", rule.body[nft.HEADER.size :], 1) for rule in (ours, theirs)]
    assert bodies[0] == bodies[1]


@pytest.mark.parametrize(
    "harm",
    [
        "flush ruleset",
        "delete table inet underlay",
        "flush chain inet underlay prerouting",
        "insert rule inet underlay prerouting accept",
        "flush chain inet underlay prerouting\nadd rule inet underlay prerouting counter drop",
        "flush chain inet underlay prerouting\n"
        "add rule inet underlay prerouting iifgroup 21836-21837 fib saddr . iif oif missing counter",
        "add table inet underlay { flags dormant; }",
        "chain inet underlay prerouting { policy drop; }",
    ],
)
def test_what_somebody_does_to_the_table_is_undone_and_other_tables_stay(inside: Netlink, net: Net, harm: str) -> None:
    def listed() -> str:
        return net.run(NODE, ["nft", "list", "ruleset"]).stdout

    check = sources.SourceCheck(SystemClock(), lambda _: None)
    check.look()
    whole = listed()
    net.run(NODE, ["nft", "-f", "-"], stdin=f"{harm}\n{FOREIGN}")
    foreign = net.run(NODE, ["nft", "list", "table", "inet", "foreign"]).stdout
    assert whole not in listed()
    check.look()
    assert sorted(listed().splitlines()) == sorted((whole + foreign).splitlines())


def test_nothing_is_sent_when_nothing_has_changed(inside: Netlink, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    check = sources.SourceCheck(SystemClock(), lambda _: None)
    check.look()
    check.look()
    monkeypatch.setattr(Netlink, "transaction", None)
    monkeypatch.setattr(Netlink, "dump", None)
    check.look()
    assert check.in_place


def test_a_refused_transaction_changes_nothing_and_has_the_kernels_reason(inside: Netlink) -> None:
    table = nft.message(nft.NEWTABLE, ((nft.TABLE_NAME, nft.text("t")),), NLM_F_CREATE)
    rule = nft.message(nft.NEWRULE, ((nft.RULE_TABLE, nft.text("t")), (nft.RULE_CHAIN, nft.text("none"))), NLM_F_CREATE)
    with pytest.raises(NetlinkError, match="ENOENT"):
        inside.transaction(nft.SUBSYSTEM, (table, rule, table))
    with pytest.raises(NetlinkError, match="ENOENT"):
        inside.get(nft.message(nft.GETTABLE, ((nft.TABLE_NAME, nft.text("t")),)))
    inside.transaction(nft.SUBSYSTEM, (table,))
    assert inside.get(nft.message(nft.GETTABLE, ((nft.TABLE_NAME, nft.text("t")),)))


def test_a_kernel_that_refuses_is_said_once_in_the_log_and_its_end_too(
    inside: Netlink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[News] = []
    check = sources.SourceCheck(SystemClock(), said.append)
    transaction = Netlink.transaction

    def refuse(*_: object) -> None:
        raise NetlinkError(95)

    monkeypatch.setattr(Netlink, "transaction", refuse)
    check.look()
    check.look()
    assert not check.in_place
    assert check.drops() == 0
    assert [record.message.count("--source-check off") for record in caplog.records] == [1]
    assert [news.normal for news in said] == [False, False]
    monkeypatch.setattr(Netlink, "transaction", transaction)
    check.look()
    assert check.in_place
    assert said[2].normal
    assert said[2].note.startswith("over: ")
    check.look()
    assert len(said) == 3


def send_raw(net: Net, target: str) -> None:
    """A packet from 0.0.0.0, as a DHCP client's, from pod-1."""
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 36, 1, 0, 64, 17, 0, socket.inet_aton("0.0.0.0"), socket.inet_aton(target)
    )
    total = sum(struct.unpack("!10H", header))
    total = (total >> 16) + (total & 0xFFFF)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    packet = header[:10] + struct.pack("!H", checksum) + header[12:] + struct.pack("!HHHH", 68, 67, 16, 0) + bytes(8)
    with net.inside("pod-1"), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0x0800))
        raw.send(bytes.fromhex("eeeeeeeeeeee") + raw.getsockname()[4] + b"\x08\x00" + packet)
