"""Puts the plugin on the machine, as a runtime's folder watchers need it: each file appears whole or not at all.

containerd ignores the creation of files in its configuration folder and notices renames within it only, and takes a
half-written conflist for a broken node: a temporary file with another suffix in the same folder, then a rename. What
others have put there is theirs: it is told, and never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from cni.errors import CNIError
from cni.message import ANSWER, ANSWER_MAGIC, REQUEST, REQUEST_MAGIC, SOCKET
from cni.peer import is_visible

#: The plugin's name: the binary's, and ``type`` in the conflist.
PLUGIN: Final = "underlay"
#: Sorts before what other CNI installers leave: a runtime takes the first.
CONFLIST: Final = "10-underlay.conflist"
#: What libcni reads in a configuration folder, sorted by name (libcni/api.go, ConfFiles).
_SUFFIXES: Final = frozenset({".conf", ".conflist", ".json"})
#: Plugins of the reference set that need no more than their name; each works by a capability of the runtime's.
KNOWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "portmap": {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
    "bandwidth": {"type": "bandwidth", "capabilities": {"bandwidth": True}},
}
#: Seconds: for another installer's end, and between two looks.
_LOCK_LIMIT: Final = 10.0
_LOCK_POLL: Final = 0.05
#: Where a test may end the process.
STEPS: Final = ("binary-written", "binary-renamed", "conflist-written", "conflist-renamed")


class InstallError(CNIError):
    """The plugin cannot be put there, or taken away; what was there before is untouched."""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """Where the plugin is. ``before`` are other plugins' configurations that sort before ours, so that a runtime takes
    the first of them and not us; ``behind`` are those that wait behind ours."""

    binary: Path
    conflist: Path
    before: tuple[str, ...]
    behind: tuple[str, ...]


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What was taken away; ``next`` is the configuration that a runtime takes from now on, "" if there is none."""

    gone: tuple[Path, ...]
    next: str


def conflist(
    *,
    name: str = "underlay",
    version: str = "1.0.0",
    mtu: int = 0,
    pods_may_choose: bool = False,
    chain: tuple[Mapping[str, Any], ...] = (),
) -> dict[str, Any]:
    """A network configuration list with us first and ``chain`` (portmap, bandwidth...) behind.

    1.0.0 is what every runtime in use takes: containerd 1.6 refuses results in 1.1.0. Where pods may choose, the
    runtime is asked for their annotations.
    """
    ours: dict[str, Any] = {"type": PLUGIN}
    if mtu:
        ours["mtu"] = mtu
    if pods_may_choose:
        ours["capabilities"] = {"io.kubernetes.cri.pod-annotations": True}
    return {"cniVersion": version, "name": name, "plugins": [ours, *chain]}


def chained(text: str) -> Mapping[str, Any]:
    """A plugin of a chain, as people write it: a name of KNOWN, or its whole configuration as JSON. InstallError."""
    if text in KNOWN:
        return KNOWN[text]
    problem = f"{text}: write {', '.join(KNOWN)}, or a plugin's configuration as JSON with its type"
    try:
        found = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as e:
        raise InstallError(problem) from e
    kind = found.get("type")
    if not isinstance(kind, str) or not kind or "/" in kind or kind == PLUGIN:
        raise InstallError(problem)
    return found


# -- install ---------------------------------------------------------------------------------------------------------


