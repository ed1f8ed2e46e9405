"""The kernel's network tables as text, a line an object, through netlink: no program is needed for it."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from typing import Any, Final

from cni import nft
from cni.netlink import Message, Netlink, iterate

#: Of messages and their attributes: what says nothing to people, or a lot of nothing.
_LEFT_OUT: Final = {
    *("header", "event", "__align", "__pad", "UNKNOWN", "family", "src_len", "dst_len", "change", "ifa_index"),
    *("IFLA_STATS", "IFLA_STATS64", "IFLA_MAP", "IFLA_XDP", "res1", "res2", "IFLA_AF_SPEC", "IFLA_CARRIER_UP_COUNT"),
    *("IFLA_CARRIER_DOWN_COUNT", "NDA_CACHEINFO", "IFA_CACHEINFO", "RTA_CACHEINFO"),
}
_TYPES: Final = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}
#: RTM_GETNEXTHOP, struct nhmsg and struct nexthop_grp; NETLINK_NETFILTER.
_GETNEXTHOP: Final = 106
_NHMSG: Final = struct.Struct("=BBBxI")
_MEMBER: Final = struct.Struct("=IBxxx")
_NETFILTER: Final = 12
_INDEX: Final = ("RTA_OIF", "IFA_INDEX", "ifindex", "NHA_OIF")


def tables() -> dict[str, Callable[[], str]]:
    """By name what reads it. Each raises what netlink says no with, and waits for some seconds at most."""
    return {
        "links": lambda: _dump("get_links"),
        "addresses": lambda: _dump("get_addr"),
        "neighbours": lambda: _dump("get_neighbours"),
        "rules": lambda: _dump("get_rules", socket.AF_INET) + _dump("get_rules", socket.AF_INET6),
        "routes": lambda: _dump("get_routes", socket.AF_INET) + _dump("get_routes", socket.AF_INET6),
        "nexthops": _nexthops,
        "nftables": _nftables,
    }


def _dump(what: str, family: int | None = None) -> str:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        names = {link["index"]: str(link.get_attr("IFLA_IFNAME")) for link in ip.get_links()}
        read = getattr(ip, what)
        found = read() if family is None else read(family=family)
        return "".join(f"{_line(message, names)}\n" for message in found)


def _nexthops() -> str:
    """struct nhmsg and its attributes (include/uapi/linux/nexthop.h)."""
    with Netlink() as netlink:
        return "".join(f"{_nexthop(a.body)}\n" for a in netlink.dump(Message(_GETNEXTHOP, bytes(_NHMSG.size))))


def _nexthop(body: bytes) -> str:
    _, scope, protocol, flags = _NHMSG.unpack_from(body)
    parts = dict(iterate(body, _NHMSG.size))
    said: dict[str, object] = {
        "id": int.from_bytes(parts[1], sys.byteorder),
        "proto": protocol,
        "scope": scope,
        "flags": flags,
    }
    if 2 in parts:
        members = (_MEMBER.unpack_from(parts[2], at) for at in range(0, len(parts[2]), _MEMBER.size))
        said["group"] = ",".join(f"{number}*{weight + 1}" for number, weight in members)
    if 4 in parts:
        said["blackhole"] = "yes"
    if 5 in parts:
        said["oif"] = int.from_bytes(parts[5], sys.byteorder)
    if 6 in parts:
        said["gateway"] = str(ip_address(parts[6]))
    return " ".join(f"{name}={value}" for name, value in said.items())


def _line(message: Any, names: dict[int, str]) -> str:
    """``dst=10.0.0.0/24 oif=up1 proto=143 ...``, in the order of the kernel's own attributes."""
    said: dict[str, str] = {}
    is_route = "dst_len" in message and "proto" in message
    for key, value in (*message.get("attrs", ()), *((k, v) for k, v in message.items() if k != "attrs")):
        if key in _LEFT_OUT or value is None:
            continue
        name = key.split("_", 1)[1].lower() if key.isupper() else key
        if key in _INDEX and value in names:
            value = names[value]
        if name == "dst" and is_route:
            value = f"{value}/{message['dst_len']}"
        if is_route and key == "type":
            value = _TYPES.get(value, value)
        said.setdefault(name, _plain(value, names))
    if is_route:
        said = {"dst": said.pop("dst", "default"), **said}
    return " ".join(f"{name}={value}" for name, value in said.items())


def _plain(value: Any, names: dict[int, str]) -> str:
    if isinstance(value, dict):
        return f"[{_line(value, names)}]"
    if isinstance(value, (list, tuple)):
        return ",".join(_plain(one, names) for one in value)
    return str(value)


# -- nftables ----------------------------------------------------------------------------------------------------------

_FAMILIES: Final = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}


def _nftables() -> str:
    """Every table and base chain by name, whoever made it, and what our own rules have counted."""
    with Netlink(_NETFILTER) as netlink:
        return "".join(f"{line}\n" for line in _nft_lines(netlink.dump))


def _nft_lines(dump: Callable[[Message], Iterable[Message]]) -> Iterator[str]:
    def ask(kind: int) -> Iterator[tuple[str, dict[int, bytes]]]:
        for answer in dump(Message(nft.SUBSYSTEM << 8 | kind, nft.HEADER.pack(0, 0, 0), 0)):
            yield _FAMILIES.get(answer.body[0], str(answer.body[0])), dict(iterate(answer.body, nft.HEADER.size))

    for family, table in ask(nft.GETTABLE):
        yield f"table {family} {_text(table[nft.TABLE_NAME])}"
    for family, chain in ask(nft.GETCHAIN):
        line = f"chain {family} {_text(chain[nft.CHAIN_TABLE])} {_text(chain[nft.CHAIN_NAME])}"
        if nft.CHAIN_HOOK in chain:
            hook = dict(iterate(chain[nft.CHAIN_HOOK]))
            number = int.from_bytes(hook.get(nft.HOOK_NUMBER, b""), "big")
            priority = int.from_bytes(hook.get(nft.HOOK_PRIORITY, b"\0"), "big", signed=True)
            policy = "drop" if int.from_bytes(chain.get(nft.CHAIN_POLICY, b"\1"), "big") == nft.DROP else "accept"
            line += f" hook={number} priority={priority} policy={policy}"
        yield line
    for family, rule in ask(nft.GETRULE):
        expressions = rule.get(nft.RULE_EXPRESSIONS, b"")
        count = nft.packets(expressions)
        yield f"rule {family} {_text(rule[nft.RULE_TABLE])} {_text(rule[nft.RULE_CHAIN])} {nft.names(expressions)}" + (
            "" if count is None else f" packets={count}"
        )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
