"""The source check: a pod sends only from its own addresses (decision 12).

One table of ours with one rule for all pods. It drops what comes in by a host veth and would not go back there: routes
to a veth are exactly its pod's addresses, and the link-local network of both ends. ADD and DEL have no part in it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

from cni import nft
from cni.marks import LINK_GROUP, LINK_GROUP_DOOMED, NFT_PRIORITY, NFT_TABLE
from cni.netlink import NLM_F_CREATE, Message, Netlink, NetlinkError, attributes
from ipam.model import News
from store.clock import Clock

log = logging.getLogger(__name__)

#: Seconds between two looks at whether the kernel's rules have changed.
INTERVAL: Final = 2.0
#: NETLINK_NETFILTER, which the socket module has no name for.
NETFILTER: Final = 12

_NAME: Final = nft.text(NFT_TABLE)
_CHAIN_NAME: Final = nft.text("prerouting")
_TABLE: Final[nft.Tree] = ((nft.TABLE_NAME, _NAME), (nft.TABLE_FLAGS, nft.u32(0)))
_CHAIN: Final[nft.Tree] = (
    (nft.CHAIN_TABLE, _NAME),
    (nft.CHAIN_NAME, _CHAIN_NAME),
    (nft.CHAIN_HOOK, ((nft.HOOK_NUMBER, nft.u32(nft.PRE_ROUTING)), (nft.HOOK_PRIORITY, nft.u32(NFT_PRIORITY)))),
    (nft.CHAIN_POLICY, nft.u32(nft.ACCEPT)),
    (nft.CHAIN_TYPE, nft.text("filter")),
)
_RULE: Final[nft.Tree] = (
    (nft.RULE_TABLE, _NAME),
    (nft.RULE_CHAIN, _CHAIN_NAME),
    (
        nft.RULE_EXPRESSIONS,
        nft.groups(LINK_GROUP, LINK_GROUP_DOOMED) + nft.no_way_back() + nft.counter() + nft.drop(),
    ),
    (nft.RULE_USERDATA, nft.comment("a pod sends only from its own addresses")),
)


class SourceCheck:
    """Keeps the table in the network namespace that its methods are called in. Never raises: what the kernel refuses is
    said in log and Event, and tried again; pods start all the same."""

    def __init__(self, clock: Clock, tell: Callable[[News], None]) -> None:
        self._clock = clock
        self._tell = tell
        self._generation = b""
        self._problem = ""
        #: Whether the kernel had the table, whole, at the last look.
        self.in_place = False

    async def run(self) -> None:
        """Looks again whenever the kernel's rules have changed. Until cancelled."""
        while True:
            await self._clock.sleep(INTERVAL)
            self.look()

    def look(self) -> None:
        """Puts the table there unless it is there, whole."""
        try:
            with Netlink(NETFILTER) as netlink:
                self._look(netlink)
        except (NetlinkError, OSError) as e:
            self._missing(e)
            return
        if self._problem:
            note = "the source check is in place: a pod sends only from its own addresses"
            log.info("%s", note)
            self._say(note, normal=True)
        self._problem = ""
        self.in_place = True

    def drops(self) -> int:
        """Packets dropped since the table was made; 0 without one."""
        try:
            with Netlink(NETFILTER) as netlink:
                rules = _rules(netlink)
        except (NetlinkError, OSError):
            return 0
        return sum(nft.packets(_attributes(rule).get(nft.RULE_EXPRESSIONS, b"")) or 0 for rule in rules)

    def _look(self, netlink: Netlink) -> None:
        # Read first: of what changes from here on, the next look hears.
        generation = _attributes(netlink.get(nft.message(nft.GETGEN)))[nft.GEN_ID]
        if self.in_place and generation == self._generation:
            return
        there = _table(netlink)
        if not _whole(netlink, there):
            if self.in_place:
                log.warning("somebody changed or removed the nftables table inet %s: it is made anew", NFT_TABLE)
            make(netlink)
        self._generation = generation

    def _missing(self, error: Exception) -> None:
        self.in_place = False
        problem = (
            f"nftables table inet {NFT_TABLE}: {error}; pods can send from any address. The kernel needs nf_tables and "
            "nft_fib_inet (modprobe), the server CAP_NET_ADMIN; --source-check off ends this message"
        )
        if problem != self._problem:
            log.warning("%s", problem)
        self._problem = problem
        self._say(problem, normal=False)

    def _say(self, note: str, *, normal: bool) -> None:
        self._tell(News("SourceCheckMissing", "CheckSources", f"over: {note}" if normal else note, normal=normal))


