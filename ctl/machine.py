"""Reads a ``Machine`` for ``install check``: the kernel, the runtime's folder, peers and the API server.

Changes nothing: what is tried in the kernel is tried in a network namespace that ends with the trial.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import msgspec

from cni import netns, nft, rtnl, sources
from cni.errors import CNIError
from cni.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attr, attr_text, attr_u32, attributes, nest
from cni.peer import answers
from ctl.preflight import BGP, Chain, Cluster, Link, Listener, Machine, Peer, Route
from store.clock import Clock

#: Seconds for a connection to a peer, and to the API server; peers at once.
CONNECT: Final = 3.0
_AT_ONCE: Final = 16
_MAKE: Final = NLM_F_CREATE | NLM_F_EXCL
_NEWNEXTHOP, _NHA_ID, _NHA_GROUP, _NHA_OIF, _NHA_GATEWAY, _RTA_NH_ID = 104, 1, 2, 5, 6, 30
_FORWARD: Final = 2  # NF_INET_FORWARD
_FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}
_LISTEN: Final = "0A"


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """``root``: where the machine's files are (``/host`` in a container); ``store``: "" if none is asked."""

    root: Path
    run: Path
    node: str
    store: str
    peers: tuple[str, ...] = ()


async def read(where: Where, clock: Clock, environment: Mapping[str, str]) -> Machine:
    """Whatever cannot be read is said in ``unseen``; nothing is raised."""
    unseen: dict[str, str] = {}

    def take(field: str, look: Callable[[], Any], default: Any) -> Any:
        try:
            return look()
        except (OSError, CNIError, ValueError, subprocess.SubprocessError) as e:
            unseen[field] = f"{type(e).__name__}: {e}" if isinstance(e, ValueError) else str(e)
            return default

    cluster: Cluster | None = None
    known: tuple[tuple[str, str], ...] = ()
    if where.store.startswith("kube:"):
        # Loaded there only: without it nothing but what Python brings along is needed.
        from ctl.machine_cluster import ask

        cluster, known = await ask(where.store, where.node, clock, environment, unseen)
    else:
        unseen["cluster"] = unseen["node"] = "no cluster is named (--store kube:)"
    peers = [*known, *((address, address) for address in where.peers)]
    if not where.store and not peers:
        unseen["peers"] = "no store is named (--store) and no --peer"
    api, api_problem = await _api_server(where, environment, unseen)
    links = take("links", _links, ())
    return Machine(
        kernel=take("kernel", lambda: os.uname().release, ""),
        features=take("features", _features, {}),
        sysctls=take("sysctls", lambda: dict(_sysctls([link.name for link in links])), {}),
        links=links,
        addresses=take("links", _addresses, ()),
        routes=take("routes", _routes, ()),
        chains=take("chains", lambda: tuple(_chains()), ()),
        tables=take("tables", lambda: tuple(_tables()), ()),
        networks=take("networks", lambda: tuple(_networks(where.root / "etc/cni/net.d")), ()),
        listeners=take("listeners", lambda: tuple(_listeners()), ()),
        speaker=answers(where.run / "speaker" / "relay.sock"),
        ufw=_ufw(where.root / "etc/ufw/ufw.conf"),
        peers=await _dial(peers),
        api=api,
        api_problem=api_problem,
        cluster=cluster,
        unseen=unseen,
    )


# -- the kernel ------------------------------------------------------------------------------------------------------


def _features() -> dict[str, str]:
    """Each is tried in a namespace of its own thread. Raises OSError without the right to make one."""
    found: dict[str, str] = {}
    refused: list[OSError] = []

    def work() -> None:
        try:
            netns.unshare(netns.CLONE_NEWNET)
        except OSError as e:
            refused.append(OSError(e.errno, f"a trial needs a network namespace (root, CAP_SYS_ADMIN): {e.strerror}"))
            return
        with Netlink() as netlink:
            for name, attempt in (("veth", _veth), ("nexthop", _nexthop), ("group", _group)):
                found[name] = _tried(partial(attempt, netlink))
        found["nftables"] = _tried(_nftables)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if refused:
        raise refused[0]
    return found


