"""What installers of clusters leave there of pods' addresses, for the range of the lab's own pools. Pure.

kubeadm (``init`` with a podSubnet) and k3s both have kube-controller-manager give each Node its podCIDRs; kubeadm also
leaves its configuration in the cluster.
"""

from __future__ import annotations

import json
from typing import Final

from lab.cluster import fabric
from lab.topology import Topology

#: Prefix lengths of a Node's podCIDRs. IPv6's default is too large for the lab's range.
_MASK4: Final = {"node-cidr-mask-size-ipv4": "24"}
_MASK6: Final = {"node-cidr-mask-size-ipv6": "120"}


def flags(topology: Topology) -> list[str]:
    """What kube-controller-manager is told."""
    return [
        "--allocate-node-cidrs=true",
        f"--cluster-cidr={_range(topology)}",
        f"--service-cluster-ip-range={fabric.services(topology)}",
        *(f"--{name}={length}" for name, length in _masks(topology).items()),
    ]


def kubeadm(topology: Topology, endpoint: str, version: str) -> str:
    """The file of kubeadm of that ``version``, as JSON documents; the API server is at ``endpoint``."""
    cluster = {
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "ClusterConfiguration",
        "kubernetesVersion": version,
        "controlPlaneEndpoint": endpoint,
        "networking": {"podSubnet": _range(topology), "serviceSubnet": fabric.services(topology)},
        "controllerManager": {"extraArgs": [{"name": n, "value": v} for n, v in _masks(topology).items()]},
    }
    init = {
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "InitConfiguration",
        "localAPIEndpoint": {"advertiseAddress": endpoint},
        "nodeRegistration": {
            "name": topology.nodes[0].name,
            "criSocket": "unix:///run/containerd/containerd.sock",
        },
    }
    return "\n---\n".join(json.dumps(document) for document in (cluster, init))


def _masks(topology: Topology) -> dict[str, str]:
    return _MASK6 if topology.shape.ipv6_only else _MASK4 | _MASK6


def _range(topology: Topology) -> str:
    return ",".join(pool.cidr for pool in topology.pools)
