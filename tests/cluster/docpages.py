"""Pages of ``docs/`` whose commands are run as they stand. The convention:

- The page's first line says where: ``<!-- runs on: underlay-lab up --cluster --bare --mesh --nodes 2 -->``, a cluster
  of its own, or ``<!-- runs after: docs/install.md -->``, the same one as that page, after it (a page has one that runs
  after it at most). Without ``--bare`` Underlay is installed; ``--racks 2 --nodes 2`` is then the one that all tests of
  ``tests/cluster`` share, and the page leaves it as it was.
- A fenced block ``sh`` is run by bash in the order of the page; the first command that fails is the test's failure. Its
  folder is the root of a tree (``manifests/`` and ``build/`` are there), ``kubectl``, ``helm``, ``underlayctl`` and
  ``underlay-lab`` are in PATH, KUBECONFIG is the administrator's. What a block exports, later ones find.
- ``sh node-1`` is run at the console of that node, or in that router (``underlay-lab exec``).
- A block of another language whose first line is ``# NAME.yaml`` (or .conf, .json, .toml) is a file of that name in
  that folder.
- A block ``output`` below one that is run shows lines of what it printed, in order; ``...`` stands for anything, also
  for whole lines; spaces count as one.
- What cannot be run here is ``text`` or ``console``, and the page says why.
- Pods run ``busybox:stable``, which the nodes have. A page waits as a person would: ``kubectl wait``,
  ``kubectl rollout status``.

Each block has five minutes, for a machine that is busy. A page is to cost seconds: all of ``make test`` has ten
minutes.
"""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from lab import client
from lab.kube.build import find_node
from tests.cluster.cluster import BIN, ROOT, Cluster

