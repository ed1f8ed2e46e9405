"""The plugin on a real kernel, through both shims, as a runtime calls it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cni import install, podnet
from lab.net import Net
from store.model import BGPNodeStatus, IPPool, IPPoolSpec, Meta, Namespace, Pod, PodSpec
from tests.conftest import eventually, usable
from tests.netns.plugin import NODE, ROOT, Answer, Plugin, stopped

LINK1 = podnet.link_name("c1", "eth0")


@pytest.fixture(params=["c", "py"])
def plugin(request: pytest.FixtureRequest, net: Net, tmp_path: Path) -> Plugin:
    """A node with two pods' namespaces and no server yet."""
    made = Plugin(net, tmp_path, request.getfixturevalue(f"shim_{request.param}"))
    net.add("pod-1")
    net.add("pod-2")
    return made


@pytest.fixture
def node(plugin: Plugin) -> Plugin:
    plugin.start()
    return plugin


@pytest.fixture
def node_c(net: Net, tmp_path: Path, shim_c: Path) -> Plugin:
    """For what the server alone decides, in many cases: through shim.c only."""
    made = Plugin(net, tmp_path, shim_c)
    net.add("pod-1")
    net.add("pod-2")
    made.start()
    return made


def ok(answer: Answer) -> Answer:
    assert answer.code == 0, answer.text
    return answer


def refused(answer: Answer, code: int, *words: str) -> None:
    assert answer.code != 0
    assert answer.json["code"] == code, answer.text
    for word in words:
        assert word in answer.json["msg"] + answer.json["details"]


# -- ADD -----------------------------------------------------------------------------------------------------------


def test_pods_reach_each_other_with_the_first_packet(node: Plugin) -> None:
    one, two = ok(node.call("ADD", "c1", "pod-1")), ok(node.call("ADD", "c2", "pod-2"))
    assert len({*one.addresses, *two.addresses}) == 4
    for address in two.addresses:
        plain = address.partition("/")[0]
        ping = node.net.run("pod-1", ["ping", "-c", "1", "-W", "20", plain], check=False)
        assert ping.returncode == 0, ping.stdout
    node.net.address(NODE, "lo", ["10.0.0.1/32", "fd00::1/128"])
    usable(node.net, NODE)
    for address in one.addresses:
        ping = node.net.run(NODE, ["ping", "-c", "1", "-W", "20", address.partition("/")[0]], check=False)
        assert ping.returncode == 0, ping.stdout


def test_the_wiring_is_what_operators_know(node_c: Plugin) -> None:
    result = ok(node_c.call("ADD", "c1", "pod-1")).json
    (host,) = json.loads(node_c.net.run(NODE, ["ip", "-j", "-d", "link", "show", "dev", LINK1]).stdout)
    assert host["address"] == "ee:ee:ee:ee:ee:ee"
    assert host["operstate"] == "UP"
    assert host["num_tx_queues"] == host["num_rx_queues"] == 1
    assert [i["name"] for i in result["interfaces"]] == [LINK1, "eth0"]
    assert result["interfaces"][1]["sandbox"] == str(node_c.net.path("pod-1"))
    assert [ip["interface"] for ip in result["ips"]] == [1, 1]
    assert [ip["address"].partition("/")[2] for ip in result["ips"]] == ["32", "128"]
    shown = node_c.net.run("pod-1", ["sh", "-c", "ip route; ip -6 route; ip neigh"]).stdout
    assert "default via 169.254.1.1 dev eth0" in shown
    assert "default via fe80::ecee:eeff:feee:eeee dev eth0" in shown
    assert "169.254.1.1 dev eth0 lladdr ee:ee:ee:ee:ee:ee PERMANENT" in shown
    assert "fe80::ecee:eeff:feee:eeee dev eth0 lladdr ee:ee:ee:ee:ee:ee PERMANENT" in shown
    assert node_c.routes() == {ip["address"].partition("/")[0] for ip in result["ips"]}


def test_add_again_gives_the_same_and_touches_nothing(node: Plugin) -> None:
    first = ok(node.call("ADD", "c1", "pod-1"))
    before = node.net.run(NODE, ["ip", "-j", "link"]).stdout
    assert ok(node.call("ADD", "c1", "pod-1")).json == first.json
    assert node.net.run(NODE, ["ip", "-j", "link"]).stdout == before


