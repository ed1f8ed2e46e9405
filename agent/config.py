"""What the agent is told at its start: flags, and for each an environment variable that the flag overrides."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from agent.detect import AddressNotUsable, Method
from agent.detect import parse as parse_method
from agent.firstpools import PoolsNotUsable, Wish
from agent.firstpools import parse as parse_pools
from cni.endpoint import Address, AddressError, parse_address

#: Where the Secrets of BGP passwords are, unless it is said.
NAMESPACE = "underlay-system"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    store: str
    run: Path
    state: Path
    namespace: str = NAMESPACE
    log: str = "INFO"
    metrics: Address | None = None
    sysctls: Path = Path("/proc/sys")
    #: How this node's addresses are found, by IP version.
    methods: dict[int, Method] = {}
    #: The first pools of a cluster that has none; None: as its installer says.
    pools: tuple[Wish, ...] | None = ()


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The configuration. Writes what is wrong to stderr and raises SystemExit, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="underlay-agent",
        description="The node agent: from what the cluster wants to kernel routes and BGP.",
        epilog="Each flag may be given as UNDERLAY_NODE, UNDERLAY_STORE, ...; the flag wins.",
    )
    flags = (
        ("node", "", "name of this node, as its Node object has it"),
        ("store", "", "where the cluster's wishes live: kube: or sqlite:/path/store.db"),
        ("run", "/run/underlay", "folder for sockets, shared with the CNI server and the speaker"),
        ("state", "/var/lib/underlay", "folder for what outlives a reboot"),
        ("namespace", NAMESPACE, "where the Secrets that BGPPeers name are"),
        ("metrics", "", "where to answer GET for metrics and health: ADDRESS:PORT or a unix socket's path"),
        (
            "ipv4-address",
            "internal-ip",
            "how this node's IPv4 address is found, as interface=eth.*",
        ),
        ("ipv6-address", "internal-ip", "the same of its IPv6 address"),
        ("pools", "none", "first pools of a cluster without any: auto, none, or CIDRs with commas between"),
        ("sysctls", "/proc/sys", "where sysctls can be written, in a container that has them elsewhere"),
        ("log", "INFO", "DEBUG, INFO, WARNING or ERROR"),
    )
    for name, default, text in flags:
        variable = f"UNDERLAY_{name.upper().replace('-', '_')}"
        parser.add_argument(f"--{name}", default=environment.get(variable, default), help=text)
    found = parser.parse_args(arguments)
    for name in ("node", "store"):
        if not getattr(found, name):
            parser.error(f"--{name} is missing: give it, or UNDERLAY_{name.upper()}")
    if found.log.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        parser.error(f"--log {found.log}: DEBUG, INFO, WARNING or ERROR")
    try:
        metrics = parse_address(found.metrics) if found.metrics else None
    except AddressError as e:
        parser.error(f"--metrics {e}")
    try:
        pools = parse_pools(found.pools)
    except PoolsNotUsable as e:
        parser.error(f"--pools {e}")
    methods = {}
    for version, text in ((4, found.ipv4_address), (6, found.ipv6_address)):
        try:
            methods[version] = parse_method(text, version)
        except AddressNotUsable as e:
            parser.error(f"--ipv{version}-address {e}")
    return Config(
        node=found.node,
        store=found.store,
        run=Path(found.run),
        state=Path(found.state),
        namespace=found.namespace,
        log=found.log.upper(),
        metrics=metrics,
        sysctls=Path(found.sysctls),
        pools=pools,
        methods=methods,
    )
