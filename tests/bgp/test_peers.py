"""What a BGPPeer says of its session, with real routers: passwords, TTL security, local AS, who connects."""

from __future__ import annotations

import base64

import pytest
from msgspec.structs import replace

from agent.bgp.model import Session
from tests.bgp.conftest import SESSIONS, Node, announce, run, session, until
from tests.bgp.routers import NODE_AS, TOR6, Router

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
            await until(lambda: router.table().keys() == PREFIXES, limit=20)
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

    run(main())


def test_an_open_session_does_not_stand_in_for_one_with_a_password(bird: Router, node: Node) -> None:
    async def main() -> None:
        bird.start([])
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(BLOCKS)
            driver.set_sessions(SESSIONS)
            await until(lambda: bird.table().keys() == PREFIXES, limit=20)
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
            await until(lambda: router.paths() == {"fd00:10:244::/122": (64999,)}, limit=20)
            await until(lambda: driver.state().confirmed == {(TOR6, "fd00:10:244::/122")})

    run(main())


def test_a_peer_that_is_waited_for_connects(bird: Router, node: Node) -> None:
    async def main() -> None:
        bird.start([])
        node.start()
        async with node.driver() as (driver, _):
            driver.set_announcements(BLOCKS)
            driver.set_sessions(frozenset({session("4", passive=True), session("6", passive=True)}))
            await until(lambda: bird.table().keys() == PREFIXES, limit=20)
            assert set(bird.paths().values()) == {(NODE_AS,)}

    run(main())
