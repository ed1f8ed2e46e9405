from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bgp import conf, speaker
from agent.bgp.driver import exabgp_validate
from agent.bgp.model import Session

COMMAND = ("/usr/bin/python3", "-ISEs", "/relay.py", "/run")


def session(**changes: Any) -> Session:
    values: dict[str, Any] = {
        "name": "tor",
        "address": "10.0.1.2",
        "local_address": "10.0.1.1",
        "local_as": 65100,
        "peer_as": 65001,
        "router_id": "10.0.1.1",
        "families": ("ipv4 unicast", "ipv6 unicast"),
    }
    return Session(**{**values, **changes})


def secret(value: bytes) -> str:
    return base64.b64encode(value).decode()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"address": "10.0.1"}, "without a port"),
        ({"address": "10.0.1.2:179"}, "without a port"),
        ({"address": "fd00:1:0::2", "local_address": "fd00:1::1"}, "canonical"),
        ({"address": "fe80::1", "local_address": "fe80::2"}, "link-local"),
        ({"local_address": "fd00::1"}, "different families"),
        ({"local_address": "me"}, "local address"),
        ({"local_address": "10.0.1.2"}, "own address"),
        ({"router_id": "fd00::1"}, "router id"),
        ({"router_id": "0.0.0.0"}, "router id"),
        ({"local_as": 0}, "AS number"),
        ({"peer_as": 2**32}, "AS number"),
        ({"peer_as": 23456}, "AS number"),
        ({"hold_time": 2}, "hold time"),
        ({"restart_time": 4096}, "restart time"),
        ({"port": 0}, "port"),
        ({"families": ()}, "families"),
        ({"hops": 255}, "hops"),
        ({"hops": 1, "passive": True}, "socket"),
        ({"secret": "Secret s, key k"}, "Secret s, key k is not there"),
        ({"secret": "Secret s, key k", "password": secret(b"line\n")}, "a line's end"),
        ({"secret": "Secret s, key k", "password": secret(b"x" * 81)}, "1 to 80"),
        ({"secret": "Secret s, key k", "password": "?"}, "base64"),
        ({"families": ("ipv4 multicast",)}, "families"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], word: str) -> None:
    assert word in conf.problem(session(**changes))


GOOD = [
    session(),
    session(name='evil"; } neighbor 1.2.3.4 {', address="10.0.1.3", families=("ipv4 unicast",)),
    session(address="10.0.1.4", passive=True, restart_time=0, hold_time=3),
    session(address="10.0.1.5", port=1179, local_as=4_200_000_000, peer_as=4_200_000_001),
    session(address="fd00::2", local_address="fd00::1", hold_time=65535),
    session(address="10.0.1.6", hops=1),
    session(address="10.0.1.7", hops=254, secret="s", password=secret(b'a"b; \\}{' + b"x" * 70)),
    # Nothing but digits and a to f, which ExaBGP might take for another writing.
    session(address="10.0.1.8", secret="s", password=secret(b"deadbeef01")),
]


def test_exabgp_takes_what_passes(tmp_path: Path) -> None:
    assert [conf.problem(s) for s in GOOD] == [""] * len(GOOD)
    path = tmp_path / "exabgp.conf"
    path.write_text(conf.render(GOOD, speaker.relay_command(tmp_path)))
    assert asyncio.run(exabgp_validate(path)) == ""
    assert "neighbor 1.2.3.4" not in path.read_text()


@pytest.mark.parametrize("spoil", [lambda text: "", lambda text: text[:-40], lambda text: text.replace("9;", "2;")])
def test_exabgp_refuses_what_is_spoiled(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "exabgp.conf"
    path.write_text(spoil(conf.render([session()], speaker.relay_command(tmp_path))))
    assert asyncio.run(exabgp_validate(path)) != ""


def test_mark_names_the_content() -> None:
    assert conf.mark([], COMMAND) == ""
    assert conf.mark(GOOD, COMMAND) == conf.mark(list(reversed(GOOD)), COMMAND)
    assert conf.mark(GOOD, COMMAND) != conf.mark(GOOD[1:], COMMAND)
    assert conf.mark(GOOD, COMMAND) != conf.mark(GOOD, (*COMMAND, "--buffer", "1"))
    text = conf.render(GOOD, COMMAND)
    assert text.count(conf.mark(GOOD, COMMAND)) == len(GOOD)


def test_every_neighbor_ends_its_table_by_hand() -> None:
    text = conf.render(GOOD, COMMAND)
    assert text.count("manual-eor true;") == len(GOOD)
    assert text.count("graceful-restart disable;") == 1


@given(st.text(max_size=80))
def test_no_name_breaks_out_of_its_description(name: str) -> None:
    lines = conf.render([session(name=name)], COMMAND).splitlines()
    plain = conf.render([session()], COMMAND).splitlines()
    assert len(lines) == len(plain)
    assert sum(line.count("{") for line in lines) == sum(line.count("{") for line in plain)


def test_a_password_is_shown_to_nobody() -> None:
    made = session(secret="Secret s, key k", password=secret(b"hunter2"))
    assert secret(b"hunter2") not in repr(made)
    assert conf.problem(made) == ""
    for bad in (b"hunter2\n", b"hunter2" * 12):
        assert "hunter2" not in conf.problem(session(secret="s", password=secret(bad)))
        assert secret(bad) not in conf.problem(session(secret="s", password=secret(bad)))
