#!/usr/bin/env python3
"""Where etcd, kube-apiserver and kube-controller-manager come from: KUBEBUILDER_ASSETS, PATH, or a build of our own;
and kubelet, kube-scheduler, kubectl, kube-proxy and kubeadm, which a whole cluster needs besides.

``make apiserver`` builds what is not there (``lab.gobuild``). Tests only look (``find``, ``find_node``), as they run
where there is no network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lab import gobuild
from lab.gobuild import Module, NoGo

HERE = Path(__file__).resolve().parent
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager")
NODE_PROGRAMS = ("kubelet", "kube-scheduler", "kubectl", "kube-proxy", "kubeadm")
#: What the linker writes into the programs, so that they know their version.
STAMPED = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
GIVEN = f"set KUBEBUILDER_ASSETS to a folder with {', '.join(PROGRAMS)}"


class NotHere(NoGo):
    """This machine has no API server; the message says how to get one."""


class Programs(NamedTuple):
    folder: Path
    origin: str

    @property
    def etcd(self) -> Path:
        return self.folder / "etcd"

    @property
    def apiserver(self) -> Path:
        return self.folder / "kube-apiserver"

    @property
    def controller_manager(self) -> Path:
        return self.folder / "kube-controller-manager"


def find(env: Mapping[str, str] = os.environ) -> Programs:
    """The first place that has all three programs; they are never mixed, as their versions belong together.

    NotHere says what to type."""
    found = _given(env)
    if found is not None:
        return found
    built = cache(env)
    if built.is_dir():
        return Programs(built, "built")
    raise NotHere(f"no API server on this machine: type 'make apiserver' (once, 4 minutes on 2 idle cores), or {GIVEN}")


def ensure(env: Mapping[str, str] = os.environ) -> Programs:
    """What ``find`` finds, and else a new build. NotHere where there is no Go and none to be had, BuildFailed."""
    found = _given(env)
    if found is not None:
        return found
    try:
        return Programs(gobuild.ensure(_module(), env), "built")
    except NoGo as e:
        raise NotHere(f"no API server on this machine: install Go, or {GIVEN}; {e}") from e


class NodePrograms(NamedTuple):
    """What makes a whole cluster of an API server."""

    folder: Path

    @property
    def kubelet(self) -> Path:
        return self.folder / "kubelet"

    @property
    def scheduler(self) -> Path:
        return self.folder / "kube-scheduler"

    @property
    def kubectl(self) -> Path:
        return self.folder / "kubectl"

    @property
    def proxy(self) -> Path:
        return self.folder / "kube-proxy"

    @property
    def kubeadm(self) -> Path:
        return self.folder / "kubeadm"


def find_node(env: Mapping[str, str] = os.environ) -> NodePrograms:
    """The programs of a whole cluster, from PATH or from our own build. NotHere says what to type."""
    for entry in env.get("PATH", "").split(os.pathsep):
        if entry and all(os.access(Path(entry) / p, os.X_OK) for p in NODE_PROGRAMS):
            return NodePrograms(Path(entry))
    built = gobuild.cache(_node_module(), env)
    if built.is_dir():
        return NodePrograms(built)
    raise NotHere(
        f"no {', '.join(NODE_PROGRAMS)} on this machine: type 'make apiserver' (once, 2 more minutes on 2 idle cores)"
    )


def ensure_node(env: Mapping[str, str] = os.environ) -> NodePrograms:
    """What ``find_node`` finds, and else a new build. NotHere, BuildFailed."""
    try:
        return find_node(env)
    except NotHere:
        try:
            return NodePrograms(gobuild.ensure(_node_module(), env))
        except NoGo as e:
            raise NotHere(f"no {', '.join(NODE_PROGRAMS)} on this machine: install Go, or them; {e}") from e


def version() -> str:
    """Kubernetes' version, as go.mod requires it: ``v1.x.y``."""
    return gobuild.required(HERE, "k8s.io/kubernetes")


def cache(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of our own build."""
    return gobuild.cache(_module(), env)


def _module() -> Module:
    return Module("kube", version(), HERE, tuple(f"./cmd/{program}" for program in PROGRAMS), _linker_flags())


def _node_module() -> Module:
    return Module("kubenode", version(), HERE, tuple(f"./cmd/{program}" for program in NODE_PROGRAMS), _linker_flags())


def _given(env: Mapping[str, str]) -> Programs | None:
    folder = env.get("KUBEBUILDER_ASSETS", "")
    if folder:
        missing = [p for p in PROGRAMS if not os.access(Path(folder) / p, os.X_OK)]
        if missing:
            raise NotHere(f"KUBEBUILDER_ASSETS={folder} has no {', '.join(missing)}: add that, or unset the variable")
        return Programs(Path(folder), "KUBEBUILDER_ASSETS")
    for entry in env.get("PATH", "").split(os.pathsep):
        if entry and all(os.access(Path(entry) / p, os.X_OK) for p in PROGRAMS):
            return Programs(Path(entry), "PATH")
    return None


def _linker_flags() -> str:
    values = {"gitVersion": version(), "gitMajor": "1", "gitMinor": version().split(".")[1], "gitTreeState": "clean"}
    stamps = [f"-X {package}.{key}={value}" for package in STAMPED for key, value in values.items()]
    return " ".join(["-s -w", *stamps])


def main() -> int:
    """As ``gobuild.main``; with ``--node`` also the node's programs."""
    builds = [lambda: ensure().folder, lambda: ensure_node().folder]
    return gobuild.main(*builds[: 2 if "--node" in sys.argv[1:] else 1])


if __name__ == "__main__":
    sys.exit(main())
