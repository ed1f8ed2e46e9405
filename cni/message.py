r"""What travels between shim and server: protocol 1.

Request: ``ULC1``, u32le length of the environment, u32le length of the configuration, then the environment as
``KEY=VALUE\0``... and the configuration as it is. The environment is the runtime's, as far as it begins with ``CNI_``,
and ``UNDERLAY_ASKED``: when the shim was started, in nanoseconds of CLOCK_MONOTONIC. The pod's network namespace comes
as a descriptor (SCM_RIGHTS) with the first byte. Answer: ``ULR1``, u32le exit code, u32le length, then what the shim
prints. A queued DEL is a request in a file.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from cni.errors import CNIError

#: The server's, in its run directory.
SOCKET: Final = "cni.sock"
REQUEST: Final = struct.Struct("<4sII")
ANSWER: Final = struct.Struct("<4sII")
REQUEST_MAGIC: Final = b"ULC1"
ANSWER_MAGIC: Final = b"ULR1"
#: Bytes.
ENVIRONMENT_LIMIT: Final = 64 << 10
CONFIG_LIMIT: Final = 1 << 20
MESSAGE_LIMIT: Final = REQUEST.size + ENVIRONMENT_LIMIT + CONFIG_LIMIT


class MalformedMessage(CNIError):
    """A request that no shim of ours sends: wrong magic, over a limit, cut short or not UTF-8."""


class Request(msgspec.Struct, frozen=True):
    environment: dict[str, str]
    config: bytes


def body_length(head: bytes) -> int:
    """How many bytes follow a request's head (REQUEST.size bytes). Raises MalformedMessage."""
    magic, environment, config = REQUEST.unpack(head)
    if magic != REQUEST_MAGIC:
        raise MalformedMessage(f"a request begins with {magic!r}, expected {REQUEST_MAGIC!r}: shim and server differ")
    for what, length, limit in (
        ("environment", environment, ENVIRONMENT_LIMIT),
        ("network configuration", config, CONFIG_LIMIT),
    ):
        if length > limit:
            raise MalformedMessage(f"the {what} has {length} B, {limit} B are the limit; make it smaller")
    return int(environment + config)


def decode(data: bytes) -> Request:
    """A whole request. Raises MalformedMessage."""
    if len(data) < REQUEST.size or len(data) != REQUEST.size + body_length(data[: REQUEST.size]):
        raise MalformedMessage(f"a request of {len(data)} B is cut short, or has something after its end")
    length = REQUEST.unpack_from(data)[1]
    variables: dict[str, str] = {}
    for pair in filter(None, data[REQUEST.size : REQUEST.size + length].split(b"\0")):
        key, equals, value = pair.partition(b"=")
        if not equals:
            raise MalformedMessage(f"{pair[:80]!r} in the environment is not KEY=VALUE")
        try:
            # Of two the first counts, as for getenv(3) in the shim.
            variables.setdefault(key.decode(), value.decode())
        except UnicodeDecodeError as e:
            raise MalformedMessage(f"{key[:80]!r} in the environment is not UTF-8: {e}") from e
    return Request(variables, data[REQUEST.size + length :])


def encode_answer(code: int, text: bytes) -> bytes:
    return ANSWER.pack(ANSWER_MAGIC, code, len(text)) + text
