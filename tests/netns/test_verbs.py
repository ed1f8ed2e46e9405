"""The verbs where ipam, journal or reaper fail: a real kernel between strict fakes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

import pytest

from cni import look, netns, podnet, rtnl, spec
from cni.netlink import DumpInterrupted, Netlink
from cni.reaper import Reaper, ReaperError
from cni.spec import Call, Config, Refusal
from cni.verbs import Settings, Verbs
from ipam.errors import Deleted, Exhausted, IPAMError, JournalError, NotReady, WrongPool
from ipam.model import Attachment, Lease, Request
from ipam.node import NodeIPAM
from lab.net import Net
from store.clock import SystemClock
from store.memory import MemoryStore

ADDRESSES = ("10.244.0.1", "fd00::1")


Test = Callable[["FakeIPAM", Verbs], Coroutine[Any, Any, None]]


class FakeIPAM:
    """Hands out the same two addresses again and again; refuses what NodeIPAM would never be asked."""

    def __init__(self) -> None:
        self.held: dict[Attachment, Lease] = {}
        self.deleted: set[Attachment] = set()
        self.fails: dict[str, IPAMError] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def take(self, request: Request) -> Lease:
        await self.gate.wait()
        self._fail("take")
        if request.attachment in self.held:
            return self.held[request.attachment]
        if request.attachment in self.deleted:
            raise Deleted("deleted before")
        if self.held:
            raise Exhausted("none left")
        return self.held.setdefault(request.attachment, Lease(request.attachment, request.pod, ADDRESSES))

    def bind(self, attachment: Attachment, index: int) -> Lease:
        self._fail("bind")
        assert index > 0
        old = self.held[attachment]
        self.held[attachment] = Lease(attachment, old.pod, old.addresses, index)
        return self.held[attachment]

    def lease(self, attachment: Attachment) -> Lease | None:
        return self.held.get(attachment)

    def leases(self) -> tuple[Lease, ...]:
        return tuple(self.held.values())

    def give_back(self, attachment: Attachment, *, deleted: bool = True, asked: float | None = None) -> Lease | None:
        self._fail("give_back")
        if deleted:
            self.deleted.add(attachment)
        return self.held.pop(attachment, None)

    def _fail(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]


class StuckReaper:
    """Never done, or as broken as it is told to be."""

    def __init__(self, error: ReaperError | None = None) -> None:
        self.error = error

    async def reap(self) -> None:
        if self.error:
            raise self.error
        await asyncio.Event().wait()


class Bench:
    def __init__(self, net: Net, netlink: Netlink) -> None:
        self.net = net
        self.netlink = netlink
        self.pods = {pod: os.open(net.path(pod), os.O_RDONLY | os.O_CLOEXEC) for pod in ("pod-1", "pod-2")}

    def run(
        self, test: Callable[[FakeIPAM, Verbs], Coroutine[Any, Any, None]], reaper: Any = None, **settings: Any
    ) -> None:
        async def main() -> None:
            clock = SystemClock()
            ipam = FakeIPAM()
            verbs = Verbs(
                node="node-1",
                ipam=cast(NodeIPAM, ipam),
                store=MemoryStore(clock),
                netlink=self.netlink,
                reaper=reaper or StuckReaper(),
                clock=clock,
                settings=Settings(**settings),
            )
            background = asyncio.create_task(verbs.run())
            try:
                async with asyncio.timeout(60):
                    await test(ipam, verbs)
            finally:
                background.cancel()

        asyncio.run(main())

    def links(self) -> set[str]:
        return {link.name for link in rtnl.links(self.netlink) if link.name.startswith("ul")}

    async def until_no_links(self) -> None:
        async with asyncio.timeout(60):
            while self.links():  # noqa: ASYNC110 - the kernel has no event for us
                await asyncio.sleep(0.01)


@pytest.fixture
def bench(net: Net) -> Iterator[Bench]:
    for name in ("node-1", "pod-1", "pod-2"):
        net.add(name)
    fd = os.open(net.path("node-1"), os.O_RDONLY | os.O_CLOEXEC)
    with netns.inside(fd), Netlink() as netlink:
        made = Bench(net, netlink)
        yield made
        for pod in made.pods.values():
            os.close(pod)
    os.close(fd)


def call(verb: str, container: str = "c1", pod: str = "pod-1") -> Call:
    return Call(verb, Config(version="1.0.0", name="underlay"), container, "eth0", f"/run/netns/{pod}")


async def refusal(work: Coroutine[Any, Any, bytes]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await work
    return caught.value


def test_an_address_is_not_used_while_its_last_link_lives(bench: Bench) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        await verbs.carry_out(call("ADD", "c1"), bench.pods["pod-1"])
        await verbs.carry_out(call("DEL", "c1"), None)
        assert bench.links() == {podnet.link_name("c1", "eth0")}  # doomed, and nobody comes for it
        await verbs.carry_out(call("ADD", "c2", "pod-2"), bench.pods["pod-2"])
        assert bench.links() == {podnet.link_name("c2", "eth0")}

    bench.run(test)


@pytest.mark.parametrize("broken", [True, False], ids=["it-says-so", "it-was-killed"])
def test_without_its_reaper_the_server_removes_links_itself(bench: Bench, broken: bool) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])
        await verbs.carry_out(call("DEL"), None)
        await bench.until_no_links()

    if broken:
        bench.run(test, StuckReaper(ReaperError("broken")))
        return
    with Reaper() as reaper:
        os.kill(reaper.pid, 9)
        bench.run(test, reaper)


def test_the_reaper_removes_many_links_in_one_go(bench: Bench) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        for i in range(3):
            await verbs.carry_out(call("ADD", f"c{i}"), bench.pods["pod-1"])
            await verbs.carry_out(call("DEL", f"c{i}"), None)
        await bench.until_no_links()

    with Reaper() as reaper:
        bench.run(test, reaper)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JournalError("no space under /run"), spec.TRY_AGAIN),
        (NotReady("starting"), spec.TRY_AGAIN),
        (Exhausted("none left"), spec.TRY_AGAIN),
        (WrongPool("no such pool"), spec.INVALID_CONFIG),
        (Deleted("deleted before"), spec.DELETED),
    ],
)
@pytest.mark.parametrize("where", ["take", "bind"])
def test_an_add_that_ipam_refuses_leaves_nothing_and_may_be_tried_again(
    bench: Bench, where: str, error: IPAMError, code: int
) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        ipam.fails[where] = error
        found = await refusal(verbs.carry_out(call("ADD"), bench.pods["pod-1"]))
        assert (found.code, str(error) in found.details) == (code, True)
        assert not ipam.held
        await bench.until_no_links()
        ipam.fails.clear()
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])

    bench.run(test, StuckReaper(ReaperError("broken")))


def test_a_del_that_cannot_be_journalled_succeeds(bench: Bench) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])
        ipam.fails["give_back"] = JournalError("no space")
        assert await verbs.carry_out(call("DEL"), None) == b""
        await bench.until_no_links()

    bench.run(test, StuckReaper(ReaperError("broken")))


def test_a_cancelled_add_leaves_nothing(bench: Bench) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        ipam.gate.clear()
        waiting = asyncio.create_task(verbs.carry_out(call("ADD"), bench.pods["pod-1"]))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        ipam.gate.set()
        assert not ipam.held
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])

    bench.run(test)


def test_calls_of_one_sandbox_run_in_order_and_are_bounded(bench: Bench) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        ipam.gate.clear()
        add = asyncio.create_task(verbs.carry_out(call("ADD"), bench.pods["pod-1"]))
        remove = asyncio.create_task(verbs.carry_out(call("DEL"), None))
        await asyncio.sleep(0)
        assert (await refusal(verbs.carry_out(call("DEL"), None))).code == spec.TRY_AGAIN
        await verbs.carry_out(call("DEL", "c2"), None)  # another sandbox waits for nobody
        ipam.gate.set()
        assert b"10.244.0.1/32" in await add
        assert await remove == b""
        assert not ipam.held
        await bench.until_no_links()

    bench.run(test, StuckReaper(ReaperError("broken")), turns=2)


def test_a_link_left_without_a_lease_is_replaced(bench: Bench) -> None:
    """The journal was lost: the name is there, and not as it should be."""

    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])
        ipam.held.clear()
        before = rtnl.find(bench.netlink, podnet.link_name("c1", "eth0"))
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])
        after = rtnl.find(bench.netlink, podnet.link_name("c1", "eth0"))
        assert before is not None
        assert after is not None
        assert before.index != after.index

    bench.run(test)


def test_a_live_pod_that_cannot_be_looked_at_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise DumpInterrupted

    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])
        monkeypatch.setattr(look, "problems", refuse)
        assert (await refusal(verbs.carry_out(call("ADD"), bench.pods["pod-1"]))).code == spec.WIRING_FAILED
        assert ipam.held
        assert bench.links() == {podnet.link_name("c1", "eth0")}

    bench.run(test)


def test_one_interface_of_a_sandbox_is_in_one_network(bench: Bench) -> None:
    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        await verbs.carry_out(call("ADD"), bench.pods["pod-1"])
        other = Call("ADD", Config(version="1.0.0", name="other"), "c1", "eth0", "/run/netns/pod-1")
        found = await refusal(verbs.carry_out(other, bench.pods["pod-1"]))
        assert found.code == spec.INTERFACE_EXISTS
        assert "'underlay'" in found.details
        assert bench.links() == {podnet.link_name("c1", "eth0")}

    bench.run(test)


def test_a_del_never_says_not_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise podnet.WiringError("the kernel says: Device Not Found")

    async def test(ipam: FakeIPAM, verbs: Verbs) -> None:
        monkeypatch.setattr(podnet, "unwire", refuse)
        found = await refusal(verbs.carry_out(call("DEL"), None))
        assert found.code == spec.WIRING_FAILED
        assert "not found" not in f"{found.text} {found.details}".lower()

    bench.run(test)
