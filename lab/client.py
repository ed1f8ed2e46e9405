"""The command's half of the conversation with a supervisor."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from lab import folder as folders
from lab.errors import LabError, NoLab, Refused
from lab.folder import Folder
from lab.topology import Shape
from lab.wire import Answer, Done, Down, Failed, Place, Request, State, Status, Step, Where

T = TypeVar("T")

_UNSHARE: Final = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
_AS_ROOT: Final = ["--user", "--map-root-user"]
_STARTS_WITHIN: Final = 60.0


def ask(
    folder: Folder,
    request: Request,
    kind: type[T],
    *,
    heard: Callable[[Step], None] | None = None,
    interruptible: bool = False,
) -> T:
    """Sends the request; returns its result as ``kind``. With ``interruptible`` a KeyboardInterrupt tells the other end
    to come to an end, and its result is waited for. Raises NoLab, and Refused with the supervisor's reason."""
    try:
        with _connect(folder) as connection, connection.makefile("rwb") as stream:
            stream.write(msgspec.json.encode(request) + b"\n")
            stream.flush()
            while True:
                try:
                    line = stream.readline()
                except KeyboardInterrupt:
                    if not interruptible:
                        raise
                    interruptible = False
                    connection.shutdown(socket.SHUT_WR)
                    continue
                if not line:
                    break
                answer: Answer = msgspec.json.decode(line, type=Answer)
                if isinstance(answer, Done):
                    return msgspec.convert(answer.result, kind)
                if isinstance(answer, Failed):
                    raise Refused(answer.reason)
                if heard:
                    heard(answer)
    except ConnectionError as e:
        raise _ended(folder) from e
    raise _ended(folder)


def _ended(folder: Folder) -> NoLab:
    return NoLab(f"{folder.path}: the lab ended while it was asked; the end of {folder.log} may say why")


def alive(folder: Folder) -> bool:
    """Whether somebody answers there."""
    try:
        _connect(folder).close()
    except NoLab:
        return False
    return True


def start(folder: Folder, shape: Shape, *, programs: Path | None = None, cluster: Sequence[str] = ()) -> None:
    """Starts a supervisor for the folder, detached from this process; returns when it answers. ``programs``: the folder
    of a control plane's, which is to be its store; ``cluster``: what makes a whole cluster of it, as the supervisor's
    options. Raises LabError."""
    lock = folders.claim(folder)
    if lock is None:
        raise LabError(f"{folder.path}: another lab is starting or ending there; try again in a moment")
    asked = [f"--shape={msgspec.json.encode(shape).decode()}"]
    with folder.log.open("ab") as log, ExitStack() as ours:
        # The lock is held as long as any of them lives.
        passed = [lock]
        if programs:
            # Made here, so that it is in the network namespace of the shells that will use it.
            listener = ours.enter_context(socket.create_server(("127.0.0.1", 0)))
            asked += [f"--programs={programs}", f"--listener={listener.fileno()}", *cluster]
            passed.append(listener.fileno())
        process = subprocess.Popen(
            [*_unshare(), sys.executable, "-m", "lab.supervisor", str(folder.path), *asked],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            pass_fds=passed,
        )
    os.close(lock)
    end = time.monotonic() + _STARTS_WITHIN
    while not alive(folder):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            process.wait()
            raise LabError(f"the lab's supervisor did not start:\n{folder.log.read_text().strip()}")
        time.sleep(0.02)
    process.returncode = 0  # it is to outlive us: no warning that it does


def stop(folder: Folder) -> bool:
    """Ends the lab, also one that hangs or was killed, and removes its folder; False if there was none.
    Raises LabError."""
    try:
        pid = peer(folder)
    except NoLab:
        return folders.remove(folder)
    process = os.pidfd_open(pid)
    try:
        _end(folder, process)
    finally:
        os.close(process)
    return folders.remove(folder)


def enter(folder: Folder, name: str, command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` in the namespace of a node, pod, ToR or spine. Raises NoLab, Refused."""
    place = ask(folder, Where(name), Place)
    pid = peer(folder)
    words = ["nsenter", f"--target={pid}", "--mount", "--root", "--pid", f"--net=/proc/{pid}/root{place.netns}"]
    if Path(f"/proc/{pid}/ns/user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino:
        words += ["--user", "--preserve-credentials"]
    environment = [f"{key}={value}" for key, value in place.environment.items()]
    first, *rest = command
    if first == "birdc" and "BIRD" in place.environment:
        rest = ["-s", place.environment["BIRD"], *rest]
    if first == "vtysh" and "FRR" in place.environment:
        rest = ["--vty_socket", place.environment["FRR"], *rest]
    return [
        *words,
        "env",
        f"PATH={Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        *environment,
        *place.through,
        first,
        *rest,
    ]


def state(folder: Folder) -> State:
    return ask(folder, Status(), State)


def _connect(folder: Folder) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(folder.socket))
    except (FileNotFoundError, ConnectionRefusedError) as e:
        connection.close()
        raise NoLab(f"{folder.path}: no lab is up there: underlay-lab up") from e
    except OSError as e:
        connection.close()
        raise NoLab(f"{folder.socket}: {e.strerror}") from e
    return connection


def peer(folder: Folder) -> int:
    """The supervisor's process id as we see it (unix(7), SO_PEERCRED)."""
    with _connect(folder) as connection:
        pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid


def _end(folder: Folder, process: int, *, limit: float = 5) -> None:
    with contextlib.suppress(NoLab):  # it may be gone before its answer is out
        ask(folder, Down(), type(None))
    if not select.select([process], [], [], limit)[0]:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], limit)


def _unshare() -> list[str]:
    """The unshare command that works here: as root, or as root of a user namespace. Raises LabError."""
    for words in (_UNSHARE, [*_UNSHARE, *_AS_ROOT]):
        done = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return words
    raise LabError(
        f"namespaces cannot be made here: {done.stderr.strip()}: run it as root, or allow user namespaces "
        "(sysctl user.max_user_namespaces; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0)"
    )
