"""When the kernel's answer is not to be relied on, the sweep frees nothing: an interrupted dump, another namespace."""

from __future__ import annotations

from pathlib import Path

import pytest

from cni import podnet
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import NODE, Plugin

LINK1 = podnet.link_name("c1", "eth0")
#: Sweeps of ``faulty_cni.FAST``, which come every 0.2 s: two would free it.
MANY = 6


@pytest.fixture
def node(net: Net, tmp_path: Path, shim_c: Path) -> Plugin:
    """Two pods, and the link of the first is about to go without a DEL."""
    made = Plugin(net, tmp_path, shim_c)
    made.start()
    for i in (1, 2):
        net.add(f"pod-{i}")
        assert made.call("ADD", f"c{i}", f"pod-{i}").code == 0
    eventually(lambda: len(made.allocated()) == 4)
    return made


def reasons(node: Plugin) -> set[str]:
    return {c.reason for block in node.blocks() for c in block.status.conditions}


def test_an_interrupted_dump_frees_nothing(node: Plugin) -> None:
    node.interrupted.touch()
    node.net.run(NODE, ["ip", "link", "del", LINK1])
    eventually(lambda: node.log.read_text().count("no sweep this time") >= MANY)
    assert len(node.allocated()) == 4
    node.interrupted.unlink()
    eventually(lambda: len(node.allocated()) == 2)


def test_a_server_does_not_start_on_a_dump_that_was_interrupted(node: Plugin) -> None:
    """It would take every address for free of which nothing but a route is left."""
    node.server.kill()
    node.server.wait()
    next(node.run.glob("journal-*")).unlink()
    node.interrupted.touch()
    server = node.spawn()
    assert server.wait(60) == 1
    assert "a dump was interrupted" in node.log.read_text()
    node.interrupted.unlink()
    node.start()
    assert node.routes() == node.allocated()


def test_a_server_in_another_namespace_frees_nothing_and_says_so(node: Plugin) -> None:
    node.server.kill()
    node.server.wait()
    node.net.add("elsewhere")
    node.server = node.spawn(where="elsewhere")
    eventually(lambda: reasons(node) == {"WrongNamespace"})
    assert len(node.allocated()) == 4
    node.server.kill()
    node.server.wait()
    node.start()
    eventually(lambda: reasons(node) == set())
    assert len(node.allocated()) == 4
    # At home again, it works as before.
    node.net.run(NODE, ["ip", "link", "del", LINK1])
    eventually(lambda: len(node.allocated()) == 2)
