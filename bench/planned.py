"""How long a plan takes that has 5,000 prefixes in it: when all of them have just come, and when none has changed."""

from __future__ import annotations

import time
from statistics import median

from agent.bgp.model import Attributes, EndOfRib, Received, SessionUp, SpeakerState, Update
from agent.fib import Address, KernelState, Link
from agent.plan import Cluster, Plan, Snapshot, plan
from agent.rib import Rib
from store.model import (
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPPeer,
    BGPPeerSpec,
    IPPool,
    IPPoolSpec,
    Meta,
    Node,
    NodeAddress,
    NodeStatus,
)

PREFIXES, ROUNDS = 5000, 9
_NOW = 1000.0


def figures(prefixes: int = PREFIXES, rounds: int = ROUNDS) -> dict[str, float]:
    """``agent.plan*_ms``: of one ToR, and of two that announce the same."""
    found: dict[str, float] = {}
    for tors in (1, 2):
        times = [_once(prefixes, tors) for _ in range(rounds)]
        name = "agent.plan_5k" if tors == 1 else "agent.plan_5k_two_tors"
        found[f"{name}_ms"] = 1000 * median(new for new, _ in times)
        found[f"{name}.unchanged_ms"] = 1000 * median(same for _, same in times)
    return found


def _once(prefixes: int, tors: int) -> tuple[float, float]:
    """Seconds of the first plan and of the second."""
    rib = Rib()

    def take() -> tuple[Plan, float]:
        snapshot = _snapshot(rib, tors)
        begin = time.perf_counter()
        made = plan(snapshot)
        return made, time.perf_counter() - begin

    rib.configure(take()[0].peers, _NOW)
    for tor in range(tors):
        _tell(rib, f"10.1.{tor}.0", prefixes)
    first, new = take()
    if len(first.routes) != prefixes:
        raise AssertionError(f"{len(first.routes)} routes of {prefixes} are planned")
    return new, take()[1]


def _tell(rib: Rib, peer: str, prefixes: int) -> None:
    rib.apply(SessionUp(peer=peer, generation=1, families=("ipv4 unicast",)), _NOW)
    attributes = Attributes(as_path=(65001, 65000, 65002), origin="igp")
    for start in range(0, prefixes, 100):
        texts = (f"10.64.{i >> 6}.{(i & 63) * 4}/30" for i in range(start, start + 100))
        routes = tuple(Received(prefix=text, next_hop=peer, attributes=attributes) for text in texts)
        rib.apply(Update(peer=peer, generation=1, announced=routes), _NOW)
    rib.apply(EndOfRib(peer=peer, generation=1, family="ipv4 unicast"), _NOW)


def _snapshot(rib: Rib, tors: int) -> Snapshot:
    address = NodeAddress(type="InternalIP", address="10.1.0.1")
    return Snapshot(
        node="node-1",
        now=_NOW,
        cluster=Cluster(
            node=Node(metadata=Meta(name="node-1"), status=NodeStatus(addresses=(address,))),
            configuration=BGPConfiguration(
                metadata=Meta(name="default"), spec=BGPConfigurationSpec(node_to_node_mesh_enabled=False)
            ),
            peers=tuple(
                BGPPeer(metadata=Meta(name=f"tor-{tor}"), spec=BGPPeerSpec(peer_ip=f"10.1.{tor}.0", as_number=65001))
                for tor in range(tors)
            ),
            pools=(IPPool(metadata=Meta(name="pods"), spec=IPPoolSpec(cidr="10.64.0.0/10")),),
        ),
        kernel=KernelState(
            links={tor + 2: Link(index=tor + 2, name=f"up{tor}") for tor in range(tors)},
            addresses=tuple(
                Address(address=f"10.1.{tor}.1", subnet=f"10.1.{tor}.0/31", interface=tor + 2) for tor in range(tors)
            ),
        ),
        speaker=SpeakerState(known=True),
        rib=rib,
        link_name=lambda container, interface: "",
    )
