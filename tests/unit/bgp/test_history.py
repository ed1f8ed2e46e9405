"""What the agent remembers of sessions: what the relay tells again is there once, and failures are news once."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.bgp.history import KEPT, History
from agent.bgp.model import Change, Notification, SessionChanges

TOR = "10.0.1.0"
WRONG_AS = Notification(sent=True, code=2, subcode=2)
SHUTDOWN = Notification(sent=False, code=6, subcode=2, text='"rack 7"')


def change(state: Any, at: int, **more: Any) -> Change:
    return Change(**{"state": state, "generation": 1, "at": at, "last": at, **more})


def history(*changes: Change) -> History:
    made = History()
    for one in changes:
        made.take(SessionChanges(peer=TOR, changes=(one,)))
    return made


def test_what_is_told_again_is_there_once() -> None:
    first = (change("up", 1), change("down", 5, reason="closing connection"))
    made = history(*first)
    assert not made.take(SessionChanges(peer=TOR, changes=first))
    assert made.take(SessionChanges(peer=TOR, changes=(*first, change("up", 9, generation=2))))
    assert [c.at for c in made.of(TOR)] == [1, 5, 9]


def test_one_more_failure_is_counted_and_is_no_news() -> None:
    made = history(change("failed", 1))
    assert not made.take(SessionChanges(peer=TOR, changes=(change("failed", 1, last=7, times=4),)))
    assert [(c.at, c.last, c.times) for c in made.of(TOR)] == [(1, 7, 4)]


def test_why_a_peer_is_down() -> None:
    said = 'the peer said: Cease, Administrative Shutdown: "rack 7"'
    assert history().why_down(TOR) == ""
    assert history(change("up", 1)).why_down(TOR) == ""
    down = change("down", 10, reason="notification received (6,2)", notification=SHUTDOWN)
    assert history(change("up", 1), down).why_down(TOR) == said
    # It refuses connections now: what it said explains that, for a while.
    assert history(down, change("failed", 20, reason="closing connection")).why_down(TOR) == said
    late = history(down, change("failed", 20, last=3600, times=90, reason="closing connection"))
    assert late.why_down(TOR) == "the connection was closed without a NOTIFICATION"
    assert late.last_said(TOR) == down
    wrong = change("failed", 3601, reason="notification sent (2,2)", notification=WRONG_AS)
    assert history(down, wrong).why_down(TOR) == "we said: OPEN Message Error, Bad Peer AS"


def test_peers_that_go_are_forgotten() -> None:
    made = history(change("up", 1))
    made.keep([TOR])
    assert made.of(TOR)
    made.keep([])
    assert made.of(TOR) == ()


@given(st.lists(st.tuples(st.sampled_from(["up", "down", "failed"]), st.integers(0, 50)), max_size=60))
def test_it_is_bounded_and_in_order(told: list[tuple[str, int]]) -> None:
    made = history(*(change(state, at, generation=i) for i, (state, at) in enumerate(told)))
    lasts = [c.last for c in made.of(TOR)]
    assert lasts == sorted(lasts)
    assert len(lasts) == min(len(told), KEPT)
