"""What a node says of itself, item by item. Each reads one thing, within its own limits.

Only what is listed here is read: no environment of a process, no kubeconfig, no key.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from ctl.connection import Connection
from ctl.diags import kernel

#: Seconds for one command or one page, and bytes of one file or page.
LIMIT: Final = 10.0
BYTES: Final = 8 << 20
#: Files of the CNI folder that are read; of others the name is told, as kubeconfigs lie there too.
_CONFLISTS: Final = (".conf", ".conflist", ".json")
_SYSCTLS: Final = (
    *("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/fib_multipath_hash_policy"),
    *("net/ipv6/fib_multipath_hash_policy", "net/ipv4/tcp_l3mdev_accept", "net/core/rmem_max"),
    *("net/ipv4/neigh/default/gc_thresh3", "net/ipv6/neigh/default/gc_thresh3", "net/ipv6/route/max_size"),
)
_OF_LINKS: Final = {
    "ipv4": ("forwarding", "rp_filter", "proxy_arp", "ignore_routes_with_linkdown", "arp_ignore", "arp_announce"),
    "ipv6": ("forwarding", "accept_ra", "proxy_ndp", "disable_ipv6", "ignore_routes_with_linkdown"),
}
#: Programs where they are installed; the kernel's tables are read without them too.
_COMMANDS: Final = {
    "ip-routes": ("ip", "-details", "route", "show", "table", "all"),
    "ip-rules": ("ip", "rule"),
    "ip-nexthops": ("ip", "-details", "nexthop"),
    "nft": ("nft", "list", "table", "inet", "underlay"),
    "journal": ("journalctl", "--no-pager", "-n", "2000", "-t", "kubelet", "-t", "containerd", "-t", "crio"),
    "dmesg": ("dmesg", "--ctime"),
}
_PAGES: Final = ("healthz", "readyz", "metrics")
_BGP: Final = ("peers", "routes?limit=1000", "received?limit=1000", "advertised?limit=1000", "diff?limit=1000")
_PROGRAMS: Final = re.compile(r"underlay|exabgp|relay\.py|kubelet|containerd|crio|calico|cilium|flannel|bird")


Keep = Literal["head", "tail"]


class Here(NamedTuple):
    """Where this node's things are. ``cni_pages``: where its CNI server may answer."""

    run: Path
    state: Path
    conflists: tuple[Path, ...]
    logs: tuple[Path, ...]
    token: Path
    cni_pages: tuple[str, ...] = ("metrics.sock", "127.0.0.1:9464")
    proc: Path = Path("/proc")


class Part(NamedTuple):
    """``read`` gives text or plain JSON types, and raises what kept it from that."""

    path: str
    what: str
    read: Callable[[], object]
    keep: Keep = "head"
    harmless: tuple[str, ...] = ()


def parts(here: Here) -> Iterator[Part]:
    """All of a node's items, the most telling first."""
    agent = here.run / "agent.sock"
    for page in (*_PAGES, *(f"bgp/{page}" for page in _BGP)):
        name = page.partition("?")[0].replace("/", "-")
        yield Part(f"node/agent/{name}.txt", f"the agent's page /{page}", partial(get, agent, f"/{page}"))
    for page in _PAGES:
        yield Part(f"node/cni/{page}.txt", f"the CNI server's page /{page}", partial(_of_cni, here, f"/{page}"))
    for name, read in kernel.tables().items():
        yield Part(f"node/kernel/{name}.txt", f"the kernel's {name}", read)
    yield Part("node/kernel/sysctls.txt", "sysctls of forwarding and of each link", lambda: _sysctls(here.proc))
    yield Part("node/versions.txt", "versions, machine and boot", lambda: _versions(here.proc))
    yield Part("node/processes.txt", "our processes and their neighbours: command lines", lambda: _processes(here.proc))
    speaker = here.run / "speaker"
    yield Part("node/speaker/exabgp.conf", "ExaBGP's configuration", lambda: read_file(speaker / "exabgp.conf"))
    # "secret" says there where the password is, not what it is.
    yield Part(
        "node/speaker/sessions.json",
        "the sessions put in place last",
        partial(_read_json, speaker / "sessions.json"),
        harmless=("secret",),
    )
    yield Part("node/speaker/table.json", "the table that is announced", lambda: read_file(speaker / "table.json"))
    yield Part("node/speaker/exabgp.log", "ExaBGP's log", lambda: read_file(speaker / "exabgp.log", tail=True), "tail")
    yield Part("node/snapshot.json", "the last good view", lambda: read_file(here.state / "snapshot.json"))
    yield Part("node/run.txt", "files in the run directory", lambda: _listing(here.run))
    for path in _matching(here.run, r"(journal|starts)-"):
        yield Part(f"node/run/{path.name}", "what was handed out", partial(read_file, path))
    for number, folder in enumerate(here.conflists):
        at = f"node/conflists-{number}" if number else "node/conflists"
        yield Part(f"{at}.txt", f"files in {folder}", partial(_listing, folder))
        for path in _matching(folder, r".*"):
            if path.suffix in _CONFLISTS:
                yield Part(f"{at}/{path.name}", f"{path}", partial(_read_json, path))
    for folder in here.logs:
        for path in _matching(folder, r".*\.log", depth=3):
            name = "-".join(path.relative_to(folder).parts)
            yield Part(f"node/logs/{folder.name}-{name}", f"{path}", partial(read_file, path, tail=True), "tail")
    for name, argv in _COMMANDS.items():
        yield Part(f"node/commands/{name}.txt", " ".join(argv), partial(run, argv), "tail")


