"""underlayctl as people use it: whole command lines on a SQLite store, and the pure parts alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ctl import edit
from ctl.addresses import address_use, block_uses, blocks_table, describe, pool_uses, pools_table
from ctl.kinds import UnknownKind, find_kind, find_kinds, names_of
from ctl.main import main
from ctl.sessions import conditions, headline, sessions_table
from ctl.tables import COLUMNS, table
from ctl.words import age, count, share
from store.clock import SystemClock
from store.errors import Conflict
from store.memory import MemoryStore
from store.model import (
    ANNOTATION_RELEASE,
    ANNOTATION_RELEASE_REFUSED,
    KINDS,
    BGPNodeStatus,
    BGPNodeStatusStatus,
    BGPPeer,
    BGPPeerSpec,
    Condition,
    EndpointSlice,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPAMConfiguration,
    IPPool,
    IPPoolSpec,
    IPReservation,
    IPReservationSpec,
    Meta,
    Node,
    NodeAddress,
    NodeStatus,
    Resource,
    Secret,
    SessionStatus,
)
from tests.ctl_fakes import NOW, Ctl, block, pool

POOL = """
apiVersion: underlay.network/v1
kind: IPPool
metadata:
  name: pods-v4
spec:
  cidr: 10.244.0.0/16
"""
PEER = """
apiVersion: underlay.network/v1
kind: BGPPeer
metadata:
  name: tor
  labels:
    rack: rack-1
spec:
  peerIP: 10.0.0.1
  asNumber: 65001
