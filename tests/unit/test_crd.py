"""The CRDs are what model and rules say, file by file; what the API server makes of them is tests/kube's to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from manifests import generate
from store import crd, kubewire
from store.errors import Invalid
from store.model import (
    KINDS,
    Allocation,
    ConfigMap,
    EndpointSlice,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    KubeEvent,
    Meta,
    Namespace,
    Node,
    Pod,
    Resource,
    Secret,
    Service,
    Writer,
)

CUSTOM = crd.custom_kinds()


def version(kind: type[Resource]) -> dict[str, Any]:
    (only,) = crd.definition(kind)["spec"]["versions"]
    return dict(only)


def schema(kind: type[Resource]) -> dict[str, Any]:
    return dict(version(kind)["schema"]["openAPIV3Schema"])


def test_the_files_are_current() -> None:
    assert generate.differences() == []


def test_a_file_that_is_old_missing_or_of_no_kind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path / "crds")
    monkeypatch.setattr(generate.sys, "argv", ["generate"])
    assert generate.main() == 0
    pools, blocks = tmp_path / "crds" / "ippools.yaml", tmp_path / "crds" / "ipamblocks.yaml"
    pools.write_text("old")
    blocks.unlink()
    (tmp_path / "crds" / "stray.yaml").write_text("")
    monkeypatch.setattr(generate.sys, "argv", ["generate", "--check"])
    assert generate.main() == 1
    assert generate.differences() == [blocks, pools, tmp_path / "crds" / "stray.yaml"]
    monkeypatch.setattr(generate.sys, "argv", ["generate"])
    assert generate.main() == 0
    assert generate.differences() == []
    assert yaml.safe_load(pools.read_text())["kind"] == "CustomResourceDefinition"


def test_every_kind_of_ours_has_a_definition_and_no_other() -> None:
    assert set(KINDS) - set(CUSTOM) == {Node, Namespace, Pod, Service, EndpointSlice, Secret, ConfigMap, KubeEvent}
    assert [crd.definition(k)["metadata"]["name"] for k in CUSTOM] == [f"{k.PLURAL}.underlay.network" for k in CUSTOM]


def leaves(node: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every schema below ``node``, itself included, with its path."""
    found = [(path, node)]
    for name, below in node.get("properties", {}).items():
        found += leaves(below, f"{path}.{name}")
    for word in ("items", "additionalProperties"):
        if isinstance(node.get(word), dict):
            found += leaves(node[word], f"{path}[]")
    return found


@pytest.mark.parametrize("kind", CUSTOM)
def test_the_schema_is_structural_and_every_list_says_how_it_merges(kind: type[Resource]) -> None:
    for path, node in leaves(schema(kind)):
        assert node["type"] in ("object", "array", "string", "integer", "boolean"), path
        if node["type"] == "array":
            assert node["x-kubernetes-list-type"] in ("atomic", "set", "map"), path


@pytest.mark.parametrize("kind", CUSTOM)
def test_status_is_a_subresource_where_the_kind_has_one_and_its_fields_are_one(kind: type[Resource]) -> None:
    has = "status" in kind.__struct_fields__
    assert ("subresources" in version(kind)) is has
    if has:
        assert schema(kind)["properties"]["status"]["x-kubernetes-map-type"] == "atomic"


@pytest.mark.parametrize("kind", CUSTOM)
def test_what_can_be_selected_and_printed_is_there(kind: type[Resource]) -> None:
    known = {path for path, _ in leaves(schema(kind))}
    selectable = [field["jsonPath"] for field in version(kind).get("selectableFields", [])]
    assert selectable == [f".{path}" for path in kind.SELECTABLE]
    assert set(selectable) <= known
    for column in version(kind)["additionalPrinterColumns"]:
        path = column["jsonPath"].replace("[*]", "[]")
        assert path in known or path.startswith(".metadata."), column


def test_names_that_people_type_are_the_models_and_each_means_one_kind() -> None:
    typed: list[str] = []
    for kind in CUSTOM:
        names = crd.definition(kind)["spec"]["names"]
        assert names["categories"] == ["underlay"]
        own = {names["plural"], names["singular"], *names["shortNames"]}
        assert own >= {kind.PLURAL, *kind.SHORT}
        typed += own
    assert len(typed) == len(set(typed))


