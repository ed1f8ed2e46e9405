"""The resources, as frozen values.

Field names on the wire are Calico v3's where Calico has the kind (``projectcalico.org/v3``), so people's files carry
over. These types say what a resource *is*; ``store.validate`` says what is refused, and why.
"""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import field

#: Of the kinds that are ours to define.
GROUP = "underlay.network/v1"
CALICO_GROUP = "projectcalico.org/v3"

#: Node annotation: the AS number of this node, where it differs from BGPConfiguration's ``asNumber``.
ANNOTATION_ASN = "underlay.network/as-number"
#: Node annotations: where the node's sessions end, by IP version, where that is not its first InternalIP.
ANNOTATION_ADDRESS = {4: "underlay.network/ipv4-address", 6: "underlay.network/ipv6-address"}
#: ``BGPNodeStatusStatus.address_source`` of a node whose Node does not say all of its addresses.
DETECTED = "Detected"
#: On a Node: take it out of the routes (``underlayctl node drain-routes``): ``yes``, or ``force``: with its pods.
ANNOTATION_DRAIN = "underlay.network/drain-routes"
#: IPAMBlock annotation: addresses that people want released, in canonical text with commas between. The block's owner
#: carries it out and removes it (R2); see ``release_wanted``.
ANNOTATION_RELEASE = "underlay.network/release"
#: IPAMBlock annotation: which of the addresses asked for the owner did not release, and why. The last answer stands.
ANNOTATION_RELEASE_REFUSED = "underlay.network/release-refused"
#: Finalizer of a block: deleting it only marks it, until its owner has let go of it (R5).
FINALIZER_OWNER = "underlay.network/owner"
#: Label that says which program made an object (Kubernetes' "Recommended Labels").
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
#: Addresses that a block hands out at most: the first ones of a podCIDR that is larger. Calico's largest block.
BLOCK_LIMIT = 4096
#: Label of an EndpointSlice: the service whose endpoints it has.
LABEL_SERVICE = "kubernetes.io/service-name"


class _Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    pass


class OwnerReference(_Struct, frozen=True, kw_only=True):
    api_version: str
    kind: str
    name: str
    uid: str


class Meta(_Struct, frozen=True, kw_only=True):
    """What every object carries. Uid, version, generation and the two stamps are the store's to set."""

    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str = ""
    deletion_timestamp: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


