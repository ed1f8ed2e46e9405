"""What the relay remembers of sessions: bounded, in order, and each failure once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.bgp.past import DATA, KEPT, Past

SHUTDOWN = {"code": 6, "subcode": 2, "data": "0x6F6B", "message": "ok"}
WRONG_AS = {"code": 2, "subcode": 2, "data": "0x", "message": ""}


def states(past: Past, address: str = "10.0.0.1") -> list[tuple[str, str, int]]:
    return [(c["state"], c["reason"], c["times"]) for c in past.told().get(address, [])]


def test_a_session_comes_and_goes_with_what_was_said() -> None:
    past = Past()
    past.connected("10.0.0.1")
    assert past.up("10.0.0.1", 7, 100)["at"] == 100
    past.notified("10.0.0.1", "receive", SHUTDOWN)
    change = past.down("10.0.0.1", 7, "notification received (6,2)", 160, was_up=True)
    assert (change["generation"], change["notification"]) == (
        7,
        {"direction": "receive", "code": 6, "subcode": 2, "data": "0x6F6B"},
    )
    assert states(past) == [("up", "", 1), ("down", "notification received (6,2)", 1)]


def test_what_was_said_belongs_to_its_own_connection() -> None:
    past = Past()
    past.notified("10.0.0.1", "send", WRONG_AS)
    past.connected("10.0.0.1")
    assert past.down("10.0.0.1", 7, "closing connection", 1, was_up=False)["notification"] is None
    past.notified("10.0.0.1", "send", WRONG_AS)
    assert past.down("10.0.0.1", 7, "notification sent (2,2)", 2, was_up=False)["notification"] is not None
    assert past.down("10.0.0.1", 7, "closing connection", 3, was_up=False)["notification"] is None


def test_failures_in_a_row_are_counted_by_what_they_are() -> None:
    past = Past()
    past.down("10.0.0.1", 7, "closing connection", 0, was_up=True)
    for now in range(1, 101):
        past.down("10.0.0.1", 7, ("closing connection", "notification sent (2,2)")[now % 2], now, was_up=False)
    assert states(past) == [
        ("down", "closing connection", 1),
        ("failed", "notification sent (2,2)", 50),
        ("failed", "closing connection", 50),
    ]
    first, last = past.told()["10.0.0.1"][1:]
    assert (first["at"], first["last"], last["at"], last["last"]) == (1, 99, 2, 100)
    past.up("10.0.0.1", 8, 101)
    past.down("10.0.0.1", 8, "closing connection", 102, was_up=False)
    assert [times for _, _, times in states(past)] == [1, 50, 50, 1, 1]


def test_a_long_message_is_cut() -> None:
    past = Past()
    past.notified("10.0.0.1", "receive", {**SHUTDOWN, "data": "0x" + "41" * 5000})
    assert len(past.down("10.0.0.1", 7, "", 1, was_up=True)["notification"]["data"]) == DATA


@given(st.lists(st.tuples(st.sampled_from(["up", "down", "failed"]), st.sampled_from(["a", "b"])), max_size=80))
def test_it_is_bounded_and_in_order(told: list[tuple[str, str]]) -> None:
    past = Past()
    for now, (state, reason) in enumerate(told):
        if state == "up":
            past.up("10.0.0.1", now, now)
        else:
            past.down("10.0.0.1", now, reason, now, was_up=state == "down")
    changes = past.told().get("10.0.0.1", [])
    assert len(changes) <= KEPT
    assert [c["last"] for c in changes] == sorted(c["last"] for c in changes)
    if told:
        assert changes[-1]["state"] == told[-1][0]
    past.forget([])
    assert past.told() == {}