def secrets(here: Here) -> Iterator[str]:
    """What is a secret on this machine and may be repeated somewhere."""
    with contextlib.suppress(OSError):
        yield read_file(here.token).strip()


def get(where: Path | str, path: str, *, limit: float = LIMIT) -> str:
    """A page of a unix socket, or of HOST:PORT, with its code if that is not 200. Raises OSError, HTTPException."""
    end = time.monotonic() + limit
    connection = Connection(where, limit)
    try:
        connection.request("GET", path, headers={"Host": "node"})
        answer = connection.getresponse()
        body = b""
        while part := answer.read1(1 << 16):
            body += part
            if len(body) > BYTES or time.monotonic() > end:
                body += b"\n(cut here)\n"
                break
    finally:
        connection.close()
    text = body.decode(errors="replace")
    return text if answer.status == 200 else f"{answer.status} {answer.reason}: {text}"


def read_file(path: Path, *, tail: bool = False) -> str:
    """A regular file's text, at most ``BYTES`` of it. Raises OSError."""
    # O_NONBLOCK: a FIFO under that name would be waited for.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no regular file")
        if tail and found.st_size > BYTES:
            file.seek(-BYTES, os.SEEK_END)
        return file.read(BYTES).decode(errors="replace")


def _read_json(path: Path) -> object:
    return msgspec.json.decode(read_file(path))


def run(argv: Iterable[str]) -> str:
    """What a command prints. Raises OSError if it is not installed, fails or does not end in time."""
    argv = list(argv)
    if shutil.which(argv[0]) is None:
        raise OSError(f"{argv[0]} is not installed here")
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{argv[0]} did not end within {LIMIT:g} s") from None
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.returncode}: {done.stderr.decode(errors='replace').strip()[:500]}")
    return done.stdout.decode(errors="replace")


def _of_cni(here: Here, page: str) -> str:
    why = []
    for where in here.cni_pages:
        try:
            return get(where if ":" in where else here.run / where, page)
        except (OSError, http.client.HTTPException) as e:
            why.append(f"{where}: {e}")
    raise OSError("; ".join(why))


def _sysctls(proc: Path) -> str:
    root = proc / "sys"
    names = [*_SYSCTLS]
    for family, leaves in _OF_LINKS.items():
        folder = root / "net" / family / "conf"
        links = sorted(path.name for path in folder.iterdir())
        names += [f"net/{family}/conf/{link}/{leaf}" for link in links for leaf in leaves]
    lines = []
    for name in names:
        with contextlib.suppress(OSError):
            lines.append(f"{name} = {(root / name).read_text().strip()}\n")
    return "".join(lines)


def _versions(proc: Path) -> str:
    uname = os.uname()
    lines = [
        f"node {os.environ.get('UNDERLAY_NODE', '')} host {uname.nodename}",
        f"kernel {uname.release} {uname.version} {uname.machine}",
        f"python {platform.python_version()} {sys.executable}",
        f"boot {_first(proc / 'sys/kernel/random/boot_id')}",
        f"up {_first(proc / 'uptime')}",
        f"load {_first(proc / 'loadavg')}",
    ]
    for name in ("underlay", "exabgp", "pyroute2", "msgspec", "aiohttp"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(name)}")
    for name in ("UNDERLAY_NODE", "UNDERLAY_STORE", "UNDERLAY_RUN", "UNDERLAY_LOG", "KUBERNETES_SERVICE_HOST"):
        if name in os.environ:
            lines.append(f"{name}={os.environ[name]}")
    return "\n".join(lines) + "\n"


def _first(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return "?"


def _processes(proc: Path) -> str:
    """Command lines alone: an environment has whatever it was given."""
    lines = []
    for folder in sorted((p for p in proc.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if _PROGRAMS.search(line):
                lines.append(f"{folder.name} {line[:1000]}\n")
    return "".join(lines)


def _listing(folder: Path) -> str:
    lines = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            found = path.lstat()
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.st_mtime))
            lines.append(f"{stat.filemode(found.st_mode)} {found.st_size:>10} {when} {path.relative_to(folder)}\n")
        if len(lines) >= 5000:
            break
    if not folder.is_dir():
        raise OSError(f"there is no {folder}")
    return "".join(lines)


def _matching(folder: Path, pattern: str, *, depth: int = 1) -> list[Path]:
    """Files of the folder, at most 50, by name."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for level in range(1, depth + 1):
            found += [p for p in folder.glob("/".join("*" * level)) if p.is_file() and re.match(pattern, p.name)]
    return sorted(found)[:50]


def default(run: Path, state: Path) -> Here:
    """Where things are on a node, in our pods, and in a lab."""
    from store.kubeaccess import SERVICE_ACCOUNT

    return Here(
        run=run,
        state=state,
        conflists=tuple(p for p in (Path("/etc/cni/net.d"), Path("/host/etc/cni/net.d")) if p.is_dir()),
        logs=tuple(p for p in (*Path("/var/log/pods").glob("underlay-system_*"), run.parent / "log") if p.is_dir()),
        token=SERVICE_ACCOUNT / "token",
    )
