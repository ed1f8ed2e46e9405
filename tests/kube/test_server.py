"""The whole way of an ADD: shim, ``underlay-cni`` as a process on a node of its own, the kernel, and a real API server
that it knows by the token of its pod. The API server goes away, comes back, and is killed again and again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.kube.installed import CNI, Installed
from lab.kube.plane import write_kubeconfig
from lab.net import Net
from lab.relay import relay
from store.model import IPPool
from tests.conftest import eventually
from tests.ipam_fakes import pool
from tests.netns.plugin import NODE, ROOT, Answer, Plugin

API = "kube-apiserver"
#: Of a block.
ADDRESSES = 16


class Real(Plugin):
    """``people`` is an operator's store, ``store`` what the pod of ``underlay-cni`` on node-1 may do."""

    def __init__(self, net: Net, folder: Path, shim: Path, installed: Installed, *pools: IPPool) -> None:
        super().__init__(net, folder, shim, pools=())
        self.cluster = installed.cluster
        kubeconfig = folder / "cni.kubeconfig"
        write_kubeconfig(kubeconfig, self.cluster.url, self.cluster.ca, token=installed.tokens[CNI, NODE])
        self.store = f"kube:{kubeconfig}"
        self.people = f"kube:{self.cluster.kubeconfig()}"
        for each in pools:
            self.create(each)
        self._pods = (f"p{i}" for i in itertools.count())

    def add(self) -> tuple[str, Answer]:
        """ADD of a new pod: its name, and what came of it."""
        name = next(self._pods)
        self.net.add(name)
        return name, self.call("ADD", name, name)

    def delete(self, name: str) -> None:
        answer = self.call("DEL", name, name)
        assert answer.code == 0, answer.text
        self.net.remove(name)

    def check(self) -> list[dict[str, object]]:
        """What ``ipam check`` finds on the node."""
        program = "import sys; from ctl.main import main; sys.exit(main())"
        argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", program, "--store", self.people]
        argv += ["ipam", "check", "-o", "json", "--node", NODE, "--run", str(self.run)]
        done = self.net.run(NODE, argv, check=False)
        assert done.returncode in (0, 1), done.stderr
        findings: list[dict[str, object]] = json.loads(done.stdout)["findings"]
        assert bool(findings) == done.returncode
        return findings


@contextlib.contextmanager
def reached(net: Net, url: str) -> Iterator[None]:
    """Within the node's namespace the API server is where it is outside of it."""
    host, _, port = url.removeprefix("https://").partition(":")
    with net.inside(NODE):
        listener = socket.create_server((host, int(port)))
    loop = asyncio.new_event_loop()
    carrying = loop.create_task(relay(listener, host, int(port)))

    def carry() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(carrying)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(carrying.cancel)
        thread.join(10)
        loop.close()
        listener.close()


@pytest.fixture
def node(installed: Installed, net: Net, tmp_path: Path, shim_c: Path) -> Iterator[Real]:
    made = Real(net, tmp_path, shim_c, installed, pool("four", "10.1.0.0/26", 28), pool("six", "fd00:1::/120", 122))
    with reached(net, installed.cluster.url):
        made.start()
        yield made
        # Before the relay ends: what it carries would be told as lost.
        made.server.kill()
        made.server.wait()


def addresses(answer: Answer) -> set[str]:
    assert answer.code == 0, answer.text
    return {a.partition("/")[0] for a in answer.addresses}


def test_with_the_api_server_away_every_free_address_is_handed_out_and_then_told(node: Real) -> None:
    up = [node.add() for _ in range(5)]
    node.cluster.kill(API)
    down = [node.add() for _ in range(ADDRESSES - len(up))]
    held = {name: addresses(answer) for name, answer in (*up, *down)}
    assert len(set().union(*held.values())) == 2 * ADDRESSES
    began = time.monotonic()
    _, refused = node.add()
    assert time.monotonic() - began < 5, "a kubelet that tries again later is better off than one that waits"
    assert (refused.code, refused.json["code"]) == (1, 11)
    assert "API server https://127.0.0.1" in refused.json["details"]
    # What comes free is handed out, still with nobody to ask.
    name, given = held.popitem()
    node.delete(name)
    again, answer = node.add()
    assert {a for a in addresses(answer) if ":" not in a} == {a for a in given if ":" not in a}
    held[again] = addresses(answer)

    # A server that starts now knows from its journal what lives.
    node.server.kill()
    node.server.wait()
    node.server = node.spawn()
    eventually(node.answers)
    name, given = held.popitem()
    assert addresses(node.call("ADD", name, name)) == given
    _, refused = node.add()
    assert (refused.code, refused.json["code"]) == (1, 11)
    assert "the blocks cannot be read yet" in refused.json["details"]
    node.delete(name)

    node.cluster.start_apiserver()
    # The next block comes, which could not be claimed ahead.
    eventually(lambda: len({b.spec.cidr for b in node.blocks()}) == 3)
    name, answer = node.add()
    held[name] = addresses(answer)
    living = set().union(*held.values())
    eventually(lambda: node.allocated() == living)
    assert node.routes() == living
    assert node.check() == []


def test_journal_mirror_and_api_server_lost_at_once_leave_what_lives_alone(node: Real) -> None:
    """The journal is deleted, the mirror is behind by half of the pods, and the API server is away at the start."""
    pods = [node.add()[0] for _ in range(4)]
    eventually(lambda: len(node.allocated()) == 8)
    node.cluster.kill(API)
    pods += [node.add()[0] for _ in range(4)]
    living = node.routes()
    assert len(living) == 16
    node.server.kill()
    node.server.wait()
    next(node.run.glob("journal-*")).unlink()
    node.server = node.spawn()
    eventually(node.answers)
    _, refused = node.add()
    assert (refused.code, refused.json["code"]) == (1, 11)

    node.cluster.start_apiserver()
    eventually(lambda: node.call("STATUS", conf=node.conf("1.1.0")).code == 0)
    given: set[str] = set()
    for _ in range(ADDRESSES):
        given |= addresses(node.add()[1])
    assert not given & living
    assert node.routes() == given | living
    eventually(lambda: node.allocated() == given | living)
    # Each pod that was forgotten has its own addresses when the runtime asks again, and can be deleted.
    for name in pods:
        assert addresses(node.call("ADD", name, name)) < living
        node.delete(name)
    eventually(lambda: node.allocated() == given)
    assert node.check() == []


def test_an_api_server_that_is_killed_under_way_is_not_noticed_by_pods(node: Real) -> None:
    pods: dict[str, set[str]] = {}

    def one() -> None:
        if len(pods) >= ADDRESSES // 2:
            node.delete(min(pods))
            del pods[min(pods)]
        name, answer = node.add()
        pods[name] = addresses(answer)

    def churn(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            one()

    for seconds in (0.5, 0.3, 1.5, 0.7):
        churn(0.3)
        node.cluster.kill(API)
        for _ in range(5):  # who waits for the API server would wait for ever
            one()
        node.cluster.start_apiserver(wait=False)
        churn(seconds)
    node.cluster.wait_for(API, lambda: node.cluster.request("GET", "/readyz"))
    living = set().union(*pods.values())
    assert len(living) == 2 * len(pods)
    eventually(lambda: node.allocated() == living)
    assert node.routes() == living
    assert node.check() == []
