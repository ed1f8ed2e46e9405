"""ExaBGP's configuration from the sessions wanted. Pure.

One bad neighbor makes ExaBGP refuse the whole file, so each session is looked at alone first (R13): ``problem`` says
what is wrong with one, ``render`` is given only those that passed.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Iterable, Sequence

from agent.bgp.model import Session
from agent.bgp.wire import FAMILIES, MARK

_PROCESS = "relay"
#: Bytes of a TCP MD5 key (linux/tcp.h, TCP_MD5SIG_MAXKEYLEN).
MD5_LENGTH = 80


def problem(session: Session) -> str:
    """What is wrong with this session and what to write instead; empty if ExaBGP can take it."""
    try:
        peer = ipaddress.ip_address(session.address)
    except ValueError:
        return f"address {session.address!r} is not an IP address: write the peer's address without a port"
    if str(peer) != session.address:
        return f"address {session.address!r} is not in canonical form: write {peer}"
    try:
        local = ipaddress.ip_address(session.local_address)
    except ValueError:
        return f"local address {session.local_address!r} is not an IP address"
    if local.version != peer.version:
        return f"local address {local} and peer {peer} are of different families: use an address of the peer's"
    if local == peer:
        return f"peer {peer} is this node's own address"
    if peer.is_link_local:
        return f"peer {peer} is link-local: give the peer's global address"
    try:
        identifier = ipaddress.IPv4Address(session.router_id)
    except ValueError:
        return f"router id {session.router_id!r} is not written as an IPv4 address"
    if identifier == ipaddress.IPv4Address(0):
        return "router id 0.0.0.0 is not allowed (RFC 6286)"
    for name, number in (("AS", session.local_as), ("peer's AS", session.peer_as)):
        if not 1 <= number < 2**32 or number == 23456:
            return f"{name} number {number} is not usable: 1 to 4294967295 without 23456"
    if not 3 <= session.hold_time <= 65535:
        return f"hold time {session.hold_time} s is not usable: 3 to 65535"
    if not 0 <= session.restart_time <= 4095:
        return f"restart time {session.restart_time} s is not usable: 0 to 4095 (RFC 4724)"
    if not 1 <= session.port <= 65535:
        return f"port {session.port} is not usable: 1 to 65535"
    if not 0 <= session.hops <= 254:
        return f"hops {session.hops} are not usable: 1 to 254, or 0 for any"
    if session.hops and session.passive:
        return "a limit of hops does not go with waiting for the peer: its socket is every peer's"
    if session.secret or session.password:
        why = _password_problem(session)
        if why:
            return why
    if not session.families or any(f not in FAMILIES for f in session.families):
        return f"families {', '.join(session.families) or 'none'} are not usable: any of {', '.join(FAMILIES)}"
    return ""


def _password_problem(session: Session) -> str:
    """Without its value, of course."""
    if not session.password:
        return f"no password: {session.secret} is not there, or the agent may not read it"
    try:
        value = base64.b64decode(session.password, validate=True)
    except ValueError:
        return f"the password ({session.secret}) is not in base64"
    if not 1 <= len(value) <= MD5_LENGTH:
        return f"the password ({session.secret}) has {len(value)} bytes: TCP MD5 takes 1 to {MD5_LENGTH}"
    if any(byte < 32 or byte == 127 for byte in value):
        return f"the password ({session.secret}) has a control character, perhaps a line's end: take it out"
    return ""


def mark(sessions: Iterable[Session], command: Sequence[str]) -> str:
    """Names a configuration by its content: equal sessions and command give an equal mark. Empty for no sessions."""
    ordered = sorted(sessions)
    if not ordered:
        return ""
    text = "\n".join([" ".join(command), *(_neighbor(s, "") for s in ordered)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(sessions: Iterable[Session], command: Sequence[str]) -> str:
    """The whole file. ``command`` starts the relay. Every neighbor carries the mark of the whole (see ``mark``)."""
    ordered = sorted(sessions)
    name = mark(ordered, command)
    process = f"process {_PROCESS} {{\n    run {' '.join(command)};\n    encoder json;\n}}\n"
    return "\n".join([process, *(_neighbor(s, name) for s in ordered)])


def _neighbor(session: Session, name: str) -> str:
    # Only letters, digits and a few signs: a quote or brace in a peer's name would end the description.
    label = re.sub(r"[^A-Za-z0-9._-]", "-", session.name)[:64]
    lines = [
        f'description "{MARK}{name} {label}";',
        f"router-id {session.router_id};",
        f"local-address {session.local_address};",
        f"local-as {session.local_as};",
        f"peer-as {session.peer_as};",
        f"hold-time {session.hold_time};",
        # The relay says when the table is complete: an End-of-RIB of ExaBGP's own comes too early (fault 11).
        "manual-eor true;",
        # Received routes are the agent's to keep; it has them told again by route refresh.
        "adj-rib-in false;",
    ]
    if session.passive:
        lines += ["passive true;", f"listen {session.port};"]
    elif session.port != 179:
        lines.append(f"connect {session.port};")
    if session.hops:
        # The least TTL that is let in; ours goes out with 255 then.
        lines.append(f"incoming-ttl {256 - session.hops};")
    if session.password:
        # In base64, as any sign may stand in it.
        lines += ["md5-base64 true;", f'md5-password "{session.password}";']
    families = " ".join(f"{f};" for f in sorted(session.families))
    restart = f"graceful-restart {session.restart_time};" if session.restart_time else "graceful-restart disable;"
    lines += [
        f"family {{ {families} }}",
        f"capability {{ asn4 enable; route-refresh enable; {restart} }}",
        f"api {{ processes [ {_PROCESS} ]; neighbor-changes; "
        "receive { parsed; update; open; notification; refresh; } send { parsed; update; open; notification; } }",
    ]
    return "\n".join([f"neighbor {session.address} {{", *(f"    {line}" for line in lines), "}", ""])
