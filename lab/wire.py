"""What the command and the supervisor say to each other: one JSON object a line on a unix socket.

The command sends one request; the supervisor answers with any number of ``Step`` and then one ``Done`` or ``Failed``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from lab.topology import Shape

Part = Literal["agent", "cni", "exabgp"]
#: Of a router: BIRD's one, or FRR's two.
RouterPart = Literal["bird", "zebra", "bgpd"]
#: Of the control plane; the scheduler is there only in a cluster.
Program = Literal["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"]
#: Of a cluster's node.
KubePart = Literal["containerd", "kubelet"]
#: Whose marks a cluster has (``lab.cluster.installer``).
Installer = Literal["kubeadm", "k3s"]
AnyPart = Part | RouterPart | Program | KubePart


class Follow(msgspec.Struct, frozen=True, tag=True):
    """Tell me each step of the building, from the first, until it is done."""


class Status(msgspec.Struct, frozen=True, tag=True):
    """Answer: ``State``."""


class Matrix(msgspec.Struct, frozen=True, tag=True):
    """Wait until routes have converged, then ask every pod for every other. Answer: ``lab.matrix.Report``."""

    #: Seconds to wait for the routes; what is missing then is measured as it is.
    limit: float = 3


class PodAdd(msgspec.Struct, frozen=True, tag=True):
    name: str


class PodDel(msgspec.Struct, frozen=True, tag=True):
    name: str


class Kill(msgspec.Struct, frozen=True, tag=True):
    member: str
    part: AnyPart
    signal: int = 9
    #: Seconds after its end until it is started again.
    restart_after: float = 1.0


class Switch(msgspec.Struct, frozen=True, tag=True):
    """Switches the machine of a cluster's node off, or on."""

    node: str
    on: bool


class Rename(msgspec.Struct, frozen=True, tag=True):
    """Starts the kubelet of a machine under another name."""

    node: str
    name: str


class Visit(msgspec.Struct, frozen=True, tag=True):
    """A ToR comes to the segment of a mesh, or goes."""

    come: bool


class Cable(msgspec.Struct, frozen=True, tag=True):
    """Cuts or mends the link between two."""

    a: str
    b: str
    up: bool


class Drill(msgspec.Struct, frozen=True, tag=True):
    """Does it, and tells each step. Answer: ``lab.drilled.Report``."""

    name: str
    #: Packets a second along each path.
    rate: float = 100
    #: Seconds for which what is taken away stays away.
    away: float = 5
    #: Seconds that all is to be as before, and nothing to be lost, until it is over.
    calm: float = 4


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Sends packets along every path until ``seconds`` have passed, if that is not 0, or whoever asked says no more
    (its half of the connection is shut); tells a step when they are on their way. Answer: ``lab.drilled.Report``."""

    rate: float = 100
    seconds: float = 0


class Where(msgspec.Struct, frozen=True, tag=True):
    """Answer: ``Place``."""

    name: str


class Down(msgspec.Struct, frozen=True, tag=True):
    """Ends the lab; there is no answer but the end."""


Request = (
    Follow | Status | Matrix | PodAdd | PodDel | Kill | Switch | Rename | Visit | Cable | Drill | Ping | Where | Down
)


class Step(msgspec.Struct, frozen=True, tag=True):
    """``seconds`` is None when the step begins, and its length when it is done."""

    text: str
    seconds: float | None = None


class Done(msgspec.Struct, frozen=True, tag=True):
    result: Any = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    reason: str


Answer = Step | Done | Failed


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a command runs: the network namespace as the supervisor sees it, what to set for the command, and the words
    before it that lead on from there, to a machine of its own."""

    netns: str
    environment: dict[str, str] = {}
    through: tuple[str, ...] = ()


# -- State: what ``status`` tells ----------------------------------------------------------------------------------


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """``pid`` as seen inside of the lab (``underlay-lab exec NODE ps``); 0 while the process is down."""

    pid: int
    state: Literal["running", "restarting", "new"]
    restarts: int


class PodState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    addresses: tuple[str, ...]


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    rack: str
    asn: int
    addresses: tuple[str, ...]
    blocks: tuple[str, ...]
    pods: tuple[PodState, ...]
    processes: dict[str, ProcessState]


class RouterState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    rack: str
    asn: int
    processes: dict[str, ProcessState]


class LinkState(msgspec.Struct, frozen=True, kw_only=True):
    a: str
    b: str
    up: bool


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The lab at one moment. ``state``: "building" | "up" | "failed"."""

    state: str
    dir: str
    store: str
    #: As asked for.
    shape: Shape
    routers: tuple[RouterState, ...]
    links: tuple[LinkState, ...]
    nodes: tuple[NodeState, ...]
    #: Names.
    switches: tuple[str, ...] = ()
    #: Empty where the store is a file.
    control_plane: dict[Program, ProcessState] = {}
