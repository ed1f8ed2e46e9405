"""What the lab asks a cluster's API server for, as administrator: Pods on a node, and whether nodes are Ready."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from lab.errors import LabError
from store.clock import Clock
from store.errors import Unavailable
from store.kubehttp import Http, Refusal

_PODS: Final = "/api/v1/namespaces/default/pods"
_MERGE: Final = "application/merge-patch+json"
_LOOK_EVERY: Final = 0.1
_NOT_FOUND: Final = 404

Wire = dict[str, Any]


class Api:
    """Raises StoreError where the API server refuses, LabError where something does not come in time."""

    def __init__(self, http: Http, clock: Clock) -> None:
        self._http, self._clock = http, clock

    async def create_pod(self, name: str, node: str, *, image: str) -> None:
        """A Pod that sleeps, on this node whatever a scheduler thinks."""
        container = {"name": "main", "image": image, "imagePullPolicy": "Never"}
        spec = {"nodeName": node, "containers": [container], "dnsPolicy": "Default", "terminationGracePeriodSeconds": 0}
        tolerations = [{"operator": "Exists"}]
        body = {"metadata": {"name": name}, "spec": spec | {"tolerations": tolerations}}
        await self._call("POST", _PODS, body)

    async def running_pod(self, name: str, *, limit: float) -> Wire:
        """The Pod once it runs and has its addresses."""
        end = self._clock.monotonic() + limit
        while True:
            pod = await self._call("GET", f"{_PODS}/{name}")
            status = pod.get("status", {})
            if status.get("phase") == "Running" and status.get("podIPs"):
                return pod
            if self._clock.monotonic() > end:
                raise LabError(f"{name} does not run after {limit:.0f} s: {_reasons(status)}")
            await self._clock.sleep(_LOOK_EVERY)

    async def again(self, name: str, before: str, uid: str) -> Wire | None:
        """The Pod of this uid once it runs in another container than ``before``; empty until then, None if it is
        gone."""
        try:
            pod = await self._call("GET", f"{_PODS}/{name}")
        except Unavailable:
            return {}
        except Refusal as e:
            if e.code == _NOT_FOUND:
                return None
            raise
        if pod["metadata"]["uid"] != uid:
            return None
        runs = all("running" in c["state"] for c in pod["status"].get("containerStatuses", ()))
        return pod if runs and container_of(pod) not in ("", before) and pod["status"].get("podIPs") else {}

    async def delete_pod(self, name: str, *, limit: float) -> None:
        """Returns when it is gone."""
        await self._call("DELETE", f"{_PODS}/{name}")
        end = self._clock.monotonic() + limit
        while True:
            try:
                await self._call("GET", f"{_PODS}/{name}")
            except Refusal as e:
                if e.code == _NOT_FOUND:
                    return
                raise
            if self._clock.monotonic() > end:
                raise LabError(f"{name} is still there after {limit:.0f} s")
            await self._clock.sleep(_LOOK_EVERY)

    async def registered(self, node: str, *, limit: float, ready: bool) -> None:
        """Returns when the kubelet has made its Node; with ``ready``, when that is Ready and takes pods."""
        end = self._clock.monotonic() + limit
        problem = "there is no Node"
        while True:
            try:
                found = await self._call("GET", f"/api/v1/nodes/{node}")
                problem = _not_ready(found) if ready else ""
                if not problem:
                    return
            except (Refusal, Unavailable) as e:
                problem = str(e)
            if self._clock.monotonic() > end:
                raise LabError(f"{node} is not ready after {limit:.0f} s: {problem}")
            await self._clock.sleep(_LOOK_EVERY)

    async def mark_node(self, node: str, *, labels: dict[str, str], annotations: dict[str, str]) -> None:
        body = {"metadata": {"labels": labels, "annotations": annotations}}
        await self._call("PATCH", f"/api/v1/nodes/{node}", body, content_type=_MERGE)

    async def _call(self, method: str, path: str, body: object = None, **how: Any) -> Wire:
        answer = await self._http.call(method, path, body=body, **how)
        found: Wire = msgspec.json.decode(answer)
        return found


def container_of(pod: Wire) -> str:
    """The id of its container; "" while it has none."""
    return next((str(c.get("containerID", "")) for c in pod["status"].get("containerStatuses", ())), "")


def _not_ready(node: Wire) -> str:
    conditions = {c["type"]: c for c in node.get("status", {}).get("conditions", ())}
    ready = conditions.get("Ready", {})
    if ready.get("status") != "True":
        return str(ready.get("message") or "it has not said so")
    taints = [t["key"] for t in node.get("spec", {}).get("taints", ())]
    return f"it is tainted: {', '.join(taints)}" if taints else ""


def _reasons(status: Wire) -> str:
    words = [f"phase {status.get('phase', 'unknown')}"]
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting", {})
        words += [f"{waiting.get('reason')}: {waiting.get('message', '')}"] if waiting else []
    return "; ".join(words)
