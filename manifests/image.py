"""Builds the image without any engine: an OCI image layout (opencontainers/image-spec) in one tar, of this machine's
Python, the packages that ``underlay[kube]`` asks for, our own, and the shim. What the tests and the lab use; a release
is built by the Dockerfile.

    python -m manifests.image build/underlay-image.tar

Three layers, from what changes least to what changes most. The same tree on the same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.metadata
import io
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lab import oci

ROOT: Final = Path(__file__).resolve().parents[1]
NAME: Final = "underlay.network/underlay:lab"
#: Ours, as setup.cfg has them, but for the lab.
PACKAGES: Final = ("agent", "cni", "ctl", "ipam", "store")
#: Where things are in the image.
PYTHON, LIBRARY, PROGRAMS, SHIM = (Path(p) for p in ("/opt/python", "/opt/underlay", "/usr/bin", "/opt/cni/underlay"))
#: Parts of the standard library that no process of ours imports, and that weigh.
_LEFT_OUT: Final = {
    *("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__"),
}
#: Extensions of it that have no use in a container: for screens and terminals, with the libraries of all of those, for
#: NIS, and CPython's own tests. Each node of a lab unpacks, and hashes, all that is here.
_LEFT_OUT_EXTENSIONS: Final = re.compile(
    r"(_tkinter|_curses|_curses_panel|readline|nis|_dbm|_gdbm|_test\w+|_xx\w+|xx\w+|_ctypes_test)\.cpython-.*\.so"
)
#: Users that a process may run as: ExaBGP looks its user's name up (exabgp.md, fault 10).
_ACCOUNTS: Final = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nunderlay:x:65532:65532:underlay:/:/sbin/nologin\n",
    "etc/group": "root:x:0:\nunderlay:x:65532:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_EPOCH: Final = 0


class ImageError(Exception):
    """Something that goes into the image is not there; the message says how to get it."""


def build(target: Path, *, name: str = NAME, shim: Path = ROOT / "build" / "underlay-shim") -> None:
    """Writes the image. Raises ImageError, OSError."""
    if not shim.exists():
        raise ImageError(f"{shim} is missing: make shim")
    with tempfile.TemporaryDirectory(prefix="underlay-image-") as folder:
        tree = Path(folder)
        layers = [tree / part for part in ("python", "packages", "ours")]
        _python(layers[0])
        _packages(layers[1])
        _ours(layers[2], shim)
        # The objects of all layers are there now, and what they are linked with goes below them.
        _libraries(layers, layers[0])
        _strip(layers)
        for layer in layers:
            _compile(layer)
        target.parent.mkdir(parents=True, exist_ok=True)
        oci.write(target, name, [_layer(layer) for layer in layers], _config())


# -- layers --------------------------------------------------------------------------------------------------------


def _python(into: Path) -> None:
    """The interpreter and its library; certificates, accounts, and the folders that mounts go to."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = into / PYTHON.relative_to("/")
    (home / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), home / "bin" / "python3")
    library = home / "lib" / version
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=_ignored, symlinks=False)
    for name, text in _ACCOUNTS.items():
        _file(into / name, text)
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    if certificates.exists():
        _file(into / "etc/ssl/certs/ca-certificates.crt", certificates.read_text())
    for folder in ("tmp", "run", "proc", "sys", "dev", "var/lib", "var/log", "usr/bin", "opt/cni"):
        (into / folder).mkdir(parents=True, exist_ok=True)


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {
        name
        for name in names
        if name in _LEFT_OUT
        or name.startswith("config-")
        or name.endswith(".a")
        or _LEFT_OUT_EXTENSIONS.fullmatch(name)
    }


def _packages(into: Path) -> None:
    """What ``underlay[kube]`` asks for, with all that that asks for."""
    library = into / LIBRARY.relative_to("/")
    for distribution in _required("underlay", frozenset({"kube"})):
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." in file.parts or "__pycache__" in file.parts or not source.exists():
                continue  # programs of theirs, which nobody calls here
            (library / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, library / file)


