"""Most of what a command costs is importing: people wait for it, and the tests run them by the hundred."""

import subprocess
import sys
from pathlib import Path

import pytest


def loaded(code: str, *arguments: str) -> set[str]:
    """Names of modules, and of packages with any module of theirs, that a fresh interpreter has after this."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint()\nprint(*sys.modules)", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    names = done.stdout.splitlines()[-1].split()
    return set(names) | {name.partition(".")[0] for name in names}


RUN = "import contextlib, sys\nfrom {0} import main\nwith contextlib.suppress(SystemExit): main(sys.argv[1:])"


@pytest.mark.parametrize("command", ["exec node-1 true", "status", "pod add pod-1-4", "link cut node-1 tor-1"])
def test_what_only_asks_a_lab_loads_nothing_that_builds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("UNDERLAY_LAB", str(tmp_path))  # nobody answers there
    names = loaded(RUN.format("lab.cli"), *command.split())
    assert {"lab.client", "lab.wire"} <= names
    assert not names & {"asyncio", "ssl", "logging", "json", "ctypes", "hashlib", "tarfile", "yaml", "cni", "store"}
    assert {name for name in names if name.startswith("lab.")} <= {
        *("lab.cli", "lab.client", "lab.drilled", "lab.errors", "lab.folder", "lab.matrix", "lab.oob", "lab.picture"),
        *("lab.topology", "lab.wire"),
    }


def test_help_of_underlayctl_loads_no_store_and_no_loop() -> None:
    names = loaded(RUN.format("ctl.main"), "get", "--help")
    assert "ctl.main" in names
    assert not names & {"asyncio", "ssl", "yaml", "sqlite3", "aiohttp", "store.model", "ctl.show"}


def test_the_store_of_a_cluster_is_loaded_without_yaml() -> None:
    assert "yaml" not in loaded("import store.open, store.kube")
