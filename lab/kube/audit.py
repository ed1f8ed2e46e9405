"""What was asked of an API server, by its own audit log: who, what, and what it said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

#: One line a request, with what was asked for and no bodies. A watch has one when it begins and one when it ends.
POLICY: dict[str, Any] = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "omitManagedFields": True,
    "rules": [
        {"level": "None", "users": ["system:apiserver", "system:kube-controller-manager"]},
        {"level": "None", "nonResourceURLs": ["*"]},
        {"level": "Metadata"},
    ],
}
#: What the API server says of a token that is bound to a pod (Kubernetes, "Service account token claims").
_NODE = "authentication.kubernetes.io/node-name"


class Asked(msgspec.Struct, frozen=True):
    """One request. ``node`` is that of the pod whose token it came with, "" for others; ``name`` is "" for a list, and
    mostly for a create. ``code`` is HTTP's, ``at`` the seconds since the epoch at which it came. ``agent`` is what the
    client calls itself, ``address`` the one that it came from, ``said`` why it was refused."""

    user: str
    node: str
    verb: str
    resource: str
    subresource: str
    name: str
    code: int
    at: float
    agent: str = ""
    address: str = ""
    said: str = ""

    @property
    def writes(self) -> bool:
        return self.verb in ("create", "update", "patch", "delete", "deletecollection")


class AuditLog:
    """The log that an API server writes to this path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def requests(self, since: float = 0) -> tuple[Asked, ...]:
        """Each request that came at ``since`` (seconds since the epoch) or later, once, however many lines it has. A
        line that is still being written is left for the next call; one that a kill cut short is left out."""
        lines = self._path.read_bytes().split(b"\n")[:-1]
        found: dict[str, Asked] = {}
        for line in lines:
            try:
                event = _decoder.decode(line)
            except msgspec.DecodeError:
                continue
            found[event.audit_id] = _asked(event)
        return tuple(asked for asked in found.values() if asked.at >= since)


def count(requests: Iterable[Asked], *fields: str) -> Counter[tuple[str, ...]]:
    """How many there are of each: by user, node, verb, resource, subresource and code, or by ``fields``."""
    chosen = fields or ("user", "node", "verb", "resource", "subresource", "code")
    return Counter(tuple(str(getattr(r, f)) for f in chosen) for r in requests)


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] = {}


class _Object(msgspec.Struct):
    resource: str = ""
    subresource: str = ""
    name: str = ""


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Event(msgspec.Struct, rename="camel"):
    """``audit.k8s.io/v1`` Event, as far as it is read."""

    audit_id: str = msgspec.field(name="auditID")
    verb: str
    request_received_timestamp: str
    user_agent: str = ""
    source_ips: list[str] = msgspec.field(default_factory=list, name="sourceIPs")
    user: _User = msgspec.field(default_factory=_User)
    object_ref: _Object = msgspec.field(default_factory=_Object)
    response_status: _Status = msgspec.field(default_factory=_Status)


_decoder = msgspec.json.Decoder(_Event)


def _asked(event: _Event) -> Asked:
    return Asked(
        user=event.user.username,
        node=next(iter(event.user.extra.get(_NODE, [])), ""),
        verb=event.verb,
        resource=event.object_ref.resource,
        subresource=event.object_ref.subresource,
        name=event.object_ref.name,
        code=event.response_status.code,
        at=datetime.fromisoformat(event.request_received_timestamp).timestamp(),
        agent=event.user_agent,
        address=next(iter(event.source_ips), ""),
        said=event.response_status.message,
    )
