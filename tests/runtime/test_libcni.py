"""The plugin under libcni itself, as CRI-O has it: CNI 1.1 with cached results, and other plugins behind us."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from cni import install
from lab.net import Net
from store.model import BGPNodeStatus
from tests.conftest import eventually
from tests.netns.plugin import NODE, Plugin
from tests.runtime import sid
from tests.runtime.cnitool import Cnitool
from tests.runtime.conftest import REFERENCE, Shared
from tests.runtime.containerd import fetch

NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
CLIENT4, CLIENT6 = "192.0.2.2", "2001:db8::2"

#: Stands before each plugin and notes what it is called for.
_WITNESS: Final = '#!/bin/sh\necho "${{0##*/}} $CNI_COMMAND" >>{calls}\nexec {program}\n'


class Machine:
    """A node whose runtime is libcni, and somebody beyond it (``client``)."""

    def __init__(self, folder: Path, shim: Path) -> None:
        self.net = net = Net(folder)
        self.plugin = Plugin(net, folder, shim)
        self.bin, self.conf, self._calls = folder / "bin", folder / "net.d", folder / "calls"
        self.tool = Cnitool(net, NODE, self.bin, self.conf, self.plugin.run, folder / "cache")
        self._shim = folder / "shim"
        self._shim.write_text(_WITNESS.format(calls=self._calls, program=shim))
        net.add("client")
        net.link("client", "up", NODE, "down")
        net.address("client", "up", [f"{CLIENT4}/24", f"{CLIENT6}/64"])
        net.address(NODE, "down", [f"{NODE4}/24", f"{NODE6}/64"])
        net.ip("client", [f"route add default via {NODE4}", f"route add ::/0 via {NODE6}"])
        self.plugin.start()
        self._pods: list[str] = []

    def install(self, *chain: Mapping[str, Any], plugins: Path = REFERENCE, **more: Any) -> None:
        """Ours, and ``chain`` behind it, whose programs are in ``plugins``."""
        install.install(self._shim, self.bin, self.conf, configuration=install.conflist(chain=chain, **more))
        for kind in (str(each["type"]) for each in chain):
            (self.bin / kind).write_text(_WITNESS.format(calls=self._calls, program=plugins / kind))
            (self.bin / kind).chmod(0o755)

    def pod(self, name: str) -> str:
        self.net.add(name)
        self._pods.append(name)
        return name

    def add(self, pod: str, **more: str) -> dict[str, Any]:
        code, printed = self.tool("add", pod, **more)
        assert code == 0, printed
        return dict(json.loads(printed))

    def do(self, verb: str, pod: str, **more: str) -> None:
        code, printed = self.tool(verb, pod, **more)
        assert code == 0, printed

    def calls(self) -> list[str]:
        """What plugins were called for since the last look, in order."""
        found = self._calls.read_text().splitlines()
        self._calls.write_text("")
        return found

    def cached(self) -> list[str]:
        return sorted(p.name for p in self.tool.cache.glob("cni/results/*"))

    def cached_text(self, name: str) -> str:
        return (self.tool.cache / "cni/results" / name).read_text()

    def begin(self) -> None:
        self._calls.write_text("")

    def close(self) -> None:
        self.net.close()

    def end(self) -> None:
        for name in self._pods:
            self.net.remove(name)
        self._pods.clear()
        eventually(self.plugin.nothing_left)
        assert not self.cached()

    def links(self, where: str) -> set[str]:
        return {link["ifname"] for link in json.loads(self.net.run(where, ["ip", "-j", "link"]).stdout)}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, shim_c: Path) -> Iterator[Shared[Machine]]:
    made = Shared(lambda: Machine(tmp_path_factory.mktemp("libcni"), shim_c))
    yield made
    made.drop()


@pytest.fixture
def cnitool(machines: Shared[Machine], request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine without pods, which must be left as it was."""
    with machines.lend(request.node, Machine.end, lambda made: made.plugin.log.read_text()[-4000:]) as made:
        made.begin()
        yield made


