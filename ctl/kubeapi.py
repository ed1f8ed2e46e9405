"""What ``underlayctl`` asks an API server for that is no object of the store: as JSON, by its path."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from store.clock import Clock
from store.kubeaccess import find_access
from store.kubehttp import Http, Limits, Refusal

Wire = dict[str, Any]

MERGE: Final = "application/merge-patch+json"
_NOT_FOUND: Final = 404
#: Objects in one answer of a list.
_PAGE: Final = "500"


class Api:
    def __init__(self, http: Http) -> None:
        self._http = http

    async def get(self, path: str, **query: str) -> Wire | None:
        """None if there is nothing of that name, or no such kind. StoreError."""
        try:
            found: Wire = msgspec.json.decode(await self.read(path, **query))
        except Refusal as e:
            if e.code == _NOT_FOUND:
                return None
            raise
        return found

    async def read(self, path: str, **query: str) -> bytes:
        """What is there, as it is told; also text. StoreError."""
        return await self._http.call("GET", path, query=query)

    async def list(self, path: str, **query: str) -> list[Wire]:
        found: list[Wire] = []
        query = {**query, "limit": _PAGE}
        while page := await self.get(path, **query):
            found += page["items"]
            going_on = page["metadata"].get("continue", "")
            if not going_on:
                break
            query = {**query, "continue": going_on}
        return found

    async def send(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> bool:
        """False if there is nothing of that name. StoreError."""
        try:
            await self._http.call(method, path, body=body, content_type=content_type)
        except Refusal as e:
            if e.code == _NOT_FOUND:
                return False
            raise
        return True


@asynccontextmanager
async def api_of(where: str, clock: Clock) -> AsyncIterator[Api]:
    """``where`` is what follows ``kube:`` in the store's URL."""
    http = Http(find_access(where), clock, random.Random(), Limits(request=60), agent="underlayctl")
    try:
        yield Api(http)
    finally:
        await http.close()
