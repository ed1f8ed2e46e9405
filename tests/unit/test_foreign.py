"""Calico's files: each field of its v3 kinds is served, left out with a line that says why, or refused with one."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import msgspec
import pytest

from store.errors import Invalid
from store.files import load
from store.foreign import FOREIGN_KINDS, LEFT_OUT, UNSERVED
from store.model import (
    GROUP,
    BGPConfiguration,
    BGPFilter,
    BGPPeer,
    IPAMConfiguration,
    IPPool,
    IPReservation,
    Node,
    Resource,
)

Verdict = Literal["served", "left out", "refused"]

SERVED: Verdict = "served"
LEFT: Verdict = "left out"
REFUSED: Verdict = "refused"

#: What a file of the kind has at least.
NEEDED: dict[type[Resource], dict[str, Any]] = {
    IPPool: {"cidr": "10.244.0.0/16"},
    IPReservation: {},
    IPAMConfiguration: {},
    BGPConfiguration: {},
    BGPPeer: {"peerIP": "10.0.0.1", "asNumber": 65001},
    BGPFilter: {},
}


def rules(**fields: Any) -> list[dict[str, Any]]:
    return [{"action": "Accept", **fields}]


#: What the rules of all four lists have in common.
RULES: list[tuple[Any, Verdict]] = [
    (rules(action="Reject"), SERVED),
    (rules(action="Drop"), REFUSED),
    (rules(source="RemotePeers", interface="*.calico", peerType="eBGP"), SERVED),
    (rules(source="Pools"), REFUSED),
    (rules(interface="a b"), REFUSED),
    (rules(communities={"values": ["65001:1"]}, asPathPrefix=[65001, 65002]), SERVED),
    (rules(communities={"values": ["65536:1"]}), REFUSED),
    (rules(operations=[{"addCommunity": {"value": "65001:1:1"}}, {"prependASPath": {"prefix": [65001]}}]), SERVED),
    (rules(operations=[{"setPriority": {"value": 512}}]), REFUSED),
    (rules(priority=512), REFUSED),
]
#: By kind and field, values and what becomes of each. Source: the references of these kinds in Calico's documentation
#: (v3.32), "nat-outgoing" and "ipip" its API's type IPPoolSpec.
FIELDS: dict[type[Resource], dict[str, list[tuple[Any, Verdict]]]] = {
    IPPool: {
        "cidr": [("10.245.0.0/16", SERVED)],
        "blockSize": [(28, SERVED), (12, REFUSED)],
        "nodeSelector": [("rack == 'a'", SERVED), ("rack = a", REFUSED)],
        "disabled": [(True, SERVED), (False, SERVED)],
        "disableBGPExport": [(True, SERVED)],
        "assignmentMode": [("Automatic", SERVED), ("Manual", SERVED), ("Sometimes", REFUSED)],
        "allowedUses": [(["Workload"], SERVED), (["Workload", "Tunnel"], LEFT), (["LoadBalancer"], REFUSED)],
        "ipipMode": [("Never", SERVED), ("Always", REFUSED), ("CrossSubnet", REFUSED)],
        "vxlanMode": [("Never", SERVED), ("Always", REFUSED), ("CrossSubnet", REFUSED)],
        "natOutgoing": [(False, SERVED), (True, REFUSED)],
        "namespaceSelector": [("all()", LEFT), ("", LEFT), ("team == 'a'", REFUSED)],
        "ipip": [({"enabled": False}, LEFT), ({"enabled": True, "mode": "always"}, REFUSED)],
        "nat-outgoing": [(False, LEFT), (True, REFUSED)],
    },
    IPReservation: {"reservedCIDRs": [(["10.244.0.0/28", "10.244.1.1"], SERVED), (["10.244.0.1/28"], REFUSED)]},
    IPAMConfiguration: {
        "strictAffinity": [(True, SERVED), (False, REFUSED)],
        "maxBlocksPerHost": [(4, SERVED), (0, SERVED), (-1, REFUSED)],
        "autoAllocateBlocks": [(True, LEFT), (False, REFUSED)],
        "kubeVirtVMAddressPersistence": [("Disabled", LEFT), ("Enabled", REFUSED)],
    },
    BGPConfiguration: {
        "asNumber": [(64513, SERVED), ("64513.1", REFUSED), (0, REFUSED)],
        "nodeToNodeMeshEnabled": [(False, SERVED), (True, SERVED)],
        "logSeverityScreen": [("Debug", LEFT)],
        "serviceClusterIPs": [([], LEFT), ([{"cidr": "10.96.0.0/12"}], REFUSED)],
        "serviceExternalIPs": [([], LEFT), ([{"cidr": "192.0.2.0/24"}], REFUSED)],
        "serviceLoadBalancerIPs": [([], LEFT), ([{"cidr": "192.0.2.0/24"}], REFUSED)],
        "serviceLoadBalancerAggregation": [("Enabled", LEFT), ("Disabled", REFUSED)],
        "communities": [
            ([{"name": "a", "value": "65001:1"}, {"name": "b", "value": "65001:1:1"}], SERVED),
            ([{"name": "a", "value": "65536:1"}], REFUSED),
            ([{"name": "A", "value": "65001:1"}], REFUSED),
        ],
        "prefixAdvertisements": [
            ([{"cidr": "10.244.0.0/16", "communities": ["65001:1", "65001:1:1"]}], SERVED),
            ([{"cidr": "10.244.0.0/16", "communities": ["no-such-name"]}], REFUSED),
            ([{"cidr": "10.244.0.1/16", "communities": []}], REFUSED),
        ],
        "listenPort": [(179, SERVED), (1179, SERVED), (65536, REFUSED)],
        "bindMode": [("NodeIP", LEFT), ("None", LEFT)],
        "nodeMeshPassword": [
            ({"secretKeyRef": {"name": "a", "key": "b"}}, SERVED),
            ({"secretKeyRef": {"name": "a", "key": "b", "optional": False}}, LEFT),
            ({"secretKeyRef": {"name": "a", "key": "b c"}}, REFUSED),
        ],
        "nodeMeshMaxRestartTime": [("120s", SERVED), ("60s", SERVED), ("2d", REFUSED)],
        "ignoredInterfaces": [([], SERVED), (["tunl0", "docker*"], SERVED), (["a b"], REFUSED)],
        "localWorkloadPeeringIPV4": [("", LEFT), ("169.254.0.1", REFUSED)],
        "localWorkloadPeeringIPV6": [("", LEFT), ("fe80::1", REFUSED)],
        "programClusterRoutes": [("Enabled", LEFT), ("Disabled", REFUSED)],
    },
    BGPPeer: {
        "peerIP": [("10.0.0.2:1179", SERVED), ("tor", REFUSED)],
        "asNumber": [(65002, SERVED), ("1.10", REFUSED)],
        "node": [("node-1", SERVED)],
        "nodeSelector": [("rack == 'a'", SERVED)],
        "numAllowedLocalASNumbers": [(1, SERVED), (11, REFUSED)],
        "maxRestartTime": [("60s", SERVED), ("1d", REFUSED)],
        "password": [
            ({"secretKeyRef": {"name": "a", "key": "b"}}, SERVED),
            ({"secretKeyRef": {"name": "a", "key": "b", "optional": False}}, LEFT),
            ({"secretKeyRef": {"name": "a", "key": "b", "optional": True}}, REFUSED),
            ({"secretKeyRef": {"name": "A", "key": "b"}}, REFUSED),
            ({"secretKeyRef": {"name": "a", "key": "b c"}}, REFUSED),
        ],
        "filters": [([], SERVED), (["deny", "more"], SERVED), (["deny", "deny"], REFUSED)],
        "peerSelector": [("", SERVED), ("rr == 'a'", SERVED), ("rr = 'a'", REFUSED)],
        "localWorkloadSelector": [("", LEFT), ("all()", REFUSED)],
        "keepOriginalNextHop": [(False, LEFT), (True, REFUSED)],
        "nextHopMode": [("Auto", LEFT), ("Self", LEFT), ("Keep", REFUSED)],
        "sourceAddress": [("UseNodeIP", SERVED), ("None", SERVED), ("Mine", REFUSED)],
        "reachableBy": [("", SERVED), ("10.0.0.254", SERVED), ("fd00::1", REFUSED), ("gw", REFUSED)],
        "ttlSecurity": [(0, SERVED), (1, SERVED), (255, REFUSED)],
        "keepaliveTime": [("30s", REFUSED)],
        "keepalive": [(3, REFUSED)],
        "localASNumber": [(65000, SERVED), ("1.10", REFUSED), (23456, REFUSED)],
        "reversePeering": [("Auto", LEFT), ("Manual", REFUSED)],
        "failureDetectionMode": [("None", LEFT), ("BFDIfDirectlyConnected", REFUSED)],
    },
    BGPFilter: {
        "importV4": [
            *RULES,
            (rules(cidr="10.0.0.0/8", matchOperator="In", prefixLength={"min": 16, "max": 24}), SERVED),
            (rules(cidr="10.0.0.0/8", matchOperator="Within"), REFUSED),
            (rules(cidr="fd00::/8", matchOperator="In"), REFUSED),
        ],
        "exportV4": [*RULES, (rules(cidr="10.0.0.0/8", matchOperator="NotEqual"), SERVED)],
        "importV6": [*RULES, (rules(cidr="5000::/64", matchOperator="Equal"), SERVED)],
        "exportV6": [*RULES, (rules(cidr="10.0.0.0/8", matchOperator="In"), REFUSED)],
    },
}
EACH = [
    pytest.param(kind, field, value, verdict, id=f"{kind.kind()} {field} {json.dumps(value)}")
    for kind, fields in FIELDS.items()
    for field, cases in fields.items()
    for value, verdict in cases
]


def read(kind: type[Resource], **spec: Any) -> tuple[Any, list[str], list[tuple[str, str]]]:
    """The object of such a file (None if it is refused), the notes, and the refusals as (path, remedy)."""
    wire = {
        "apiVersion": "projectcalico.org/v3",
        "kind": kind.kind(),
        "metadata": {"name": "default"},
        "spec": spec if spec.get("peerSelector") else {**NEEDED[kind], **spec},
    }
    notes: list[str] = []
    try:
        (obj,) = load(json.dumps(wire), note=notes.append)
    except Invalid as e:
        return None, notes, [(p.field.partition(": ")[2], p.remedy) for p in e.problems]
    return obj, notes, []


@pytest.mark.parametrize(("kind", "field", "value", "verdict"), EACH)
def test_each_field_of_calico_has_its_line(kind: type[Resource], field: str, value: Any, verdict: Verdict) -> None:
    obj, notes, refusals = read(kind, **{field: value})
    if verdict == "served":
        assert (notes, refusals) == ([], [])
        assert json.loads(msgspec.json.encode(_value(obj, field))) == value
    elif verdict == "left out":
        assert refusals == []
        (note,) = notes
        # Which document, which field, and why it may be left out.
        assert note.startswith(f"document 1 ({kind.kind()} default): spec.{field}")
        assert len(note.rpartition(": ")[2]) > 10
    else:
        assert notes == []
        assert refusals
        for path, remedy in refusals:
            assert re.match(r"spec\.[\w-]+", path)[0] == f"spec.{field}"  # type: ignore[index]
            assert len(remedy) > 10
            assert "there is no such field" not in remedy


def _value(obj: Any, name: str) -> Any:
    (field,) = (f for f in msgspec.structs.fields(obj.spec) if f.encode_name == name)
    return getattr(obj.spec, field.name)


def test_the_table_has_every_field_that_something_is_said_of_and_no_other() -> None:
    for kind, fields in FIELDS.items():
        said = {f"spec.{name}" for name in fields}
        spec = next(f.type for f in msgspec.structs.fields(kind) if f.name == "spec")
        served = {f"spec.{f.encode_name}" for f in msgspec.structs.fields(spec)}
        paths = (*LEFT_OUT.get(kind, ()), *UNSERVED.get(kind, ()))
        foreign = {".".join(p.partition("[")[0].split(".")[:2]) for p in paths if p.startswith("spec.")}
        assert said <= served | foreign
        assert foreign <= said
        ours = {"usePodCIDRs", "importCIDRs", "holdTime", "maxPrefixes", "defaultRoute", "passive"}
        assert served <= said | {f"spec.{name}" for name in ours}, "a new field: Calico's, or ours?"


@pytest.mark.parametrize("kind", FIELDS)
def test_a_field_that_nobody_knows_is_refused_never_dropped(kind: type[Resource]) -> None:
    obj, _, refusals = read(kind, brandNew=1)
    assert obj is None
    assert [(path, "there is no such field" in remedy) for path, remedy in refusals] == [("spec.brandNew", True)]


def test_what_calico_says_of_a_pool_is_left_out() -> None:
    notes: list[str] = []
    text = {
        "apiVersion": "projectcalico.org/v3",
        "kind": "IPPool",
        "metadata": {"name": "p"},
        "spec": {"cidr": "10.244.0.0/16"},
        "status": {"conditions": [{"type": "Allocatable", "status": "True"}]},
    }
    assert len(load(json.dumps(text), note=notes.append)) == 1
    assert ["status is left out" in note for note in notes] == [True]


#: What an item of a list needs at least.
ITEMS: dict[str, dict[str, Any]] = {
    "ownerReferences": {"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"},
    "conditions": {"type": "Ready", "status": "True"},
}


def with_field(wire: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The document with a value at a path as ``metadata.ownerReferences[].controller``."""
    name, _, rest = path.partition(".")
    if name.endswith("[]"):
        return {**wire, name[:-2]: [with_field(ITEMS[name[:-2]], rest, value)]}
    return {**wire, name: with_field(wire.get(name, {}), rest, value) if rest else value}


