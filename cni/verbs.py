"""The verbs, as ipam and podnet carry them out. What is said is in ``spec``; how it travels in ``server``.

Order is everything here. ADD: address into the journal, then the wiring, then the link's index into the journal. DEL:
routes out of the kernel and the link doomed, then the journal. So a kill at any point leaves either a journalled
address, which keeps it from others until it is given back, or nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from cni import look, podnet, rtnl, spec
from cni.errors import CNIError
from cni.marks import LINK_MAC
from cni.netlink import Netlink, NetlinkError
from cni.reaper import ReaperError
from cni.spec import Call, Refusal
from ipam.errors import Deleted, Exhausted, IPAMError, JournalError, WrongPool
from ipam.model import Attachment, Lease, Request
from ipam.node import NodeIPAM
from store.base import Store
from store.clock import Clock
from store.errors import NotFound, StoreError
from store.model import BGPNodeStatus

if TYPE_CHECKING:
    from cni.choice import Choice

log = logging.getLogger(__name__)

#: ``Verbs.carry_out``: a call and the pod's namespace, if there is one; what is to be printed, or Refusal.
CarryOut = Callable[[Call, int | None], Awaitable[bytes]]

#: Where a test may end the process: every point between two effects that outlive it.
STEPS: Final = (
    "add-journalled",
    "add-wired",
    "add-bound",
    "add-answered",
    "del-unwired",
    "del-journalled",
    "del-answered",
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds of the server's ``Clock``; where sysctls can be written."""

    carrier_limit: float = 2.0  # from wired to both ends with carrier; it takes none unless the machine is drowned
    carrier_every: float = 0.001
    mtu_age: float = 1.0  # the uplinks' MTU is looked at again after this
    store_limit: float = 1.0  # STATUS asks the store for the sessions' state
    reap_retry: float = 1.0
    sysctls: Path = podnet.SYSCTLS
    turns: int = 16  # calls of one attachment that may wait for each other


class Reaps(Protocol):
    """What removes doomed links without making us wait (``reaper.Reaper``)."""

    async def reap(self) -> None: ...


