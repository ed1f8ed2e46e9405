"""What the admission policies let through and what they refuse: tokens of pods on two nodes, people, other accounts.

Our accounts may do anything with our kinds here, so that whatever is refused is refused by a policy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.kube.cluster import Cluster, Refused
from lab.kube.installed import AGENT, CNI, NAMESPACE, SPEAKER, Installed, Wire, denial, manifest, pod_token
from tests.conftest import eventually
from tests.kube.objects import OWNER, block, node_status, path, pool, status_of
from tests.kube.world import COLLECTED

MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
JSON_PATCH = "application/json-patch+json"
BLOCKS = path("ipamblocks")
MINE, THEIRS = "10.0.0.0/26", "10.0.0.64/26"  # of node-1 and node-2

POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"


def _anything(name: str, subject: Wire) -> list[Wire]:
    api = "rbac.authorization.k8s.io"
    rule = {"apiGroups": ["underlay.network"], "resources": ["*"], "verbs": ["*"]}
    reference = {"apiGroup": api, "kind": "ClusterRole", "name": name}
    return [
        {"apiVersion": f"{api}/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": [rule]},
        {
            "apiVersion": f"{api}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": reference,
            "subjects": [subject],
        },
    ]


_OURS = {"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": f"system:serviceaccounts:{NAMESPACE}"}
_BACKUP = {"kind": "ServiceAccount", "name": "backup", "namespace": "default"}
_MORE = [
    *_anything("test-ours", _OURS),
    *_anything("test-backup", _BACKUP),
    {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "backup", "namespace": "default"}},
]


@pytest.fixture(scope="module")
def _unrestrained(_installed: Installed) -> Iterator[None]:
    """All that is refused here is refused by policies: our accounts and a backup's may do anything to our kinds."""
    cluster = _installed.cluster
    cluster.reset()
    cluster.apply(_MORE)
    speaker, backup = _installed.tokens[SPEAKER, "node-1"], cluster.token("backup", namespace="default")
    with cluster.remembered():
        eventually(lambda: all(status_of(cluster, BLOCKS, token=token) == 200 for token in (speaker, backup)))
        yield
    eventually(lambda: status_of(cluster, BLOCKS, token=speaker) == 403)


@pytest.fixture
def installed(_unrestrained: None, installed: Installed) -> Installed:
    return installed


@pytest.fixture
def cluster(installed: Installed) -> Cluster:
    return installed.cluster


class Blocks:
    """A block of each of the two nodes, as their CNI servers made them."""

    def __init__(self, installed: Installed) -> None:
        self.cluster = installed.cluster
        self.one, self.two = installed.tokens[CNI, "node-1"], installed.tokens[CNI, "node-2"]
        self.cluster.request("POST", BLOCKS, block(MINE, "node-1"), token=self.one)
        self.cluster.request("POST", BLOCKS, block(THEIRS, "node-2"), token=self.two)

    def at(self, cidr: str, *, sub: str = "") -> str:
        return path("ipamblocks", block(cidr, "")["metadata"]["name"], sub=sub)

    def get(self, cidr: str) -> Wire:
        return self.cluster.request("GET", self.at(cidr))

    def gone(self, cidr: str) -> bool:
        refusal = denial(self.cluster, "GET", self.at(cidr))
        return refusal is not None and refusal.code == 404


@pytest.fixture
def blocks(installed: Installed) -> Blocks:
    return Blocks(installed)


def check(refusal: Refused | None, policy: str, *said: str, code: int = 403) -> None:
    """It was this policy that refused, with these words."""
    assert refusal is not None, "it was let through"
    message = str(refusal)
    assert f"ValidatingAdmissionPolicy '{policy}'" in message, message
    assert refusal.code == code, message
    for words in said:
        assert words in message


# -- whose block a token writes ----------------------------------------------------------------------------------------

#: What a node does with a block: method, subresource, change of the object, content type.
Change = tuple[str, str, Wire | list[Wire] | Callable[[Wire], Wire] | None, str]


def _with(**fields: Any) -> Callable[[Wire], Wire]:
    return lambda obj: {**obj, **fields}


