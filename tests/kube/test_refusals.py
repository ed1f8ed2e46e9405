"""CEL and ``store.validate`` refuse the same: each case of the table, and many made at random, go to both."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab.kube.cluster import Cluster, Refused
from store.model import Allocation, block_name
from store.validate import validate
from tests.kube.refusals import BAD, GOOD, Case, allocations, block, peer, pool, reservation


class Verdict(Exception):
    """Why a case was refused, and which fields are to blame (none: the whole, as a type was wrong)."""

    def __init__(self, text: str, fields: frozenset[str] = frozenset()) -> None:
        self.fields = fields
        super().__init__(text)


def by_model(case: Case) -> Verdict | None:
    """What ``store.validate`` says against the case."""
    try:
        obj = msgspec.convert(case.wire, case.kind)
    except msgspec.ValidationError as e:
        return Verdict(str(e))
    old = msgspec.convert({**case.wire, "spec": case.before}, case.kind) if case.before is not None else None
    problems = validate(obj, old=old)
    return Verdict("; ".join(map(str, problems)), frozenset(p.field for p in problems)) if problems else None


def as_lines(allocations: list[dict[str, str]]) -> dict[str, str]:
    """Allocations as the API server has them, however wrong they are."""
    known = [Allocation(**{"network": "", "container": "", "interface": "", **a}) for a in allocations]
    return {
        str(a.address): " ".join([a.network, a.container, a.interface, a.pod or "-", a.since or "-"]) for a in known
    }


def by_server(cluster: Cluster, case: Case) -> Verdict | None:
    """What the API server says against it; nothing stays behind."""
    root = f"/apis/{case.kind.API}/{case.kind.PLURAL}"
    wire = case.wire
    status = wire.pop("status", None)
    if status is not None and "allocations" in status:
        status = {**status, "allocations": as_lines(status["allocations"])}
    if case.before is None and status is None:
        return _refusal(cluster, "POST", f"{root}?dryRun=All", wire)
    first = wire if case.before is None else {**wire, "spec": case.before}
    made = cluster.request("POST", root, first)
    version = {"resourceVersion": made["metadata"]["resourceVersion"]}
    changed = {**wire, "metadata": {**wire["metadata"], **version}}
    try:
        if case.before is not None:
            return _refusal(cluster, "PUT", f"{root}/{case.name}?dryRun=All", changed)
        return _refusal(cluster, "PUT", f"{root}/{case.name}/status?dryRun=All", {**changed, "status": status})
    finally:
        cluster.request("DELETE", f"{root}/{case.name}")


def _refusal(cluster: Cluster, method: str, path: str, body: object) -> Verdict | None:
    try:
        cluster.request(method, path, body)
    except Refused as e:
        assert e.code in (400, 422), e
        causes = e.status.get("details", {}).get("causes", [])
        return Verdict(str(e), frozenset(c["field"] for c in causes if "field" in c))
    return None


def _meet(one: frozenset[str], other: frozenset[str]) -> bool:
    """They blame one field: both name it, or one names what it is in or what is in it. Below the allocations the paths
    are different ones."""
    paths = [[re.sub(r"\[.*?\]|(?<=status\.allocations).*", "", field) for field in fields] for fields in (one, other)]
    return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in paths[0] for b in paths[1])


# An address that is there twice cannot be written: it is a key.
@pytest.mark.parametrize(
    "case", [c for n, c in BAD.items() if n != "allocation twice"], ids=[n for n in BAD if n != "allocation twice"]
)
def test_both_refuse_for_the_same_field(cluster: Cluster, case: Case) -> None:
    mine, theirs = by_model(case), by_server(cluster, case)
    assert mine is not None
    assert theirs is not None
    assert "spec" not in theirs.fields or not mine.fields, theirs
    if mine.fields:
        assert _meet(mine.fields, theirs.fields), (mine, theirs)


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
def test_both_accept(cluster: Cluster, case: Case) -> None:
    assert by_model(case) is None
    assert by_server(cluster, case) is None


#: What people mistype, and what parsers differ in.
_PIECES = st.sampled_from([*"0159afAF:./-[]% \n\t@", "::", "/0", "/32", "ffff:", "00", "٣"])
_EDITS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 2), _PIECES), max_size=3)


def edited(*texts: str) -> st.SearchStrategy[str]:
    """One of the texts, with a few pieces put in or over."""

    def edit(text: str, edits: list[tuple[int, int, str]]) -> str:
        for at, over, piece in edits:
            at %= len(text) + 1
            text = text[:at] + piece + text[at + over :]
        return text

    return st.builds(edit, st.sampled_from(texts), _EDITS)


_MADE: dict[str, tuple[Callable[[str], Case], st.SearchStrategy[str]]] = {
    "pool": (pool, edited("10.0.0.0/16", "fd00:10:244::/48", "2001:db8:0:1::/64", "::ffff:a00:0/120", "100.64.0.0/10")),
    "block": (
        block,
        edited("10.0.0.64/26", "fd00::40/122", "1:0:0:2:0:0:0:0/64", "::1:2:0/112", "1:2:3:4:5:6:7:8/128"),
    ),
    "allocation": (allocations, edited("10.0.0.1", "10.0.0.63", "::ffff:a00:1", "fd00::1")),
    "reservation": (reservation, edited("10.0.0.1", "fd00::1", "::ffff:a00:1", "10.0.0.0/24", "::1.2.3.4")),
    "peer": (peer, edited("10.0.0.1:179", "[fd00::1]:1179", "fd00::1", "::ffff:a00:1", "::1.2.3.4", "10.0.0.1")),
    "restart time": (lambda t: peer(maxRestartTime=t), edited("120s", "1h8m15s", "1.5m", "500ms")),
    "name": (lambda n: pool(name=n), edited("pool", "a.b-c", "a" * 63, "0")),
}


@pytest.mark.parametrize("made", _MADE)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_both_say_the_same_of_anything(cluster: Cluster, made: str, data: st.DataObject) -> None:
    case_of, texts = _MADE[made]
    case = case_of(data.draw(texts))
    if not case.name or "/" in case.name:
        return  # no path on the API server leads there
    mine, theirs = by_model(case), by_server(cluster, case)
    assert (mine is None) == (theirs is None), (case.wire, mine, theirs)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=edited("a == 'b'", 'a in {"b", "c"}', "!has(a) && (b != 'c' || all())", "a not in {}", "a starts with 'b'"))
@example(text="a == '\u00a0'")
def test_cel_refuses_no_good_selector_and_accepts_a_bad_one_in_parentheses_only(cluster: Cluster, text: str) -> None:
    case = pool(nodeSelector=text)
    mine, theirs = by_model(case), by_server(cluster, case)
    assert mine is not None or theirs is None, (text, theirs)
    assert theirs is not None or mine is None or "(" in text, (text, mine)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(address=st.ip_addresses(), length=st.integers(0, 128))
def test_the_name_of_a_block_is_the_same_in_cel(cluster: Cluster, address: object, length: int) -> None:
    import ipaddress

    network = ipaddress.ip_network(f"{address}/{min(length, 32 if '.' in str(address) else 128)}", strict=False)
    case = block(str(network))
    assert case.name == block_name(str(network))
    mine, theirs = by_model(case), by_server(cluster, case)
    assert (mine is None) == (theirs is None), (case.wire, mine, theirs)
