"""Writes ``manifests/crds``, one file per kind, made by ``store.crd`` of the model, and ``manifests/underlay.yaml``,
which is all that ``kustomization.yaml`` names in one file. With ``--check`` it only looks."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from store import crd

MANIFESTS = Path(__file__).resolve().parent
FOLDER = MANIFESTS / "crds"
HEADER = "# Made by manifests/generate.py of store/model.py and store/cel.py. Change those.\n"


ALL = MANIFESTS / "underlay.yaml"
ALL_HEADER = "# Made by manifests/generate.py of the files that kustomization.yaml names. Change those.\n"


def files() -> dict[Path, str]:
    """Every file that is made and what it should hold."""
    crds = {FOLDER / f"{kind.PLURAL}.yaml": HEADER + _yaml(crd.definition(kind)) for kind in crd.custom_kinds()}
    parts = []
    for name in yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]:
        path = MANIFESTS / name
        parts.append((crds.get(path) or path.read_text()).rstrip("\n"))
    return crds | {ALL: ALL_HEADER + "\n---\n".join(parts) + "\n"}


def differences() -> list[Path]:
    """Files that are missing, old, or not of any kind."""
    wanted = files()
    present = {path: path.read_text() for path in (*FOLDER.glob("*.yaml"), ALL) if path.exists()}
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
