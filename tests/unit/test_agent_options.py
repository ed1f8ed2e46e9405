"""What the agent is told at its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import parse
from agent.health import TURN_LIMIT
from agent.reconcile import FULL_PASS
from cni.endpoint import Address

NEEDED = ["--node", "node-1", "--store", "kube:"]


def test_a_flag_goes_before_its_variable_and_both_before_the_default() -> None:
    environment = {"UNDERLAY_RUN": "/run/a", "UNDERLAY_STATE": "/var/a", "UNDERLAY_LOG": "debug"}
    found = parse([*NEEDED, "--run", "/run/b"], environment)
    assert (found.node, found.store, found.namespace) == ("node-1", "kube:", "underlay-system")
    assert (found.run, found.state, found.log) == (Path("/run/b"), Path("/var/a"), "DEBUG")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", None),
        ("127.0.0.1:9465", Address(host="127.0.0.1", port=9465)),
        ("[::1]:9465", Address(host="::1", port=9465)),
        ("/run/m.sock", Address(path="/run/m.sock")),
    ],
)
def test_where_health_and_metrics_are_asked_for(text: str, wanted: Address | None) -> None:
    assert parse([*NEEDED, "--metrics", text], {}).metrics == wanted
    assert parse(NEEDED, {"UNDERLAY_METRICS": text}).metrics == wanted


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (NEEDED[:2], "--store is missing"),
        (NEEDED[2:], "UNDERLAY_NODE"),
        ([*NEEDED, "--log", "loud"], "--log loud: DEBUG"),
        ([*NEEDED, "--metrics", "localhost:9465"], "--metrics localhost:9465"),
        ([*NEEDED, "--metrics", "9465"], "write 127.0.0.1:9464"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_write(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(words, {})
    assert told in capsys.readouterr().err


def test_a_loop_may_miss_one_of_its_turns_and_not_two() -> None:
    assert TURN_LIMIT == 2 * FULL_PASS