def test_add_repairs_what_was_broken(node_c: Plugin) -> None:
    first = ok(node_c.call("ADD", "c1", "pod-1"))
    node_c.net.ip("pod-1", ["addr flush dev eth0"])
    assert ok(node_c.call("ADD", "c1", "pod-1")).json == first.json
    ok(node_c.call("CHECK", "c1", "pod-1", node_c.conf(prevResult=first.json)))


def test_a_route_that_ends_at_the_loopback_is_no_uplink(node_c: Plugin) -> None:
    node_c.net.ip(NODE, ["route add default dev lo", "route add local ::/0 dev lo"])
    interfaces = ok(node_c.call("ADD", "c1", "pod-1", node_c.conf("1.1.0"))).json["interfaces"]
    assert [i["mtu"] for i in interfaces] == [1500, 1500]


def test_the_mtu_is_the_uplinks_or_the_configurations(node_c: Plugin) -> None:
    node_c.net.add("tor-1")
    node_c.net.link(NODE, "up", "tor-1", "south", mtu=9000)
    node_c.net.address(NODE, "up", ["10.0.0.1/31", "fd00::1/127"])
    node_c.net.ip(NODE, ["route add default via 10.0.0.0 dev up", "route add ::/0 via fd00:: dev up"])
    interfaces = ok(node_c.call("ADD", "c1", "pod-1", node_c.conf("1.1.0"))).json["interfaces"]
    assert [i["mtu"] for i in interfaces] == [9000, 9000]
    interfaces = ok(node_c.call("ADD", "c2", "pod-2", node_c.conf("1.1.0", mtu=1400))).json["interfaces"]
    assert [i["mtu"] for i in interfaces] == [1400, 1400]


def test_a_pod_whose_ipv6_the_runtime_turned_off_has_it_on_its_interface(node_c: Plugin) -> None:
    node_c.net.sysctl("pod-1", {"net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1"})
    assert len(ok(node_c.call("ADD", "c1", "pod-1")).addresses) == 2


def test_the_nodes_end_is_a_routers_whatever_the_nodes_defaults_are(node_c: Plugin) -> None:
    """A pod must not give the node a default route, and is answered at once when it asks for its gateway."""
    off = {"net.ipv6.conf.default.accept_ra": "2", "net.ipv6.conf.default.disable_ipv6": "1"}
    node_c.net.sysctl(NODE, off)
    ok(node_c.call("ADD", "c1", "pod-1"))
    names = "ipv6/conf/{}/accept_ra", "ipv6/conf/{}/disable_ipv6", "ipv4/neigh/{}/proxy_delay", "ipv4/conf/{}/proxy_arp"
    paths = [f"/proc/sys/net/{name.format(LINK1)}" for name in names]
    assert node_c.net.run(NODE, ["cat", *paths]).stdout.split() == ["0", "0", "0", "1"]


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_the_answer_is_in_the_version_of_the_configuration(node_c: Plugin, version: str) -> None:
    result = ok(node_c.call("ADD", "c1", "pod-1", node_c.conf(version))).json
    assert result["cniVersion"] == version
    assert [ip.get("version") for ip in result["ips"]] == (["4", "6"] if version < "1" else [None, None])
    assert all(("mtu" in i) == (version == "1.1.0") for i in result["interfaces"])


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"CNI_CONTAINERID": ""}, 4, "CNI_CONTAINERID"),
        ({"CNI_CONTAINERID": "../../etc"}, 4, "CNI_CONTAINERID"),
        ({"CNI_IFNAME": "x" * 16}, 4, "CNI_IFNAME"),
        ({"CNI_IFNAME": "a/b"}, 4, "CNI_IFNAME"),
        ({"CNI_NETNS": "/nowhere"}, 4, "CNI_NETNS"),
        ({"CNI_NETNS": "/etc/passwd"}, 4, "CNI_NETNS"),
        ({"CNI_NETNS": ""}, 4, "CNI_NETNS"),
        ({"CNI_ARGS": "UNKNOWN=1"}, 4, "UNKNOWN"),
        ({"CNI_COMMAND": "EXPLODE"}, 4, "CNI_COMMAND"),
        ({"CNI_IFNAME": "lo"}, 102, "lo"),
    ],
)
def test_add_with_a_wrong_environment_leaves_nothing(
    node_c: Plugin, change: dict[str, str], code: int, word: str
) -> None:
    refused(node_c.call("ADD", "c1", "pod-1", **change), code, word)
    node_c.nothing_left()


def test_the_nodes_own_namespace_is_no_pod(node_c: Plugin) -> None:
    refused(node_c.call("ADD", "c1", NODE), 4, "CNI_NETNS")


