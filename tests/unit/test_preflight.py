"""Each check of ``install check``, where all is well and where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from msgspec.structs import replace

from ctl import preflight_page
from ctl.machine_cluster import host
from ctl.main import cli
from ctl.preflight import CHECKS, Chain, Check, Cluster, Link, Listener, Machine, Peer, Route, checks

FIT = Machine(
    kernel="6.1.0-18-amd64",
    features={"veth": "", "nexthop": "", "group": "", "nftables": ""},
    sysctls={
        "net.ipv4.ip_forward": "1",
        "net.ipv6.conf.all.forwarding": "1",
        "net.ipv6.conf.all.disable_ipv6": "0",
        "net.ipv6.conf.default.disable_ipv6": "0",
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.eth0.rp_filter": "2",
    },
    links=(Link("lo", 65536), Link("eth0", 1500), Link("eth1", 1500)),
    addresses=(("192.0.2.1/24", "eth0"), ("198.51.100.1/24", "eth1")),
    routes=(
        Route("0.0.0.0/0", "eth0", 3),
        Route("192.0.2.0/24", "eth0", 2),
        Route("fe80::/64", "eth0", 2),
        # Ours, of other nodes' blocks.
        Route("10.244.7.0/26", "eth0", 143),
    ),
    chains=(Chain("inet filter", "forward", drops=False),),
    tables=("filter", "underlay"),
    networks=(("10-underlay.conflist", ("underlay",)), ("99-loopback.conf", ("loopback",))),
    peers=(Peer("tor-1", "192.0.2.254", ""),),
    api="10.96.0.1:443",
    cluster=Cluster(
        node="node-1",
        found=True,
        kubernetes="v1.36.1",
        runtime="containerd://1.7.24",
        addresses=("192.0.2.1",),
        pod_cidrs=("10.244.3.0/24",),
        service_cidrs=("10.96.0.0/12",),
        pools=(("pods", "10.244.0.0/16"),),
    ),
)


def with_(**changes: Any) -> Machine:
    return replace(FIT, **changes)


def with_cluster(**changes: Any) -> Machine:
    assert FIT.cluster
    return replace(FIT, cluster=replace(FIT.cluster, **changes))


def with_sysctls(**values: str) -> Machine:
    return with_(sysctls={**FIT.sysctls, **{key.replace("__", "."): value for key, value in values.items()}})


#: Check: a machine on which it fails or warns, which, and words of what it found or what to do.
UNFIT: list[tuple[str, Machine, str, str]] = [
    ("kernel", with_(kernel="5.4.0-99-generic"), "failure", "Linux 5.10 or newer"),
    ("veth", with_(features={**FIT.features, "veth": "Unknown device type. (EOPNOTSUPP)"}), "failure", "modprobe veth"),
    ("nexthop-objects", with_(features={**FIT.features, "nexthop": "no (EOPNOTSUPP)"}), "failure", "older than 5.3"),
    ("ecmp", with_(features={**FIT.features, "group": "no (EINVAL)"}), "failure", "CONFIG_IP_ROUTE_MULTIPATH"),
    ("nftables-fib", with_(features={**FIT.features, "nftables": "no (ENOENT)"}), "failure", "modprobe nft_fib_inet"),
    ("ipv6", with_sysctls(net__ipv6__conf__all__disable_ipv6="1"), "warning", "disable_ipv6=0"),
    ("ipv6", with_(sysctls={}), "warning", "off"),
    ("forwarding", with_sysctls(net__ipv4__ip_forward="0"), "warning", "net.ipv4.ip_forward = 0"),
    ("rp-filter", with_sysctls(net__ipv4__conf__eth0__rp_filter="1"), "warning", "strict on eth0"),
    ("mtu", with_(links=(Link("eth0", 1200),)), "failure", "eth0: 1200"),
    (
        "mtu",
        with_(links=(Link("eth0", 1500), Link("eth1", 9000)), routes=(*FIT.routes, Route("::/0", "eth1", 3))),
        "warning",
        "eth0: 1500, eth1: 9000",
    ),
    ("other-networks", with_(networks=(("05-cilium.conflist", ("cilium-cni",)),)), "failure", "05-cilium.conflist"),
    ("remains", with_(links=(*FIT.links, Link("cali0123", 1500))), "warning", "cali0123 of Calico"),
    ("remains", with_(links=(*FIT.links, Link("flannel.1", 1450))), "warning", "flannel.1 of Flannel"),
    ("remains", with_(links=(*FIT.links, Link("kube-bridge", 1500))), "warning", "kube-bridge of kube-router"),
    ("remains", with_(tables=("cilium",)), "warning", "nftables table cilium"),
    ("forward-policy", with_(chains=(Chain("ip filter", "FORWARD", drops=True),)), "warning", "ip filter FORWARD"),
    ("firewall", with_(tables=("firewalld",)), "warning", "firewalld"),
    ("firewall", with_(ufw=True), "warning", "ufw"),
    ("port-179", with_(listeners=(Listener("0.0.0.0", 179, "bird (812)"),)), "failure", "bird (812) at 0.0.0.0"),
    ("peers", with_(peers=(Peer("tor-1", "192.0.2.254", "Connection refused"),)), "failure", "Connection refused"),
    ("api-server", with_(api_problem="no answer within 3 s"), "failure", "KUBERNETES_SERVICE_HOST"),
    ("node", with_cluster(found=False), "failure", "there is no Node node-1"),
    ("kubernetes", with_cluster(kubernetes="v1.30.4"), "failure", "1.31 or newer"),
    ("runtime", with_cluster(runtime="containerd://1.5.9"), "failure", "containerd 1.6 or newer"),
    ("pools", with_cluster(service_cidrs=("10.244.128.0/20",)), "failure", "the Services (10.244.128.0/20)"),
    (
        "pools",
        with_cluster(pools=(("pods", "192.0.0.0/16"),), pod_cidrs=()),
        "failure",
        "the node's address (192.0.2.1/32)",
    ),
    (
        "pools",
        with_(routes=(*FIT.routes, Route("10.244.9.0/24", "eth1", 4))),
        "failure",
        "a route by eth1 (10.244.9.0/24)",
    ),
    (
        "pools",
        with_cluster(pools=(("a", "10.244.0.0/16"), ("b", "10.244.8.0/24"))),
        "failure",
        "pool a (10.244.0.0/16) and pool b (10.244.8.0/24)",
    ),
    ("pod-cidr", with_cluster(pod_cidrs=("10.42.0.0/24",)), "warning", "no pool lies in 10.42.0.0/24"),
]


def by_name(machine: Machine) -> dict[str, Check]:
    return {check.name: check for check in checks(machine)}


def test_on_a_fit_machine_all_is_ok() -> None:
    found = checks(FIT)
    assert [check for check in found if check.result != "ok"] == []
    assert not any(check.remedy for check in found)
    assert [check.name for check in found] == list(CHECKS)


@pytest.mark.parametrize(("name", "machine", "result", "words"), UNFIT)
def test_what_is_wrong_is_said_by_its_check_alone(name: str, machine: Machine, result: str, words: str) -> None:
    found = by_name(machine)
    check = found[name]
    assert check.result == result, check
    assert words in f"{check.found} {check.expected} {check.remedy}", check
    assert check.expected, check
    assert check.remedy, check
    others = {other for other, c in found.items() if c.result not in ("ok", "skipped")} - {name}
    assert others <= ({"forwarding"} if not machine.sysctls else set())


def test_every_check_is_seen_to_fail() -> None:
    assert {name for name, *_ in UNFIT} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_what_cannot_be_read_is_skipped_with_the_reason(name: str) -> None:
    for need in CHECKS[name][0]:
        check = by_name(with_(unseen={need: "no right to"}))[name]
        assert (check.result, check.found) == ("skipped", "no right to")


def test_our_own_speaker_may_wait_at_the_port() -> None:
    found = by_name(with_(listeners=(Listener("::", 179, "python3 (9)"),), speaker=True))
    assert found["port-179"].result == "ok"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command prints of a machine, and its exit code."""

    def run(machine: Machine, *words: str) -> tuple[int, str]:
        async def read(*_: object) -> Machine:
            return machine

        monkeypatch.setattr(preflight_page, "read", read)
        done = CliRunner().invoke(cli, ["install", "check", *words], standalone_mode=False)
        assert done.exception is None, done.exception
        return int(done.return_value), done.output

    return run


def test_the_exit_code_is_1_for_a_failure_alone(said: Any) -> None:
    assert said(FIT)[0] == 0
    assert said(with_(unseen={"peers": "none"}))[0] == 0
    assert said(with_(ufw=True))[0] == 0
    assert said(with_(kernel="4.19"))[0] == 1


def test_the_three_forms_say_the_same(said: Any) -> None:
    machine = with_(kernel="4.19")
    page = json.loads(said(machine, "-o", "json")[1])
    assert (page["version"], page["checks"][0]["result"]) == ("underlay.network/install-check/v1", "failure")
    assert yaml.safe_load(said(machine, "-o", "yaml")[1])["checks"] == page["checks"]
    table = said(machine)[1]
    assert "kernel: expected: Linux 5.10 or newer\n  upgrade the machine's kernel" in table
    assert table.rstrip().endswith("1 failure")


def test_a_peers_port_is_no_part_of_its_address() -> None:
    assert [host(t) for t in ("192.0.2.1", "192.0.2.1:1179", "[2001:db8::1]:1179", "2001:db8::1")] == [
        *("192.0.2.1", "192.0.2.1", "2001:db8::1", "2001:db8::1")
    ]
