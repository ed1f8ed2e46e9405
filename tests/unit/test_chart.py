"""The chart's templates are made of the manifests; ``tests/cluster/test_chart.py`` has the real Helm render them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manifests import chart

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {path.name: path.read_text() for path in (ROOT / "manifests").glob("*.yaml")}
SETUP = (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("agent.yaml", chart.IMAGE, "elsewhere/underlay:1"),
        ("speaker.yaml", "        - operator: Exists\n", "        - key: x\n"),
        ("cni.yaml", "path: /opt/cni/bin", "path: /opt/bin"),
        ("agent.yaml", "resources:", "limits:"),
        ("policies.yaml", "metadata:", "metadata: # {{ }}"),
    ],
)
def test_a_manifest_that_a_value_no_longer_fits_is_refused(name: str, old: str, new: str) -> None:
    assert old in TEXTS[name]
    with pytest.raises(chart.ChartError):
        chart.files(TEXTS | {name: TEXTS[name].replace(old, new)}, {}, SETUP)


def test_the_chart_has_the_version_of_the_package_and_the_settings_with_their_comments() -> None:
    made = chart.files(TEXTS, {"a.yaml": "kind: A\n"}, SETUP)
    assert re.search(r"^version = (.*)$", SETUP, re.MULTILINE)[1] in made["Chart.yaml"]  # type: ignore[index]
    assert TEXTS["config.yaml"].partition("\ndata:\n")[2] in made["values.yaml"]
    assert made["crds/a.yaml"] == "kind: A\n"
    assert not [
        line for path, text in made.items() for line in text.splitlines() if "{{" in line and path == "values.yaml"
    ]
