"""Makes a cluster's first IPPools where it has none: asks its sources, creates what ``agent.firstpools`` decides, and
leaves a record that it was done.

Every agent does so for itself, and nobody is chosen: a pool has one name, so of a hundred that create it one does. The
record, ConfigMap ``underlay-first-pools``, says that the cluster has had its pools, so one that is deleted stays so
(docs/decisions/0019-first-pools.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Any, Final

import yaml

from agent.fib import KernelState
from agent.firstpools import (
    NAMES,
    Decision,
    Member,
    PoolsNotUsable,
    Ranges,
    Sources,
    Wish,
    decide,
    k0s_ranges,
    kubeadm_ranges,
)
from store.base import Store
from store.clock import Clock
from store.errors import AlreadyExists, NotFound, StoreError
from store.model import ConfigMap, IPAMBlock, IPPool, K0sClusterConfig, Meta, Node

log = logging.getLogger(__name__)

#: The record, in the agents' namespace.
RECORD: Final = "underlay-first-pools"
KUBEADM: Final = "kube-system/kubeadm-config"
K0S: Final = "kube-system/k0s"
#: Seconds until it is tried again, doubled each time up to the second number.
AGAIN: Final = (0.2, 60.0)


class PoolMaker:
    """``wishes`` is the setting, ``None`` for auto. ``kernel`` is this node's, None as long as it was not
    read. ``on_change`` is called when ``reason`` may be another."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        node: str,
        namespace: str,
        wishes: tuple[Wish, ...] | None,
        kernel: Callable[[], KernelState | None],
        on_change: Callable[[], None],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._store, self._clock, self._node, self._wishes = store, clock, node, wishes
        self._record = f"{namespace}/{RECORD}"
        self._kernel, self._on_change, self._environment = kernel, on_change, environment
        #: Why the cluster has no pool, and what is to be done; "" while it has one, or is being asked.
        self.reason = ""

    async def run(self) -> None:
        """Until the cluster has pools, or had them. With the setting ``none`` at once."""
        if self._wishes == ():
            return
        pause = AGAIN[0]
        while True:
            try:
                settled, reason = await self.step()
            except StoreError as e:
                settled, reason = False, f"whether there are first pools to make is not known: {e}"
            if reason != self.reason:
                self.reason = reason
                if reason:
                    log.warning("%s", reason)
                self._on_change()
            if settled:
                return
            await self._clock.sleep(pause)
            pause = min(2 * pause, AGAIN[1])

    async def step(self) -> tuple[bool, str]:
        """Looks once: whether there is nothing more to do ever, and what people should know. Raises StoreError."""
        kernel = self._kernel()
        if kernel is None:
            return False, ""
        # The record is written after the pools, so it is read before them.
        recorded = await self._get(ConfigMap, self._record) is not None
        names = {pool.name for pool in (await self._store.list(IPPool)).items}
        if recorded:
            return bool(names), "" if names else self._deleted()
        if names - set(NAMES.values()):
            await self._write_record("pools were there already", ())
            return True, ""
        if not names and (await self._store.list(IPAMBlock)).items:
            return False, (
                "there is no IPPool, but blocks of one that was deleted: create the pools anew that this cluster is to "
                "have, none is made of itself"
            )
        try:
            decision = decide(await self._sources(kernel))
        except PoolsNotUsable as e:
            decision = Decision(reason=str(e))
        if not decision.pools:
            return False, f"there is no IPPool: {decision.reason}" if not names else ""
        for pool in decision.pools:
            try:
                await self._store.create(pool)
            except AlreadyExists:
                log.debug("another node made IPPool %s", pool.name)
            else:
                log.info("made IPPool %s, %s, of %s", pool.name, pool.spec.cidr, decision.source)
        await self._write_record(decision.source, decision.pools)
        return True, ""

    # -- parts ----------------------------------------------------------------------------------------------------

    def _deleted(self) -> str:
        return (
            f"there is no IPPool: this cluster had pools, and somebody deleted them. Create the ones that it is to "
            f"have; to have the first ones made again, delete ConfigMap {self._record}"
        )

    async def _write_record(self, source: str, pools: tuple[IPPool, ...]) -> None:
        namespace, _, name = self._record.partition("/")
        data = {"pools": "\n".join(f"{pool.name} {pool.spec.cidr}" for pool in pools), "source": source}
        data |= {"node": self._node, "at": self._clock.now()}
        try:
            await self._store.create(ConfigMap(metadata=Meta(name=name, namespace=namespace), data=data))
        except AlreadyExists:
            log.debug("another node has written the record")

    async def _sources(self, kernel: KernelState) -> Sources:
        nodes = (await self._store.list(Node)).items
        kubeadm, k0s = await self._get(ConfigMap, KUBEADM), await self._get(K0sClusterConfig, K0S)
        server = self._environment.get("KUBERNETES_SERVICE_HOST", "")
        return Sources(
            node=self._node,
            setting=self._wishes or (),
            kubeadm=None if kubeadm is None else _of_kubeadm(kubeadm),
            k0s=None if k0s is None else k0s_ranges(k0s.spec),
            nodes=tuple(
                Member(
                    node.name,
                    node.spec.pod_cidrs,
                    tuple(a.address for a in node.status.addresses if a.type in ("InternalIP", "ExternalIP")),
                )
                for node in nodes
            ),
            services=(server,) if _is_address(server) else (),
            subnets=tuple((a.subnet, _interface(kernel, a.interface)) for a in kernel.addresses),
        )

    async def _get(self, kind: type[Any], key: str) -> Any:
        """None where it is not: not to be allowed to know is an error of the store."""
        try:
            return await self._store.get(kind, key)
        except NotFound:
            return None


def _of_kubeadm(config_map: ConfigMap) -> Ranges:
    try:
        return kubeadm_ranges(yaml.safe_load(config_map.data.get("ClusterConfiguration", "")))
    except yaml.YAMLError as e:
        raise PoolsNotUsable(f"ClusterConfiguration in ConfigMap {KUBEADM} is no YAML: {e}") from e


def _interface(kernel: KernelState, index: int) -> str:
    link = kernel.links.get(index)
    return link.name if link else f"number {index}"


def _is_address(text: str) -> bool:
    """The API server may be known by a name."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
