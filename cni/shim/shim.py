#!/usr/bin/python3 -ISE
"""shim.c in Python, for a machine without a compiler: same protocol, same answers, some 10 ms slower.

Only the standard library, and of that only what starts fast; it is copied to the CNI binary folder as it is.
"""

from __future__ import annotations

import array
import os
import re
import socket
import struct
import sys
import time

ENVIRONMENT_LIMIT = 64 << 10
CONFIG_LIMIT = 1 << 20
ANSWER_LIMIT = 1 << 20
WAIT_FOR_SERVER = 5
RETRY = 0.02
ANSWER_TIMEOUT = 60

# CNI specification, section 5, "Error".
BAD_ENVIRONMENT, IO_FAILURE, BAD_CONFIG, TRY_AGAIN, NOT_AVAILABLE = 4, 5, 7, 11, 50

VERSIONS = b'{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}\n'


class Failure(Exception):
    """An error for the runtime: (code, message, details)."""


def main() -> int:
    config = bytearray()
    try:
        return run(config)
    except Failure as e:
        write(error(bytes(config), *e.args))
        return 1


def run(config: bytearray) -> int:
    """Does it all; ``config`` gets the network configuration, for the error's version. Raises Failure."""
    command = os.environ.get("CNI_COMMAND", "")
    if not command:
        details = "CNI_COMMAND is not set; this program is run by a container runtime"
        raise Failure(BAD_ENVIRONMENT, "invalid CNI_COMMAND", details)
    if command == "VERSION":
        write(VERSIONS)
        return 0
    folder = os.environ.get("UNDERLAY_RUN") or "/run/underlay"
    path = folder + "/cni.sock"
    if len(os.fsencode(path)) > 107:
        details = f"UNDERLAY_RUN: {folder} is too long for a socket's path"
        raise Failure(BAD_ENVIRONMENT, "invalid UNDERLAY_RUN", details)
    environment = read_environment()
    config += read_config()
    if len(config) > CONFIG_LIMIT:
        details = f"standard input has more than {CONFIG_LIMIT} B"
        raise Failure(BAD_CONFIG, "the network configuration is too large", details)
    head = struct.pack("<4sII", b"ULC1", len(environment), len(config))
    return call(command, folder, path, head + environment + config)


def call(command: str, run: str, path: str, request: bytes) -> int:
    """Asks until there is an answer, and prints it; leaves a DEL in the queue. Raises Failure."""
    pod_ns = -1
    netns = os.environ.get("CNI_NETNS")
    if netns:
        try:
            pod_ns = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pod_ns = -1  # the server says what that means for the verb
    end = time.monotonic() + WAIT_FOR_SERVER
    while True:
        code = ask(path, request, pod_ns)
        if code is not None:
            return code
        if command == "DEL":
            # A server that came up meanwhile may have looked into the queue before: it is asked once more.
            left = leave(run, request)
            code = ask(path, request, pod_ns)
            if code is None:
                return 0
            if os.path.exists(left):  # noqa: PTH110 - pathlib takes longer to import than all the rest
                os.unlink(left)  # noqa: PTH108
            return code
        if time.monotonic() > end:
            break
        time.sleep(RETRY)
    details = f"{path}: nobody answered for {WAIT_FOR_SERVER} s; is underlay-cni running on this node?"
    raise Failure(NOT_AVAILABLE if command == "STATUS" else TRY_AGAIN, "no server", details)


def read_environment() -> bytes:
    pairs = [k + b"=" + v + b"\0" for k, v in os.environb.items() if k.startswith(b"CNI_")]
    environment = b"".join(pairs) + b"UNDERLAY_ASKED=%d\0" % time.monotonic_ns()
    if len(environment) > ENVIRONMENT_LIMIT:
        details = f"the CNI_ variables have more than {ENVIRONMENT_LIMIT} B"
        raise Failure(BAD_ENVIRONMENT, "the environment is too large", details)
    return environment


def read_config() -> bytes:
    """Standard input, one byte more than allowed at most."""
    config = b""
    while len(config) <= CONFIG_LIMIT:
        try:
            chunk = os.read(0, CONFIG_LIMIT + 1 - len(config))
        except OSError as e:
            raise Failure(
                IO_FAILURE, "the network configuration cannot be read", f"standard input: {e.strerror}"
            ) from e
        if not chunk:
            break
        config += chunk
    return config


def ask(path: str, request: bytes, pod_ns: int) -> int | None:
    """Asks once, prints the answer and returns its exit code; None without a whole answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_TIMEOUT)
        try:
            connection.connect(path)
            send(connection, request, pod_ns)
            head = receive(connection, 12)
            magic, code, length = struct.unpack("<4sII", head)
            if magic != b"ULR1" or length > ANSWER_LIMIT:
                return None
            answer = receive(connection, length)
        except (OSError, EOFError):
            return None
    write(answer)
    return int(code & 0xFF)


def send(connection: socket.socket, request: bytes, pod_ns: int) -> None:
    """A server that refuses early closes its end: then its answer is there to be read."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pod_ns]))] if pod_ns >= 0 else []
    try:
        sent = connection.sendmsg([request], ancillary)
        connection.sendall(request[sent:])
    except (BrokenPipeError, ConnectionResetError):
        return


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = connection.recv(length - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def leave(run: str, request: bytes) -> str:
    """Leaves the request for the next server, whole or not at all; returns the file's path."""
    queue = run + "/queue"
    path = f"{queue}/{time.time_ns():020d}-{os.getpid()}.del"
    temporary = f"{queue}/.{os.getpid()}.tmp"
    try:
        make_folder(run, 0o755)
        make_folder(queue, 0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(temporary, flags, 0o600)
        try:
            try:
                written = 0
                while written < len(request):
                    written += os.write(file, request[written:])
            finally:
                os.close(file)
            os.rename(temporary, path)  # noqa: PTH104
        except OSError:
            os.unlink(temporary)  # noqa: PTH108
            raise
    except OSError as e:
        details = f"{queue}: {e.strerror}; make room there or start underlay-cni"
        raise Failure(TRY_AGAIN, "no server, and DEL cannot be queued", details) from e
    return path


def make_folder(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)  # noqa: PTH102
    except FileExistsError:
        return


def error(config: bytes, code: int, message: str, details: str) -> bytes:
    import json  # only here: it is a third of the start

    found = re.search(rb'"cniVersion"[\s:]*"([0-9.]{1,15})"', config)
    version = found[1].decode() if found else "1.1.0"
    # What is not ASCII may be anything: a path is bytes.
    plain = os.fsencode(details).decode("ascii", "replace")
    body = {"cniVersion": version, "code": code, "msg": message, "details": plain}
    return json.dumps(body).encode() + b"\n"


def write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
