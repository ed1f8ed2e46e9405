"""``ipam check`` where the store has pods: what nodes handed out against what Kubernetes says of its pods. Pure.

Kubelet tells a pod's addresses after ADD, and removes a pod after DEL, so the two differ for moments in every life of a
pod: the pods are read before the blocks, and only what lasts is a finding (``ctl.finding.PATIENCE``). What never
settles by itself is left out: a pod that is being deleted may have lost its address already, and one that has finished
keeps naming it for as long as its object is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ctl.finding import Finder, Finding, Local, Place, Range, ask_server, holder, number
from ctl.kinds import reference
from ipam.ledger import UNKNOWN
from store.model import Allocation, IPPool, Pod

#: The interface whose addresses Kubernetes calls the pod's; others are of further networks.
_PRIMARY: Final = "eth0"
_FINISHED: Final = ("Succeeded", "Failed")


def is_told_of(pods: Iterable[Pod]) -> bool:
    """Whether there are kubelets that tell of pods: without, an allocation without pod says nothing (a lab, a
    standalone router). On a cluster our own pods run at least."""
    return any(pod.status.phase == "Running" for pod in pods)


def compare_pods(
    pods: Sequence[Pod],
    places: Sequence[Place],
    pools: Iterable[IPPool] | None,
    nodes: frozenset[str] | None,
    local: Local | None,
) -> Iterator[Finding]:
    """What is wrong between pods and blocks. ``nodes`` are the Nodes that there are (None: not known): what one that is
    gone handed out is said of its block."""
    if not is_told_of(pods):
        return
    by_key = {pod.key: pod for pod in pods}
    held = {at: place for place in places for a in place.block.status.allocations if (at := number(a.address))}
    for place in places:
        if nodes is None or place.node in nodes:
            yield from _allocations(place, by_key)
    where = Finder(places)
    for at, owners in _owners(pods).items():
        yield from _shared(at, owners)
        if at not in held:
            yield from _unrecorded(at, owners[0], where, pools, local)


def _allocations(place: Place, pods: dict[str, Pod]) -> Iterator[Finding]:
    node, subject = place.node, reference(place.block)
    right: set[tuple[str, str, int]] = set()  # container and family of those whose address is their pod's
    doubtful: list[tuple[Allocation, Range, Pod]] = []
    for a in place.block.status.allocations:
        at = number(a.address)
        if not a.pod or a.container == UNKNOWN or at is None or not place.range.holds(at):
            continue
        pod = pods.get(a.pod)
        why = _not_there(pod, a.pod, node)
        if why:
            yield Finding(
                "PodGone",
                subject,
                a.address,
                (node,),
                f"{holder(a)} has it, and {why}",
                f"a DEL that got lost, or a sandbox that outlived its pod: {node} releases it within a minute of its "
                f"link's end, or when asked (underlayctl ipam release --ip {a.address}); if it keeps it, remove the "
                f"sandbox there (crictl rmp -f {a.container})",
            )
        elif pod is not None and a.interface == _PRIMARY:
            theirs = {n for n in _addresses(pod) if n.version == at.version}
            if at in theirs:
                right.add((a.network, a.container, at.version))
            elif theirs:
                doubtful.append((a, at, pod))
    for a, at, pod in doubtful:
        if (a.network, a.container, at.version) not in right:
            yield Finding(
                "PodAddressDiffers",
                subject,
                a.address,
                (node,),
                f"{holder(a)} has it, and Kubernetes says that the pod has {_said(pod)}",
                f"an old sandbox of the pod, or one that was just made anew: see on {node} which one lives (crictl "
                f"pods), and remove the other; its address then comes free",
            )


def _not_there(pod: Pod | None, key: str, node: str) -> str:
    """Why the pod cannot have an address on the node; empty if it can."""
    if pod is None:
        return f"there is no pod {key}"
    if pod.status.phase in _FINISHED:
        return f"the pod has finished ({pod.status.phase})"
    if pod.spec.node_name != node:
        return f"the pod is on {pod.spec.node_name}" if pod.spec.node_name else "the pod is on no node yet"
    return ""


def _owners(pods: Iterable[Pod]) -> dict[Range, list[Pod]]:
    """By address, the pods that use it now."""
    found: dict[Range, list[Pod]] = {}
    for pod in sorted(pods, key=lambda p: p.key):
        alive = pod.status.phase == "Running" and not pod.metadata.deletion_timestamp
        if alive and not pod.spec.host_network and pod.spec.node_name:
            for at in _addresses(pod):
                found.setdefault(at, []).append(pod)
    return found


def _shared(at: Range, owners: Sequence[Pod]) -> Iterator[Finding]:
    if len(owners) > 1:
        yield Finding(
            "PodsShareAddress",
            reference(owners[0]),
            at.text,
            tuple(dict.fromkeys(pod.spec.node_name for pod in owners)),
            "Kubernetes says that " + " and ".join(f"{pod.key} on {pod.spec.node_name}" for pod in owners) + " have it",
            "packets reach one of them at best: delete all but one, or all; then look whose block it is: underlayctl "
            f"ipam show --ip {at.text}",
        )


def _unrecorded(
    at: Range, pod: Pod, where: Finder, pools: Iterable[IPPool] | None, local: Local | None
) -> Iterator[Finding]:
    """An address of ours that a pod uses, and no block has as handed out."""
    if not any((within := Range.of(p.spec.cidr)) and within.holds(at) for p in pools or ()):
        return
    node, address = pod.spec.node_name, at.text
    if local is not None and node == local.node and address in local.leases:
        return  # the journal has it: that the store lags behind is said there
    place = next(iter(where.all(at)), None)
    if place is None:
        said = "it is in no block"
    elif place.block.status.writer is None:
        return  # that its owner is silent is said
    else:
        said = f"block {place.block.spec.cidr} of {place.node} does not have it as handed out"
    yield Finding(
        "PodWithoutAllocation",
        reference(pod),
        address,
        tuple(dict.fromkeys((node, *([place.node] if place else [])))),
        f"the pod runs with it on {node}, and {said}",
        f"it could be handed out twice: {ask_server(f'on {node}')}; on {node}: underlayctl ipam check --run "
        f"/run/underlay; a pod that another plugin wired is to be deleted",
    )


def _addresses(pod: Pod) -> list[Range]:
    said = [one.ip for one in pod.status.pod_ips] or [pod.status.pod_ip]
    return list(dict.fromkeys(at for text in said if (at := number(text))))


def _said(pod: Pod) -> str:
    return ", ".join(at.text for at in _addresses(pod))
