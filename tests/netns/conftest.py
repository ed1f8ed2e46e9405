from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shim_py() -> Path:
    return ROOT / "cni/shim/shim.py"
