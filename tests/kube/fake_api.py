"""An API server of a script: it answers each request as the test laid down, in order, and takes no other."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeApi:
    """``asked`` is every request that came, as "METHOD path?query". Used as an async context."""

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self._answers = deque(answers)
        self._tls = tls
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.tokens: list[str] = []
        self.times: list[float] = []
        self._runner: web.AppRunner | None = None
        self._came = asyncio.Event()
        self.url = ""

    async def came(self, count: int) -> None:
        """Waits for that many requests in all."""
        while len(self.asked) < count:
            self._came.clear()
            await self._came.wait()

    def then(self, *answers: Answer) -> None:
        self._answers.extend(answers)

    async def __aenter__(self) -> FakeApi:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"{'https' if self._tls else 'http'}://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def left(self) -> int:
        """Answers that nobody asked for."""
        return len(self._answers)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.raw_path}")
        self.tokens.append(request.headers.get("Authorization", ""))
        self.times.append(asyncio.get_running_loop().time())
        self.bodies.append(await request.read())
        self._came.set()
        if not self._answers:
            return web.json_response({"message": f"the script has no answer to {request.raw_path}"}, status=500)
        return await self._answers.popleft()(request)


def says(body: object, *, code: int = 200, **headers: str) -> Answer:
    """A whole answer."""

    async def answer(_: web.Request) -> web.StreamResponse:
        text = body if isinstance(body, str) else json.dumps(body)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return web.Response(text=text, status=code, content_type="application/json", headers=named)

    return answer


def refuses(code: int, reason: str = "", message: str = "", *, after: int = 0, **details: Any) -> Answer:
    status = {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}
    return says(status, code=code, **({"Retry_After": str(after)} if after else {}))


def streams(*parts: object, hold: float = 0, cut: bool = False) -> Answer:
    """A watch: lines (bytes are sent as they are), then silence for ``hold`` seconds, then its end; ``cut``: without
    saying so."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        for part in parts:
            await response.write(part if isinstance(part, bytes) else json.dumps(part).encode() + b"\n")
            await asyncio.sleep(0)
        await asyncio.sleep(hold)
        if cut and request.transport is not None:
            request.transport.abort()
        return response

    return answer


def hangs(seconds: float = 30) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.Response(text="{}")

    return answer


def pool(name: str, version: int, cidr: str = "10.0.0.0/16") -> dict[str, Any]:
    return {
        "apiVersion": "underlay.network/v1",
        "kind": "IPPool",
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)},
        "spec": {"cidr": cidr},
    }


def page(version: int, *items: dict[str, Any], more: str = "") -> Answer:
    return says({"kind": "List", "metadata": {"resourceVersion": str(version), "continue": more}, "items": list(items)})


def line(kind: str, obj: object) -> dict[str, object]:
    return {"type": kind, "object": obj}


def bookmark(version: int) -> dict[str, object]:
    return line("BOOKMARK", {"kind": "IPPool", "metadata": {"resourceVersion": str(version)}})


def error(code: int, reason: str) -> dict[str, object]:
    return line("ERROR", {"kind": "Status", "code": code, "reason": reason, "message": "too old resource version"})
