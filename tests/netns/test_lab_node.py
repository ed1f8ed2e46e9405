"""The first process of a cluster's node: a machine of its own, in folders of the lab's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cluster import config
from tests.conftest import eventually


@pytest.fixture
def below_run(tmp_path: Path) -> Iterator[Path]:
    """Where a lab of root's is, if nobody says otherwise."""
    folder = Path("/run") / f"underlay-lab-{tmp_path.name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_node_sees_its_lab_though_its_own_run_is_empty(below_run: Path) -> None:
    home = below_run / "node-1"
    for part in (*config.FOLDERS.values(), "proc"):
        (home / part).mkdir(parents=True)
    for path, text in config.files(home, "b0").items():
        path.write_text(text)
    (home / "kubelet.json").write_text("{}")
    machine = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
    with subprocess.Popen([*machine, config.holder(home, "node-1", home / "up")], stderr=subprocess.PIPE) as holder:
        try:
            eventually(lambda: (home / "up").exists() or holder.poll() is not None)
            assert holder.poll() is None, holder.stderr.read() if holder.stderr else ""
            (pid,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
            inside = ["nsenter", f"--target={pid}", "--mount", "--root", "sh", "-c"]
            words = f"ls /run; cat {home}/kubelet.json; touch /etc/cni/net.d/here"
            said = subprocess.run([*inside, words], capture_output=True, text=True, check=True).stdout
            # mount(8) keeps a folder there.
            assert set(said.split()) - {"mount"} == {"containerd", "netns", below_run.name, "{}"}
            assert (home / "net.d" / "here").exists()
        finally:
            holder.kill()
