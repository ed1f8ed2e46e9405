"""Sysctls of the network namespace that we are in, under /proc/sys, by their dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from agent.fib import Link
from agent.plan.imports import sysctl_name
from cni.marks import LINK_GROUP, LINK_GROUP_DOOMED
from cni.sysctls import path

ROOT: Final = Path("/proc/sys")
_EVERYWHERE: Final = ("net.ipv4.ip_forward", "net.ipv4.conf.all.rp_filter", "net.ipv6.conf.all.forwarding")
_OF_A_LINK: Final = (
    "net.ipv4.conf.{}.ignore_routes_with_linkdown",
    "net.ipv4.conf.{}.rp_filter",
    "net.ipv6.conf.{}.ignore_routes_with_linkdown",
)


def read(links: Iterable[Link], root: Path = ROOT) -> Mapping[str, str]:
    """The values that a plan looks at, of all interfaces but the pods'; what does not exist (IPv6 off, an interface
    that has just gone) is left out. Raises OSError where reading is refused."""
    keys = list(_EVERYWHERE)
    for link in links:
        if link.group not in (LINK_GROUP, LINK_GROUP_DOOMED):
            keys += (key.format(sysctl_name(link.name)) for key in _OF_A_LINK)
    found = {}
    for key in keys:
        try:
            found[key] = path(key, root).read_text().strip()
        except FileNotFoundError:
            continue
    return found
