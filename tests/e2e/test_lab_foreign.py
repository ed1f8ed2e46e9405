"""A router announces what lies in a block that a node is about to claim, as another cluster with that pool would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from cni.marks import PROTO_BLOCKS, PROTO_IMPORTS
from ipam.pool import candidates
from lab.topology import Topology
from store.model import IPPool, IPPoolSpec, Meta
from tests.conftest import eventually
from tests.e2e.conftest import Lab

POOL = next(pool for pool in Topology.build().pools if ":" not in pool.cidr)
BIRDC = shutil.which("birdc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") or "birdc"


@pytest.fixture(scope="module")
def up(lab: Lab) -> Iterator[Lab]:
    lab.command("up", "--racks", "1", "--nodes", "2", "--pods", "1")
    yield lab


def blocks(lab: Lab, node: str) -> dict[str, dict[str, Any]]:
    """The node's IPv4 blocks as the store has them, by CIDR."""
    said = json.loads(lab.inside(node, "underlayctl", "get", "ipamblocks", "-o", "json"))
    items = said.get("items", [said])
    own = {item["spec"]["cidr"]: item for item in items if item["spec"]["node"] == node}
    return {cidr: item for cidr, item in own.items() if ":" not in cidr}


def conditions(block: dict[str, Any]) -> dict[str, str]:
    return {c["type"]: c["message"] for c in block.get("status", {}).get("conditions", ())}


def announce(lab: Lab, router: str, *prefixes: str) -> None:
    """Has the router's BIRD originate these prefixes, and no others."""
    home = lab.folder.member(router)
    path = home / "bird.conf"
    text = path.read_text().partition("# foreign\n")[0]
    routes = " ".join(f"route {prefix} unreachable;" for prefix in prefixes)
    path.write_text(f"{text}# foreign\nprotocol static foreign {{ ipv4; {routes} }}\n")
    said = lab.inside(router, BIRDC, "-s", str(home / "bird.ctl"), "configure")
    assert "Reconfigured" in said, said


def test_a_new_block_that_a_router_routes_to_is_given_back_and_the_next_one_used(up: Lab) -> None:
    lab, node = up, "node-1"
    (old,) = blocks(lab, node)
    pool = IPPool(metadata=Meta(name=POOL.name), spec=IPPoolSpec(cidr=POOL.cidr, block_size=POOL.block_size))
    tried = next(cidr for cidr in candidates(pool, node) if cidr != old)
    inside = f"{ip_network(tried)[9]}/32"
    announce(lab, "tor-1", inside)
    eventually(lambda: inside in {r["dst"] for r in lab.routes(node, "proto", str(PROTO_IMPORTS))})

    # A marked block hands out nothing more, so the node claims another.
    lab.inside(node, "underlayctl", "delete", "ipamblock", blocks(lab, node)[old]["metadata"]["name"], "--force")

    def claimed() -> str:
        return next((c for c, b in blocks(lab, node).items() if c not in (old, tried) and conditions(b)), "")

    used = eventually(claimed)
    told = conditions(blocks(lab, node)[used])["ForeignRoute"]
    for words in (tried, inside, "via", "dev", "another cluster"):
        assert words in told
    assert tried not in blocks(lab, node)
    routes = {(r["dst"], int(r["protocol"])) for r in lab.routes(node)}
    assert (inside, PROTO_IMPORTS) in routes
    assert (used, PROTO_BLOCKS) in routes
    assert (tried, PROTO_BLOCKS) not in routes

    lab.command("pod", "add", "pod-1-9")
    assert ip_address(lab.address("pod-1-9", 4)) in ip_network(used)
    lab.whole()
    check = lab.command("exec", node, "underlayctl", "ipam", "check", check=False)
    assert check.returncode == 1
    assert "ForeignRoute" in check.stdout

    announce(lab, "tor-1")
    eventually(lambda: not conditions(blocks(lab, node)[used]))
    assert "ForeignRoute" not in lab.command("exec", node, "underlayctl", "ipam", "check", check=False).stdout


def test_a_route_into_a_block_in_use_is_refused_and_said(up: Lab) -> None:
    lab, node = up, "node-2"
    (own,) = blocks(lab, node)
    inside = f"{ip_network(own)[9]}/32"
    announce(lab, "tor-1", inside)

    def said() -> bool:
        told = lab.inside(node, "underlayctl", "node", "status", node)
        return "ForeignRoute" in told and inside in told

    eventually(said)
    assert inside not in {r["dst"] for r in lab.routes(node)}
    lab.whole()
    announce(lab, "tor-1")
    eventually(lambda: "ForeignRoute" not in lab.inside(node, "underlayctl", "node", "status", node))
