"""The issue's promises, on the default rack: real BIRD, real ExaBGP, real namespaces."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from threading import Lock

import pytest

from cni import marks
from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from lab import client
from lab.bird import protocol_name
from lab.topology import Topology
from lab.wire import PodAdd, PodDel, PodState
from tests.conftest import eventually
from tests.e2e.conftest import LAST_LINE, Lab, Ping, Silence
from tests.promtext import check, get, value

OURS = {PROTO_PODS, PROTO_BLOCKS, PROTO_IMPORTS}
MAP = Topology.build()
POOLS = [ip_network(pool.cidr) for pool in MAP.pools]


@pytest.fixture(scope="module")
def up(lab: Lab) -> Iterator[str]:
    """What ``up`` printed."""
    yield lab.command("up").stdout


@pytest.fixture(autouse=True)
def _whole(lab: Lab, up: str) -> None:
    """Each test finds a lab in which everybody reaches everybody."""
    lab.whole()


def blocks(lab: Lab) -> dict[str, tuple[str, ...]]:
    return {node.name: node.blocks for node in lab.state().nodes}


def in_a_pool(cidr: str) -> bool:
    network = ip_network("0.0.0.0/0" if cidr == "default" else cidr)
    return any(network.version == pool.version and network.subnet_of(pool) for pool in POOLS)  # type: ignore[arg-type]


# -- what is there ----------------------------------------------------------------------------------------------------


def test_the_last_line_and_the_picture(lab: Lab, up: str) -> None:
    last = LAST_LINE.match(up.splitlines()[-1])
    assert last, up
    assert {k: int(v) for k, v in last.groupdict().items()} == {
        "pods": 12, "nodes": 4, "answered": 264, "paths": 264, "lost": 0
    }  # fmt: skip
    state = lab.state()
    assert [(n.name, n.rack, len(n.pods)) for n in state.nodes] == [
        ("node-1", "rack-1", 3), ("node-2", "rack-1", 3), ("node-3", "rack-2", 3), ("node-4", "rack-2", 3)
    ]  # fmt: skip
    for node in state.nodes:
        assert set(node.processes) == {"cni", "agent", "exabgp"}
        assert all(p.state == "running" for p in node.processes.values())
        assert sorted(ip_network(b).prefixlen for b in node.blocks) == [26, 122]
        for pod in node.pods:
            assert len(pod.addresses) == 2
            assert all(any(ip_address(a) in ip_network(b) for b in node.blocks) for a in pod.addresses)
            assert pod.name in up
    assert f"export UNDERLAY_STORE={state.store}" in up


def test_up_again_shows_it_and_another_shape_is_refused(lab: Lab) -> None:
    again = lab.command("up")
    assert "is up already" in again.stdout
    assert LAST_LINE.match(again.stdout.splitlines()[-1])
    other = lab.command("up", "--racks", "1", check=False)
    assert other.returncode == 1
    assert "underlay-lab down" in other.stderr
    assert lab.state().shape == MAP.shape


def test_the_store_agrees_with_every_nodes_journal_and_kernel(lab: Lab) -> None:
    for node in lab.state().nodes:
        said = lab.inside(node.name, "underlayctl", "ipam", "check")
        assert said.startswith("clean: "), said
        assert said.endswith(f"journal of {node.name}, kernel of {node.name}\n")


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_sees_the_other_pods_own_address(lab: Lab, family: int) -> None:
    listen = (
        "import socket,sys\n"
        f"s = socket.create_server(('', 9000), family=socket.AF_INET{6 if family == 6 else ''})\n"
        "print('listens', flush=True)\n"
        "print(s.accept()[1][0], flush=True)\n"
    )
    there = lab.address("pod-3-1", family)
    server = lab.spawn("pod-3-1", sys.executable, "-c", listen)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listens\n"
        lab.inside("pod-1-2", sys.executable, "-c", f"import socket; socket.create_connection(('{there}', 9000), 5)")
        assert server.stdout.readline().strip() == lab.address("pod-1-2", family)
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("family", [4, 6])
def test_the_way_is_node_tor_spine_tor_node(lab: Lab, family: int) -> None:
    there = lab.address("pod-4-1", family)
    said = lab.inside("pod-1-1", "traceroute", f"-{family}", "-n", "-q", "2", "-w", "2", there)
    hops = [line.split()[1] for line in said.splitlines()[1:]]
    assert [MAP.owner(hop) for hop in hops[:-1]] == ["node-1", "tor-1", "spine-1", "tor-2", "node-4"], said
    assert hops[-1] == there


def test_no_tunnel_anywhere(lab: Lab) -> None:
    names = [r.name for r in MAP.routers] + [n.name for n in MAP.nodes] + [p for n in MAP.nodes for p in n.pods]
    for name in names:
        for link in json.loads(lab.inside(name, "ip", "-j", "-d", "link")):
            kind = link.get("linkinfo", {}).get("info_kind", link["link_type"])
            fallback = "UP" not in link["flags"]  # sit0 and the like, which a module puts in each namespace
            assert kind in ("veth", "loopback") or fallback, f"{name}: {link}"


def bird_routes(lab: Lab, router: str, *words: str) -> set[str]:
    said = lab.inside(router, "birdc", "-r", "show", "route", "primary", *words)
    return {word for line in said.splitlines() if "/" in (word := line.split(" ")[0]) and word}


def test_bird_holds_one_route_a_block_and_nothing_else_of_ours(lab: Lab) -> None:
    own = blocks(lab)
    everything = {block for each in own.values() for block in each}
    for router in MAP.routers:
        held = bird_routes(lab, router.name)
        assert {r for r in held if in_a_pool(r)} == everything, router.name
    for node in MAP.nodes:
        (uplink,) = node.uplinks
        sessions = [protocol_name(node.name, family) for family in (4, 6)]
        told = {route for name in sessions for route in bird_routes(lab, uplink.tor, "protocol", name)}
        assert told == set(own[node.name])


def test_every_route_of_ours_has_one_of_three_numbers(lab: Lab) -> None:
    own = blocks(lab)
    everything = {block for each in own.values() for block in each}
    for state in lab.state().nodes:
        routes = lab.routes(state.name, "table", "all")
        ours = [r for r in routes if int(r["protocol"]) in OURS]
        assert all(int(r["protocol"]) in OURS for r in routes if in_a_pool(r["dst"]))
        by = {number: {r["dst"] for r in ours if int(r["protocol"]) == number} for number in OURS}
        pods = {f"{a}/{128 if ':' in a else 32}" for p in state.pods for a in p.addresses}
        assert by == {
            PROTO_PODS: pods,
            PROTO_BLOCKS: set(own[state.name]),
            PROTO_IMPORTS: everything - set(own[state.name]),
        }
        assert all(r["type"] in ("blackhole", "6") for r in ours if int(r["protocol"]) == PROTO_BLOCKS)


# -- what is lost when something dies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["agent", "cni"])
def test_agent_and_cni_server_die_and_nobody_notices(lab: Lab, part: str) -> None:
    silence = Silence(lab, "tor-1", "node-2", "node-3")
    ping = Ping(lab, "pod-1-1", "pod-3-1")
    back = Ping(lab, "pod-3-2", "pod-1-2")
    for signal in ("KILL", "TERM", "TERM", "TERM"):
        before = lab.node("node-1").processes[part].restarts
        lab.command("kill", "node-1", part, "--signal", signal, "--restart-after", "0.5")
        lab.restarted("node-1", part, before)
        works(lab, part)
    assert ping.lost() == [0, 0]
    assert back.lost() == [0, 0]
    assert silence.heard() == {}


def works(lab: Lab, part: str) -> None:
    """Waits until the process that was started again does its work on node-1."""
    if part == "cni":
        lab.command("pod", "add", "pod-1-77")
        lab.command("pod", "del", "pod-1-77")
        return
    # The agent makes good what is missing in the kernel: of its own number, and harmless while the default leads there.
    lost = next(r["dst"] for r in lab.routes("node-1", "protocol", str(PROTO_IMPORTS)))
    lab.inside("node-1", "ip", "route", "del", lost, "proto", str(PROTO_IMPORTS))
    eventually(lambda: lost in {r["dst"] for r in lab.routes("node-1", "protocol", str(PROTO_IMPORTS))}, every=0.1)


def sessions(lab: Lab, node: str, tor: str) -> dict[str, str]:
    """The node's sessions as BIRD tells them: up since when."""
    names = {protocol_name(node, family) for family in (4, 6)}
    said = lab.inside(tor, "birdc", "-r", "show", "protocols")
    return {
        words[0]: words[4]
        for line in said.splitlines()
        if (words := line.split()) and words[0] in names and words[-1] == "Established"
    }