class Resource(_Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Root of the kinds, tagged with the kind's name. ``PLURAL`` and ``SHORT`` are what people type; ``API`` is group
    and version."""

    API: ClassVar[str] = GROUP
    PLURAL: ClassVar[str] = ""
    SHORT: ClassVar[tuple[str, ...]] = ()
    #: Objects live in a namespace, rather than belong to the whole cluster.
    NAMESPACED: ClassVar[bool] = False
    #: Read one by one only: ``list`` and ``watch`` name the object, because nobody should see the others.
    BY_NAME: ClassVar[bool] = False
    #: Fields that ``list`` and ``watch`` can select by (equality), as dotted wire paths. ``metadata.name`` and, where
    #: there is one, ``metadata.namespace`` are always among them.
    SELECTABLE: ClassVar[tuple[str, ...]] = ()

    metadata: Meta

    @classmethod
    def kind(cls) -> str:
        return str(cls.__struct_config__.tag)

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def key(self) -> str:
        """How a store is asked for the object: ``namespace/name``, or the name alone where there is no namespace."""
        return f"{self.metadata.namespace}/{self.name}" if self.NAMESPACED else self.name


R = TypeVar("R", bound=Resource)


class Condition(_Struct, frozen=True, kw_only=True):
    """A state in words: ``type`` is CamelCase, ``status`` "True" or "False", ``message`` says what to do."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""


# -- addresses ---------------------------------------------------------------------------------------------------


class IPPoolSpec(_Struct, frozen=True, kw_only=True):
    cidr: str
    #: Prefix length of a block; 0 means the family's default (26, 122).
    block_size: int = 0
    #: The blocks are the Nodes' ``spec.podCIDRs`` inside ``cidr``, which kube-controller-manager hands out.
    use_pod_cidrs: bool = field(default=False, name="usePodCIDRs")
    node_selector: str = "all()"
    disabled: bool = False
    disable_bgp_export: bool = field(default=False, name="disableBGPExport")
    nat_outgoing: bool = False
    ipip_mode: str = "Never"
    vxlan_mode: str = "Never"
    assignment_mode: str = "Automatic"
    allowed_uses: tuple[str, ...] = ("Workload",)


class IPPool(Resource, frozen=True, kw_only=True, tag="IPPool"):
    """A range that nodes cut their blocks from. ``cidr``, ``blockSize`` and ``usePodCIDRs`` never change (R1)."""

    PLURAL: ClassVar[str] = "ippools"
    SHORT: ClassVar[tuple[str, ...]] = ("pool", "pools")

    spec: IPPoolSpec


class IPReservationSpec(_Struct, frozen=True, kw_only=True):
    reserved_cidrs: tuple[str, ...] = field(default=(), name="reservedCIDRs")


class IPReservation(Resource, frozen=True, kw_only=True, tag="IPReservation"):
    """Addresses that are never handed out automatically (R6)."""

    PLURAL: ClassVar[str] = "ipreservations"
    SHORT: ClassVar[tuple[str, ...]] = ("reservation", "reservations")

    spec: IPReservationSpec


class IPAMConfigurationSpec(_Struct, frozen=True, kw_only=True):
    #: Blocks that each node may have at most, those of single addresses left out; 0: no limit.
    max_blocks_per_host: int = 0
    #: Always so: an address is handed out by the node of its block alone (R2).
    strict_affinity: bool = True


class IPAMConfiguration(Resource, frozen=True, kw_only=True, tag="IPAMConfiguration"):
    """How all nodes hand out addresses. The one that counts is named ``default``."""

    PLURAL: ClassVar[str] = "ipamconfigurations"
    SHORT: ClassVar[tuple[str, ...]] = ("ipamconfig", "ipamconfigs")

    spec: IPAMConfigurationSpec = IPAMConfigurationSpec()


class Allocation(_Struct, frozen=True, kw_only=True):
    """One address handed out: to which attachment (network, container, interface), for which pod, since when."""

    address: str
    network: str = field(name="network")
    container: str
    interface: str
    #: ``namespace/name`` where the runtime said so.
    pod: str = ""
    since: str = ""


class Writer(_Struct, frozen=True, kw_only=True):
    """Who wrote a block's status: the machine's boot and which start of the CNI server in that boot (R2)."""

    boot_id: str
    start: int


class IPAMBlockSpec(_Struct, frozen=True, kw_only=True):
    """Immutable (R1). ``within`` follows from ``cidr``: see ``within_of``."""

    cidr: str
    pool: str
    node: str
    within: str = ""


class IPAMBlockStatus(_Struct, frozen=True, kw_only=True):
    """The owner's mirror of its memory. ``releasing``: the owner wants to give the block back, and waits for the
    agent to withdraw it and take the blackhole route out of the kernel (R9) before it deletes the object."""

    allocations: tuple[Allocation, ...] = ()
    used: int = 0
    free: int = 0
    releasing: bool = False
    writer: Writer | None = None
    conditions: tuple[Condition, ...] = ()


class IPAMBlock(Resource, frozen=True, kw_only=True, tag="IPAMBlock"):
    """A block and the one node that hands out of it. Named by its CIDR: see ``block_name``."""

    PLURAL: ClassVar[str] = "ipamblocks"
    SHORT: ClassVar[tuple[str, ...]] = ("block", "blocks", "ipamblock")
    SELECTABLE: ClassVar[tuple[str, ...]] = ("spec.node", "spec.pool", "spec.within")

    spec: IPAMBlockSpec
    status: IPAMBlockStatus = IPAMBlockStatus()


# -- routing -----------------------------------------------------------------------------------------------------


class SecretKeyRef(_Struct, frozen=True, kw_only=True):
    """A value of a Secret in the namespace that the agent is told (``--namespace``)."""

    name: str
    key: str


class BGPPassword(_Struct, frozen=True, kw_only=True):
    secret_key_ref: SecretKeyRef


class Community(_Struct, frozen=True, kw_only=True):
    """A name for a community, as 65001:100, 65001:1:100 (large) or no-export."""

    name: str
    value: str


class PrefixAdvertisement(_Struct, frozen=True, kw_only=True):
    """What blocks inside ``cidr`` are announced with: communities, or their names."""

    cidr: str
    communities: tuple[str, ...] = ()


class BGPConfigurationSpec(_Struct, frozen=True, kw_only=True):
    as_number: int = 64512
    node_to_node_mesh_enabled: bool = True
    #: Prefixes outside our pools that may be imported from any peer (R11).
    import_cidrs: tuple[str, ...] = field(default=(), name="importCIDRs")
    #: As ``BGPPeerSpec.password`` and ``max_restart_time``, for the sessions of the mesh.
    node_mesh_password: BGPPassword | None = None
    node_mesh_max_restart_time: str = "120s"
    #: Names of interfaces, ``*`` for any characters, whose subnets are not taken for connected: no peer's end of a
    #: session and no next hop is sought there.
    ignored_interfaces: tuple[str, ...] = ()
    # From here on a node may have its own.
    #: Where those find us who connect to us: the other nodes, and peers that are waited for. 0: 179.
    listen_port: int = 0
    communities: tuple[Community, ...] = ()
    prefix_advertisements: tuple[PrefixAdvertisement, ...] = ()


class BGPConfiguration(Resource, frozen=True, kw_only=True, tag="BGPConfiguration"):
    """BGP of all nodes, if it is named ``default``; of one, if it is named ``node.NAME``: what that says of
    ``listenPort`` and ``prefixAdvertisements`` holds there instead."""

    PLURAL: ClassVar[str] = "bgpconfigurations"
    SHORT: ClassVar[tuple[str, ...]] = ("bgpconfig", "bgpconfigs")

    spec: BGPConfigurationSpec = BGPConfigurationSpec()


class BGPPeerSpec(_Struct, frozen=True, kw_only=True):
    #: IPv4 or IPv6 address, optionally with port: ``10.0.0.1``, ``10.0.0.1:1179``, ``[fd00::1]:1179``. With
    #: ``as_number``, unless ``peer_selector`` says who the peer is.
    peer_ip: str = field(default="", name="peerIP")
    as_number: int = 0
    #: Which nodes are the peers of those that ``node`` or ``node_selector`` names; these peer back by themselves.
    peer_selector: str = ""
    #: Which nodes peer: a node's name, or a selector; neither means every node.
    node: str = ""
    node_selector: str = ""
    #: How often our own AS may stand in a received AS_PATH (R11).
    num_allowed_local_as_numbers: int = field(default=0, name="numAllowedLocalASNumbers")
    #: How long a restarting peer's routes are kept, as "120s" or "2m".
    max_restart_time: str = "120s"
    #: For TCP MD5 (RFC 2385). A missing one never means a session without one (R13).
    password: BGPPassword | None = None
    #: ``UseNodeIP``: the session begins at the node's InternalIP; ``None`` or nothing: at our address on the peer's
    #: subnet, and at the InternalIP only where there is none.
    source_address: str = ""
    #: Hops to the peer at most, by the TTL of its packets (GTSM, RFC 5082); 0: as many as there are.
    ttl_security: int = 0
    #: The gateway on one of our links through which ``peer_ip`` is reached, where that is on none of them: the node
    #: gets a route of its own to the peer.
    reachable_by: str = ""
    #: Our AS number towards this peer, where it is not the node's.
    local_as_number: int | None = field(default=None, name="localASNumber")
    #: BGPFilters by name: their rules hold one after the other, the first that matches decides.
    filters: tuple[str, ...] = ()
    # Ours from here on.
    #: Seconds; 3 is the least that ExaBGP keeps.
    hold_time: int = 9
    #: Wait for the peer to connect, instead of connecting.
    passive: bool = False
    #: Received prefixes, counted before filters, beyond which the peer is removed (R11).
    max_prefixes: int = 100_000
    import_cidrs: tuple[str, ...] = field(default=(), name="importCIDRs")
    #: ``Never``, or ``Fallback``: a default route below every foreign one.
    default_route: str = "Never"


class BGPPeer(Resource, frozen=True, kw_only=True, tag="BGPPeer"):
    PLURAL: ClassVar[str] = "bgppeers"
    SHORT: ClassVar[tuple[str, ...]] = ("peer", "peers")

    spec: BGPPeerSpec


class PrefixLength(_Struct, frozen=True, kw_only=True):
    """Lengths that prefixes inside a rule's ``cidr`` may have: from its own to the longest where nothing is said."""

    min: int | None = None
    max: int | None = None


class CommunityMatch(_Struct, frozen=True, kw_only=True):
    #: One community, as 65001:100, 65001:1:100 or no-export.
    values: tuple[str, ...]


class AddCommunity(_Struct, frozen=True, kw_only=True):
    value: str


class PrependASPath(_Struct, frozen=True, kw_only=True):
    #: In the order in which they stand in the path then.
    prefix: tuple[int, ...]


class FilterOperation(_Struct, frozen=True, kw_only=True):
    """One change of a route that is let through: exactly one field is set."""

    add_community: AddCommunity | None = None
    prepend_as_path: PrependASPath | None = field(default=None, name="prependASPath")


class FilterRule(_Struct, frozen=True, kw_only=True):
    """What a route must be like, all of it, and what becomes of it then. A field that is not set says nothing."""

    #: ``Accept`` or ``Reject``.
    action: str
    #: ``Equal``, ``NotEqual``, ``In`` or ``NotIn``: how the prefix is measured by ``cidr``; both are set, or neither.
    match_operator: str = ""
    cidr: str = ""
    prefix_length: PrefixLength | None = None
    #: ``RemotePeers``: the route was received, so in an export rule it is none of ours.
    source: str = ""
    #: Of the next hop; ``*`` stands for any characters. A block has none.
    interface: str = ""
    #: ``eBGP`` or ``iBGP``.
    peer_type: str = ""
    communities: CommunityMatch | None = None
    #: With what the AS_PATH begins.
    as_path_prefix: tuple[int, ...] = ()
    operations: tuple[FilterOperation, ...] = ()


class FilterRuleV4(FilterRule, frozen=True, kw_only=True):
    pass


class FilterRuleV6(FilterRule, frozen=True, kw_only=True):
    pass


class BGPFilterSpec(_Struct, frozen=True, kw_only=True):
    export_v4: tuple[FilterRuleV4, ...] = ()
    import_v4: tuple[FilterRuleV4, ...] = ()
    export_v6: tuple[FilterRuleV6, ...] = ()
    import_v6: tuple[FilterRuleV6, ...] = ()


class BGPFilter(Resource, frozen=True, kw_only=True, tag="BGPFilter"):
    """Rules for the routes of the peers that name it; the first that matches decides, what none matches is accepted.
    Filters narrow what comes in, they never widen it (R11)."""

    PLURAL: ClassVar[str] = "bgpfilters"
    SHORT: ClassVar[tuple[str, ...]] = ("filter", "filters")

    spec: BGPFilterSpec = BGPFilterSpec()


class SessionStatus(_Struct, frozen=True, kw_only=True):
    """One session as its agent sees it. Counts are prefixes."""

    peer: str  # name of the BGPPeer, or "mesh-NODE"
    address: str
    as_number: int
    state: str  # "Idle" | "Connecting" | "Established"
    since: str = ""
    received: int = 0
    accepted: int = 0
    wanted: int = 0
    sent: int = 0
    graceful_restart: bool = False
    reason: str = ""


class BGPNodeStatusStatus(_Struct, frozen=True, kw_only=True):
    #: Where the node's sessions end; and, as ``Detected``, that its Node does not say so: what the other nodes follow.
    addresses: tuple[str, ...] = ()
    address_source: str = ""
    as_number: int = 0
    router_id: str = field(default="", name="routerID")
    sessions: tuple[SessionStatus, ...] = ()
    conditions: tuple[Condition, ...] = ()


class BGPNodeStatus(Resource, frozen=True, kw_only=True, tag="BGPNodeStatus"):
    """What the agent of the node of this name says of its sessions and routes. Written by that agent only."""

    PLURAL: ClassVar[str] = "bgpnodestatuses"
    SHORT: ClassVar[tuple[str, ...]] = ("nodestatus", "bgpnodestatus")
    SELECTABLE: ClassVar[tuple[str, ...]] = ("status.addressSource",)

    status: BGPNodeStatusStatus = BGPNodeStatusStatus()


# -- Kubernetes' own, as far as we read or write them --------------------------------------------------------------


class NodeAddress(_Struct, frozen=True, kw_only=True):
    type: str
    address: str


class NodeSpec(_Struct, frozen=True, kw_only=True):
    pod_cidrs: tuple[str, ...] = field(default=(), name="podCIDRs")
    unschedulable: bool = False


class NodeCondition(_Struct, frozen=True, kw_only=True):
    """What the kubelet and others say of a Node; not when they said it last, which changes all the time."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""


class NodeStatus(_Struct, frozen=True, kw_only=True):
    addresses: tuple[NodeAddress, ...] = ()
    conditions: tuple[NodeCondition, ...] = ()


class Node(Resource, frozen=True, kw_only=True, tag="Node"):
    """Kubernetes' Node, as far as we read it. ``InternalIP`` addresses (one a family) are where its sessions end."""

    API: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "nodes"
    SHORT: ClassVar[tuple[str, ...]] = ("no",)

    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class Namespace(Resource, frozen=True, kw_only=True, tag="Namespace"):
    """Kubernetes' Namespace: its annotations may name pools."""

    API: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "namespaces"
    SHORT: ClassVar[tuple[str, ...]] = ("ns",)


class PodIP(_Struct, frozen=True, kw_only=True):
    ip: str


class PodSpec(_Struct, frozen=True, kw_only=True):
    node_name: str = ""
    host_network: bool = False


class PodStatus(_Struct, frozen=True, kw_only=True):
    phase: str = ""
    pod_ip: str = field(default="", name="podIP")
    pod_ips: tuple[PodIP, ...] = field(default=(), name="podIPs")


class Pod(Resource, frozen=True, kw_only=True, tag="Pod"):
    """Kubernetes' Pod: where it runs and which addresses kubelet says it has."""

    API: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "pods"
    SHORT: ClassVar[tuple[str, ...]] = ("po",)
    NAMESPACED: ClassVar[bool] = True
    SELECTABLE: ClassVar[tuple[str, ...]] = ("spec.nodeName",)

    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class ServiceSpec(_Struct, frozen=True, kw_only=True):
    type: str = "ClusterIP"
    #: "None" for a headless service, which has no address.
    cluster_ip: str = field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] = field(default=(), name="clusterIPs")
    external_ips: tuple[str, ...] = field(default=(), name="externalIPs")
    external_traffic_policy: str = ""
    internal_traffic_policy: str = ""


