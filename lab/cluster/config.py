"""What the programs of a cluster's node are told. Pure.

A node is a machine of its own as far as its programs can tell: network, mount, process and host name are. What they
write to folders of the machine goes to the node's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

#: What a pod's sandbox runs: busybox, asleep.
SANDBOX_IMAGE: Final = "underlay.network/busybox:lab"
SOCKET: Final = "/run/containerd/containerd.sock"
#: In a node's own folder.
SPEC: Final = "runtime-spec.json"

#: Folders that a node has for itself, and where they are in its own folder.
FOLDERS: Final = {
    "/var/lib/kubelet": "kubelet",
    "/var/log/pods": "log/pods",
    "/var/log/containers": "log/containers",
    "/var/lib/cni": "cni",
    "/var/lib/underlay": "state",
    "/etc/cni/net.d": "net.d",
    "/opt/cni/bin": "bin",
}
#: What a kubelet wants of the machine, and would change (pkg/kubelet/cm/container_manager_linux.go): it finds it so.
_SYSCTLS: Final = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
}
_BOOT_ID: Final = "kernel/random/boot_id"


def files(home: Path, boot_id: str) -> dict[Path, str]:
    """What stands in for files under /proc/sys on this node, by where it is to be."""
    values = _SYSCTLS | {_BOOT_ID: boot_id}
    return {home / "proc" / name.replace("/", "."): f"{value}\n" for name, value in values.items()}


def holder(home: Path, name: str, up: Path) -> str:
    """The script of the node's first process, for sh: makes it a machine of its own, touches ``up``, and stays."""
    lines = [
        "set -e",
        # Pins of namespaces: another node's, which is switched off, would live on by them.
        f"for pin in {home.parent}/netns/*; do [ ! -e $pin ] || umount --lazy $pin; done",
        "mount --make-rshared /",
        f"cd {home}",
        # A tmpfs: it ends with the node, as a machine's does. The lab's own folder may be below it.
        "mount -t tmpfs run /run",
        *((f"mkdir -p {home.parent}", f"mount -c --bind .. {home.parent}") if home.is_relative_to("/run") else ()),
        "mkdir -p /run/containerd /run/netns",
        "mount --make-rshared /run",
        *(f"mount --bind {home / part} {folder}" for folder, part in FOLDERS.items()),
        "mount --make-shared /var/lib/kubelet",
    ]
    lines += (
        f"mount --bind {home / 'proc' / name.replace('/', '.')} /proc/sys/{name}" for name in (*_SYSCTLS, _BOOT_ID)
    )
    return "\n".join([*lines, f"hostname {name}", f"touch {up}", "trap '' CHLD", "exec sleep 2147483647", ""])


def runtime_spec(home: Path, default: str) -> str:
    """What containers of the node have in common, by containerd's own ``default`` (ctr oci spec): their /proc is a new
    one, so they are given the node's boot id, too, once it is mounted (OCI runtime spec, createContainer hooks)."""
    spec = json.loads(default)
    boot_id = home / "proc" / _BOOT_ID.replace("/", ".")
    script = (
        """bundle=$(sed 's/.*"bundle":"\\([^"]*\\)".*/\\1/')\n"""
        f"exec mount --bind {boot_id} $bundle/rootfs/proc/sys/{_BOOT_ID}"
    )
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
    return json.dumps(spec | {"hooks": {"createContainer": [hook]}})


def containerd(home: Path) -> str:
    """The configuration of containerd 1.6 and 1.7, as TOML."""
    return f"""\
version = 2
root = "{home / "containerd"}"
state = "/run/containerd/state"
oom_score = 0
[grpc]
  address = "{SOCKET}"
[ttrpc]
  address = "{SOCKET}.ttrpc"
[metrics]
  address = "127.0.0.1:1338"
[plugins."io.containerd.internal.v1.opt"]
  path = "{home / "containerd" / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX_IMAGE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      base_runtime_spec = "{home / SPEC}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"""


def kubelet(ca: Path, static: Path) -> str:
    """A KubeletConfiguration, as JSON. In ``static`` are files of Pods that it runs whatever an API server says."""
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "x509": {"clientCAFile": str(ca)},
                "webhook": {"enabled": True},
                "anonymous": {"enabled": False},
            },
            "authorization": {"mode": "Webhook"},
            "staticPodPath": str(static),
            "fileCheckFrequency": "1s",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "cgroupDriver": "cgroupfs",
            # The machine's cgroups are not ours to arrange, nor is its swap, or how full its disk is.
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": ["none"],
            "failCgroupV1": False,
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "evictionHard": {
                "memory.available": "0%",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
            },
            "makeIPTablesUtilChains": False,
            "resolvConf": "",
            "serializeImagePulls": False,
            # Its own would be made on the machine.
            "volumePluginDir": "/var/lib/kubelet/plugins-exec",
            # A lab is waited for.
            "nodeStatusUpdateFrequency": "1s",
            # What has not changed is not told again: everybody who watches nodes would read it each second.
            "nodeStatusReportFrequency": "5m",
            "syncFrequency": "10s",
        },
        indent=1,
    )
