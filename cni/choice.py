"""What a pod's annotations, and its namespace's, say of the pools and addresses that it wants. Pure.

Names and values are those of Calico's documentation ("Use a specific IP address", "Assign IP addresses based on
topology", v3.30): a JSON list of texts. Each has a name of ours beside Calico's, and ours goes before it.

    ipv4pools, ipv6pools   names or CIDRs of pools, tried in their order; of the pod, else of its namespace
    ipAddrs                addresses, one of a family at most: all that the pod gets; of the pod alone
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Final

import msgspec

from cni.errors import CNIError

OURS: Final = "underlay.network/"
CALICOS: Final = "cni.projectcalico.org/"


class BadAnnotation(CNIError):
    """An annotation cannot be read; the message names it and whose it is."""


class Choice(msgspec.Struct, frozen=True):
    """What is wanted: nothing of a family is whatever comes. ``said`` names the annotations, for messages."""

    pools4: tuple[str, ...] = ()
    pools6: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    said: str = ""

    @property
    def pools(self) -> tuple[str, ...]:
        return self.pools4 + self.pools6

    @property
    def complete(self) -> bool:
        """The namespace has nothing to add."""
        return bool(self.addresses or (self.pools4 and self.pools6))


def of_pod(annotations: Mapping[str, str], pod: str) -> Choice:
    """What the pod (``namespace/name``) itself says. BadAnnotation."""
    found = {name: _read(annotations, name, f"pod {pod}") for name in ("ipv4pools", "ipv6pools", "ipAddrs")}
    (pools4, by4), (pools6, by6), (texts, by) = found.values()
    return Choice(pools4, pools6, _addresses(texts, by), _joined(by4, by6, by))


def with_namespace(choice: Choice, annotations: Mapping[str, str], namespace: str) -> Choice:
    """What holds where the pod's namespace says ``annotations``: they count for families of which the pod says none.
    BadAnnotation."""
    if choice.complete:
        return choice
    where = f"namespace {namespace}"
    pools4, by4 = (choice.pools4, "") if choice.pools4 else _read(annotations, "ipv4pools", where)
    pools6, by6 = (choice.pools6, "") if choice.pools6 else _read(annotations, "ipv6pools", where)
    return Choice(pools4, pools6, (), _joined(choice.said, by4, by6))


def _read(annotations: Mapping[str, str], name: str, whose: str) -> tuple[tuple[str, ...], str]:
    """The list, and what says so; empty where nothing does."""
    key = next((prefix + name for prefix in (OURS, CALICOS) if prefix + name in annotations), "")
    if not key:
        return (), ""
    by, text = f"annotation {key} of {whose}", annotations[key]
    example = '["10.244.0.7"]' if name == "ipAddrs" else '["pods-v4"]'
    try:
        values = msgspec.json.decode(text, type=tuple[str, ...])
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise BadAnnotation(f"{by}: {_shown(text)}: write a JSON list of texts, as {example} ({e})") from e
    if not values or not all(values):
        raise BadAnnotation(f"{by}: {_shown(text)}: write a JSON list of texts, as {example}, or leave it out")
    return tuple(dict.fromkeys(values)), by


def _addresses(texts: tuple[str, ...], by: str) -> tuple[str, ...]:
    families = set()
    addresses = []
    for text in texts:
        try:
            ip = ip_address(text)
        except ValueError:
            raise BadAnnotation(f"{by}: {_shown(text)} is no IP address: write one, as 10.244.0.7 or fd00::7") from None
        if ip.version in families:
            raise BadAnnotation(
                f"{by}: {_shown(text)} is a second IPv{ip.version} address: write one of a family at most"
            )
        families.add(ip.version)
        addresses.append(str(ip))
    return tuple(addresses)


def _joined(*parts: str) -> str:
    return ", ".join(_once(parts))


def _once(parts: tuple[str, ...]) -> Iterator[str]:
    return (part for part in dict.fromkeys(parts) if part)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
