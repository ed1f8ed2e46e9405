"""The annotations of this node's pods and of namespaces: what the runtime says, or what the store shows.

Only where pods may choose (``--pods-may-choose``); without that nothing here is loaded, watched or asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from cni import spec
from cni.choice import BadAnnotation, Choice, of_pod, with_namespace
from cni.spec import Call, Refusal
from store.base import Store
from store.clock import Clock
from store.informer import Informer
from store.model import Namespace, Pod, R
from store.waiting import until

T = TypeVar("T")

#: Seconds that an ADD waits until its pod, or its namespace, is known.
LIMIT: Final = 2.0
#: Of a mirror pod: the uid of the static pod, by which the kubelet calls it (kubelet, pkg/kubelet/types).
MIRROR: Final = "kubernetes.io/config.mirror"


class Annotations:
    """``run`` must run beside it."""

    def __init__(self, node: str, store: Store, clock: Clock, *, limit: float = LIMIT) -> None:
        self._clock = clock
        self._limit = limit
        self._node = node
        self._pods = Informer(store, Pod, clock, {"spec.nodeName": node}, on_change=self._ring)
        self._namespaces = Informer(store, Namespace, clock, on_change=self._ring)
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Follows the store until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pods.run())
            group.create_task(self._namespaces.run())

    async def choice(self, call: Call) -> Choice:
        """What the call's pod wants; nothing if it is no pod of Kubernetes. Waits ``limit`` s at most. Refusal."""
        try:
            return await self._choice(call)
        except BadAnnotation as e:
            raise Refusal(spec.INVALID_CONFIG, "the pod's annotations cannot be followed", str(e)) from e

    async def _choice(self, call: Call) -> Choice:
        namespace, slash, _ = call.pod.partition("/")
        if not slash:
            return Choice()
        end = self._clock.monotonic() + self._limit
        annotations: Mapping[str, str] | None = call.config.runtime.annotations
        if annotations is None:
            annotations = await self._known(lambda: self._of_pod(call), end, f"pod {call.pod}", self._pods)
        choice = of_pod(annotations, call.pod)
        if choice.complete:
            return choice
        theirs = await self._known(
            lambda: self._of_namespace(namespace), end, f"namespace {namespace}", self._namespaces
        )
        return with_namespace(choice, theirs, namespace)

    def _of_pod(self, call: Call) -> Mapping[str, str] | None:
        """A StatefulSet's pod comes back under its name, so the uid decides; without one at least none that goes."""
        pod = self._pods.items.get(call.pod)
        if pod is None:
            return None
        meta = pod.metadata
        if call.pod_uid:
            known = call.pod_uid in (meta.uid, meta.annotations.get(MIRROR))
        else:
            known = not meta.deletion_timestamp
        return meta.annotations if known else None

    def _of_namespace(self, name: str) -> Mapping[str, str] | None:
        found = self._namespaces.items.get(name)
        return None if found is None else found.metadata.annotations

    async def _known(self, find: Callable[[], T | None], end: float, what: str, informer: Informer[R]) -> T:
        while True:
            found = find()
            if found is not None:
                return found
            left = end - self._clock.monotonic()
            if left <= 0:
                why = informer.error or f"the store does not show it, as the one of node {self._node}, yet"
                details = f"{what}: not known after {self._limit:g} s: {why}"
                raise Refusal(spec.TRY_AGAIN, "the pod's annotations are not known yet, try again", details)
            await until(self._clock, self._moved, left)

    def _ring(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