def _with_meta(**fields: Any) -> Callable[[Wire], Wire]:
    return lambda obj: {**obj, "metadata": {**obj["metadata"], **fields}}


_JSON = "application/json"
CHANGES: dict[str, Change] = {
    "annotate": ("PUT", "", _with_meta(annotations={"a": "b"}), _JSON),
    "annotate by patch": ("PATCH", "", {"metadata": {"annotations": {"a": "b"}}}, MERGE),
    "remove the finalizer": ("PUT", "", _with_meta(finalizers=[]), _JSON),
    "remove the finalizer by patch": ("PATCH", "", [{"op": "remove", "path": "/metadata/finalizers/0"}], JSON_PATCH),
    "write the status": ("PUT", "status", _with(status={"used": 1, "free": 63}), _JSON),
    "write the status by patch": ("PATCH", "status", {"status": {"releasing": True}}, MERGE),
    "delete": ("DELETE", "", None, _JSON),
}


def do(blocks: Blocks, cidr: str, change: str, token: str) -> Refused | None:
    method, sub, body, content = CHANGES[change]
    body = body(blocks.get(cidr)) if callable(body) else body
    return denial(blocks.cluster, method, blocks.at(cidr, sub=sub), body, token=token, content_type=content)


@pytest.mark.parametrize("change", CHANGES)
def test_a_node_writes_its_own_block(blocks: Blocks, change: str) -> None:
    before = blocks.get(MINE)
    assert do(blocks, MINE, change, blocks.one) is None
    assert blocks.get(MINE) != before


@pytest.mark.parametrize("change", CHANGES)
def test_a_node_writes_no_block_of_another(blocks: Blocks, change: str) -> None:
    before = blocks.get(THEIRS)
    refusal = do(blocks, THEIRS, change, blocks.one)
    check(refusal, "underlay-block-owner", f"block {THEIRS} is of node node-2", "of node node-1", "UNDERLAY_NODE")
    assert blocks.get(THEIRS) == before


# A status is the CNI server's alone to write, so that another policy refuses the others too.
UNBOUND = [(c, a) for c in CHANGES for a in (CNI, AGENT, SPEAKER) if a == CNI or "status" not in c]


@pytest.mark.parametrize(("change", "account"), UNBOUND)
def test_a_token_bound_to_no_node_writes_no_block(
    installed: Installed, blocks: Blocks, change: str, account: str
) -> None:
    before = blocks.get(MINE)
    refusal = do(blocks, MINE, change, installed.unbound[account])
    check(refusal, "underlay-block-owner", "bound to no node", "boundObjectRef")
    assert blocks.get(MINE) == before


def test_a_node_makes_its_own_blocks_only(installed: Installed) -> None:
    cluster, tokens = installed.cluster, installed.tokens
    foreign, own = block(THEIRS, "node-2"), block(MINE, "node-1")
    refusal = denial(cluster, "POST", BLOCKS, foreign, token=tokens[CNI, "node-1"])
    check(refusal, "underlay-block-owner", "is of node node-2", "of node node-1")
    applied = f"{path('ipamblocks', foreign['metadata']['name'])}?fieldManager=x"
    refusal = denial(cluster, "PATCH", applied, foreign, token=tokens[CNI, "node-1"], content_type=APPLY)
    check(refusal, "underlay-block-owner", "is of node node-2")
    for unbound in (installed.unbound[CNI], pod_token(cluster, CNI, "")):  # of a pod that no node has yet
        check(denial(cluster, "POST", BLOCKS, own, token=unbound), "underlay-block-owner", "bound to no node")
    assert cluster.request("GET", BLOCKS)["items"] == []
    cluster.request("POST", BLOCKS, own, token=tokens[CNI, "node-1"])


def test_a_token_bound_to_a_node_itself_is_as_good_as_its_pods(installed: Installed) -> None:
    token = installed.cluster.token(CNI, namespace=NAMESPACE, node="node-2")
    check(denial(installed.cluster, "POST", BLOCKS, block(MINE, "node-1"), token=token), "underlay-block-owner")
    installed.cluster.request("POST", BLOCKS, block(MINE, "node-2"), token=token)


