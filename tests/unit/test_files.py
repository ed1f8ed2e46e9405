from __future__ import annotations

import json
import random
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from store.errors import Invalid
from store.files import MAX_SIZE, dump_json, dump_yaml, load
from store.model import (
    Allocation,
    BGPConfiguration,
    BGPPeer,
    BGPPeerSpec,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPPool,
    IPPoolSpec,
    IPReservation,
    Meta,
    Node,
    Writer,
)

POOL = """
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: pool}
spec:
  cidr: 10.244.0.0/16
"""


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(Invalid) as caught:
        load(text, source="file.yaml")
    assert caught.value.what == "file.yaml"
    return [str(p) for p in caught.value.problems]


def problem(text: str | bytes) -> str:
    (only,) = problems(text)
    return only


# -- what is taken ------------------------------------------------------------------------------------------------


def test_a_calico_file_as_calicoctl_exports_it() -> None:
    notes: list[str] = []
    objects = load(
        """
apiVersion: projectcalico.org/v3
items:
- apiVersion: projectcalico.org/v3
  kind: IPPool
  metadata:
    creationTimestamp: 2024-05-01T10:00:00Z
    name: default-ipv4-ippool
    resourceVersion: "861"
    uid: 1f5f9b1a-6e5c-4e3c-8b5a-2a8d3d1f6c55
  spec:
    allowedUses: [Workload, Tunnel]
    assignmentMode: Automatic
    blockSize: 26
    cidr: 10.244.0.0/16
    ipipMode: Never
    natOutgoing: false
    nodeSelector: all()
    vxlanMode: Never
- apiVersion: projectcalico.org/v3
  kind: IPReservation
  metadata: {name: routers}
  spec: {reservedCIDRs: [10.244.0.0/28, 10.244.1.1]}
kind: IPPoolList
metadata:
  resourceVersion: "4711"
---
apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata: {name: default}
spec:
  asNumber: 64513
  nodeToNodeMeshEnabled: false
  logSeverityScreen: Info
  serviceClusterIPs: []
  listenPort: 179
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: tor-1}
spec:
  peerIP: "[fd00::1]:1179"
  asNumber: 65001
  nodeSelector: rack == 'rack-1'
  keepOriginalNextHop: false
  sourceAddress: UseNodeIP
  numAllowedLocalASNumbers: 1
---
""",
        note=notes.append,
    )
    pool, reservation, configuration, peer = objects
    assert isinstance(pool, IPPool)
    assert pool.metadata.creation_timestamp == "2024-05-01T10:00:00Z"
    assert pool.spec.block_size == 26
    assert isinstance(reservation, IPReservation)
    assert reservation.spec.reserved_cidrs == ("10.244.0.0/28", "10.244.1.1")
    assert isinstance(configuration, BGPConfiguration)
    assert configuration.spec.node_to_node_mesh_enabled is False
    assert isinstance(peer, BGPPeer)
    assert peer.spec.peer_ip == "[fd00::1]:1179"
    left_out = {"logSeverityScreen", "serviceClusterIPs", "keepOriginalNextHop"}
    stamps = ["metadata.uid", "metadata.creationTimestamp"]
    said = [note.split(": ")[1].split()[0] for note in notes]
    assert sorted(said) == sorted([*(f"spec.{field}" for field in left_out), *stamps, "spec.allowedUses"])


def test_our_own_files_carry_their_stamps_without_a_word() -> None:
    notes: list[str] = []
    text = """
apiVersion: underlay.network/v1
kind: IPPool
metadata: {name: a, uid: x, generation: 3, finalizers: [a/b], creationTimestamp: "2024-05-01T10:00:00Z"}
spec: {cidr: 10.244.0.0/16, allowedUses: [Workload, Tunnel]}
"""
    assert load(text, note=notes.append)
    assert notes == []
    load(text.replace("underlay.network/v1", "projectcalico.org/v3"), note=notes.append)
    assert [note.split(": ")[1] for note in notes] == [
        "metadata.uid is left out",
        "metadata.generation is left out",
        "metadata.creationTimestamp is left out",
        "metadata.finalizers is left out",
        "spec.allowedUses",
    ]


