from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shim_c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shim.c, built as the Makefile does."""
    program = tmp_path_factory.mktemp("shim") / "underlay"
    compiler = shutil.which("musl-gcc") or "gcc"
    flags = ["-static", "-Os", "-s", "-std=c11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", program, ROOT / "cni/shim/shim.c"], check=True)
    return program


@pytest.fixture(scope="session")
def shim_py() -> Path:
    return ROOT / "cni/shim/shim.py"