def test_who_probes_for_a_free_block_hears_that_it_exists(blocks: Blocks) -> None:
    """NodeIPAM claims by create (R4): what is another's is 409, as if there were no policy."""
    for cidr in (MINE, THEIRS):
        refusal = denial(blocks.cluster, "POST", BLOCKS, block(cidr, "node-1"), token=blocks.one)
        assert refusal is not None
        assert (refusal.code, refusal.status["reason"]) == (409, "AlreadyExists")


def test_deleting_all_blocks_deletes_none_of_another_node(blocks: Blocks) -> None:
    check(denial(blocks.cluster, "DELETE", BLOCKS, token=blocks.one), "underlay-block-owner", THEIRS)
    assert "deletionTimestamp" not in blocks.get(THEIRS)["metadata"]


# -- R5: a marked block ------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(blocks: Blocks) -> Blocks:
    """Node-2's block is marked for deletion, and has what a change could touch."""
    more = {
        "labels": {"l": "1"},
        "annotations": {"a": "1"},
        "finalizers": [OWNER, "example.org/other"],
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "node-2", "uid": "a"}],
    }
    patch = {"metadata": more}
    blocks.cluster.request("PATCH", blocks.at(THEIRS), patch, content_type=MERGE)
    blocks.cluster.request("DELETE", blocks.at(THEIRS))
    return blocks


def _remove(**more: Any) -> Callable[[Wire], Wire]:
    """The finalizer, and what else is given."""
    return _with_meta(**{"finalizers": ["example.org/other"], **more})


