"""At which of its addresses a node is reached, where its Node does not say it or somebody knows better. Pure.

The methods are Calico's (IP_AUTODETECTION_METHOD), over one view of the kernel. Among several addresses the choice is
always the same: by the interface's index, then one of a subnet before one alone (a /32 is mostly a virtual one), then
by the address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from ipaddress import ip_address, ip_network
from typing import Final, Literal

import msgspec

from agent.bgp.model import Family
from agent.errors import AgentError
from agent.fib import Address, KernelState, Link
from agent.prefix import address_number, is_inside, length_of
from cni.marks import LINK_GROUP, LINK_GROUP_DOOMED

Kind = Literal["internal-ip", "interface", "skip-interface", "cidr", "can-reach", "first-found", "none"]

#: Interfaces that no node is known by, unless it is told so: bridges and virtual ends of runtimes and other networks,
#: and where proxies keep the addresses of services. Calico's list, and those of others.
_NOT_OURS: Final = re.compile(
    r"lo|docker.*|br-[0-9a-f]{12}|cbr.*|dummy.*|virbr.*|lxc.*|veth.*|cali.*|tunl.*|flannel.*|kube-.*|cni.*|vxlan.*|"
    r"cilium.*|nodelocaldns.*|podman.*|weave.*|wireguard\.cali|wg-v6\.cali"
)
_METHODS: Final = (
    "internal-ip, first-found, none, interface=REGEX, skip-interface=REGEX, cidr=CIDR or can-reach=ADDRESS; several "
    "values have commas between"
)


class AddressNotUsable(AgentError):
    """A method is none, or cannot be one of that family; the message says what to write."""


class Method(msgspec.Struct, frozen=True):
    kind: Kind = "internal-ip"
    #: Regular expressions for whole names of interfaces, CIDRs, or the one address to be reached.
    values: tuple[str, ...] = ()


def parse(text: str, version: int) -> Method:
    """The method for addresses of that IP version. Raises AddressNotUsable."""
    word, equals, rest = text.strip().partition("=")
    values = tuple(part.strip() for part in rest.split(",") if part.strip())
    match word:
        case ("internal-ip" | "first-found" | "none") as kind if not equals:
            return Method(kind)
        case ("interface" | "skip-interface" | "cidr" | "can-reach") as kind if values:
            if kind == "can-reach" and len(values) > 1:
                raise AddressNotUsable(f"{text!r}: one address can be asked for")
            for value in values:
                problem = _problem(kind, value, version)
                if problem:
                    raise AddressNotUsable(f"{text!r}: {value!r} {problem}")
            return Method(kind, values)
    raise AddressNotUsable(f"{text!r}: write {_METHODS}")


def find(
    method: Method,
    family: Family,
    kernel: KernelState,
    pools: Collection[str],
    *,
    beside: str = "",
    routed: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """The node's address of the family by this method, and "" ; or "", and why there is none.

    ``pools`` are the CIDRs of pods' addresses, of which a node has none. ``beside`` is an address of the other family:
    what is on its interface goes first. ``routed`` has the source that the kernel would take to a can-reach address.
    """
    of_family = [a for a in kernel.addresses if (":" in a.address) == family.startswith("ipv6")]
    found = [a for a in of_family if _is_candidate(a, kernel, pools)]
    near = {a.interface for a in kernel.addresses if a.address == beside}
    first, *more = method.values or ("",)
    match method.kind:
        case "none" | "internal-ip":
            return "", ""
        case "interface":
            return _best(found, kernel, lambda _, link: _named(link, method.values), f"no interface {first}")
        case "skip-interface":
            wanted = f"no interface but {', '.join((first, *more))}"
            return _best(found, kernel, lambda _, link: _common(link) and not _named(link, method.values), wanted)
        case "cidr":
            wanted = f"no address in {', '.join((first, *more))}"
            return _best(found, kernel, lambda a, _: any(is_inside(a.address, c) for c in method.values), wanted)
        case "can-reach":
            source = (routed or {}).get(first, "")
            known = any(a.address == source for a in of_family)
            return (source, "") if known else ("", f"no route leads to {first}")
        case "first-found":
            by_neighbour = _best(found, kernel, lambda a, _: a.interface in near, "")[0]
            return (by_neighbour, "") if by_neighbour else _best(found, kernel, lambda _, k: _common(k), "no interface")
    raise AssertionError("unreachable")


def reached(*methods: Method) -> tuple[str, ...]:
    """The addresses that the kernel is to be asked the way to."""
    return tuple(method.values[0] for method in methods if method.kind == "can-reach")


# -- parts -------------------------------------------------------------------------------------------------------------


def _problem(kind: Kind, value: str, version: int) -> str:
    try:
        if kind == "cidr" and ip_network(value).version != version:
            return f"is none of IPv{version}"
        if kind == "can-reach" and ip_address(value).version != version:
            return f"is none of IPv{version}"
        if kind in ("interface", "skip-interface"):
            re.compile(value)
    except (ValueError, re.error) as e:
        return f"cannot be read: {e}"
    return ""


def _is_candidate(address: Address, kernel: KernelState, pools: Collection[str]) -> bool:
    link = kernel.links.get(address.interface)
    if link is None or not link.up or link.group in (LINK_GROUP, LINK_GROUP_DOOMED):
        return False
    number = ip_address(address.address)
    if number.is_loopback or number.is_link_local or number.is_unspecified or not (address.usable and address.lasting):
        return False
    return not any(is_inside(address.address, pool) for pool in pools)


def _best(
    found: list[Address], kernel: KernelState, fits: Callable[[Address, Link], bool], wanted: str
) -> tuple[str, str]:
    good = [a for a in found if fits(a, kernel.links[a.interface])]
    if not good:
        return "", f"{wanted} has an address that a node can be reached at" if "interface" in wanted else wanted
    best = min(good, key=lambda a: (a.interface, _is_alone(a), address_number(a.address)))
    return best.address, ""


def _is_alone(address: Address) -> bool:
    return length_of(address.subnet) == (128 if ":" in address.subnet else 32)


def _named(link: Link, patterns: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, link.name) for pattern in patterns)


def _common(link: Link) -> bool:
    return not _NOT_OURS.fullmatch(link.name)
