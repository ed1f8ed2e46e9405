"""docs/conformance.md against the tests that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_network.py", "test_pods.py", "test_services.py")
ROW = re.compile(r"^\| (?P<behaviour>[^|]+) \| (?P<upstream>[^|]+) \| `(?P<test>test_\w+)` \|$", re.MULTILINE)


def named() -> dict[str, str]:
    """The upstream tests that each test of ours names: the first paragraph of its docstring."""
    found = {}
    for file in FILES:
        for node in ast.parse((ROOT / "tests/cluster" / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return found


def test_every_behaviour_has_its_row_and_every_row_its_test() -> None:
    rows = {row["test"]: row["upstream"] for row in ROW.finditer((ROOT / "docs/conformance.md").read_text())}
    assert rows == named()
    assert all(rows.values())