def _tried(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except (CNIError, OSError) as e:
        return str(e)
    return ""


def _veth(netlink: Netlink) -> None:
    peer = rtnl.LINK.pack(0, 0, 0, 0, 0) + attr_text(rtnl.IFLA_IFNAME, "t1")
    info = attr_text(rtnl.IFLA_INFO_KIND, "veth") + nest(rtnl.IFLA_INFO_DATA, attr(rtnl.VETH_INFO_PEER, peer))
    body = rtnl.LINK.pack(0, 0, 0, 0, 0) + attr_text(rtnl.IFLA_IFNAME, "t0") + nest(rtnl.IFLA_LINKINFO, info)
    netlink.request(Message(rtnl.NEWLINK, body, _MAKE))
    for name in ("t1", "t0"):
        up = rtnl.LINK.pack(0, 0, 0, rtnl.IFF_UP, rtnl.IFF_UP) + attr_text(rtnl.IFLA_IFNAME, name)
        netlink.request(Message(rtnl.SETLINK, up))


def _nexthop(netlink: Netlink) -> None:
    link = rtnl.find(netlink, "t0")
    if link is None:
        raise OSError("there is no veth to try it on")
    own = rtnl.packed("192.0.2.1")
    body = rtnl.ADDR.pack(socket.AF_INET, 24, 0, 0, link.index)
    netlink.request(Message(rtnl.NEWADDR, body + attr(2, own) + attr(1, own), _MAKE))
    for id_, gateway in ((1, "192.0.2.2"), (2, "192.0.2.3")):
        head = rtnl.NEXTHOP.pack(socket.AF_INET, 0, rtnl.RTPROT_BOOT, 0)
        hop = attr_u32(_NHA_ID, id_) + attr_u32(_NHA_OIF, link.index) + attr(_NHA_GATEWAY, rtnl.packed(gateway))
        netlink.request(Message(_NEWNEXTHOP, head + hop, _MAKE))


def _group(netlink: Netlink) -> None:
    members = struct.pack("=IBBHIBBH", 1, 0, 0, 0, 2, 0, 0, 0)
    head = rtnl.NEXTHOP.pack(socket.AF_UNSPEC, 0, rtnl.RTPROT_BOOT, 0)
    netlink.request(Message(_NEWNEXTHOP, head + attr_u32(_NHA_ID, 3) + attr(_NHA_GROUP, members), _MAKE))
    route = rtnl.ROUTE.pack(socket.AF_INET, 24, 0, 0, rtnl.RT_TABLE_MAIN, rtnl.RTPROT_BOOT, 0, 1, 0)
    to = attr(rtnl.RTA_DST, rtnl.packed("198.51.100.0")) + attr_u32(_RTA_NH_ID, 3)
    netlink.request(Message(rtnl.NEWROUTE, route + to, _MAKE))


def _nftables() -> None:
    with Netlink(sources.NETFILTER) as netlink:
        sources.make(netlink)


def _links() -> tuple[Link, ...]:
    with Netlink() as netlink:
        return tuple(Link(link.name, link.mtu, link.up) for link in rtnl.links(netlink))


def _names(netlink: Netlink) -> dict[int, str]:
    return {link.index: link.name for link in rtnl.links(netlink)}


def _addresses() -> tuple[tuple[str, str], ...]:
    found = []
    with Netlink() as netlink:
        names = _names(netlink)
        for m in netlink.dump(Message(rtnl.GETADDR, rtnl.ADDR.pack(0, 0, 0, 0, 0))):
            _, length, _, _, index = rtnl.ADDR.unpack_from(m.body)
            values = attributes(m.body, rtnl.ADDR.size)
            raw = values.get(2) or values.get(1)  # IFA_LOCAL, IFA_ADDRESS
            if raw:
                found.append((f"{ip_address(raw)}/{length}", names.get(index, "")))
    return tuple(found)


def _routes() -> tuple[Route, ...]:
    """Unicast ones of the main table, and those that keep a prefix from being used."""
    found = []
    with Netlink() as netlink:
        names = _names(netlink)
        for family, nothing in ((socket.AF_INET, bytes(4)), (socket.AF_INET6, bytes(16))):
            request = rtnl.ROUTE.pack(family, 0, 0, 0, rtnl.RT_TABLE_MAIN, 0, 0, 0, 0)
            for m in netlink.dump(Message(rtnl.GETROUTE, request)):
                _, length, _, _, table, protocol, _, _, _ = rtnl.ROUTE.unpack_from(m.body)
                if table != rtnl.RT_TABLE_MAIN:
                    continue
                values = attributes(m.body, rtnl.ROUTE.size)
                device = names.get(rtnl.U32.unpack(values[rtnl.RTA_OIF])[0], "") if rtnl.RTA_OIF in values else ""
                prefix = f"{ip_address(values.get(rtnl.RTA_DST, nothing))}/{length}"
                found += [Route(prefix, name, protocol) for name in _hops(values, names) or (device,)]
    return tuple(found)


def _hops(values: Mapping[int, bytes], names: Mapping[int, str]) -> list[str]:
    found, hops, start = [], values.get(rtnl.RTA_MULTIPATH, b""), 0
    while start + rtnl.MULTIPATH.size <= len(hops):
        length, _, _, index = rtnl.MULTIPATH.unpack_from(hops, start)
        found.append(names.get(index, ""))
        start += max(rtnl.MULTIPATH.size, (length + 3) & ~3)
    return found


def _sysctls(links: Sequence[str]) -> Iterator[tuple[str, str]]:
    keys = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.all.rp_filter"]
    keys += [f"net.ipv6.conf.{name}.disable_ipv6" for name in ("all", "default")]
    keys += [f"net.ipv4.conf.{name.replace('.', '/')}.rp_filter" for name in links]
    for key in keys:
        path = Path("/proc/sys").joinpath(*(part.replace("/", ".") for part in key.split(".")))
        if path.exists():
            yield key.replace("/", "."), path.read_text().strip()


def _objects(kind: int) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Of all of nftables' families; none where there is no nftables."""
    with Netlink(sources.NETFILTER) as netlink:
        for m in netlink.dump(Message(nft.SUBSYSTEM << 8 | kind, nft.HEADER.pack(0, 0, 0))):
            yield _FAMILIES.get(m.body[0], ""), attributes(m.body, nft.HEADER.size)


def _tables() -> Iterator[str]:
    for _, values in _objects(nft.GETTABLE):
        yield _text(values[nft.TABLE_NAME])


def _chains() -> Iterator[Chain]:
    for family, values in _objects(nft.GETCHAIN):
        hook = attributes(values.get(nft.CHAIN_HOOK, b""), 0)
        if family and int.from_bytes(hook.get(nft.HOOK_NUMBER, b"\xff"), "big") == _FORWARD:
            drops = values.get(nft.CHAIN_POLICY) == nft.u32(nft.DROP)
            yield Chain(f"{family} {_text(values[nft.CHAIN_TABLE])}", _text(values[nft.CHAIN_NAME]), drops)
    for program, names in (("iptables-legacy", "ip_tables_names"), ("ip6tables-legacy", "ip6_tables_names")):
        loaded = Path("/proc/net") / names
        if loaded.exists() and "filter" in loaded.read_text().split():
            said = subprocess.run([program, "-S", "FORWARD"], capture_output=True, text=True, timeout=10, check=True)
            yield Chain(program, "FORWARD", "-P FORWARD DROP" in said.stdout)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


# -- others on the machine -------------------------------------------------------------------------------------------


def _networks(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not folder.is_dir():
        raise OSError(f"{folder} is not there: --root says where the machine's files are")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".conf", ".conflist", ".json"):
            try:
                said = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
                plugins = said.get("plugins", [said])
                types = tuple(str(plugin.get("type", "?")) for plugin in plugins)
            except (msgspec.MsgspecError, AttributeError, TypeError):
                types = ("cannot be read",)
            yield path.name, types


def _listeners() -> Iterator[Listener]:
    """Of BGP's port. Whose socket it is only root sees, and not from within a container."""
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            address, _, port = words[1].partition(":")
            if words[3] == _LISTEN and int(port, 16) == BGP:
                raw = b"".join(struct.pack("=I", int(address[i : i + 8], 16)) for i in range(0, len(address), 8))
                yield Listener(str(ip_address(raw)), BGP, _process(words[9]))


def _process(inode: str) -> str:
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) == f"socket:[{inode}]" for fd in (proc / "fd").iterdir()):
                return f"{(proc / 'comm').read_text().strip()} ({proc.name})"
        except OSError:
            continue  # it has ended, or is somebody else's
    return ""


def _ufw(path: Path) -> bool:
    try:
        return "ENABLED=yes" in path.read_text().replace(" ", "")
    except OSError:
        return False


# -- what others say ---------------------------------------------------------------------------------------------------


async def _dial(peers: Sequence[tuple[str, str]]) -> tuple[Peer, ...]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str, address: str) -> Peer:
        async with gate:
            return Peer(name, address, await _connects(address, BGP))

    return tuple(await asyncio.gather(*(one(name, address) for name, address in peers)))


async def _connects(host: str, port: int) -> str:
    """Why no connection can be made; "" if one can."""
    try:
        async with asyncio.timeout(CONNECT):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"no answer within {CONNECT:g} s"
    except OSError as e:
        return os.strerror(e.errno) if e.errno else str(e)
    writer.close()
    return ""


async def _api_server(where: Where, environment: Mapping[str, str], unseen: dict[str, str]) -> tuple[str, str]:
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        unseen["api"] = "KUBERNETES_SERVICE_HOST is not set here: it is in pods"
        return "", ""
    return f"{host}:{port}", await _connects(host, int(port))
