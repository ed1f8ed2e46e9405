from __future__ import annotations

from agent.bgp.stuck import Stuck


def test_who_waits_without_moving_is_stuck() -> None:
    stuck = Stuck()
    for _ in range(5):
        stuck.passed(1.0, ["a", "b", "c"])
        stuck.moved("b")
    assert stuck.longer_than(4.5) == ["a", "c"]
    stuck.passed(1.0, ["a", "b"])
    assert stuck.longer_than(5.5) == ["a"], "nothing is on its way to c any more"
    stuck.passed(1.0, ["c"])
    assert stuck.longer_than(1.5) == []
    assert stuck.longer_than(0.5) == ["c"]