"""


@pytest.fixture
def ctl(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    monkeypatch.delenv("UNDERLAY_STORE", raising=False)
    monkeypatch.delenv("UNDERLAY_NODE", raising=False)
    made = Ctl(tmp_path, capsys)
    made.on_store(lambda store: store.list(IPPool))
    return made


# -- words, kinds, tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_to_each_of_its_words(kind: type[Resource]) -> None:
    for word in (kind.kind(), kind.PLURAL, *kind.SHORT):
        assert find_kind(word) is kind
        assert find_kind(word.upper()) is kind


def test_no_word_means_two_kinds() -> None:
    words = [word for kind in KINDS for word in names_of(kind)]
    assert len(words) == len(set(words))


def test_several_kinds_are_taken_once_each_in_order() -> None:
    assert find_kinds("peers,ippool,bgppeer") == (BGPPeer, IPPool)
    with pytest.raises(UnknownKind, match=r"'pols'.*ippools"):
        find_kinds("ippools,pols")


@pytest.mark.parametrize(
    ("since", "text"),
    [
        ("", ""),
        ("2026-11-24T12:00:00Z", "0s"),
        ("2026-11-24T11:58:57Z", "1m3s"),
        ("2026-11-24T08:59:00Z", "3h1m"),
        ("2026-11-21T08:00:00Z", "3d4h"),
        ("2026-11-24T12:00:05Z", "0s"),  # another machine's clock is ahead
    ],
)
def test_age(since: str, text: str) -> None:
    assert age(since, NOW) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 64, "0 (0%)"),
        (5, 64, "5 (8%)"),
        (1, 65536, "1 (<1%)"),
        (65535, 65536, "65535 (>99%)"),
        (64, 64, "64 (100%)"),
        (2**80 - 1, 2**80, "1.21e+24 (>99%)"),
        (0, 0, "0"),
    ],
)
def test_share(part: int, whole: int, text: str) -> None:
    assert share(part, whole) == text


def test_count_of_a_large_pool_is_readable() -> None:
    assert count(2**80) == "2^80"
    assert count(2**80 - 12) == "1.21e+24"
    assert count(999_999_999) == "999999999"


@given(st.integers(0, 2**128), st.integers(1, 2**128))
def test_words_take_any_number(part: int, whole: int) -> None:
    assert count(part)
    assert share(min(part, whole), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_table(kind: type[Resource]) -> None:
    specs: dict[type[Resource], dict[str, Any]] = {
        IPPool: {"spec": IPPoolSpec(cidr="10.244.0.0/16")},
        IPReservation: {"spec": IPReservationSpec(reserved_cidrs=("10.244.0.0/29", "10.244.1.1"))},
        IPAMBlock: {"spec": IPAMBlockSpec(cidr="10.244.0.0/26", pool="p", node="n")},
        BGPPeer: {"spec": BGPPeerSpec(peer_ip="10.0.0.1", as_number=65001)},
        EndpointSlice: {"address_type": "IPv4"},
    }
    obj = kind(metadata=Meta(name="x", creation_timestamp="2026-11-24T11:00:00Z"), **specs.get(kind, {}))
    narrow, wide = table(kind, [obj], now=NOW), table(kind, [obj], now=NOW, wide=True, full_names=True)
    assert (narrow.titles[0], narrow.rows[0][0]) == ("NAME", "x")
    assert (narrow.titles[-1], narrow.rows[0][-1]) == ("AGE", "1h0m")
    assert wide.rows[0][0] == f"{kind.kind().lower()}/x"
    assert set(narrow.titles) <= set(wide.titles)
    assert len(wide.titles) == len(wide.rows[0]) == len(COLUMNS[kind]) + 2


def test_table_says_what_a_pool_and_a_block_are_up_to() -> None:
    leaving = msgspec.structs.replace(pool(disabled=True), metadata=Meta(name="x", deletion_timestamp=NOW))
    assert "disabled,deleting" in table(IPPool, [leaving], now=NOW).rows[0]
    assert "/122" in table(IPPool, [pool(cidr="fd00::/48")], now=NOW).rows[0]
    assert "releasing" in table(IPAMBlock, [block(releasing=True)], now=NOW).rows[0]


# -- get -------------------------------------------------------------------------------------------------------------


def test_get_shows_objects_of_several_kinds(ctl: Ctl) -> None:
    ctl.put(pool(), pool("pods-v6", "fd00:10:244::/48"))
    ctl.ok("apply", "-f", ctl.file(PEER))
    lines = ctl.ok("get", "IPPools,peer").splitlines()
    assert lines[0].split()[:2] == ["NAME", "CIDR"]
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["ippool/pods-v4", "10.244.0.0/16"],
        ["ippool/pods-v6", "fd00:10:244::/48"],
    ]
    assert lines[5].split()[:3] == ["bgppeer/tor", "10.0.0.1", "65001"]


def test_get_by_name_says_which_are_missing_and_shows_the_others(ctl: Ctl) -> None:
    ctl.put(pool())
    code, out, err = ctl("get", "ippool", "pods-v4", "nope", "-o", "name")
    assert (code, out, err) == (1, "ippool/pods-v4\n", "underlayctl: ippool/nope: not found\n")


@pytest.mark.parametrize("selector", ["rack == 'rack-1'", "rack=rack-1", "rack==rack-1,zone!=b", "has(rack)"])
def test_get_by_label(ctl: Ctl, selector: str) -> None:
    other = PEER.replace("rack: rack-1", "row: '7'").replace("name: tor", "name: other")
    ctl.ok("apply", "-f", ctl.file(PEER + "---" + other))
    assert ctl.ok("get", "peers", "-o", "name", "-l", selector) == "bgppeer/tor\n"


def test_a_wrong_selector_or_kind_is_a_usage_error(ctl: Ctl) -> None:
    assert ctl("get", "peers", "-l", "rack == 'x")[0] == 2
    assert ctl("get", "peers", "tor", "-l", "a=b")[0] == 2
    code, _, err = ctl("get", "deployments")
    assert code == 2
    assert "'deployments'" in err
    assert "ippools" in err
    assert ctl("get")[0] == 2
    assert ctl("got", "peers")[0] == 2


def test_nothing_there_is_no_error(ctl: Ctl) -> None:
    assert ctl("get", "ippools") == (0, "", "nothing found: there is no IPPool\n")
    assert ctl("get", "ippools", "-o", "yaml") == (0, "", "")
    assert json.loads(ctl.ok("get", "ippools", "-o", "json"))["items"] == []


def test_json_is_one_object_for_one_name_and_a_list_else(ctl: Ctl) -> None:
    ctl.put(pool())
    one = json.loads(ctl.ok("get", "ippool", "pods-v4", "-o", "json"))
    assert (one["kind"], one["spec"]) == ("IPPool", {"cidr": "10.244.0.0/16"})
    assert one["metadata"]["uid"]
    listing = json.loads(ctl.ok("get", "ippools", "-o", "json"))
    assert (listing["kind"], listing["items"]) == ("List", [one])


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_what_get_prints_can_be_applied_and_changes_nothing(ctl: Ctl, form: str) -> None:
    ctl.put(
        pool(),
        block(),
        Node(
            metadata=Meta(name="node-1", labels={"rack": "rack-1"}),
            status=NodeStatus(addresses=(NodeAddress(type="InternalIP", address="10.0.0.5"),)),
        ),
        IPReservation(metadata=Meta(name="r"), spec=IPReservationSpec(reserved_cidrs=("10.244.0.0/29",))),
    )
    text = ctl.ok("get", "ippools,nodes,ipamblocks,ipreservations", "-o", form)
    before = ctl.all(IPPool), ctl.all(Node), ctl.all(IPAMBlock)
    out = ctl.ok("apply", "-f", ctl.file(text))
    assert sorted(out.splitlines()) == [
        "ipamblock/10-244-0-0-26 unchanged",
        "ippool/pods-v4 unchanged",
        "ipreservation/r unchanged",
        "node/node-1 unchanged",
    ]
    assert (ctl.all(IPPool), ctl.all(Node), ctl.all(IPAMBlock)) == before


def test_yaml_leaves_out_what_the_store_sets_and_restores_into_an_empty_store(ctl: Ctl, tmp_path: Path) -> None:
    ctl.put(pool())
    text = ctl.ok("get", "ippool", "pods-v4", "-o", "yaml")
    assert yaml.safe_load(text)["metadata"] == {"name": "pods-v4"}
    ctl.url = f"sqlite:{tmp_path}/other.db"
    assert ctl.ok("apply", "-f", ctl.file(text)) == "ippool/pods-v4 created\n"


# -- apply, create, replace ------------------------------------------------------------------------------------------


def test_apply_creates_then_changes_then_leaves_alone(ctl: Ctl) -> None:
    file = ctl.file(POOL)
    assert ctl.ok("apply", "-f", file) == "ippool/pods-v4 created\n"
    assert ctl.ok("apply", "-f", file) == "ippool/pods-v4 unchanged\n"
    version = ctl.all(IPPool)[0].metadata.resource_version
    ctl.file(POOL + "  disabled: true\n")
    assert ctl.ok("apply", "-f", file) == "ippool/pods-v4 configured\n"
    (now,) = ctl.all(IPPool)
    assert isinstance(now, IPPool)
    assert now.spec.disabled
    assert now.metadata.resource_version != version


def test_apply_sets_its_labels_and_leaves_others_but_replace_is_exact(ctl: Ctl) -> None:
    ctl.put(Node(metadata=Meta(name="node-1", labels={"kubernetes.io/hostname": "n", "rack": "old"})))
    node = "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-1\n  labels:\n    rack: new\n"
    assert ctl.ok("apply", "-f", ctl.file(node)) == "node/node-1 configured\n"
    assert ctl.all(Node)[0].metadata.labels == {"kubernetes.io/hostname": "n", "rack": "new"}
    assert ctl.ok("replace", "-f", ctl.file(node)) == "node/node-1 replaced\n"
    assert ctl.all(Node)[0].metadata.labels == {"rack": "new"}
    assert ctl.ok("replace", "-f", ctl.file(node)) == "node/node-1 unchanged\n"


def test_apply_never_writes_status(ctl: Ctl) -> None:
    ctl.put(pool(), block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.1"))
    text = ctl.ok("get", "block", "10-244-0-0-26", "-o", "yaml").replace("10.244.0.1", "10.244.0.2")
    assert ctl.ok("apply", "-f", ctl.file(text)) == "ipamblock/10-244-0-0-26 unchanged\n"
    assert ctl.all(IPAMBlock)[0].status.allocations[0].address == "10.244.0.1"  # type: ignore[attr-defined]


def test_nothing_is_written_if_any_document_is_refused(ctl: Ctl) -> None:
    bad = POOL.replace("pods-v4", "bad").replace("10.244.0.0/16", "10.245.0.0/16") + "  ipipMode: Always\n"
    code, out, err = ctl("apply", "-f", ctl.file(POOL + "---" + bad, "two.yaml"))
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    for part in ("two.yaml", "document 2", "bad", "spec.ipipMode", "'Always'", "no overlay"):
        assert part in line
    assert ctl.all(IPPool) == ()


def test_every_problem_of_every_file_is_a_line(ctl: Ctl) -> None:
    one = ctl.file(POOL.replace("10.244.0.0/16", "10.244.0.1/16") + "  blockSize: 99\n", "one.yaml")
    two = ctl.file(PEER + "  holdtime: 9\n", "two.yaml")
    three = ctl.file("kind: [", "three.yaml")
    code, _, err = ctl("apply", "-f", one, "-f", two, "-f", three)
    assert code == 1
    lines = err.splitlines()
    assert [sum(name in line for line in lines) for name in ("one.yaml", "two.yaml", "three.yaml")] == [2, 1, 1]
    assert any("holdTime" in line for line in lines)


@pytest.mark.parametrize("mode", ["apply", "create"])
def test_pools_that_overlap_are_refused_in_one_file_and_beside_the_store(ctl: Ctl, mode: str) -> None:
    other = POOL.replace("pods-v4", "other").replace("10.244.0.0/16", "10.244.128.0/17")
    code, _, err = ctl(mode, "-f", ctl.file(POOL + "---" + other))
    assert code == 1
    assert "object 2 (IPPool other): spec.cidr: '10.244.128.0/17'" in err
    assert ctl.all(IPPool) == ()
    ctl.put(pool())
    code, _, err = ctl(mode, "-f", ctl.file(other))
    assert code == 1
    assert "overlaps IPPool pods-v4" in err


def test_what_never_changes_is_refused_before_anything_is_written(ctl: Ctl) -> None:
    ctl.put(pool())
    changed = POOL.replace("10.244.0.0/16", "10.99.0.0/16")
    code, out, err = ctl("apply", "-f", ctl.file(PEER + "---" + changed))
    assert (code, out) == (1, "")
    assert "spec.cidr: '10.99.0.0/16': it stays '10.244.0.0/16'" in err
    assert ctl.all(BGPPeer) == ()


def test_one_object_in_two_documents_is_refused(ctl: Ctl) -> None:
    code, _, err = ctl("apply", "-f", ctl.file(POOL), "-f", ctl.file(POOL + "  disabled: true\n", "b.yaml"))
    assert code == 1
    assert "b.yaml: object 1" in err
    assert "a.yaml: object 1" in err
    assert ctl.all(IPPool) == ()


CALICO = """
apiVersion: projectcalico.org/v3
kind: IPPool
metadata:
  name: default-ipv4-ippool
  uid: 1f5f9b1a-6e5c-4e3c-8b5a-2a8d3d1f6c55
