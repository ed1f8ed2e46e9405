"""Reads a page in Prometheus' text format as strictly as ``promtool check metrics``: its grammar and its manners."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

#: A sample line, as the format's grammar has it.
LINE = re.compile(
    r'(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?P<labels>\{[a-zA-Z_][a-zA-Z0-9_]*="(\\\\|\\n|\\"|[^"\\\n])*"'
    r'(,[a-zA-Z_][a-zA-Z0-9_]*="(\\\\|\\n|\\"|[^"\\\n])*")*\})? (?P<value>\+Inf|-?[0-9.]+(e[-+]?[0-9]+)?)'
)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:\\\\|\\n|\\"|[^"\\\n])*)"')

Labels = frozenset[tuple[str, str]]


def check(page: bytes) -> dict[str, dict[Labels, float]]:
    """Each sample by its whole name and its labels. AssertionError says what is wrong with the page."""
    text = page.decode()
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    found: dict[str, dict[Labels, float]] = {}
    family = ""
    helped = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            helped, words = line[7:].split(" ", 1)
            assert words[:1].isupper() or words[:1].isdigit(), f"{helped}: help is a sentence: {words}"
            assert words.endswith("."), f"{helped}: help is a sentence: {words}"
        elif line.startswith("# TYPE "):
            family, kind = line[7:].split(" ")
            assert family == helped, f"{family} has no help"
            assert family not in kinds, f"{family} stands there twice"
            assert kind in ("gauge", "counter", "histogram")
            assert (kind == "counter") == family.endswith("_total"), f"{family} is a {kind}"
            kinds[family] = kind
        else:
            sample = LINE.fullmatch(line)
            assert sample, f"no sample: {line}"
            name, labels = sample["name"], _LABEL.findall(sample["labels"] or "")
            ours = {family + s for s in ("_bucket", "_sum", "_count")} if kinds[family] == "histogram" else {family}
            assert name in ours, f"{name} stands in {family}"
            assert len(dict(labels)) == len(labels), f"a label twice: {line}"
            series = found.setdefault(name, {})
            assert frozenset(labels) not in series, f"twice: {line}"
            series[frozenset(labels)] = float(sample["value"])
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        _check_buckets(name, found)
    return found


def get(path: Path, target: str) -> tuple[int, bytes]:
    """Code and body of what the socket at that path answers. OSError."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: client.recv(1 << 16), b"")).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


def value(found: Mapping[str, Mapping[Labels, float]], name: str, **labels: str) -> float:
    return found[name][frozenset(labels.items())]


def _check_buckets(name: str, found: Mapping[str, Mapping[Labels, float]]) -> None:
    """Buckets grow, and the last of each holds all."""
    for labels, count in found.get(f"{name}_count", {}).items():
        buckets = sorted(
            (float(dict(series)["le"]), value)
            for series, value in found[f"{name}_bucket"].items()
            if {pair for pair in series if pair[0] != "le"} == labels
        )
        assert buckets[-1] == (float("inf"), count), f"{name}: the last bucket"
        assert _grows(v for _, v in buckets), f"{name}: {buckets}"
        assert labels in found[f"{name}_sum"]


def _grows(values: Iterable[float]) -> bool:
    ordered = list(values)
    return ordered == sorted(ordered)
