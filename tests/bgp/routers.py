"""The other end of the sessions: a BIRD or an FRR in a namespace of its own, asked for what it holds of us."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cni.peer import answers
from lab.net import Net
from lab.routers import let_root_run_frr
from tests.conftest import eventually

NODE4, TOR4 = "10.0.1.1", "10.0.1.2"
NODE6, TOR6 = "fd00:1::1", "fd00:1::2"
NODE_AS, TOR_AS = 65100, 65001


class Ends(NamedTuple):
    """The addresses of one link, by family."""

    node4: str
    tor4: str
    node6: str
    tor6: str


FIRST = Ends(NODE4, TOR4, NODE6, TOR6)
SECOND = Ends("10.0.2.1", "10.0.2.2", "fd00:2::1", "fd00:2::2")


def connections(net: Net, name: str) -> dict[str, tuple[str, str]]:
    """The BGP connections of a namespace that are up: as its kernel names them, by which one that was made anew is
    another, and how many bytes nobody has read yet, and how many are not acknowledged."""
    shown = net.run(name, ["ss", "-Htn", "state", "established", "( sport = :179 or dport = :179 )"]).stdout
    return {" ".join(ends): (unread, unacked) for unread, unacked, *ends in map(str.split, shown.splitlines())}


def wire(net: Net) -> None:
    """Namespaces ``node`` and ``tor`` with one link, dual stack."""
    net.add("node", forwarding=True)
    attach(net, "tor", "up0", FIRST)


def attach(net: Net, tor: str, port: str, ends: Ends) -> None:
    """A namespace ``tor`` at the node's ``port``."""
    net.add(tor, forwarding=True)
    net.link("node", port, tor, "down0")
    net.address("node", port, [f"{ends.node4}/24", f"{ends.node6}/64"])
    net.address(tor, "down0", [f"{ends.tor4}/24", f"{ends.tor6}/64"])


class Router:
    """What a test wants to know of a router, whichever it is, in the namespace ``name`` at one end of ``ends``."""

    kind: str

    def __init__(self, net: Net, folder: Path, name: str = "tor", ends: Ends = FIRST) -> None:
        self._net, self._name, self._ends = net, name, ends
        self.folder = folder / f"{self.kind}-{name}"
        self.folder.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        routes: Iterable[str] = (),
        *,
        graceful: bool = True,
        families: Iterable[str] = ("4", "6"),
        passive: bool = False,
        password: str = "",
        ttl_security: bool = False,
        node_as: int = NODE_AS,
        restart: int = 60,
        hops: int = 1,
    ) -> None:
        """Announces ``routes``; both families on both sessions. ``restart``: seconds for which its routes outlive it,
        and for which it keeps ours. ``hops``: how far the node is."""
        raise NotImplementedError

    def drain(self) -> None:
        """From now on it announces what it does with the community GRACEFUL_SHUTDOWN (RFC 8326)."""
        raise NotImplementedError

    def table(self) -> dict[str, set[str]]:
        """Prefix -> communities and MED of what it holds from us, as texts; stale ones too."""
        raise NotImplementedError

    def paths(self) -> dict[str, tuple[int, ...]]:
        """Prefix -> AS_PATH of what it holds from us."""
        raise NotImplementedError

    def communities(self, prefix: str) -> set[str]:
        """Standard and large ones of a prefix that it holds from us, as 65100:7 and 65100:7:8."""
        raise NotImplementedError

    def identifier(self, peer: str) -> str:
        """The BGP identifier that the peer gave itself."""
        raise NotImplementedError

    def stale(self) -> bool:
        """It keeps routes of a session that ended, and waits for our End-of-RIB."""
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


_TOLD = "filter told { if source = RTS_STATIC then accept; reject; }"


