"""The Container Runtime Interface, as far as the tests speak it: kubelet's side.

gRPC over HTTP/2 (grpc/doc/PROTOCOL-HTTP2.md) with a codec for protobuf's wire format. Messages are written as trees of
field numbers; those are of kubernetes/cri-api, pkg/apis/runtime/v1/api.proto. No thread is started, as the tests fork.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.errors
import h2.events

#: An int is a varint, text and bytes have a length, a mapping is a message in a message, a list is repeated.
Value = int | str | bytes | Mapping[int, Any] | list[Any]


class CRIError(Exception):
    """The runtime refused or did not answer; ``code`` is gRPC's, 4 for a deadline that passed."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(f"gRPC {code}: {text}")


class Pending:
    """A call that is under way on a connection of its own; ``result`` waits for it."""

    def __init__(self, path: str, method: str, message: Mapping[int, Value], limit: float) -> None:
        self._end = time.monotonic() + limit
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/runtime.v1.RuntimeService/{method}",
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-timeout": f"{int(limit * 1000)}m",
        }
        self._h2.send_headers(1, list(headers.items()))
        body = encode(message)
        self._h2.send_data(1, struct.pack(">BI", 0, len(body)) + body, end_stream=True)
        self._socket.sendall(self._h2.data_to_send())

    def result(self) -> dict[int, list[Any]]:
        """Field number -> values: a varint as int, everything else as bytes. Raises CRIError."""
        with self._socket:
            try:
                return self._answer()
            except TimeoutError as e:
                # As kubelet's: the runtime's own handler may still be cleaning up.
                raise CRIError(4, "the deadline passed") from e
            except OSError as e:
                raise CRIError(14, f"no answer: {e}") from e

    def _answer(self) -> dict[int, list[Any]]:
        body, headers = b"", dict[str, str]()
        while "ended" not in headers:
            self._socket.settimeout(max(self._end - time.monotonic(), 0.01))
            received = self._socket.recv(1 << 16)
            if not received:
                raise CRIError(14, "the runtime closed the connection")
            for event in self._h2.receive_data(received):
                match event:
                    case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                        headers.update({str(k): str(v) for k, v in event.headers})
                    case h2.events.DataReceived():
                        body += event.data
                        self._h2.acknowledge_received_data(event.flow_controlled_length, 1)
                    case h2.events.StreamEnded():
                        headers["ended"] = "yes"
                    case h2.events.StreamReset(error_code=h2.errors.ErrorCodes.CANCEL):
                        raise CRIError(4, "the deadline passed, says the runtime")
                    case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                        raise CRIError(14, f"the runtime ended the call: {event}")
            self._socket.sendall(self._h2.data_to_send())
        code = int(headers.get("grpc-status", "2"))
        if code:
            raise CRIError(code, unquote(headers.get("grpc-message", "")))
        return decode(body[5:])


class CRI:
    """A runtime behind a unix socket. Times in seconds; every method raises CRIError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def begin(self, method: str, message: Mapping[int, Value], limit: float = 60) -> Pending:
        return Pending(self._path, method, message, limit)

    def call(self, method: str, message: Mapping[int, Value], limit: float = 60) -> dict[int, list[Any]]:
        return self.begin(method, message, limit).result()

    def version(self) -> str:
        return text(self.call("Version", {1: "0.1.0"})[3])

    def network_ready(self) -> str:
        """ "" if it is, else why not."""
        status = decode(self.call("Status", {})[1][0])
        for condition in map(decode, status[1]):
            if text(condition[1]) == "NetworkReady":
                return "" if condition.get(2) else text(condition.get(4, condition.get(3, [b"?"])))
        raise AssertionError(status)

    def run(self, pod: Mapping[int, Value], limit: float = 60) -> str:
        """RunPodSandbox: the sandbox's id."""
        return text(self.call("RunPodSandbox", {1: pod}, limit)[1])

    def stop(self, sandbox: str, limit: float = 60) -> None:
        self.call("StopPodSandbox", {1: sandbox}, limit)

    def remove(self, sandbox: str, limit: float = 60) -> None:
        self.call("RemovePodSandbox", {1: sandbox}, limit)

    def network(self) -> dict[str, Any]:
        """The network configuration list that it goes by at present."""
        info = {text(e[1]): e[2][0] for e in map(decode, self.call("Status", {1: 1})[2])}
        (ours,) = [n for n in json.loads(info["cniconfig"])["Networks"] or () if n["IFName"] != "lo"]
        return dict(json.loads(ours["Config"]["Source"]))

    def sandboxes(self) -> list[str]:
        return [text(decode(each)[1]) for each in self.call("ListPodSandbox", {}).get(1, [])]

    def addresses(self, sandbox: str) -> list[str]:
        network = decode(decode(self.call("PodSandboxStatus", {1: sandbox})[1][0])[5][0])
        return [text(network[1]), *(text(decode(ip)[1]) for ip in network.get(2, []))]

    def start_container(self, sandbox: str, pod: Mapping[int, Value], name: str, image: str, command: list[str]) -> str:
        container: dict[int, Value] = {1: {1: name}, 2: {1: image}, 3: list(command)}
        made = text(self.call("CreateContainer", {1: sandbox, 2: container, 3: pod})[1])
        self.call("StartContainer", {1: made})
        return made


def pod(name: str, *, uid: str = "", ports: Mapping[int, int] | None = None, cgroup: str = "") -> dict[int, Value]:
    """A PodSandboxConfig in namespace default; ``ports``: host's -> container's (TCP)."""
    made: dict[int, Value] = {1: {1: name, 2: uid or f"uid-of-{name}", 3: "default"}, 2: name}
    if ports:
        made[5] = [{2: container, 3: host} for host, container in ports.items()]
    made[8] = {1: cgroup}
    return made


def text(values: list[Any]) -> str:
    return bytes(values[0]).decode()


def encode(message: Mapping[int, Value]) -> bytes:
    return b"".join(_field(number, value) for number, value in message.items())


def decode(data: bytes) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        if key & 7 == 0:
            value, at = _read_varint(data, at)
            found.setdefault(key >> 3, []).append(value)
        elif key & 7 == 2:
            length, at = _read_varint(data, at)
            found.setdefault(key >> 3, []).append(data[at : at + length])
            at += length
        else:
            raise ValueError(f"wire type {key & 7} at byte {at}: no message of the CRI that we read has it")
    return found


def _field(number: int, value: Value) -> bytes:
    match value:
        case list():
            return b"".join(_field(number, each) for each in value)
        case int():
            return _varint(number << 3) + _varint(value)
        case str():
            body = value.encode()
        case bytes():
            body = value
        case _:
            body = encode(value)
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value, at
