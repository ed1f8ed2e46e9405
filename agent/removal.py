"""What an uninstall takes away from a node, in which order, and what it keeps. Pure.

First what would make something new of ours (the conflist), then what others know of us (sessions: withdraw, then
remove, R9), then the kernel, and last the folder with the locks, so that a run that was killed is ended by another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from agent.fib import Route
from cni.marks import NFT_TABLE, PROTO_BLOCKS, PROTO_IMPORTS, PROTO_PODS
from cni.sysctls import Former

#: What processes of ours make in the run directory, and in the state directory (docs/numbers.md).
RUN_FILES: Final = (
    *("cni.sock", "metrics.sock", "agent.sock", "cni.lock*", "agent.lock*", "journal-*", "starts-*", ".starts-*"),
    *("queue", "speaker", "sysctls"),
)
STATE_FILES: Final = ("snapshot.json", "snapshot.new")
#: In the run directory, what the end of a pod's network, or a CNI server that comes back, needs.
_OF_PODS: Final = ("journal-*", "starts-*", "queue")
#: Sysctls that others on the machine may have come to need since we set them.
FORWARDING: Final = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
_ROUTES: Final[Mapping[int, str]] = {PROTO_PODS: "pods", PROTO_BLOCKS: "blocks", PROTO_IMPORTS: "imports"}


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """One node, at one moment: what of it is ours."""

    #: Links of pods by index: those that a pod has, and those that wait for their removal.
    pods: Mapping[int, str] = {}
    doomed: int = 0
    #: With our protocol numbers, in the main table.
    routes: tuple[Route, ...] = ()
    #: Ids of nexthop objects in our range and with our protocol number: groups, and their members.
    groups: tuple[int, ...] = ()
    nexthops: tuple[int, ...] = ()
    source_check: bool = False
    #: What we changed, each with its value now (None: it is gone, as its interface).
    sysctls: tuple[tuple[Former, str | None], ...] = ()
    conflist: bool = False
    binary: bool = False
    #: A speaker answers.
    speaker: bool = False
    #: Names in the two directories; None: there is no such directory.
    run: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """``keep_pods``: go on although pods live, and leave them their wiring. ``forwarding``: put that back, too."""

    keep_pods: bool = False
    forwarding: bool = False


class RemoveConflist(msgspec.Struct, frozen=True):
    pass


class EndSessions(msgspec.Struct, frozen=True):
    """Withdraw all, and then end every session: no peer has a route to keep for a graceful restart."""


class DeleteRoutes(msgspec.Struct, frozen=True):
    routes: tuple[Route, ...]


class DeleteNextHops(msgspec.Struct, frozen=True):
    ids: tuple[int, ...]


class Reap(msgspec.Struct, frozen=True):
    """Remove links that wait for it."""


class RemoveSourceCheck(msgspec.Struct, frozen=True):
    pass


class Restore(msgspec.Struct, frozen=True):
    """A sysctl gets its former value back, and the record of it goes; ``value`` None: only the record goes."""

    key: str
    value: str | None


class RemoveBinary(msgspec.Struct, frozen=True):
    pass


class RemoveFiles(msgspec.Struct, frozen=True):
    """``directory`` is ``run`` or ``state``; it goes too, unless something is left in it."""

    directory: str
    names: tuple[str, ...]


Step = (
    RemoveConflist
    | EndSessions
    | DeleteRoutes
    | DeleteNextHops
    | Reap
    | RemoveSourceCheck
    | Restore
    | RemoveBinary
    | RemoveFiles
)


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """``refusal`` ("": none) says why nothing is done; ``kept`` what stays and why, a line each."""

    refusal: str = ""
    steps: tuple[Step, ...] = ()
    kept: tuple[str, ...] = ()


def plan(there: Present, wishes: Wishes) -> Removal:
    """Applied to the end, and asked again, it is empty but for ``kept``."""
    pods = sorted(there.pods.values())
    if pods and not wishes.keep_pods:
        names = ", ".join([*pods[:3], *(["..."] if len(pods) > 3 else [])])
        return Removal(
            refusal=f"{len(pods)} {'pod has' if len(pods) == 1 else 'pods have'} our network ({names}): nothing is "
            "changed. End them first; --keep-pods leaves them their wiring, and withdraws what is announced of them"
        )
    steps: list[Step] = []
    kept: list[str] = []
    if there.conflist:
        steps.append(RemoveConflist())
    if there.speaker:
        steps.append(EndSessions())
    routes = tuple(r for r in there.routes if not _is_of(r, there.pods))
    if routes:
        steps.append(DeleteRoutes(routes))
    if there.groups or there.nexthops:
        steps.append(DeleteNextHops((*there.groups, *there.nexthops)))  # a group before its members
    if there.doomed:
        steps.append(Reap())
    if pods:
        kept.append(f"{len(pods)} pods: link, routes and source check of each, {', '.join(pods)}")
    elif there.source_check:
        steps.append(RemoveSourceCheck())
    for former, now in there.sysctls:
        step, words = _sysctl(former, now, wishes, pods)
        steps += [step] if step else []
        kept += [words] if words else []
    if there.binary and not pods:
        steps.append(RemoveBinary())
    elif there.binary:
        kept.append("the plugin's binary: the end of those pods may need it")
    _files(steps, kept, "state", there.state, STATE_FILES)
    if pods:
        kept.append("the journal and the queue in the run directory: they are about those pods")
        _files(steps, kept, "run", there.run, tuple(n for n in RUN_FILES if n not in _OF_PODS), quiet=_OF_PODS)
    else:
        _files(steps, kept, "run", there.run, RUN_FILES)
    return Removal(steps=tuple(steps), kept=tuple(kept))


def in_words(step: Step) -> str:
    """What is gone when the step is done."""
    match step:
        case RemoveConflist():
            return "the conflist: no new pod is ours"
        case EndSessions():
            return "announcements, and the sessions with all peers"
        case DeleteRoutes(routes):
            counts = {name: sum(r.protocol == number for r in routes) for number, name in _ROUTES.items()}
            return "routes: " + ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        case DeleteNextHops(ids):
            return f"{len(ids)} nexthop objects"
        case Reap():
            return "links of pods that ended"
        case RemoveSourceCheck():
            return f"nftables table inet {NFT_TABLE}"
        case Restore(key, value):
            return f"sysctl {key}: {value} again" if value is not None else f"sysctl {key}: forgotten"
        case RemoveBinary():
            return "the plugin's binary"
        case RemoveFiles(directory, _):
            return f"the {directory} directory"


def _is_of(route: Route, pods: Mapping[int, str]) -> bool:
    """Whether it is a living pod's."""
    return route.protocol == PROTO_PODS and any(hop.interface in pods for hop in route.nexthops)


