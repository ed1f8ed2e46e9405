"""What ``underlayctl get`` shows of each kind: every column of every kind is here. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ctl.kinds import reference_to
from ctl.words import age, count, listed, yes
from store.model import (
    ANNOTATION_ASN,
    LABEL_SERVICE,
    BGPConfiguration,
    BGPFilter,
    BGPNodeStatus,
    BGPPeer,
    ConfigMap,
    EndpointSlice,
    IPAMBlock,
    IPAMConfiguration,
    IPPool,
    IPReservation,
    KubeEvent,
    Namespace,
    Node,
    Pod,
    Resource,
    Secret,
    Service,
)
from store.validate import block_size


class Column(msgspec.Struct, frozen=True):
    """``cell`` reads one object of the kind that the column belongs to."""

    title: str
    cell: Callable[[Any], str]
    #: Shown with ``-o wide`` only.
    wide: bool = False


class Table(msgspec.Struct, frozen=True):
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(
    kind: type[Resource],
    objects: Iterable[Resource],
    *,
    now: str,
    wide: bool = False,
    full_names: bool = False,
    namespaces: bool = False,
) -> Table:
    """The objects of one kind, a row each. ``now`` is what ages are counted to (RFC 3339); ``full_names`` writes
    ``ippool/default`` where several kinds stand on one page; ``namespaces`` adds a column where the kind has them."""
    columns = [c for c in COLUMNS[kind] if wide or not c.wide]
    columns = [
        *([Column("NAMESPACE", lambda o: o.metadata.namespace)] if namespaces and kind.NAMESPACED else []),
        Column("NAME", lambda o: reference_to(kind, o.name) if full_names else o.name),
        *columns,
        Column("AGE", lambda o: age(o.metadata.creation_timestamp, now)),
    ]
    return Table(tuple(c.title for c in columns), tuple(tuple(c.cell(o) for c in columns) for o in objects))


def _block_size(pool: IPPool) -> str:
    size = block_size(pool)
    return "podCIDRs" if size is None else f"/{size}"


def _pool_state(pool: IPPool) -> str:
    words = ["disabled"] if pool.spec.disabled else []
    words += ["not announced"] if pool.spec.disable_bgp_export else []
    words += _leaving(pool)
    return listed(words)


def _block_state(block: IPAMBlock) -> str:
    words = ["releasing"] if block.status.releasing else []
    words += _leaving(block)
    words += [c.type for c in block.status.conditions if c.status == "True"]
    return listed(words)


def _leaving(obj: Resource) -> list[str]:
    return ["deleting"] if obj.metadata.deletion_timestamp else []


def _writer(block: IPAMBlock) -> str:
    writer = block.status.writer
    return f"{writer.boot_id[:8]}.{writer.start}" if writer else ""


def _peering_nodes(peer: BGPPeer) -> str:
    return peer.spec.node or peer.spec.node_selector or "all()"


def _sessions(status: BGPNodeStatus) -> str:
    up = sum(1 for s in status.status.sessions if s.state == "Established")
    return f"{up}/{len(status.status.sessions)}"


def _total(field: str) -> Callable[[BGPNodeStatus], str]:
    return lambda status: str(sum(getattr(s, field) for s in status.status.sessions))


def _labels(obj: Resource) -> str:
    return listed(f"{key}={value}" for key, value in sorted(obj.metadata.labels.items()))


def _addresses(node: Node) -> str:
    return listed(a.address for a in node.status.addresses if a.type == "InternalIP")


def _service_addresses(service: Service) -> str:
    ingress = (i.ip for i in service.status.load_balancer.ingress if i.ip)
    return listed([*service.spec.cluster_ips, *service.spec.external_ips, *ingress])


def _regarding(event: KubeEvent) -> str:
    return f"{event.regarding.kind.lower()}/{event.regarding.name}" if event.regarding else ""


COLUMNS: dict[type[Resource], Sequence[Column]] = {
    IPPool: (
        Column("CIDR", lambda p: p.spec.cidr),
        Column("BLOCKS", _block_size),
        Column("NODES", lambda p: p.spec.node_selector),
        Column("STATE", _pool_state),
        Column("ASSIGNED", lambda p: p.spec.assignment_mode, wide=True),
        Column("USES", lambda p: listed(p.spec.allowed_uses), wide=True),
        Column("NAT", lambda p: yes(p.spec.nat_outgoing), wide=True),
    ),
    IPAMConfiguration: (
        Column("MAX-BLOCKS", lambda c: count(c.spec.max_blocks_per_host) if c.spec.max_blocks_per_host else "no limit"),
    ),
    IPReservation: (Column("CIDRS", lambda r: listed(r.spec.reserved_cidrs)),),
    IPAMBlock: (
        Column("CIDR", lambda b: b.spec.cidr),
        Column("POOL", lambda b: b.spec.pool),
        Column("NODE", lambda b: b.spec.node),
        Column("USED", lambda b: count(b.status.used)),
        Column("FREE", lambda b: count(b.status.free)),
        Column("STATE", _block_state),
        Column("WRITER", _writer, wide=True),
    ),
    BGPConfiguration: (
        Column("AS", lambda c: str(c.spec.as_number)),
        Column("MESH", lambda c: yes(c.spec.node_to_node_mesh_enabled)),
        Column("IMPORTS", lambda c: listed(c.spec.import_cidrs)),
    ),
    BGPPeer: (
        Column("PEER", lambda p: p.spec.peer_ip or p.spec.peer_selector),
        Column("AS", lambda p: str(p.spec.as_number or "")),
        Column("NODES", _peering_nodes),
        Column("HOLD", lambda p: f"{p.spec.hold_time}s", wide=True),
        Column("RESTART", lambda p: p.spec.max_restart_time, wide=True),
        Column("MAX-PREFIXES", lambda p: str(p.spec.max_prefixes), wide=True),
        Column("OWN-AS", lambda p: str(p.spec.num_allowed_local_as_numbers), wide=True),
        Column("FILTERS", lambda p: listed(p.spec.filters), wide=True),
        Column("IMPORTS", lambda p: listed(p.spec.import_cidrs), wide=True),
        Column("DEFAULT-ROUTE", lambda p: p.spec.default_route, wide=True),
    ),
    BGPFilter: (
        Column("EXPORT-V4", lambda f: count(len(f.spec.export_v4))),
        Column("IMPORT-V4", lambda f: count(len(f.spec.import_v4))),
        Column("EXPORT-V6", lambda f: count(len(f.spec.export_v6))),
        Column("IMPORT-V6", lambda f: count(len(f.spec.import_v6))),
    ),
    BGPNodeStatus: (
        Column("AS", lambda s: str(s.status.as_number or "")),
        Column("ROUTER-ID", lambda s: s.status.router_id),
        Column("ESTABLISHED", _sessions),
        Column("CONDITIONS", lambda s: listed(c.type for c in s.status.conditions if c.status == "True")),
        Column("RECEIVED", _total("received"), wide=True),
        Column("ACCEPTED", _total("accepted"), wide=True),
        Column("WANTED", _total("wanted"), wide=True),
        Column("SENT", _total("sent"), wide=True),
    ),
    Node: (
        Column("ADDRESSES", _addresses),
        Column("AS", lambda n: n.metadata.annotations.get(ANNOTATION_ASN, "")),
        Column("POD-CIDRS", lambda n: listed(n.spec.pod_cidrs), wide=True),
        Column("LABELS", _labels, wide=True),
    ),
    Namespace: (Column("LABELS", _labels, wide=True),),
    Pod: (
        Column("PHASE", lambda p: p.status.phase),
        Column("ADDRESSES", lambda p: listed(a.ip for a in p.status.pod_ips)),
        Column("NODE", lambda p: p.spec.node_name),
        Column("HOST-NETWORK", lambda p: yes(p.spec.host_network), wide=True),
    ),
    Service: (
        Column("TYPE", lambda s: s.spec.type),
        Column("ADDRESSES", _service_addresses),
        Column("EXTERNAL-POLICY", lambda s: s.spec.external_traffic_policy, wide=True),
        Column("INTERNAL-POLICY", lambda s: s.spec.internal_traffic_policy, wide=True),
    ),
    EndpointSlice: (
        Column("SERVICE", lambda e: e.metadata.labels.get(LABEL_SERVICE, "")),
        Column("READY", lambda e: str(sum(one.conditions.ready for one in e.endpoints))),
        Column("ALL", lambda e: str(len(e.endpoints))),
    ),
    Secret: (Column("TYPE", lambda s: s.type), Column("VALUES", lambda s: str(len(s.data)))),
    ConfigMap: (Column("VALUES", lambda c: str(len(c.data))),),
    KubeEvent: (
        Column("TYPE", lambda e: e.type),
        Column("REASON", lambda e: e.reason),
        Column("OBJECT", _regarding),
        Column("NOTE", lambda e: e.note),
        Column("FROM", lambda e: e.reporting_controller, wide=True),
    ),
}
