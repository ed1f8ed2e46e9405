"""``underlayctl uninstall``: takes Underlay out of a cluster's nodes, in the order in which nothing is left hanging.

CNI servers and agents end; each node is cleaned by a pod of its own (``underlay-uninstall``) while its speaker can
still tell the peers; then speakers and blocks go, whose finalizers nobody else would remove any more. What people
applied is theirs to delete. Each step may be done already: after an interruption the same command goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import click

from ctl.failures import OK, Failure, Usage
from ctl.kubeapi import MERGE, Api, api_of
from ctl.uninstalling import NAME, NAMESPACE, SERVERS, SPEAKER, Asked, Wire, Word, daemonset, pods_on, word
from store.clock import Clock

_LOOK_EVERY: Final = 0.3
_GROUP: Final = "/apis/underlay.network/v1"
_SETS: Final = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets"
_PODS: Final = f"/api/v1/namespaces/{NAMESPACE}/pods"
#: Pods that are named before "...".
_SOME: Final = 5


async def uninstall(
    url: str, clock: Clock, asked: Asked, *, image: str, without: Collection[str], wait: float, yes: bool
) -> int:
    """``without`` are nodes that are not waited for. Raises Usage, StoreError, and Failure where pods live on the
    network, people say no, or a node is not done within ``wait`` seconds."""
    scheme, _, rest = url.partition(":")
    if scheme != "kube":
        raise Usage([f"store {url}: only a cluster is uninstalled (kube:); on one machine: underlay-uninstall"])
    async with api_of(rest, clock) as api:
        return await _Uninstall(api, clock, wait).run(asked, image=image, without=without, yes=yes)


class _Uninstall:
    def __init__(self, api: Api, clock: Clock, wait: float) -> None:
        self._api, self._clock, self._wait = api, clock, wait

    async def run(self, asked: Asked, *, image: str, without: Collection[str], yes: bool) -> int:
        await self._look_for_pods(asked)
        like = await self._like(image)
        nodes = sorted(node["metadata"]["name"] for node in await self._api.list("/api/v1/nodes"))
        unknown = sorted(set(without) - set(nodes))
        if unknown:
            raise Usage([f"--without {unknown[0]}: there is no such Node; there are {', '.join(nodes) or 'none'}"])
        question = f"Take Underlay from {len(nodes)} nodes? No new pod gets a network until another plugin is there"
        if not yes and not click.confirm(question, err=True):
            raise Failure(["nothing is changed"])
        await self._end(SERVERS)
        click.echo("CNI servers and agents have ended")
        made_namespace = await self._namespace()
        await self._clean(daemonset(asked, like, image=image), without)
        await self._end((NAME, SPEAKER))
        click.echo("speakers have ended")
        await self._delete_blocks()
        if made_namespace:
            await self._api.send("DELETE", f"/api/v1/namespaces/{NAMESPACE}")
        click.echo(
            "kept: what was applied (kinds with pools and peers, rights, policies, Namespace): delete it as it came,"
        )
        click.echo("  kubectl delete --ignore-not-found -k manifests/")
        return OK

    async def _look_for_pods(self, asked: Asked) -> None:
        cidrs = [block["spec"]["cidr"] for block in await self._api.list(f"{_GROUP}/ipamblocks")]
        pods = pods_on(await self._api.list("/api/v1/pods"), cidrs)
        if not pods:
            return
        names = ", ".join(f"{name} on {node}" for name, node in pods[:_SOME]) + (", ..." if len(pods) > _SOME else "")
        said = f"{len(pods)} {'pod has' if len(pods) == 1 else 'pods have'} an address of a block: {names}"
        if not asked.keep_pods:
            raise Failure(
                [
                    f"{said}: nothing is changed. Delete them, and what makes them anew; --keep-pods leaves them "
                    "wired, but out of everybody's routes"
                ]
            )
        click.echo(f"{said}: they keep their wiring")

    async def _like(self, image: str) -> Wire | None:
        """A DaemonSet of the installation, for the image."""
        for name in ("underlay-agent", "underlay-cni", SPEAKER, NAME):
            found = await self._api.get(f"{_SETS}/{name}")
            if found:
                return found
        if not image:
            raise Usage([f"no DaemonSet in {NAMESPACE} says which image the nodes have: give --image"])
        return None

    async def _namespace(self) -> bool:
        """Whether it had to be made: somebody deleted it before."""
        path = f"/api/v1/namespaces/{NAMESPACE}"

        async def gone() -> str:
            found = await self._api.get(path)
            ending = found is not None and found["metadata"].get("deletionTimestamp")
            return f"Namespace {NAMESPACE} is being deleted" if ending else ""

        await self._until(gone)
        if await self._api.get(path):
            return False
        await self._api.send("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        return True

    async def _end(self, names: Sequence[str]) -> None:
        """Deletes the DaemonSets, and waits for the end of their pods on nodes that answer."""
        for name in names:
            await self._api.send("DELETE", f"{_SETS}/{name}", {"propagationPolicy": "Background"})

        async def ended() -> str:
            silent = {n["metadata"]["name"] for n in await self._api.list("/api/v1/nodes") if _is_silent(n)}
            left = [
                pod["metadata"]["name"]
                for pod in await self._api.list(_PODS)
                if any(owner["name"] in names for owner in pod["metadata"].get("ownerReferences", ()))
                and pod["spec"].get("nodeName") not in silent
            ]
            return f"still there: {', '.join(sorted(left))}" if left else ""

        await self._until(ended)

    async def _clean(self, wanted: Wire, without: Collection[str]) -> None:
        """Returns when every node has said that it is done."""
        await self._end((NAME,))  # of a run before this one, which may have asked for something else
        await self._api.send("POST", _SETS, wanted)
        said: dict[str, Word] = {}
        selector = ",".join(f"{k}={v}" for k, v in wanted["spec"]["selector"]["matchLabels"].items())

        async def done() -> str:
            for pod in await self._api.list(_PODS, labelSelector=selector):
                one = word(pod)
                if one.lines and said.get(one.node) != one:
                    for line in one.lines:
                        click.echo(f"{one.node}: {line}")
                if one.node:
                    said[one.node] = one
            found = await self._api.get(f"{_SETS}/{NAME}") or {}
            status = found.get("status", {})
            if status.get("observedGeneration") is None:
                return "the DaemonSet's controller does not answer"
            missing = [f"{n}: {next(iter(w.lines[-1:]), 'no word yet')}" for n, w in sorted(said.items()) if not w.done]
            missing = [m for m in missing if m.partition(":")[0] not in without]
            wanted_pods = status.get("desiredNumberScheduled", 0) - len(set(without) - set(said))
            if not missing and len(said) < wanted_pods:
                return f"{wanted_pods - len(said)} nodes have no pod yet"
            return "; ".join(missing)

        await self._until(done, hint="; --without NODE goes on without one that is gone")

    async def _delete_blocks(self) -> None:
        """With their finalizers: who would remove them has ended (R5)."""
        blocks = await self._api.list(f"{_GROUP}/ipamblocks")
        for block in blocks:
            path = f"{_GROUP}/ipamblocks/{block['metadata']['name']}"
            await self._api.send("PATCH", path, {"metadata": {"finalizers": None}}, MERGE)
            await self._api.send("DELETE", path)
        for status in await self._api.list(f"{_GROUP}/bgpnodestatuses"):
            await self._api.send("DELETE", f"{_GROUP}/bgpnodestatuses/{status['metadata']['name']}")
        click.echo(f"{len(blocks)} blocks are deleted")

    async def _until(self, problem: Callable[[], Awaitable[str]], *, hint: str = "") -> None:
        """Asks ``problem`` until it has none. Raises Failure with the last one."""
        end = self._clock.monotonic() + self._wait
        while why := await problem():
            if self._clock.monotonic() > end:
                raise Failure([f"after {self._wait:g} s: {why}; the same command goes on from here{hint}"])
            await self._clock.sleep(_LOOK_EVERY)


def _is_silent(node: Wire) -> bool:
    """Its kubelet has not been heard of for long: a pod there ends when it is back, or never."""
    ready = [c["status"] for c in node.get("status", {}).get("conditions", ()) if c["type"] == "Ready"]
    return ready == ["Unknown"]
