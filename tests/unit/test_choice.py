"""cni/choice.py: what annotations say of pools and addresses."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.choice import CALICOS, OURS, BadAnnotation, Choice, of_pod, with_namespace

POD = "default/web"
NOTHING = Choice()


def says(**lists: list[str]) -> dict[str, str]:
    """``ours_ipv4pools=[...]`` and so on as annotations."""
    prefix = {"ours": OURS, "calicos": CALICOS}
    return {prefix[who] + name: json.dumps(v) for key, v in lists.items() for who, _, name in [key.partition("_")]}


def test_who_says_nothing_gets_whatever_comes() -> None:
    assert of_pod({"other/ipv4pools": '["x"]'}, POD) == NOTHING
    assert with_namespace(NOTHING, {}, "default") == NOTHING


@pytest.mark.parametrize("who", ["ours", "calicos"])
def test_pools_and_addresses_of_a_pod(who: str) -> None:
    choice = of_pod(says(**{f"{who}_ipv4pools": ["a", "10.9.0.0/16", "a"], f"{who}_ipv6pools": ["b"]}), POD)
    assert (choice.pools4, choice.pools6, choice.addresses) == (("a", "10.9.0.0/16"), ("b",), ())
    assert choice.pools == ("a", "10.9.0.0/16", "b")
    fixed = of_pod(says(**{f"{who}_ipAddrs": ["fd00:0::7", "10.9.0.7"]}), POD)
    assert fixed.addresses == ("fd00::7", "10.9.0.7")
    assert fixed.said == f"annotation {OURS if who == 'ours' else CALICOS}ipAddrs of pod default/web"


def test_ours_goes_before_calicos_even_where_calicos_cannot_be_read() -> None:
    annotations = {OURS + "ipv4pools": '["ours"]', CALICOS + "ipv4pools": "x", CALICOS + "ipv6pools": '["theirs"]'}
    choice = of_pod(annotations, POD)
    assert choice.pools == ("ours", "theirs")
    assert choice.said == f"annotation {OURS}ipv4pools of pod {POD}, annotation {CALICOS}ipv6pools of pod {POD}"


def test_a_namespace_counts_for_a_family_of_which_the_pod_says_nothing() -> None:
    namespace = says(ours_ipv4pools=["n4"], calicos_ipv6pools=["n6"])
    pod = of_pod(says(calicos_ipv4pools=["p4"]), POD)
    choice = with_namespace(pod, namespace, "default")
    assert (choice.pools4, choice.pools6) == (("p4",), ("n6",))
    assert (
        choice.said == f"annotation {CALICOS}ipv4pools of pod {POD}, annotation {CALICOS}ipv6pools of namespace default"
    )
    assert with_namespace(NOTHING, namespace, "default").pools == ("n4", "n6")


def test_a_namespace_neither_adds_pools_to_an_address_nor_gives_addresses() -> None:
    fixed = of_pod(says(ours_ipAddrs=["10.9.0.7"]), POD)
    assert fixed.complete
    assert with_namespace(fixed, says(ours_ipv4pools=["n4"]), "default") == fixed
    assert with_namespace(NOTHING, says(ours_ipAddrs=["10.9.0.7"]), "default") == NOTHING


def test_what_a_namespace_says_of_a_family_that_the_pod_chose_is_not_even_read() -> None:
    pod = of_pod(says(ours_ipv4pools=["p4"]), POD)
    assert with_namespace(pod, {OURS + "ipv4pools": "no JSON"}, "default").pools == ("p4",)


@pytest.mark.parametrize("name", ["ipv4pools", "ipv6pools", "ipAddrs"])
@pytest.mark.parametrize(
    "text", ["", "pods", "{}", '"a"', "[1]", "[]", '[""]', "[null]", '["a"', '["a"] x', "[" * 5000]
)
def test_what_is_no_list_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(BadAnnotation, match=f"annotation {OURS}{name} of pod default/web: .*write a JSON list"):
        of_pod({OURS + name: text}, POD)


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        (["10.9.0.7", "10.9.0.8"], "'10.9.0.8' is a second IPv4 address"),
        (["fd00::1", "fd00::2"], "'fd00::2' is a second IPv6 address"),
        (["10.9.0.7/32"], "no IP address"),
        (["web"], "'web' is no IP address"),
    ],
)
def test_an_address_that_cannot_be_is_refused_by_name(addresses: list[str], words: str) -> None:
    with pytest.raises(BadAnnotation, match=f"annotation {CALICOS}ipAddrs of pod default/web: .*{words}"):
        of_pod(says(calicos_ipAddrs=addresses), POD)


def test_a_namespaces_bad_annotation_is_said_to_be_its_own() -> None:
    with pytest.raises(BadAnnotation, match="of namespace shop"):
        with_namespace(NOTHING, {OURS + "ipv6pools": "x"}, "shop")


texts = st.one_of(st.text(), st.lists(st.text(max_size=8), max_size=3).map(json.dumps), st.just('["10.0.0.1"]'))
keys = st.sampled_from([p + n for p in (OURS, CALICOS) for n in ("ipv4pools", "ipv6pools", "ipAddrs")])


@given(st.dictionaries(keys, texts), st.dictionaries(keys, texts))
def test_whatever_stands_there_is_read_whole_or_refused(pod: dict[str, str], namespace: dict[str, str]) -> None:
    try:
        own = of_pod(pod, POD)
        choice = with_namespace(own, namespace, "default")
    except BadAnnotation as e:
        assert "annotation " in str(e)
        return
    for name, pools in (("ipv4pools", choice.pools4), ("ipv6pools", choice.pools6)):
        tellers = [pod] if own.addresses else [pod, namespace]
        said = [m[p + name] for m in tellers for p in (OURS, CALICOS) if p + name in m]
        assert list(pools) == list(dict.fromkeys(json.loads(said[0]) if said else []))
    assert len({ip_address(a).version for a in choice.addresses}) == len(choice.addresses)
    assert bool(choice.said) == (choice != NOTHING)