def plain(result: dict[str, Any]) -> list[str]:
    return [ip["address"].partition("/")[0] for ip in result["ips"]]


# -- alone -------------------------------------------------------------------------------------------------------------


def test_all_verbs_with_cached_results(cnitool: Machine) -> None:
    cnitool.install(version="1.1.0")
    pod = cnitool.pod("pod-1")
    cnitool.do("status", pod)
    for _ in range(2):  # an ADD after its DEL, on the same namespace and with the same container id
        result = cnitool.add(pod)
        assert result["cniVersion"] == "1.1.0"
        assert set(plain(result)) == cnitool.plugin.routed()
        assert len(cnitool.cached()) == 1
        cnitool.do("check", pod)
        cnitool.do("del", pod)
        assert not cnitool.cached()
    cnitool.do("del", pod)  # without a cached result
    code, printed = cnitool.tool("check", pod)
    assert code != 0, printed
    assert [call.split(" ")[1] for call in cnitool.calls()] == [
        "STATUS", "ADD", "CHECK", "DEL", "ADD", "CHECK", "DEL", "DEL", "CHECK",
    ]  # fmt: skip


def test_check_says_what_is_wrong(cnitool: Machine) -> None:
    cnitool.install(version="1.1.0")
    pod = cnitool.pod("pod-1")
    result = cnitool.add(pod)
    cnitool.net.ip(pod, [f"addr del {result['ips'][0]['address']} dev eth0"])
    code, printed = cnitool.tool("check", pod)
    assert code != 0
    assert plain(result)[0] in printed
    cnitool.do("del", pod)


def test_status_says_that_no_session_is_up(cnitool: Machine) -> None:
    cnitool.install(version="1.1.0")
    pod = cnitool.pod("pod-1")
    session = {"peer": "tor", "address": "192.0.2.9", "asNumber": 65001, "state": "Idle"}
    cnitool.plugin.status(BGPNodeStatus, NODE, {"sessions": [session]})
    try:
        # A store that takes its time is not asked for long.
        code, printed = eventually(lambda: (said := cnitool.tool("status", pod))[0] and said)
        assert code != 0
        assert "none of the 1 BGP sessions of node node-1 is up" in printed
        cnitool.do("del", pod)
    finally:
        cnitool.plugin.status(BGPNodeStatus, NODE, {"sessions": []})


@pytest.mark.parametrize("given", ["valid", "empty", "null", "missing", "cnitool"])
def test_gc(cnitool: Machine, given: str) -> None:
    """What libcni has cached and is not valid it deletes itself; of what it does not know it tells the plugin."""
    cnitool.install(version="1.1.0")
    stays, goes, unknown = (cnitool.pod(name) for name in ("stays", "goes", "unknown"))
    kept, gone = cnitool.add(stays), cnitool.add(goes)
    leaked = cnitool.plugin.call("ADD", "leaked", unknown).json  # as by a runtime whose cache is lost
    (name,) = [n for n in cnitool.cached() if json.loads(cnitool.cached_text(n))["netns"].endswith("/stays")]
    container = json.loads(cnitool.cached_text(name))["containerId"]
    valid = {
        "valid": json.dumps([{"containerID": container, "ifname": "eth0"}]),
        "empty": "[]",
        "null": "null",
        "missing": "",
    }
    code, printed = cnitool.tool("gc", stays) if given == "cnitool" else cnitool.tool.gc(valid[given])
    assert code == 0, printed
    left = {"valid": {*plain(kept)}, "empty": set()}.get(given, {*plain(leaked)})
    assert cnitool.plugin.routed() == left, (kept, gone, leaked)
    cnitool.do("del", stays)
    assert cnitool.plugin.call("DEL", "leaked", unknown).code == 0


def test_a_reload_keeps_address_and_mac(cnitool: Machine) -> None:
    """podman's network reload: DEL, and ADD on the living namespace with what the container had."""
    cnitool.install()
    pod = cnitool.pod("pod-1")
    wanted = cnitool.add(pod)
    arguments = f"IP={','.join(plain(wanted))};MAC={wanted['interfaces'][1]['mac']}"
    cnitool.do("del", pod)
    assert cnitool.add(pod, CNI_ARGS=arguments) == wanted
    cnitool.do("check", pod)
    cnitool.do("del", pod)