class LoadBalancerIngress(_Struct, frozen=True, kw_only=True):
    ip: str = ""


class LoadBalancerStatus(_Struct, frozen=True, kw_only=True):
    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(_Struct, frozen=True, kw_only=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Resource, frozen=True, kw_only=True, tag="Service"):
    """Kubernetes' Service: its addresses, and whether only nodes with an endpoint may take traffic for them."""

    API: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "services"
    SHORT: ClassVar[tuple[str, ...]] = ("svc",)
    NAMESPACED: ClassVar[bool] = True

    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


class EndpointConditions(_Struct, frozen=True, kw_only=True):
    #: Where nothing is said an endpoint is taken for ready (discovery.k8s.io/v1).
    ready: bool = True


class Endpoint(_Struct, frozen=True, kw_only=True):
    addresses: tuple[str, ...]
    node_name: str = ""
    conditions: EndpointConditions = EndpointConditions()


class EndpointSlice(Resource, frozen=True, kw_only=True, tag="EndpointSlice"):
    """Kubernetes' EndpointSlice: where the pods of a service run. ``LABEL_SERVICE`` names the service, in the same
    namespace."""

    API: ClassVar[str] = "discovery.k8s.io/v1"
    PLURAL: ClassVar[str] = "endpointslices"
    NAMESPACED: ClassVar[bool] = True

    #: "IPv4", "IPv6" or "FQDN"; it never changes.
    address_type: str
    endpoints: tuple[Endpoint, ...] = ()


