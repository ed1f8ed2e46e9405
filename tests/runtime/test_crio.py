"""CRI-O's habits, played over our plugin as its libcni would: VERSION when it loads a list, GC once at its start and a
CHECK of each pod that it finds again, STATUS polled, a CHECK right after every ADD."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cni import install
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import NODE, Plugin
from tests.runtime.conftest import REFERENCE

CHAIN = ({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}},)
GC_LIMIT = 30


class CriO:
    """One life of it after the other; what it knows of its pods it keeps."""

    def __init__(self, plugin: Plugin, conflist: dict[str, Any]) -> None:
        self.plugin, self.list = plugin, conflist
        self.pods: dict[str, dict[str, Any]] = {}  # container id, which is its pod's name, too: the result

    def start(self) -> None:
        for each in self.list["plugins"]:
            told = self._run("VERSION", each, {"cniVersion": self.list["cniVersion"]})
            assert self.list["cniVersion"] in told["supportedVersions"]
        if self.list["cniVersion"] == "1.1.0":
            valid = [{"containerID": pod, "ifname": "eth0"} for pod in self.pods] or None
            for each in self.list["plugins"]:
                self._run("GC", each, {"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid})
        for pod in self.pods:
            self.check(pod)

    def status(self) -> None:
        self._run("STATUS", self.list["plugins"][0], {})

    def add(self, pods: list[str]) -> None:
        """All at once; then, as soon as one has its result, its CHECK."""
        first, *behind = self.list["plugins"]
        under_way = {pod: self._begin("ADD", first, {}, pod) for pod in pods}
        for pod, started in under_way.items():
            result = self._end(started)
            for each in behind:
                result = self._run("ADD", each, {"prevResult": result}, pod)
            self.pods[pod] = result
            self.check(pod)

    def check(self, pod: str) -> None:
        for each in self.list["plugins"]:
            self._run("CHECK", each, {"prevResult": self.pods[pod]}, pod)

    def remove(self, pod: str) -> None:
        for each in self.list["plugins"][::-1]:
            self._run("DEL", each, {"prevResult": self.pods[pod]}, pod)
        del self.pods[pod]

    def _run(self, verb: str, plugin: dict[str, Any], more: dict[str, Any], pod: str = "") -> dict[str, Any]:
        return self._end(self._begin(verb, plugin, more, pod))

    def _begin(self, verb: str, plugin: dict[str, Any], more: dict[str, Any], pod: str) -> subprocess.Popen[bytes]:
        configuration = {"name": self.list["name"], "cniVersion": self.list["cniVersion"], **plugin, **more}
        program = self.plugin.shim if plugin["type"] == install.PLUGIN else REFERENCE / plugin["type"]
        arguments = ["IgnoreUnknown=1", f"K8S_POD_NAME={pod}", "K8S_POD_NAMESPACE=default", "K8S_POD_UID=u"]
        random.shuffle(arguments)
        env = {**os.environ, "UNDERLAY_RUN": str(self.plugin.run), "CNI_COMMAND": verb, "CNI_PATH": "/opt/cni/bin"}
        if pod:
            netns = str(self.plugin.net.path(pod))
            env |= {"CNI_CONTAINERID": pod, "CNI_NETNS": netns, "CNI_IFNAME": "eth0", "CNI_ARGS": ";".join(arguments)}
        argv = ["nsenter", f"--net={self.plugin.net.path(NODE)}", str(program)]
        started = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert started.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # VERSION reads nothing, and nobody minds
            started.stdin.write(json.dumps(configuration).encode())
            started.stdin.close()
        started.stdin = None
        return started

    def _end(self, started: subprocess.Popen[bytes]) -> dict[str, Any]:
        printed, _ = started.communicate(timeout=GC_LIMIT)
        assert started.returncode == 0, printed
        return dict(json.loads(printed)) if printed.strip() else {}


@pytest.fixture
def plugin(net: Net, tmp_path: Path, shim_c: Path, reference: Path) -> Plugin:
    made = Plugin(net, tmp_path, shim_c)
    made.start()
    return made


def pods(plugin: Plugin, count: int) -> list[str]:
    names = [f"pod-{i}" for i in range(count)]
    for name in names:
        plugin.net.add(name)
    return names


@pytest.mark.parametrize(("version", "chain"), [("0.4.0", CHAIN), ("1.0.0", CHAIN), ("1.1.0", ())])
def test_a_burst_of_pods_each_checked_at_once(
    plugin: Plugin, tmp_path: Path, version: str, chain: tuple[dict[str, Any], ...]
) -> None:
    chain = tuple({**each, "dataDir": str(tmp_path / "tuning")} for each in chain)  # not in the machine's /run
    crio = CriO(plugin, install.conflist(version=version, chain=chain))
    crio.start()
    names = pods(plugin, 12)
    crio.add(names)
    crio.start()  # another life: each pod that it finds again is checked
    for name in names:
        crio.remove(name)
    eventually(plugin.nothing_left)


def test_gc_at_the_start_frees_what_the_last_life_forgot(plugin: Plugin) -> None:
    crio = CriO(plugin, install.conflist(version="1.1.0"))
    names = pods(plugin, 6)
    crio.add(names)
    crio.status()
    del crio.pods["pod-2"], crio.pods["pod-4"]  # killed before it wrote them down
    crio.start()
    wanted = {ip["address"].partition("/")[0] for result in crio.pods.values() for ip in result["ips"]}
    assert plugin.routed() == wanted
    eventually(lambda: len(plugin.links()) == 4)
    for name in list(crio.pods):
        crio.remove(name)
    # Nothing is known now: libcni says null, which frees nothing.
    crio.add(["pod-2"])
    left = plugin.routed()
    crio.pods.clear()
    crio.start()
    assert plugin.routed() == left
    crio.list["name"] = "another"
    crio.start()
    assert plugin.routed() == left


def test_gc_and_checks_wait_for_a_server_that_is_being_upgraded(plugin: Plugin) -> None:
    crio = CriO(plugin, install.conflist(version="1.1.0"))
    crio.add(pods(plugin, 3))
    del crio.pods["pod-0"]
    plugin.server.terminate()
    plugin.server.wait(60)
    began = time.monotonic()
    plugin.server = plugin.spawn()
    crio.start()
    assert time.monotonic() - began < GC_LIMIT
    assert len(plugin.routed()) == 4
    for name in list(crio.pods):
        crio.remove(name)
    eventually(plugin.nothing_left)
