"""What the kubelets of a lab's nodes do for the API server: no kubelet runs here, but its tokens and its Pods are real.

Our own processes are Pods too, on the node's network; each gets the token of its ServiceAccount, bound to its Pod, and
a new one in time (Kubernetes, "Bound service account tokens"; kubelet renews after 80 % of a token's life). A pod of
the lab is written down once it is attached, whenever the API server can be reached: attaching waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from lab.errors import LabError
from lab.kube.installed import AGENT, CNI, NAMESPACE, bound_token, pod_of
from lab.kube.plane import Plane, write_kubeconfig, write_secret
from lab.runtime import Sandbox
from lab.wire import Part
from store.clock import Clock
from store.errors import StoreError
from store.kubehttp import Http, Refusal

#: Who has a token. The speaker talks to the agent and to routers, never to the API server.
ACCOUNTS: Final[Mapping[Part, str]] = {"cni": CNI, "agent": AGENT}
#: Seconds that a token lives: the least that the API server gives.
TOKEN_LIFE: Final = 600
_RENEW_AFTER: Final = 0.8 * TOKEN_LIFE
_LOOK_EVERY: Final = 10.0
_RETRY: Final = 0.5
_AT_ONCE: Final = 16
_OURS: Final = f"/api/v1/namespaces/{NAMESPACE}/pods"
_PODS: Final = "/api/v1/namespaces/default/pods"
_MERGE: Final = "application/merge-patch+json"
_log = logging.getLogger(__name__)


class Credentials(msgspec.Struct, frozen=True):
    """Where a process finds who it is: ``kubeconfig`` names ``token``, which is written anew in time."""

    folder: Path

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    @property
    def token(self) -> Path:
        return self.folder / "token"


class _Held(msgspec.Struct, frozen=True):
    """A process's Pod: whose it is, where its token is written, and when (monotonic) that is due again."""

    account: str
    node: str
    where: Credentials
    uid: str = ""
    due: float = 0


class Kubelets:
    """``run()`` keeps tokens fresh and Pods true until it is cancelled. ``api`` is asked as administrator."""

    def __init__(self, api: Http, clock: Clock, plane: Plane) -> None:
        self._api = api
        self._clock = clock
        self._plane = plane
        self._held: dict[str, _Held] = {}
        self._wanted: dict[str, tuple[str, Sandbox]] = {}
        self._written: dict[str, tuple[str, Sandbox]] = {}
        self._news = asyncio.Event()
        self._told = asyncio.Event()
        self._told.set()
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_tokens())
            group.create_task(self._keep_pods())

    async def admit(self, node: str, credentials: Mapping[Part, Credentials]) -> None:
        """Makes the Pods of a node's processes and writes their credentials. Raises StoreError."""
        for part, where in credentials.items():
            where.folder.mkdir(parents=True, mode=0o700)
            write_kubeconfig(where.kubeconfig, self._plane.url, self._plane.ca, token_file=where.token)
            await self._admit(_Held(ACCOUNTS[part], node, where))

    def attached(self, node: str, sandbox: Sandbox) -> None:
        self._wanted[sandbox.pod] = (node, sandbox)
        self._look()

    def detached(self, pod: str) -> None:
        self._wanted.pop(pod, None)
        self._look()

    async def settled(self, *, limit: float) -> None:
        """Returns when every attached pod is written down. Raises LabError after ``limit`` seconds."""
        try:
            async with asyncio.timeout(limit):
                await self._told.wait()
        except TimeoutError:
            missing = ", ".join(sorted(self._wanted.keys() - self._written.keys()))
            raise LabError(f"after {limit:.0f} s the API server has no Pod {missing}") from None

    # -- tokens -----------------------------------------------------------------------------------------------------

    async def _keep_tokens(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_EVERY)
            try:
                there = {p["metadata"]["uid"] for p in (await self._call("GET", _OURS))["items"]}
                for held in [*self._held.values()]:
                    if held.uid not in there or self._clock.monotonic() >= held.due:
                        await self._admit(held)
            except StoreError as e:
                _log.warning("tokens are to be renewed again in %.0f s: %s", _LOOK_EVERY, e)

    async def _admit(self, held: _Held) -> None:
        """Makes the Pod if there is none, as a DaemonSet would, and writes a new token of it."""
        pod = pod_of(held.account, held.node)
        name = pod["metadata"]["name"]
        async with self._turns:
            at = self._clock.monotonic()
            try:
                pod = await self._call("GET", f"{_OURS}/{name}")
            except Refusal as e:
                if e.code != 404:
                    raise
                pod = await self._call("POST", _OURS, pod)
                await self._call("PATCH", f"{_OURS}/{name}/status", {"status": {"phase": "Running"}})
            path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{held.account}/token"
            answer = await self._call("POST", path, bound_token(pod, seconds=TOKEN_LIFE))
            write_secret(held.where.token, answer["status"]["token"])
            self._held[name] = msgspec.structs.replace(held, uid=pod["metadata"]["uid"], due=at + _RENEW_AFTER)

    # -- pods -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._told.clear()
        self._news.set()

    async def _keep_pods(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            late = {n for n in self._wanted | self._written if self._wanted.get(n) != self._written.get(n)}
            try:
                async with asyncio.TaskGroup() as group:
                    for name in late:
                        group.create_task(self._write(name))
            except* StoreError as e:
                _log.info("Pods are to be written again in %.1f s: %s", _RETRY, e.exceptions[0])
                self._news.set()
                await self._clock.sleep(_RETRY)
            if not self._news.is_set():
                self._told.set()

    async def _write(self, name: str) -> None:
        """Makes the Pod what is wanted of it: a sandbox that is another one is another Pod."""
        async with self._turns:
            if name in self._written:
                await self._delete(name)
                del self._written[name]
            wanted = self._wanted.get(name)
            if wanted is None:
                return
            node, sandbox = wanted
            try:
                await self._call("POST", _PODS, _pod(name, node))
            except Refusal as e:
                if e.code != 409:
                    raise
                # It was made though the answer did not come: of which sandbox, who knows.
                await self._delete(name)
                await self._call("POST", _PODS, _pod(name, node))
            await self._call("PATCH", f"{_PODS}/{name}/status", {"status": _status(sandbox)})
            self._written[name] = wanted

    async def _delete(self, name: str) -> None:
        try:
            await self._call("DELETE", f"{_PODS}/{name}", {"gracePeriodSeconds": 0})
        except Refusal as e:
            if e.code != 404:
                raise

    async def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        kind = _MERGE if method == "PATCH" else "application/json"
        answer = await self._api.call(method, path, body=body, content_type=kind)
        return msgspec.json.decode(answer, type=dict[str, Any])


def _pod(name: str, node: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": False,
            "containers": [{"name": "main", "image": "-"}],
        },
    }


def _status(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "phase": "Running",
        "podIP": sandbox.addresses[0],
        "podIPs": [{"ip": address} for address in sandbox.addresses],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
