"""What Calico's and Kubernetes' files may hold that we do not serve, and what to say of it. Pure.

Field names are those of the references "IPPool", "IPAMConfiguration", "BGPConfiguration", "BGPPeer", "BGPFilter" in
Calico's documentation (v3.32) and of Kubernetes' Node v1 and ObjectMeta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from store.model import BGPConfiguration, BGPFilter, BGPPeer, IPAMConfiguration, IPPool, Node, Resource


class Unserved(msgspec.Struct, frozen=True):
    """``harmless`` are the values with which the field asks for nothing; any other is refused with ``why``."""

    harmless: tuple[Any, ...]
    why: str


_SERVICES = "announcing service addresses is not served yet: leave it out"
_OPTIONAL = "a session that asks for a password never goes without one: write false, or leave it out"
_PRIORITY = (
    "a route's priority is not chosen by filter: imports have one metric below every foreign route's, and blocks are "
    "announced alike; leave it out, and prefer paths by prependASPath or on the router"
)
_KEEPALIVE = "it is a third of holdTime (RFC 4271, 4.4), which ExaBGP does not let be changed: set holdTime instead"
_WORKLOADS = "BGP with pods is not served: leave it out"

#: Kinds of theirs, with the remedy. A kind that is not here is only unknown.
FOREIGN_KINDS: Mapping[str, str] = {
    "CalicoNodeStatus": "node status is written by each node itself: see underlayctl node status",
    "ClusterInformation": "there is nothing to configure in it: leave it out",
    "FelixConfiguration": "Calico's Felix does not run here: leave it out",
    "GlobalNetworkPolicy": "network policies are not ours: kube-network-policies runs beside Underlay",
    "GlobalNetworkSet": "network policies are not ours: kube-network-policies runs beside Underlay",
    "HostEndpoint": "network policies are not ours: kube-network-policies runs beside Underlay",
    "IPAMConfig": "it is written by Calico for itself: write an IPAMConfiguration, or underlayctl ipam configure",
    "KubeControllersConfiguration": "no controller of ours runs anywhere: leave it out",
    "NetworkPolicy": "network policies are not ours: kube-network-policies runs beside Underlay",
    "NetworkSet": "network policies are not ours: kube-network-policies runs beside Underlay",
    "Tier": "network policies are not ours: kube-network-policies runs beside Underlay",
}

_MEANINGLESS = "it means nothing here"

#: Fields that say nothing to us whatever they hold, and why; those under ``Resource`` are in every kind.
LEFT_OUT: Mapping[type[Resource], Mapping[str, str]] = {
    Resource: dict.fromkeys(
        (
            "metadata.managedFields",
            "metadata.selfLink",
            "metadata.deletionGracePeriodSeconds",
            "metadata.ownerReferences[].controller",
        ),
        _MEANINGLESS,
    ),
    IPPool: {"status": "it is what another IPAM says of the pool: see underlayctl ipam show"},
    BGPConfiguration: {"spec.logSeverityScreen": "how much the daemons log is said to each of them (UNDERLAY_LOG)"},
    Node: dict.fromkeys(
        (
            *(f"spec.{f}" for f in ("podCIDR", "providerID", "taints", "configSource", "externalID")),
            *(
                f"status.{f}"
                for f in (
                    "allocatable",
                    "capacity",
                    "conditions[].lastHeartbeatTime",
                    "config",
                    "daemonEndpoints",
                    "declaredFeatures",
                    "features",
                    "images",
                    "nodeInfo",
                    "phase",
                    "runtimeHandlers",
                    "volumesAttached",
                    "volumesInUse",
                )
            ),
        ),
        _MEANINGLESS,
    ),
}

UNSERVED: Mapping[type[Resource], Mapping[str, Unserved]] = {
    Resource: {
        "metadata.generateName": Unserved((), "write metadata.name: names are not made up here"),
        "metadata.ownerReferences[].blockOwnerDeletion": Unserved((False,), "it is not served: leave it out"),
    },
    IPPool: {
        "spec.namespaceSelector": Unserved(
            ("", "all()"),
            "pools are not chosen by namespace selector: annotate the namespace (underlay.network/ipv4pools)",
        ),
        "spec.ipip": Unserved(({}, {"enabled": False}), "there is no overlay here: leave it out"),
        "spec.nat-outgoing": Unserved((False,), "translating is not served: pods keep their own address; leave it out"),
    },
    IPAMConfiguration: {
        "spec.autoAllocateBlocks": Unserved((True,), "every node claims its blocks by itself: write true"),
        "spec.kubeVirtVMAddressPersistence": Unserved(
            ("Disabled",), "an address goes with its pod and does not follow a virtual machine: write Disabled"
        ),
    },
    BGPConfiguration: {
        "spec.serviceClusterIPs": Unserved(([],), _SERVICES),
        "spec.serviceExternalIPs": Unserved(([],), _SERVICES),
        "spec.serviceLoadBalancerIPs": Unserved(([],), _SERVICES),
        "spec.serviceLoadBalancerAggregation": Unserved(("Enabled",), _SERVICES),
        "spec.bindMode": Unserved(("None", "NodeIP"), "sessions begin at the node's own address: write NodeIP"),
        "spec.nodeMeshPassword.secretKeyRef.optional": Unserved((False,), _OPTIONAL),
        "spec.localWorkloadPeeringIPV4": Unserved(("",), _WORKLOADS),
        "spec.localWorkloadPeeringIPV6": Unserved(("",), _WORKLOADS),
        "spec.programClusterRoutes": Unserved(("Enabled",), "the agent always writes the routes: leave it out"),
    },
    BGPPeer: {
        "spec.password.secretKeyRef.optional": Unserved((False,), _OPTIONAL),
        "spec.localWorkloadSelector": Unserved(("",), _WORKLOADS),
        "spec.keepOriginalNextHop": Unserved((False,), "every route goes out with the node as next hop: leave it out"),
        "spec.nextHopMode": Unserved(("Auto", "Self"), "every route goes out with the node as next hop: leave it out"),
        "spec.keepaliveTime": Unserved((), _KEEPALIVE),
        "spec.keepalive": Unserved((), _KEEPALIVE),
        "spec.reversePeering": Unserved(("Auto",), "nodes that a peerSelector chooses always peer back: write Auto"),
        "spec.failureDetectionMode": Unserved(("None",), "BFD is not served: leave it out"),
    },
    BGPFilter: {
        f"spec.{rules}[].{name}": Unserved((), _PRIORITY)
        for rules in ("exportV4", "importV4", "exportV6", "importV6")
        for name in ("priority", "operations[].setPriority")
    },
}