def test_exabgp_dies_under_its_agent(lab: Lab) -> None:
    before = sessions(lab, "node-1", "tor-1")
    ping = Ping(lab, "pod-1-1", "pod-3-1")
    back = Ping(lab, "pod-3-2", "pod-1-2")
    lab.command("kill", "node-1", "exabgp")
    eventually(lambda: again(lab, before), every=0.2)
    lab.whole()
    assert ping.lost() == [0, 0]
    assert back.lost() == [0, 0]


def test_exabgp_dies_while_its_agent_is_away(lab: Lab) -> None:
    before = sessions(lab, "node-1", "tor-1")
    restarts = lab.node("node-1").processes["agent"].restarts
    ping = Ping(lab, "pod-1-1", "pod-3-1")
    back = Ping(lab, "pod-3-2", "pod-1-2")
    lab.command("kill", "node-1", "agent", "--restart-after", "40")
    lab.command("kill", "node-1", "exabgp")
    eventually(lambda: again(lab, before), every=0.2)
    assert lab.node("node-1").processes["agent"].state == "restarting"
    lab.restarted("node-1", "agent", restarts, limit=120)
    works(lab, "agent")
    assert ping.lost() == [0, 0]
    assert back.lost() == [0, 0]


def again(lab: Lab, before: dict[str, str]) -> bool:
    """Both sessions of node-1 are up, and newer than they were."""
    now = sessions(lab, "node-1", "tor-1")
    return len(now) == 2 and all(now[name] != before[name] for name in now)


