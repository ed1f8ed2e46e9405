"""What pods of the tests run: a server that says whom it hears, and a client that does many checks at once.

    netexec.py serve PORT      HTTP on PORT, UDP on the port after it, every address of both families
    netexec.py dial            checks on standard input (a JSON list), their results on standard output

Runs by itself on any Python of a node: no import but the standard library's.
"""

import asyncio
import errno
import json
import os
import signal
import socket
import ssl
import sys
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Check = dict[str, Any]

LIMIT = 30.0
#: linux/in.h, linux/in6.h: send under an address that is not ours; never fragment.
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _DO = 10, 23, 2
#: Bytes before the payload of a UDP datagram.
_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def main(mode: str, *words: str) -> None:
    if mode == "serve":
        asyncio.run(serve(int(words[0])))
    else:
        print(json.dumps(asyncio.run(dial(json.load(sys.stdin)))))


# -- server ----------------------------------------------------------------------------------------------------------


class Heard(asyncio.DatagramProtocol):
    """Answers each datagram with who sent it, and as many bytes as came."""

    def __init__(self) -> None:
        self.senders: dict[str, int] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, sender: Any) -> None:
        address = plain(sender[0])
        self.senders[address] = self.senders.get(address, 0) + 1
        head = json.dumps({"hostname": socket.gethostname(), "client": address, "size": len(data)}).encode()
        self._transport.sendto(head.ljust(len(data)), sender)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    heard = Heard()
    await loop.create_datagram_endpoint(lambda: heard, sock=both(socket.SOCK_DGRAM, port + 1))
    state = {"ready": True, "healthy": True}
    ending = asyncio.Event()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer, heard, state, ending)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client's to complain
        finally:
            writer.close()

    listener = both(socket.SOCK_STREAM, port)
    server = await asyncio.start_server(client, sock=listener, backlog=1024)
    print(f"serving on {port}", flush=True)
    # It goes on until /exit, or SIGKILL.
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    await server.serve_forever()