def test_a_node_as_kubectl_exports_it() -> None:
    (node,) = load(
        """
apiVersion: v1
kind: Node
metadata:
  name: node-1
  labels: {rack: r1}
  managedFields: [{manager: kubelet}]
spec:
  podCIDR: 10.0.0.0/24
  podCIDRs: [10.0.0.0/24]
  providerID: x
  taints: [{key: a, effect: NoSchedule}]
status:
  addresses: [{type: InternalIP, address: 192.0.2.1}]
  capacity: {cpu: "2"}
  nodeInfo: {kernelVersion: "6.1"}
"""
    )
    assert isinstance(node, Node)
    assert node.spec.pod_cidrs == ("10.0.0.0/24",)
    assert node.status.addresses[0].address == "192.0.2.1"


def test_json_and_bytes_and_nothing() -> None:
    (pool,) = load(POOL)
    wire = json.dumps(
        {
            "apiVersion": "underlay.network/v1",
            "kind": "IPPool",
            "metadata": {"name": "pool"},
            "spec": {"cidr": "10.244.0.0/16"},
        }
    )
    assert load(wire) == load(wire.encode()) == load("\ufeff" + wire) == (pool,)
    assert load(
        "{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: pool}, spec: {cidr: 10.244.0.0/16}}"
    ) == (pool,)
    for empty in ("", "---\n---\n", "# only a comment\n", b""):
        assert load(empty) == ()


def test_null_is_not_set() -> None:
    (pool,) = load(
        POOL.replace("{name: pool}", "{name: pool, creationTimestamp: null, labels: ~}") + "  nodeSelector:\n"
    )
    assert pool == load(POOL)[0]


def test_words_that_look_like_something_else_stay_text() -> None:
    (node,) = load(
        """
apiVersion: v1
kind: Node
metadata:
  name: n
  annotations: {a: on, b: 12:30, c: 010, d: 1_000, e: 2024-05-01, f: 'true', g: 0o17}
"""
    )
    assert node.metadata.annotations == {
        "a": "on",
        "b": "12:30",
        "c": "010",
        "d": "1_000",
        "e": "2024-05-01",
        "f": "true",
        "g": "0o17",
    }


# -- what is refused ----------------------------------------------------------------------------------------------


def test_an_unknown_field_is_named_with_the_nearest_known_one() -> None:
    text = problem(POOL + "  nodeselector: all()\n")
    assert text.startswith("document 1 (IPPool pool): spec.nodeselector: 'all()':")
    assert "did you mean nodeSelector?" in text
    text = problem(POOL + "  colour: red\n")
    assert "did you mean" not in text
    assert "known are cidr, blockSize" in text
    assert "metadata.lables" in problem(POOL.replace("{name: pool}", "{name: pool, lables: {}}"))
    assert "nosuch" in problem(POOL + "nosuch: 1\n")


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("namespaceSelector: has(a)", "underlay.network/ipv4pools"),
        ("ipipMode: Always", "no overlay"),
        ("vxlanMode: CrossSubnet", "no overlay"),
        ("natOutgoing: true", "not served"),
        ("ipip: {enabled: true}", "no overlay"),
        ("blockSize: '26'", "write a whole number"),
        ("blockSize: 26.5", "write a whole number"),
        ("disabled: yes", "write true or false"),
        ("nodeSelector: 7", "write text"),
        ("allowedUses: Workload", "write a list"),
        ("allowedUses: [Workload, 1]", "write text"),
        ("blockSize: 12", "write 20..32"),
    ],
)
def test_a_pools_fields(field: str, why: str) -> None:
    text = problem(POOL + f"  {field}\n")
    assert why in text
    assert text.startswith(f"document 1 (IPPool pool): spec.{field.split(':')[0]}")


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("password: {secretKeyRef: {name: A, key: b}}", "name a Secret"),
        ("filters: [Deny]", "name a BGPFilter"),
        ("reversePeering: Manual", "always peer back"),
        ("keepOriginalNextHop: true", "next hop"),
        ("ttlSecurity: 300", "1..254"),
        ("sourceAddress: Any", "UseNodeIP"),
        ("localASNumber: 65535", "reserved"),
        ("asnumber: 65001", "did you mean asNumber"),
        ("holdTime: 1", "3..65535"),
    ],
)
def test_a_peers_fields(field: str, why: str) -> None:
    text = problem(
        f"""
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {{name: tor-1}}
spec:
  peerIP: 10.0.0.1
  asNumber: 65001
  {field}
"""
    )
    assert why in text
    assert f"(BGPPeer tor-1): spec.{field.split(':')[0]}" in text


