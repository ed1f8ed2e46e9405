"""Writes ``manifests/crds``, one file per kind, made by ``store.crd`` of the model, ``manifests/underlay.yaml``, which
is all that ``kustomization.yaml`` names in one file, and ``manifests/chart``. With ``--check`` it only looks."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from ctl import uninstalling
from manifests import chart
from store import crd

MANIFESTS = Path(__file__).resolve().parent
FOLDER = MANIFESTS / "crds"
HEADER = "# Made by manifests/generate.py of store/model.py and store/cel.py. Change those.\n"


ALL = MANIFESTS / "underlay.yaml"
CHART = MANIFESTS / "chart"
UNINSTALL = MANIFESTS / "uninstall.yaml"
UNINSTALL_HEADER = """\
# Made by manifests/generate.py of ctl/uninstalling.py. Change that. Not one of those that kustomization.yaml names.
#
# A pod on each node that takes away what Underlay made there; docs/uninstall.md says what is before and after. It has
# no token. NET_ADMIN: routes, nexthops, links, nftables. /run and /var/lib: a folder is removed in the one that it is
# in. /opt/cni/bin and /etc/cni/net.d: the plugin. /proc/sys/net: sysctls get the values back that they had before us.
"""
ALL_HEADER = "# Made by manifests/generate.py of the files that kustomization.yaml names. Change those.\n"


def files() -> dict[Path, str]:
    """Every file that is made and what it should hold."""
    crds = {FOLDER / f"{kind.PLURAL}.yaml": HEADER + _yaml(crd.definition(kind)) for kind in crd.custom_kinds()}
    parts = []
    for name in yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]:
        path = MANIFESTS / name
        parts.append((crds.get(path) or path.read_text()).rstrip("\n"))
    uninstall = UNINSTALL_HEADER + _yaml(uninstalling.daemonset(uninstalling.Asked()))
    made = {ALL: ALL_HEADER + "\n---\n".join(parts) + "\n", UNINSTALL: uninstall}
    texts = {path.name: path.read_text() for path in MANIFESTS.glob("*.yaml")}
    by_name = {path.name: text for path, text in crds.items()}
    charted = chart.files(texts, by_name, (MANIFESTS.parent / "setup.cfg").read_text())
    return crds | made | {CHART / path: text for path, text in charted.items()}


def differences() -> list[Path]:
    """Files that are missing, old, or not of any kind."""
    wanted = files()
    there = (*FOLDER.glob("*.yaml"), *CHART.rglob("*.*"), ALL, UNINSTALL)
    present = {path: path.read_text() for path in there if path.is_file()}
    return sorted(path for path in wanted.keys() | present.keys() if wanted.get(path) != present.get(path))


def main() -> int:
    stale = differences()
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not what the model says: type python3 -m manifests.generate", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    wanted = files()
    for path in stale:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()
    return 0


def _yaml(document: object) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=116, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes equal parts out each time: an alias is legal YAML, but not for people."""

    def ignore_aliases(self, data: object) -> bool:
        return True


if __name__ == "__main__":
    sys.exit(main())