spec:
  cidr: 10.244.0.0/16
  ipipMode: Never
  namespaceSelector: all()
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata:
  name: tor
spec:
  peerIP: 10.0.0.1
  asNumber: 65001
  keepOriginalNextHop: false
"""


def test_a_calico_file_is_applied_with_a_line_for_each_field_that_was_ignored(ctl: Ctl) -> None:
    code, out, err = ctl("apply", "-f", ctl.file(CALICO, "calico.yaml"))
    assert (code, out) == (0, "ippool/default-ipv4-ippool created\nbgppeer/tor created\n")
    lines = err.splitlines()
    assert all(line.startswith("note: ") and "calico.yaml: document" in line for line in lines)
    assert [next(f for f in line.split() if f.startswith(("metadata.", "spec."))) for line in lines] == [
        "spec.namespaceSelector",
        "metadata.uid",
        "spec.keepOriginalNextHop",
    ]


def test_a_calico_file_is_refused_with_a_line_for_each_field_that_is_not_served(ctl: Ctl) -> None:
    text = CALICO.replace("ipipMode: Never", "ipipMode: Always\n  vxlanMode: CrossSubnet\n  natOutgoing: true")
    text = text.replace("keepOriginalNextHop: false", "keepOriginalNextHop: true")
    code, out, err = ctl("apply", "-f", ctl.file(text, "calico.yaml"))
    assert (code, out) == (1, "")
    refused = [line for line in err.splitlines() if not line.startswith("note: ")]
    fields = ("ipipMode", "vxlanMode", "natOutgoing", "keepOriginalNextHop")
    assert [sum(f"spec.{field}:" in line for line in refused) for field in fields] == [1] * len(fields)
    assert len(refused) == len(fields)
    assert ctl.all(IPPool) == ()


def test_create_refuses_what_exists_and_replace_what_does_not(ctl: Ctl) -> None:
    file = ctl.file(POOL)
    code, _, err = ctl("replace", "-f", file)
    assert (code, "does not exist" in err) == (1, True)
    assert ctl.ok("create", "-f", file) == "ippool/pods-v4 created\n"
    code, _, err = ctl("create", "-f", file)
    assert (code, "exists already" in err) == (1, True)


def test_replace_with_an_old_version_is_a_conflict(ctl: Ctl) -> None:
    ctl.put(pool())
    text = ctl.ok("get", "ippool", "pods-v4", "-o", "json")
    ctl.ok("apply", "-f", ctl.file(POOL + "  disabled: true\n"))
    code, out, err = ctl("replace", "-f", ctl.file(text, "old.json"))
    assert (code, out) == (1, "")
    assert "old.json" in err
    assert "decide again" in err
    assert ctl.all(IPPool)[0].spec.disabled  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mode", "line"), [("apply", "ippool/pods-v4 created"), ("create", "ippool/pods-v4 created")])
def test_dry_run_says_and_writes_nothing(ctl: Ctl, mode: str, line: str) -> None:
    assert ctl.ok(mode, "--dry-run", "-f", ctl.file(POOL)) == f"{line} (dry run)\n"
    assert ctl.all(IPPool) == ()
    ctl.put(pool())
    file = ctl.file(POOL + "  disabled: true\n")
    before = ctl.all(IPPool)
    assert ctl.ok("apply", "--dry-run", "-f", file) == "ippool/pods-v4 configured (dry run)\n"
    assert ctl.ok("replace", "--dry-run", "-f", file) == "ippool/pods-v4 replaced (dry run)\n"
    assert ctl.all(IPPool) == before


def test_stdin_is_a_file(ctl: Ctl) -> None:
    argv = [sys.executable, "-c", "import sys; from ctl.main import main; sys.exit(main())"]
    done = subprocess.run(
        [*argv, "apply", "-f", "-", "--store", ctl.url],
        input=POOL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "ippool/pods-v4 created\n"), done.stderr


def test_an_unreadable_or_empty_file(ctl: Ctl) -> None:
    code, _, err = ctl("apply", "-f", str(ctl.folder / "nope.yaml"))
    assert (code, "nope.yaml: cannot be read: No such file" in err) == (2, True)
    code, _, err = ctl("apply", "-f", ctl.file(""))
    assert (code, "no object in" in err) == (1, True)


def test_apply_decides_again_when_somebody_else_writes() -> None:
    """A writer in between (the store says Conflict) must not undo, nor be undone."""

    class Busy(MemoryStore):
        interrupted = False

        async def update(self, obj: Any) -> Any:
            if not self.interrupted:
                self.interrupted = True
                current = await self.get(type(obj), obj.name)
                meta = msgspec.structs.replace(current.metadata, labels={"theirs": "yes"})
                await super().update(msgspec.structs.replace(current, metadata=meta))
            return await super().update(obj)

    async def run() -> IPPool:
        store = Busy(SystemClock())
        await store.create(pool())
        assert await edit.apply(store, pool(disabled=True)) == "configured"
        return await store.get(IPPool, "pods-v4")

    after = asyncio.run(run())
    assert after.spec.disabled
    assert after.metadata.labels == {"theirs": "yes"}


def test_apply_changes_what_somebody_else_just_created() -> None:
    class Quick(MemoryStore):
        async def create(self, obj: Any) -> Any:
            await super().create(pool())
            return await super().create(obj)

    async def run() -> None:
        store = Quick(SystemClock())
        assert await edit.apply(store, pool(disabled=True)) == "configured"
        assert (await store.get(IPPool, "pods-v4")).spec.disabled

    asyncio.run(run())


# -- delete ----------------------------------------------------------------------------------------------------------


def test_delete_by_name_and_by_file(ctl: Ctl) -> None:
    both = ctl.file(POOL + "---" + PEER)
    ctl.ok("apply", "-f", both)
    assert ctl.ok("delete", "peer", "tor") == "bgppeer/tor deleted\n"
    code, out, err = ctl("delete", "-f", both)
    assert (code, out, err) == (1, "ippool/pods-v4 deleted\n", "underlayctl: bgppeer/tor: not found\n")
    assert ctl.ok("delete", "-f", both, "--ignore-not-found") == ""
    assert ctl("delete", "ippool")[0] == 2
    assert ctl("delete")[0] == 2
    assert ctl("delete", "ippool", "x", "-f", both)[0] == 2


def test_delete_refuses_a_pool_or_block_in_use_unless_forced(ctl: Ctl) -> None:
    ctl.put(pool(), block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.1"))
    for target in (("ippool", "pods-v4"), ("block", "10-244-0-0-26")):
        code, out, err = ctl("delete", *target)
        assert (code, out) == (1, "")
        assert "pods hold 1 of its addresses (on node-1)" in err
        assert "--force" in err
    assert (len(ctl.all(IPPool)), len(ctl.all(IPAMBlock))) == (1, 1)
    assert ctl.ok("delete", "--force", "ippool", "pods-v4") == "ippool/pods-v4 deleted\n"
    assert ctl.ok("delete", "--force", "block", "10-244-0-0-26") == "ipamblock/10-244-0-0-26 deleted\n"


def test_delete_does_not_take_an_object_that_was_created_anew() -> None:
    class Swapped(MemoryStore):
        async def delete(self, kind: Any, name: str, *, uid: str = "", resource_version: str = "") -> None:
            await super().delete(kind, name)
            await self.create(pool())
            await super().delete(kind, name, uid=uid, resource_version=resource_version)

    async def run() -> None:
        store = Swapped(SystemClock())
        await store.create(pool())
        with pytest.raises(Conflict):
            await edit.delete(store, IPPool, "pods-v4")
        assert await store.get(IPPool, "pods-v4")

    asyncio.run(run())


# -- stores ----------------------------------------------------------------------------------------------------------


def test_without_a_store_the_message_says_what_to_type(capsys: pytest.CaptureFixture[str], ctl: Ctl) -> None:
    assert main(["get", "ippools"]) == 2
    err = capsys.readouterr().err
    assert "--store" in err
    assert "UNDERLAY_STORE" in err
    assert "underlay-lab" in err


def test_the_store_may_be_named_before_after_or_in_the_environment(
    ctl: Ctl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctl.put(pool())
    assert main(["get", "ippools", "-o", "name", "--store", ctl.url]) == 0
    monkeypatch.setenv("UNDERLAY_STORE", "sqlite:/nonexistent/store.db")
    assert main(["--store", ctl.url, "get", "ippools", "-o", "name"]) == 0
    monkeypatch.setenv("UNDERLAY_STORE", ctl.url)
    assert main(["get", "ippools", "-o", "name"]) == 0
    assert capsys.readouterr().out == "ippool/pods-v4\n" * 3


def test_a_store_that_is_not_there_is_exit_3_and_is_not_made(ctl: Ctl, tmp_path: Path) -> None:
    ctl.url = f"sqlite:{tmp_path}/typo.db"
    code, _, err = ctl("get", "ippools")
    assert (code, "typo.db" in err) == (3, True)
    assert not (tmp_path / "typo.db").exists()
    ctl.url = "carrier-pigeon:x"
    assert ctl("get", "ippools")[0] == 3


def test_a_broken_store_is_exit_3_with_one_line(ctl: Ctl, tmp_path: Path) -> None:
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is not a database" * 100)
    ctl.url = f"sqlite:{broken}"
    for command in (["get", "ippools"], ["apply", "-f", ctl.file(POOL)], ["delete", "peer", "x"], ["ipam", "show"]):
        code, _, err = ctl(*command)
        assert (code, len(err.splitlines())) == (3, 1), err


def test_version(ctl: Ctl, capsys: pytest.CaptureFixture[str]) -> None:
    out = ctl.ok("version")
    assert out.startswith("client  underlay ")
    assert f"store   {ctl.url}, answers" in out
    assert main(["version"]) == 0
    assert "none" in capsys.readouterr().out


def test_a_reader_that_goes_away_hears_no_complaint(ctl: Ctl) -> None:
    ctl.put(pool())
    argv = (
        f"{sys.executable} -c 'import sys; from ctl.main import main; sys.exit(main())' get ippools --store {ctl.url}"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {argv} | true"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""


# -- node status -----------------------------------------------------------------------------------------------------


def said(name: str = "node-1", **changes: Any) -> BGPNodeStatus:
    session = SessionStatus(
        peer="tor", address="10.0.0.1", as_number=65001, state="Established", since="2026-11-24T11:00:00Z",
        received=5, accepted=4, wanted=2, sent=1, graceful_restart=True,
    )  # fmt: skip
    down = SessionStatus(peer="tor6", address="fd00::1", as_number=65001, state="Connecting", reason="refused")
    status = BGPNodeStatusStatus(as_number=65101, router_id="10.0.0.5", sessions=(session, down), **changes)
    return BGPNodeStatus(metadata=Meta(name=name), status=status)


def test_sessions_of_a_node() -> None:
    assert headline(said()) == "node-1: AS 65101, router id 10.0.0.5, 1 of 2 sessions established"
    page = sessions_table(said(), now=NOW)
    up = dict(zip(page.titles, page.rows[0], strict=True))
    assert up == {
        "PEER": "tor", "ADDRESS": "10.0.0.1", "AS": "65001", "STATE": "Established", "SINCE": "1h0m", "RECEIVED": "5",
        "ACCEPTED": "4", "WANTED": "2", "SENT": "1", "GRACEFUL-RESTART": "yes", "REASON": "",
    }  # fmt: skip
    down = dict(zip(page.titles, page.rows[1], strict=True))
    assert (down["STATE"], down["GRACEFUL-RESTART"], down["REASON"]) == ("Connecting", "", "refused")


def test_conditions_that_hold_are_said_in_words() -> None:
    some = (
        Condition(
            type="NextHopNotOnLink", status="True", reason="tor", message="set next hop self", last_transition_time=NOW
        ),
        Condition(type="Fine", status="False"),
        Condition(type="Odd", status="Unknown"),
    )
    assert conditions(said(conditions=some)) == [
        f"NextHopNotOnLink: (tor) set next hop self [since {NOW}]",
        "Odd (not known for sure)",
    ]


def test_a_condition_that_every_block_of_the_node_repeats_is_said_once(ctl: Ctl) -> None:
    full = Condition(type="PoolExhausted", status="True", reason="NoFreeBlock", message="add a pool")
    other = block("10.244.1.0/26", "10-244-1-0-26", "node-2", conditions=(Condition(type="Theirs", status="True"),))
    blocks = (
        block(conditions=(full,)),
        block("10.244.2.0/26", "10-244-2-0-26", "node-1", conditions=(full,)),
        other,
    )
    ctl.put(pool(), Node(metadata=Meta(name="node-1")), *blocks, said())
    out = ctl.ok("node", "status", "node-1")
    assert out.splitlines()[-1] == "  PoolExhausted: (NoFreeBlock) add a pool"
    assert out.count("PoolExhausted") == 1
    assert "Theirs" not in out


def test_node_status_of_one_of_all_of_none(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl.put(Node(metadata=Meta(name="node-1")), Node(metadata=Meta(name="node-2")), said())
    out = ctl.ok("node", "status", "node-1")
    assert out.splitlines()[0].startswith("node-1: AS 65101")
    assert "Established" in out
    code, out, _ = ctl("node", "status", "--all-nodes")
    assert code == 1
    assert "node-2: its agent has not said anything yet" in out
    code, _, err = ctl("node", "status", "node-9")
    assert (code, "no node 'node-9'; there are node-1, node-2" in err) == (1, True)
    assert "node-1: AS" in ctl("node", "status")[1]  # this machine is no node: all of them
    monkeypatch.setattr("socket.gethostname", lambda: "node-1")
    assert ctl.ok("node", "status").startswith("node-1:")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    monkeypatch.setenv("UNDERLAY_NODE", "node-1")
    assert ctl.ok("node", "status").startswith("node-1:")


# -- ipam show -------------------------------------------------------------------------------------------------------


def test_pools_count_used_reserved_and_free_once() -> None:
    reservation = IPReservation(
        metadata=Meta(name="r"),
        # the /29 twice over, one of the other family, one outside, one that is larger than the second pool
        spec=IPReservationSpec(
            reserved_cidrs=("10.244.0.0/29", "10.244.0.4/30", "fd00::/64", "10.9.0.0/16", "10.245.0.0/16")
        ),
    )
    blocks = [block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.1", "10.244.0.9")]
    pools = [pool(), pool("small", "10.245.0.0/30")]
    page = pools_table(pool_uses(pools, blocks, [reservation]))
    first = dict(zip(page.titles, page.rows[0], strict=True))
    assert (first["BLOCKS"], first["ADDRESSES"], first["RESERVED"]) == ("1", "65536", "8")
    assert first["USED"] == "2 (<1%)"
    assert first["FREE"].split()[0] == str(65536 - 8 - 1)  # 10.244.0.1 is both held and reserved
    second = dict(zip(page.titles, page.rows[1], strict=True))
    assert (second["RESERVED"], second["FREE"]) == ("4", "0 (0%)")


def test_blocks_stand_in_order_of_address() -> None:
    later = block("10.244.10.0/26", "10-244-10-0-26", "node-2")
    silent = IPAMBlock(
        metadata=Meta(name="10-244-9-0-26"), spec=IPAMBlockSpec(cidr="10.244.9.0/26", pool="p", node="n")
    )
    page = blocks_table(block_uses([later, block(releasing=True), silent]))
    assert [row[0] for row in page.rows] == ["10.244.0.0/26", "10.244.9.0/26", "10.244.10.0/26"]
    assert page.rows[0][-1] == "releasing"
    assert "not said yet" in page.rows[1]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("10.244.0.1", ["held by pod default/p0 on node node-1 since", "container c0", "block 10.244.0.0/26"]),
        ("10.244.0.5", ["held by nobody", "rests", "block 10.244.0.0/26 of node node-1"]),
        ("10.244.0.60", ["reserved by ipreservation/r", "held by nobody: only a pod that asks", "block 10.244.0.0/26"]),
        ("10.244.7.7", ["in ippool/pods-v4", "in no block"]),
        ("192.0.2.1", ["outside every pool"]),
        ("10.0.0.5", ["an address of node node-1 itself", "outside every pool"]),
        ("fd00::1", ["outside every pool"]),
    ],
)
def test_one_address(address: str, words: list[str]) -> None:
    node = Node(
        metadata=Meta(name="node-1"),
        status=NodeStatus(
            addresses=(NodeAddress(type="InternalIP", address="10.0.0.5"), NodeAddress(type="Hostname", address="n1"))
        ),
    )
    reservation = IPReservation(metadata=Meta(name="r"), spec=IPReservationSpec(reserved_cidrs=("10.244.0.60",)))
    blocks = [block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.1")]
    use = address_use(ip_address(address), [pool()], blocks, [reservation], [node])
    text = "\n".join(describe(use, now=NOW))
    for word in words:
        assert word in text


def test_ipam_show(ctl: Ctl) -> None:
    code, out, err = ctl("ipam", "show")
    assert (code, out, "nothing found" in err) == (0, "", True)
    ctl.put(pool(), block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.1"))
    assert "10.244.0.0/26" not in ctl.ok("ipam", "show")
    out = ctl.ok("ipam", "show", "--show-blocks")
    assert "pods-v4" in out.splitlines()[1]
    assert out.splitlines()[-1].split()[:6] == ["10.244.0.0/26", "pods-v4", "node-1", "64", "1", "(2%)"]
    assert "default/p0" in ctl.ok("ipam", "show", "--ip", "10.244.0.1")
    assert "default/p0" in ctl.ok("ipam", "show", "--ip=10.244.0.1")
    assert ctl("ipam", "show", "--ip", "10.244.0.0/26")[0] == 2
    assert ctl("ipam", "show", "--ip", "10.244.0.1", "--show-blocks")[0] == 2
    ctl.ok("delete", "--force", "ippool", "pods-v4")
    code, _, err = ctl("ipam", "show")
    assert (code, "ippool/pods-v4" in err) == (0, True)


def test_an_address_of_a_block_that_is_not_well_says_so() -> None:
    marked = block("10.244.0.0/26", "10-244-0-0-26", "node-9", "10.244.0.1")
    meta = msgspec.structs.replace(
        marked.metadata,
        deletion_timestamp=NOW,
        annotations={
            ANNOTATION_RELEASE: "10.244.0.1",
            ANNOTATION_RELEASE_REFUSED: "10.244.0.2: its link is there; 10.244.0.3: x",
        },
    )
    marked = msgspec.structs.replace(marked, metadata=meta)

    def said(address: str, *blocks: IPAMBlock) -> list[str]:
        use = address_use(ip_address(address), [pool()], blocks, [], [Node(metadata=Meta(name="node-1"))])
        return describe(use, now="2026-11-24T13:00:00Z")

    lines = said("10.244.0.1", marked)
    assert lines[0] == "10.244.0.1 is held by pod default/p0 on node node-9 since 2026-11-24T12:00:00Z (1h0m)"
    assert any("asked to release 10.244.0.1, and has not done it yet" in line for line in lines)
    assert any("is of nobody: there is no node/node-9" in line for line in lines)
    assert any(f"marked for deletion since {NOW}: a node that needs it frees it" in line for line in lines)
    returned = msgspec.structs.replace(marked, spec=msgspec.structs.replace(marked.spec, node="node-1"))
    assert any(f"since {NOW}: nothing more is handed out of it" in line for line in said("10.244.0.1", returned))
    refused = "did not release 10.244.0.2 when it was last asked: its link is there"
    assert any(refused in line for line in said("10.244.0.2", marked))
    silent = IPAMBlock(metadata=Meta(name="b"), spec=IPAMBlockSpec(cidr="10.244.0.0/26", pool="p", node="node-1"))
    assert any("has never said what it handed out" in line for line in said("10.244.0.1", silent))
    assert not any("free" in line for line in said("10.244.0.1", silent))
    assert any("being given back by node-1" in line for line in said("10.244.0.1", block(releasing=True)))


def test_one_block_and_who_holds_its_addresses(ctl: Ctl) -> None:
    condition = Condition(type="PoolExhausted", status="True", reason="NoFreeBlock", message="add a pool")
    ctl.put(pool(), Node(metadata=Meta(name="node-1")))
    ctl.put(block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.9", "10.244.0.1", conditions=(condition,)))
    out = ctl.ok("ipam", "show", "--block", "10.244.0.0/26")
    lines = out.splitlines()
    assert lines[1].split()[0] == "10.244.0.0/26" and lines[1].split()[-1] == "PoolExhausted"
    assert "node-1: PoolExhausted: (NoFreeBlock) add a pool" in lines
    assert [line.split()[:5] for line in lines[-2:]] == [
        ["10.244.0.1", "default/p1", "c1", "eth0", "underlay"],
        ["10.244.0.9", "default/p0", "c0", "eth0", "underlay"],
    ]
    for cidr, words in (
        ("10.244.0.0/20", "there is no such block; there is 10.244.0.0/26 of node-1"),
        ("10.244.64.0/26", "there is no such block; no node has claimed any of its addresses"),
    ):
        assert (ctl("ipam", "show", "--block", cidr)[0], words in ctl("ipam", "show", "--block", cidr)[2]) == (1, True)
    code, _, err = ctl("ipam", "show", "--block", "10.244.0.1/26")
    assert (code, "no block's CIDR" in err) == (2, True)
    assert "--block shows a block" in ctl("ipam", "show", "--ip", "10.244.0.0/26")[2]


def test_one_pool_who_holds_its_addresses_and_what_is_to_be_done_until_it_is_gone(ctl: Ctl) -> None:
    ctl.put(pool("old", "10.245.0.0/16"), pool(disabled=True))
    ctl.put(block("10.244.0.64/26", "10-244-0-64-26", "node-2", "10.244.0.65"))
    ctl.put(block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.9", "10.244.0.1"))
    lines = ctl.ok("ipam", "show", "--pool", "pods-v4").splitlines()
    assert lines[1].split()[0] == "pods-v4"
    assert [line.split()[0] for line in lines[4:6]] == ["10.244.0.0/26", "10.244.0.64/26"]
    assert [line.split()[:3] for line in lines[8:11]] == [
        ["10.244.0.1", "default/p1", "node-1"],
        ["10.244.0.9", "default/p0", "node-1"],
        ["10.244.0.65", "default/p0", "node-2"],
    ]
    assert lines[-2] == "held of ippool/pods-v4: 3 addresses, by 2 pods on 2 nodes"
    assert "is disabled: a pod that is made anew" in lines[-1]
    said = json.loads(ctl.ok("ipam", "show", "--pool", "pods-v4", "-o", "json"))
    assert [h["address"] for h in said["holders"]] == ["10.244.0.1", "10.244.0.9", "10.244.0.65"]
    assert (len(said["pools"]), len(said["blocks"])) == (1, 2)
    assert "is in use: pods get addresses of it" in ctl.ok("ipam", "show", "--pool", "old")
    ctl.ok("delete", "--force", "ippool", "pods-v4")
    assert "no longer exists" in ctl.ok("ipam", "show", "--pool", "pods-v4")
    assert ctl("ipam", "show", "--pool", "none")[0] == 1
    assert ctl("ipam", "show", "--pool", "old", "--show-blocks")[0] == 2


def test_a_pool_of_which_nothing_is_held_goes_in_two_steps(ctl: Ctl) -> None:
    ctl.put(pool(disabled=True), block())
    assert "give its blocks back" in ctl.ok("ipam", "show", "--pool", "pods-v4")
    silent = block("10.244.0.64/26", "10-244-0-64-26")
    ctl.put(msgspec.structs.replace(silent, status=IPAMBlockStatus()))
    said = ctl.ok("ipam", "show", "--pool", "pods-v4")
    assert "what is held of 10.244.0.64/26 is not known" in said
    assert "no pod holds" not in said
    ctl.ok("delete", "block", "10-244-0-64-26")
    ctl.ok("delete", "block", "10-244-0-0-26")
    assert "underlayctl delete ippool pods-v4" in ctl.ok("ipam", "show", "--pool", "pods-v4")


def test_show_says_what_nodes_say_of_themselves_and_which_blocks_nobody_has(ctl: Ctl) -> None:
    condition = Condition(type="BlockLost", status="True", reason="NotOurs", message="delete the pods")
    ctl.put(pool(), pool("old", "10.245.0.0/16", disabled=True), Node(metadata=Meta(name="node-1")))
    ctl.put(block(conditions=(condition,)), block("10.244.1.0/26", "10-244-1-0-26", "node-9"))
    out = ctl.ok("ipam", "show", "--show-blocks")
    assert "disabled" in next(line for line in out.splitlines() if line.startswith("old"))
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("10.244")] == ["BlockLost", "no-node"]
    assert out.splitlines()[-1] == "node-1: BlockLost: (NotOurs) delete the pods"
    assert ctl.ok("ipam", "show").splitlines()[-1] == "node-1: BlockLost: (NotOurs) delete the pods"


def test_show_as_json_has_a_form_that_stays(ctl: Ctl) -> None:
    big = IPPool(metadata=Meta(name="v6"), spec=IPPoolSpec(cidr="fd00:10::/32"))
    ctl.put(pool(), big, Node(metadata=Meta(name="node-1")))
    ctl.put(block("10.244.0.0/26", "10-244-0-0-26", "node-1", "10.244.0.1"))

    def shown(*words: str) -> dict[str, Any]:
        found = json.loads(ctl.ok("ipam", "show", "-o", "json", *words))
        assert found.pop("version") == "underlay.network/ipam-show/v1"
        return dict(found)

    of_block = {
        "cidr": "10.244.0.0/26",
        "pool": "pods-v4",
        "node": "node-1",
        "addresses": 64,
        "used": 1,
        "free": 63,
        "state": [],
        "deleting": "",
        "releaseWanted": [],
    }
    holder = {
        "address": "10.244.0.1",
        "pod": "default/p0",
        "node": "node-1",
        "network": "underlay",
        "container": "c0",
        "interface": "eth0",
        "since": NOW,
    }
    assert shown().keys() == {"pools"}
    assert [(p["name"], p["addresses"]) for p in shown()["pools"]] == [("pods-v4", 65536), ("v6", 1 << 96)]
    assert shown("--show-blocks")["blocks"] == [of_block]
    assert shown("--block", "10.244.0.0/26") == {"block": of_block, "holders": [holder]}
    assert shown("--ip", "10.244.0.1") == {
        "address": {
            "address": "10.244.0.1",
            "state": "held",
            "holders": [holder],
            "reservations": [],
            "nodes": [],
            "pool": "pods-v4",
            "poolCidr": "10.244.0.0/16",
            "block": of_block,
            "releaseRefused": "",
        }
    }
    states = {a: shown("--ip", a)["address"]["state"] for a in ("10.244.0.2", "10.244.9.9", "192.0.2.1")}
    assert states == {"10.244.0.2": "free", "10.244.9.9": "unclaimed", "192.0.2.1": "outside"}


# -- ipam configure --------------------------------------------------------------------------------------------------


def test_configure_shows_changes_and_names_nodes_that_have_reached_the_limit(ctl: Ctl) -> None:
    for words in (("configure",), ("configure", "show"), ("show", "--show-configuration")):
        code, out, err = ctl("ipam", *words)
        assert [line.split() for line in out.splitlines()] == [
            ["PROPERTY", "VALUE"],
            ["maxBlocksPerHost", "0"],
            ["strictAffinity", "true"],
        ]
        assert (code, "these are the defaults" in err) == (0, True)
    ctl.put(pool())
    ctl.put(*(block(f"10.244.{i}.0/26", f"10-244-{i}-0-26", f"node-{i % 2}") for i in range(3)))
    single = block("10.244.9.1/32", "10-244-9-1-32", "node-1")
    ctl.put(pool("fixed", "10.99.0.0/24", block_size=32))
    spec = IPAMBlockSpec(cidr="10.99.0.1/32", pool="fixed", node="node-1")
    ctl.put(msgspec.structs.replace(single, metadata=Meta(name="10-99-0-1-32"), spec=spec))
    assert ctl("ipam", "configure", "--max-blocks-per-node", "2") == (
        0,
        "ipamconfiguration/default created\n",
        "note: nodes with that many blocks: node-0 (2): they keep what they have, and claim no more\n",
    )
    assert ctl.ok("ipam", "configure", "--max-blocks-per-host=9") == "ipamconfiguration/default configured\n"
    assert ctl.ok("ipam", "configure", "--strictaffinity=true") == "ipamconfiguration/default unchanged\n"
    assert "maxBlocksPerHost  9" in ctl.ok("ipam", "configure", "show")
    assert json.loads(ctl.ok("ipam", "show", "--show-configuration", "-o", "json"))["maxBlocksPerHost"] == 9
    assert ctl.ok("ipam", "configure", "--max-blocks-per-node", "0") == "ipamconfiguration/default configured\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--strictaffinity", "false"), 1, "never borrows"),
        (("--max-blocks-per-node", "-1"), 1, "spec.maxBlocksPerHost: -1: write 0..1000000"),
        (("--max-blocks-per-node", "x"), 2, "not a valid integer"),
        (("show", "--max-blocks-per-node", "1"), 2, "only shows"),
        (("shaw",), 2, "shaw"),
    ],
)
def test_configure_refuses_and_changes_nothing(ctl: Ctl, words: tuple[str, ...], code: int, said: str) -> None:
    got, out, err = ctl("ipam", "configure", *words)
    assert (got, out, said in err) == (code, "", True), err
    assert ctl.all(IPAMConfiguration) == ()


def test_calicos_file_is_taken_but_for_borrowing(ctl: Ctl) -> None:
    text = """
