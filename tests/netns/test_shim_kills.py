"""The shim, killed at each of its system calls: before it and after it. What follows is what a runtime does then."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cni import message
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import Plugin

_TRACEME, _SYSCALL = 0, 24
_libc = ctypes.CDLL(None, use_errno=True)


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def killed_at(stop: int, shim: Path, environment: Mapping[str, str], text: bytes) -> bool:
    """Runs the shim to its stop of that number (each system call has two: begin and end) and kills it there. False if
    it ended before."""
    read, write = os.pipe()
    os.write(write, text)
    os.close(write)
    process = subprocess.Popen(
        [shim],
        stdin=read,
        stdout=subprocess.DEVNULL,
        env=dict(environment),
        preexec_fn=lambda: _ptrace(_TRACEME, 0),
    )
    os.close(read)
    try:
        os.waitpid(process.pid, 0)  # stopped by exec
        for _ in range(stop + 1):
            _ptrace(_SYSCALL, process.pid)
            _, status = os.waitpid(process.pid, 0)
            if os.WIFEXITED(status):
                process.returncode = os.WEXITSTATUS(status)
                return False
            assert os.WIFSTOPPED(status), status
        return True
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory, shim_c: Path) -> Iterator[Plugin]:
    folder = tmp_path_factory.mktemp("node")
    net = Net(folder)
    try:
        plugin = Plugin(net, folder, shim_c)
        net.add("pod-1")
        plugin.start()
        yield plugin
    finally:
        net.close()


def test_at_every_call_of_an_add(plugin: Plugin) -> None:
    """Killed, then DEL, as containerd does; or again, as a person does: nothing is in the way of either."""
    stop = 0
    while killed_at(
        stop, plugin.shim, plugin.environment("ADD", f"a{stop}", "pod-1"), json.dumps(plugin.conf()).encode()
    ):
        if stop % 2:
            again = plugin.call("ADD", f"a{stop}", "pod-1")
            assert again.code == 0, again.text
            assert len(plugin.routed()) == 2
        assert plugin.call("DEL", f"a{stop}", "pod-1").code == 0
        stop += 1
    assert stop > 20
    plugin.call("DEL", f"a{stop}", "pod-1")
    eventually(plugin.nothing_left)


def test_at_every_call_of_a_del(plugin: Plugin) -> None:
    stop = 0
    while True:
        added = plugin.call("ADD", f"d{stop}", "pod-1")
        assert added.code == 0, added.text
        if not killed_at(
            stop, plugin.shim, plugin.environment("DEL", f"d{stop}", "pod-1"), json.dumps(plugin.conf()).encode()
        ):
            break
        assert plugin.call("DEL", f"d{stop}", "").code == 0
        assert not plugin.routes()
        stop += 1
    assert stop > 20
    eventually(plugin.nothing_left)


def test_at_every_call_of_a_del_that_is_queued(tmp_path: Path, shim_c: Path) -> None:
    """There is a whole request or none, whatever else was left."""
    text, stop, whole = b'{"cniVersion": "1.0.0", "name": "underlay"}', 0, 0
    while True:
        run = tmp_path / str(stop)
        env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "UNDERLAY_RUN": str(run)}
        killed = killed_at(stop, shim_c, env, text)
        found = list(run.glob("queue/*.del"))
        for path in found:
            assert message.decode(path.read_bytes()).config == text
        whole += len(found)
        if not killed:
            assert len(found) == 1
            break
        stop += 1
    assert stop > 20
    assert whole > 3