class Secret(Resource, frozen=True, kw_only=True, tag="Secret"):
    """Kubernetes' Secret. Its values are never shown, so neither are its annotations, where ``kubectl apply`` keeps a
    copy of them."""

    API: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "secrets"
    NAMESPACED: ClassVar[bool] = True
    BY_NAME: ClassVar[bool] = True

    type: str = "Opaque"
    #: In base64 on the wire.
    data: dict[str, bytes] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Secret({self.key}, type={self.type!r}, {len(self.data)} values not shown)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("key", self.key), ("type", self.type)]


class ConfigMap(Resource, frozen=True, kw_only=True, tag="ConfigMap"):
    """Kubernetes' ConfigMap, as far as it is text."""

    API: ClassVar[str] = "v1"
    PLURAL: ClassVar[str] = "configmaps"
    SHORT: ClassVar[tuple[str, ...]] = ("cm",)
    NAMESPACED: ClassVar[bool] = True
    BY_NAME: ClassVar[bool] = True

    data: dict[str, str] = field(default_factory=dict)


class K0sClusterConfig(Resource, frozen=True, kw_only=True, tag="ClusterConfig"):
    """k0s' configuration, where its dynamic configuration is on. Only read, so no one of ``KINDS``; what it says is for
    its readers to take apart."""

    API: ClassVar[str] = "k0s.k0sproject.io/v1beta1"
    PLURAL: ClassVar[str] = "clusterconfigs"
    NAMESPACED: ClassVar[bool] = True
    BY_NAME: ClassVar[bool] = True

    spec: dict[str, Any] = field(default_factory=dict)


