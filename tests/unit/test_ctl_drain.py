"""``underlayctl node drain-routes``: what it asks of a node's agent, and what it makes of the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctl import drain
from store.base import Store
from store.model import ANNOTATION_DRAIN, BGPNodeStatus, BGPNodeStatusStatus, Condition, Meta, Node, SessionStatus
from tests.ctl_fakes import Ctl


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ctl:
    made = Ctl(tmp_path, capsys)
    made.on_store(lambda store: store.create(Node(metadata=Meta(name="node-1", annotations={"mine": "stays"}))))
    return made


def says(ctl: Ctl, *conditions: tuple[str, str], sent: int = 2) -> None:
    """The node's agent."""

    async def say(store: Store) -> None:
        session = SessionStatus(
            peer="tor-1", address="10.0.1.0", as_number=65001, state="Established", wanted=2, sent=sent
        )
        told = tuple(Condition(type=kind, status="True", reason=kind, message=words) for kind, words in conditions)
        made = await store.create(BGPNodeStatus(metadata=Meta(name="node-1")))
        status = BGPNodeStatusStatus(sessions=(session,), conditions=told)
        await store.update_status(BGPNodeStatus(metadata=made.metadata, status=status))

    ctl.on_store(say)


def annotations(ctl: Ctl) -> dict[str, str]:
    return dict(ctl.on_store(lambda store: store.get(Node, "node-1")).metadata.annotations)


def test_done_when_the_agent_says_that_nothing_is_announced(ctl: Ctl) -> None:
    says(ctl, ("RoutesDrained", "asked for: nothing is announced"))
    assert ctl.ok("node", "drain-routes", "node-1") == "node-1: asked for: nothing is announced\n"
    assert annotations(ctl) == {"mine": "stays", ANNOTATION_DRAIN: "yes"}


def test_what_stays_and_why_and_the_command_ends_with_1(ctl: Ctl) -> None:
    says(ctl, ("RoutesDraining", "asked for: 10.244.1.0/26 stays until its last pod is gone: 3 live in it"))
    code, out, err = ctl("node", "drain-routes", "node-1", "--wait", "0")
    assert (code, out) == (1, "node-1: asked for: 10.244.1.0/26 stays until its last pod is gone: 3 live in it\n")
    assert err == "underlayctl: node-1 still announces after 0 s; it goes on; --undo ends it\n"


def test_an_agent_that_does_not_answer_is_said(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_ANSWER", 0.1)
    code, out, err = ctl("node", "drain-routes", "node-1")
    assert (code, out) == (1, "")
    assert (
        err == "underlayctl: the agent of node-1 does not answer: it will begin when it runs; --undo takes that back\n"
    )


def test_a_node_that_is_not_there(ctl: Ctl) -> None:
    for undo in ((), ("--undo",)):
        code, out, err = ctl("node", "drain-routes", "node-9", *undo)
        assert (code, out, err) == (1, "", "underlayctl: there is no Node node-9: underlayctl get nodes\n")


def test_force_asks_first(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.confirm", lambda *_: False)
    code, _, err = ctl("node", "drain-routes", "node-1", "--force")
    assert (code, err) == (1, "underlayctl: nothing is changed\n")
    assert annotations(ctl) == {"mine": "stays"}
    says(ctl, ("RoutesDrained", "asked for: nothing is announced"))
    ctl.ok("node", "drain-routes", "node-1", "--force", "--yes")
    assert annotations(ctl)[ANNOTATION_DRAIN] == "force"


def test_undo_waits_until_every_peer_was_told(ctl: Ctl) -> None:
    says(ctl)
    ctl.on_store(lambda store: store.list(Node))
    assert ctl.ok("node", "drain-routes", "node-1", "--undo") == "node-1: its blocks are announced as before\n"
    assert annotations(ctl) == {"mine": "stays"}


@pytest.mark.parametrize(
    ("conditions", "sent", "why"),
    [
        ((("RoutesDrained", "..."),), 2, "its agent has not taken it back"),
        ((), 1, "tor-1 has 1 of 2 prefixes"),
    ],
)
def test_undo_says_what_is_missing(ctl: Ctl, conditions: tuple[tuple[str, str], ...], sent: int, why: str) -> None:
    says(ctl, *conditions, sent=sent)
    code, _, err = ctl("node", "drain-routes", "node-1", "--undo", "--wait", "0")
    assert (code, err) == (1, f"underlayctl: node-1: after 0 s {why}\n")
