"""What the store holds before the first daemon of a lab starts: the cluster's wishes. Pure.

A BGPPeer names one node and one family, as each node has a port of its own on each ToR. The nodes of a rack share an
AS, so a rack-mate's block comes back from the ToR with that AS in its path, once. In a mesh nothing is said of BGP.
"""

from __future__ import annotations

from lab.topology import Node, Topology, rack_name
from store import model

LABEL_RACK = "rack"


def objects(topology: Topology) -> tuple[model.Resource, ...]:
    """Every object to create, in any order. A Node's status is to be written after that (``update_status``)."""
    pools = tuple(
        model.IPPool(
            metadata=model.Meta(name=pool.name), spec=model.IPPoolSpec(cidr=pool.cidr, block_size=pool.block_size)
        )
        for pool in topology.pools
    )
    nodes = tuple(_node(node) for node in topology.nodes)
    if topology.shape.mesh:
        return (*pools, *nodes)
    configuration = model.BGPConfiguration(
        metadata=model.Meta(name="default"), spec=model.BGPConfigurationSpec(node_to_node_mesh_enabled=False)
    )
    return (*pools, configuration, *nodes, *(peer for node in topology.nodes for peer in _peers(node)))


def _node(node: Node) -> model.Node:
    of_a_rack = bool(node.rack)
    return model.Node(
        metadata=model.Meta(
            name=node.name,
            labels={LABEL_RACK: rack_name(node.rack)} if of_a_rack else {},
            annotations={model.ANNOTATION_ASN: str(node.asn)} if of_a_rack else {},
        ),
        status=model.NodeStatus(
            addresses=tuple(model.NodeAddress(type="InternalIP", address=address) for address in node.addresses)
        ),
    )


def _peers(node: Node) -> tuple[model.BGPPeer, ...]:
    return tuple(
        model.BGPPeer(
            metadata=model.Meta(name=f"{node.name}-{uplink.tor}-{family}"),
            spec=model.BGPPeerSpec(
                peer_ip=gateway, as_number=uplink.asn, node=node.name, num_allowed_local_as_numbers=1
            ),
        )
        for uplink in node.uplinks
        for family, gateway in zip(("v4", "v6"), uplink.gateways, strict=True)
    )