class ObjectReference(_Struct, frozen=True, kw_only=True):
    api_version: str = ""
    kind: str
    namespace: str = ""
    name: str
    uid: str = ""


class EventSeries(_Struct, frozen=True, kw_only=True):
    """The same event again: how often in all (2 or more), and when last (as ``KubeEvent.event_time``)."""

    count: int
    last_observed_time: str


class KubeEvent(Resource, frozen=True, kw_only=True, tag="Event"):
    """Kubernetes' Event: something that an operator should find with the object that it is ``regarding``. It lives in
    that object's namespace, in ``default`` where that has none. (``store.base.Event`` is what a watch tells.)"""

    API: ClassVar[str] = "events.k8s.io/v1"
    PLURAL: ClassVar[str] = "events"
    SHORT: ClassVar[tuple[str, ...]] = ("ev",)
    NAMESPACED: ClassVar[bool] = True

    #: RFC 3339 with exactly six digits of a second, as 2026-01-01T00:00:00.000000Z.
    event_time: str = ""
    #: Which program says so, as domain/name, and which instance of it.
    reporting_controller: str = ""
    reporting_instance: str = ""
    #: What was done or failed, and why: CamelCase, at most 128 characters.
    action: str = ""
    reason: str = ""
    regarding: ObjectReference | None = None
    #: For people, at most 1 KiB.
    note: str = ""
    #: "Normal" or "Warning".
    type: str = ""
    series: EventSeries | None = None


