"""What a peer told, kept for one that cannot be asked again."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.bgp.events import Decoder
from agent.bgp.heard import Heard
from agent.bgp.model import Update

PREFIXES = ("10.9.0.0/24", "10.9.1.0/24", "10.9.2.0/24", "fd09::/64")
ENOUGH = 1 << 20


def line(message: dict[str, Any]) -> bytes:
    return json.dumps({"neighbor": {"address": {"peer": "10.0.1.2"}, "message": message}}).encode()


def update(told: dict[str, int], gone: list[str]) -> bytes:
    """``told``: prefix -> MED; they stand in one UPDATE for all, so the first one's."""
    announce: dict[str, Any] = {}
    for prefix in told:
        family, hops = ("ipv6 unicast", ["fd00::2", "fe80::2"]) if ":" in prefix else ("ipv4 unicast", ["10.0.1.2"])
        for hop in hops:
            announce.setdefault(family, {}).setdefault(hop, []).append({"nlri": prefix})
    withdraw: dict[str, Any] = {}
    for prefix in gone:
        withdraw.setdefault("ipv6 unicast" if ":" in prefix else "ipv4 unicast", []).append({"nlri": prefix})
    attribute = {"origin": "igp", "med": next(iter(told.values()), 0)}
    return line({"update": {"attribute": attribute, "announce": announce, "withdraw": withdraw}})


def held(lines: list[bytes]) -> dict[str, tuple[str, int]]:
    """What an agent that heard these lines knows."""
    decoder, found = Decoder(), dict[str, tuple[str, int]]()
    for each in lines:
        event = decoder.update(1, each)
        assert isinstance(event, Update | None), event
        if event is not None:
            for prefix in event.withdrawn:
                found.pop(prefix, None)
            found.update({r.prefix: (r.next_hop, r.attributes.med) for r in event.announced})
    return found


UPDATES = st.builds(
    lambda told, gone: update(told, [p for p in gone if p not in told]),
    st.dictionaries(st.sampled_from(PREFIXES), st.integers(0, 3)),
    st.lists(st.sampled_from(PREFIXES), unique=True),
)


@given(st.lists(UPDATES, max_size=12), st.lists(UPDATES, max_size=4), st.integers(0, 4))
def test_what_stands_is_told_again(before: list[bytes], between: list[bytes], turn: int) -> None:
    """Also while more is heard, which the agent hears at once."""
    heard = Heard(ENOUGH)
    for each in before:
        heard.take(each)
    again = heard.again()
    told = list(islice(again, turn))
    for each in between:
        heard.take(each)
        told.append(each)
    told += again
    assert held(told) == held(before + between)


@given(st.lists(UPDATES, max_size=12))
def test_each_prefix_is_told_once(before: list[bytes]) -> None:
    heard = Heard(ENOUGH)
    for each in before:
        heard.take(each)
    events = [Decoder().update(1, each) for each in heard.again()]
    told = [r.prefix for e in events if isinstance(e, Update) for r in e.announced]
    assert sorted(told) == sorted(held(before))


def test_an_end_of_rib_is_no_route() -> None:
    heard = Heard(ENOUGH)
    heard.take(line({"eor": {"afi": "ipv6", "safi": "unicast"}}))
    assert heard.whole
    assert list(heard.again()) == []


def test_too_much_or_unknown_is_not_kept() -> None:
    for heard, odd in ((Heard(300), update({PREFIXES[1]: 1}, [])), (Heard(ENOUGH), b'{"neighbor": 1}')):
        heard.take(update({PREFIXES[0]: 1}, []))
        assert heard.whole
        heard.take(odd)
        assert not heard.whole
        heard.take(update({PREFIXES[2]: 1}, []))
        assert list(heard.again()) == []


def test_what_is_told_over_and_over_does_not_fill_it() -> None:
    heard = Heard(600)
    for med in range(100):
        heard.take(update({PREFIXES[0]: med, PREFIXES[1]: med}, []))
    assert heard.whole
    assert held(list(heard.again())) == dict.fromkeys(PREFIXES[:2], ("10.0.1.2", 99))


@given(st.binary())
def test_no_bytes_raise(data: bytes) -> None:
    Heard(ENOUGH).take(data)