class Bird(Router):
    kind = "bird"
    #: What else stands in each of its BGP protocols.
    options = ""

    def start(
        self,
        routes: Iterable[str] = (),
        *,
        graceful: bool = True,
        families: Iterable[str] = ("4", "6"),
        passive: bool = False,
        password: str = "",
        ttl_security: bool = False,
        node_as: int = NODE_AS,
        restart: int = 60,
        hops: int = 1,
        marks: Mapping[str, str] = {},
    ) -> None:
        """``marks``: what BIRD does to a route before it is told, in its own words."""
        ends = self._ends
        routes = list(routes)
        said = {r: f"  route {r} blackhole{f' {{ {marks[r]} }}' if r in marks else ''};\n" for r in routes}
        four = "".join(line for r, line in said.items() if ":" not in r)
        six = "".join(line for r, line in said.items() if ":" in r)
        keeps = f"graceful restart on; graceful restart time {restart};" if graceful else "graceful restart off;"
        secure = f'password "{password}";' if password else ""
        secure += " ttl security on;" if ttl_security else ""
        channels = "".join(f"  ipv{f} {{ import all; export filter told; next hop self; }};\n" for f in "46")
        sessions = "".join(
            f"protocol bgp node{f} {{\n  local {local} as {TOR_AS};\n  neighbor {peer} as {node_as};\n"
            f"  {'direct' if hops == 1 else f'multihop {hops}'};\n"
            f"  hold time 9;\n  connect delay time 1; connect retry time 1; error wait time 1,2;\n"
            f"  {'passive on;' if passive else ''} {keeps} {secure} {self.options}\n{channels}}}\n"
            for f, local, peer in (("4", ends.tor4, ends.node4), ("6", ends.tor6, ends.node6))
            if f in families
        )
        config = self._config = self.folder / "bird.conf"
        config.write_text(
            f"log stderr all;\nrouter id {ends.tor4};\n{_TOLD}\nprotocol device {{ scan time 1; }}\n"
            "protocol kernel { ipv4 { export where source = RTS_BGP; import none; }; }\n"
            "protocol kernel { ipv6 { export where source = RTS_BGP; import none; }; }\n"
            f"protocol static s4 {{ ipv4;\n{four}}}\nprotocol static s6 {{ ipv6;\n{six}}}\n{sessions}"
        )
        self._control = self.folder / "bird.ctl"
        self.process = self._net.spawn(
            self._name, ["bird", "-f", "-c", str(config), "-s", str(self._control)], log=self.folder / "log"
        )

    def drain(self) -> None:
        text = self._config.read_text()
        self._config.write_text(text.replace(_TOLD, _TOLD.replace("{", "{ bgp_community.add((65535, 0));")))
        self.ask("configure", "soft")
        for protocol in ("node4", "node6"):
            self.ask("reload", "out", protocol)

    def ask(self, *words: str) -> str:
        done = self._net.run(self._name, ["birdc", "-s", str(self._control), *words], check=False)
        return done.stdout

    def table(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for protocol in ("node4", "node6"):
            prefix = ""
            for line in self.ask("show", "route", "protocol", protocol, "all").splitlines():
                head = re.match(r"([0-9a-f:.]+/\d+)\s", line)
                if head:
                    prefix = head[1]
                    found.setdefault(prefix, set())
                if "BGP.med:" in line:
                    found[prefix].add("med " + line.split()[-1])
                if "BGP.community:" in line:
                    found[prefix].update(re.findall(r"\((\d+,\d+)\)", line))
                if "BGP.large_community:" in line:
                    found[prefix].update("".join(x.split()) for x in re.findall(r"\((\d+, \d+, \d+)\)", line))
        return found

    def paths(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        prefix = ""
        for line in self.ask("show", "route", "all").splitlines():
            head = re.match(r"([0-9a-f:.]+/\d+)\s", line)
            prefix = head[1] if head else prefix
            if "BGP.as_path:" in line:
                found[prefix] = tuple(int(n) for n in line.partition(":")[2].split())
        return found

    def communities(self, prefix: str) -> set[str]:
        return {mark.replace(",", ":") for mark in self.table().get(prefix, ()) if "," in mark}

    def identifier(self, peer: str) -> str:
        protocol = "node6" if ":" in peer else "node4"
        return re.findall(r"Neighbor ID: +(\S+)", self.ask("show", "protocols", "all", protocol))[0]

    def stale(self) -> bool:
        return "Neighbor GR:" in self.ask("show", "protocols", "all")

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


#: What FRR calls well-known communities.
_NAMES = {"noExport": "65535:65281", "noAdvertise": "65535:65282", "gracefulShutdown": "65535:0"}


def await_zebra(path: Path) -> None:
    """Returns when somebody listens there: a bgpd that finds nobody tries again after 10 s (lib/zclient.c), and its
    routes are in no kernel until then, though it announces them."""
    eventually(lambda: answers(path))


def _said(vty: socket.socket, command: str) -> str:
    """The answer of an FRR daemon's vty; three zero bytes and a code end it."""
    vty.sendall(command.encode() + b"\0")
    said = b""
    while said[-4:-1] != b"\0\0\0":
        part = vty.recv(1 << 16)
        if not part:
            raise ConnectionError(command)
        said += part
    return said[:-4].decode()


class Frr(Router):
    kind = "frr"
    _folder = Path("/usr/lib/frr")

    def start(
        self,
        routes: Iterable[str] = (),
        *,
        graceful: bool = True,
        families: Iterable[str] = ("4", "6"),
        passive: bool = False,
        password: str = "",
        ttl_security: bool = False,
        node_as: int = NODE_AS,
        restart: int = 60,
        hops: int = 1,
    ) -> None:
        ends = self._ends
        routes = list(routes)
        lines = ["log file " + str(self.folder / "frr.log"), f"router bgp {TOR_AS}", f" bgp router-id {ends.tor4}"]
        lines += [" no bgp ebgp-requires-policy", " no bgp default ipv4-unicast", " no bgp network import-check"]
        lines += [f" bgp graceful-restart restart-time {restart}", f" bgp graceful-restart stalepath-time {restart}"]
        lines += [" bgp graceful-restart"] if graceful else [" bgp graceful-restart-disable"]
        peers = [p for f, p in (("4", ends.node4), ("6", ends.node6)) if f in families]
        for peer in peers:
            lines += [f" neighbor {peer} remote-as {node_as}", f" neighbor {peer} timers 3 9"]
            lines += [f" neighbor {peer} timers connect 1", f" neighbor {peer} advertisement-interval 0"]
            lines += [f" neighbor {peer} passive"] if passive else []
            lines += [f" neighbor {peer} ebgp-multihop {hops}"] if hops > 1 else []
            lines += [f" neighbor {peer} password {password}"] if password else []
            lines += [f" neighbor {peer} ttl-security hops 1"] if ttl_security else []
        for family in "46":
            lines += [f" address-family ipv{family} unicast"]
            lines += [f"  network {r}" for r in routes if (":" in r) == (family == "6")]
            lines += [f"  neighbor {peer} activate" for peer in peers]
            lines += [" exit-address-family"]
        let_root_run_frr(self.folder.parent)
        config = self.folder / "frr.conf"
        config.write_text("\n".join(lines) + "\n")
        zebra = self.folder / "zebra.conf"
        zebra.write_text("")
        common = ["--vty_socket", str(self.folder), "-z", str(self.folder / "zserv"), "-u", "root", "-g", "root"]

        def spawn(daemon: str, config: Path, *words: str) -> subprocess.Popen[bytes]:
            argv = [str(self._folder / daemon), "-f", str(config), "-i", str(self.folder / f"{daemon}.pid"), *words]
            return self._net.spawn(self._name, [*argv, *common], log=self.folder / "log")

        # One that is not there ends it.
        listening = [w for f, end in (("4", ends.tor4), ("6", ends.tor6)) if f in families for w in ("-l", end)]
        self._zebra = spawn("zebra", zebra)
        await_zebra(self.folder / "zserv")
        self.process = spawn("bgpd", config, "-p", "179", *listening)

    def drain(self) -> None:
        self.ask("configure terminal", f"router bgp {TOR_AS}", "bgp graceful-shutdown")

    def ask(self, *commands: str) -> str:
        """What ``vtysh -d bgpd -c ...`` prints, without the program, which builds all of FRR's grammar at each start.
        Empty from a bgpd that is not there."""
        with socket.socket(socket.AF_UNIX) as vty:
            vty.settimeout(60)
            try:
                vty.connect(str(self.folder / "bgpd.vty"))
                return "".join([_said(vty, command) for command in ("enable", *commands)])
            except (FileNotFoundError, ConnectionError):
                return ""

    def table(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for peer in (self._ends.node4, self._ends.node6):
            for family in ("ipv4", "ipv6"):
                try:
                    routes = json.loads(self.ask(f"show bgp {family} unicast neighbors {peer} routes json"))["routes"]
                except (ValueError, KeyError):
                    continue
                for prefix, paths in routes.items():
                    marks = found.setdefault(prefix, set())
                    for path in paths:
                        marks.update([f"med {path['metric']}"] if path.get("metric") else [])
        return found

    def paths(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for family in ("ipv4", "ipv6"):
            routes = json.loads(self.ask(f"show bgp {family} unicast json") or "{}").get("routes", {})
            for prefix, (path, *_) in routes.items():
                found[prefix] = tuple(int(n) for n in path["path"].split())
        return found

    def communities(self, prefix: str) -> set[str]:
        family = "ipv6" if ":" in prefix else "ipv4"
        (path, *_) = json.loads(self.ask(f"show bgp {family} unicast {prefix} json"))["paths"]
        standard = (_NAMES.get(mark, mark) for mark in path.get("community", {}).get("list", ()))
        return {*standard, *path.get("largeCommunity", {}).get("list", ())}

    def identifier(self, peer: str) -> str:
        return str(json.loads(self.ask(f"show bgp neighbors {peer} json"))[peer]["remoteRouterId"])

    def stale(self) -> bool:
        return '"stale":true' in "".join(
            self.ask(f"show bgp {family} unicast neighbors {peer} routes json")
            for peer in (self._ends.node4, self._ends.node6)
            for family in ("ipv4", "ipv6")
        )

    def stop(self) -> None:
        assert self.process is not None
        for process in (self.process, self._zebra):
            process.kill()
            process.wait()


KINDS = {"bird": Bird, "frr": Frr}
