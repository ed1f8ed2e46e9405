"""Pods that come and go on all nodes, straight through the API server: what a busy cluster does to a network."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from store.clock import SystemClock
from store.kubeaccess import find_access
from store.kubehttp import Http, Limits, Refusal
from tests.cluster.cluster import IMAGE, Cluster

#: Pods that are not there yet, or not gone yet: more are not begun before some of these are done. A node of a test is a
#: part of a processor.
AT_ONCE: Final = 32
#: Seconds within which a pod runs, and is gone.
LIMIT: Final = 120.0
_LOOK_EVERY: Final = 0.25
_NOT_FOUND: Final = 404


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``failed`` says what became of pods that did not run, or did not go. ``slowest``: seconds from the asking for
    one to its running; ``rate``: pods a second that ran."""

    ran: int
    failed: tuple[str, ...]
    rate: float
    slowest: float


class Churn:
    """Makes ``rate`` pods a second in a Namespace of its own, node by node, and deletes each once it runs."""

    def __init__(self, cluster: Cluster, namespace: str, nodes: Sequence[str], rate: float) -> None:
        self._path = f"/api/v1/namespaces/{namespace}/pods"
        self._nodes, self._rate = tuple(nodes), rate
        self._access = find_access(cluster.environment["KUBECONFIG"])
        self._ending = threading.Event()
        self._asked: dict[str, float] = {}
        self._leaving: dict[str, float] = {}
        self._failed: list[str] = []
        self._ran = 0
        self._slowest = 0.0
        self._seconds = 0.0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="churn", daemon=True)
        self._problem: BaseException | None = None

    def begin(self) -> None:
        self._thread.start()

    @property
    def ran(self) -> int:
        """How many have run so far."""
        return self._ran

    def end(self) -> Report:
        """Makes no more; returns once all are gone, or had their time."""
        self._ending.set()
        self._thread.join(2 * LIMIT + 30)
        assert not self._thread.is_alive(), "the churn does not come to its end"
        if self._problem:
            raise self._problem
        rate = self._ran / self._seconds if self._seconds else 0.0
        return Report(ran=self._ran, failed=tuple(self._failed), rate=rate, slowest=self._slowest)

    async def _run(self) -> None:
        http = Http(self._access, SystemClock(), random.Random(), Limits(patience=LIMIT))
        try:
            await self._churn(http)
        except BaseException as e:
            self._problem = e
        finally:
            await http.close()

    async def _churn(self, http: Http) -> None:
        begin = due = time.monotonic()
        number = 0
        looked = begin
        while not self._ending.is_set() or self._asked or self._leaving:
            now = time.monotonic()
            if not self._ending.is_set():
                self._seconds = now - begin
                if now >= due and len(self._asked) + len(self._leaving) < AT_ONCE:
                    name = f"churn-{number}"
                    self._asked[name] = now
                    await http.call("POST", self._path, body=_pod(name, self._nodes[number % len(self._nodes)]))
                    number += 1
                due = max(due + (now >= due) / self._rate, now - 1 / self._rate)
            if now - looked >= _LOOK_EVERY:
                looked = now
                await self._look(http)
            await asyncio.sleep(0.01)

    async def _look(self, http: Http) -> None:
        found: dict[str, Any] = msgspec.json.decode(await http.call("GET", self._path))
        pods = {str(pod["metadata"]["name"]): pod for pod in found["items"]}
        now = time.monotonic()
        for name, since in [*self._asked.items()]:
            phase = pods[name]["status"].get("phase") if name in pods else "gone"
            if phase == "Running":
                self._ran += 1
                self._slowest = max(self._slowest, now - since)
            elif phase in ("Failed", "Succeeded", "gone") or now - since > LIMIT:
                self._failed.append(f"{name}: {phase} after {now - since:.0f} s")
            else:
                continue
            del self._asked[name]
            self._leaving[name] = now
            try:
                await http.call("DELETE", f"{self._path}/{name}")
            except Refusal as e:
                if e.code != _NOT_FOUND:
                    raise
        for name, since in [*self._leaving.items()]:
            if name not in pods:
                del self._leaving[name]
            elif now - since > LIMIT:
                self._failed.append(f"{name}: not gone after {now - since:.0f} s")
                del self._leaving[name]


@contextmanager
def churning(cluster: Cluster, namespace: str, *, rate: float = 5) -> Iterator[Churn]:
    """Pods come and go on every node while the block runs; ``end`` tells of them."""
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    churn = Churn(cluster, namespace, [node["metadata"]["name"] for node in cluster.get("nodes")], rate)
    churn.begin()
    try:
        yield churn
    finally:
        churn.end()
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def _pod(name: str, node: str) -> dict[str, Any]:
    spec = {
        "nodeName": node,
        "containers": [{"name": "main", "image": IMAGE, "imagePullPolicy": "Never"}],
        "dnsPolicy": "Default",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # Not 0: the object would be gone before the kubelet has ended anything.
        "terminationGracePeriodSeconds": 1,
        "tolerations": [{"operator": "Exists"}],
    }
    return {"metadata": {"name": name}, "spec": spec}
