"""ipam check on a node: a real journal and a real kernel, and a CNI server that has written both."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from cni import podnet
from lab.net import Net
from store.model import Meta, Node, release_wanted
from tests.conftest import eventually
from tests.netns.plugin import NODE, ROOT, Plugin

LINK1 = podnet.link_name("c1", "eth0")


class Checked(Plugin):
    """Two pods on a node whose server has said so in the store."""

    def __init__(self, net: Net, folder: Path, shim: Path) -> None:
        super().__init__(net, folder, shim)
        self.create(Node(metadata=Meta(name=NODE)))
        self.start()
        self.addresses = {}
        for i in (1, 2):
            net.add(f"pod-{i}")
            answer = self.call("ADD", f"c{i}", f"pod-{i}")
            assert answer.code == 0, answer.text
            self.addresses[i] = [a.partition("/")[0] for a in answer.addresses]
        eventually(lambda: len(self.allocated()) == 4)

    def underlayctl(self, *words: str, where: str = NODE) -> tuple[int, str, str]:
        program = "import sys; from ctl.main import main; sys.exit(main())"
        argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", program, "--store", self.store, *words]
        done = self.net.run(where, argv, check=False)
        return done.returncode, done.stdout, done.stderr

    def check(self, code: int, **more: str) -> list[dict[str, Any]]:
        words = ("ipam", "check", "-o", "json", "--node", NODE, "--run", str(self.run))
        got, out, err = self.underlayctl(*words, **more)
        assert got == code, (out, err)
        return json.loads(out)["findings"]


@pytest.fixture
def node(net: Net, tmp_path: Path, shim_c: Path) -> Checked:
    return Checked(net, tmp_path, shim_c)


def found(findings: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(f["kind"], f["address"]) for f in findings}


def test_a_node_at_work_is_clean(node: Checked) -> None:
    assert node.check(0) == []
    assert node.call("DEL", "c1", "pod-1").code == 0
    assert node.check(0) == []
    code, out, _ = node.underlayctl("ipam", "check", "--node", NODE, "--run", str(node.run))
    assert (code, out.endswith("journal of node-1, kernel of node-1\n")) == (0, True)


def test_a_link_that_is_gone_is_a_leak_of_its_addresses_until_the_sweep(node: Checked) -> None:
    node.server.send_signal(signal.SIGSTOP)
    node.net.run(NODE, ["ip", "link", "del", LINK1])
    assert found(node.check(1)) == {("AllocationWithoutRoute", a) for a in node.addresses[1]}
    node.server.send_signal(signal.SIGCONT)
    eventually(lambda: len(node.allocated()) == 2)
    assert node.check(0) == []


def test_a_route_that_is_gone_is_none(node: Checked) -> None:
    address = node.addresses[2][0]
    node.net.run(NODE, ["ip", "route", "del", address])
    assert found(node.check(1)) == {("RouteMissing", address)}


def test_a_route_without_a_record_is_found(node: Checked) -> None:
    address = "10.244.200.1"
    node.net.run(NODE, ["ip", "route", "add", address, "dev", LINK1, "proto", "141", "metric", "32"])
    assert found(node.check(1)) == {("RouteWithoutAllocation", address)}


def test_a_journal_that_is_gone_is_not_taken_for_an_empty_one(node: Checked) -> None:
    next(node.run.glob("journal-*")).unlink()
    assert node.check(2) == []


def test_another_namespace_is_not_taken_for_the_nodes(node: Checked) -> None:
    assert node.check(2, where="pod-1") == []


def test_a_server_that_starts_again_is_clean(node: Checked) -> None:
    """It writes its blocks anew, with its own number; until then the check waits."""
    node.server.kill()
    node.server.wait()
    node.start()
    assert node.check(0) == []


def test_an_address_in_use_is_kept_with_a_reason(node: Checked) -> None:
    code, out, err = node.underlayctl("ipam", "release", "--ip", node.addresses[1][0])
    assert (code, out) == (1, "")
    assert f"{node.addresses[1][0]}: node-1 keeps it for pod default/pod-1 (underlay/c1/eth0): " in err
    assert "has not said why" not in err
    assert node.check(0) == []


def test_a_leaked_address_is_released_by_its_owner(node: Checked) -> None:
    address = node.addresses[1][0]
    node.server.send_signal(signal.SIGSTOP)
    node.net.run(NODE, ["ip", "link", "del", LINK1])
    code, _, err = node.underlayctl("ipam", "release", "--ip", address)
    assert (code, "node-1 was asked, and has not answered within 5 s" in err) == (1, True)
    node.server.send_signal(signal.SIGCONT)
    eventually(lambda: address not in node.allocated())
    eventually(lambda: not any(release_wanted(b) for b in node.blocks()))