BESIDE: dict[str, Callable[[Wire], Wire]] = {
    "another finalizer": _remove(finalizers=[]),
    "the other finalizer alone": _remove(finalizers=[OWNER]),
    "a label": _remove(labels={"l": "2"}),
    "all labels": _remove(labels={}),
    "an annotation": _remove(annotations={"a": "2"}),
    "all annotations": _remove(annotations={}),
    "the owner": _remove(ownerReferences=[]),
    "an annotation, and not the finalizer": _with_meta(annotations={"a": "2"}),
    "nothing": _with_meta(),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_another_node_changes_nothing_else_of_a_marked_block(marked: Blocks, beside: str) -> None:
    wanted = BESIDE[beside](marked.get(THEIRS))
    refusal = denial(marked.cluster, "PUT", marked.at(THEIRS), wanted, token=marked.one)
    check(refusal, "underlay-block-owner", "once it is marked", OWNER, "with nothing else changed")


@pytest.mark.parametrize("change", ["write the status", "write the status by patch", "delete"])
def test_another_node_neither_deletes_a_marked_block_nor_writes_its_status(marked: Blocks, change: str) -> None:
    check(do(marked, THEIRS, change, marked.one), "underlay-block-owner")


def test_a_marked_block_that_its_owner_let_go_of_is_as_closed_to_another_node(marked: Blocks) -> None:
    marked.cluster.request("PUT", marked.at(THEIRS), _remove()(marked.get(THEIRS)), token=marked.two)
    for change in [c for c in CHANGES if "finalizer" not in c]:
        check(do(marked, THEIRS, change, marked.one), "underlay-block-owner")


def test_another_node_removes_the_finalizer_of_a_marked_block(marked: Blocks) -> None:
    wanted = _remove()(marked.get(THEIRS))
    check(
        denial(marked.cluster, "PUT", marked.at(THEIRS), wanted, token=marked.cluster.token(CNI, namespace=NAMESPACE)),
        "underlay-block-owner",
        "bound to no node",
    )
    left = marked.cluster.request("PUT", marked.at(THEIRS), wanted, token=marked.one)
    assert left["metadata"]["finalizers"] == ["example.org/other"]
    # That was all: what is left is no longer its business.
    refusal = denial(marked.cluster, "PUT", marked.at(THEIRS), _with_meta(finalizers=[])(left), token=marked.one)
    check(refusal, "underlay-block-owner")


@pytest.mark.parametrize("how", ["PUT", "PATCH"])
def test_the_block_of_a_dead_node_can_be_claimed_by_another(installed: Installed, blocks: Blocks, how: str) -> None:
    cluster = installed.cluster
    owner = cluster.request("GET", "/api/v1/nodes/node-2")["metadata"]
    reference = {"apiVersion": "v1", "kind": "Node", "name": "node-2", "uid": owner["uid"]}
    mine = blocks.get(THEIRS)
    cluster.request("PUT", blocks.at(THEIRS), _with_meta(ownerReferences=[reference])(mine), token=blocks.two)
    cluster.request("DELETE", "/api/v1/nodes/node-2")
    # The garbage collector is an account of its own, which no policy of ours speaks of.
    eventually(lambda: "deletionTimestamp" in blocks.get(THEIRS)["metadata"], limit=COLLECTED)
    if how == "PUT":
        cluster.request("PUT", blocks.at(THEIRS), _with_meta(finalizers=[])(blocks.get(THEIRS)), token=blocks.one)
    else:
        removal = [
            {"op": "test", "path": "/metadata/finalizers/0", "value": OWNER},
            {"op": "remove", "path": "/metadata/finalizers/0"},
        ]
        cluster.request("PATCH", blocks.at(THEIRS), removal, token=blocks.one, content_type=JSON_PATCH)
    assert blocks.gone(THEIRS)
    cluster.request("POST", BLOCKS, block(THEIRS, "node-1"), token=blocks.one)


# -- people and other accounts -----------------------------------------------------------------------------------------


@pytest.fixture(params=["admin", "backup"])
def foreign(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Tokens of who is none of ours: an administrator, and a ServiceAccount elsewhere, bound to nothing."""
    return cluster.admin_token if request.param == "admin" else cluster.token("backup", namespace="default")


@pytest.mark.parametrize("change", [c for c in CHANGES if "status" not in c])
def test_people_may_annotate_delete_and_release(blocks: Blocks, foreign: str, change: str) -> None:
    assert do(blocks, MINE, change, foreign) is None


def test_people_may_make_a_block(cluster: Cluster, foreign: str) -> None:
    cluster.request("POST", BLOCKS, block(MINE, "node-1"), token=foreign)


@pytest.mark.parametrize("change", [c for c in CHANGES if "status" in c])
def test_nobody_but_the_cni_server_writes_a_blocks_status(
    installed: Installed, blocks: Blocks, foreign: str, change: str
) -> None:
    before = blocks.get(MINE)
    for token in (foreign, installed.tokens[AGENT, "node-1"], installed.tokens[SPEAKER, "node-1"]):
        check(
            do(blocks, MINE, change, token),
            "underlay-block-status",
            f"status of block {MINE}",
            "node node-1",
            "underlayctl ipam release",
        )
    assert blocks.get(MINE) == before


def test_a_node_status_is_written_by_its_own_node_and_by_people(installed: Installed, foreign: str) -> None:
    cluster, tokens = installed.cluster, installed.tokens
    statuses = path("bgpnodestatuses")
    policy = "underlay-node-status-owner"
    said = {"status": {"asNumber": 65000}}

    def all_of(name: str, token: str) -> list[Refused | None]:
        at = path("bgpnodestatuses", name)
        return [
            denial(cluster, "PATCH", f"{at}/status", said, token=token, content_type=MERGE),
            denial(cluster, "PATCH", at, {"metadata": {"labels": {"a": "b"}}}, token=token, content_type=MERGE),
            denial(cluster, "DELETE", at, token=token),
        ]

    one, two = tokens[AGENT, "node-1"], tokens[AGENT, "node-2"]
    check(denial(cluster, "POST", statuses, node_status("node-1"), token=two), policy, "node node-2", "UNDERLAY_NODE")
    for account in (CNI, AGENT, SPEAKER):
        refusal = denial(cluster, "POST", statuses, node_status("node-1"), token=installed.unbound[account])
        check(refusal, policy, "bound to no node", "boundObjectRef")
    cluster.request("POST", statuses, node_status("node-1"), token=one)
    for refusal in all_of("node-1", two):
        check(refusal, policy, "BGPNodeStatus node-1", "of node node-2")
    for refusal in all_of("node-1", installed.unbound[AGENT]):
        check(refusal, policy, "bound to no node")
    assert all_of("node-1", one) == [None] * 3
    cluster.request("POST", statuses, node_status("node-1"), token=foreign)
    assert all_of("node-1", foreign) == [None] * 3


def test_a_node_says_in_events_only_what_is_its_own_to_say(installed: Installed) -> None:
    cluster, (one, two) = installed.cluster, (installed.tokens[CNI, name] for name in ("node-1", "node-2"))
    policy, events = "underlay-event-reporter", "/apis/events.k8s.io/v1/namespaces/default/events"

    def event(name: str, **change: object) -> Wire:
        return {
            "metadata": {"name": name, "namespace": "default"},
            "eventTime": "2026-01-01T00:00:00.000000Z",
            "reportingController": "underlay.network/cni",
            "reportingInstance": "node-1",
            "action": "Claim",
            "reason": "PoolExhausted",
            "regarding": {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"},
            "type": "Warning",
            **change,
        }

    cluster.request("POST", events, event("own"), token=one)
    pod = {"apiVersion": "v1", "kind": "Pod", "namespace": "default", "name": "web-0", "uid": "u"}
    cluster.request("POST", events, event("pod", regarding=pod), token=one)
    for other in (
        event("n", reportingInstance="node-2"),
        event("n", reportingController="kubelet"),
        event("n", regarding={"apiVersion": "v1", "kind": "Node", "name": "node-2"}),
        event("n", regarding=pod, reportingInstance="node-2"),
    ):
        check(denial(cluster, "POST", events, other, token=one), policy, "node node-1")
    again = {"series": {"count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z"}}
    check(denial(cluster, "PATCH", f"{events}/own", again, token=two, content_type=MERGE), policy, "node node-2")
    assert denial(cluster, "PATCH", f"{events}/own", again, token=one, content_type=MERGE) is None
    check(denial(cluster, "POST", events, event("n"), token=installed.unbound[CNI]), policy, "bound to no node")
    cluster.request("POST", events, event("anybodys", reportingController="kubelet"))


# -- what overlaps -----------------------------------------------------------------------------------------------------
# The API server compares with what its own cache holds, a moment late: it is asked, without a write, until it has it.


PLURALS = {"IPPool": "ippools", "IPAMBlock": "ipamblocks"}


def asked(cluster: Cluster, wire: Wire, token: str | None = None) -> Refused | None:
    return denial(cluster, "POST", f"{path(PLURALS[wire['kind']])}?dryRun=All", wire, token=token)


def passes(cluster: Cluster, wire: Wire, token: str | None = None) -> None:
    def let_through() -> bool:
        refusal = asked(cluster, wire, token)
        assert refusal is None, refusal
        return True

    eventually(let_through)


def make(cluster: Cluster, wire: Wire, token: str | None = None) -> Wire:
    """Makes it, once what the test before has left is out of that cache."""
    passes(cluster, wire, token)
    return cluster.request("POST", path(PLURALS[wire["kind"]]), wire, token=token)


def refused(cluster: Cluster, wire: Wire, policy: str, *said: str, token: str | None = None) -> None:
    def as_expected() -> bool:
        check(asked(cluster, wire, token), policy, *said, code=422)
        return True

    eventually(as_expected)


@pytest.mark.parametrize(
    ("cidr", "other"),
    [
        ("10.1.0.0/16", "10.1.0.0/16"),
        ("10.1.0.0/16", "10.1.128.0/17"),
        ("10.1.0.0/16", "10.0.0.0/8"),
        ("10.1.0.0/16", "10.1.255.192/26"),
        ("fd00:1::/48", "fd00:1:0:5::/64"),
        ("fd00:1::/48", "fd00::/16"),
    ],
)
def test_pools_that_overlap_are_refused(cluster: Cluster, cidr: str, other: str) -> None:
    make(cluster, pool("first", cidr))
    make(cluster, pool("far", "192.168.0.0/16"))
    words = (f"spec.cidr: {other} overlaps IPPool first ({cidr})", "choose a range outside, or delete that pool first")
    refused(cluster, pool("second", other), "underlay-pool-overlap", *words)


@pytest.mark.parametrize(
    ("cidr", "other"),
    [
        ("10.1.0.0/16", "10.2.0.0/16"),
        ("10.3.0.0/16", "10.2.0.0/16"),
        ("10.1.0.0/16", "fd00:1::/48"),
        ("fd00:1::/48", "fd00:2::/48"),
    ],
)
def test_pools_beside_each_other_are_not(cluster: Cluster, cidr: str, other: str) -> None:
    make(cluster, pool("first", cidr))
    refused(cluster, pool("second", cidr), "underlay-pool-overlap")  # it is known by now
    make(cluster, pool("second", other))


def test_a_pool_is_changed_and_made_again_as_if_there_were_no_policy(cluster: Cluster) -> None:
    first = pool("first", "10.1.0.0/16")
    made = make(cluster, first)
    refused(cluster, pool("second", "10.1.0.0/16"), "underlay-pool-overlap")
    refusal = denial(cluster, "POST", path("ippools"), first)
    assert refusal is not None
    assert refusal.code == 409
    changed = {**made, "spec": {**made["spec"], "disabled": True}}
    cluster.request("PUT", path("ippools", "first"), changed)
    cluster.request("DELETE", path("ippools", "first"))
    passes(cluster, pool("second", "10.1.0.0/16"))


BLOCK_OF_POOL: dict[str, tuple[Wire, Wire, str]] = {
    "outside its pool": (
        pool("pool", "10.1.0.0/16"),
        block("10.2.0.0/26", "node-1"),
        "10.2.0.0/26 is not inside its pool pool (10.1.0.0/16)",
    ),
    "larger than its pool": (pool("pool", "10.1.0.0/26"), block("10.1.0.0/24", "node-1"), "not inside its pool pool"),
    "larger than the default": (
        pool("pool", "10.1.0.0/16"),
        block("10.1.0.0/25", "node-1"),
        "blocks of pool pool are /26",
    ),
    "smaller than the default": (
        pool("pool", "fd00:1::/48"),
        block("fd00:1::/123", "node-1"),
        "blocks of pool pool are /122",
    ),
    "not of the pool's size": (
        pool("pool", "10.1.0.0/16", 28),
        block("10.1.0.0/26", "node-1"),
        "blocks of pool pool are /28, write one of that size",
    ),
    "no podCIDR of its pool": (
        pool("pool", "10.1.0.0/16", usePodCIDRs=True),
        block("10.2.3.0/24", "node-1"),
        "10.2.3.0/24 is not inside its pool pool (10.1.0.0/16)",
    ),
    "in another pool": (
        pool("other", "10.1.0.0/16"),
        block("10.1.0.0/26", "node-1"),
        "overlaps IPPool other (10.1.0.0/16), which is not its pool (pool)",
    ),
    "around another pool": (
        pool("other", "10.1.0.128/26"),
        block("10.1.0.0/24", "node-1"),
        "overlaps IPPool other (10.1.0.128/26)",
    ),
}


@pytest.mark.parametrize("case", BLOCK_OF_POOL)
def test_a_block_that_is_not_of_its_pool_is_refused(installed: Installed, case: str) -> None:
    known, wrong, said = BLOCK_OF_POOL[case]
    make(installed.cluster, known)
    for token in (installed.cluster.admin_token, installed.tokens[CNI, "node-1"]):
        refused(installed.cluster, wrong, "underlay-block-pool", said, token=token)


@pytest.mark.parametrize(
    ("known", "right"),
    [
        (pool("pool", "10.1.0.0/16"), block("10.1.255.192/26", "node-1")),
        (pool("pool", "10.1.0.0/16", 32), block("10.1.0.0/32", "node-1")),
        (pool("pool", "10.1.0.0/24", 24), block("10.1.0.0/24", "node-1")),
        (pool("pool", "fd00:1::/48"), block("fd00:1::40/122", "node-1")),
        (pool("pool", "10.1.0.0/16", usePodCIDRs=True), block("10.1.3.0/24", "node-1")),
        (pool("pool", "fd00:1::/48", usePodCIDRs=True), block("fd00:1:0:3::/64", "node-1")),
        (pool("other", "10.1.0.0/16"), block("10.2.0.0/25", "node-1")),  # its pool is gone
    ],
)
def test_a_block_of_its_pool_is_let_through(installed: Installed, known: Wire, right: Wire) -> None:
    cluster = installed.cluster
    make(cluster, known)
    refused(cluster, pool("probe", known["spec"]["cidr"]), "underlay-pool-overlap")  # it is known by now
    make(cluster, right, installed.tokens[CNI, "node-1"])


@pytest.mark.parametrize(
    ("new", "size", "said"),
    [
        ("10.1.0.32/27", 27, "10.1.0.32/27 overlaps block 10.1.0.0/26 of node node-1, pool pool"),
        ("10.1.0.0/25", 25, "10.1.0.0/25 overlaps block 10.1.0.0/26"),
    ],
)
def test_a_block_that_overlaps_one_of_a_former_pool_is_refused(
    installed: Installed, new: str, size: int, said: str
) -> None:
    cluster = installed.cluster
    make(cluster, block("10.1.0.0/26", "node-1"))
    make(cluster, pool("pool", "10.1.0.0/16", size))
    refused(cluster, block(new, "node-2"), "underlay-block-overlap", said, "or wait until that one is released")
    passes(cluster, block(f"10.1.1.0/{size}", "node-2"))
    # Nodes look for themselves, after the create: they bring the label that spares the API server the comparison.
    passes(cluster, block(new, "node-2", labels={"app.kubernetes.io/managed-by": "underlay-cni"}))


# -- the end of all blocks ---------------------------------------------------------------------------------------------


def test_the_kind_of_blocks_outlives_the_last_of_them(cluster: Cluster) -> None:
    """Its deletion would mark the blocks, and wait for their finalizers."""
    kind = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/ipamblocks.underlay.network?dryRun=All"

    def delete() -> Refused | None:
        return denial(cluster, "DELETE", kind)

    def refused() -> bool:
        check(delete(), "underlay-blocks-first", MINE, "of node node-1", "underlayctl uninstall takes blocks away")
        return True

    make(cluster, pool("pool", "10.0.0.0/16"))
    make(cluster, block(MINE, "node-1"))
    eventually(refused)
    assert denial(cluster, "DELETE", kind.replace("ipamblocks", "bgppeers")) is None
    cluster.request("PATCH", path("ipamblocks", "10-0-0-0-26"), {"metadata": {"finalizers": None}}, content_type=MERGE)
    cluster.request("DELETE", path("ipamblocks", "10-0-0-0-26"))
    eventually(lambda: delete() is None)


# -- the policies themselves -------------------------------------------------------------------------------------------


def test_the_api_servers_type_checker_has_nothing_against_them(cluster: Cluster) -> None:
    names = [d["metadata"]["name"] for d in manifest("policies.yaml") if d["kind"] == "ValidatingAdmissionPolicy"]
    assert len(names) == 12

    def checked(name: str) -> bool:
        policy = cluster.request("GET", f"{POLICIES}/{name}")
        status = policy.get("status", {})
        assert status.get("typeChecking", {}).get("expressionWarnings", []) == []
        return bool(status.get("observedGeneration") == policy["metadata"]["generation"])

    for name in names:
        eventually(lambda name=name: checked(name))  # type: ignore[misc]


def test_a_policy_says_what_to_do() -> None:
    """Not only what is wrong: each message has an instruction."""
    remedy = re.compile(
        r"use the one that|UNDERLAY_NODE|type: underlayctl|choose|write one|cut the block|delete one|after it"
    )
    for document in manifest("policies.yaml"):
        for validation in document["spec"].get("validations", []):
            text = validation.get("messageExpression") or validation["message"]
            assert remedy.search(text), text
            # By this word store.kube tells RBAC's refusals, which a person has to mend, from those of policies.
            assert " cannot " not in text, text


def test_what_only_guards_fails_open_and_what_protects_fails_closed() -> None:
    """An API server that has just started may know no custom resource for half a minute: whatever compares with others
    then fails, for everybody, and no node may be kept from claiming a block by that, nor people from making a pool."""
    for document in manifest("policies.yaml"):
        if document["kind"] == "ValidatingAdmissionPolicy":
            expected = "Ignore" if "paramKind" in document["spec"] else "Fail"
            assert document["spec"]["failurePolicy"] == expected, document["metadata"]["name"]