def test_a_refused_add_may_be_tried_again(node_c: Plugin) -> None:
    node_c.net.ip("pod-1", ["link add eth0 type veth peer name other"])
    refused(node_c.call("ADD", "c1", "pod-1"), 102, "eth0")
    eventually(node_c.nothing_left)
    node_c.net.ip("pod-1", ["link del eth0"])
    ok(node_c.call("ADD", "c1", "pod-1"))


@pytest.mark.parametrize(
    ("conf", "code", "word"),
    [
        (b'{"cniVersion": "1.0.0", "name": "underl', 6, "JSON"),
        (b"", 6, "JSON"),
        (b'{"cniVersion": "1.0.0", "name": "underlay", "mtu": "big"}', 7, "mtu"),
        (b'{"cniVersion": "1.0.0", "name": "underlay", "mtu": 1000}', 7, "mtu"),
        (b'{"cniVersion": "1.0.0", "name": "no spaces"}', 7, "name"),
        (b'{"cniVersion": "9.9.9", "name": "underlay"}', 1, "9.9.9"),
        (b" " * ((1 << 20) + 1), 7, "too large"),
    ],
)
def test_add_with_a_wrong_configuration_leaves_nothing(node: Plugin, conf: bytes, code: int, word: str) -> None:
    refused(node.call("ADD", "c1", "pod-1", conf), code, word)
    eventually(node.nothing_left)


# -- DEL -----------------------------------------------------------------------------------------------------------


def test_del_twice_and_without_a_namespace(node: Plugin) -> None:
    result = ok(node.call("ADD", "c1", "pod-1")).json
    assert ok(node.call("DEL", "c1", "pod-1", node.conf(prevResult=result))).text == ""
    assert not node.routes()
    ok(node.call("DEL", "c1", ""))
    ok(node.call("DEL", "c1"))
    eventually(node.nothing_left)


def test_an_add_after_its_del_on_the_living_namespace_is_a_new_one(node: Plugin) -> None:
    """As podman's network reload and cnitool do."""
    for _ in range(3):
        result = ok(node.call("ADD", "c1", "pod-1")).json
        ok(node.call("CHECK", "c1", "pod-1", node.conf(prevResult=result)))
        ok(node.call("DEL", "c1", "pod-1"))
    eventually(node.nothing_left)


def test_an_add_that_its_del_overtakes_is_refused(plugin: Plugin) -> None:
    """As when a runtime is killed while no server runs: its shim waits on, and the next one deletes the sandbox."""
    add = plugin.popen("ADD", "c1", "pod-1")
    eventually(lambda: shim_runs(add.pid))
    with stopped(add.pid):
        ok(plugin.call("DEL", "c1", "pod-1"))
        plugin.start()
    printed, _ = add.communicate(timeout=60)
    answer = json.loads(printed)
    assert (add.returncode, answer["code"]) == (1, 104), answer
    eventually(plugin.nothing_left)
    ok(plugin.call("ADD", "c1", "pod-1"))


def shim_runs(pid: int) -> bool:
    """It sleeps between two looks for a server, so it has noted when it was started."""
    return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()


def test_a_namespace_can_be_used_again_at_once(node: Plugin) -> None:
    for i in range(5):
        ok(node.call("ADD", f"r{i}", "pod-1"))
        ok(node.call("DEL", f"r{i}", "pod-1"))
    eventually(node.nothing_left)


def test_del_after_the_namespace_is_gone(node: Plugin) -> None:
    ok(node.call("ADD", "c1", "pod-1"))
    path = str(node.net.path("pod-1"))
    node.net.remove("pod-1")
    ok(node.call("DEL", "c1", None, CNI_NETNS=path))
    eventually(node.nothing_left)


def test_del_where_the_namespace_was_mounted_is_a_plain_file(node: Plugin) -> None:
    ok(node.call("ADD", "c1", "pod-1"))
    ok(node.call("DEL", "c1", None, CNI_NETNS="/etc/passwd"))
    eventually(node.nothing_left)


def test_del_without_any_add(node: Plugin) -> None:
    ok(node.call("DEL", "c9", "pod-1"))
    ok(node.call("DEL", "c9", ""))


def test_del_after_the_network_was_renamed(node_c: Plugin) -> None:
    ok(node_c.call("ADD", "c1", "pod-1"))
    ok(node_c.call("DEL", "c1", "pod-1", node_c.conf() | {"name": "renamed"}))
    eventually(node_c.nothing_left)


