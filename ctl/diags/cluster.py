"""What the store says, item by item: our objects, and on an API server what is around our pods.

No Secret is asked for.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

import msgspec

from store.base import Store
from store.clock import Clock
from store.model import KINDS, Node, to_wire

if TYPE_CHECKING:
    from ctl.kubeapi import Api

NAMESPACE: Final = "underlay-system"
#: Objects of others in one item at most.
PAGE: Final = "500"
#: Pods whose logs are read, and lines and bytes of each container.
_PODS: Final = 24
_LOG: Final = {"tailLines": "1000", "limitBytes": str(512 << 10)}


class Part(NamedTuple):
    """``read`` gives text or plain JSON types, and raises StoreError, or Failure of a command."""

    path: str
    what: str
    read: Callable[[], Awaitable[object]]


def of_store(store: Store, clock: Clock) -> list[Part]:
    """What any store has: our kinds and Nodes, and the answers of our own commands."""
    found = [
        Part(
            f"cluster/{kind.PLURAL}.json",
            f"every {kind.kind()}",
            partial(_objects, store, kind),
        )
        for kind in KINDS
        if kind.API.startswith("underlay.network") or kind is Node
    ]
    from ctl import show

    commands: dict[str, Callable[[], Awaitable[int]]] = {
        "node-status": lambda: show.show_node_status(store, "", all_nodes=True),
        "ipam-show": lambda: show.show_ipam(store, "table", show_blocks=True),
        "ipam-check": lambda: show.show_check(store, "table", nodes=(), here=None),
    }
    found += [
        Part(f"cluster/{name}.txt", f"underlayctl {name.replace('-', ' ')}", partial(_printed, command))
        for name, command in commands.items()
    ]
    return found


async def of_api(rest: str, clock: Clock) -> AsyncIterator[Part]:
    """What an API server has beside that, as it has it. ``rest`` is the store's URL after ``kube:``."""
    from ctl.kubeapi import api_of

    core, apps, space = "/api/v1", "/apis/apps/v1", f"namespaces/{NAMESPACE}"
    admission = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
    paths = {
        "version": ("/version", {}),
        "api-nodes": (f"{core}/nodes", {"limit": PAGE}),
        "api-daemonsets": (f"{apps}/{space}/daemonsets", {}),
        "api-config": (f"{core}/{space}/configmaps/underlay-config", {}),
        "api-policies": (admission, {"limit": PAGE}),
        "events": (f"/apis/events.k8s.io/v1/{space}/events", {"limit": PAGE}),
        "events-of-nodes": ("/apis/events.k8s.io/v1/namespaces/default/events", {"limit": PAGE}),
    }
    async with api_of(rest, clock) as api:
        for name, (path, query) in paths.items():
            yield Part(f"cluster/{name}.json", path, partial(_json, api, path, query))
        pods: list[Any] = []

        async def of_pods() -> object:
            found = await _json(api, f"{core}/{space}/pods", {"limit": PAGE})
            pods.extend(found["items"])
            return found

        yield Part("cluster/api-pods.json", "our pods", of_pods)
        for pod in sorted(pods, key=lambda p: (_ready(p), p["metadata"]["name"]))[:_PODS]:
            name = pod["metadata"]["name"]
            for container in (c["name"] for c in pod["spec"]["containers"]):
                path = f"{core}/{space}/pods/{quote(name)}/log"
                yield Part(
                    f"cluster/logs/{name}-{container}.log",
                    f"log of {name}",
                    partial(_text, api, path, {"container": container, **_LOG}),
                )


async def _objects(store: Store, kind: Any) -> object:
    return [to_wire(obj) for obj in (await store.list(kind)).items]


async def _printed(command: Callable[[], Awaitable[int]]) -> str:
    """What a command of ours prints, and its exit code."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = await command()
    return f"{said.getvalue()}exit code {code}\n"


async def _json(api: Api, path: str, query: dict[str, str]) -> Any:
    found = msgspec.json.decode(await api.read(path, **query))
    for item in found.get("items", ()):
        item.get("status", {}).pop("images", None)
    return found


async def _text(api: Api, path: str, query: dict[str, str]) -> str:
    return (await api.read(path, **query)).decode(errors="replace")


def _ready(pod: Any) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))