class Verbs:
    """Carries calls out. ``run`` must run beside it; ``step`` is told each of STEPS that is passed. ``choose`` says
    what the pod of a call wants (Refusal: it cannot be had, or is not known yet); without it pods may not choose."""

    def __init__(
        self,
        *,
        node: str,
        ipam: NodeIPAM,
        store: Store,
        netlink: Netlink,
        reaper: Reaps,
        clock: Clock,
        settings: Settings | None = None,
        step: Callable[[str], None] = lambda _: None,
        choose: Callable[[Call], Awaitable[Choice]] | None = None,
    ) -> None:
        self._node = node
        self._ipam = ipam
        self._store = store
        self._netlink = netlink
        self._reaper = reaper
        self._clock = clock
        self._settings = settings or Settings()
        self._step = step
        self._choose = choose
        self._turns: dict[tuple[str, str], _Turn] = {}
        #: Links that are doomed and not yet gone, with the addresses that their pods still have.
        self._doomed: dict[str, tuple[str, ...]] = {}
        self._doom_news = asyncio.Event()
        self._mtu, self._mtu_at = 0, -math.inf

    async def carry_out(self, call: Call, pod_ns: int | None) -> bytes:
        """Carries a call out and returns what is to be printed. ``pod_ns`` is a descriptor of the pod's network
        namespace, if the runtime named one that exists; it stays the caller's. Raises Refusal."""
        try:
            match call.command:
                case "ADD":
                    async with self._turn(call):
                        return await self._add(call, _needed(pod_ns, call))
                case "DEL":
                    async with self._turn(call):
                        self._del(call)
                        return b""
                case "CHECK":
                    async with self._turn(call):
                        self._check(call, _needed(pod_ns, call))
                        return b""
                case "STATUS":
                    await self._status()
                    return b""
                case "GC":
                    await self._gc(call)
                    return b""
                case _:
                    return spec.versions(call.config.version)
        except Refusal as e:
            raise _without_not_found(e) if call.command == "DEL" else e from e.__cause__
        except IPAMError as e:
            raise _ipam_refusal(e) from e
        except podnet.InterfaceExists as e:
            raise Refusal(spec.INTERFACE_EXISTS, "the interface exists", str(e)) from e
        except CNIError as e:
            failed = Refusal(spec.WIRING_FAILED, f"{call.command} failed in the kernel", str(e))
            raise _without_not_found(failed) from e

    async def run(self) -> None:
        """Removes doomed links in the background, many at a time. Runs until cancelled."""
        while True:
            await self._doom_news.wait()
            self._doom_news.clear()
            doomed = dict(self._doomed)
            try:
                await self._reaper.reap()
            except ReaperError as e:
                log.warning("%s; removing %d links myself", e, len(doomed))
                try:
                    podnet.reap(self._netlink)
                except NetlinkError as again:
                    log.warning("%d doomed links cannot be removed, will try again: %s", len(doomed), again)
                    await self._clock.sleep(self._settings.reap_retry)
                    self._doom_news.set()
                    continue
            for name, addresses in doomed.items():
                # Doomed again meanwhile: that one is for the next round.
                if self._doomed.get(name) is addresses:
                    del self._doomed[name]

    # -- ADD ---------------------------------------------------------------------------------------------------------

    async def _add(self, call: Call, pod_ns: int) -> bytes:
        attachment = _attachment(call)
        for other in self._of_sandbox(call):
            if other.attachment != attachment:
                details = (
                    f"{call.interface} of container {call.container} belongs to network {other.attachment.network!r}"
                )
                raise Refusal(spec.INTERFACE_EXISTS, "the interface exists", f"{details}; DEL it there first")
        known = self._ipam.lease(attachment) is not None
        touched = not known
        lease = await self._take(call, attachment, known=known)
        self._step("add-journalled")
        try:
            want = self._want(call, lease)
            if known and not look.problems(self._netlink, pod_ns, want, _gateways(lease)):
                mtu = self._as_it_is(want, lease)
            else:
                touched = True
                mtu = want.mtu
                self._make_way(want)
                index, ready = podnet.wire(self._netlink, pod_ns, want)
                self._step("add-wired")
                self._ipam.bind(attachment, index)
                self._step("add-bound")
                if not ready:
                    await self._carrier(pod_ns, want)
        except (CNIError, IPAMError, asyncio.CancelledError):
            # A pod that lives is not taken down because it could not be looked at.
            if touched:
                self._undo(attachment, lease)
            raise
        return spec.result(
            call.config,
            spec.Interface(want.node_end, LINK_MAC, mtu),
            spec.Interface(want.pod_end, want.mac, mtu, call.netns),
            tuple(spec.Address(f"{a}/{128 if ':' in a else 32}", podnet.gateway(a)) for a in lease.addresses),
        )

    async def _take(self, call: Call, attachment: Attachment, *, known: bool) -> Lease:
        request = Request(attachment, pod=call.pod, pod_uid=call.pod_uid, asked=call.asked)
        if known or not (self._choose or call.addresses):
            return await self._ipam.take(request)
        try:
            choice = await self._wanted(call)
        except Refusal as e:
            self._ipam.tell_no_address(request, e)
            raise
        request = msgspec.structs.replace(request, pools=choice.pools, addresses=choice.addresses)
        try:
            self._ipam.check_family(choice.pools4, 4)
            self._ipam.check_family(choice.pools6, 6)
            return await self._ipam.take(request)
        except IPAMError as e:
            if not choice.said:
                raise
            refused = type(e)(": ".join(filter(None, (call.pod and f"pod {call.pod}", choice.said, str(e)))))
            if isinstance(e, WrongPool | Exhausted):
                self._ipam.tell_no_address(request, refused)
            raise refused from e

    async def _wanted(self, call: Call) -> Choice:
        """The runtime's word goes before the pod's. Loaded here only, as hardly any node needs it."""
        from cni.choice import Choice

        if call.addresses:
            return Choice(addresses=call.addresses, said="addresses that the runtime asks for")
        return await self._choose(call) if self._choose else Choice()

    def _want(self, call: Call, lease: Lease) -> podnet.Wiring:
        mtu = call.config.mtu or self._uplink_mtu()
        if mtu < podnet.LEAST_MTU6 and any(":" in a for a in lease.addresses):
            details = f"mtu: {mtu}: the pod has an IPv6 address, which needs {podnet.LEAST_MTU6}; correct it"
            raise Refusal(spec.INVALID_CONFIG, "invalid network configuration", details)
        return podnet.Wiring(
            node_end=podnet.link_name(call.container, call.interface),
            pod_end=call.interface,
            mac=call.mac or podnet.pod_mac(call.container, call.interface),
            addresses=lease.addresses,
            mtu=mtu,
            sysctls=self._settings.sysctls,
        )

    def _uplink_mtu(self) -> int:
        """As it was a moment ago: a burst of ADDs asks once."""
        now = self._clock.monotonic()
        if now - self._mtu_at > self._settings.mtu_age:
            self._mtu, self._mtu_at = look.uplink_mtu(self._netlink), now
        return self._mtu

    def _as_it_is(self, want: podnet.Wiring, lease: Lease) -> int:
        """The MTU of a pod that was wired before. Its link is journalled, if a server was ended before it did so."""
        link = rtnl.find(self._netlink, want.node_end)
        if link is None:
            raise podnet.WiringError(f"{want.node_end} vanished while it was looked at; somebody else removed it")
        if link.index != lease.index:
            self._ipam.bind(lease.attachment, link.index)
        return link.mtu

    def _make_way(self, want: podnet.Wiring) -> None:
        """An address rests until its last link is gone: if nothing else was free, that link goes now."""
        for name, addresses in tuple(self._doomed.items()):
            if not set(addresses).isdisjoint(want.addresses):
                podnet.remove(self._netlink, name)
                del self._doomed[name]

    async def _carrier(self, pod_ns: int, want: podnet.Wiring) -> None:
        end = self._clock.monotonic() + self._settings.carrier_limit
        while not podnet.has_carrier(self._netlink, pod_ns, want):
            if self._clock.monotonic() > end:
                limit = self._settings.carrier_limit
                raise podnet.WiringError(f"{want.node_end} or its pod end has had no carrier for {limit} s")
            await self._clock.sleep(self._settings.carrier_every)

    def _undo(self, attachment: Attachment, lease: Lease) -> None:
        """An ADD that fails leaves nothing; what cannot be undone now, DEL or the sweep will."""
        name = podnet.link_name(attachment.container, attachment.interface)
        try:
            if podnet.unwire(self._netlink, name, lease.addresses):
                self._doom(name, lease.addresses)
            self._ipam.give_back(attachment, deleted=False)
        except (CNIError, IPAMError) as e:
            log.warning("a failed ADD of %s could not be undone, DEL or the sweep will: %s", attachment, e)

    # -- DEL and GC ----------------------------------------------------------------------------------------------------

    def _del(self, call: Call) -> None:
        # After the network was renamed, DEL comes with the new name; the sandbox's interface is the same.
        attachments = {_attachment(call), *(lease.attachment for lease in self._of_sandbox(call))}
        self._release(attachments, call.asked)

    async def _gc(self, call: Call) -> None:
        valid = call.config.valid
        if not isinstance(valid, tuple):
            # Null or absent: whoever knows of no attachment does not say that none is valid. Nor is it an error: a
            # plugin "should generally complete a GC action without error" (Section 2, "GC").
            log.info("GC of %s without a list of valid attachments: nothing is released", call.config.name)
            return
        network = call.config.name
        keep = frozenset(Attachment(network, v.container, v.interface) for v in valid)
        failed: list[str] = []
        for lease in self._ipam.retain(network, keep):
            a = lease.attachment
            try:
                async with self._turn(Call("GC", call.config, a.container, a.interface)):
                    if self._ipam.lease(a) is not None:
                        self._release({a})
                        log.info("GC released %s of %s", ", ".join(lease.addresses), a)
            except CNIError as e:
                failed.append(f"{a}: {e}")
        if failed:
            raise Refusal(spec.WIRING_FAILED, "GC could not release everything", "; ".join(failed))

    def _release(self, attachments: Iterable[Attachment], asked: float | None = None) -> None:
        """Takes one sandbox's interface out of the kernel, then gives back what its attachments had. ``asked``: of the
        DEL; None for GC, which knows of everything that was asked for until now."""
        attachments = tuple(attachments)
        leases = tuple(lease for a in attachments if (lease := self._ipam.lease(a)) is not None)
        addresses = tuple(a for lease in leases for a in lease.addresses)
        name = podnet.link_name(attachments[0].container, attachments[0].interface)
        had_link = podnet.unwire(self._netlink, name, addresses)
        self._step("del-unwired")
        for a in attachments:
            try:
                self._ipam.give_back(a, asked=asked)
            except JournalError as e:
                log.warning("%s is unwired, but that cannot be journalled; the sweep will find it: %s", a, e)
        self._step("del-journalled")
        if had_link:
            self._doom(name, addresses)

    def _doom(self, name: str, addresses: tuple[str, ...]) -> None:
        self._doomed[name] = addresses
        self._doom_news.set()

    # -- CHECK and STATUS ----------------------------------------------------------------------------------------------

    def _check(self, call: Call, pod_ns: int) -> None:
        expected = spec.expected(call.config, call.interface)
        name = podnet.link_name(call.container, call.interface)
        addresses = tuple(_plain(a) for a in expected.addresses)
        problems = []
        lease = self._ipam.lease(_attachment(call))
        if lease is None:
            problems.append("no address is reserved for it")
        elif set(lease.addresses) != set(addresses):
            problems.append(f"reserved for it: {', '.join(lease.addresses)}, in prevResult: {', '.join(addresses)}")
        if problem := self._ipam.problem(_attachment(call)):
            problems.append(problem)
        if expected.node_end != name:
            problems.append(f"prevResult names the node's end {expected.node_end!r}, ours is {name!r}")
        want = podnet.Wiring(node_end=name, pod_end=call.interface, mac=expected.mac, addresses=addresses, mtu=0)
        problems += look.problems(self._netlink, pod_ns, want, expected.gateways)
        if problems:
            details = f"{call.interface} of container {call.container}: {'; '.join(problems)}; recreate the pod"
            raise Refusal(spec.CHECK_FAILED, "the pod's network is not as ADD left it", details)

    async def _status(self) -> None:
        if problem := self._ipam.refusal():
            raise Refusal(spec.NOT_AVAILABLE, "not ready", problem)
        if self._ipam.free() == 0:
            details = f"node {self._node} has no free address in any block; see 'underlayctl ipam show --show-blocks'"
            raise Refusal(spec.NOT_AVAILABLE, "no free address", details)
        try:
            async with asyncio.timeout(self._settings.store_limit):
                sessions = (await self._store.get(BGPNodeStatus, self._node)).status.sessions
        except (NotFound, TimeoutError):
            return
        except StoreError as e:
            # ADD works without the store (R2), so this is no reason to be unready.
            log.info("STATUS without the sessions' state: %s", e)
            return
        if sessions and not any(s.state == "Established" for s in sessions):
            details = (
                f"none of the {len(sessions)} BGP sessions of node {self._node} is up; see 'underlayctl node status'"
            )
            raise Refusal(spec.LIMITED, "no BGP session is up", details)

    # -- shared --------------------------------------------------------------------------------------------------------

    def _of_sandbox(self, call: Call) -> tuple[Lease, ...]:
        return tuple(
            lease
            for lease in self._ipam.leases()
            if lease.attachment.container == call.container and lease.attachment.interface == call.interface
        )

    @asynccontextmanager
    async def _turn(self, call: Call) -> AsyncIterator[None]:
        """Calls of one sandbox's interface run one after the other, in order of arrival (R7)."""
        key = (call.container, call.interface)
        turn = self._turns.setdefault(key, _Turn())
        if turn.users >= self._settings.turns:
            details = f"{turn.users} calls for {call.interface} of container {call.container} are waiting already"
            raise Refusal(spec.TRY_AGAIN, "too many calls at once", details)
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if turn.users == 0:
                del self._turns[key]