def test_del_overlooks_a_wrong_key(node_c: Plugin) -> None:
    ok(node_c.call("ADD", "c1", "pod-1"))
    ok(node_c.call("DEL", "c1", "pod-1", node_c.conf(mtu="big", prevResult=7), CNI_ARGS="nonsense"))
    eventually(node_c.nothing_left)


def test_many_at_once_are_all_different_and_all_go(node: Plugin) -> None:
    pods = [f"many-{i}" for i in range(12)]
    for pod in pods:
        node.net.add(pod)
    shims = [node.popen("ADD", f"m{i}", pod) for i, pod in enumerate(pods)]
    answers = [json.loads(shim.communicate(timeout=60)[0]) for shim in shims]
    addresses = [ip["address"] for answer in answers for ip in answer["ips"]]
    assert len(set(addresses)) == 24
    for shim in [node.popen("DEL", f"m{i}", pod) for i, pod in enumerate(pods)]:
        assert shim.communicate(timeout=60)[0] == b""
        assert shim.returncode == 0
    eventually(node.nothing_left)


# -- CHECK ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "command", "word"),
    [
        ("pod-1", "addr del {4} dev eth0", "address"),
        ("pod-1", "addr del {6} dev eth0", "address"),
        ("pod-1", "route del default", "default route"),
        ("pod-1", "route del ::/0", "default route"),
        ("pod-1", "neigh del 169.254.1.1 dev eth0", "neighbour"),
        ("pod-1", "link set eth0 down", "down"),
        ("pod-1", "link del eth0", "gone"),
        ("pod-1", "link set eth0 address 02:00:00:00:00:01", "MAC"),
        (NODE, "link set {link} down", "down"),
        (NODE, "route del {4}", "node's route"),
        (NODE, "route del {6}", "node's route"),
        (NODE, "route add {4} dev lo metric 1", "node's route"),
    ],
)
def test_check_names_what_was_changed(node_c: Plugin, where: str, command: str, word: str) -> None:
    result = ok(node_c.call("ADD", "c1", "pod-1"))
    conf = node_c.conf(prevResult=result.json)
    assert ok(node_c.call("CHECK", "c1", "pod-1", conf)).text == ""
    four, six = result.addresses
    node_c.net.ip(where, [command.replace("{4}", four).replace("{6}", six).replace("{link}", LINK1)])
    refused(node_c.call("CHECK", "c1", "pod-1", conf), 101, word)


def test_check_lets_later_plugins_be(node_c: Plugin) -> None:
    result = ok(node_c.call("ADD", "c1", "pod-1")).json
    node_c.net.ip("pod-1", ["route replace default dev eth0 scope link", "addr add 192.0.2.1/32 dev eth0"])
    result["routes"] = [r for r in result["routes"] if r["dst"] == "::/0"]
    result["interfaces"].append({"name": "extra", "sandbox": "/x"})
    result["ips"].append({"address": "192.0.2.1/32", "interface": 2})
    ok(node_c.call("CHECK", "c1", "pod-1", node_c.conf(prevResult=result)))


def test_check_of_what_was_never_added(node_c: Plugin) -> None:
    refused(node_c.call("CHECK", "c1", "pod-1"), 7, "prevResult")
    result = ok(node_c.call("ADD", "c1", "pod-1")).json
    other = json.loads(json.dumps(result))
    other["ips"][0]["address"] = "10.244.255.255/32"
    refused(node_c.call("CHECK", "c1", "pod-1", node_c.conf(prevResult=other)), 101, "10.244.255.255")
    refused(node_c.call("CHECK", "c1", "pod-2", node_c.conf(prevResult=result)), 101, "no interface")


# -- GC, STATUS, VERSION -------------------------------------------------------------------------------------------


def test_gc_releases_what_is_not_listed_and_nothing_else(node_c: Plugin) -> None:
    keep, drop = ok(node_c.call("ADD", "c1", "pod-1")), ok(node_c.call("ADD", "c2", "pod-2"))
    other = node_c.conf() | {"name": "other"}
    node_c.net.add("pod-3")
    foreign = ok(node_c.call("ADD", "c3", "pod-3", other))
    plain = {a.partition("/")[0] for answer in (keep, foreign) for a in answer.addresses}

    null = {**node_c.conf("1.1.0"), "cni.dev/valid-attachments": None, "cni.dev/attachments": None}
    ok(node_c.call("GC", conf=null))
    ok(node_c.call("GC", conf=node_c.conf("1.1.0")))
    assert len(node_c.routes()) == 6

    valid = [{"containerID": "c1", "ifname": "eth0"}]
    ok(node_c.call("GC", conf={**node_c.conf("1.1.0"), "cni.dev/valid-attachments": valid}))
    assert node_c.routes() == plain
    assert not node_c.routes() & {a.partition("/")[0] for a in drop.addresses}
    ok(node_c.call("GC", conf={**node_c.conf("1.1.0"), "cni.dev/valid-attachments": []}))
    assert node_c.routes() == {a.partition("/")[0] for a in foreign.addresses}
    refused(node_c.call("GC", conf={**node_c.conf("1.0.0"), "cni.dev/valid-attachments": []}), 1, "GC")


