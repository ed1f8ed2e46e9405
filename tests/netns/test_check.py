"""CHECK, and GC's lists, word by word: a table of all that can be missing or wrong on a real kernel, and of what is
nobody's business."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cni import podnet, spec
from lab.net import Net
from tests.conftest import eventually
from tests.netns.plugin import NODE, Answer, Plugin

POD = "pod"


class Pod:
    """One pod of a node, and CHECK of it."""

    def __init__(self, plugin: Plugin, number: int) -> None:
        self.plugin = plugin
        self.container = f"c{number}"
        self.link = podnet.link_name(self.container, "eth0")
        added = plugin.call("ADD", self.container, POD)
        assert added.code == 0, added.text
        self.result = added.json
        self.four, self.six = added.addresses

    def check(self) -> Answer:
        return self.plugin.call("CHECK", self.container, POD, self.plugin.conf(prevResult=self.result))

    def named(self, text: str) -> str:
        """With what is between braces replaced."""
        elsewhere = str(self.plugin.net.path("elsewhere"))
        words = {"4": self.four, "6": self.six, "link": self.link, "elsewhere": elsewhere}
        words |= {"four": self.four[:-3], "six": self.six[:-4]}
        for name, value in words.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    def change(self, where: str, command: str) -> None:
        command = self.named(command)
        if command.startswith("net."):
            name, _, value = command.partition("=")
            self.plugin.net.sysctl(where, {name: value})
        else:
            self.plugin.net.run(where, ["sh", "-c", command])


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory, shim_c: Path) -> Iterator[Plugin]:
    """One node for all: each test has a pod of its own."""
    folder = tmp_path_factory.mktemp("node")
    net = Net(folder)
    try:
        plugin = Plugin(net, folder, shim_c)
        plugin.start()
        yield plugin
    finally:
        net.close()


_numbers = itertools.count(1)


@pytest.fixture
def pod(plugin: Plugin) -> Iterator[Pod]:
    for name in (POD, "elsewhere"):
        plugin.net.add(name)
    made = Pod(plugin, next(_numbers))
    yield made
    for name in (POD, "elsewhere"):
        plugin.net.remove(name)
    plugin.call("DEL", made.container, "")
    made.change(NODE, "ip route flush exact {4}; ip -6 route flush exact {6}")
    eventually(plugin.nothing_left)


GATEWAY6 = "fe80::ecee:eeff:feee:eeee"

#: A changed MAC and a lost last address take neighbours and routes with them.
AGAIN = (
    "ip neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent; "
    f"ip neigh replace {GATEWAY6} lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent; "
    "ip route replace 169.254.1.1 dev eth0 scope link; ip route replace default via 169.254.1.1 dev eth0"
)

#: Where, what is done there, and the words of the one finding that it gives.
MUTATIONS = [
    # the link
    (POD, "ip link del eth0", "node's end {link} is gone"),
    (POD, "ip link set eth0 down; ip link set eth0 name eth9; ip link set eth9 up", "has no interface eth0"),
    (POD, "ip link set eth0 netns {elsewhere}", "has no interface eth0"),
    (
        POD,
        "ip link set eth0 down; ip link set eth0 name x; ip link add eth0 type veth peer name y",
        "is not the other end",
    ),
    (POD, f"ip link set eth0 address 02:00:00:00:00:01; {AGAIN}", "has the MAC 02:00:00:00:00:01"),
    (NODE, "ip link set {link} down; ip link set {link} name other", "node's end {link} is gone"),
    (NODE, "ip link set {link} netns {elsewhere}", "node's end {link} is gone"),
    (NODE, "ip link set {link} group 0", "is in group 0"),
    (NODE, "ip link set {link} address 02:00:00:00:00:02", "has the MAC 02:00:00:00:00:02"),
    (NODE, "net.ipv4.conf.{link}.forwarding=0", "forwarding=0"),
    (NODE, "net.ipv4.conf.{link}.proxy_arp=0", "proxy_arp=0"),
    # addresses
    (POD, f"ip addr del {{4}} dev eth0; {AGAIN}", "lacks the address {four}"),
    (POD, "ip addr del {6} dev eth0", "lacks the address {six}"),
    (POD, "ip addr add {four}/24 dev eth0 noprefixroute; ip addr del {4} dev eth0", "lacks the address {four}"),
    (NODE, f"ip addr del {GATEWAY6}/64 dev {{link}}", f"lacks the address {GATEWAY6}"),
    # the pod's routes and neighbours
    (POD, "ip route del default", "lacks the default route via 169.254.1.1"),
    (POD, "ip -6 route del default", f"lacks the default route via {GATEWAY6}"),
    (POD, "ip route replace default dev eth0", "lacks the default route via 169.254.1.1"),
    (POD, "ip route del 169.254.1.1", "lacks the route to 169.254.1.1"),
    (POD, "ip neigh del 169.254.1.1 dev eth0", "lacks the permanent neighbour 169.254.1.1"),
    (POD, f"ip neigh del {GATEWAY6} dev eth0", f"lacks the permanent neighbour {GATEWAY6}"),
    (POD, "ip neigh replace 169.254.1.1 lladdr 02:00:00:00:00:03 dev eth0 nud permanent", "neighbour 169.254.1.1"),
    (POD, "ip neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud stale", "neighbour 169.254.1.1"),
    (POD, f"ip neigh replace {GATEWAY6} lladdr 02:00:00:00:00:03 dev eth0 nud permanent", f"neighbour {GATEWAY6}"),
    # the node's routes
    (NODE, "ip route del {4}", "node's route to {four}"),
    (NODE, "ip -6 route del {6}", "node's route to {six}"),
    (NODE, "ip route add {4} dev lo metric 1", "node's route to {four}"),
    (NODE, "ip -6 route add {6} dev lo metric 1", "node's route to {six}"),
    (NODE, "ip route del {4}; ip route add {4} dev {link} metric 32", "node's route to {four}"),
    (NODE, "ip route add blackhole {4} metric 1", "node's route to {four}"),
]


@pytest.mark.parametrize(("where", "change", "finding"), MUTATIONS, ids=[f"{w}: {c}" for w, c, _ in MUTATIONS])
def test_check_finds_the_one_thing_that_is_wrong(pod: Pod, where: str, change: str, finding: str) -> None:
    assert pod.check().text == ""
    pod.change(where, change)
    answer = pod.check()
    assert (answer.code, answer.json["code"]) == (1, spec.CHECK_FAILED)
    details = answer.json["details"]
    assert details.startswith(f"eth0 of container {pod.container}: ")
    assert pod.named(finding) in details
    assert details.endswith("; recreate the pod")
    assert details.count(";") == 1, "more than one finding for one thing"


#: A link that is down takes routes and neighbours with it: the finding that matters is among several.
DOWN = [
    (POD, "ip link set eth0 down", "pod's eth0 is down"),
    (NODE, "ip link set {link} down", "node's end {link} is down"),
]


@pytest.mark.parametrize(("where", "change", "finding"), DOWN)
def test_check_finds_a_link_that_is_down(pod: Pod, where: str, change: str, finding: str) -> None:
    pod.change(where, change)
    assert pod.named(finding) in pod.check().json["details"]


#: What later plugins, the pod itself and the kernel may do.
FOREIGN = [
    (POD, "ip addr add 192.0.2.1/24 dev eth0"),
    (POD, "ip -6 addr add 2001:db8::1/64 dev eth0 nodad"),
    (POD, "ip link add extra type veth peer name y; ip link set extra up; ip addr add 198.51.100.1/24 dev extra"),
    (POD, "ip route add 203.0.113.0/24 via 169.254.1.1 dev eth0"),
    (POD, "ip route add default via 169.254.1.1 dev eth0 metric 77"),
    (POD, "ip -6 route add 2001:db8:1::/48 via fe80::1 dev eth0"),
    (POD, "ip neigh add 192.0.2.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent"),
    (POD, "ip rule add from 192.0.2.1 table 77"),
    (POD, "ip link set eth0 mtu 1400"),
    (POD, "ip link set eth0 txqueuelen 77 alias hello"),
    (POD, "net.ipv4.conf.eth0.rp_filter=2"),
    (NODE, "ip route add {4} dev lo metric 77"),
    (NODE, "ip route add 10.244.0.0/16 dev lo"),
    (NODE, "ip addr add 192.0.2.9/32 dev {link}"),
    (NODE, "ip neigh flush dev {link}"),
    (NODE, "ip link add foreign0 type veth peer name foreign1"),
    (NODE, "ip link set {link} mtu 1400"),
    (NODE, "net.ipv4.conf.{link}.rp_filter=2"),
]


@pytest.mark.parametrize(("where", "change"), FOREIGN, ids=[f"{w}: {c}" for w, c in FOREIGN])
def test_check_overlooks_what_is_not_ours(pod: Pod, where: str, change: str) -> None:
    pod.change(where, change)
    assert pod.check().text == ""


def changed(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a result, with one value in it replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(result))
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    at: Any = copy
    for key in way:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "code", "word"),
    [
        ("interfaces.0.name", "ulother", 101, "ulother"),
        ("interfaces.1.mac", "02:00:00:00:00:09", 101, "02:00:00:00:00:09"),
        ("interfaces.1.name", "eth7", 7, "prevResult"),
        ("interfaces.1", None, 7, "prevResult"),
        ("interfaces.1.sandbox", None, 7, "prevResult"),
        ("ips.0.address", "10.244.99.99/32", 101, "10.244.99.99"),
        ("ips.0.address", "nonsense", 7, "prevResult"),
        ("ips.0", None, 101, "reserved for it"),
        ("ips", None, 7, "prevResult"),
        ("ips.0.interface", 0, 101, "reserved for it"),
    ],
)
def test_check_finds_a_result_that_is_not_what_is_reserved(
    pod: Pod, path: str, value: Any, code: int, word: str
) -> None:
    pod.result = changed(pod.result, path, value)
    answer = pod.check()
    assert answer.code == 1
    assert answer.json["code"] == code, answer.text
    assert word in answer.json["details"]


def test_several_interfaces_of_a_container_are_each_their_own(pod: Pod) -> None:
    """Each answers from its own address by its own link, and is looked at and taken away alone."""
    plugin, names = pod.plugin, {"CNI_IFNAME": "net1"}
    for _ in range(2):
        second = plugin.call("ADD", pod.container, POD, **names)
        assert second.code == 0, second.text
        assert not set(second.addresses) & {pod.four, pod.six}
        assert len(plugin.links()) == 2
        conf = plugin.conf(prevResult=second.json)
        assert plugin.call("CHECK", pod.container, POD, conf, **names).text == ""
        assert plugin.call("ADD", pod.container, POD, **names).json == second.json
        # From another namespace, through the node: the answer must leave by the link that the question came by.
        plugin.call("ADD", f"{pod.container}x", "elsewhere")
        for address in (*second.addresses, pod.four, pod.six):
            plain = address.partition("/")[0]
            ping = plugin.net.run("elsewhere", ["ping", "-c", "1", "-W", "20", plain], check=False)
            assert ping.returncode == 0, f"{address}: {ping.stdout}"
        plugin.call("DEL", f"{pod.container}x", "elsewhere")

        four = second.addresses[0].partition("/")[0]
        pod.change(POD, f"ip rule del from {four}")
        details = plugin.call("CHECK", pod.container, POD, conf, **names).json["details"]
        assert f"lacks the rule for what is sent from {four}" in details
        assert plugin.call("ADD", pod.container, POD, **names).json == second.json
        assert plugin.call("CHECK", pod.container, POD, conf, **names).text == ""

        assert plugin.call("DEL", pod.container, POD, **names).code == 0
        assert pod.check().text == ""
        assert plugin.routed() == {pod.four[:-3], pod.six[:-4]}
    shown = plugin.net.run(POD, ["sh", "-c", "ip rule; ip -6 rule"]).stdout
    assert shown.count("proto 141") <= 2, "rules of interfaces that are gone pile up"
    assert plugin.call("DEL", pod.container, POD).code == 0
    eventually(plugin.nothing_left)


# -- GC --------------------------------------------------------------------------------------------------------------

ONE, TWO = {"containerID": "ONE", "ifname": "eth0"}, {"containerID": "TWO", "ifname": "eth0"}
VALID = "cni.dev/valid-attachments"


@pytest.mark.parametrize(
    ("lists", "stay"),
    [
        ({VALID: [ONE, TWO]}, {"ONE", "TWO"}),
        ({VALID: [ONE]}, {"ONE"}),
        ({VALID: [ONE, ONE, {**ONE, "extra": 1}]}, {"ONE"}),
        ({VALID: [{**ONE, "ifname": "eth1"}]}, set()),
        ({VALID: []}, set()),
        ({VALID: None}, {"ONE", "TWO"}),
        ({VALID: None, "cni.dev/attachments": None}, {"ONE", "TWO"}),
        ({VALID: [ONE], "cni.dev/attachments": [TWO]}, {"ONE"}),
        ({VALID: "ONE"}, {"ONE", "TWO"}),
        ({VALID: [{"containerID": "ONE"}]}, {"ONE", "TWO"}),
    ],
)
def test_gc_keeps_what_its_list_has(pod: Pod, lists: Mapping[str, Any], stay: set[str]) -> None:
    """A list that cannot be read releases nothing; libcni's other list says nothing to us."""
    plugin, other = pod.plugin, f"{pod.container}b"
    second = plugin.call("ADD", other, "elsewhere")
    addresses = {"ONE": [pod.four, pod.six], "TWO": second.addresses}
    text = (
        json.dumps({**plugin.conf("1.1.0"), **lists})
        .replace('"ONE"', f'"{pod.container}"')
        .replace('"TWO"', f'"{other}"')
    )
    answer = plugin.call("GC", conf=text.encode())
    readable = lists[VALID] is None or all(isinstance(entry, dict) and "ifname" in entry for entry in lists[VALID])
    assert (answer.code, answer.json.get("code")) == ((0, None) if readable else (1, 7)), answer.text
    assert plugin.routed() == {a.partition("/")[0] for name in stay for a in addresses[name]}
    plugin.call("DEL", other, "")


def test_gc_is_for_its_own_network_alone(pod: Pod) -> None:
    plugin = pod.plugin
    assert plugin.call("GC", conf={**plugin.conf("1.1.0"), "name": "other", VALID: []}).code == 0
    assert pod.check().text == ""