class _Turn:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # first come, first served
        self.users = 0


def _attachment(call: Call) -> Attachment:
    return Attachment(call.config.name, call.container, call.interface)


def _needed(pod_ns: int | None, call: Call) -> int:
    if pod_ns is None:
        details = f"CNI_NETNS: {call.netns!r}: cannot be opened; it must be the path of a live network namespace"
        raise Refusal(spec.INVALID_ENVIRONMENT, "invalid CNI_NETNS", details)
    return pod_ns


def _gateways(lease: Lease) -> tuple[str, ...]:
    return tuple(podnet.gateway(a) for a in lease.addresses)


def _plain(address: str) -> str:
    try:
        return str(ipaddress.ip_interface(address).ip)
    except ValueError as e:
        raise Refusal(spec.INVALID_CONFIG, "invalid network configuration", f"prevResult: ips: {e}") from e


def _ipam_refusal(e: IPAMError) -> Refusal:
    if isinstance(e, Deleted):
        return Refusal(spec.DELETED, "the attachment was deleted before", str(e))
    if isinstance(e, WrongPool):
        return Refusal(spec.INVALID_CONFIG, "the pool or address cannot be had", str(e))
    return Refusal(spec.TRY_AGAIN, "no address at present, try again", str(e))


def _without_not_found(refusal: Refusal) -> Refusal:
    """containerd takes a DEL error that says this for success; the kernel's own words may hold it."""
    text, details = (re.sub("not found", "missing", t, flags=re.IGNORECASE) for t in (refusal.text, refusal.details))
    return Refusal(refusal.code, text, details)
