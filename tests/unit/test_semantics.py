"""What the contract suite cannot provoke: objects that are in a store though today's rules would refuse them."""

from __future__ import annotations

import msgspec
import pytest

from store import semantics
from store.errors import Invalid
from store.model import BGPPeer, BGPPeerSpec, IPAMBlock, IPAMBlockSpec, IPAMBlockStatus, Meta


def old_block() -> IPAMBlock:
    """As an older release might have let in: named otherwise, and held by a finalizer."""
    return IPAMBlock(
        metadata=Meta(
            name="old-name",
            uid="u",
            resource_version="7",
            generation=1,
            finalizers=("underlay.network/owner",),
            deletion_timestamp="2026-01-01T00:00:00Z",
        ),
        spec=IPAMBlockSpec(cidr="10.0.0.0/26", pool="pool", node="node-1"),
    )


def test_an_object_that_was_wrong_before_can_still_be_mirrored_and_released() -> None:
    block = old_block()
    change = semantics.update_status(msgspec.structs.replace(block, status=IPAMBlockStatus(used=1)), block, version="8")
    assert change is not None
    assert change.object.status.used == 1
    free = msgspec.structs.replace(block, metadata=msgspec.structs.replace(block.metadata, finalizers=()))
    change = semantics.update(free, block, (), version="8")
    assert change is not None
    assert change.type == "deleted"


def test_but_nothing_new_may_be_wrong_with_it() -> None:
    meta = Meta(name="peer", uid="u", resource_version="7")
    peer = BGPPeer(metadata=meta, spec=BGPPeerSpec(peer_ip="10.0.0.1", as_number=0, hold_time=9))
    worse = msgspec.structs.replace(peer, spec=msgspec.structs.replace(peer.spec, hold_time=1))
    with pytest.raises(Invalid) as caught:
        semantics.update(worse, peer, (), version="8")
    assert [p.field for p in caught.value.problems] == ["spec.holdTime"]


def test_selectable_values_are_found_by_their_wire_path() -> None:
    values = semantics.selectable(old_block())
    assert values == {"metadata.name": "old-name", "spec.node": "node-1", "spec.pool": "pool", "spec.within": ""}


def test_an_object_that_begins_or_stops_to_match_is_added_or_deleted() -> None:
    block = old_block()
    here, there = {"spec.node": "node-1"}, {"spec.node": "node-2"}
    moved = semantics.Change("modified", block, {"metadata.name": "old-name", "spec.node": "node-2"})
    for where, expected in ((here, "added"), (there, "deleted"), (None, "modified")):
        event = semantics.as_event(moved, where)
        assert event is not None
        assert (event.type, event.version) == (expected, "7")
    assert semantics.as_event(moved, {"metadata.name": "other"}) is None
