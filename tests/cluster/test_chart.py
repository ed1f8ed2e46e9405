"""The Helm chart, rendered by the real Helm: the same objects as ``manifests/underlay.yaml``, and values that do what
they say. ``docs/helm.md`` installs it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import yaml

from tests.cluster import helm
from tests.cluster.cluster import ROOT

Wire = dict[str, Any]
CHART = ROOT / "manifests" / "chart"


@pytest.fixture(scope="module")
def program() -> str:
    folder = helm.folder()
    assert folder is not None, "no helm is built: python -m tests.cluster.helm"
    return str(folder / "helm")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _objects(text: str) -> dict[tuple[str, str], Wire]:
    found = [document for document in yaml.safe_load_all(text) if document]
    by_name = {(d["kind"], d["metadata"]["name"]): d for d in found}
    assert len(by_name) == len(found)
    return by_name


def _template(program: str, **values: object) -> dict[tuple[str, str], Wire]:
    options = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    return _objects(_run(program, "template", "underlay", str(CHART), "--include-crds", *options))


def _pods(objects: dict[tuple[str, str], Wire]) -> list[Wire]:
    return [d["spec"]["template"]["spec"] for (kind, _), d in objects.items() if kind == "DaemonSet"]


def test_as_it_is_the_chart_is_the_manifests(program: str) -> None:
    plain = _objects((ROOT / "manifests/underlay.yaml").read_text())
    assert len(plain) > 40
    assert _template(program) == plain


def test_the_chart_is_well_formed(program: str) -> None:
    assert "0 chart(s) failed" in _run(program, "lint", "--strict", str(CHART))


def test_every_value_does_what_it_says(program: str) -> None:
    requests = {"requests": {"cpu": "1"}}
    objects = _template(
        program,
        **{
            "image.name": "registry.example/underlay",
            "image.tag": "1.2",
            "image.pullPolicy": "Always",
            "image.pullSecrets": [{"name": "key"}],
            "settings.UNDERLAY_LOG": "DEBUG",
            "settings.KUBERNETES_SERVICE_HOST": "192.0.2.10",
            "paths.bin": "/var/lib/rancher/k3s/data/cni",
            "paths.conf": "/var/lib/rancher/k3s/agent/etc/cni/net.d",
            "tolerations": [{"key": "ours", "operator": "Exists"}],
            "nodeSelector": {"net": "underlay"},
            "resources.speaker": requests,
            "resources.agent": requests,
            "resources.cni": requests,
            "createNamespace": False,
        },
    )
    pods = _pods(objects)
    containers = [c for pod in pods for c in (*pod["containers"], *pod.get("initContainers", ()))]
    assert len(pods) == 3
    assert {(c["image"], c["imagePullPolicy"]) for c in containers} == {("registry.example/underlay:1.2", "Always")}
    assert all(c["resources"]["requests"]["cpu"] == "1" for c in containers)
    assert all(pod["imagePullSecrets"] == [{"name": "key"}] for pod in pods)
    assert all(pod["nodeSelector"] == {"net": "underlay"} for pod in pods)
    assert all(pod["tolerations"] == [{"key": "ours", "operator": "Exists"}] for pod in pods)
    paths = {volume["hostPath"]["path"] for pod in pods for volume in pod["volumes"] if "hostPath" in volume}
    assert {"/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d"} <= paths
    assert not paths & {"/opt/cni/bin", "/etc/cni/net.d"}
    settings = objects["ConfigMap", "underlay-config"]["data"]
    assert settings["UNDERLAY_LOG"] == "DEBUG"
    assert settings["KUBERNETES_SERVICE_HOST"] == "192.0.2.10"
    assert settings["UNDERLAY_STORE"] == "kube:"
    assert ("Namespace", "underlay-system") not in objects


def test_every_value_is_tried_here(program: str) -> None:
    """Those of values.yaml are the ones of the test above: a new one is to be tried, too."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values.keys() == {
        "image", "settings", "paths", "tolerations", "nodeSelector", "resources", "createNamespace",
    }  # fmt: skip
    assert values["image"].keys() == {"name", "tag", "pullPolicy", "pullSecrets"}
    assert values["paths"].keys() == {"bin", "conf"}
