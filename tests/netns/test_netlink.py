"""What the netlink layer and ipam's view of the kernel make of a real kernel's answers."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni import netns, podnet, rtnl
from cni.kernel import NetlinkView
from cni.marks import LINK_GROUP, PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from cni.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    NetlinkError,
    attr_text,
    attr_u32,
    attributes,
    decode,
)
from ipam.errors import KernelUnavailable
from lab.net import Net


def make(name: str, **fields: int) -> Message:
    peer = attr_text(rtnl.IFLA_IFNAME, f"{name}p")
    data = podnet.nest(rtnl.IFLA_INFO_DATA, podnet.attr(rtnl.VETH_INFO_PEER, rtnl.LINK.pack(0, 0, 0, 0, 0) + peer))
    info = podnet.nest(rtnl.IFLA_LINKINFO, attr_text(rtnl.IFLA_INFO_KIND, "veth"), data)
    return Message(
        rtnl.NEWLINK,
        rtnl.LINK.pack(0, 0, 0, 0, 0) + attr_text(rtnl.IFLA_IFNAME, name) + info,
        NLM_F_CREATE | NLM_F_EXCL,
    )


@pytest.fixture
def inside(net: Net) -> Any:
    net.add("a")
    fd = os.open(net.path("a"), os.O_RDONLY | os.O_CLOEXEC)
    with netns.inside(fd), Netlink() as netlink:
        yield netlink
    os.close(fd)


def test_a_refusal_has_the_kernels_words(inside: Netlink) -> None:
    body = rtnl.ROUTE.pack(2, 40, 0, 0, 254, 142, 0, 1, 0) + podnet.attr(rtnl.RTA_DST, bytes(4))
    with pytest.raises(NetlinkError, match="prefix length") as caught:
        inside.request(Message(rtnl.NEWROUTE, body, NLM_F_CREATE))
    assert caught.value.number == errno.EINVAL


def test_what_was_made_is_told_with_its_index(inside: Netlink) -> None:
    made = inside.make(make("v1"))
    assert made is not None
    link, found = rtnl.read_link(made.body), rtnl.find(inside, "v1")
    assert found is not None
    assert (link.index, link.peer, link.name) == (found.index, found.peer, "v1")
    with pytest.raises(NetlinkError) as refused:
        inside.make(make("v1"))
    assert refused.value.number == errno.EEXIST
    assert rtnl.find(inside, "v1") == found


def test_a_batch_answers_for_each_request(inside: Netlink) -> None:
    found = inside.batch([make("v1"), make("v1"), make("v2"), Message(rtnl.DELLINK, rtnl.LINK.pack(0, 0, 999, 0, 0))])
    assert [e and e.number for e in found] == [None, errno.EEXIST, None, errno.ENODEV]
    with pytest.raises(NetlinkError):
        inside.apply([make("v3"), make("v3"), make("v4")])
    assert {link.name for link in rtnl.links(inside)} >= {"v1", "v2", "v3", "v4"}


def test_a_batch_larger_than_a_receive_buffer(inside: Netlink) -> None:
    def route(i: int, kind: int) -> Message:
        body = rtnl.ROUTE.pack(2, 32, 0, 0, 254, PROTO_BLOCKS, 0, 6, 0)
        return Message(kind, body + podnet.attr(rtnl.RTA_DST, struct.pack(">I", (10 << 24) + i)), NLM_F_CREATE)

    assert not any(inside.batch([route(i, rtnl.NEWROUTE) for i in range(3000)]))
    view = NetlinkView(inside)
    assert len(view.blackholes()) == 3000
    assert not any(inside.batch([route(i, rtnl.DELROUTE) for i in range(3000)]))
    assert not view.blackholes()


def test_a_dump_is_filtered_by_the_kernel(inside: Netlink) -> None:
    inside.apply([make("v1")])
    for protocol in (PROTO_BLOCKS, 99):
        body = rtnl.ROUTE.pack(2, 32, 0, 0, 254, protocol, 0, 6, 0) + podnet.attr(
            rtnl.RTA_DST, bytes((10, 0, 0, protocol))
        )
        inside.request(Message(rtnl.NEWROUTE, body, NLM_F_CREATE))
    found = inside.dump(Message(rtnl.GETROUTE, rtnl.ROUTE.pack(2, 0, 0, 0, 254, 99, 0, 0, 0)))
    assert [attributes(m.body, rtnl.ROUTE.size)[rtnl.RTA_DST][3] for m in found] == [99]
    assert [decode(rtmsg, m)["proto"] for m in found] == [99]


class Interrupted(Netlink):
    """A socket whose first answers are as the kernel gives them when its tables change during a dump."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def _receive(self) -> Any:
        for kind, sequence, body, flags in super()._receive():
            if kind == 3 and self.left:
                self.left -= 1
                flags |= 0x10
            yield kind, sequence, body, flags


def test_an_interrupted_dump_is_repeated_and_never_used(inside: Netlink) -> None:
    with Interrupted(3) as netlink:
        assert [link.name for link in rtnl.links(netlink)] == ["lo"]
        assert netlink.left == 0
    with Interrupted(1000) as netlink, pytest.raises(NetlinkError) as caught:
        rtnl.links(netlink)
    assert caught.value.number == errno.EINTR


