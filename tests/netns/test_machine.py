"""``install check`` on real kernels: a namespace is made unfit, one thing after another."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctl.machine import Where, read
from ctl.preflight import Check, checks
from lab.net import Net
from store.clock import SystemClock
from tests.conftest import usable


class Node:
    def __init__(self, net: Net, root: Path) -> None:
        self.net, self.root = net, root
        (root / "etc/cni/net.d").mkdir(parents=True)
        net.add("node", forwarding=True)
        net.add("tor")
        net.link("node", "eth0", "tor", "down0")
        net.address("node", "eth0", ["192.0.2.1/24", "2001:db8::1/64"])
        net.address("tor", "down0", ["192.0.2.254/24", "2001:db8::fe/64"])
        net.ip("node", ["route add default via 192.0.2.254"])
        usable(net, "node", "tor")

    def check(self, *peers: str) -> dict[str, Check]:
        where = Where(root=self.root, run=self.root / "run", node="node-1", store="", peers=peers)
        with self.net.inside("node"):
            found = asyncio.run(read(where, SystemClock(), {}))
        return {check.name: check for check in checks(found)}


@pytest.fixture
def node(net: Net, tmp_path: Path) -> Iterator[Node]:
    yield Node(net, tmp_path)


def test_a_bare_machine_is_fit_and_what_needs_a_cluster_says_so(node: Node) -> None:
    before = node.net.run("node", ["ip", "-d", "link"]).stdout
    found = node.check()
    assert {name: c for name, c in found.items() if c.result not in ("ok", "skipped")} == {}
    assert sum(c.result == "ok" for c in found.values()) == 14
    assert "--store kube:" in found["pools"].found
    # Trials leave nothing.
    assert node.net.run("node", ["ip", "-d", "link"]).stdout == before
    assert node.net.run("node", ["nft", "list", "ruleset"]).stdout == ""


def test_what_is_unfit_is_found(node: Node) -> None:
    net = node.net
    net.sysctl("node", {"net.ipv4.conf.eth0.rp_filter": "1", "net.ipv4.ip_forward": "0"})
    net.sysctl("node", {"net.ipv6.conf.default.disable_ipv6": "1"})
    net.ip("node", ["link add cali0 type veth peer name cali1", "link set eth0 mtu 1200"])
    rules = "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }; "
    net.run("node", ["nft", rules + "add table inet firewalld"])
    (node.root / "etc/cni/net.d/05-other.conflist").write_text('{"plugins": [{"type": "bridge"}]}')
    (node.root / "etc/cni/net.d/99-broken.conf").write_text("{")
    (node.root / "etc/ufw").mkdir()
    (node.root / "etc/ufw/ufw.conf").write_text("ENABLED=yes\n")
    with net.inside("node"):
        waiting = socket.create_server(("192.0.2.1", 179))
    try:
        found = node.check("192.0.2.254", "198.51.100.1")
    finally:
        waiting.close()
    wrong = {name: (c.result, c.found) for name, c in found.items() if c.result not in ("ok", "skipped")}
    assert wrong.pop("port-179")[1].endswith(" at 192.0.2.1")
    peers = wrong.pop("peers")
    assert peers[0] == "failure"
    assert "192.0.2.254 (192.0.2.254): Connection refused" in peers[1]
    assert wrong == {
        "ipv6": ("warning", "off"),
        "forwarding": ("warning", "net.ipv4.ip_forward = 0"),
        "rp-filter": ("warning", "strict on eth0"),
        "mtu": ("failure", "eth0: 1200"),
        "other-networks": ("failure", "sorts before 10-underlay.conflist: 05-other.conflist (bridge)"),
        "remains": ("warning", "cali0 of Calico, cali1 of Calico"),
        "forward-policy": ("warning", "what no rule accepts is dropped: ip filter FORWARD"),
        "firewall": ("warning", "firewalld, ufw"),
    }


def test_a_peer_that_answers(node: Node) -> None:
    with node.net.inside("tor"):
        tor = socket.create_server(("2001:db8::fe", 179), family=socket.AF_INET6)
    try:
        assert node.check("2001:db8::fe")["peers"].found == "1 answer at port 179"
    finally:
        tor.close()


def test_without_the_right_to_try_it_is_skipped(node: Node, tmp_path: Path) -> None:
    words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    program = "import sys; from ctl.main import main; sys.exit(main())"
    argv = [*words, sys.executable, "-P", "-c", program, "install", "check", "--root", str(tmp_path)]
    done = node.net.run("node", argv, check=False)
    line = next(line for line in done.stdout.splitlines() if line.startswith("veth"))
    assert "skipped" in line, done.stdout + done.stderr
    assert "CAP_SYS_ADMIN" in line
