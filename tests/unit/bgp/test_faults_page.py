"""docs/exabgp.md: every fault has a test that shows it, with what we do about it and without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/exabgp.md").read_text()
ROWS = [re.split(r" \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| ") and "::" in line]
FAULTS = [row for row in ROWS if len(row) == 4]
TESTS = [re.findall(r"`([\w/.]+)::(\w+)`", row[-1]) for row in ROWS]
NUMBERED = re.compile(r"^def (test_fault_(\d+)_\w+)\(", re.MULTILINE)


def decorators(path: str, test: str) -> str | None:
    """What stands above the test; None if there is no such test."""
    found = re.search(rf"((?:^@.*\n)*)^def {test}\(", (ROOT / path).read_text(), re.MULTILINE)
    return None if found is None else found[1]


@pytest.mark.parametrize("named", TESTS, ids=lambda named: named[0][1])
def test_every_test_named_is_there(named: list[tuple[str, str]]) -> None:
    assert len(named) == 1
    assert decorators(*named[0]) is not None


def test_every_number_has_a_row_and_every_test_of_a_fault() -> None:
    assert {int(row[0]) for row in FAULTS if row[0].isdigit()} == set(range(1, 17))
    here = {
        name: number
        for file in (ROOT / "tests/bgp").glob("*.py")
        for name, number in NUMBERED.findall(file.read_text())
    }
    said = {re.findall(r"::(\w+)`", row[3])[0]: row[0] for row in FAULTS if row[0].isdigit()}
    assert said == here


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[1][:40])
def test_every_fault_is_shown_with_and_without_what_we_do(row: list[str]) -> None:
    ((path, test),) = re.findall(r"`([\w/.]+)::(\w+)`", row[3])
    above = decorators(path, test) or ""
    assert "@handled" in above or '"not"]' in above or '"SIGHUP"' in above


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row[1][:40])
def test_every_module_named_is_there(row: list[str]) -> None:
    modules = re.findall(r"`([^`]+)`", row[2].rpartition("(")[2])
    assert modules
    for module in modules:
        assert (ROOT / (module if "/" in module else f"agent/bgp/{module}.py")).is_file(), module
