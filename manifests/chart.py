"""The Helm chart in ``manifests/chart``, made of the same files as ``underlay.yaml``: with its own values it renders
the same objects. Pure.

Templates are those files, with a few places of each turned into values; a file that has no such place any more is an
error here, not a value that does nothing. CRDs stand in ``crds/``: Helm installs them first, and never deletes or
changes them. So ``helm uninstall`` takes no pool and no block along; before an upgrade they are applied by hand.
"""

from __future__ import annotations

import configparser
from collections.abc import Callable, Mapping
from typing import Final

HEADER: Final = "# Made by manifests/generate.py of manifests/chart.py and the other files there. Change those.\n"
IMAGE: Final = "underlay.network/underlay:lab"
_DATA: Final = "\ndata:\n"


class ChartError(Exception):
    """A manifest has no longer what a value stands for; the message names both."""


def files(manifests: Mapping[str, str], crds: Mapping[str, str], setup: str) -> dict[str, str]:
    """Path in the chart to text. ``manifests``: name to text; ``crds``: the same of its folder; ``setup`` is the text
    of setup.cfg, which has the version. Raises ChartError."""
    made = {"Chart.yaml": _CHART.format(version=_version(setup)), "values.yaml": _values(manifests["config.yaml"])}
    made |= {f"templates/{name}": change(manifests[name]) for name, change in _CHANGES.items()}
    # CRDs say by themselves what they are made of.
    return {path: HEADER + text for path, text in made.items()} | {f"crds/{n}": text for n, text in crds.items()}


# -- one file each -------------------------------------------------------------------------------------------------


def _rbac(text: str) -> str:
    head, end, rest = text.partition("\n---\n")
    begin = head.index("apiVersion: v1\nkind: Namespace\n")
    guarded = f"{head[:begin]}{{{{- if .Values.createNamespace }}}}\n{head[begin:]}\n{{{{- end }}}}"
    return guarded + end + rest


def _as_it_is(text: str) -> str:
    if "{{" in text:
        raise ChartError("a manifest has '{{' in it, which Helm would take for its own: escape it in chart.py")
    return text


def _config(text: str) -> str:
    loop = "  {{- range $name, $value := .Values.settings }}\n  {{ $name }}: {{ $value | quote }}\n  {{- end }}\n"
    return text.partition(_DATA)[0] + _DATA + loop


def _daemonset(part: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        text = _swap(_as_it_is(text), f"image: {IMAGE}", 'image: "{{ .Values.image.name }}:{{ .Values.image.tag }}"')
        text = _swap(text, "imagePullPolicy: IfNotPresent", "imagePullPolicy: {{ .Values.image.pullPolicy }}")
        text = _swap(
            text,
            "      tolerations:\n        - operator: Exists\n",
            "      tolerations: {{- toYaml .Values.tolerations | nindent 8 }}\n"
            "      {{- with .Values.nodeSelector }}\n"
            "      nodeSelector: {{- toYaml . | nindent 8 }}\n      {{- end }}\n"
            "      {{- with .Values.image.pullSecrets }}\n"
            "      imagePullSecrets: {{- toYaml . | nindent 8 }}\n      {{- end }}\n",
        )
        text = _resources(text, part)
        if part == "cni":
            for name, path in (("bin", "/opt/cni/bin"), ("conf", "/etc/cni/net.d")):
                text = _swap(text, f"            path: {path}\n", f"            path: {{{{ .Values.paths.{name} }}}}\n")
        return text

    return change


def _resources(text: str, part: str) -> str:
    """Every container's: what stands more than ten spaces in below the word is theirs."""
    lines, inside, found = [], False, 0
    for line in text.splitlines(keepends=True):
        if inside and line.startswith(" " * 12):
            continue
        inside = line.startswith("          resources:")
        if inside:
            found += 1
            line = f"          resources: {{{{- toYaml .Values.resources.{part} | nindent 12 }}}}\n"
        lines.append(line)
    if not found:
        raise ChartError(f"{part}.yaml has no resources, which .Values.resources.{part} stands for")
    return "".join(lines)


def _swap(text: str, old: str, new: str) -> str:
    if old not in text:
        raise ChartError(f"no manifest has {old!r}, which {new!r} stands for in the chart: change chart.py")
    return text.replace(old, new)


_CHANGES: Final[Mapping[str, Callable[[str], str]]] = {
    "rbac.yaml": lambda text: _rbac(_as_it_is(text)),
    "policies.yaml": _as_it_is,
    "config.yaml": lambda text: _config(_as_it_is(text)),
    "speaker.yaml": _daemonset("speaker"),
    "agent.yaml": _daemonset("agent"),
    "cni.yaml": _daemonset("cni"),
}

# -- what the chart has besides ------------------------------------------------------------------------------------


def _values(config: str) -> str:
    settings = config.partition(_DATA)[2].rstrip("\n")
    return _VALUES.format(settings=settings, image=IMAGE.partition(":")[0], tag=IMAGE.partition(":")[2])


def _version(setup: str) -> str:
    parser = configparser.ConfigParser()
    parser.read_string(setup)
    return parser["metadata"]["version"]


_CHART: Final = """\
apiVersion: v2
name: underlay
description: "A pod network without an overlay: every pod address routable by the physical network"
type: application
version: {version}
appVersion: "{version}"
# Selectable fields of custom resources.
kubeVersion: ">=1.31.0-0"
"""

_VALUES: Final = """\
image:
  # Build it (make image, or the Dockerfile) and push it to where nodes find it.
  name: {image}
  tag: {tag}
  pullPolicy: IfNotPresent
  # As in a pod: [{{name: SECRET}}], of the namespace underlay-system.
  pullSecrets: []

# What every process of a node is told, as environment variables (docs/numbers.md lists them).
# After a change: kubectl rollout restart -n underlay-system daemonset.
settings:
{settings}

# Where the node's container runtime looks for plugins and their configuration.
paths:
  bin: /opt/cni/bin
  conf: /etc/cni/net.d

# The network comes before everything else, on every node, whatever its state.
tolerations:
  - operator: Exists
# Nodes that are to have this network; every node if empty.
nodeSelector: {{}}

# No limits: a process that is held back or killed costs sessions, or pods their start.
resources:
  speaker:
    requests:
      cpu: 25m
      memory: 48Mi
  agent:
    requests:
      cpu: 25m
      memory: 64Mi
  cni:
    requests:
      cpu: 25m
      memory: 48Mi

# False where the namespace underlay-system is there already, as with helm install --create-namespace. Policies name it
# and its accounts, so it is always that one.
createNamespace: true
"""
