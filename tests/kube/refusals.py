"""Objects that are refused, and their neighbours that are not: said once, held against ``store.validate`` and CEL."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from store.model import (
    BGPConfiguration,
    BGPFilter,
    BGPNodeStatus,
    BGPPeer,
    IPAMBlock,
    IPAMConfiguration,
    IPPool,
    IPReservation,
    Resource,
    block_name,
)

Json = dict[str, Any]


class Case(NamedTuple):
    """``before`` is the spec that the object had (it is updated then); ``status`` is written after the spec."""

    kind: type[Resource]
    name: str
    spec: Any
    status: Any = None
    metadata: Mapping[str, Any] = MappingProxyType({})
    before: Any = None

    @property
    def wire(self) -> Json:
        wire: Json = {
            "apiVersion": self.kind.API,
            "kind": self.kind.kind(),
            "metadata": {"name": self.name, **self.metadata},
        }
        if self.spec is not None:
            wire["spec"] = self.spec
        if self.status is not None:
            wire["status"] = self.status
        return wire


def pool(cidr: Any = "10.0.0.0/16", *, name: str = "pool", before: Any = None, **spec: Any) -> Case:
    return Case(IPPool, name, {"cidr": cidr, **spec}, before=before)


def block(cidr: Any = "10.0.0.0/26", *, name: str = "", status: Any = None, before: Any = None, **spec: Any) -> Case:
    spec = {"cidr": cidr, "pool": "pool", "node": "node-1", **spec}
    return Case(IPAMBlock, name or block_name(str(cidr)), spec, status, before=before)


def allocations(*addresses: Any, cidr: str = "10.0.0.0/26", **more: Any) -> Case:
    made = [{"address": a, "network": "pods", "container": "c1", "interface": "eth0", **more} for a in addresses]
    return block(cidr, status={"allocations": made})


def peer(ip: Any = "10.0.0.1", **spec: Any) -> Case:
    return Case(BGPPeer, "peer", {"peerIP": ip, "asNumber": 65001, **spec})


def by_label(selector: Any = "has(rr)", **spec: Any) -> Case:
    return Case(BGPPeer, "peer", {"peerSelector": selector, **spec})


def rule(field: str = "importV4", **fields: Any) -> Case:
    return Case(BGPFilter, "filter", {field: [{"action": "Accept", **fields}]})


def within(cidr: Any = "10.0.0.0/8", operator: str = "In", *, field: str = "importV4", **lengths: Any) -> Case:
    return rule(field, cidr=cidr, matchOperator=operator, **({"prefixLength": lengths} if lengths else {}))


def operation(*operations: Any, action: str = "Accept") -> Case:
    return rule(action=action, operations=list(operations))


def reservation(*cidrs: Any) -> Case:
    return Case(IPReservation, "reservation", {"reservedCIDRs": list(cidrs)})


def ipam(*, name: str = "default", **spec: Any) -> Case:
    return Case(IPAMConfiguration, name, spec)


def configuration(*, name: str = "default", **spec: Any) -> Case:
    return Case(BGPConfiguration, name, spec)


def named(name: str) -> Case:
    return pool(name=name)


def labelled(**metadata: Any) -> Case:
    return Case(IPPool, "pool", {"cidr": "10.0.0.0/16"}, metadata=metadata)


NOT_CANONICAL = ("fd00:0::/64", "FD00::/64", "fd00:0:0:0::/64", "fd00::0/64", "fd00:0010::/64", "10.0.0.1/16")
NO_CIDR = (
    "",
    "10.0.0.0",
    "10.0.0.0/33",
    "10.0/16",
    "fd00::/129",
    "10.0.0.0/016",
    "10.00.0.0/16",
    "::ffff:10.0.0.0/112",
)
SPECIAL = ("0.0.0.0/0", "127.0.0.0/16", "169.254.0.0/16", "224.0.0.0/8", "255.0.0.0/8", "128.0.0.0/1", "::/0", "::/64")
OVERLAY = ("Always", "CrossSubnet", "always", "")
NO_SELECTOR = (
    "a = 'b'",
    "all",
    "all(",
    "has()",
    "a == b",
    "a in ['b']",
    "!",
    "a == 'b' &&",
    "== 'b'",
    "a == 'b' c",
    "(a",
)
NO_PEER = (
    *("", "tor-1", "10.0.0", "10.0.0.1/32", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:bgp", ":179"),
    *(
        "fd00::1::2",
        "FD00::1",
        "fd00:0::1",
        "[fd00::1",
        "fd00::1]",
        "[fd00::1]:",
        "[fd00::1]:0",
        "[fd00::1]x",
        "[]:179",
    ),
    *("[10.0.0.1]:179", "[10.0.0.1]", "fe80::1%eth0", "224.0.0.5", "ff02::5", "0.0.0.0", "::", "10.0.0.01"),
    *("[[fd00::1]]", "10.0.0.1:+179", "10.0.0.1:000179", "10.0.0.1:1:1", "10.0.0.1 "),
)
NO_DURATION = ("", "120", "2 m", "-1s", "1d", "4096s", "2h", "1s1", "s")

BAD: dict[str, Case] = {
    **{f"pool cidr {c!r}": pool(c) for c in (*NOT_CANONICAL, *NO_CIDR, *SPECIAL, "fe80::/64", "ff00::/16", 10, None)},
    **{f"pool {field} {mode!r}": pool(**{field: mode}) for field in ("ipipMode", "vxlanMode") for mode in OVERLAY},
    **{f"pool selector {s}": pool(nodeSelector=s) for s in NO_SELECTOR},
    **{f"pool blockSize {s!r}": pool(blockSize=s) for s in (-1, 1, 15, 16, 19, 33, 128, "26", 26.5)},
    **{f"v6 pool blockSize {s}": pool("fd00::/64", blockSize=s) for s in (26, 63, 64, 115, 129)},
    "pool of podCIDRs with a block size": pool(usePodCIDRs=True, blockSize=26),
    "pool of podCIDRs with a text for it": pool(usePodCIDRs="yes"),
    "pool that turns to podCIDRs": pool(usePodCIDRs=True, before={"cidr": "10.0.0.0/16"}),
    "pool that turns from podCIDRs": pool(before={"cidr": "10.0.0.0/16", "usePodCIDRs": True}),
    "pool below the default size": pool("10.0.0.0/27"),
    "v6 pool below the default size": pool("fd00::/123"),
    "pool with nat": pool(natOutgoing=True),
    "pool with another assignment": pool(assignmentMode="Sometimes"),
    "pool for other uses": pool(allowedUses=["Workload", "LoadBalancer"]),
    "pool for tunnels alone": pool(allowedUses=["Tunnel"]),
    "pool for nothing": pool(allowedUses=[]),
    "pool with a text for a boolean": pool(disabled="no"),
    "pool without cidr": Case(IPPool, "pool", {}),
    "pool without spec": Case(IPPool, "pool", None),
    "pool that moves": pool("10.1.0.0/16", before={"cidr": "10.0.0.0/16"}),
    "pool that grows": pool("10.0.0.0/15", before={"cidr": "10.0.0.0/16"}),
    "pool of another block size": pool(blockSize=27, before={"cidr": "10.0.0.0/16", "blockSize": 26}),
    "pool of a new block size": pool(blockSize=26, before={"cidr": "10.0.0.0/16"}),
    "pool that loses its block size": pool(before={"cidr": "10.0.0.0/16", "blockSize": 28}),
    **{f"reservation {c!r}": reservation(c) for c in (*NOT_CANONICAL, "", "10.0.0", "10.0.0.0/33", "fd00::0", 1)},
    "reservation named twice": reservation("10.0.0.1", "10.0.0.1"),
    **{f"max blocks {n!r}": ipam(maxBlocksPerHost=n) for n in (-1, 1_000_001, "4", 1.5)},
    "borrowing": ipam(strictAffinity=False),
    "ipam configuration of another name": ipam(name="other"),
    **{f"block cidr {c!r}": block(c) for c in (*NOT_CANONICAL, *NO_CIDR)},
    "block of another name": block(name="10-0-0-64-26"),
    "block of no name": block(name="block"),
    "block of another spelling": block("fd00::40/122", name="fd00-0-40-122"),
    "block within another range": block(within="10.0.16.0/20"),
    **{f"block within {c!r}": block(within=c) for c in ("10.0.0.1/20", "fd00::/116", "x")},
    "block within itself": block(within="10.0.0.0/26"),
    "v6 block within another range": block("fd00::40/122", within="fd00::/112"),
    "large block within itself": block("10.0.0.0/16", within="10.0.0.0/16"),
    "large block within another": block("10.0.0.0/16", within="10.0.16.0/20"),
    "large v6 block within itself": block("fd00::/64", within="fd00::/64"),
    "block of nobody": block(node=""),
    "block of no pool": block(pool=""),
    "block of a node that cannot be": block(node="Node-1"),
    "block of a pool that cannot be": block(pool="a_b"),
    "block of a long label": block(node="n" * 64),
    "block without node": Case(IPAMBlock, "10-0-0-0-26", {"cidr": "10.0.0.0/26", "pool": "pool"}),
    **{
        f"block that changes its {field}": block(**{field: "other"}, before={**block().spec})
        for field in ("pool", "node")
    },
    "block that changes its cidr": block("10.0.0.64/26", name="10-0-0-0-26", before={**block().spec}),
    **{f"allocation {a!r}": allocations(a) for a in ("10.0.0.64", "10.0.1.0", "9.255.255.255", "fd00::1", "x", "", 1)},
    **{
        f"v6 allocation {a}": allocations(a, cidr="fd00::40/122")
        for a in ("fd00::80", "fd00::3f", "FD00::41", "10.0.0.1")
    },
    "allocation twice": allocations("10.0.0.1", "10.0.0.2", "10.0.0.1"),
    **{f"allocation of no {f}": allocations("10.0.0.1", **{f: ""}) for f in ("network", "container", "interface")},
    "allocation without container": block(
        status={"allocations": [{"address": "10.0.0.1", "network": "pods", "interface": "eth0"}]}
    ),
    "block with fewer than none used": block(status={"used": -1}),
    "block with fewer than none free": block(status={"free": -1}),
    "condition of a status that is none": block(status={"conditions": [{"type": "A", "status": "Perhaps"}]}),
    **{f"configuration AS {n!r}": configuration(asNumber=n) for n in (0, -1, 23456, 65535, 4294967295, 2**40, "65000")},
    "configuration of another name": configuration(name="mine"),
    **{f"configuration imports {c!r}": configuration(importCIDRs=[c]) for c in (*NOT_CANONICAL, "10.0.0.1", "")},
    "configuration imports twice": configuration(importCIDRs=["10.0.0.0/8", "10.0.0.0/8"]),
    **{
        f"configuration of a node: {spec}": configuration(name="node.node-1", **spec)
        for spec in (
            *({"asNumber": 64513}, {"nodeToNodeMeshEnabled": False}, {"importCIDRs": ["10.0.0.0/8"]}),
            *({"nodeMeshPassword": {"secretKeyRef": {"name": "a", "key": "b"}}}, {"nodeMeshMaxRestartTime": "60s"}),
        )
    },
    **{f"configuration port {p}": configuration(listenPort=p) for p in (-1, 65536, "179")},
    **{
        f"configuration communities {c}": configuration(communities=c)
        for c in (
            *(
                [{"name": "A", "value": "1:1"}],
                [{"name": "a" * 64, "value": "1:1"}],
                [{"name": "a", "value": "1"}],
                [{"name": "a"}],
                [{"value": "1:1"}],
            ),
            [{"name": "a", "value": "1:1"}, {"name": "a", "value": "1:2"}],
        )
    },
    **{
        f"configuration advertises {a}": configuration(prefixAdvertisements=[a])
        for a in (
            *({"cidr": "10.0.0.1/8"}, {"communities": ["1:1"]}, {"cidr": "10.0.0.0/8", "communities": ["a"]}),
            *({"cidr": "10.0.0.0/8", "communities": ["65536:1"]}, {"cidr": "10.0.0.0/8", "communities": ["1:1"] * 9}),
        )
    },
    **{f"configuration restart time {t}": configuration(nodeMeshMaxRestartTime=t) for t in NO_DURATION},
    **{f"peer {ip!r}": peer(ip) for ip in (*NO_PEER, 179)},
    **{f"peer AS {n}": peer(asNumber=n) for n in (0, 23456, 65535, 4294967295)},
    "peer without AS": Case(BGPPeer, "peer", {"peerIP": "10.0.0.1"}),
    "peer of a node that cannot be": peer(node="Node_1"),
    "peer of node and selector": peer(node="node-1", nodeSelector="all()"),
    **{f"peer selector {s}": peer(nodeSelector=s) for s in NO_SELECTOR},
    **{f"peer allows {n} local AS": peer(numAllowedLocalASNumbers=n) for n in (-1, 11)},
    **{f"peer restart time {t!r}": peer(maxRestartTime=t) for t in (*NO_DURATION, 120)},
    **{f"peer hold time {t}": peer(holdTime=t) for t in (0, 2, 65536, -1)},
    **{f"peer max prefixes {n}": peer(maxPrefixes=n) for n in (0, -1)},
    **{f"peer imports {c!r}": peer(importCIDRs=[c]) for c in (*NOT_CANONICAL, "10.0.0.1", "")},
    **{f"peer default route {d!r}": peer(defaultRoute=d) for d in ("Always", "never", "")},
    **{f"peer filters {f}": peer(filters=f) for f in (["A"], ["a", "a"], [""], [f"f{i}" for i in range(17)])},
    **{f"peer peerSelector {s}": by_label(s) for s in NO_SELECTOR},
    "peer of selector and address": by_label(peerIP="10.0.0.1"),
    "peer of selector and AS": by_label(asNumber=65001),
    "peer of selector that is waited for": by_label(passive=True),
    "peer of nobody": Case(BGPPeer, "peer", {"asNumber": 65001, "peerSelector": ""}),
    "peer of an empty spec": Case(BGPPeer, "peer", {}),
    **{f"peer ttl {n}": peer(ttlSecurity=n) for n in (-1, 255, "1")},
    **{
        f"peer behind {g!r}": peer(reachableBy=g)
        for g in ("gw", "010.0.0.254", "10.0.0.254/32", "10.0.0.1", "fd00::1", "224.0.0.1", "0.0.0.0", "127.0.0.1")
    },
    **{
        f"v6 peer behind {g!r}": peer("[fd00::1]:1179", reachableBy=g) for g in ("fd00::1", "10.0.0.1", "fe80::1", "::")
    },
    "peers by selector behind a gateway": by_label(reachableBy="10.0.0.254"),
    "peer ttl and passive": peer(ttlSecurity=1, passive=True),
    **{f"passive peer {ip}": peer(ip, passive=True) for ip in ("10.0.0.1:1179", "[fd00::1]:179")},
    **{f"peer source {s!r}": peer(sourceAddress=s) for s in ("Any", "usenodeip")},
    **{f"peer local AS {n}": peer(localASNumber=n) for n in (0, 23456, 65535, 4294967295)},
    **{
        f"peer password {r}": peer(password={"secretKeyRef": r})
        for r in ({"name": "A", "key": "k"}, {"name": "s", "key": "a b"}, {"name": "s"}, {"name": "s", "key": ".."})
    },
    "peer password of nothing": peer(password={}),
    "rule without action": Case(BGPFilter, "filter", {"exportV6": [{}]}),
    "too many rules": Case(BGPFilter, "filter", {"exportV6": [{"action": "Accept"}] * 129}),
    **{f"rule action {a!r}": rule(action=a) for a in ("accept", "", 1)},
    **{f"rule cidr {c!r}": within(c) for c in (*NOT_CANONICAL, *NO_CIDR, "fd00::/8")},
    "v6 rule of a v4 cidr": within(field="exportV6"),
    "rule operator": within(operator="Inside"),
    "rule cidr without operator": rule(cidr="10.0.0.0/8"),
    "rule operator without cidr": rule(matchOperator="In"),
    "rule lengths without cidr": rule(prefixLength={"min": 8}),
    "rule lengths of equal": within(operator="Equal", min=8),
    **{f"rule from {n}": within(min=n) for n in (-1, 7, 33)},
    **{f"rule to {n}": within(max=n) for n in (7, 33)},
    "rule from beyond to": within(min=17, max=16),
    "v6 rule to": within("fd00::/8", field="importV6", max=129),
    "rule source": rule(source="Local"),
    **{f"rule interface {i!r}": rule(interface=i) for i in ("a b", "a" * 16, "a/b")},
    "rule peer type": rule(peerType="ebgp"),
    **{
        f"rule community {c!r}": rule(communities={"values": [c]})
        for c in ("", "1", "1:2:3:4", "65536:0", "01:1", "1:4294967296:1", "no-such", "1:1 ", ":1", "1:")
    },
    **{f"rule communities {c}": rule(communities={"values": c}) for c in ([], ["1:1", "1:2"])},
    **{f"rule path {p}": rule(asPathPrefix=p) for p in ([0], [23456], ["1"], [1] * 11)},
    "operation of none": operation({}),
    "operation of both": operation({"addCommunity": {"value": "1:1"}, "prependASPath": {"prefix": [1]}}),
    "operation of a rejection": operation({"addCommunity": {"value": "1:1"}}, action="Reject"),
    "operation community": operation({"addCommunity": {"value": "1"}}),
    **{f"operation path {p}": operation({"prependASPath": {"prefix": p}}) for p in ([], [0], [1] * 11)},
    "too many operations": operation(*[{"addCommunity": {"value": "1:1"}}] * 11),
    **{f"name {n!r}": named(n) for n in ("A", "a_b", "-a", "a-", "a..b", "a" * 254, "b" * 64, "a." + "b" * 64)},
    "label key": labelled(labels={"a b": "c"}),
    "label value": labelled(labels={"a": "b c"}),
    "long label value": labelled(labels={"a": "b" * 64}),
    "annotation key": labelled(annotations={"a/b/c": ""}),
    "annotations too big": labelled(annotations={"a": "b" * 262144}),
    "finalizer with a space": labelled(finalizers=["underlay.network/own er"]),
    "owner of no kind": labelled(ownerReferences=[{"apiVersion": "v1", "kind": "", "name": "n", "uid": "u"}]),
    "owner of no uid": labelled(ownerReferences=[{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": ""}]),
    "session of a text for a count": Case(
        BGPNodeStatus,
        "node-1",
        None,
        {"sessions": [{"peer": "p", "address": "a", "asNumber": 1, "state": "Idle", "received": "1"}]},
    ),
}

GOOD: dict[str, Case] = {
    **{f"pool {c}": pool(c) for c in ("10.0.0.0/8", "10.0.0.0/26", "fd00:10:244::/48", "fd00::/122", "2001:db8::/32")},
    **{f"pool blockSize {s}": pool(blockSize=s) for s in (0, 20, 26, 32)},
    **{f"v6 pool blockSize {s}": pool("fd00::/64", blockSize=s) for s in (116, 128)},
    "pool of all that Calico writes": pool(
        blockSize=26,
        ipipMode="Never",
        vxlanMode="Never",
        natOutgoing=False,
        nodeSelector="all()",
        disabled=False,
        disableBGPExport=True,
        assignmentMode="Manual",
        allowedUses=["Workload", "Tunnel"],
    ),
    **{
        f"selector {s}": pool(nodeSelector=s)
        for s in (
            *("", "all()", "has(a)", "! has( a.b/c )", "a=='b'", 'a != "b"', "a in {'b',\"c\"}", "a not  in {}"),
            *("a in{'b'}", "a contains 'b'", "a starts with 'b'", "a ends with\n'b'", "!!has(a)&&has(b)||has(c)"),
            *("(a == 'b')", "!(a == 'b' && (has(c) || !has(d)))", "all == 'x'", "in == 'x'", "a == '(b' && c == ')'"),
            *("a == 'b && c == d'", "((((((all()))))))", " all() "),
        )
    },
    **{f"pool of podCIDRs {c}": pool(c, usePodCIDRs=True) for c in ("10.0.0.0/16", "10.0.0.0/28", "fd00::/48")},
    "pool of podCIDRs writes a 0": pool(usePodCIDRs=True, blockSize=0),
    "pool of podCIDRs stays": pool(
        usePodCIDRs=True, disabled=True, before={"cidr": "10.0.0.0/16", "usePodCIDRs": True}
    ),
    "pool writes a false": pool(usePodCIDRs=False, before={"cidr": "10.0.0.0/16"}),
    "pool stays": pool(disabled=True, before={"cidr": "10.0.0.0/16"}),
    "pool writes a 0": pool(blockSize=0, before={"cidr": "10.0.0.0/16"}),
    "reservation": reservation("10.0.0.1", "10.0.0.0/24", "fd00::1", "fd00::/64", "10.0.0.1/32"),
    "reservation of nothing": reservation(),
    **{
        f"block {c}": block(c)
        for c in (
            *("10.0.0.0/26", "10.244.3.64/26", "10.0.0.1/32", "0.0.0.0/0", "fd00:10:244::40/122", "fd00::/48", "::/0"),
            *("::1:0/112", "::1/128", "1::/16", "1:2:3:4:5:6:7:0/112", "fd00:0:0:1::/64", "1:0:0:2::/64"),
        )
    },
    "block of a long node": block(node=".".join(["n" * 63] * 3)),
    "block within its range": block("10.0.31.64/26", within="10.0.16.0/20"),
    "v6 block within its range": block("fd00::1:40/122", within="fd00::1:0/116"),
    "large block within its first range": block("10.0.0.0/16", within="10.0.0.0/20"),
    "large v6 block within its first range": block("fd00::/64", within="fd00::/116"),
    "block within nothing": block(within=""),
    "block stays": block(before={**block().spec}),
    "full block": allocations(*(f"10.0.0.{i}" for i in range(64)), pod="default/a", since="2026-01-01T00:00:00Z"),
    "v6 allocations": allocations("fd00::40", "fd00::7f", cidr="fd00::40/122"),
    "block of one": allocations("10.0.0.1", cidr="10.0.0.1/32"),
    "block in every state": block(
        status={
            "used": 1,
            "free": 63,
            "releasing": True,
            "writer": {"bootId": "b", "start": 1},
            "conditions": [{"type": "A", "status": "True", "reason": "B", "message": "c"}],
        }
    ),
    **{f"max blocks {n}": ipam(maxBlocksPerHost=n, strictAffinity=True) for n in (0, 1, 1_000_000)},
    "ipam configuration of nothing": ipam(),
    "ipam configuration without spec": Case(IPAMConfiguration, "default", None),
    "configuration": configuration(
        asNumber=64512, nodeToNodeMeshEnabled=False, importCIDRs=["10.0.0.0/8", "0.0.0.0/0"]
    ),
    "configuration of nothing": configuration(),
    "configuration of a node": configuration(
        name="node.node-1.example.org",
        listenPort=1179,
        communities=[{"name": "rack", "value": "65001:7"}, {"name": "r.2", "value": "4294967295:0:1"}],
        prefixAdvertisements=[{"cidr": "fd00::/8", "communities": ["rack", "r.2", "1:1"]}, {"cidr": "10.0.0.0/8"}],
    ),
    "configuration of a node with nothing": configuration(name="node.a"),
    "configuration of a node without spec": Case(BGPConfiguration, "node.a", None),
    "configuration of a node as the API server fills it": configuration(
        name="node.a", asNumber=64512, nodeToNodeMeshEnabled=True, nodeMeshMaxRestartTime="120s", importCIDRs=[]
    ),
    "configuration of the mesh": configuration(
        nodeMeshPassword={"secretKeyRef": {"name": "mesh", "key": "k"}}, nodeMeshMaxRestartTime="0s", listenPort=0
    ),
    "configuration of many": configuration(
        communities=[{"name": f"c{i}", "value": f"65001:{i}"} for i in range(32)],
        prefixAdvertisements=[{"cidr": f"10.{i}.0.0/16", "communities": [f"c{i}"]} for i in range(32)],
    ),
    "configuration ignoring interfaces": configuration(ignoredInterfaces=["docker0", "mgmt*", "*.100"]),
    "configuration without spec": Case(BGPConfiguration, "default", None),
    **{f"configuration AS {n}": configuration(asNumber=n) for n in (1, 23455, 65534, 65536, 4294967294)},
    **{
        f"peer {ip}": peer(ip)
        for ip in (
            *(
                "10.0.0.1",
                "10.0.0.1:1179",
                "10.0.0.1:65535",
                "10.0.0.1:00179",
                "fd00::1",
                "[fd00::1]",
                "[fd00::1]:1179",
            ),
            *("fe80::1", "223.255.255.255", "::1", "[::1]:179"),
        )
    },
    "peer of a node": peer(node="node-1", nodeSelector=""),
    "peer of a selector": peer(node="", nodeSelector="rack == 'r1'"),
    "peer of everything": peer(
        numAllowedLocalASNumbers=10, holdTime=3, maxPrefixes=1, importCIDRs=["fd00::/8"], defaultRoute="Fallback"
    ),
    **{f"peer filters {f}": peer(filters=f) for f in ([], ["a", "b.c"])},
    "peer in every way": peer(
        "fd00::1", passive=True, ttlSecurity=0, sourceAddress="UseNodeIP", localASNumber=4294967294
    ),
    "passive peer": peer(passive=True),
    **{f"peer behind {g!r}": peer("10.0.0.1:1179", reachableBy=g) for g in ("", "10.0.0.254", "169.254.0.1")},
    "v6 peer behind a gateway": peer("[fd00::1]:179", reachableBy="fd00::2"),
    "peer by selector": by_label(nodeSelector="!has(rr)", ttlSecurity=1, holdTime=30, filters=["a"]),
    "peer by selector writes nothing else": by_label("", peerIP="10.0.0.1", asNumber=65001),
    "peer by selector with empty others": by_label(peerIP="", asNumber=0, passive=False),
    "peer not passive with port": peer("10.0.0.1:1179", passive=False, ttlSecurity=254, sourceAddress=""),
    "peer password": peer(password={"secretKeyRef": {"name": "tor.a", "key": "A_b-1."}}),
    "filter without spec": Case(BGPFilter, "filter", None),
    "filter of nothing": Case(BGPFilter, "filter", {}),
    "rule of nothing": rule(),
    "rule of empty texts": rule(cidr="", matchOperator="", source="", interface="", peerType="", asPathPrefix=[]),
    "rule of everything": Case(
        BGPFilter,
        "filter",
        {
            "exportV6": [
                {
                    "action": "Accept",
                    "cidr": "fd00::/8",
                    "matchOperator": "NotIn",
                    "prefixLength": {"min": 8, "max": 128},
                    "source": "RemotePeers",
                    "interface": "*.calico",
                    "peerType": "iBGP",
                    "communities": {"values": ["4294967295:4294967295:0"]},
                    "asPathPrefix": [65001, 4294967294],
                    "operations": [
                        {"addCommunity": {"value": "65535:65535"}},
                        {"prependASPath": {"prefix": [65001] * 10}},
                    ],
                }
            ]
            * 128
        },
    ),
    **{
        f"rule lengths {n}": within(**n)
        for n in ({"min": 8}, {"max": 8}, {"min": 32, "max": 32}, {"min": 8, "max": 32})
    },
    "v6 rule": within("5000::/64", "Equal", field="importV6"),
    **{f"peer restart time {t}": peer(maxRestartTime=t) for t in ("0s", "4095s", "1h", "1h8m15s", "500ms", "1.5m")},
    **{f"name {n}": named(n) for n in ("a", "a.b", "a-1", "1", ".".join(["c" * 63] * 3))},
    "metadata": labelled(
        labels={"underlay.network/a": "B_1.c", "x": ""},
        annotations={"a": "b" * 1000},
        finalizers=["underlay.network/owner"],
        ownerReferences=[{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}],
    ),
    "sessions": Case(
        BGPNodeStatus,
        "node-1",
        None,
        {
            "asNumber": 4294967294,
            "routerID": "10.0.0.1",
            "sessions": [{"peer": "p", "address": "10.0.0.2", "asNumber": 4294967294, "state": "Idle", "received": 5}],
        },
    ),
}