def _required(name: str, extras: frozenset[str]) -> list[importlib.metadata.Distribution]:
    """Everything behind a package of this environment, without itself. ImageError if something is not installed."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(name, extras)]
    while waiting:
        asking, wanted = waiting.pop()
        for text in importlib.metadata.requires(asking) or ():
            requirement = re.match(r"([A-Za-z0-9_.-]+)\s*(?:\[([^\]]*)\])?[^;]*(?:;(.*))?$", text)
            if requirement is None or not _holds(requirement[3] or "", wanted):
                continue
            key = requirement[1].lower().replace("_", "-")
            if key not in found:
                try:
                    found[key] = importlib.metadata.distribution(requirement[1])
                except importlib.metadata.PackageNotFoundError as e:
                    raise ImageError(f"{requirement[1]} is not installed: pip install -e '.[kube]'") from e
                waiting.append((requirement[1], frozenset()))
    return [found[key] for key in sorted(found)]


def _holds(marker: str, extras: frozenset[str]) -> bool:
    """Whether an environment marker (PEP 508) holds: of extras those asked for, and of Python this one."""
    for clause in filter(None, (part.strip(" ()") for part in marker.split(" and "))):
        key, sign, value = re.match(r"(\w+)\s*(\S+)\s*[\"']([^\"']*)[\"']", clause).groups()  # type: ignore[union-attr]
        here = {
            "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
            "python_full_version": platform.python_version(),
            "sys_platform": sys.platform,
            "platform_system": platform.system(),
            "platform_python_implementation": platform.python_implementation(),
            "implementation_name": sys.implementation.name,
            "os_name": os.name,
        }
        if key == "extra":
            if value not in extras:
                return False
            continue
        ours, theirs = (_comparable(key, text) for text in (here.get(key, ""), value))
        holds = {"==": ours == theirs, "!=": ours != theirs, "<": ours < theirs, ">=": ours >= theirs}
        holds |= {">": ours > theirs, "<=": ours <= theirs}
        if not holds[sign]:
            return False
    return True


def _comparable(key: str, text: str) -> Any:
    return [int(part) for part in re.findall(r"\d+", text)] if "version" in key else text


def _ours(into: Path, shim: Path) -> None:
    library = into / LIBRARY.relative_to("/")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, library / package, ignore=_ignored)
    for entry in importlib.metadata.distribution("underlay").entry_points:
        module, _, function = entry.value.partition(":")
        if entry.group == "console_scripts" and module.partition(".")[0] in PACKAGES:
            text = f"#!{PYTHON}/bin/python3 -P\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            _file(into / PROGRAMS.relative_to("/") / entry.name, text, mode=0o755)
    target = into / SHIM.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(shim, target)
    target.chmod(0o755)


def _libraries(layers: list[Path], into: Path) -> None:
    """The shared objects that programs and extensions are linked with, where the loader looks for them here."""
    linked = [p for layer in layers for p in layer.rglob("*") if p.is_file() and _is_dynamic(p)]
    said = subprocess.run(["ldd", *linked], capture_output=True, text=True, check=False).stdout
    for path in sorted(set(re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", said, re.MULTILINE))):
        if not any(Path(path).is_relative_to(layer) for layer in layers):
            copied = into / path.lstrip("/")
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copied)


def _strip(layers: list[Path]) -> None:
    """Takes from programs and objects what a debugger alone would read: two thirds of this machine's libpython."""
    for path in (p for layer in layers for p in layer.rglob("*") if p.is_file() and _is_dynamic(p)):
        path.chmod(0o755)
        subprocess.run(["strip", "--strip-unneeded", path], check=True)


def _is_dynamic(path: Path) -> bool:
    return path.name == "python3" or ".so" in path.suffixes


def _compile(layer: Path) -> None:
    """Byte code that does not look at its source's date: all dates are one here."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(layer, stripdir=str(layer), quiet=2, workers=0, invalidation_mode=mode)


def _file(path: Path, text: str, *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


# -- the format ----------------------------------------------------------------------------------------------------


def _layer(tree: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in _sorted(tree):
            entry = tar.gettarinfo(path, arcname=str(path.relative_to(tree)))
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = _EPOCH, 0, 0, "", ""
            entry.mode = 0o1777 if entry.name == "tmp" else 0o755 if entry.isdir() or entry.mode & 0o111 else 0o644
            if entry.isfile():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    return out.getvalue()


def _sorted(tree: Path) -> Iterator[Path]:
    return iter(sorted(tree.rglob("*")))


def _config() -> dict[str, Any]:
    return {
        "Env": ["PATH=/usr/bin:/opt/python/bin", f"PYTHONPATH={LIBRARY}", "PYTHONDONTWRITEBYTECODE=1"],
        "Labels": labels(),
    }


def labels() -> dict[str, str]:
    """What the image says of itself (image-spec, annotations.md)."""
    told = importlib.metadata.metadata("underlay")
    return {
        "org.opencontainers.image.title": "underlay",
        "org.opencontainers.image.description": told["Summary"],
        "org.opencontainers.image.version": told["Version"],
        "org.opencontainers.image.licenses": "Apache-2.0",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m manifests.image", description="Builds the image as an OCI tar.")
    parser.add_argument("target", type=Path, help="the tar to write")
    parser.add_argument("--name", default=NAME, help="the image's name (default: %(default)s)")
    asked = parser.parse_args()
    try:
        build(asked.target, name=asked.name)
    except (ImageError, OSError) as e:
        print(f"manifests.image: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
