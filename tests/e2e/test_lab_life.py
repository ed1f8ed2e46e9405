"""How a lab begins and ends: in its own folder, without root, and with nothing left behind, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import client
from lab import folder as folders
from lab.folder import Folder
from lab.topology import Topology, TopologyError
from tests.conftest import eventually
from tests.e2e.conftest import LAST_LINE, Lab, processes

SMALL = ("up", "--racks", "1", "--nodes", "2", "--pods", "1")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/", "PYTHONDONTWRITEBYTECODE=1")


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like tmp_path, which is too long for the sockets in it."""
    return tmp_path_factory.mktemp("l")


@pytest.fixture
def small(short: Path) -> Iterator[Lab]:
    lab = Lab(short / "lab")
    try:
        yield lab
    finally:
        lab.command("down", check=False)


def good(said: str) -> bool:
    last = LAST_LINE.match(said.splitlines()[-1])
    return bool(last and last["answered"] == last["paths"] and last["lost"] == "0" and last["paths"] != "0")


def test_down_leaves_nothing(small: Lab) -> None:
    assert good(small.command(*SMALL).stdout)
    assert len(processes(small.folder)) > 8
    assert "is gone" in small.command("down").stdout
    eventually(lambda: not processes(small.folder))
    assert not small.folder.path.exists()
    assert "No lab" in small.command("down").stdout
    for words in (("status",), ("matrix",), ("exec", "node-1", "true"), ("pod", "add", "pod-1-9")):
        done = small.command(*words, check=False)
        assert done.returncode == 1
        assert "no lab is up there" in done.stderr


@pytest.mark.parametrize("victim", ["supervisor", "init", "unshare"])
def test_kill_9_leaves_nothing_and_up_works_again(small: Lab, victim: str) -> None:
    small.command(*SMALL)
    pid = client.peer(small.folder)
    for _ in range(("supervisor", "init", "unshare").index(victim)):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes(small.folder))
    assert small.folder.path.exists()
    if victim == "supervisor":
        assert good(small.command(*SMALL).stdout)
    small.command("down")
    assert not small.folder.path.exists()


def test_two_labs_side_by_side(small: Lab) -> None:
    other = Lab(small.folder.path.with_name("other"))
    try:
        small.command(*SMALL)
        assert good(other.command(*SMALL).stdout)
        small.command("down")
        assert good(other.command("matrix").stdout)
    finally:
        other.command("down")


def test_a_folder_with_other_things_is_refused_and_kept(small: Lab) -> None:
    small.folder.path.mkdir()
    (small.folder.path / "thesis.tex").write_text("years")
    for words in (SMALL, ("down",)):
        done = small.command(*words, check=False)
        assert done.returncode == 1
        assert "--dir" in done.stderr
    assert (small.folder.path / "thesis.tex").read_text() == "years"
    shutil.rmtree(small.folder.path)


@pytest.mark.parametrize(("name", "why"), [("x" * 80, "at most 67 bytes"), ("a b", "a path with a space")])
def test_a_folder_that_cannot_hold_sockets_is_refused(short: Path, name: str, why: str) -> None:
    with pytest.raises(folders.LabError, match=f"{why}.*--dir"):
        folders.claim(Folder(short / name))
    assert not (short / name).exists()


def test_a_folder_has_one_owner_at_a_time(short: Path) -> None:
    folder = Folder(short / "lab")
    lock = folders.claim(folder)
    assert lock is not None
    assert folders.claim(folder) is None
    with pytest.raises(folders.LabError, match="did not end"):
        folders.remove(folder, limit=0.1)
    os.close(lock)
    assert folders.remove(folder)
    assert not folders.remove(folder)


def test_a_size_out_of_range_starts_nothing(small: Lab) -> None:
    done = small.command("up", "--racks", "0", check=False)
    assert done.returncode == 1
    assert "racks: 0: from 1 to" in done.stderr
    assert not small.folder.path.exists()
    with pytest.raises(TopologyError):
        Topology.build(racks=0)


def usable(prefix: tuple[str, ...]) -> bool:
    """Whether the prefix works on this machine, finds Python, and may make namespaces."""
    here = [*prefix, "unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]
    return (
        subprocess.run([*here, sys.executable, "-c", "import lab.cli"], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.parametrize("prefix", [NOBODY, ("unshare", "--user", "--map-root-user")], ids=["nobody", "namespace"])
def test_without_root(prefix: tuple[str, ...]) -> None:
    if not usable(prefix):
        pytest.skip(f"{prefix[0]}: not possible on this machine, or Python is out of that user's reach")
    parent = Path(tempfile.mkdtemp(prefix="ul-e2e-"))
    parent.chmod(0o777)
    lab = Lab(parent / "lab", prefix)
    try:
        assert good(lab.command(*SMALL).stdout)
        lab.command("kill", "node-1", "exabgp", "--restart-after", "0.1")
        lab.restarted("node-1", "exabgp", 0)
        lab.whole()
        # Entered from outside: by its owner, or by root.
        inside = Lab(lab.folder.path, prefix if prefix is NOBODY else ())
        assert inside.inside("pod-1-1", "id", "-u").strip() == "0"
        assert inside.inside("node-2", "sh", "-c", "ip -o link show tor-1").strip()
        lab.command("down")
        eventually(lambda: not processes(lab.folder))
        assert not lab.folder.path.exists()
    finally:
        lab.command("down", check=False)
        shutil.rmtree(parent)
