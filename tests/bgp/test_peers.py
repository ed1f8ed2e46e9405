"""What a BGPPeer says of its session, with real routers: passwords, TTL security, local AS, who connects."""

from __future__ import annotations

import base64
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.bgp.model import Event, Session, SessionUp, SpeakerState
from agent.fib import KernelState
from agent.plan import Snapshot, plan
from agent.rib import Rib
from lab.net import Net
from store.model import BGPPassword, Meta, Secret, SecretKeyRef
from tests.agent_fakes import bgp_peer, cluster, configuration, of_node
from tests.agent_fakes import node as a_node
from tests.bgp.conftest import SESSIONS, Node, announce, run, session, until
from tests.bgp.routers import NODE4, NODE6, NODE_AS, TOR4, TOR6, Router, wire

BLOCKS = frozenset({announce("10.244.0.0/26"), announce("fd00:10:244::/122")})
PREFIXES = {a.prefix for a in BLOCKS}


def secured(value: str, sessions: frozenset[Session] = SESSIONS) -> frozenset[Session]:
    """These sessions with a password; "": it is asked for and not there."""
    password = base64.b64encode(value.encode()).decode()
    return frozenset(replace(s, secret="Secret tor, key password", password=password) for s in sessions)


@pytest.mark.parametrize("password", ["hunter2", "deadbeef01"])
def test_a_password_is_used_and_kept_and_never_gone_without(router: Router, node: Node, password: str) -> None:
    """R13: without its password a peer that never had one has no session, and one that had one goes on."""

    async def main() -> None:
        router.start([], password=password)
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(BLOCKS)
            driver.set_sessions(secured(""))
            await until(lambda: len(driver.state().refused) == 2)
            assert all("Secret tor, key password is not there" in why for why in driver.state().refused.values())
            assert "neighbor" not in (node.folder / "exabgp.conf").read_text()
            driver.set_sessions(secured(password))
            await until(lambda: router.table().keys() == PREFIXES)
            assert driver.state().refused == {}
            before = (node.folder / "exabgp.conf").read_text()
            driver.set_sessions(secured(""))
            await until(lambda: len(driver.state().refused) == 2)
            assert (node.folder / "exabgp.conf").read_text() == before
        async with node.driver() as (driver, _):
            # Another agent, and the Secret still away.
            driver.set_announcements(BLOCKS)
            driver.set_sessions(secured(""))
            await until(lambda: len(driver.state().refused) == 2)
            assert (node.folder / "exabgp.conf").read_text() == before
            assert router.table().keys() == PREFIXES
        holders = {f.name for f in node.folder.iterdir() if f.is_file() and _tells(f, password)}
        assert holders == {"exabgp.conf", "sessions.json"}
        assert {(node.folder / name).stat().st_mode & 0o777 for name in holders} == {0o600}

    run(main())


def _tells(path: Path, password: str) -> bool:
    content = path.read_bytes()
    return password.encode() in content or base64.b64encode(password.encode()) in content


def test_an_open_session_does_not_stand_in_for_one_with_a_password(bird: Router, node: Node) -> None:
    async def main() -> None:
        bird.start([])
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(BLOCKS)
            driver.set_sessions(SESSIONS)
            await until(lambda: bird.table().keys() == PREFIXES)
            one, other = sorted(SESSIONS)
            driver.set_sessions(secured("", frozenset({one})) | {other})
            await until(lambda: driver.state().refused.keys() == {one.address})
            await until(lambda: f"neighbor {one.address} " not in (node.folder / "exabgp.conf").read_text())
            # The other peer is not touched.
            await until(lambda: {peer for peer, _ in driver.state().confirmed} == {other.address})

    run(main())


def test_ttl_security_and_local_as(router: Router, node: Node) -> None:
    async def main() -> None:
        router.start([], ttl_security=True, node_as=64999)
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(BLOCKS)
            # Both ends measure the TTL; without one of 255 the router does not hear us.
            driver.set_sessions(frozenset({session("4", local_as=64999), session("6", local_as=64999, hops=1)}))
            await until(lambda: router.paths() == {"fd00:10:244::/122": (64999,)})
            await until(lambda: driver.state().confirmed == {(TOR6, "fd00:10:244::/122")})

    run(main())


def test_a_peer_that_is_waited_for_connects(bird: Router, node: Node) -> None:
    async def main() -> None:
        bird.start([])
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(BLOCKS)
            driver.set_sessions(frozenset({session("4", passive=True), session("6", passive=True)}))
            await until(lambda: bird.table().keys() == PREFIXES)
            assert set(bird.paths().values()) == {(NODE_AS,)}

    run(main())


@pytest.mark.parametrize("mesh", [True, False], ids=["mesh", "peerSelector"])
def test_two_nodes_have_what_they_need_to_meet(net: Net, tmp_path: Path, node: Node, mesh: bool) -> None:
    """The sessions that each of them plans for itself, with a password and a port, fit together; also when the password
    changes, and when it goes."""
    wire(net)
    (tmp_path / "other").mkdir()
    other = Node(net, tmp_path / "other", "tor")
    ref = BGPPassword(secret_key_ref=SecretKeyRef(name="rack", key="k"))
    peer = bgp_peer("rack", "", as_number=0, peer_selector="rack == 'a'", node="node-1", password=ref)
    nodes = {
        "node-1": a_node("node-1", NODE4, NODE6, rack="a"),
        "node-2": a_node("node-2", TOR4, TOR6, rack="a"),
    }

    def sessions(name: str, password: bytes) -> frozenset[Session]:
        here = nodes[name]
        rack = Secret(metadata=Meta(name="rack", namespace="underlay-system"), data={"k": password})
        snapshot = Snapshot(
            node=name,
            now=0.0,
            cluster=cluster(
                node=here,
                nodes=tuple(n for n in nodes.values() if n != here),
                peers=() if mesh else (peer,),
                secrets=(rack,),
                configuration=configuration(node_to_node_mesh_enabled=mesh, node_mesh_password=ref, listen_port=1179),
                node_configurations=(of_node("node-2", listen_port=1180),),
            ),
            kernel=KernelState(),
            speaker=SpeakerState(known=True),
            rib=Rib(),
            link_name=lambda container, interface: "",
        )
        wanted = plan(snapshot).sessions
        assert wanted is not None
        assert len(wanted) == 2
        return wanted if password else frozenset(replace(s, secret="", password="") for s in wanted)

    async def main() -> None:
        node.start()
        other.start()
        async with node.driver() as (one, told_one), other.driver() as (two, told_two):
            for times, password in enumerate((b"hunter2", b"hunter3", b""), 1):
                one.set_sessions(sessions("node-1", password))
                two.set_sessions(sessions("node-2", password))
                for told, ends in ((told_one, {TOR4, TOR6}), (told_two, {NODE4, NODE6})):
                    await until(partial(came_up, told, ends, times))

    run(main())


def came_up(told: list[Event], ends: set[str], times: int) -> bool:
    """Whether each of these peers came up as often."""
    ups = Counter(e.peer for e in told if isinstance(e, SessionUp))
    return ups.keys() == ends and min(ups.values()) >= times
