"""The CustomResourceDefinitions of our kinds: the schema is ``store.model``'s, the rules are ``store.cel``'s. Pure.

Lists and maps are atomic: one manager writes each half of an object, and every list that is not atomic would double the
``managedFields`` of a full block.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from store.cel import FIELDS, METADATA, OBJECTS, STRUCTS, Schema
from store.model import (
    GROUP,
    KINDS,
    BGPConfiguration,
    BGPFilter,
    BGPNodeStatus,
    BGPPeer,
    IPAMBlock,
    IPAMConfiguration,
    IPPool,
    IPReservation,
    Resource,
)


def custom_kinds() -> tuple[type[Resource], ...]:
    """The kinds that are ours to define."""
    return tuple(kind for kind in KINDS if kind.API == GROUP)


def definition(kind: type[Resource]) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind, as plain JSON types."""
    group, _, version = kind.API.partition("/")
    singular = kind.kind().lower()
    names: dict[str, Any] = {
        "kind": kind.kind(),
        "listKind": f"{kind.kind()}List",
        "plural": kind.PLURAL,
        "singular": singular,
        "shortNames": [name for name in kind.SHORT if name != singular],
        "categories": ["underlay"],
    }
    served: dict[str, Any] = {
        "name": version,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [*_COLUMNS[kind], _AGE],
        "schema": {"openAPIV3Schema": _root(kind)},
    }
    if kind.SELECTABLE:
        served["selectableFields"] = [{"jsonPath": f".{path}"} for path in kind.SELECTABLE]
    if "status" in kind.__struct_fields__:
        served["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.PLURAL}.{group}"},
        "spec": {"group": group, "scope": "Cluster", "names": names, "versions": [served]},
    }


# -- what kubectl get prints ------------------------------------------------------------------------------------------


def _column(name: str, path: str, kind: str = "string", **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path, **more}


_AGE = _column("Age", ".metadata.creationTimestamp", "date")
#: With priority 1 it is shown by ``kubectl get -o wide`` only.
_COLUMNS: Mapping[type[Resource], Sequence[dict[str, Any]]] = {
    IPPool: (
        _column("CIDR", ".spec.cidr"),
        _column("Block", ".spec.blockSize", "integer"),
        _column("Nodes", ".spec.nodeSelector"),
        _column("Disabled", ".spec.disabled", "boolean"),
    ),
    IPReservation: (_column("CIDRs", ".spec.reservedCIDRs"),),
    IPAMConfiguration: (_column("Max-Blocks", ".spec.maxBlocksPerHost", "integer"),),
    IPAMBlock: (
        _column("CIDR", ".spec.cidr"),
        _column("Node", ".spec.node"),
        _column("Used", ".status.used", "integer"),
        _column("Free", ".status.free", "integer"),
        _column("Pool", ".spec.pool", priority=1),
        _column("Releasing", ".status.releasing", "boolean", priority=1),
    ),
    BGPConfiguration: (
        _column("AS", ".spec.asNumber", "integer"),
        _column("Mesh", ".spec.nodeToNodeMeshEnabled", "boolean"),
    ),
    BGPPeer: (
        _column("Peer", ".spec.peerIP"),
        _column("Peers", ".spec.peerSelector"),
        _column("AS", ".spec.asNumber", "integer"),
        _column("Node", ".spec.node"),
        _column("Nodes", ".spec.nodeSelector"),
        _column("Hold", ".spec.holdTime", "integer", priority=1),
        _column("Filters", ".spec.filters[*]", priority=1),
    ),
    BGPFilter: (),
    BGPNodeStatus: (
        _column("AS", ".status.asNumber", "integer"),
        _column("Router", ".status.routerID"),
        _column("Sessions", ".status.sessions[*].state"),
        _column("Peers", ".status.sessions[*].peer", priority=1),
    ),
}

# -- from the model's types to a structural schema ------------------------------------------------------------------


def _root(kind: type[Resource]) -> Schema:
    fields: dict[str, Schema] = {name: {"type": "string"} for name in ("apiVersion", "kind")}
    fields["metadata"] = METADATA
    required = []
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        if field.name != "metadata":
            fields[field.encode_name] = _of(hints[field.name])
            if field.required:
                required.append(field.encode_name)
            elif field.name == "spec":
                # An absent spec is one of defaults, so the API server shall write them.
                fields[field.encode_name]["default"] = {}
    schema: Schema = {"description": _description(kind), "type": "object"}
    if required:
        schema["required"] = required
    schema["properties"] = fields
    if kind in OBJECTS:
        schema["x-kubernetes-validations"] = list(OBJECTS[kind])
    return schema


def _description(kind: type) -> str:
    return " ".join((kind.__doc__ or f"A {kind.__name__}.").replace("``", "").split())


def _struct(struct: type[msgspec.Struct]) -> Schema:
    hints = get_type_hints(struct)
    properties: dict[str, Schema] = {}
    for field in msgspec.structs.fields(struct):
        special = dict(FIELDS.get((struct, field.encode_name), {}))
        # A type of its own stands for the model's.
        schema = {} if "type" in special else _of(hints[field.name])
        items = {**schema.get("items", {}), **special.pop("items", {})}
        schema.update(special)
        if items:
            schema["items"] = items
        if struct.__name__.endswith("Spec") and not field.required:
            schema.update(_default(field.default))
        properties[field.encode_name] = schema
    made: Schema = {"type": "object"}
    required = [field.encode_name for field in msgspec.structs.fields(struct) if field.required]
    if required:
        made["required"] = required
    return {**made, "properties": properties, **STRUCTS.get(struct, {})}


def _default(value: object) -> Schema:
    """What the API server fills in, so that an object says what holds: not where nothing means nothing ("", 0, [])."""
    if isinstance(value, bool) or (isinstance(value, str | int) and value):
        return {"default": value}
    if isinstance(value, tuple) and value:
        return {"default": list(value)}
    return {}


_SCALARS: Mapping[object, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "format": "int64"},
}


def _of(hint: Any) -> Schema:
    if hint in _SCALARS:
        return dict(_SCALARS[hint])
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin in (Union, types.UnionType):
        (only,) = (a for a in arguments if a is not type(None))
        return _of(only)
    if origin is tuple:
        return {"type": "array", "x-kubernetes-list-type": "atomic", "items": _of(arguments[0])}
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return _struct(hint)
    raise TypeError(f"no schema for {hint!r}: teach store.crd")