apiVersion: projectcalico.org/v3
kind: IPAMConfiguration
metadata: {name: default}
spec: {strictAffinity: true, maxBlocksPerHost: 4, autoAllocateBlocks: true, kubeVirtVMAddressPersistence: Disabled}
"""
    code, out, err = ctl("apply", "-f", ctl.file(text))
    assert (code, out, err.count("note: ")) == (0, "ipamconfiguration/default created\n", 2)
    wrong = text.replace("true", "false").replace("Disabled", "Enabled")
    code, out, err = ctl("apply", "-f", ctl.file(wrong))
    assert (code, out) == (1, "")
    for field in ("strictAffinity", "autoAllocateBlocks", "kubeVirtVMAddressPersistence"):
        assert f"spec.{field}" in err


# -- start-up --------------------------------------------------------------------------------------------------------


def test_a_bare_get_loads_nothing_that_it_does_not_need(ctl: Ctl) -> None:
    """Its time is a figure of the bench (ctl.get_s); what makes it quick is what it does not import."""
    ctl.put(pool())
    program = (
        "import sys\nfrom ctl.main import main\n"
        f"code = main(['--store', {ctl.url!r}, 'get', 'ippools'])\n"
        "heavy = {'pyroute2', 'yaml', 'exabgp', 'agent', 'cni', 'lab'} & set(sys.modules)\n"
        "sys.exit(f'{code} {sorted(heavy)}' if heavy or code else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# -- namespaces ------------------------------------------------------------------------------------------------------

SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web%s}
addressType: IPv4
endpoints: [{addresses: [%s]}]
"""