def ask(lab: Lab, node: str, target: str, socket: str = "agent.sock") -> tuple[int, str]:
    code, body = get(lab.folder.member(node) / "run" / socket, target)
    return code, body.decode()


def test_every_node_is_alive_and_ready_and_tells_what_it_does(lab: Lab) -> None:
    for node in lab.state().nodes:
        for socket in ("agent.sock", "metrics.sock"):
            assert ask(lab, node.name, "/healthz", socket) == (200, "ok\n")
            assert ask(lab, node.name, "/readyz", socket) == (200, "ok\n")
        assert (lab.folder.member(node.name) / "run/agent.sock").stat().st_mode & 0o777 == 0o600
        check(ask(lab, node.name, "/metrics", "metrics.sock")[1].encode())
        found = check(ask(lab, node.name, "/metrics")[1].encode())
        assert list(found["underlay_bgp_session_up"].values()) == [1, 1]
        assert found["underlay_bgp_prefixes_wanted"] == found["underlay_bgp_prefixes_sent"]
        for protocol in ("pods", "blocks", "imports"):
            routes = len(lab.routes(node.name, "proto", str(getattr(marks, f"PROTO_{protocol.upper()}"))))
            assert (
                sum(value(found, "underlay_agent_routes", protocol=protocol, family=f) for f in ("ipv4", "ipv6"))
                == routes
            )
        assert value(found, "underlay_agent_view_live") == 1
        assert value(found, "underlay_agent_last_good_whole") == 1
        assert 10 << 20 < value(found, "process_resident_memory_bytes") < 100 << 20


def test_bgp_is_seen_on_a_node(lab: Lab) -> None:
    said = lab.inside("node-1", "underlayctl", "bgp", "peers", "--peer", "node-1-tor-1-v4")
    assert "Established" in said.splitlines()[0]
    assert "  families: ipv4 unicast; hold time 9 s; router id 10.255.1.1" in said.splitlines()
    eventually(lambda: lab.inside("node-1", "underlayctl", "bgp", "diff").startswith("nothing differs: "))
    (far, *_) = (b for b in blocks(lab)["node-3"] if ":" not in b)
    (path,) = json.loads(lab.inside("node-1", "underlayctl", "bgp", "routes", "--prefix", far, "-o", "json"))["routes"]
    assert (path["state"], path["in_kernel"], path["as_path"]) == ("best", True, [65001, 65000, 65002, 65102])


def test_a_cut_link_is_seen_and_mended(lab: Lab) -> None:
    ping = Ping(lab, "pod-1-1", "pod-3-1")
    lab.command("link", "cut", "node-1", "tor-1")
    try:
        done = lab.command("matrix", "--wait", "0", check=False)
        last = LAST_LINE.match(done.stdout.splitlines()[-1])
        assert last and done.returncode == 1
        # The three pods of node-1 reach each other only.
        assert int(last["answered"]) == 2 * (3 * 2 + 9 * 8)
        assert not next(link for link in lab.state().links if {link.a, link.b} == {"node-1", "tor-1"}).up
        assert "╳" in lab.command("status").stdout
        # The ToR is waited for, and named; after its restart time nobody waits any more.
        eventually(lambda: "is waited for" in ask(lab, "node-1", "/readyz")[1])
        assert ask(lab, "node-1", "/readyz")[0] == 503
        assert ask(lab, "node-1", "/healthz")[0] == 200

        def up() -> set[float]:
            return set(check(ask(lab, "node-1", "/metrics")[1].encode())["underlay_bgp_session_up"].values())

        eventually(lambda: up() == {0})
    finally:
        lab.command("link", "mend", "tor-1", "node-1")
    lab.whole(limit=60)
    eventually(lambda: ask(lab, "node-1", "/readyz") == (200, "ok\n"))
    # What the tests above found nothing of, is found here.
    assert all(lost > 10 for lost in ping.lost())


