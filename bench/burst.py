"""Pods of a real cluster that are made at once and deleted at once, and how long each took, as a client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from lab.cluster.config import SANDBOX_IMAGE
from store.clock import Clock
from store.errors import StoreError
from store.kubehttp import Http, Refusal

Wire = dict[str, Any]

#: Ends when it is told to, so that a deletion costs what the cluster makes of it and no second of grace.
_COMMAND: Final = ["sh", "-c", "trap 'exit 0' TERM; sleep 2147483647 & wait"]
_CONFLICT, _NOT_FOUND = 409, 404
_PAUSE: Final = 0.1


class BurstError(Exception):
    """Pods did not come, or did not go."""


class Pods:
    """The Pods of one namespace, followed from ``begin`` to ``end``; all calls are one event loop's."""

    def __init__(self, http: Http, clock: Clock, namespace: str) -> None:
        self._http, self._clock, self._namespace = http, clock, namespace
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._there: dict[str, Wire] = {}
        self._running: dict[str, float] = {}
        self._gone: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    async def begin(self, *, limit: float) -> None:
        """Makes the namespace; returns when it takes pods. Raises BurstError, StoreError."""
        try:
            await self._http.call("POST", "/api/v1/namespaces", body={"metadata": {"name": self._namespace}})
        except Refusal as e:
            if e.code != _CONFLICT:
                raise
        self._following = asyncio.create_task(self._follow())
        end = self._clock.monotonic() + limit
        while True:
            try:
                await self._http.call("GET", f"/api/v1/namespaces/{self._namespace}/serviceaccounts/default")
            except Refusal as e:
                if e.code != _NOT_FOUND or self._clock.monotonic() > end:
                    raise
                await self._clock.sleep(_PAUSE)
            else:
                return

    async def end(self) -> None:
        """Follows them no more."""
        if self._following:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def start(self, pods: Mapping[str, str], *, limit: float) -> dict[str, float]:
        """Makes Pods by name, each bound to a node, all at once; seconds of each from its request until it was Running
        with an address. Raises BurstError, StoreError."""
        began: dict[str, float] = {}

        async def make(name: str, node: str) -> None:
            began[name] = self._clock.monotonic()
            await self._http.call("POST", self._path, body=_pod(name, node))

        await asyncio.gather(*(make(*pod) for pod in pods.items()))
        await self._until(lambda: pods.keys() <= self._running.keys(), limit, lambda: self._late(pods))
        return {name: self._running[name] - began[name] for name in pods}

    async def delete(self, names: Iterable[str], *, limit: float) -> dict[str, float]:
        """Deletes them all at once; seconds of each from its request until it was gone from the API server, which a
        kubelet lets it be once its network is taken down. Raises BurstError, StoreError."""
        names, began = list(names), {}

        async def delete(name: str) -> None:
            began[name] = self._clock.monotonic()
            await self._http.call("DELETE", f"{self._path}/{name}")

        await asyncio.gather(*map(delete, names))
        await self._until(
            lambda: self._gone.keys() >= set(names), limit, lambda: sorted(set(names) - self._gone.keys())
        )
        return {name: self._gone[name] - began[name] for name in names}

    def addresses(self, name: str) -> tuple[str, ...]:
        """Of a Pod that runs."""
        return tuple(ip["ip"] for ip in self._there[name]["status"]["podIPs"])

    # -- parts -----------------------------------------------------------------------------------------------------

    async def _until(self, done: Callable[[], bool], limit: float, missing: Callable[[], list[str]]) -> None:
        assert self._following
        end = self._clock.monotonic() + limit
        while not done():
            if self._following.done():
                self._following.result()
            left = end - self._clock.monotonic()
            if left <= 0:
                late = missing()
                raise BurstError(
                    f"{len(late)} pods are not there (not gone) after {limit:.0f} s: {'; '.join(late[:3])}"
                )
            self._changed.clear()
            try:
                async with asyncio.timeout(min(left, 1)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _late(self, names: Iterable[str]) -> list[str]:
        return [f"{n}: {json.dumps(self._there.get(n, {}).get('status'))}" for n in names if n not in self._running]

    async def _follow(self) -> None:
        """Lists, follows, and again when the API server ends that."""
        while True:
            try:
                found = json.loads(await self._http.call("GET", self._path))
                listed = {pod["metadata"]["name"]: pod for pod in found["items"]}
                for name in self._there.keys() - listed.keys():
                    self._note("DELETED", self._there[name])
                for pod in listed.values():
                    self._note("ADDED", pod)
                since = {"watch": "true", "resourceVersion": found["metadata"]["resourceVersion"]}
                async with self._http.lines(self._path, since) as lines:
                    async for line in lines:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        self._note(event["type"], event["object"])
            except StoreError:
                await self._clock.sleep(_PAUSE)

    def _note(self, kind: str, pod: Wire) -> None:
        name, now = pod["metadata"]["name"], self._clock.monotonic()
        if kind == "DELETED":
            self._there.pop(name, None)
            self._gone.setdefault(name, now)
        else:
            self._there[name] = pod
            if pod["status"].get("phase") == "Running" and pod["status"].get("podIPs"):
                self._running.setdefault(name, now)
        self._changed.set()


def _pod(name: str, node: str) -> Wire:
    container = {"name": "main", "image": SANDBOX_IMAGE, "imagePullPolicy": "Never", "command": _COMMAND}
    spec = {"nodeName": node, "containers": [container], "dnsPolicy": "Default", "terminationGracePeriodSeconds": 10}
    return {"metadata": {"name": name}, "spec": spec}
