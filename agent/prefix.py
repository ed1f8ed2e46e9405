"""Prefixes as numbers, and sets of them that answer "equal to or inside?" quickly. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

_OCTETS: Final = {str(number): number for number in range(256)}


class Prefix(NamedTuple):
    """``bits`` is the family's width (32, 128), ``network`` the address as a number, ``length`` the mask's."""

    bits: int
    network: int
    length: int


def parse(text: str) -> Prefix:
    """The prefix that ``text`` says, as ``10.1.0.0/16``. Raises ValueError, also for bits outside the mask."""
    address, _, mask = text.partition("/")
    bits, number = address_number(address)
    length = int(mask) if mask.isascii() and mask.isdigit() else -1
    if not 0 <= length <= bits:
        raise ValueError(f"{text!r}: expected an address, '/' and a length up to {bits}")
    if number & ((1 << (bits - length)) - 1):
        raise ValueError(f"{text!r}: bits are set outside its mask")
    return Prefix(bits, number, length)


def address_number(text: str) -> tuple[int, int]:
    """An address as (width of its family, number). Raises ValueError."""
    if ":" in text:
        return 128, int(IPv6Address(text))
    try:
        a, b, c, d = text.split(".")
        return 32, _OCTETS[a] << 24 | _OCTETS[b] << 16 | _OCTETS[c] << 8 | _OCTETS[d]
    except (KeyError, ValueError):
        return 32, int(IPv4Address(text))  # says what is wrong with it


def is_prefix(text: str) -> bool:
    """Whether ``parse`` takes it."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def length_of(prefix: str) -> int:
    """The mask's length of a prefix."""
    return int(prefix.partition("/")[2])


def is_inside(address: str, prefix: str) -> bool:
    """Whether the address is in the prefix; False if they are of different families."""
    return (":" in address) == (":" in prefix) and subnet(address, length_of(prefix)) == prefix


@lru_cache(maxsize=4096)
def subnet(address: str, length: int) -> str:
    """The prefix of that length that holds the address, in canonical text."""
    bits, number = address_number(address)
    network = number >> (bits - length) << (bits - length)
    return f"{IPv4Address(network) if bits == 32 else IPv6Address(network)}/{length}"


def covering(text: str) -> tuple[str, ...]:
    """The address (as a prefix) or prefix itself, and every one that it is inside of, the longest first. Raises
    ValueError as ``parse``."""
    address, slash, _ = text.partition("/")
    _, _, length = parse(text if slash else f"{text}/{128 if ':' in text else 32}")
    return tuple(subnet(address, n) for n in range(length, -1, -1))


class PrefixSet:
    """A set that knows whether a prefix is equal to or inside one of its own: one look-up per length in the set."""

    def __init__(self, texts: Iterable[str]) -> None:
        """``texts`` are prefixes; raises ValueError as ``parse``."""
        tables: dict[tuple[int, int], set[int]] = {}
        for text in texts:
            bits, network, length = parse(text)
            tables.setdefault((bits, length), set()).add(network >> (bits - length))
        self._tables: dict[int, list[tuple[int, set[int]]]] = {32: [], 128: []}
        for bits, length in sorted(tables):
            self._tables[bits].append((length, tables[bits, length]))

    def covers(self, prefix: Prefix) -> bool:
        bits, network, length = prefix
        for own, table in self._tables[bits]:
            if own > length:
                return False
            if network >> (bits - own) in table:
                return True
        return False

    def covers_address(self, text: str) -> bool:
        """Whether the address is inside. Raises ValueError."""
        bits, number = address_number(text)
        return self.covers(Prefix(bits, number, bits))