def test_a_dotted_as_number_is_computed() -> None:
    text = problem(
        "{apiVersion: projectcalico.org/v3, kind: BGPPeer, metadata: {name: a},"
        " spec: {peerIP: fd00::1, asNumber: '1.10'}}"
    )
    assert "write 65546" in text


def test_all_problems_of_all_documents_are_told_at_once() -> None:
    text = POOL + "  ipipMode: Always\n  blocksize: 26\n---\n" + POOL.replace("/16", "/8") + "---\nkind: Nod\n---\n7\n"
    found = problems(text.replace("name: pool", "name: p", 1))
    assert [p.split(":")[0] for p in found] == [
        "document 1 (IPPool p)",
        "document 1 (IPPool p)",
        "document 2 (IPPool pool)",
        "document 3",
        "document 4",
    ]
    assert "did you mean Node?" in found[3]


def test_an_item_of_a_list_is_counted() -> None:
    text = problem(
        "apiVersion: v1\nkind: List\nitems:\n- {kind: Node, apiVersion: v1, metadata: {name: n}}\n- {kind: X}\n"
    )
    assert text.startswith("document 1, item 2: kind: 'X'")
    assert "write a list" in problem("{apiVersion: v1, kind: List, items: 7}")
    assert "list of lists" in problem("{apiVersion: v1, kind: List, items: [{kind: List, items: []}]}")
    assert "extra" in problem("{apiVersion: v1, kind: List, items: [], extra: 1}")


@pytest.mark.parametrize(
    ("kind", "api", "why"),
    [
        ("BGPFilter", "projectcalico.org/v1", "write underlay.network/v1 or projectcalico.org/v3"),
        ("GlobalNetworkPolicy", "projectcalico.org/v3", "kube-network-policies"),
        ("FelixConfiguration", "projectcalico.org/v3", "Felix"),
        ("Ippool", "projectcalico.org/v3", "did you mean IPPool?"),
        ("IPPool", "crd.projectcalico.org/v1", "write underlay.network/v1 or projectcalico.org/v3"),
        ("IPAMBlock", "projectcalico.org/v3", "write underlay.network/v1"),
        ("Node", "underlay.network/v1", "write v1"),
        ("[IPPool]", "v1", "there are"),
    ],
)
def test_kinds_that_are_not_served(kind: str, api: str, why: str) -> None:
    assert why in problem(f"apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x}}\n")


def test_what_is_missing_is_named() -> None:
    assert "metadata: '': it is missing" in problems("{apiVersion: projectcalico.org/v3, kind: IPPool}")[0]
    assert "spec.cidr: '': it is missing" in problem(POOL.replace("cidr: 10.244.0.0/16", "disabled: true"))
    assert "metadata.name" in problem(POOL.replace("{name: pool}", "{labels: {}}"))
    assert "kind: ''" in problem("metadata: {name: x}")


def test_labels_are_text() -> None:
    text = problem(POOL.replace("{name: pool}", "{name: pool, labels: {a: 1, b: ok}}"))
    assert "metadata.labels[a]: 1: write text" in text


def test_the_same_object_twice() -> None:
    text = problem(POOL + "---\n" + POOL)
    assert "document 2 (IPPool pool): metadata.name" in text
    assert "document 1 (IPPool pool) already" in text


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1", "'a' stands there twice"),
        ('{"spec": {"a": 1, "a": 2}}', "a: 2", "twice"),
        ("a: [1", "line 2", "no YAML"),
        ("a: b: c", "line 1", "no YAML"),
        ('{"a": NaN}', "number", "JSON"),
        ("a: \tb\n\tc: 1", "line 2", "no YAML"),
        ("1: 2", "line 1, column 1", "a key is text"),
        ("? [a]\n: 1", "line 1", "a key is text"),
        (b"a: \xff", "byte 4", "UTF-8"),
        ("x: " + "9" * 5000, "text", "digits"),
        ("!!bool x", "text", "tag"),
        ("!!python/object/apply:os.system [true]", "line 1", "tag"),
        ("!!timestamp x", "line 1", "tag"),
        ("!!set {a, b}", "line 1", "tag"),
        ("a: *b", "line 1", "undefined alias"),
        ("\x00", "text", "no YAML"),
        ("[" * 100_000, "line 1", "depth"),
        ('{"a":' * 100_000, "nesting", "deep"),
        ("[" * 200 + "]" * 200, "document 1", "deep"),
        ("a: &a [*a]", "document 1", "deep"),
    ],
    ids=range(20),
)
def test_text_that_cannot_be_read(text: str | bytes, where: str, why: str) -> None:
    found = problem(text)
    assert found.startswith(where)
    assert why in found


