"""The endpoint: it answers a few questions, and nothing that comes to it harms who runs it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

from cni.endpoint import Address, AddressError, Endpoint, Page, Reply, Settings, health, parse_address
from store.clock import SystemClock

SETTINGS = Settings(connections=2, limit=30.0, retry=0.05)


def said(query: Mapping[str, str]) -> Reply:
    """A page that says what it was asked."""
    return Reply(" ".join(f"{name}={value}" for name, value in query.items()))


PAGES: dict[str, Page] = {
    "/metrics": lambda _: Reply(b"a 1\n", "text/plain"),
    "/ok": lambda _: health(""),
    "/ill": lambda _: health("the store is away"),
    "/said": said,
}


def serve(
    address: Address,
    story: Callable[[], Awaitable[None]],
    page: Callable[[], bytes] | None = None,
    limit: float = SETTINGS.limit,
) -> None:
    """Runs the story beside an endpoint, and looks that it lived on. ``page`` is what ``/metrics`` says."""
    pages = PAGES | ({"/metrics": lambda _: Reply(page())} if page else {})

    async def main() -> None:
        running = asyncio.create_task(Endpoint(address, pages, SystemClock(), replace(SETTINGS, limit=limit)).run())
        try:
            await story()
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), 60))


async def ask(address: Address, request: bytes, *, end: bool = False) -> bytes:
    """The whole answer; ``end``: nothing more will be said."""
    async with asyncio.timeout(60):
        while True:
            try:
                reader, writer = await (
                    asyncio.open_unix_connection(address.path)
                    if address.path
                    else asyncio.open_connection(address.host, address.port)
                )
                break
            except (FileNotFoundError, ConnectionRefusedError):  # it is still about to listen
                await asyncio.sleep(0.01)
        writer.write(request)
        if end:
            writer.write_eof()
        try:
            return await reader.read()
        finally:
            writer.close()


@pytest.fixture(params=["127.0.0.1", "::1", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    return place(request.param, tmp_path)


def place(host: str, folder: Path) -> Address:
    if host == "unix":
        return Address(path=str(folder / "metrics.sock"))
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return Address(host=host, port=probe.getsockname()[1])


def test_a_scrape_gets_the_page(address: Address) -> None:
    async def story() -> None:
        answer = await ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Length: 4" in head
        assert body == b"a 1\n"

    serve(address, story)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"400"),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics SPDY/3\r\n\r\n", b"400"),
        (b"\xff" * 200 + b"\r\n\r\n", b"400"),
        (b"GET /metrics?\xff HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics/ HTTP/1.1\r\n\r\n", b"404"),
        (b"HEAD /ok HTTP/1.1\r\n\r\n", b"405"),
    ],
)
def test_other_requests_are_refused_by_code(tmp_path: Path, request_: bytes, code: bytes) -> None:
    where = place("unix", tmp_path)

    async def story() -> None:
        assert (await ask(where, request_)).startswith(b"HTTP/1.1 " + code)

    serve(where, story)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (b"/ok", b"HTTP/1.1 200 OK|ok\n"),
        (b"/ill", b"HTTP/1.1 503 Service Unavailable|the store is away\n"),
        (b"/said", b"HTTP/1.1 200 OK|\n"),
        (
            b"/said?peer=10.0.0.1&prefix=10.244.0.0%2F26&all",
            b"HTTP/1.1 200 OK|peer=10.0.0.1 prefix=10.244.0.0/26 all=\n",
        ),
        (b"/said?peer=a&peer=b", b"HTTP/1.1 200 OK|peer=b\n"),
        (b"/said?=&&&;", b"HTTP/1.1 200 OK|= ;=\n"),
        (b"/nothing", b"HTTP/1.1 404 Not Found|there are: /ill, /metrics, /ok, /said\n"),
    ],
)
def test_a_page_has_its_path_and_takes_a_query(tmp_path: Path, target: bytes, wanted: bytes) -> None:
    where = place("unix", tmp_path)

    async def story() -> None:
        head, _, body = (await ask(where, b"GET " + target + b" HTTP/1.1\r\n\r\n")).partition(b"\r\n\r\n")
        assert head.split(b"\r\n")[0] + b"|" + body == wanted

    serve(where, story)


def test_who_ends_in_the_middle_or_goes_over_the_limit_is_refused(tmp_path: Path) -> None:
    where = place("unix", tmp_path)

    async def story() -> None:
        assert (await ask(where, b"GET /metr", end=True)).startswith(b"HTTP/1.1 400")
        assert (await ask(where, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 20_000)).startswith(b"HTTP/1.1 400")

    serve(where, story)


def test_who_says_nothing_is_cut_off_and_does_not_keep_others_out(tmp_path: Path) -> None:
    """Two silent ones are as many as may be connected; after their time there is room again."""
    where = place("unix", tmp_path)

    async def story() -> None:
        assert (await ask(where, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")
        silent = [asyncio.create_task(ask(where, b"GET /metrics")) for _ in range(2)]
        await asyncio.sleep(0.1)
        try:
            answer = await ask(where, b"GET /metrics HTTP/1.1\r\n\r\n")
        except ConnectionError:
            answer = b""
        assert answer == b""
        assert all(answer.startswith(b"HTTP/1.1 408") for answer in await asyncio.gather(*silent))
        assert (await ask(where, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")

    serve(where, story, limit=5.0)


def test_a_page_that_fails_is_a_500(tmp_path: Path) -> None:
    where = place("unix", tmp_path)

    def broken() -> bytes:
        raise ZeroDivisionError

    async def story() -> None:
        assert (await ask(where, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 500")

    serve(where, story, broken)


def test_an_address_that_is_in_use_is_taken_once_it_is_free(address: Address) -> None:
    holder = socket.socket(
        socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET
    )
    holder.bind(address.path or (address.host, address.port))
    holder.listen()

    async def story() -> None:
        await asyncio.sleep(0.2)
        holder.close()
        assert (await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200")

    serve(address, story)


def test_the_socket_is_roots_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    where = place("unix", tmp_path)
    made = Path(where.path)

    async def story() -> None:
        assert (await ask(where, b"GET /metrics HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n600")

    serve(where, story, lambda: f"{made.stat().st_mode & 0o777:o}".encode())
    assert not made.exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:9464", Address(host="127.0.0.1", port=9464)),
        ("[::1]:9464", Address(host="::1", port=9464)),
        ("[::]:1", Address(host="::", port=1)),
        ("/run/underlay/metrics.sock", Address(path="/run/underlay/metrics.sock")),
    ],
)
def test_addresses_are_read_and_written_alike(text: str, wanted: Address) -> None:
    assert parse_address(text) == wanted
    assert str(wanted) == text


@pytest.mark.parametrize(
    "text", ["9464", ":9464", "localhost:9464", "127.0.0.1", "::1:9464", "127.0.0.1:0", "1.2.3.4:x"]
)
def test_other_texts_are_no_addresses(text: str) -> None:
    with pytest.raises(AddressError, match=r"127\.0\.0\.1:9464"):
        parse_address(text)
