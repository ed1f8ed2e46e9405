"""The pods that clean the nodes: what they run, and how what they say is read."""

from __future__ import annotations

from typing import Any

import pytest

from ctl.uninstalling import Asked, Word, daemonset, pods_on, word

LIKE: dict[str, Any] = {
    "spec": {
        "template": {
            "spec": {
                "imagePullSecrets": [{"name": "registry"}],
                "nodeSelector": {"rack": "1"},
                "serviceAccountName": "underlay-agent",
                "containers": [{"image": "registry.example/underlay:2", "imagePullPolicy": "Always", "env": [{}]}],
            }
        }
    }
}


def test_it_runs_where_and_by_what_the_installation_does() -> None:
    spec = daemonset(Asked(), LIKE)["spec"]["template"]["spec"]
    assert (spec["imagePullSecrets"], spec["nodeSelector"]) == ([{"name": "registry"}], {"rack": "1"})
    assert {c["image"] for c in (*spec["containers"], *spec["initContainers"])} == {"registry.example/underlay:2"}
    assert "serviceAccountName" not in spec
    assert spec["automountServiceAccountToken"] is False
    assert daemonset(Asked(), LIKE, image="other")["spec"]["template"]["spec"]["containers"][0]["image"] == "other"


def test_wishes_become_flags_of_the_program() -> None:
    def command(asked: Asked) -> list[str]:
        return list(daemonset(asked)["spec"]["template"]["spec"]["initContainers"][0]["command"])

    assert not any(w.startswith("--") for w in command(Asked()) if w != "--report")
    assert {"--keep-pods", "--restore-forwarding"} <= set(command(Asked(keep_pods=True, restore_forwarding=True)))


def _pod(**status: Any) -> dict[str, Any]:
    return {"spec": {"nodeName": "node-1"}, "status": {"initContainerStatuses": [status]}}


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        ({"spec": {}}, Word("", False, ())),
        (_pod(state={"waiting": {"reason": "PodInitializing"}}), Word("node-1", False, ())),
        (
            _pod(state={"waiting": {"reason": "ErrImagePull", "message": "no"}}, lastState={}),
            Word("node-1", False, ("failed: ErrImagePull: no",)),
        ),
        (
            _pod(state={"terminated": {"exitCode": 0, "message": "removed: a\nkept: b"}}),
            Word("node-1", True, ("removed: a", "kept: b")),
        ),
        # It failed before, and waits for its next try.
        (
            _pod(
                state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
                lastState={"terminated": {"exitCode": 1, "message": "failed: 3 pods"}},
            ),
            Word("node-1", False, ("failed: 3 pods",)),
        ),
    ],
)
def test_what_a_node_has_said(pod: dict[str, Any], expected: Word) -> None:
    assert word(pod) == expected


def test_pods_with_an_address_of_a_block() -> None:
    def pod(name: str, *addresses: str, phase: str = "Running", **spec: Any) -> dict[str, Any]:
        status = {"phase": phase, "podIPs": [{"ip": a} for a in addresses]}
        meta = {"namespace": "default", "name": name}
        return {"metadata": meta, "spec": {"nodeName": "node-1", **spec}, "status": status}

    pods = [
        pod("four", "10.244.0.5"),
        pod("six", "192.0.2.1", "fd00::5"),
        pod("foreign", "192.0.2.1"),
        pod("over", "10.244.0.6", phase="Succeeded"),
        pod("node", "10.244.0.7", hostNetwork=True),
        pod("waiting"),
    ]
    found = pods_on(pods, ["10.244.0.0/26", "fd00::/122"])
    assert found == [("default/four", "node-1"), ("default/six", "node-1")]