def test_objects_of_a_namespace_are_written_shown_and_deleted_with_it(ctl: Ctl) -> None:
    file = ctl.file(SLICE % ("", "10.0.0.1"))
    assert ctl.ok("apply", "-f", file) == "endpointslice/default/web created\n"
    assert ctl.ok("apply", "-f", file, "-n", "shop") == "endpointslice/shop/web created\n"
    changed = ctl.file(SLICE % (", namespace: shop", "10.0.0.2"), "b.yaml")
    assert ctl.ok("apply", "-f", changed) == "endpointslice/shop/web configured\n"
    assert ctl.ok("replace", "-f", changed, "--namespace", "shop") == "endpointslice/shop/web unchanged\n"
    (here, there) = ctl.all(EndpointSlice)
    assert [e.endpoints[0].addresses for e in (here, there)] == [("10.0.0.1",), ("10.0.0.2",)]
    assert ctl.ok("get", "endpointslices").split()[:8] == ["NAME", "SERVICE", "READY", "ALL", "AGE", "web", "1", "1"]
    assert ctl.ok("get", "endpointslice,namespaces", "-n", "shop", "-o", "name") == "endpointslice/shop/web\n"
    titles, *rows = [line.split() for line in ctl.ok("get", "endpointslices", "-A").splitlines()]
    assert titles[:2] == ["NAMESPACE", "NAME"]
    assert [row[:2] for row in rows] == [["default", "web"], ["shop", "web"]]
    assert ctl.ok("get", "endpointslice", "web", "-n", "shop", "-o", "yaml").count("10.0.0.2") == 1
    assert ctl("get", "endpointslice", "api", "-n", "shop")[::2] == (
        1,
        "underlayctl: endpointslice/shop/api: not found\n",
    )
    assert ctl("get", "pods,ns", "-n", "shop")[2] == (
        "nothing found: there is no Pod in namespace shop and no Namespace\n"
    )
    assert ctl("get", "pods", "-A")[2] == "nothing found: there is no Pod\n"
    assert ctl.ok("delete", "endpointslice", "web", "-n", "shop") == "endpointslice/shop/web deleted\n"
    assert ctl.all(EndpointSlice) == (here,)
    assert ctl.ok("delete", "-f", file) == "endpointslice/default/web deleted\n"