@pytest.mark.parametrize("kind", [IPPool, Node])
@pytest.mark.parametrize("path", LEFT_OUT[Resource])
def test_what_the_api_server_writes_into_metadata_is_left_out(kind: type[Resource], path: str) -> None:
    document = {"apiVersion": kind.API, "kind": kind.kind(), "metadata": {"name": "n"}, "spec": NEEDED.get(kind, {})}
    (plain,) = load(json.dumps(document))
    value: Any = True if path.endswith("controller") else "x"
    (obj,) = load(json.dumps(with_field(document, path, value)))
    assert msgspec.structs.replace(obj, metadata=plain.metadata) == plain
    assert obj.metadata.name == "n"


@pytest.mark.parametrize("path", LEFT_OUT[Node])
def test_what_kubelet_and_others_write_into_a_node_is_left_out(path: str) -> None:
    status = {"conditions": [ITEMS["conditions"]]} if "conditions" in path else {}
    document = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}, "status": status}
    assert load(json.dumps(with_field(document, path, "x"))) == load(json.dumps(document))


@pytest.mark.parametrize(
    ("path", "value", "refused"),
    [
        ("metadata.generateName", "pool-", True),
        ("metadata.ownerReferences[].blockOwnerDeletion", True, True),
        ("metadata.ownerReferences[].blockOwnerDeletion", False, False),
    ],
)
def test_metadata_that_asks_for_something_is_refused(path: str, value: Any, refused: bool) -> None:
    document = {"apiVersion": GROUP, "kind": "IPPool", "metadata": {"name": "n"}, "spec": NEEDED[IPPool]}
    text = json.dumps(with_field(document, path, value))
    if not refused:
        assert len(load(text)) == 1
        return
    with pytest.raises(Invalid) as caught:
        load(text)
    (problem,) = caught.value.problems
    assert path.rpartition(".")[2] in problem.field
    assert problem.remedy == UNSERVED[Resource][path].why


def test_no_other_metadata_is_refused() -> None:
    assert set(UNSERVED[Resource]) == {
        "metadata.generateName",
        "metadata.ownerReferences[].blockOwnerDeletion",
    }


@pytest.mark.parametrize("kind", FOREIGN_KINDS)
def test_a_kind_of_theirs_is_refused_with_what_to_do(kind: str) -> None:
    text = {"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": {"name": "default"}, "spec": {}}
    with pytest.raises(Invalid) as caught:
        load(json.dumps(text))
    (problem,) = caught.value.problems
    assert problem.remedy == FOREIGN_KINDS[kind]
    assert "did you mean" not in problem.remedy
