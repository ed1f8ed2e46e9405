"""nftables' messages as far as the source check needs them: attributes as trees, packed and compared.

Names and numbers are those of the kernel's include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h. Numbers in attributes
are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from cni.netlink import Message, attr, iterate, nest

#: An attribute's kind, and what is in it: bytes, or attributes.
Tree = tuple[tuple[int, "bytes | Tree"], ...]

SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES
#: nfgenmsg: family, version, resource id.
HEADER: Final = struct.Struct(">BBH")
NFPROTO_INET: Final = 1

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN = 3, 4
NEWRULE, GETRULE = 6, 7
GETGEN: Final = 16

TABLE_NAME, TABLE_FLAGS = 1, 2
CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE = 1, 3, 4, 5, 7
HOOK_NUMBER, HOOK_PRIORITY = 1, 2
RULE_TABLE, RULE_CHAIN, RULE_EXPRESSIONS, RULE_USERDATA = 1, 2, 4, 7
GEN_ID: Final = 1
PRE_ROUTING, ACCEPT, DROP = 0, 1, 0

_NESTED: Final = 0x8000
_LIST_ELEM: Final = 1
_EXPR_NAME, _EXPR_DATA = 1, 2
_REGISTER: Final = 1
_VERDICT: Final = 0
_COUNTER_PACKETS: Final = 2
_META_IIFGROUP: Final = 21
_HOST_TO_NETWORK: Final = 1
_EQUAL, _AT_MOST, _AT_LEAST = 0, 3, 5
_FIB_OIF: Final = 1
_FIB_SOURCE, _FIB_IIF, _FIB_PRESENT = 0x01, 0x08, 0x20


def message(kind: int, tree: Tree = (), flags: int = 0) -> Message:
    """A request about the family inet."""
    return Message(SUBSYSTEM << 8 | kind, HEADER.pack(NFPROTO_INET, 0, 0) + pack(tree), flags)


def pack(tree: Tree) -> bytes:
    return b"".join(
        attr(kind, value) if isinstance(value, bytes) else nest(kind | _NESTED, pack(value)) for kind, value in tree
    )


def holds(tree: Tree, body: bytes) -> bool:
    """Whether the attributes of ``body`` say all that ``tree`` says, of each kind as many and in its order. Kinds that
    ``tree`` has not are the kernel's own: handles, counts, what a later kernel adds."""
    found = list(iterate(body))
    for kind in {kind for kind, _ in tree}:
        wanted = [value for k, value in tree if k == kind]
        there = [value for k, value in found if k == kind]
        if len(wanted) != len(there):
            return False
        for w, t in zip(wanted, there, strict=True):
            same = w == t if isinstance(w, bytes) else holds(w, t)
            if not same:
                return False
    return True


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def u32(value: int) -> bytes:
    return struct.pack(">i" if value < 0 else ">I", value)


def comment(value: str) -> bytes:
    """User data of a rule that nft(8) shows as its comment (NFTNL_UDATA_RULE_COMMENT of libnftnl)."""
    raw = text(value)
    return bytes((0, len(raw))) + raw


# -- expressions, as nft(8) makes them ---------------------------------------------------------------------------------


def groups(first: int, last: int) -> Tree:
    """``iifgroup FIRST-LAST``."""
    reg = u32(_REGISTER)
    return (
        _expression("meta", ((2, u32(_META_IIFGROUP)), (1, reg))),
        # Registers are compared as bytes: the number must be big-endian for it.
        _expression("byteorder", ((1, reg), (2, reg), (3, u32(_HOST_TO_NETWORK)), (4, u32(4)), (5, u32(4)))),
        _compare(_AT_LEAST, u32(first)),
        _compare(_AT_MOST, u32(last)),
    )


def no_way_back() -> Tree:
    """``fib saddr . iif oif missing``."""
    flags = u32(_FIB_SOURCE | _FIB_IIF | _FIB_PRESENT)
    return (
        _expression("fib", ((3, flags), (2, u32(_FIB_OIF)), (1, u32(_REGISTER)))),
        _compare(_EQUAL, u32(0)),
    )


def counter() -> Tree:
    return (_expression("counter", ()),)


def drop() -> Tree:
    return (_expression("immediate", ((1, u32(_VERDICT)), (2, ((2, ((1, u32(DROP)),)),)))),)


def packets(expressions: bytes) -> int | None:
    """What the first counter of a rule's expressions has counted; None if there is no counter."""
    for name, data in _expressions(expressions):
        if name == "counter":
            return int.from_bytes(dict(iterate(data)).get(_COUNTER_PACKETS, b""), "big")
    return None


def names(expressions: bytes) -> str:
    """What a rule is made of, expression by expression."""
    return " ".join(name for name, _ in _expressions(expressions))


def _compare(operation: int, value: bytes) -> tuple[int, Tree]:
    return _expression("cmp", ((1, u32(_REGISTER)), (2, u32(operation)), (3, ((1, value),))))


def _expression(name: str, data: Tree) -> tuple[int, Tree]:
    return _LIST_ELEM, ((_EXPR_NAME, text(name)), (_EXPR_DATA, data))


def _expressions(body: bytes) -> Iterator[tuple[str, bytes]]:
    for _, element in iterate(body):
        parts = dict(iterate(element))
        yield parts[_EXPR_NAME].rstrip(b"\0").decode(), parts.get(_EXPR_DATA, b"")