KINDS: tuple[type[Resource], ...] = (
    IPPool,
    IPReservation,
    IPAMConfiguration,
    IPAMBlock,
    BGPConfiguration,
    BGPPeer,
    BGPFilter,
    BGPNodeStatus,
    Node,
    Namespace,
    Pod,
    Service,
    EndpointSlice,
    Secret,
    ConfigMap,
    KubeEvent,
)


def block_name(cidr: str) -> str:
    """The object name of the block with this canonical CIDR: ``10.244.3.64/26`` -> ``10-244-3-64-26`` (R1).

    IPv6's ``fd00:10:244::40/122`` gives ``fd00-10-244--40-122``; a name must begin and end with a letter or digit,
    so ``::`` at either end is written with a 0 beside it, as ``0--1-122``.
    """
    address, _, length = cidr.partition("/")
    text = address.replace(".", "-").replace(":", "-")
    text = f"0{text}" if text.startswith("-") else text
    text = f"{text}0" if text.endswith("-") else text
    return f"{text}-{length}"


def with_owner(meta: Meta, node: str, uid: str) -> Meta:
    """``meta`` of an object that Kubernetes is to delete with this Node, and no other; as it is where ``uid`` is ""."""
    if not uid:
        return meta
    others = tuple(r for r in meta.owner_references if r.kind != Node.kind())
    owner = OwnerReference(api_version=Node.API, kind=Node.kind(), name=node, uid=uid)
    return msgspec.structs.replace(meta, owner_references=(*others, owner))


def within_of(cidr: str) -> str:
    """The /20 or /116 that a block's first address is in, by which the blocks around it are listed: as none hands out
    more than ``BLOCK_LIMIT`` addresses, two that share one have the same. ValueError if it is no prefix."""
    network = ip_network(cidr)
    return str(ip_network((network.network_address, 116 if network.version == 6 else 20), strict=False))


def release_wanted(block: IPAMBlock) -> tuple[str, ...]:
    """The addresses that the block's release annotation names, each once, in their order, as they are written there."""
    text = block.metadata.annotations.get(ANNOTATION_RELEASE, "")
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def to_wire(obj: Resource) -> dict[str, Any]:
    """The object as plain JSON types, with ``apiVersion`` and ``kind``, as in a file or on the API server."""
    body: dict[str, Any] = msgspec.to_builtins(obj)
    body.pop("kind", None)
    return {"apiVersion": obj.API, "kind": obj.kind(), **body}


def without_nulls(value: Any) -> Any:
    """Plain JSON types in which what is not set is not there: ``null`` says the same (Kubernetes API conventions,
    "Null values"). The API server writes it for some empty lists, kubectl into what it prints."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
