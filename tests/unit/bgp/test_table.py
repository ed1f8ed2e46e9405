from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bgp import table
from agent.bgp.driver import _unsendable
from agent.bgp.model import Announcement

PEER, HOP = "10.0.1.2", "10.0.1.1"
ROW = [PEER, "10.244.0.0/26", HOP, None, [], []]


def test_attributes_in_exabgps_words() -> None:
    given = table.parse(
        3,
        [
            ROW,
            ["fd00::2", "fd00:10::/122", "fd00::1", 0, ["65100:2", "65100:1", "graceful-shutdown"], ["1:2:3"]],
            [PEER, "10.244.0.64/26", HOP, 7, ["no-export"], []],
        ],
    )
    assert given.generation == 3
    assert given.routes == {
        PEER: {
            "10.244.0.0/26": "next-hop 10.0.1.1",
            "10.244.0.64/26": "next-hop 10.0.1.1 med 7 community [ no-export ]",
        },
        "fd00::2": {
            "fd00:10::/122": "next-hop fd00::1 med 0 community [ 65100:1 65100:2 65535:0 ] large-community [ 1:2:3 ]"
        },
    }


def test_equal_announcements_are_equal_bytes() -> None:
    one = table.parse(1, [[*ROW[:4], ["2:2", "1:1"], []]])
    two = table.parse(1, [[*ROW[:4], ["1:1", "2:2", "1:1"], []]])
    assert one == two


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert table.load(path) is None
    kept = table.parse(5, [ROW])._replace(retired=((PEER, "10.244.9.0/26"),))
    table.save(path, kept)
    assert table.load(path) == kept
    assert path.stat().st_mode & 0o777 == 0o600


@given(st.data())
def test_no_damage_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("table") / "table.json"
    kept = table.parse(5, [ROW, [PEER, "10.244.0.64/26", HOP, 7, ["1:1"], []]])
    table.save(path, kept)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    try:
        found = table.load(path)
    except table.TableError as e:
        assert str(path) in str(e)
    else:
        assert found == kept, "only what means the same may pass"


def test_checksum_does_not_let_a_command_through(tmp_path: Path) -> None:
    """A right checksum over a wrong content: written by something that is not this relay."""
    path = tmp_path / "table.json"
    table.save(path, table.Table(1, {PEER: {"10.0.0.0/8": "next-hop self; shutdown"}}))
    with pytest.raises(table.TableError):
        table.load(path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"version":1}', '{"version":1,"checksum":"","table":{}}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(table.TableError):
        table.load(path)


def test_too_many_routes() -> None:
    with pytest.raises(table.TableError, match="limit"):
        table.parse(1, [ROW] * (table.MAX_ROUTES + 1))


@given(st.lists(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())), max_size=7))
def test_no_row_raises_anything_else(row: list[object]) -> None:
    with pytest.raises(table.TableError):
        table.parse(1, [row])


@pytest.mark.parametrize(
    ("prefix", "hop", "word"),
    [
        ("10.244.0.0/26", "fd00::1", "family"),
        ("fd00::/64", "10.0.0.1", "family"),
        ("10.244.0.1/26", HOP, "host bits"),
        ("fd00:0::/64", "fd00::1", "canonical"),
        ("10.244.0.0/26", "self", "self"),
    ],
)
def test_what_the_driver_leaves_out(prefix: str, hop: str, word: str) -> None:
    assert word in _unsendable(Announcement(peer=PEER, prefix=prefix, next_hop=hop))


def test_json_is_one_line(tmp_path: Path) -> None:
    table.save(tmp_path / "t.json", table.parse(1, [ROW]))
    assert len((tmp_path / "t.json").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "t.json").read_text())["version"] == table.VERSION


def test_an_as_path_is_said_as_it_is() -> None:
    kept = table.parse(1, [[*ROW, [65100, 65009, 4200000000]]])
    assert "as-path [ 65100 65009 4200000000 ]" in kept.routes[PEER][ROW[1]]


@pytest.mark.parametrize("path", [[], "65100", [0], [2**32], ["65100"], [True], None])
def test_an_as_path_that_is_none_is_refused(path: object) -> None:
    with pytest.raises(table.TableError, match="AS_PATH"):
        table.parse(1, [[*ROW, path]])
