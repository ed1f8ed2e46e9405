"""``underlay-cni-install``: puts the plugin on a node, or takes it away, as an init container or a person types it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cni import install, rtnl
from cni.errors import CNIError
from cni.install import InstallError
from cni.marks import LINK_GROUP
from cni.message import SOCKET
from cni.netlink import Netlink

_TREE: Final = Path(__file__).resolve().parents[1]
#: Seconds between two looks for the server.
_POLL: Final = 0.1


class Options(msgspec.Struct, frozen=True, kw_only=True):
    remove: bool
    binary: bool
    conflist: bool
    shim: Path
    bin_dir: Path
    conf_dir: Path
    run: Path
    wait: float
    own: bool
    configuration: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 1 and one line when it cannot be done."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv, os.environ)
        for line in _uninstall(options) if options.remove else _install(options):
            print(line)
    except (CNIError, OSError) as e:
        print(f"underlay-cni-install: {e}", file=sys.stderr)
        sys.exit(1)


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Flags, and where one is missing the environment. Raises InstallError; argparse exits with 2 at unknown flags."""
    parser = argparse.ArgumentParser(prog="underlay-cni-install", description="Puts the CNI plugin on this node.")
    parser.add_argument(
        "--uninstall", action="store_true", help="take it away: conflist, then binary if no pod needs it"
    )
    parser.add_argument("--only", choices=("binary", "conflist"), help="install one of the two")
    parser.add_argument(
        "--shim", type=Path, default=default_shim(), help="the program to install (default: %(default)s)"
    )
    parser.add_argument("--bin", type=Path, default=Path("/opt/cni/bin"), help="the runtime's folder of plugins")
    parser.add_argument("--conf", type=Path, default=Path("/etc/cni/net.d"), help="its folder of configurations")
    run = environment.get("UNDERLAY_RUN") or "/run/underlay"
    parser.add_argument("--run", type=Path, default=Path(run), help="run directory of underlay-cni (UNDERLAY_RUN)")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for underlay-cni before the conflist")
    parser.add_argument(
        "--own", action="store_true", help="wait for underlay-cni of this container, not for one that is to be replaced"
    )
    parser.add_argument("--name", default="underlay", help="the network's name")
    parser.add_argument("--cni-version", default="1.0.0", help="cniVersion of the conflist")
    parser.add_argument("--mtu", type=int, default=0, help="MTU of pods; the uplinks' if 0")
    parser.add_argument(
        "--chain",
        action="append",
        default=[],
        help="a plugin behind ours: portmap, bandwidth, or its JSON; repeatable (UNDERLAY_CNI_CHAIN: names, by commas)",
    )
    parser.add_argument(
        "--pods-may-choose",
        default=environment.get("UNDERLAY_PODS_MAY_CHOOSE", "no"),
        help="yes: have the runtime hand over pods' annotations (UNDERLAY_PODS_MAY_CHOOSE)",
    )
    values = parser.parse_args(argv)
    if values.pods_may_choose.lower() not in ("yes", "no", ""):
        raise InstallError(f"--pods-may-choose {values.pods_may_choose}: write yes or no")
    return Options(
        remove=values.uninstall,
        binary=values.only != "conflist",
        conflist=values.only != "binary",
        shim=values.shim,
        bin_dir=values.bin,
        conf_dir=values.conf,
        run=values.run,
        wait=values.wait,
        own=values.own,
        configuration=install.conflist(
            name=values.name,
            version=values.cni_version,
            mtu=values.mtu,
            pods_may_choose=values.pods_may_choose.lower() == "yes",
            chain=tuple(install.chained(text) for text in values.chain or _names(environment)),
        ),
    )


def _names(environment: Mapping[str, str]) -> list[str]:
    return [name.strip() for name in environment.get("UNDERLAY_CNI_CHAIN", "").split(",") if name.strip()]


def default_shim() -> Path:
    """What ``make shim`` built, in the tree that this file is in, else the same in Python."""
    built = _TREE / "build" / "underlay-shim"
    return built if built.exists() else _TREE / "cni" / "shim" / "shim.py"


def _install(options: Options) -> list[str]:
    lines = []
    binary = options.bin_dir / install.PLUGIN
    if options.binary:
        works(options.shim)
        binary = install.install_binary(options.shim, options.bin_dir)
        lines.append(f"{binary}: installed")
    if not options.conflist:
        return lines
    check(options.configuration, options.bin_dir)
    end = time.monotonic() + options.wait
    while not install.answers(options.run, own=options.own):
        if time.monotonic() > end:
            where = options.run / SOCKET
            raise InstallError(f"no server answers on {where} for {options.wait:.0f} s: start underlay-cni, then again")
        time.sleep(_POLL)
    done = install.install_conflist(binary, options.conf_dir, options.configuration)
    lines.append(f"{done.conflist}: installed")
    if done.before:
        names = ", ".join(done.before)
        lines.append(f"not in use: {names} in {options.conf_dir} sorts before it, and a runtime takes the first")
    if done.behind:
        lines.append(f"in use instead of {', '.join(done.behind)}, which is left as it is")
    return lines


def works(shim: Path) -> None:
    """Asks the program for its version: one for another machine is not installed. Raises InstallError."""
    try:
        asked = subprocess.run([shim], env={"CNI_COMMAND": "VERSION"}, capture_output=True, timeout=10, check=False)
        if b"supportedVersions" in asked.stdout:
            return
        problem = f"it answers {asked.stdout[:200]!r} to VERSION"
    except (OSError, subprocess.TimeoutExpired) as e:
        problem = str(e)
    raise InstallError(f"{shim} does not run on this machine ({problem}): build it here with 'make shim'")


def check(configuration: Mapping[str, Any], bin_dir: Path) -> None:
    """Every plugin of the chain must be there, or each pod would fail. Raises InstallError."""
    missing = [p["type"] for p in configuration["plugins"] if not os.access(bin_dir / p["type"], os.X_OK)]
    if missing:
        raise InstallError(f"{bin_dir} has no {', '.join(missing)}: install it there, or leave it out of the chain")


def _uninstall(options: Options) -> list[str]:
    with Netlink() as netlink:
        pods = sum(link.group == LINK_GROUP for link in rtnl.links(netlink))
    done = install.uninstall(options.bin_dir, options.conf_dir, pods=pods)
    lines = [f"{path}: removed" for path in done.gone] or ["nothing of ours was there"]
    return [*lines, f"in use now: {done.next or 'no network'}"]


if __name__ == "__main__":
    main()
