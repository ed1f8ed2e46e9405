"""Prefixes as numbers: agent/prefix.py against the standard library's ipaddress."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.prefix import Prefix, PrefixSet, address_number, is_inside, is_prefix, length_of, parse

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
#: What looks like an IPv4 address, and mostly is none.
NEARLY = st.text("0123456789.", max_size=16) | st.lists(st.integers(-1, 300).map(str), max_size=5).map(".".join)


@given(ADDRESSES)
def test_an_address_is_its_number(address: IPv4Address | IPv6Address) -> None:
    assert address_number(str(address)) == (address.max_prefixlen, int(address))


@given(NEARLY)
@example("1.2.3.04")
@example("1.2.3.\u0664")
@example(" 1.2.3.4")
def test_what_ipaddress_refuses_is_refused(text: str) -> None:
    try:
        wanted = int(IPv4Address(text))
    except ValueError:
        with pytest.raises(ValueError):
            address_number(text)
    else:
        assert address_number(text) == (32, wanted)


@given(ADDRESSES, st.integers(0, 128))
def test_a_prefix_is_what_ip_network_takes(address: IPv4Address | IPv6Address, length: int) -> None:
    text = f"{address}/{length}"
    try:
        network = ip_network(text)
    except ValueError:
        assert not is_prefix(text)
        return
    assert is_prefix(text)
    assert parse(text) == Prefix(network.max_prefixlen, int(network.network_address), length)
    assert length_of(text) == length


@given(ADDRESSES, ADDRESSES, st.integers(0, 128))
def test_inside(one: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address, length: int) -> None:
    network = ip_network(f"{other}/{min(length, other.max_prefixlen)}", strict=False)
    wanted = one.version == network.version and one in network
    assert is_inside(str(one), str(network)) is wanted
    assert PrefixSet([str(network)]).covers_address(str(one)) is wanted
    assert is_inside(str(network.network_address), str(network))