def make(netlink: Netlink) -> None:
    """Makes our table in the place of what has its name, in one transaction: no packet meets none. NetlinkError."""
    messages = [
        nft.message(nft.NEWTABLE, _TABLE, NLM_F_CREATE),
        nft.message(nft.NEWCHAIN, _CHAIN, NLM_F_CREATE),
        nft.message(nft.NEWRULE, _RULE, NLM_F_CREATE),
    ]
    if _table(netlink) is not None:
        messages.insert(0, _delete())
    netlink.transaction(nft.SUBSYSTEM, messages)


def is_there() -> bool:
    """Whether there is a table of our name. Raises NetlinkError, OSError; a kernel without nftables has none."""
    try:
        with Netlink(NETFILTER) as netlink:
            return _table(netlink) is not None
    except (NetlinkError, OSError) as e:
        if _is_without_nftables(e):
            return False
        raise


def remove() -> None:
    """Takes our table out; none there is no error, nor is a kernel without nftables. What else the kernel refuses is
    said in the log."""
    try:
        with Netlink(NETFILTER) as netlink:
            if _table(netlink) is not None:
                netlink.transaction(nft.SUBSYSTEM, (_delete(),))
                log.info("the source check is off: nftables table inet %s is removed", NFT_TABLE)
    except (NetlinkError, OSError) as e:
        if not _is_without_nftables(e):
            log.warning(
                "nftables table inet %s cannot be removed, pods are still held to their addresses: %s", NFT_TABLE, e
            )


def _is_without_nftables(error: NetlinkError | OSError) -> bool:
    # Without the subsystem: EINVAL (nfnetlink_rcv_msg); without nfnetlink there is no such socket.
    number = error.number if isinstance(error, NetlinkError) else error.errno
    return number in (errno.EINVAL, errno.EPROTONOSUPPORT)


def _delete() -> Message:
    return nft.message(nft.DELTABLE, ((nft.TABLE_NAME, _NAME),))


def _table(netlink: Netlink) -> Message | None:
    return _find(netlink, nft.message(nft.GETTABLE, ((nft.TABLE_NAME, _NAME),)))


def _whole(netlink: Netlink, table: Message | None) -> bool:
    if table is None or not _holds(_TABLE, table):
        return False
    names = ((nft.CHAIN_TABLE, _NAME), (nft.CHAIN_NAME, _CHAIN_NAME))
    chain = _find(netlink, nft.message(nft.GETCHAIN, names))
    rules = _rules(netlink)
    return chain is not None and _holds(_CHAIN, chain) and len(rules) == 1 and _holds(_RULE, rules[0])


def _rules(netlink: Netlink) -> list[Message]:
    """The rules of our chain."""
    names: nft.Tree = ((nft.RULE_TABLE, _NAME), (nft.RULE_CHAIN, _CHAIN_NAME))
    rules = netlink.dump(nft.message(nft.GETRULE, names))
    return [rule for rule in rules if _holds(names, rule)]


def _find(netlink: Netlink, request: Message) -> Message | None:
    try:
        return netlink.get(request)
    except NetlinkError as e:
        if e.number == errno.ENOENT:
            return None
        raise


def _holds(tree: nft.Tree, message: Message) -> bool:
    return nft.holds(tree, message.body[nft.HEADER.size :])


def _attributes(message: Message) -> dict[int, bytes]:
    return attributes(message.body, nft.HEADER.size)
