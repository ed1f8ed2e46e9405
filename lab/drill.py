"""The drills: what happens to a rack sooner or later, done on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from signal import SIGKILL, SIGTERM
from typing import Final

from msgspec.structs import replace

from lab import visitor
from lab.drilling import Drill, Scene, Struck
from lab.errors import LabError
from lab.topology import Topology, rack_name
from store.base import mutate
from store.model import (
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPFilter,
    BGPFilterSpec,
    BGPPeer,
    BGPPeerSpec,
    FilterRuleV4,
    FilterRuleV6,
    IPPool,
    IPPoolSpec,
    Meta,
    PrefixAdvertisement,
    R,
)

#: What config-change makes, and takes away again.
_NAME: Final = "drill"
#: Seconds that a process is away in an upgrade, at most: the image is there already.
_UPGRADE: Final = 2.0
#: Seconds that a machine without power is away, at least: none boots within the hold time.
_BOOT: Final = 12.0


def find(name: str) -> Drill:
    """Raises LabError, which names those that there are."""
    for drill in DRILLS:
        if drill.name == name:
            return drill
    raise LabError(f"no drill is called {name}; there are: {', '.join(drill.name for drill in DRILLS)}")


# -- processes ---------------------------------------------------------------------------------------------------------


async def _kill_agent(scene: Scene) -> None:
    with scene.step(f"kill -9 of the agent of {scene.node}, away for {scene.away:g} s"):
        await scene.restart(scene.node, "agent", signal=SIGKILL, away=scene.away)


async def _kill_speaker(scene: Scene) -> None:
    with scene.step(f"kill -9 of ExaBGP of {scene.node}, away for {scene.away:g} s"):
        await scene.restart(scene.node, "exabgp", signal=SIGKILL, away=scene.away)


async def _kill_both(scene: Scene) -> None:
    restarts = scene.site.processes(scene.node)["agent"].restarts
    long = 2 * scene.away + 5
    with scene.step(f"kill -9 of agent and ExaBGP of {scene.node}: ExaBGP away for {scene.away:g} s"):
        scene.site.kill(scene.node, "agent", SIGKILL, long)
        await scene.restart(scene.node, "exabgp", signal=SIGKILL, away=scene.away)
        if scene.site.processes(scene.node)["agent"].restarts > restarts:
            raise LabError("kill-both: the agent was back before ExaBGP had its sessions: this machine is too busy")
    with scene.step(f"the agent of {scene.node} comes back, {long:g} s after its end"):
        await scene.restarted(scene.node, "agent", restarts)


async def _upgrade(scene: Scene) -> None:
    away = min(scene.away, _UPGRADE)
    for node in scene.site.topology.nodes:
        # In a cluster these are two DaemonSets: agent and CNI server in one, the speaker in the other.
        for parts in (("agent", "cni"), ("exabgp",)):
            with scene.step(f"{node.name}: SIGTERM to {' and '.join(parts)}, the next {away:g} s later"):
                await scene.restart(node.name, *parts, signal=SIGTERM, away=away)


# -- cables and machines -----------------------------------------------------------------------------------------------


async def _cut_uplink(scene: Scene) -> None:
    site, node = scene.site, scene.node
    upper = next(link.upper.name for link in site.topology.links if link.lower.name == node)

    async def mend() -> None:
        with scene.step(f"the link between {node} and {upper} is mended"):
            site.cable(node, upper, up=True)

    with scene.step(f"the link between {node} and {upper} is cut for {scene.away:g} s"):
        scene.afterwards(mend)
        site.cable(node, upper, up=False)
        await scene.stay()


async def _kill_tor(scene: Scene) -> None:
    await _kill_machine(scene, scene.site.topology.tors[0].name)


async def _hang_tor(scene: Scene) -> None:
    site, tor = scene.site, scene.site.topology.tors[0].name
    neighbours = _neighbours(site.topology, tor)

    async def back() -> None:
        with scene.step(f"{tor} sends again"):
            site.mute(tor, on=False)

    with scene.step(f"{tor} sends nothing, its ports are up: until everybody has left it"):
        scene.afterwards(back)
        site.mute(tor, on=True)
        await scene.until(lambda: not any(tor in site.ways(name) for name in neighbours), f"{tor} is still used")
        await scene.stay()


def _neighbours(topology: Topology, router: str) -> list[str]:
    return [far.name for _, far in topology.ends(router)]


async def _drain_tor(scene: Scene) -> None:
    site, tor = scene.site, scene.site.topology.tors[0].name
    neighbours = _neighbours(site.topology, tor)
    nodes = [name for name in neighbours if site.topology.node(name)]

    async def again() -> None:
        with scene.step(f"{tor} takes GRACEFUL_SHUTDOWN back, and is used again"):
            site.use(tor, "leaving")
            await scene.calm(1)
            site.use(tor, "normal")
            await scene.until(lambda: all(tor in site.ways(node) for node in nodes), f"{tor} is not used again")

    async def back() -> None:
        with scene.step(f"{tor} has its sessions again, and learns everything"):
            site.shut(tor, on=False)
            await scene.calm(1)

    with scene.step(f"{tor} announces everything with GRACEFUL_SHUTDOWN, until nobody uses it"):
        scene.afterwards(again)
        site.use(tor, "leaving")
        await scene.until(lambda: not any(tor in site.ways(name) for name in neighbours), f"{tor} is still used")
        site.use(tor, "left")
        await scene.calm(1)
    with scene.step(f"{tor} shuts its sessions for {scene.away:g} s"):
        scene.afterwards(back)
        site.shut(tor, on=True)
        await scene.stay()


async def _drain_node(scene: Scene) -> None:
    site, node = scene.site, scene.node
    pods = [member.name for member in site.members() if member.name in site.pods(node)]
    others = [other.name for other in site.topology.nodes if other.name != node]

    async def pods_again() -> None:
        with scene.step(f"{node} has its {len(pods)} pods again, new ones"):
            for pod in pods:
                if pod not in site.pods(node):
                    await site.pod_add(pod)

    async def undo() -> None:
        with scene.step(f"underlayctl node drain-routes {node} --undo"):
            await site.command(node, "underlayctl", "node", "drain-routes", node, "--undo")
            await scene.calm(1)

    with scene.step(f"the {len(pods)} pods of {node} end, as kubectl drain has it"):
        scene.afterwards(pods_again)
        await scene.release([*pods, node])
        for pod in pods:
            await site.pod_del(pod)
    with scene.step(f"underlayctl node drain-routes {node}"):
        blocks = site.blocks(node)
        scene.afterwards(undo)
        await site.command(node, "underlayctl", "node", "drain-routes", node)
        await scene.until(
            lambda: not any(site.routed(other, blocks) for other in others), f"blocks of {node} are still routed to"
        )
    with scene.step(f"{scene.away:g} s without {node}"):
        await scene.stay()


async def _kill_node(scene: Scene) -> None:
    await _kill_machine(scene, scene.node)


async def _kill_machine(scene: Scene, name: str) -> None:
    site, away = scene.site, max(scene.away, _BOOT)

    async def back() -> None:
        with scene.step(f"{name} has power again"):
            site.power(name, on=True)

    with scene.step(f"{name} has no power for {away:g} s"):
        scene.afterwards(back)
        site.power(name, on=False)
        for part in site.processes(name):
            site.kill(name, part, SIGKILL, away)
        await scene.clock.sleep(away)


# -- wishes ------------------------------------------------------------------------------------------------------------


async def _config_change(scene: Scene) -> None:
    node, store = scene.node, scene.site.store
    peers = [peer.key for peer in (await store.list(BGPPeer)).items if peer.spec.node == node]
    if peers:
        with scene.step(f"BGPPeer {peers[0]}: another holdTime"):
            before = scene.site.connections(node)
            await _change(scene, BGPPeer, peers[0], lambda p: replace(p, spec=replace(p.spec, hold_time=12)))
            await scene.until(lambda: scene.anew(node, before), f"{node} does not take another holdTime")
            await scene.reconnected(node)
    with scene.step(f"BGPFilter {_NAME}, and {len(peers)} peers that name it"):
        await _make(scene, BGPFilter(metadata=Meta(name=_NAME), spec=_everything()))
        for key in peers:
            await _change(scene, BGPPeer, key, lambda p: replace(p, spec=replace(p.spec, filters=(_NAME,))))
        await scene.understood(node)
    with scene.step(f"IPPool {_NAME}, disabled later"):
        await _make(scene, IPPool(metadata=Meta(name=_NAME), spec=IPPoolSpec(cidr="10.245.0.0/16", block_size=26)))
        await scene.understood(node)
        await _change(scene, IPPool, _NAME, lambda p: replace(p, spec=replace(p.spec, disabled=True)))
        await scene.understood(node)
    with scene.step("BGPConfiguration default: blocks are announced with another community"):
        pools = (await store.list(IPPool)).items
        told = tuple(PrefixAdvertisement(cidr=pool.spec.cidr, communities=("65000:99",)) for pool in pools)
        if not (await store.list(BGPConfiguration)).items:
            await _make(scene, BGPConfiguration(metadata=Meta(name="default"), spec=BGPConfigurationSpec()))
        await _change(
            scene, BGPConfiguration, "default", lambda c: replace(c, spec=replace(c.spec, prefix_advertisements=told))
        )
        await scene.understood(node)


async def _mesh_to_tor(scene: Scene) -> None:
    store, nodes = scene.site.store, [node.name for node in scene.site.topology.nodes]
    tor = scene.site.visitor()
    with scene.step(f"{visitor.NAME} comes to the segment"):
        tor.come()
        scene.afterwards(tor.go)
    mesh = {node: scene.peers(node) for node in nodes}
    there = frozenset(visitor.ADDRESSES)

    async def no_peers() -> None:
        with scene.step("the BGPPeers are gone"):
            for key in [peer.key for peer in (await store.list(BGPPeer)).items if peer.spec.as_number == visitor.ASN]:
                await store.delete(BGPPeer, key)
            await scene.until(
                lambda: all(scene.peers(node) == mesh[node] for node in nodes), f"{visitor.NAME} has sessions still"
            )

    with scene.step(f"every node is a peer of {visitor.NAME}, by two BGPPeers"):
        scene.afterwards(no_peers)
        for family, address in zip(("v4", "v6"), visitor.ADDRESSES, strict=True):
            spec = BGPPeerSpec(peer_ip=address, as_number=visitor.ASN, num_allowed_local_as_numbers=1)
            await store.create(BGPPeer(metadata=Meta(name=f"{visitor.NAME}-{family}"), spec=spec))
    with scene.step("nodeToNodeMeshEnabled: false"):
        if not (await store.list(BGPConfiguration)).items:
            await _make(scene, BGPConfiguration(metadata=Meta(name="default"), spec=BGPConfigurationSpec()))

        async def mesh_again() -> None:
            with scene.step("nodeToNodeMeshEnabled: true"):
                await _set_mesh(scene, True)
                await scene.until(
                    lambda: all(scene.peers(node) >= mesh[node] for node in nodes), "the mesh is not there again"
                )
                await scene.calm(1)

        scene.afterwards(mesh_again)
        await _set_mesh(scene, False)
        await scene.until(lambda: all(scene.peers(node) == there for node in nodes), "the mesh is not left")
    with scene.step(f"{scene.away:g} s without the mesh"):
        await scene.stay()


async def _set_mesh(scene: Scene, on: bool) -> None:
    await mutate(
        scene.site.store,
        BGPConfiguration,
        "default",
        lambda now: replace(now, spec=replace(now.spec, node_to_node_mesh_enabled=on)),
    )


def _everything() -> BGPFilterSpec:
    """Rules that let all of it through, each with a match of its own."""
    v4 = (FilterRuleV4(action="Accept", match_operator="In", cidr="10.244.0.0/16"),)
    v6 = (FilterRuleV6(action="Accept", match_operator="In", cidr="fd00:10:244::/112"),)
    return BGPFilterSpec(export_v4=v4, import_v4=v4, export_v6=v6, import_v6=v6)


async def _make(scene: Scene, obj: R) -> None:
    store = scene.site.store
    created = await store.create(obj)
    scene.afterwards(functools.partial(store.delete, type(created), created.key))


async def _change(scene: Scene, kind: type[R], key: str, change: Callable[[R], R]) -> None:
    store = scene.site.store
    before = await store.get(kind, key)

    async def undo() -> None:
        with scene.step(f"{kind.kind()} {key} is as it was"):
            await mutate(store, kind, key, lambda now: replace(now, spec=before.spec))  # type: ignore[attr-defined]

    scene.afterwards(undo)
    await mutate(store, kind, key, change)


# -- who is concerned --------------------------------------------------------------------------------------------------


def _first_node(topology: Topology) -> Struck:
    name = topology.nodes[0].name
    return Struck(name, (name,))


def _every_node(topology: Topology) -> Struck:
    return Struck("nodes", tuple(node.name for node in topology.nodes))


def _first_rack(topology: Topology) -> Struck:
    rack = topology.nodes[0].rack
    return Struck(rack_name(rack), tuple(node.name for node in topology.nodes if node.rack == rack))


def _no_tor(topology: Topology) -> str:
    return "" if topology.tors else "there is no ToR in a mesh"


def _needs_mesh(topology: Topology) -> str:
    if topology.shape.ipv6_only:
        return "its ToR speaks both families, and here is IPv6 alone: leave --ipv6-only out"
    return "" if topology.shape.mesh else "this is no mesh: underlay-lab up --mesh"


def _needs_two(topology: Topology) -> str:
    if topology.shape.dual_tor:
        return ""
    return "a rack that has one ToR, or none, cannot do without it: underlay-lab up --dual-tor"


DRILLS: Final = (
    Drill(
        name="kill-agent",
        sentence="The agent of a node is killed, and comes back.",
        planned=True,
        struck=_first_node,
        steps=_kill_agent,
    ),
    Drill(
        name="kill-speaker",
        sentence="ExaBGP of a node is killed, and comes back.",
        planned=True,
        struck=_first_node,
        steps=_kill_speaker,
    ),
    Drill(
        name="kill-both",
        sentence="ExaBGP of a node is killed and comes back while the agent is away, too.",
        planned=True,
        struck=_first_node,
        steps=_kill_both,
    ),
    Drill(
        name="upgrade",
        sentence="Agent, CNI server and ExaBGP are restarted by SIGTERM, node by node.",
        planned=True,
        struck=_every_node,
        steps=_upgrade,
    ),
    Drill(
        name="config-change",
        sentence="A node's holdTime, filters, pools and communities are changed, and changed back.",
        planned=True,
        struck=_first_node,
        steps=_config_change,
    ),
    Drill(
        name="drain-tor",
        sentence="A ToR is drained (RFC 8326), shuts its sessions, and comes back.",
        planned=True,
        struck=_first_rack,
        steps=_drain_tor,
        refusal=_needs_two,
    ),
    Drill(
        name="drain-node",
        sentence="A node's pods end, its routes are drained, and undone.",
        planned=True,
        struck=_first_node,
        steps=_drain_node,
    ),
    Drill(
        name="mesh-to-tor",
        sentence="A mesh gets a ToR, its nodes peer with that and leave the mesh, and come back to it.",
        planned=True,
        struck=_every_node,
        steps=_mesh_to_tor,
        refusal=_needs_mesh,
    ),
    Drill(
        name="cut-uplink",
        sentence="A node's link to its (first) ToR, or to the switch of a mesh, loses its carrier and gets it back.",
        planned=False,
        struck=_first_node,
        steps=_cut_uplink,
    ),
    Drill(
        name="kill-tor",
        sentence="A ToR loses its power, and comes back.",
        planned=False,
        struck=_first_rack,
        steps=_kill_tor,
        refusal=_no_tor,
    ),
    Drill(
        name="hang-tor",
        sentence="A ToR sends nothing any more though its ports are up, until all have left it, and comes back.",
        planned=False,
        struck=_first_rack,
        steps=_hang_tor,
        refusal=_needs_two,
    ),
    Drill(
        name="kill-node",
        sentence="A node loses its power, and comes back.",
        planned=False,
        struck=_first_node,
        steps=_kill_node,
    ),
)
