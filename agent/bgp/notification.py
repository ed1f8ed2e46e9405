"""NOTIFICATION messages and the ends of sessions in words. Pure.

Names of codes: IANA's registry of BGP parameters, "BGP Error (Notification) Codes" and their subcodes. What the other
end wrote is shown without control characters: it ends in people's terminals.
"""

from __future__ import annotations

import re
from typing import Any, Final

from agent.bgp.model import Notification

CODES: Final = {
    1: "Message Header Error",
    2: "OPEN Message Error",
    3: "UPDATE Message Error",
    4: "Hold Timer Expired",
    5: "Finite State Machine Error",
    6: "Cease",
    7: "ROUTE-REFRESH Message Error",
    8: "Send Hold Timer Expired",
}

SUBCODES: Final = {
    # RFC 4271, 6.1
    (1, 1): "Connection Not Synchronized",
    (1, 2): "Bad Message Length",
    (1, 3): "Bad Message Type",
    # RFC 4271, 6.2; RFC 5492; RFC 9234
    (2, 1): "Unsupported Version Number",
    (2, 2): "Bad Peer AS",
    (2, 3): "Bad BGP Identifier",
    (2, 4): "Unsupported Optional Parameter",
    (2, 6): "Unacceptable Hold Time",
    (2, 7): "Unsupported Capability",
    (2, 11): "Role Mismatch",
    # RFC 4271, 6.3
    (3, 1): "Malformed Attribute List",
    (3, 2): "Unrecognized Well-known Attribute",
    (3, 3): "Missing Well-known Attribute",
    (3, 4): "Attribute Flags Error",
    (3, 5): "Attribute Length Error",
    (3, 6): "Invalid ORIGIN Attribute",
    (3, 8): "Invalid NEXT_HOP Attribute",
    (3, 9): "Optional Attribute Error",
    (3, 10): "Invalid Network Field",
    (3, 11): "Malformed AS_PATH",
    # RFC 6608
    (5, 1): "Receive Unexpected Message in OpenSent State",
    (5, 2): "Receive Unexpected Message in OpenConfirm State",
    (5, 3): "Receive Unexpected Message in Established State",
    # RFC 4486; RFC 8538; RFC 9384
    (6, 1): "Maximum Number of Prefixes Reached",
    (6, 2): "Administrative Shutdown",
    (6, 3): "Peer De-configured",
    (6, 4): "Administrative Reset",
    (6, 5): "Connection Rejected",
    (6, 6): "Other Configuration Change",
    (6, 7): "Connection Collision Resolution",
    (6, 8): "Out of Resources",
    (6, 9): "Hard Reset",
    (6, 10): "BFD Down",
    # RFC 7313
    (7, 1): "Invalid Message Length",
}

#: ExaBGP's reasons that say little to people, and what is meant.
_REASONS: Final = {
    "closing connection": "the connection was closed without a NOTIFICATION",
    "graceful restarted negotiated, closing without sending any notification": (
        "we closed it silently, as for a graceful restart: its configuration changed"
    ),
    "stop, message [removed]": "its configuration changed or was removed",
}

_SHUTDOWN_TEXT: Final = re.compile(r'Shutdown Communication: "(.*)"', re.DOTALL)
_SHUTDOWN_HEX: Final = re.compile(r"invalid Shutdown Communication .*\[(0x[0-9A-Fa-f]*)\]", re.DOTALL)
_REASON: Final = re.compile(r"notification (sent|received) \((\d+),(\d+)\)")
#: Signs of the other end's text that are shown.
_TEXT: Final = 300


def read(told: Any, reason: str = "") -> Notification | None:
    """The NOTIFICATION as the relay tells it (see ``agent.bgp.past``); of a relay that tells none, what ExaBGP's
    ``reason`` says. None if there was none."""
    if not isinstance(told, dict):
        found = _REASON.match(reason)
        return found and Notification(sent=found[1] == "sent", code=int(found[2]), subcode=int(found[3]))
    code, subcode, sent = int(told["code"]), int(told["subcode"]), told["direction"] == "send"
    data = _bytes(str(told["data"]))
    return Notification(sent=sent, code=code, subcode=subcode, text=_text(code, subcode, data, sent=sent))


def words(notification: Notification) -> str:
    """``the peer said: Cease, Administrative Shutdown: "maintenance of rack 7"``."""
    who = "we said" if notification.sent else "the peer said"
    text = f": {notification.text}" if notification.text else ""
    return f"{who}: {name(notification.code, notification.subcode)}{text}"


def name(code: int, subcode: int) -> str:
    """``OPEN Message Error, Bad Peer AS``; numbers where there is no name."""
    what = CODES.get(code, f"error code {code}")
    if not subcode:
        return what
    return f"{what}, {SUBCODES.get((code, subcode), f'subcode {subcode}')}"


def reason_in_words(reason: str, notification: Notification | None) -> str:
    """Why a session or a connection ended: what was said if anything was, else what ExaBGP gives as its reason."""
    return words(notification) if notification else _REASONS.get(reason, printable(reason))


def printable(text: str) -> str:
    """The text on one line, without what a terminal would obey."""
    shown = "".join(c if c.isprintable() else " " for c in text[:_TEXT]).strip()
    return f"{shown}..." if len(text) > _TEXT else shown


def _text(code: int, subcode: int, data: bytes, *, sent: bool) -> str:
    if (code, subcode) in ((6, 2), (6, 4)):
        return _shutdown(data, SUBCODES[code, subcode], sent=sent)
    if (code, subcode) == (6, 9) and len(data) >= 2:
        # RFC 8538, section 3: the true reason is inside.
        inner = _text(data[0], data[1], data[2:], sent=True)
        return name(data[0], data[1]) + (f": {inner}" if inner else "")
    if (code, subcode) == (6, 1) and len(data) == 7:
        # RFC 4486, section 4: family and upper bound.
        family = {1: "ipv4", 2: "ipv6"}.get(int.from_bytes(data[:2], "big"), "another family")
        return f"at most {int.from_bytes(data[3:], 'big')} of {family}"
    if not data or data.decode("ascii", "replace") in (CODES.get(code), SUBCODES.get((code, subcode))):
        return ""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    return printable(text) if text.isprintable() else f"data 0x{data[:32].hex()}"


def _shutdown(data: bytes, usual: str, *, sent: bool) -> str:
    """The shutdown communication (RFC 9003), in quotes. ExaBGP puts words of its own around one that it received."""
    text = data.decode("utf-8", "replace")
    if sent:
        text = data[1 : 1 + data[0]].decode("utf-8", "replace") if data else ""
    elif found := _SHUTDOWN_TEXT.search(text):
        text = found[1]
    elif found := _SHUTDOWN_HEX.search(text):
        text = _bytes(found[1]).decode("utf-8", "replace")
    elif text.startswith("empty"):
        text = ""
    return "" if text in ("", usual) else f'"{printable(text)}"'


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        return b""