#: Pages with blocks ``sh`` that no test runs, each with its reason.
NOT_RUN: Final[Mapping[str, str]] = {"docs/pools.md": "tests/cluster/test_pools.py runs it, with packets on all paths"}
#: What the shared cluster is.
SHARED: Final = "--cluster --racks 2 --nodes 2"
#: Seconds: the machine is shared.
LIMIT: Final = 300.0
#: A busybox by the name that people know, in the place of the registry's.
IMAGE: Final = "docker.io/library/busybox:stable"
_LAB_IMAGE: Final = "underlay.network/busybox:lab"
_FENCE: Final = re.compile(r"^```(\w*)[ \t]*([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_FILE: Final = re.compile(r"\A# ([\w.-]+\.(?:yaml|conf|json|toml))\n")
#: As ``underlay-lab exec`` does for a command alone.
_OF_A_ROUTER: Final = (
    'birdc() { command birdc ${BIRD:+-s "$BIRD"} "$@"; }',
    'vtysh() { command vtysh ${FRR:+--vty_socket "$FRR"} "$@"; }',
)
_PLACE: Final = re.compile(r"\A<!-- runs (on|after): (.+?) -->\n")


class File(msgspec.Struct, frozen=True):
    name: str
    text: str


class Commands(msgspec.Struct, frozen=True):
    """``member`` is "" for the administrator's own machine; ``line`` is that of the page; ``shown`` its output's."""

    member: str
    text: str
    line: int
    shown: tuple[str, ...]


class Page(msgspec.Struct, frozen=True):
    """``on``: the options of ``underlay-lab up``, or "" and ``after`` names another page."""

    name: str
    on: str
    after: str
    steps: tuple[File | Commands, ...]


class PageError(Exception):
    """A page that does not keep the convention; the message says what to write."""


def pages(root: Path = ROOT, *, strict: bool = True) -> list[Page]:
    """Every page that is run, README too, in an order in which it can be. Raises PageError; without ``strict`` a page
    that cannot be read is left out: one that is being written is in nobody else's way."""
    found = {}
    for path in sorted([*root.glob("README.md"), *(root / "docs").rglob("*.md")]):
        try:
            page = read(path.relative_to(root).as_posix(), path.read_text())
        except PageError:
            if strict:
                raise
            continue
        if page is not None:
            found[page.name] = page
    next_of: dict[str, str] = {}
    for page in found.values():
        if page.after and page.after not in found:
            raise PageError(f"{page.name} runs after {page.after}, which is not run")
        if page.after in next_of:
            raise PageError(f"{page.name} and {next_of[page.after]} both run after {page.after}: one after the other")
        if page.after:
            next_of[page.after] = page.name
    ordered = []
    for page in found.values():
        name = page.name if page.on else ""
        while name:
            ordered.append(found[name])
            name = next_of.get(name, "")
    if len(ordered) != len(found):
        raise PageError(f"these run after each other only: {sorted(found.keys() - {p.name for p in ordered})}")
    return ordered


def read(name: str, text: str) -> Page | None:
    """A page's steps; None if it has none to run. Raises PageError."""
    steps: list[File | Commands] = []
    for match in _FENCE.finditer(text):
        language, more, body = match.groups()
        if language == "sh":
            line = text.count("\n", 0, match.start()) + 2
            steps.append(Commands(member=more, text=body, line=line, shown=()))
        elif language == "output":
            last = steps[-1] if steps else None
            if not isinstance(last, Commands):
                raise PageError(f"{name}: a block output stands below one of sh")
            steps[-1] = msgspec.structs.replace(last, shown=tuple(body.splitlines()))
        elif file := _FILE.match(body):
            steps.append(File(name=file[1], text=body))
    place = _PLACE.match(text)
    if not any(isinstance(step, Commands) for step in steps):
        if place:
            raise PageError(f"{name} says where it runs and has no block sh")
        return None
    if name in NOT_RUN:
        return None
    if place is None:
        raise PageError(f"{name} has blocks sh: its first line is to say '<!-- runs on: underlay-lab up ... -->'")
    what, where = place.groups()
    if what == "after":
        return Page(name=name, on="", after=where, steps=tuple(steps))
    if not where.startswith("underlay-lab up --cluster"):
        raise PageError(f"{name} runs on '{where}': that is to be 'underlay-lab up --cluster ...'")
    return Page(name=name, on=where.removeprefix("underlay-lab up "), after="", steps=tuple(steps))


def missing(shown: tuple[str, ...], printed: str) -> str:
    """The first line that is shown and was not printed, in that order; "" if there is none."""
    lines = iter(" ".join(line.split()) for line in printed.splitlines())
    for line in shown:
        words = " ".join(line.split())
        if words in ("", "..."):
            continue
        pattern = ".*".join(re.escape(part) for part in words.split("..."))
        if not any(re.fullmatch(pattern, there) for there in lines):
            return line
    return ""


class Player:
    """Runs pages on one cluster, in one folder, which is made here."""

    def __init__(self, cluster: Cluster, folder: Path, programs: tuple[Path, ...] = ()) -> None:
        self._cluster, self._folder = cluster, folder
        folder.mkdir()
        for name in ("manifests", "build"):
            (folder / name).symlink_to(ROOT / name)
        path = ":".join(str(p) for p in (BIN, find_node().folder, *programs))
        self._environment = {
            "PATH": f"{path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(folder),
            "KUBECONFIG": cluster.environment["KUBECONFIG"],
            "KUBECACHEDIR": cluster.environment["KUBECACHEDIR"],
            "UNDERLAY_LAB": str(cluster.folder.path),
        }
        for node in cluster.state().nodes:
            cluster.node_exec(node.name, "ctr", "-n", "k8s.io", "images", "tag", "--force", _LAB_IMAGE, IMAGE)

    def play(self, page: Page) -> None:
        """Raises AssertionError, which has the page's line, what was run and what it said."""
        for step in page.steps:
            if isinstance(step, File):
                (self._folder / step.name).write_text(step.text)
                continue
            code, printed = self._run(step)
            where = f"{page.name}:{step.line}:\n{textwrap.indent(step.text, '  ')}"
            assert code == 0, f"{where}ended with {code}:\n{printed}"
            line = missing(step.shown, printed)
            assert not line, f"{where}did not print {line!r}:\n{printed}"

    def _run(self, step: Commands) -> tuple[int, str]:
        kept = self._folder / ".exported"
        lines = [f"cd {self._folder}", "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR"]
        if step.member:
            lines += _OF_A_ROUTER
        else:
            lines += [f"[ ! -e {kept} ] || . {kept}"]
        lines += [step.text.rstrip("\n"), *([] if step.member else [f"export -p >{kept}"])]
        argv = ["bash", "-e", "-o", "pipefail", "-c", "\n".join(lines)]
        try:
            done = subprocess.run(
                client.enter(self._cluster.folder, step.member, argv) if step.member else argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT,
                check=False,
                env=self._environment,
            )
        except subprocess.TimeoutExpired as e:
            return -1, f"no end after {LIMIT:.0f} s; until then it said:\n{(e.stdout or b'').decode(errors='replace')}"
        return done.returncode, done.stdout


def chains(ordered: list[Page]) -> Iterator[tuple[Page, list[Page]]]:
    """Each page with all that are played before it on its cluster, the first one first."""
    before: list[Page] = []
    for page in ordered:
        before = [] if page.on else before
        yield page, before.copy()
        before.append(page)