async def answer(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    heard: Heard,
    state: dict[str, bool],
    ending: asyncio.Event,
) -> None:
    request = (await reader.readuntil(b"\r\n\r\n")).decode()
    method, target, _ = request.split("\r\n", 1)[0].split(" ")
    url = urllib.parse.urlsplit(target)
    asked = dict(urllib.parse.parse_qsl(url.query))
    status, body = 200, b""
    sent = {k.lower(): v for k, _, v in (line.partition(": ") for line in request.split("\r\n")[1:])}
    posted = await reader.readexactly(int(sent.get("content-length", 0)))
    if url.path in ("/", "/end"):
        if url.path == "/end":
            await ending.wait()
        client = plain(writer.get_extra_info("peername")[0])
        body = json.dumps({"hostname": socket.gethostname(), "client": client, "posted": len(posted)}).encode()
    elif url.path == "/bytes":
        body = b"x" * int(asked["count"])
    elif url.path == "/heard":
        body = json.dumps(heard.senders).encode()
    elif url.path in ("/ready", "/healthy"):
        status = 200 if state[url.path[1:]] else 503
    elif url.path == "/set":
        state[asked["what"]] = asked["to"] == "yes"
    elif url.path == "/exit":
        os._exit(int(asked["code"]))
    else:
        status = 404
    print(method, target, flush=True)
    writer.write(f"HTTP/1.1 {status} said\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    await writer.drain()


# -- client ----------------------------------------------------------------------------------------------------------


async def dial(checks: list[Check]) -> list[Any]:
    """Each result is what the check says, or {"error": ...}."""
    return await asyncio.gather(*(_one(check) for check in checks))


async def _one(check: Check) -> Any:
    kinds: dict[str, Callable[..., Awaitable[Any]]] = {
        "http": http, "udp": udp, "full": full, "many": many, "spoof": spoof, "api": api
    }  # fmt: skip
    asked = {k: v for k, v in check.items() if k != "kind"}
    try:
        async with asyncio.timeout(check.get("limit", LIMIT)):
            return await kinds[check["kind"]](**{k: v for k, v in asked.items() if k != "limit"})
    except Exception as e:  # the report is the caller's to judge
        return {"error": f"{type(e).__name__}: {e}"}


async def http(host: str, port: int, path: str = "/", post: int = 0) -> Any:
    """What the server says (JSON), or how many bytes came; {"status": N} where that is not 200."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        method = "POST" if post else "GET"
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {post}\r\n\r\n".encode() + b"p" * post)
        await writer.drain()
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status = int(head.split(b" ", 2)[1])
    if status != 200:
        return {"status": status}
    return json.loads(body) if body[:1] == b"{" else {"bytes": len(body)}


async def udp(host: str, port: int, size: int = 200) -> Any:
    """What the server says of a datagram. Sent again after a second, as any client does."""
    with _datagram(host) as sock:
        sock.connect((host, port))
        loop = asyncio.get_running_loop()
        while True:
            await loop.sock_sendall(sock, b"u" * size)
            try:
                async with asyncio.timeout(1):
                    return json.loads(await loop.sock_recv(sock, 1 << 16))
            except TimeoutError:
                continue


async def full(host: str, port: int, device: str = "eth0") -> Any:
    """A datagram as large as the device's MTU allows, never to be fragmented, there and back; and one byte more."""
    loop = asyncio.get_running_loop()
    mtu = _mtu(device)
    with _datagram(host) as sock:
        level, option = (
            (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER) if sock.family == socket.AF_INET6 else (0, _IP_MTU_DISCOVER)
        )
        sock.setsockopt(level, option, _DO)
        sock.connect((host, port))
        size = mtu - _HEADERS[sock.family]
        await loop.sock_sendall(sock, b"f" * size)
        said = await loop.sock_recv(sock, 1 << 16)
        try:
            sock.send(b"f" * (size + 1))
            more = "sent"
        except OSError as e:
            more = errno.errorcode[e.errno or 0]
        return {"mtu": mtu, "came": len(said), "more": more}


async def many(host: str, port: int, count: int) -> Any:
    """So many connections, all open at once before the first is used."""
    opened = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(count)))
    for _, writer in opened:
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
    answers = await asyncio.gather(*(reader.read(-1) for reader, _ in opened))
    for _, writer in opened:
        writer.close()
    return {"good": sum(answer.startswith(b"HTTP/1.1 200") for answer in answers)}


async def spoof(host: str, port: int, source: str) -> Any:
    """Ten datagrams under an address that is not ours."""
    with _datagram(host) as sock:
        v6 = sock.family == socket.AF_INET6
        sock.setsockopt(socket.IPPROTO_IPV6 if v6 else 0, _IPV6_TRANSPARENT if v6 else _IP_TRANSPARENT, 1)
        sock.bind((source, 0))
        for _ in range(10):
            sock.sendto(b"spoof", (host, port))
    return {"sent": 10}


async def api() -> Any:
    """Who we are to the API server, at the address and with the token that every pod is given."""
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    headers = {
        "Authorization": f"Bearer {(_ACCOUNT / 'token').read_text()}",
        "Content-Type": "application/json",
    }
    request = urllib.request.Request(
        f"{server}/apis/authentication.k8s.io/v1/selfsubjectreviews", json.dumps(body).encode(), headers
    )
    trust = ssl.create_default_context(cafile=_ACCOUNT / "ca.crt")

    def ask() -> Any:
        with urllib.request.urlopen(request, context=trust, timeout=LIMIT) as said:
            return json.load(said)

    said = await asyncio.to_thread(ask)
    return {"server": server, "user": said["status"]["userInfo"]["username"]}


# -- sockets ---------------------------------------------------------------------------------------------------------


def both(kind: int, port: int) -> socket.socket:
    """A socket that hears both families."""
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    sock.setblocking(False)
    return sock


def _mtu(device: str) -> int:
    return int(Path(f"/sys/class/net/{device}/mtu").read_text())


def _datagram(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


if __name__ == "__main__":
    main(*sys.argv[1:])