@pytest.mark.parametrize("kind", CUSTOM)
def test_defaults_are_those_of_the_model(kind: type[Resource]) -> None:
    """What the API server fills into an object of which nothing optional was said, reads as that object."""

    def fill(node: dict[str, Any], value: Any) -> Any:
        if node["type"] == "object" and isinstance(value, dict):
            for name, below in node.get("properties", {}).items():
                if name not in value and "default" in below:
                    value[name] = msgspec.to_builtins(below["default"])
                if name in value:
                    value[name] = fill(below, value[name])
        return value

    said: dict[str, Any] = {"metadata": {"name": "a"}}
    if "spec" in schema(kind).get("required", []):
        spec = schema(kind)["properties"]["spec"]
        said["spec"] = {
            name: 65001 if spec["properties"][name]["type"] == "integer" else "10.0.0.1"
            for name in spec.get("required", [])
        }
    plain = msgspec.convert(said, kind)
    assert msgspec.convert(fill(schema(kind), msgspec.to_builtins(said)), kind) == plain


def block(*allocations: Allocation, **status: Any) -> IPAMBlock:
    return IPAMBlock(
        metadata=Meta(name="10-0-0-0-26", labels={"a": "b"}),
        spec=IPAMBlockSpec(cidr="10.0.0.0/26", pool="pool", node="node-1"),
        status=IPAMBlockStatus(allocations=allocations, **status),
    )


ONE = Allocation(address="10.0.0.1", network="pods", container="c1", interface="eth0")
TWO = Allocation(
    address="10.0.0.2", network="pods", container="c2", interface="eth0", pod="ns/a", since="2026-01-01T00:00:00Z"
)
TEN = msgspec.structs.replace(ONE, address="10.0.0.10")


@pytest.mark.parametrize(
    "obj",
    [block(), block(ONE, TWO, TEN, used=2, free=62, releasing=True, writer=Writer(boot_id="b", start=2)), block(TEN)],
)
def test_a_block_comes_back_from_the_wire_as_it_was(obj: IPAMBlock) -> None:
    body = msgspec.json.encode(kubewire.encode(obj))
    assert kubewire.decode(IPAMBlock, body) == obj
    page = b'{"kind":"IPAMBlockList","metadata":{"resourceVersion":"7","continue":"x"},"items":[%s]}' % body
    read = kubewire.decode_page(IPAMBlock, page)
    assert (read.items, read.metadata.resource_version, read.metadata.more) == ((obj,), "7", "x")


def test_allocations_are_read_in_order_of_address() -> None:
    body = kubewire.encode(block(TEN, TWO))
    assert kubewire.decode(IPAMBlock, msgspec.json.encode(body)).status.allocations == (TWO, TEN)


def test_allocations_are_one_line_of_text_each_by_address() -> None:
    assert kubewire.encode(block(ONE, TWO))["status"]["allocations"] == {
        "10.0.0.1": "pods c1 eth0 - -",
        "10.0.0.2": "pods c2 eth0 ns/a 2026-01-01T00:00:00Z",
    }


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ((ONE, ONE), r"allocations\[1\]\.address"),
        ((msgspec.structs.replace(ONE, container="c 1"),), r"allocations\[0\]\.container"),
        ((msgspec.structs.replace(ONE, pod="-"),), r"allocations\[0\]\.pod"),
        ((TWO, msgspec.structs.replace(ONE, interface="eth\u00a00")), r"allocations\[1\]\.interface"),
    ],
)
def test_what_a_line_cannot_say_is_refused_before_it_is_sent(wrong: tuple[Allocation, ...], field: str) -> None:
    with pytest.raises(Invalid, match=field):
        kubewire.encode(block(*wrong))


@pytest.mark.parametrize("text", ["", "pods c1 eth0 -", "pods c1 eth0 - - -"])
def test_a_line_of_another_form_is_not_guessed_at(text: str) -> None:
    body = kubewire.encode(block())
    body["status"] = {"allocations": {"10.0.0.1": text}}
    with pytest.raises(msgspec.ValidationError, match=r"10\.0\.0\.1"):
        kubewire.decode(IPAMBlock, msgspec.json.encode(body))


def test_a_core_object_of_a_list_has_no_kind() -> None:
    page = b'{"metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"a"},"spec":{},"status":{"phase":"x"}}]}'
    assert kubewire.decode_page(Node, page).items == (Node(metadata=Meta(name="a")),)
