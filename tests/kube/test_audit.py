"""The audit log as a judge: it has each request once, with who asked and what the answer was."""

from __future__ import annotations

import time

from lab.kube.audit import count
from lab.kube.installed import CNI, NAMESPACE, Installed, denial, node
from tests.conftest import eventually
from tests.kube.objects import block, path, pool, status_of

USER = f"system:serviceaccount:{NAMESPACE}:{CNI}"


def test_requests_are_counted_by_who_asked_and_what_came_of_it(installed: Installed) -> None:
    cluster, token = installed.cluster, installed.tokens[CNI, "node-1"]
    cluster.request("POST", path("ippools"), pool("pool", "10.0.0.0/16"))
    began = time.time()
    cluster.request("POST", path("ipamblocks"), block("10.0.0.0/26", "node-1"), token=token)
    obj = cluster.request("GET", path("ipamblocks", "10-0-0-0-26"), token=token)
    cluster.request("PUT", path("ipamblocks", "10-0-0-0-26", sub="status"), obj, token=token)
    assert denial(cluster, "POST", "/api/v1/nodes", node("x"), token=token) is not None
    assert status_of(cluster, f"{path('ippools')}?watch=true", token=token) == 200

    def seen() -> bool:
        asked = cluster.audit_log.requests(began)
        assert count(r for r in asked if r.user == USER) == {
            (USER, "node-1", "create", "ipamblocks", "", "201"): 1,
            (USER, "node-1", "get", "ipamblocks", "", "200"): 1,
            (USER, "node-1", "update", "ipamblocks", "status", "200"): 1,
            (USER, "node-1", "create", "nodes", "", "403"): 1,
            (USER, "node-1", "watch", "ippools", "", "200"): 1,
        }
        assert count((r for r in asked if r.user == USER and r.writes), "code") == {
            ("201",): 1,
            ("200",): 1,
            ("403",): 1,
        }
        return True

    eventually(seen)
    cluster.kill("kube-apiserver")
    cluster.start_apiserver()
    assert count(cluster.audit_log.requests(began), "user")[USER,] == 5