def test_status_without_a_pool(net: Net, tmp_path: Path, shim_c: Path) -> None:
    plugin = Plugin(net, tmp_path, shim_c, pools=())
    plugin.spawn()
    eventually(plugin.answers)
    refused(plugin.call("STATUS", conf=plugin.conf("1.1.0")), 50)


def test_status_tells_of_sessions(node_c: Plugin) -> None:
    status = {
        "asNumber": 65101,
        "sessions": [{"peer": "tor", "address": "10.0.0.0", "asNumber": 65001, "state": "Idle"}],
    }
    node_c.status(BGPNodeStatus, NODE, status)
    refused(node_c.call("STATUS", conf=node_c.conf("1.1.0")), 51, "BGP")
    ok(node_c.call("ADD", "c1", "pod-1"))
    status["sessions"][0]["state"] = "Established"  # type: ignore[index]
    node_c.status(BGPNodeStatus, NODE, status)
    ok(node_c.call("STATUS", conf=node_c.conf("1.1.0")))


def test_version_needs_no_server(plugin: Plugin) -> None:
    assert ok(plugin.call("VERSION", conf=b"{}")).json["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]


# -- the socket ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"ULC1" + (1 << 17).to_bytes(4, "little") + bytes(4),
        b"ULC1" + bytes(4) + ((1 << 20) + 1).to_bytes(4, "little"),
        b"ULC1" + bytes(4) + (10).to_bytes(4, "little") + b"abc",
        b"ULC1" + (4).to_bytes(4, "little") + bytes(4) + b"abc\0",
        b"ULC1" + (6).to_bytes(4, "little") + bytes(4) + b"CNI_=\xff",
    ],
    ids=["http", "environment-too-long", "configuration-too-long", "cut", "no-equals", "not-utf8"],
)
def test_a_malformed_message_gets_an_error_and_harms_nobody(node_c: Plugin, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(node_c.run / "cni.sock"))
        connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1 << 16)
    assert answer.startswith(b"ULR1\x01\0\0\0")
    assert json.loads(answer[12:])["code"] == 6
    ok(node_c.call("ADD", "c1", "pod-1"))


def test_a_caller_that_says_nothing_is_not_waited_for(node_c: Plugin) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(node_c.run / "cni.sock"))
        ok(node_c.call("ADD", "c1", "pod-1"))
        silent.settimeout(60)
        assert silent.recv(1) == b""