def _sysctl(former: Former, now: str | None, wishes: Wishes, pods: Iterable[str]) -> tuple[Step | None, str]:
    """A step, and what is to be said."""
    key = former.key
    if now is None or now == former.before:
        return Restore(key, None), ""
    if now != former.ours:
        return Restore(key, None), f"sysctl {key}={now}: somebody has changed it since (before us: {former.before})"
    depends = key in FORWARDING or key.endswith(".accept_ra")
    if depends and (not wishes.forwarding or pods):
        who = "those pods need it" if pods else "another network of this machine may need it by now"
        return None, f"sysctl {key}={now}, which was {former.before} before us: {who}; sysctl -w {key}={former.before}"
    return Restore(key, former.before), ""


def _files(
    steps: list[Step],
    kept: list[str],
    directory: str,
    there: tuple[str, ...] | None,
    ours: Iterable[str],
    *,
    quiet: Iterable[str] = (),
) -> None:
    """``quiet``: what stays and is said elsewhere."""
    if there is None:
        return
    names = tuple(sorted(n for n in there if any(fnmatchcase(n, pattern) for pattern in ours)))
    others = sorted(n for n in there if n not in names and not any(fnmatchcase(n, pattern) for pattern in quiet))
    if others:
        kept.append(f"in the {directory} directory, which is not ours: {', '.join(others)}")
    if names or not there:
        steps.append(RemoveFiles(directory, names))
