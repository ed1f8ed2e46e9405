"""What underlay-cni is told by flags and environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from cni.daemon import StartError, parse
from cni.endpoint import Address

FLAGS = ["--node", "node-1", "--store", "memory:"]


@pytest.fixture
def boot(tmp_path: Path) -> list[str]:
    (tmp_path / "boot").write_text("b1\n")
    return [*FLAGS, "--boot-id", str(tmp_path / "boot")]


def test_a_limit_of_blocks_comes_from_flag_or_environment_and_the_flag_wins(boot: list[str]) -> None:
    assert parse(boot, {}).max_blocks is None, "the cluster's holds"
    assert parse(boot, {"UNDERLAY_MAX_BLOCKS": ""}).max_blocks is None
    assert parse(boot, {"UNDERLAY_MAX_BLOCKS": "0"}).max_blocks == 0, "no limit, whatever the cluster's is"
    assert parse(boot, {"UNDERLAY_MAX_BLOCKS": "3"}).max_blocks == 3
    assert parse([*boot, "--max-blocks", "5"], {"UNDERLAY_MAX_BLOCKS": "3"}).max_blocks == 5


@pytest.mark.parametrize("text", ["-1", "x", " ", "2.5"])
def test_a_limit_that_is_no_number_is_refused(boot: list[str], text: str) -> None:
    with pytest.raises(StartError, match="max-blocks"):
        parse([*boot, f"--max-blocks={text}"], {})


def test_metrics_are_told_nowhere_unless_an_address_is_given(boot: list[str]) -> None:
    assert parse(boot, {}).metrics is None
    assert parse(boot, {"UNDERLAY_METRICS": "[::1]:9464"}).metrics == Address(host="::1", port=9464)
    assert parse([*boot, "--metrics", "/run/m.sock"], {"UNDERLAY_METRICS": "[::1]:1"}).metrics == Address(
        path="/run/m.sock"
    )
    with pytest.raises(StartError, match=r"--metrics 9464: .*127\.0\.0\.1:9464"):
        parse([*boot, "--metrics", "9464"], {})


def test_the_source_check_is_on_unless_it_is_switched_off(boot: list[str]) -> None:
    assert parse(boot, {}).source_check
    assert parse(boot, {"UNDERLAY_SOURCE_CHECK": ""}).source_check
    assert not parse(boot, {"UNDERLAY_SOURCE_CHECK": "off"}).source_check
    assert parse([*boot, "--source-check", "ON"], {"UNDERLAY_SOURCE_CHECK": "off"}).source_check
    with pytest.raises(StartError, match="--source-check no: write on or off"):
        parse([*boot, "--source-check", "no"], {})