@pytest.mark.parametrize("ask", ["links", "pod_routes", "blackholes"])
def test_a_view_that_was_interrupted_is_none(inside: Netlink, ask: str) -> None:
    with Interrupted(1000) as netlink, pytest.raises(KernelUnavailable, match="interrupted"):
        getattr(NetlinkView(netlink), ask)()


def test_the_kernel_view(inside: Netlink) -> None:
    view = NetlinkView(inside)
    assert view.netns() == Path("/proc/thread-self/ns/net").stat().st_ino
    inside.apply([make("ulone"), make("foreign")])
    one = rtnl.find(inside, "ulone")
    assert one is not None
    group = rtnl.LINK.pack(0, 0, one.index, 1, 1) + attr_u32(rtnl.IFLA_GROUP, LINK_GROUP)
    inside.request(Message(rtnl.NEWLINK, group))
    assert view.links() == {one.index: "ulone"}
    assert view.link(one.index, "ulone")
    assert view.link(0, "ulone")
    assert view.link(one.index, "gone")
    assert not view.link(0, "gone")
    for address in ("10.0.0.1", "fd00::1"):
        inside.request(Message(rtnl.NEWROUTE, podnet._host_route(address, one.index), NLM_F_CREATE))
    assert view.pod_routes() == {"10.0.0.1": one.index, "fd00::1": one.index}
    for family, length, raw in ((2, 26, bytes((10, 1, 0, 64))), (10, 122, rtnl.packed("fd00:1::40"))):
        body = rtnl.ROUTE.pack(family, length, 0, 0, 254, PROTO_BLOCKS, 0, 6, 0) + podnet.attr(rtnl.RTA_DST, raw)
        inside.request(Message(rtnl.NEWROUTE, body + attr_u32(rtnl.RTA_PRIORITY, 512), NLM_F_CREATE))
    assert view.blackholes() == {"10.1.0.64/26", "fd00:1::40/122"}
    assert podnet.unwire(inside, "ulone", ("10.0.0.1", "fd00::1"))
    assert not podnet.unwire(inside, "never", ("10.0.0.9",))
    assert not view.pod_routes()
    assert not view.link(one.index, "ulone")
    podnet.reap(inside)
    assert {link.name for link in rtnl.links(inside)} == {"lo", "foreign", "foreignp"}


def test_foreign_routes_are_all_but_ours_equal_to_or_inside_a_prefix(inside: Netlink) -> None:
    view = NetlinkView(inside)
    for words in (
        "link add up1 type veth peer name up1p",
        "link add up2 type veth peer name up2p",
        "link set up1 up",
        "link set up2 up",
        "addr add 192.0.2.0/31 dev up1",
        "addr add 198.51.100.0/31 dev up2",
        "-6 addr add fd00:99::/127 dev up1 nodad",
        # Around it, beside it, and ours: nobody's claim.
        "route add 10.1.0.0/16 via 192.0.2.1",
        "route add 10.1.0.128/26 via 192.0.2.1",
        f"route add 10.1.0.64/32 dev up1 proto {PROTO_PODS}",
        f"route add blackhole 10.1.0.64/26 proto {PROTO_BLOCKS} metric 512",
        "route add default via 192.0.2.1",
        "route add throw 10.1.0.80/28",
        "route add 10.1.0.64/26 via 192.0.2.1 table 77",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    assert view.foreign_routes("10.1.0.64/26") == ()
    for words in (
        f"route add 10.1.0.64/26 via 192.0.2.1 proto {PROTO_IMPORTS} metric 2048",
        "route add 10.1.0.65/32 dev up2 proto static",
        "route add 10.1.0.96/28 nexthop via 192.0.2.1 nexthop via 198.51.100.1",
        "route add unreachable 10.1.0.112/30",
        "addr add 10.1.0.127/32 dev up2",
        "-6 route add fd00:1::40/122 via fd00:99::1 metric 7",
        "-6 addr add fd00:1::41/128 dev up2 nodad",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    four = {r.prefix: (r.via, r.device, r.protocol) for r in view.foreign_routes("10.1.0.64/26")}
    assert four == {
        "10.1.0.64/26": ("192.0.2.1", "up1", PROTO_IMPORTS),
        "10.1.0.65/32": ("", "up2", 4),
        "10.1.0.96/28": ("192.0.2.1", "up1", 3),
        "10.1.0.112/30": ("", "", 3),
        "10.1.0.127/32": ("", "up2", 2),
    }
    six = {(r.prefix, r.via, r.device) for r in view.foreign_routes("fd00:1::40/122")}
    assert {("fd00:1::40/122", "fd00:99::1", "up1"), ("fd00:1::41/128", "", "up2")} <= six
    assert {prefix for prefix, _, _ in six} == {"fd00:1::40/122", "fd00:1::41/128"}
    assert len(view.foreign_routes("10.1.0.0/16")) == 7
    assert view.foreign_routes("10.2.0.0/16") == ()
    with Interrupted(1000) as netlink, pytest.raises(KernelUnavailable):
        NetlinkView(netlink).foreign_routes("10.1.0.64/26")