def test_a_namespace_that_cannot_be_meant_is_refused(ctl: Ctl) -> None:
    code, _, err = ctl("apply", "-n", "bank", "-f", ctl.file(SLICE % (", namespace: shop", "10.0.0.2")))
    assert (code, "metadata.namespace: 'shop': write bank, or leave out --namespace" in err) == (1, True)
    assert ctl.all(EndpointSlice) == ()
    assert ctl("get", "pods", "-A", "-n", "shop")[0] == 2
    assert ctl("get", "pods", "web", "-A")[0] == 2
    assert ctl("get", "pods", "web", "-n", "a/b")[0] == 1


def test_no_value_of_a_secret_is_shown(ctl: Ctl) -> None:
    kept = '{"data":{"password":"aHVudGVyMg=="}}'
    secret = Secret(
        metadata=Meta(name="tor", namespace="shop", annotations={"kubectl.kubernetes.io/last": kept}),
        data={"password": b"hunter2"},
    )
    ctl.put(secret)
    shown = [ctl.ok("get", "secret", "tor", "-n", "shop", "-o", form) for form in ("table", "wide", "yaml", "json")]
    assert all("hunter2" not in text and "aHVudGVyMg==" not in text for text in shown)
    assert "password: (not shown)" in shown[2]
    code, _, err = ctl("apply", "-f", ctl.file(shown[2]))
    assert (code, "data[password]: '(not shown)'" in err) == (1, True)
    code, out, err = ctl("get", "secrets", "-n", "shop")
    assert (code, out, "read one by one" in err) == (1, "", True)
    for field in ("data: {password: hunter2}", "data: {password: [hunter2]}", "stringData: {password: hunter2}"):
        file = ctl.file(f"apiVersion: v1\nkind: Secret\nmetadata: {{name: tor, namespace: shop}}\n{field}\n")
        code, out, err = ctl("apply", "-f", file)
        assert (code, out, "password" in err or "stringData" in err, "hunter2" in err) == (1, "", True, False)
    assert ctl.on_store(lambda store: store.get(Secret, "shop/tor")).data == {"password": b"hunter2"}
