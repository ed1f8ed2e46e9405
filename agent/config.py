"""What the agent is told at its start: flags, and for each an environment variable that the flag overrides."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

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
        ("sysctls", "/proc/sys", "where sysctls can be written, in a container that has them elsewhere"),
        ("log", "INFO", "DEBUG, INFO, WARNING or ERROR"),
    )
    for name, default, text in flags:
        parser.add_argument(f"--{name}", default=environment.get(f"UNDERLAY_{name.upper()}", default), help=text)
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
    return Config(
        node=found.node,
        store=found.store,
        run=Path(found.run),
        state=Path(found.state),
        namespace=found.namespace,
        log=found.log.upper(),
        metrics=metrics,
        sysctls=Path(found.sysctls),
    )