def test_the_socket_is_for_root_alone(node_c: Plugin) -> None:
    path = node_c.run / "cni.sock"
    assert path.stat().st_mode & 0o7777 == 0o600
    if os.getuid() != 0 or Path("/proc/self/uid_map").read_text().split()[2] == "1":
        pytest.skip("only uid 0 is mapped here: there is nobody else to call")
    path.chmod(0o666)
    for folder in (path.parent, *path.parent.parents):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o001)
    program = (
        f"import os,socket; os.setgid(65534); os.setuid(65534); s=socket.socket(socket.AF_UNIX); "
        f"s.connect({str(path)!r}); s.sendall(b'ULC1'); print(s.recv(100))"
    )
    done = subprocess.run(["python3", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "b''" or "ConnectionReset" in done.stderr or "BrokenPipe" in done.stderr
    assert "turned away" in node_c.log.read_text()


# -- without a server ----------------------------------------------------------------------------------------------


def test_without_a_server_del_is_queued_and_later_carried_out(node: Plugin) -> None:
    server = node.server
    ok(node.call("ADD", "c1", "pod-1"))
    server.kill()
    server.wait()
    ok(node.call("DEL", "c1", "pod-1"))
    ok(node.call("DEL", "c1", ""))
    assert len(list((node.run / "queue").iterdir())) == 2
    node.start()
    assert not list((node.run / "queue").iterdir())
    eventually(node.nothing_left)


def test_del_is_queued_where_no_server_ever_ran(plugin: Plugin) -> None:
    plugin.run.rmdir()
    ok(plugin.call("DEL", "c1", ""))
    plugin.start()
    assert not list((plugin.run / "queue").iterdir())


def test_a_queued_del_that_is_none_is_put_aside(node: Plugin) -> None:
    ok(node.call("ADD", "c1", "pod-1"))
    (node.run / "queue" / "1-1.del").write_bytes(b"rubbish")
    eventually(lambda: (node.run / "queue" / "1-1.bad").exists())
    assert "put aside" in node.log.read_text()
    assert len(node.routes()) == 2


def test_add_without_a_server_is_to_be_tried_again(net: Net, tmp_path: Path, shim_c: Path, shim_py: Path) -> None:
    plugin = Plugin(net, tmp_path, shim_c)
    net.add("pod-1")
    begin = time.monotonic()
    waiting = [plugin.popen("ADD", "c1", "pod-1")]
    plugin.shim = shim_py
    waiting.append(plugin.popen("ADD", "c1", "pod-1"))
    for shim in waiting:
        answer = json.loads(shim.communicate(timeout=60)[0])
        assert (shim.returncode, answer["code"]) == (1, 11)
        assert answer["cniVersion"] == "1.0.0"
    assert 5 <= time.monotonic() - begin < 30


def test_a_restart_during_add_fails_no_add(node: Plugin) -> None:
    """An upgrade: the new server comes, the old one gives way, and ends later."""
    old = node.server
    shims = []
    for i in range(8):
        node.net.add(f"many-{i}")
        shims.append(node.popen("ADD", f"m{i}", f"many-{i}"))
        if i == 3:
            new = node.spawn()
    answers = [json.loads(shim.communicate(timeout=60)[0]) for shim in shims]
    assert all("ips" in answer for answer in answers), answers
    assert len({ip["address"] for answer in answers for ip in answer["ips"]}) == 16
    eventually(lambda: "standing by" in node.log.read_text())
    old.send_signal(signal.SIGTERM)
    assert old.wait(60) == 0
    ok(node.call("DEL", "m0", "many-0"))
    assert new.poll() is None


def test_a_server_that_cannot_go_on_gives_the_work_back_to_the_older_one(node: Plugin) -> None:
    """An upgrade to a version that ends: no pod waits for a rollback."""
    ok(node.call("ADD", "c1", "pod-1"))
    new = node.spawn()
    eventually(lambda: "standing by" in node.log.read_text())
    eventually(lambda: node.call("STATUS", conf=node.conf("1.1.0")).code == 0)
    new.kill()
    new.wait()
    ok(node.call("ADD", "c2", "pod-2"))
    ok(node.call("DEL", "c1", "pod-1"))
    assert "working again" in node.log.read_text()
    assert node.server.poll() is None


def test_a_server_that_ends_while_it_waits_leaves_the_work_to_who_has_it(node: Plugin) -> None:
    """Also where the older one does not give way: it is stopped, as by a machine that has no time for it."""
    ok(node.call("ADD", "c1", "pod-1"))
    node.server.send_signal(signal.SIGSTOP)
    second = node.spawn()
    eventually(lambda: "waiting for its end" in node.log.read_text())
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 0
    node.server.send_signal(signal.SIGCONT)
    ok(node.call("ADD", "c2", "pod-2"))


def test_a_socket_that_is_not_ours_is_left_alone(net: Net, tmp_path: Path, shim_c: Path) -> None:
    plugin = Plugin(net, tmp_path, shim_c)
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(plugin.run / "cni.sock"))
        foreign.listen()
        assert plugin.spawn().wait(60) == 1
        assert (plugin.run / "cni.sock").exists()
    assert "end that process" in plugin.log.read_text()


def test_the_server_makes_a_router_of_the_node_that_still_hears_its_own_routers(
    net: Net, tmp_path: Path, shim_c: Path
) -> None:
    plugin = Plugin(net, tmp_path, shim_c)
    net.add("tor-1")
    net.link(NODE, "up", "tor-1", "south")
    net.sysctl(
        NODE, {"net.ipv4.ip_forward": "0", "net.ipv6.conf.all.forwarding": "0", "net.ipv6.conf.up.accept_ra": "1"}
    )
    plugin.start()
    settings = "ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/up/accept_ra"
    assert net.run(NODE, ["cat", *(f"/proc/sys/net/{s}" for s in settings)]).stdout.split() == ["1", "1", "2"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--store", "memory:"], "--node is missing"),
        (["--node", "n"], "--store is missing"),
        (["--node", "n", "--store", "etcd:x"], "etcd:x"),
        (["--node", "n", "--store", "memory:", "--log", "loud"], "--log loud"),
        (["--node", "n", "--store", "memory:", "--boot-id", "/nowhere"], "/nowhere"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path: Path, flags: list[str], words: str) -> None:
    program = [sys.executable, "-m", "cni.daemon", "--run", str(tmp_path), *flags]
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={"UNDERLAY_LOG": "ERROR"}
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sigterm_leaves_the_pods_alone_and_takes_the_socket_away(node: Plugin) -> None:
    ok(node.call("ADD", "c1", "pod-1"))
    node.server.send_signal(signal.SIGTERM)
    assert node.server.wait(60) == 0
    assert not (node.run / "cni.sock").exists()
    assert len(node.routes()) == 2
    assert node.links() == [LINK1]


# -- killed in the middle --------------------------------------------------------------------------------------------


ADD_STEPS = ["add-journalled", "add-wired", "add-bound", "add-answered"]
DEL_STEPS = ["del-unwired", "del-journalled", "del-answered"]


@pytest.mark.parametrize("step", ADD_STEPS)
def test_kill_in_add_then_retry(plugin: Plugin, step: str) -> None:
    """The shim itself asks again; where it has its answer, the runtime does."""
    server = plugin.start(step)
    shim = plugin.popen("ADD", "c1", "pod-1")
    assert server.wait(60) == -signal.SIGKILL
    with stopped(shim.pid):
        plugin.start()
    first = json.loads(shim.communicate(timeout=60)[0])
    again = ok(plugin.call("ADD", "c1", "pod-1"))
    assert again.json == first
    ok(plugin.call("CHECK", "c1", "pod-1", plugin.conf(prevResult=first)))
    assert plugin.links() == [LINK1]
    assert plugin.routes() == {a.partition("/")[0] for a in again.addresses}
    other = ok(plugin.call("ADD", "c2", "pod-2"))
    assert not set(other.addresses) & set(again.addresses)
    ok(plugin.call("DEL", "c1", "pod-1"))
    ok(plugin.call("DEL", "c2", "pod-2"))
    eventually(plugin.nothing_left)


@pytest.mark.parametrize("step", ADD_STEPS)
def test_kill_in_add_then_sweep(plugin: Plugin, step: str) -> None:
    """The runtime was killed too: nobody ever asks again, and the sandbox goes."""
    server = plugin.start(step)
    shim = plugin.popen("ADD", "c1", "pod-1")
    assert server.wait(60) == -signal.SIGKILL
    shim.kill()
    shim.communicate()
    plugin.start()
    plugin.net.remove("pod-1")
    eventually(plugin.nothing_left)
    ok(plugin.call("ADD", "c2", "pod-2"))


@pytest.mark.parametrize("step", DEL_STEPS)
def test_kill_in_del(plugin: Plugin, step: str) -> None:
    server = plugin.start(step)
    added = ok(plugin.call("ADD", "c1", "pod-1"))
    ok(plugin.call("DEL", "c1", "pod-1"))
    assert server.wait(60) == -signal.SIGKILL
    plugin.start()
    eventually(plugin.nothing_left)
    assert not set(ok(plugin.call("ADD", "c2", "pod-2")).addresses) & set(added.addresses)


# -- installation --------------------------------------------------------------------------------------------------


def test_install_waits_for_the_server_with_the_conflist(plugin: Plugin, tmp_path: Path) -> None:
    folders = tmp_path / "bin", tmp_path / "net.d"
    with pytest.raises(install.InstallError, match="start underlay-cni"):
        install.install(plugin.shim, *folders, run=plugin.run)
    assert (folders[0] / "underlay").exists()
    assert not folders[1].exists()
    plugin.start()
    done = install.install(plugin.shim, *folders, run=plugin.run)
    stamp = done.conflist.stat().st_mtime_ns
    install.install(plugin.shim, *folders, run=plugin.run)
    assert done.conflist.stat().st_mtime_ns == stamp
    assert json.loads(done.conflist.read_text())["plugins"][0]["type"] == "underlay"
    plugin.shim = done.binary
    ok(plugin.call("ADD", "c1", "pod-1"))


# -- what the runtime chooses ------------------------------------------------------------------------------------------


def test_the_runtime_says_address_and_mac(node_c: Plugin) -> None:
    """By capability, without a word of the pod; the pod sends from there and only from there."""
    told = {"runtimeConfig": {"ips": ["10.244.0.77/16", "fd00:10:244::77"], "mac": "02:00:00:00:00:77"}}
    added = ok(node_c.call("ADD", "c1", "pod-1", node_c.conf(**told)))
    assert added.addresses == ["10.244.0.77/32", "fd00:10:244::77/128"]
    assert added.json["interfaces"][1]["mac"] == "02:00:00:00:00:77"
    (link,) = json.loads(node_c.net.run("pod-1", ["ip", "-j", "link", "show", "dev", "eth0"]).stdout)
    assert link["address"] == "02:00:00:00:00:77"
    assert ok(node_c.call("ADD", "c1", "pod-1", node_c.conf(**told))).json == added.json
    ok(node_c.call("CHECK", "c1", "pod-1", node_c.conf(prevResult=added.json, **told)))
    other = ok(node_c.call("ADD", "c2", "pod-2", CNI_ARGS="MAC=02:00:00:00:00:78;IP=10.244.0.78"))
    assert other.addresses == ["10.244.0.78/32"], "all that the pod gets"
    assert other.json["interfaces"][1]["mac"] == "02:00:00:00:00:78"
    ping = node_c.net.run("pod-1", ["ping", "-c", "1", "-W", "20", "10.244.0.78"], check=False)
    assert ping.returncode == 0, ping.stdout
    ok(node_c.call("DEL", "c1", "pod-1", node_c.conf(**told)))
    ok(node_c.call("DEL", "c2", "pod-2"))
    eventually(node_c.nothing_left)


def test_an_address_that_the_runtime_cannot_have_is_refused_with_the_reason(node_c: Plugin) -> None:
    def ask(*ips: str) -> Answer:
        return node_c.call("ADD", "c1", "pod-1", node_c.conf(runtimeConfig={"ips": ips}))

    refused(ask("192.0.2.1"), 7, "192.0.2.1", "in no IPPool", "the runtime asks for")
    ok(node_c.call("ADD", "c2", "pod-2", CNI_ARGS="IP=10.244.0.78"))
    refused(ask("10.244.0.78"), 11, "10.244.0.78")
    refused(node_c.call("ADD", "c1", "pod-1", node_c.conf(runtimeConfig={"mac": "01:00:5e:00:00:01"})), 7, "unicast")
    assert node_c.links() == [podnet.link_name("c2", "eth0")]


# -- pods that choose ---------------------------------------------------------------------------------------------


def annotated(**lists: list[str]) -> dict[str, str]:
    return {f"underlay.network/{key}": json.dumps(value) for key, value in lists.items()}


def test_pods_choose_pool_and_address_where_they_may(
    net: Net, tmp_path: Path, shim_c: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERLAY_PODS_MAY_CHOOSE", "yes")
    plugin = Plugin(net, tmp_path, shim_c)
    manual = IPPoolSpec(cidr="10.9.0.0/24", block_size=32, assignment_mode="Manual")
    plugin.create(IPPool(metadata=Meta(name="gold"), spec=manual))
    plugin.create(Namespace(metadata=Meta(name="default")))
    for name, wishes in (
        ("pod-1", annotated(ipv4pools=["gold"])),
        ("pod-2", annotated(ipv4pools=["nope"])),
        ("pod-3", {}),
    ):
        net.add(name)
        meta = Meta(name=name, namespace="default", annotations=wishes)
        plugin.create(Pod(metadata=meta, spec=PodSpec(node_name=NODE)))
    plugin.start()

    chosen = ok(plugin.call("ADD", "c1", "pod-1")).addresses
    assert [a.startswith("10.9.0.") for a in chosen] == [True, False]
    assert ok(plugin.call("ADD", "c1", "pod-1")).addresses == chosen
    refused(plugin.call("ADD", "c2", "pod-2"), 7, "annotation underlay.network/ipv4pools of pod default/pod-2")
    told = {"runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotated(ipAddrs=["10.9.0.77"])}}
    assert ok(plugin.call("ADD", "c3", "pod-3", conf=plugin.conf(**told))).addresses == ["10.9.0.77/32"]
    for n in (1, 3):
        ok(plugin.call("DEL", f"c{n}", f"pod-{n}"))
    eventually(plugin.nothing_left)


def test_pods_choose_nothing_where_they_may_not(node_c: Plugin) -> None:
    told = {"runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotated(ipAddrs=["10.244.0.77"])}}
    assert "10.244.0.77/32" not in ok(node_c.call("ADD", "c1", "pod-1", conf=node_c.conf(**told))).addresses
