"""Peers that send what no peer should: malformed and hostile messages, byte by byte, from a socket.

Whatever comes costs the session that it came by, at most: ExaBGP lives, no other session goes down, the routes that
are let in are those that the rules let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import random
import struct

from agent.bgp.model import SessionDown, SessionUp
from agent.rib import Refusal, Rib
from lab.net import Net
from tests.bgp.conftest import Node, run, until
from tests.bgp.hostile import CANARY, Rack
from tests.bgp.raw import (
    AS_PATH,
    CLUSTER_LIST,
    COMMUNITY,
    END_OF_RIB,
    END_OF_RIB_6,
    KEEPALIVE,
    LARGE_COMMUNITY,
    LOCAL_PREF,
    MED,
    MP_REACH,
    MP_UNREACH,
    NEXT_HOP,
    NOTIFICATION,
    OPEN,
    OPTIONAL,
    ORIGIN,
    ORIGINATOR_ID,
    REFRESH,
    TRANSITIVE,
    UPDATE,
    as_path,
    attribute,
    message,
    mp_reach,
    next_hop,
    nlri,
    origin,
    sequence,
    update,
    usual,
)
from tests.bgp.routers import NODE4, NODE6, NODE_AS, TOR6, TOR_AS, Bird

#: What each case says something of.
PREFIX, SIX = "10.245.0.0/26", "fd00:10:245::/64"
IT, IT6 = nlri(PREFIX), nlri(SIX)
HOP6 = ipaddress.ip_address(TOR6).packed
BOTH_WAYS = OPTIONAL | TRANSITIVE

#: What becomes of it: the session is reset; the prefix is let in; it is nowhere to be seen; it is refused, and why.
RESET, TAKEN, NOTHING = "reset", "taken", "nothing"


def _path(value: bytes) -> bytes:
    return update(origin() + attribute(AS_PATH, value) + next_hop(), IT)


def _six(hop: bytes, prefix: bytes = IT6, *, said: int | None = None, afi: int = 2) -> bytes:
    return update(origin() + as_path() + mp_reach(prefix, hop, afi, said=said))


def _with(code: int, value: bytes, flags: int = BOTH_WAYS) -> bytes:
    return update(usual() + attribute(code, value, flags), IT)


CASES: dict[str, tuple[bytes, str | Refusal]] = {
    "a good one": (update(usual(), IT), TAKEN),
    # Lengths that lie.
    "an attribute longer than the rest": (update(usual() + attribute(MED, b"\0\0\0\1", length=200), IT), NOTHING),
    "attributes longer than the message": (message(UPDATE, struct.pack("!HH", 0, 500) + usual() + IT), RESET),
    "withdrawals longer than the message": (message(UPDATE, struct.pack("!H", 5000) + usual() + IT), RESET),
    "no room for lengths": (message(UPDATE, b"\0\0\0"), RESET),
    "a header of 18 bytes": (message(UPDATE, b"\0\0\0\0", length=18), RESET),
    "a header of 65535 bytes": (message(UPDATE, b"\0\0\0\0", length=65535), RESET),
    "a marker of zeroes": (b"\0" * 16 + struct.pack("!HB", 23, UPDATE) + b"\0" * 4, RESET),
    "a message of no type": (message(77), RESET),
    # Prefixes.
    "a length of 33": (update(usual(), b"\x21\x0a\xf5\0\0\0"), RESET),
    "a length of 255": (update(usual(), b"\xff" + b"\x0a" * 32), RESET),
    "an IPv6 length of 129": (_six(HOP6, b"\x81" + b"\xfd" * 17), RESET),
    "a prefix cut short": (update(usual(), IT + b"\x18\x0a"), RESET),
    "a withdrawal cut short": (update(withdrawn=b"\x18\x0a"), RESET),
    "a default route": (update(usual(), b"\0"), NOTHING),
    "bits outside of the mask": (update(usual(), b"\x14\x0a\xf5\xff"), NOTHING),
    # The path.
    "an empty AS_PATH": (_path(b""), Refusal.FirstASNotPeer),
    "no AS_PATH": (update(origin() + next_hop(), IT), Refusal.FirstASNotPeer),
    "a segment of no AS": (_path(b"\x02\0"), Refusal.FirstASNotPeer),
    "a segment cut short": (_path(sequence(TOR_AS, count=9)), NOTHING),
    "a segment of no kind": (_path(sequence(TOR_AS, kind=9)), NOTHING),
    "a byte after the last segment": (_path(sequence(TOR_AS) + b"\x02"), NOTHING),
    "an AS_SET": (_path(sequence(TOR_AS) + sequence(1, 2, kind=1)), Refusal.ASSet),
    "our AS in the path": (update(usual(path=(TOR_AS, NODE_AS)), IT), Refusal.OwnASInPath),
    "another's AS first": (update(usual(path=(7, TOR_AS)), IT), Refusal.FirstASNotPeer),
    "765 AS numbers": (_path(sequence(*[TOR_AS] * 255) * 3), TAKEN),
    # The next hop.
    "no next hop": (update(origin() + as_path(), IT), Refusal.NextHopInvalid),
    "no attributes": (update(b"", IT), Refusal.FirstASNotPeer),
    "a next hop of three bytes": (update(origin() + as_path() + attribute(NEXT_HOP, b"\x0a\0\1"), IT), NOTHING),
    "a next hop of no bytes": (update(origin() + as_path() + attribute(NEXT_HOP, b""), IT), NOTHING),
    "next hop 0.0.0.0": (update(usual("0.0.0.0"), IT), Refusal.NextHopInvalid),
    "a multicast next hop": (update(usual("224.0.0.5"), IT), Refusal.NextHopInvalid),
    "a loopback next hop": (update(usual("127.0.0.1"), IT), Refusal.NextHopInvalid),
    "our own address": (update(usual(NODE4), IT), Refusal.NextHopIsSelf),
    "a next hop off-link": (update(usual("10.9.0.1"), IT), Refusal.NextHopNotOnLink),
    "a pod": (update(usual("10.244.0.5"), IT), Refusal.NextHopNotOnLink),
    # MP_REACH_NLRI.
    "an MP next hop of 5 bytes": (_six(b"\1" * 5), RESET),
    "an MP next hop of no bytes": (_six(b""), RESET),
    "an MP next hop longer than all": (_six(HOP6, said=255), RESET),
    "an IPv4 next hop for IPv6": (_six(b"\x0a\0\1\2"), RESET),
    "next hop ::": (_six(b"\0" * 16), Refusal.NextHopInvalid),
    "an IPv6 multicast next hop": (_six(ipaddress.ip_address("ff02::1").packed), Refusal.NextHopInvalid),
    "our own IPv6 address": (_six(ipaddress.ip_address(NODE6).packed), Refusal.NextHopIsSelf),
    "a mapped next hop": (_six(ipaddress.ip_address("::ffff:10.0.1.2").packed), Refusal.NextHopNotOnLink),
    "a family that nobody negotiated": (_six(HOP6, afi=99), RESET),
    "two MP_REACH_NLRI": (update(origin() + as_path() + mp_reach(IT6, HOP6) * 2), RESET),
    "an MP_REACH_NLRI of three bytes": (update(origin() + attribute(MP_REACH, b"\0\2\1", OPTIONAL)), RESET),
    "an MP_UNREACH_NLRI of one byte": (update(attribute(MP_UNREACH, b"\0", OPTIONAL)), RESET),
    "an MP_REACH_NLRI that is transitive": (update(attribute(MP_REACH, b"\0\2\1\x10", TRANSITIVE)), RESET),
    # Other attributes.
    "an ORIGIN of no kind": (update(origin(9) + as_path() + next_hop(), IT), TAKEN),
    "an ORIGIN of no bytes": (update(attribute(ORIGIN, b"") + as_path() + next_hop(), IT), NOTHING),
    "an optional ORIGIN": (update(attribute(ORIGIN, b"\0", OPTIONAL) + as_path() + next_hop(), IT), NOTHING),
    "twice the same": (update(usual() + next_hop("10.0.1.99") + as_path(1, 2), IT), TAKEN),
    "well-known and unknown": (_with(99, b"abc", TRANSITIVE), TAKEN),
    "unknown, with a quote": (_with(99, b'"}\\\0\xff\n{'), TAKEN),
    "attribute 0": (_with(0, b"abc"), TAKEN),
    "900 attributes": (update(usual() + attribute(99, b"", OPTIONAL) * 900, IT), TAKEN),
    "a community and a half": (_with(COMMUNITY, b"abcdef"), NOTHING),
    "4 KB of communities": (_with(COMMUNITY, b"\xff\xff\0\1" * 980), TAKEN),
    "half a large community": (_with(LARGE_COMMUNITY, b"abcdef"), NOTHING),
    "a MED of three bytes": (_with(MED, b"abc", OPTIONAL), NOTHING),
    "LOCAL_PREF from outside": (_with(LOCAL_PREF, b"\xff" * 4, TRANSITIVE), TAKEN),
    "half an ORIGINATOR_ID": (_with(ORIGINATOR_ID, b"\x0a\0", OPTIONAL), RESET),
    "our ORIGINATOR_ID": (_with(ORIGINATOR_ID, b"\x0a\0\1\1", OPTIONAL), Refusal.OwnOriginator),
    "half a CLUSTER_LIST": (_with(CLUSTER_LIST, b"\x0a\0", OPTIONAL), RESET),
    # Other messages.
    "End-of-RIB in the middle": (update(usual(), IT) + END_OF_RIB + END_OF_RIB_6 + END_OF_RIB, TAKEN),
    "an OPEN in the middle": (message(OPEN, b"\4\xfd\xe9\0\x09\x0a\x09\x09\x09\0"), NOTHING),
    "a NOTIFICATION of garbage": (message(NOTIFICATION, b'\xee\xee\xff\xfe"\\\0}{' * 9), RESET),
    "a NOTIFICATION of one byte": (message(NOTIFICATION, b"\1"), RESET),
    "a ROUTE-REFRESH of three bytes": (message(REFRESH, b"\0\1\0"), RESET),
    "a ROUTE-REFRESH for nothing": (message(REFRESH, b"\xff\1\x63\1"), RESET),
}


def test_malformed_messages_cost_their_own_session_at_most(net: Net, bird: Bird, node: Node) -> None:
    rack = Rack(net, node, bird, len(CASES))

    async def main() -> None:
        async with rack.running():
            for raw, (said, _) in zip(rack.raws, CASES.values(), strict=True):
                await raw.say(said)
                with contextlib.suppress(OSError):  # where it is reset at once
                    await raw.say(rack.canary(raw), message(KEEPALIVE))

            def through() -> bool:
                """Each has said the canary behind it, in this session or, where that was reset, in the next."""
                for raw, (_, becomes) in zip(rack.raws, CASES.values(), strict=True):
                    if raw.ups < (2 if becomes is RESET else 1):
                        return False
                rib, _ = rack.seen()
                return all(rib.peers[r.address].up and CANARY in rib.peers[r.address].routes for r in rack.raws)

            # What came before the canary is in the RIB: it is one stream.
            await until(through, every=0.2)
            _, selection = rack.seen()
            became: dict[str, object] = {}
            for raw, name in zip(rack.raws, CASES, strict=True):
                alone = Rib()
                alone.configure(rack.policy.peers, 0.0)
                for event in rack.events:
                    if event.peer == raw.address:  # type: ignore[union-attr]
                        alone.apply(event, 0.0)
                best = alone.select(rack.policy).best
                refused = selection.refused[raw.address]
                found = refused.get(PREFIX) or refused.get(SIX)
                taken = TAKEN if PREFIX in best or SIX in best else NOTHING
                became[name] = RESET if raw.ups > 1 else found or taken
                assert best.keys() <= {PREFIX, SIX, CANARY}, name
            assert became == {name: becomes for name, (_, becomes) in CASES.items()}
            assert all(e.reason for e in rack.events if isinstance(e, SessionDown))
            await rack.sound()

    run(main(), 120)


def test_noise(net: Net, bird: Bird, node: Node) -> None:
    """Good messages with some bytes changed, cut or doubled, at random; the seed is printed."""
    seed = int(os.environ.get("UNDERLAY_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    rounds = int(os.environ.get("UNDERLAY_ROUNDS", "12"))
    print(f"UNDERLAY_SEED={seed}")
    dice = random.Random(seed)
    rack = Rack(net, node, bird, 12)
    seeds = [said for said, _ in CASES.values() if len(said) > 19]

    def spoiled() -> bytes:
        said = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(19, len(said)) if len(said) > 19 else 0
            match dice.randrange(4):
                case 0:
                    said[at] = dice.randrange(256)
                case 1:
                    said[at] ^= 1 << dice.randrange(8)
                case 2:
                    del said[at : at + dice.randint(1, 8)]
                case _:
                    said[at:at] = said[at : at + dice.randint(1, 40)]
        # Mostly with a header that fits, or every second one would end there.
        return bytes(said) if dice.random() < 0.1 else message(said[18] if len(said) > 18 else UPDATE, bytes(said[19:]))

    async def main() -> None:
        async with rack.running():
            for _ in range(rounds):
                for raw in rack.raws:
                    with contextlib.suppress(OSError):
                        await raw.say(*(spoiled() for _ in range(dice.randint(1, 5))))
                await asyncio.sleep(0.1)
            ups = [raw.ups for raw in rack.raws]
            await until(lambda: all(r.up for r in rack.raws))
            print(f"sessions of the noisy peers: {ups}")
            await rack.sound()

    run(main(), 120)


def _opening(
    *capabilities: bytes, asn: int = TOR_AS, hold: int = 9, version: int = 4, router: bytes = b"\x0a\x09\x09\x09"
) -> bytes:
    said = b"".join(capabilities)
    parameters = b"\2" + bytes([len(said)]) + said if said else b""
    return message(OPEN, struct.pack("!BHH", version, asn, hold) + router + bytes([len(parameters)]) + parameters)


FOUR = b"\x41\4" + struct.pack("!I", TOR_AS)
#: What is said for an OPEN, and whether a session comes of it.
OPENINGS: dict[str, tuple[bytes, bool]] = {
    "a good one": (_opening(FOUR), True),
    "without capabilities": (_opening(), True),
    "unknown capabilities": (_opening(*[b'\xc8\3\xff"{'] * 30, FOUR), True),
    "the AS of somebody else": (_opening(asn=65002), False),
    "AS 0": (_opening(asn=0), False),
    "a hold time of 1": (_opening(FOUR, hold=1), False),
    "version 3": (_opening(FOUR, version=3), False),
    "router id 0.0.0.0": (_opening(FOUR, router=b"\0\0\0\0"), False),
    "a capability longer than all": (_opening(b"\x41\xc8\0\0\0\1"), False),
    "an AS of three bytes": (_opening(b"\x41\3\0\0\1"), False),
    "half a family": (_opening(b"\1\3\0\1\0", FOUR), False),
    "half a restart time": (_opening(b"\x40\1\0", FOUR), False),
    "half a next hop's family": (_opening(b"\5\5\0\1\0\1\0", FOUR), False),
    "a name that is none": (_opening(b'\x49\5\xff\xfe"{\\', FOUR), False),
    "two": (_opening(FOUR) * 2, False),
    "an UPDATE": (update(usual(), IT), False),
    "HTTP": (b"GET / HTTP/1.0\r\n\r\n" * 2, False),
    "one byte": (message(OPEN, b"\4"), False),
}


def test_openings_that_are_none(net: Net, bird: Bird, node: Node) -> None:
    rack = Rack(net, node, bird, len(OPENINGS))
    for raw, (said, _) in zip(rack.raws, OPENINGS.values(), strict=True):
        raw.opening = said

    async def main() -> None:
        async with rack.running(up=False):

            def tried() -> bool:
                """Each came up, or was refused twice."""
                ups = {e.peer for e in rack.events if isinstance(e, SessionUp)}
                return all(raw.address in ups or raw.attempts > 2 for raw in rack.raws)

            await until(tried)
            ups = {e.peer for e in rack.events if isinstance(e, SessionUp)}
            became = {name: raw.address in ups for name, raw in zip(OPENINGS, rack.raws, strict=True)}
            assert became == {name: comes for name, (_, comes) in OPENINGS.items()}
            await rack.sound()

    run(main(), 120)
