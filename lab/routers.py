"""What runs on a router of the lab: BIRD, or FRR's zebra and bgpd. Its files, its programs, and how it is asked."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from cni import netns
from cni.peer import answers
from lab import bird, frr
from lab.errors import NetError
from lab.net import Net
from lab.topology import Router, Software, Topology, Use, bare
from lab.wire import RouterPart

#: What routes of BGP are called in a router's kernel, as ``ip route show protocol`` takes it.
PROTOCOL: Final[Mapping[Software, str]] = {"bird": "bird", "frr": "bgp"}
NAME: Final[Mapping[Software, str]] = {"bird": "BIRD", "frr": "FRR"}

_PACKAGE: Final[Mapping[Software, str]] = {"bird": "bird2", "frr": "frr"}
_NEEDED: Final[Mapping[Software, tuple[str, ...]]] = {"bird": ("bird", "birdc"), "frr": ("zebra", "bgpd", "vtysh")}
#: Debian keeps these out of an ordinary user's PATH.
_FOLDERS: Final = (
    *("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"),
    *("/usr/lib/frr", "/usr/libexec/frr", "/usr/local/lib/frr"),
)
_GROUPS: Final = Path("/etc/group")
_STARTS_WITHIN: Final = 60.0


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A process to keep up in the router's namespace. ``after`` is a unix socket on which another must answer first."""

    name: RouterPart
    argv: tuple[str, ...]
    log: Path
    after: Path | None = None


def require(software: Software) -> None:
    """Raises NetError, in one line with what to type, where it is not installed."""
    for program in _NEEDED[software]:
        _find(program, software)


def prepare(topology: Topology, router: Router, folder: Path) -> tuple[Program, ...]:
    """Writes the router's configuration into ``folder``; returns what to start for it. Raises NetError."""
    folder.mkdir(parents=True, exist_ok=True)
    if topology.shape.tor == "bird":
        (folder / "bird.conf").write_text(bird.configuration(topology, router))
        return (Program(name="bird", argv=tuple(bird_argv(folder)), log=folder / "bird.log"),)
    let_root_run_frr(folder)
    (folder / "zebra.conf").write_text("")
    (folder / "bgpd.conf").write_text(frr.configuration(topology, router))
    return (_frr("zebra", folder, None), _frr("bgpd", folder, folder / "zserv"))


def environment(software: Software, folder: Path) -> dict[str, str]:
    """By which ``underlay-lab exec`` has birdc and vtysh find the router in that folder."""
    return {"BIRD": str(folder / "bird.ctl")} if software == "bird" else {"FRR": str(folder)}


def start(net: Net, topology: Topology, router: Router, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Starts the router, for who does not keep it up; returns its processes. Raises NetError."""
    started = []
    for program in prepare(topology, router, folder):
        end = time.monotonic() + _STARTS_WITHIN
        while program.after and not answers(program.after):
            if time.monotonic() > end:
                raise NetError(f"{program.after}: nobody answers after {_STARTS_WITHIN:.0f} s; see {program.log}")
            time.sleep(0.01)
        started.append(net.spawn(router.name, program.argv, log=program.log))
    return started


def bird_argv(folder: Path) -> list[str]:
    """BIRD in the foreground, with what lies in ``folder``. Raises NetError."""
    return [_find("bird", "bird"), "-f", "-c", str(folder / "bird.conf"), "-s", str(folder / "bird.ctl")]


def birdc(net: Net, router: str, folder: Path, *words: str) -> str:
    """What the router's BIRD answers to a command that only reads, without its greeting. Raises NetError."""
    said = net.run(router, [_find("birdc", "bird"), "-r", "-s", str(folder / "bird.ctl"), *words]).stdout
    return said.partition("Access restricted\n")[2]


def vtysh(net: Net, router: str, folder: Path, *commands: str) -> str:
    """What the router's FRR answers to commands, one after the other. Raises NetError."""
    words = [word for command in commands for word in ("-c", command)]
    return net.run(router, [_find("vtysh", "frr"), "--vty_socket", str(folder), *words]).stdout


def use(net: Net, topology: Topology, router: Router, folder: Path, how: Use) -> None:
    """Changes how the router is to be used; no session is touched. Raises NetError."""
    if topology.shape.tor == "bird":
        (folder / "bird.conf").write_text(bird.configuration(topology, router, use=how))
        _order(net, router.name, folder, "configure")
    else:
        vtysh(net, router.name, folder, "configure terminal", *frr.change(topology, router, use=how))


def shut(net: Net, topology: Topology, router: Router, folder: Path, *, on: bool) -> None:
    """Has the router shut all its sessions, or lets it have them again. Raises NetError."""
    if topology.shape.tor == "bird":
        _order(net, router.name, folder, "disable" if on else "enable", bird.EVERY_SESSION)
    else:
        word = "" if on else "no "
        peers = [bare(address) for _, far in topology.ends(router.name) for address in far.addresses]
        lines = [f"{word}neighbor {peer} shutdown" for peer in peers]
        vtysh(net, router.name, folder, "configure terminal", f"router bgp {router.asn}", *lines)


def let_root_run_frr(folder: Path) -> None:
    """FRR starts only as a member of ``frrvty``: in our mount namespace root is made one. Its id is one that a user
    namespace has. Once is enough."""
    text = _GROUPS.read_text()
    if re.search(r"^frrvty:x:0:root$", text, re.MULTILINE):
        return
    changed = folder / "group"
    changed.write_text(re.sub(r"^frrvty:.*$", "frrvty:x:0:root", text, flags=re.MULTILINE))
    netns.mount(str(changed), _GROUPS, flags=netns.MS_BIND)


def _order(net: Net, router: str, folder: Path, *words: str) -> None:
    """A command that changes something; birdc ends with 0 whatever BIRD says."""
    said = net.run(router, [_find("birdc", "bird"), "-s", str(folder / "bird.ctl"), *words]).stdout
    if re.search(r"error|unexpected|No protocols match", said, re.IGNORECASE):
        raise NetError(f"birdc {' '.join(words)} on {router}: {said.strip()}")


def _frr(name: RouterPart, folder: Path, after: Path | None) -> Program:
    words = ["-f", folder / f"{name}.conf", "-i", folder / f"{name}.pid", "-z", folder / "zserv"]
    words += ["--vty_socket", folder, "-P", "0", "-u", "root", "-g", "root", "--log", "stdout"]
    argv = (_find(name, "frr"), *map(str, words))
    return Program(name=name, argv=argv, log=folder / f"{name}.log", after=after)


def _find(program: str, software: Software) -> str:
    for folder in _FOLDERS:
        if (path := Path(folder) / program).exists():
            return str(path)
    raise NetError(f"{NAME[software]} is not installed ({program}): apt-get install {_PACKAGE[software]}")