def install(
    shim: Path,
    bin_dir: Path,
    conf_dir: Path,
    *,
    run: Path | None = None,
    configuration: Mapping[str, Any] | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Installed:
    """Installs ``shim`` (the built binary, or shim.py) as ``bin_dir``/underlay, then the conflist in ``conf_dir``.

    Where ``run`` is given the conflist appears only when the server behind ``run``/cni.sock answers: from then on the
    runtime calls us. Installing the same again changes nothing. Raises InstallError.
    """
    binary = install_binary(shim, bin_dir, step=step)
    if run is not None and not answers(run):
        raise InstallError(f"no server answers on {run / SOCKET}: start underlay-cni, then install again")
    return install_conflist(binary, conf_dir, configuration or conflist(), step=step)


def install_binary(shim: Path, bin_dir: Path, *, step: Callable[[str], None] = lambda _: None) -> Path:
    """The binary alone, which harms nobody: no runtime calls it before there is a conflist. Also while an older one is
    being executed. Raises InstallError."""
    binary = bin_dir / PLUGIN
    try:
        program = shim.read_bytes()
        with _alone(bin_dir):
            _put(binary, program, mode=0o755, step=lambda what: step(f"binary-{what}"))
    except OSError as e:
        raise InstallError(f"{shim} cannot be installed as {binary}: {e}") from e
    return binary


def install_conflist(
    binary: Path,
    conf_dir: Path,
    configuration: Mapping[str, Any],
    *,
    step: Callable[[str], None] = lambda _: None,
) -> Installed:
    """The conflist alone. Raises InstallError, also if there is a file of that name which is not ours."""
    target = conf_dir / CONFLIST
    text = msgspec.json.format(msgspec.json.encode(configuration), indent=2) + b"\n"
    try:
        with _alone(conf_dir):
            if target.exists() and not _ours(target):
                raise InstallError(f"{target} is not ours: it has no plugin {PLUGIN!r}; move it away, or rename it")
            _put(target, text, mode=0o644, step=lambda what: step(f"conflist-{what}"))
            found = _configurations(conf_dir)
    except OSError as e:
        raise InstallError(f"{target} cannot be written: {e}") from e
    before = tuple(name for name in found if name < CONFLIST)
    return Installed(binary=binary, conflist=target, before=before, behind=found[len(before) :])


def uninstall(bin_dir: Path, conf_dir: Path, *, pods: int) -> Removed:
    """Takes the conflist away, so that no new pod is ours, then the binary. ``pods`` is how many still have our
    network: their DEL needs the binary, so while there are some all stays, and InstallError says so.

    Gone already is no error. Raises InstallError.
    """
    if pods:
        raise InstallError(
            f"{bin_dir / PLUGIN} stays: {pods} pods need it for their DEL; drain the node, then uninstall again"
        )
    return Removed(gone=(*remove_conflist(conf_dir), *remove_binary(bin_dir)), next=next(iter(others(conf_dir)), ""))


def remove_conflist(conf_dir: Path) -> tuple[Path, ...]:
    """Takes it away if it is ours; what was taken. Raises InstallError."""
    return _remove(conf_dir / CONFLIST, _ours)


def remove_binary(bin_dir: Path) -> tuple[Path, ...]:
    """Also while it is being executed; what was taken. Raises InstallError."""
    return _remove(bin_dir / PLUGIN, lambda _: True)


def is_installed(bin_dir: Path, conf_dir: Path) -> tuple[bool, bool]:
    """Whether there is a conflist of ours, and a binary."""
    return _ours(conf_dir / CONFLIST), (bin_dir / PLUGIN).exists()


def others(conf_dir: Path) -> tuple[str, ...]:
    """Names of the configurations that are not ours, in the order in which a runtime looks at them. InstallError."""
    try:
        return _configurations(conf_dir) if conf_dir.is_dir() else ()
    except OSError as e:
        raise InstallError(f"{conf_dir} cannot be read: {e}") from e


def answers(run: Path, *, limit: float = 1.0, own: bool = False) -> bool:
    """Whether a server answers a VERSION on ``run``/cni.sock within ``limit`` seconds; ``own``: one of this container,
    not an older one which works until that can."""
    environment = b"CNI_COMMAND=VERSION\0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(str(run / SOCKET))
            if own and not is_visible(connection):
                return False
            connection.sendall(REQUEST.pack(REQUEST_MAGIC, len(environment), 0) + environment)
            head = connection.recv(ANSWER.size, socket.MSG_WAITALL)
            return len(head) == ANSWER.size and ANSWER.unpack(head)[0] == ANSWER_MAGIC
        except (OSError, struct.error):
            return False


# -- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder; one installer at a time works in it, and what a killed one left half is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _LOCK_LIMIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InstallError(f"another installer has held {folder} for {_LOCK_LIMIT:.0f} s; end it") from None
                time.sleep(_LOCK_POLL)
        for name in (PLUGIN, CONFLIST):
            _temporary(folder / name).unlink(missing_ok=True)
        yield
        os.fsync(lock)
    finally:
        os.close(lock)


def _remove(path: Path, ours: Callable[[Path], bool]) -> tuple[Path, ...]:
    try:
        if not path.parent.is_dir():
            return ()
        with _alone(path.parent):
            if not path.exists() or not ours(path):
                return ()
            path.unlink()
    except OSError as e:
        raise InstallError(f"{path} cannot be taken away: {e}") from e
    return (path,)


def _temporary(path: Path) -> Path:
    # A suffix that no runtime reads.
    return path.with_name(f".{path.name}.tmp")


def _put(path: Path, data: bytes, *, mode: int, step: Callable[[str], None]) -> None:
    """Makes ``path`` hold ``data``, in one step; the same again touches nothing. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data and path.stat().st_mode & 0o7777 == mode:
            return
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        step("written")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    step("renamed")


def _configurations(conf_dir: Path) -> tuple[str, ...]:
    """Names of the configurations that are not ours, in the order in which a runtime looks at them."""
    names = (p.name for p in conf_dir.iterdir() if p.suffix in _SUFFIXES and p.name != CONFLIST and p.is_file())
    return tuple(sorted(names))


def _ours(path: Path) -> bool:
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (msgspec.MsgspecError, RecursionError, FileNotFoundError):
        return False
    plugins = found.get("plugins") if isinstance(found, dict) else None
    return isinstance(plugins, list) and any(isinstance(p, dict) and p.get("type") == PLUGIN for p in plugins)
