"""NOTIFICATIONs in words, as ExaBGP hands them over and as routers send them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bgp.notification import printable, read, reason_in_words, words


def told(direction: str, code: int, subcode: int, data: bytes = b"") -> dict[str, object]:
    """As the relay passes it on."""
    return {"direction": direction, "code": code, "subcode": subcode, "data": "0x" + data.hex().upper()}


def quoted(text: str) -> bytes:
    """As ExaBGP words a shutdown communication that it received."""
    return f'Shutdown Communication: "{text}"'.encode()


TOO_LONG = f"invalid Shutdown Communication (too large) length : 200 [0x{b'y'.hex() * 200}]".encode()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            told("receive", 6, 2, quoted("maintenance of rack 7")),
            'the peer said: Cease, Administrative Shutdown: "maintenance of rack 7"',
        ),
        (told("receive", 6, 2), "the peer said: Cease, Administrative Shutdown"),
        (told("receive", 6, 4, b"empty Shutdown Communication."), "the peer said: Cease, Administrative Reset"),
        # RFC 9003 allows 255 bytes, ExaBGP takes 128 and shows the rest in hexadecimal.
        (told("receive", 6, 2, TOO_LONG), f'the peer said: Cease, Administrative Shutdown: "{"y" * 200}"'),
        (told("send", 6, 2, b"\x04bye!"), 'we said: Cease, Administrative Shutdown: "bye!"'),
        (told("send", 6, 2, b"\x17Administrative Shutdown"), "we said: Cease, Administrative Shutdown"),
        (
            told("receive", 6, 9, b"\x06\x02\x04bye!"),
            'the peer said: Cease, Hard Reset: Cease, Administrative Shutdown: "bye!"',
        ),
        (
            told("receive", 6, 1, b"\x00\x01\x01\x00\x00\x03\xe8"),
            "the peer said: Cease, Maximum Number of Prefixes Reached: at most 1000 of ipv4",
        ),
        (
            told("send", 2, 2, b"ASN in OPEN (65001) did not match ASN expected (65009)"),
            "we said: OPEN Message Error, Bad Peer AS: ASN in OPEN (65001) did not match ASN expected (65009)",
        ),
        (told("receive", 2, 2, b"\xfd\xe9"), "the peer said: OPEN Message Error, Bad Peer AS: data 0xfde9"),
        (told("send", 4, 0, b"Hold Timer Expired"), "we said: Hold Timer Expired"),
        (told("receive", 4, 0), "the peer said: Hold Timer Expired"),
        (told("receive", 6, 77), "the peer said: Cease, subcode 77"),
        (told("receive", 77, 0), "the peer said: error code 77"),
    ],
)
def test_words(said: dict[str, object], text: str) -> None:
    notification = read(said)
    assert notification is not None
    assert words(notification) == text


def test_an_older_relay_tells_what_exabgp_says() -> None:
    assert read(None, "closing connection") is None
    notification = read(None, "notification received (6,3)")
    assert notification is not None
    assert words(notification) == "the peer said: Cease, Peer De-configured"
    assert reason_in_words("notification received (6,3)", notification) == words(notification)
    assert reason_in_words("closing connection", None) == "the connection was closed without a NOTIFICATION"
    assert reason_in_words("process problem", None) == "process problem"


@given(st.text(), st.integers(0, 255), st.integers(0, 255), st.booleans())
def test_nothing_that_a_peer_says_reaches_a_terminal_as_it_is(text: str, code: int, subcode: int, quote: bool) -> None:
    said = read(told("receive", code, subcode, quoted(text) if quote else text.encode("utf-8", "surrogatepass")))
    assert said is not None
    assert words(said).isprintable()
    assert len(words(said)) < 500
    assert printable(text).isprintable()


@given(st.binary(max_size=300), st.sampled_from(["send", "receive"]), st.integers(0, 255), st.integers(0, 12))
def test_any_data_is_taken(data: bytes, direction: str, code: int, subcode: int) -> None:
    said = read(told(direction, code, subcode, data))
    assert said is not None
    assert words(said).isprintable()