# -- many pods --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_pods_come_and_go_300_times_from_16_at_once(lab: Lab) -> None:
    begin = facts(lab)
    live: dict[str, str] = {}
    lock = Lock()

    def one(number: int) -> None:
        name = f"pod-{number % 4 + 1}-{100 + number}"
        added = client.ask(lab.folder, PodAdd(name), PodState)
        with lock:
            for address in added.addresses:
                assert address not in live, f"{address} of {name} is in use by {live[address]}"
                live[address] = name
        with lock:
            for address in added.addresses:
                del live[address]
        client.ask(lab.folder, PodDel(name), type(None))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, range(300)))
    eventually(lambda: consistent(lab), every=0.5)
    # A block that the rush needed goes back once the addresses have rested: 30 s, then 5 s.
    eventually(lambda: facts(lab) == begin, limit=120, every=1)


def facts(lab: Lab) -> dict[str, object]:
    """Everything that pods leave: in the store, journals, kernels and BIRD."""
    state = lab.state()
    found: dict[str, object] = {"blocks": blocks(lab), "pods": [(n.name, n.pods) for n in state.nodes]}
    for node in state.nodes:
        found[f"routes {node.name}"] = sorted(
            (r["dst"], r["protocol"]) for r in lab.routes(node.name) if int(r["protocol"]) in OURS
        )
        found[f"links {node.name}"] = len(json.loads(lab.inside(node.name, "ip", "-j", "link")))
        found[f"journal {node.name}"] = sorted(journal(lab, node.name))
    for router in MAP.routers:
        found[f"bird {router.name}"] = sorted(r for r in bird_routes(lab, router.name) if in_a_pool(r))
    found["store"] = sorted(allocations(lab))
    return found


def consistent(lab: Lab) -> bool:
    """Pods, store, journals, kernels and BIRD say the same."""
    state = lab.state()
    addresses = {a for node in state.nodes for pod in node.pods for a in pod.addresses}
    assert allocations(lab) == addresses
    everything = {block for node in state.nodes for block in node.blocks}
    for node in state.nodes:
        own = {a for pod in node.pods for a in pod.addresses}
        assert journal(lab, node.name) == own
        pods = {r["dst"].split("/")[0] for r in lab.routes(node.name, "protocol", str(PROTO_PODS))}
        assert pods == own
        veths = [x for x in json.loads(lab.inside(node.name, "ip", "-j", "link")) if x["ifname"].startswith("ul")]
        assert len(veths) == len(node.pods)
        assert {r["dst"] for r in lab.routes(node.name, "protocol", str(PROTO_BLOCKS))} == set(node.blocks)
    for router in MAP.routers:
        assert {r for r in bird_routes(lab, router.name) if in_a_pool(r)} == everything
    return True


def journal(lab: Lab, node: str) -> set[str]:
    """Addresses that the node's journal says are handed out."""
    (path,) = (lab.folder.member(node) / "run").glob("journal-*")
    held: dict[tuple[str, ...], list[str]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line.partition(" ")[2])
        if record["do"] == "take":
            held[tuple(record["attachment"].values())] = record["addresses"]
        elif record["do"] == "free":
            held.pop(tuple(record["attachment"].values()), None)
    return {address for addresses in held.values() for address in addresses}


def allocations(lab: Lab) -> set[str]:
    said = lab.inside("node-1", "underlayctl", "get", "blocks", "-o", "json")
    return {a["address"] for block in json.loads(said)["items"] for a in block.get("status", {}).get("allocations", ())}


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("exec", "node-9", "true"), "nothing here is called node-9"),
        (("pod", "add", "pod-9-1"), "no node is called node-9"),
        (("pod", "add", "web"), "pod-NODE-NUMBER"),
        (("pod", "add", "pod-1-1"), "there already"),
        (("pod", "del", "pod-1-9"), "not there"),
        (("kill", "node-9", "agent"), "no node is called node-9"),
        (("kill", "node-1", "agent", "--signal", "NONE"), "no such signal"),
        (("link", "cut", "node-1", "tor-2"), "no link between node-1 and tor-2"),
        (("visitor", "come"), "racks have ToRs of their own"),
    ],
)
def test_a_wrong_name_is_told_what_there_is(lab: Lab, words: tuple[str, ...], told: str) -> None:
    done = lab.command(*words, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_exec_gives_the_exit_code_and_the_nodes_settings(lab: Lab) -> None:
    assert lab.command("exec", "pod-1-1", "sh", "-c", "exit 7", check=False).returncode == 7
    assert lab.inside("node-2", "sh", "-c", "echo $UNDERLAY_NODE").strip() == "node-2"
    assert "BIRD 2" in lab.inside("spine-1", "birdc", "show", "status")