def test_aliases_and_merges_cannot_blow_up() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "aliases" in problem("\n".join(lines))
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    assert "aliases" in problem("\n".join(lines))


def test_aliases_within_reason_work() -> None:
    (pool,) = load(POOL.replace("{name: pool}", "{name: pool, labels: &l {a: b}, annotations: *l}"))
    assert pool.metadata.annotations == pool.metadata.labels == {"a": "b"}


def test_a_file_that_is_too_long() -> None:
    assert "split it" in problem(b"#" * (MAX_SIZE + 1))
    assert load(b"#" * MAX_SIZE) == ()


def test_a_problem_after_good_documents_returns_nothing() -> None:
    assert len(problems(POOL + "---\na: [")) == 1


# -- out and in again ---------------------------------------------------------------------------------------------

texts = st.text(max_size=12)
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
metas = st.builds(
    lambda name, values: Meta(name=name, annotations={f"k{i}": v for i, v in enumerate(values)}),
    names,
    st.lists(
        st.one_of(texts, st.sampled_from(["on", "yes", "1e3", "12:30", "~", "null", "0x1F", "1_0", "=", "2024-01-01"])),
        max_size=4,
    ),
)
allocations = st.integers(0, 63).map(
    lambda i: (Allocation(address=f"10.0.0.{i}", network="n", container="c", interface="eth0"),)
)
objects = st.one_of(
    st.builds(
        lambda m, size, off: IPPool(metadata=m, spec=IPPoolSpec(cidr="10.0.0.0/8", block_size=size, disabled=off)),
        metas,
        st.integers(20, 32),
        st.booleans(),
    ),
    st.builds(
        lambda m, n: BGPPeer(metadata=m, spec=BGPPeerSpec(peer_ip="fd00::1", as_number=n)), metas, st.integers(1, 20000)
    ),
    st.builds(
        lambda a: IPAMBlock(
            metadata=Meta(name="10-0-0-0-26"),
            spec=IPAMBlockSpec(cidr="10.0.0.0/26", pool="p", node="n"),
            status=IPAMBlockStatus(allocations=a, writer=Writer(boot_id="b", start=2)),
        ),
        allocations,
    ),
    st.builds(Node, metadata=metas),
)


@given(st.lists(objects, max_size=4, unique_by=lambda o: (o.kind(), o.name)))
def test_what_is_written_is_read_back(found: list[Any]) -> None:
    assert load(dump_yaml(found)) == tuple(found)
    assert load(dump_json(found)) == tuple(found)
    assert load(dump_json(found, always_list=True)) == tuple(found)
    # Others read it the same way, YAML 1.1 and all.
    assert [d["metadata"]["name"] for d in yaml.safe_load_all(dump_yaml(found))] == [o.name for o in found]
    for document, obj in zip(yaml.safe_load_all(dump_yaml(found)), found, strict=True):
        assert document["metadata"].get("annotations", {}) == obj.metadata.annotations


def test_keys_stand_in_the_order_of_peoples_files() -> None:
    assert dump_yaml(load(POOL)).splitlines() == [
        "apiVersion: underlay.network/v1",
        "kind: IPPool",
        "metadata:",
        "  name: pool",
        "spec:",
        "  cidr: 10.244.0.0/16",
    ]


@given(st.one_of(st.text(alphabet="ab:-{}[]&*!|>'\"#% \n\t0?,~<", max_size=40), st.binary(max_size=20)))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        load(text)
    except Invalid as e:
        assert e.problems


@given(st.randoms(use_true_random=False))
def test_a_good_file_with_a_few_wrong_characters_is_read_or_refused(rng: random.Random) -> None:
    raw = bytearray(POOL.encode())
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    try:
        load(bytes(raw))
    except Invalid as e:
        assert e.problems