# -- with others behind us -----------------------------------------------------------------------------------------

PORTMAP: Final = {"type": "portmap", "capabilities": {"portMappings": True}}
BANDWIDTH: Final = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
#: 8 Mbit/s, with a burst of 100 kB: a megabyte takes a second.
RATES: Final = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}
PORTS: Final = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
CAPABILITIES: Final = json.dumps({"portMappings": PORTS, "bandwidth": RATES})


def tuning(folder: Path) -> dict[str, Any]:
    """It keeps what was there in the folder, not in the machine's /run."""
    return {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}, "mtu": 1400, "dataDir": str(folder / "tuning")}


@pytest.mark.parametrize(
    ("plugins", "version"),
    [(REFERENCE, "1.0.0"), pytest.param(sid.folder() / "usr/lib/cni", "1.1.0", marks=pytest.mark.containerd_2)],
    ids=["installed", "newer"],
)
def test_portmap_bandwidth_and_tuning_do_their_work(
    cnitool: Machine, tmp_path: Path, plugins: Path, version: str
) -> None:
    cnitool.install(PORTMAP, BANDWIDTH, tuning(tmp_path), plugins=plugins, version=version)
    pod = cnitool.pod("pod-1")
    before = cnitool.links(NODE)
    (tmp_path / "index.html").write_bytes(b"x" * 1_000_000)
    cnitool.net.spawn(pod, ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", str(tmp_path)])
    result = cnitool.add(pod, CAP_ARGS=CAPABILITIES)
    assert set(plain(result)) == cnitool.plugin.routed()
    for address in (NODE4, NODE6):
        with cnitool.net.inside("client"):
            began = time.monotonic()
            body = eventually(lambda a=address: fetch(a, 8080))
            assert len(body) > 1_000_000
            assert time.monotonic() - began > 0.7
    assert cnitool.net.run(pod, ["cat", "/proc/sys/net/core/somaxconn"]).stdout == "500\n"
    (link,) = json.loads(cnitool.net.run(pod, ["ip", "-j", "link", "show", "eth0"]).stdout)
    assert link["mtu"] == 1400
    cnitool.do("del", pod, CAP_ARGS=CAPABILITIES)
    with cnitool.net.inside("client"):
        assert [fetch(address, 8080) for address in (NODE4, NODE6)] == ["", ""]
    for tool in ("iptables-save", "ip6tables-save"):
        assert "CNI-DN-" not in cnitool.net.run(NODE, [tool, "-t", "nat"]).stdout
    eventually(lambda: cnitool.links(NODE) == before)
    chain = ["underlay", "portmap", "bandwidth", "tuning"]
    assert cnitool.calls() == [*(f"{kind} ADD" for kind in chain), *(f"{kind} DEL" for kind in chain[::-1])]


def test_check_goes_through_the_chain(cnitool: Machine, tmp_path: Path) -> None:
    """Without portmap: 1.1.1 looks for the IPv4 rules of a dual-stack pod among those of IPv6."""
    cnitool.install(BANDWIDTH, tuning(tmp_path))
    pod = cnitool.pod("pod-1")
    cnitool.add(pod, CAP_ARGS=CAPABILITIES)
    cnitool.do("check", pod, CAP_ARGS=CAPABILITIES)
    assert [call for call in cnitool.calls() if "CHECK" in call] == [
        "underlay CHECK",
        "bandwidth CHECK",
        "tuning CHECK",
    ]
    cnitool.net.run(pod, ["sh", "-c", "echo 400 >/proc/sys/net/core/somaxconn"])
    code, printed = cnitool.tool("check", pod, CAP_ARGS=CAPABILITIES)
    assert code != 0, printed
    cnitool.do("del", pod, CAP_ARGS=CAPABILITIES)
