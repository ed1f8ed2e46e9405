from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.errors import BadSelector
from store.selector import (
    MAX_DEPTH,
    MAX_LENGTH,
    All,
    And,
    Contains,
    Differs,
    EndsWith,
    Equals,
    Has,
    In,
    Not,
    NotIn,
    Or,
    Selector,
    StartsWith,
    parse,
)

LABELS = {"rack": "r1", "zone": "west-2", "topology.kubernetes.io/zone": "a", "empty": "", "in": "x"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("  ", True),
        ("all()", True),
        ("!all()", False),
        ("has(rack)", True),
        ("has(empty)", True),
        ("has(nothing)", False),
        ("!has(nothing)", True),
        ("! ! has(rack)", True),
        ('rack == "r1"', True),
        ("rack == 'r1'", True),
        ("rack=='r2'", False),
        ("nothing == ''", False),
        ("empty == ''", True),
        ("rack != 'r2'", True),
        ("rack != 'r1'", False),
        ("nothing != 'r1'", True),
        ("rack in {'r1', \"r2\"}", True),
        ("rack in {}", False),
        ("nothing in {'r1'}", False),
        ("rack not in {'r1'}", False),
        ("rack not  in {'r2'}", True),
        ("nothing not in {'r1'}", True),
        ("zone contains 'st-'", True),
        ("nothing contains ''", False),
        ("zone starts with 'west'", True),
        ("zone starts with 'est'", False),
        ("zone ends with '-2'", True),
        ("nothing ends with ''", False),
        ("topology.kubernetes.io/zone == 'a'", True),
        ("in in {'x'}", True),
        ("has(in)", True),
        # && binds stronger than ||, ! strongest
        ("has(nothing) && has(nothing) || has(rack)", True),
        ("has(rack) || has(nothing) && has(nothing)", True),
        ("(has(rack) || has(nothing)) && has(nothing)", False),
        ("!has(nothing) && has(rack)", True),
        ("!(has(nothing) && has(rack))", True),
        ("!has(rack) || has(rack)", True),
        ("((rack == 'r1'))", True),
    ],
)
def test_meaning(text: str, expected: bool) -> None:
    assert parse(text).matches(LABELS) is expected


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("rack", 5, "expected =="),
        ("rack = 'r1'", 6, "without a meaning"),
        ("rack == r1", 9, 'in quotes, as "r1"'),
        ("rack == 'r1", 9, "not closed"),
        ("rack == 'r1' &&", 16, "expected a label"),
        ("rack == 'r1' rack == 'r2'", 14, "expected '&&', '\\|\\|' or the end"),
        ("(has(rack)", 11, "expected '\\)'"),
        ("has(rack))", 10, "or the end"),
        ("has()", 5, "expected a label"),
        ("has('rack')", 5, "expected a label"),
        ("all(rack)", 5, "expected '\\)'"),
        ("global()", 1, "only the functions"),
        ("rack in 'r1'", 9, "expected '{'"),
        ("rack in {'r1' 'r2'}", 15, "expected '}'"),
        ("rack in {'r1',}", 15, "in quotes"),
        ("rack not 'r1'", 10, "expected 'in'"),
        ("zone starts 'w'", 13, "expected 'with'"),
        ("'rack' == 'r1'", 1, "expected a label"),
        ("rack '==' 'r1'", 6, "expected =="),
        ("räck == 'r1'", 2, "without a meaning"),
        ("!", 2, "expected a label"),
    ],
)
def test_an_error_names_the_position_and_what_was_expected(text: str, position: int, expected: str) -> None:
    with pytest.raises(BadSelector, match=expected) as caught:
        parse(text)
    assert caught.value.position == position
    assert f"character {position}:" in str(caught.value)


def test_limits() -> None:
    assert parse("(" * MAX_DEPTH + "all()" + ")" * MAX_DEPTH) == All()
    for text in ("(" * (MAX_DEPTH + 1) + "all()" + ")" * (MAX_DEPTH + 1), "!" * 3000 + "all()", "(" * 4000):
        with pytest.raises(BadSelector, match="nested deeper"):
            parse(text)
    with pytest.raises(BadSelector, match="longer than"):
        parse("has(rack) || " * MAX_LENGTH)
    # Depth counts what is open, not what was.
    assert parse(" && ".join(["(!has(a))"] * (MAX_DEPTH + 10))).matches({})


def test_a_selector_is_parsed_once() -> None:
    assert parse("has(once)") is parse("has(once)")


keys = st.sampled_from(["rack", "zone", "in", "not", "has", "all", "with", "a.b/c", "0"])
values = st.text(max_size=4).filter(lambda v: not ('"' in v and "'" in v))
sets = st.sets(values, max_size=3).map(lambda s: tuple(sorted(s)))
leaves: st.SearchStrategy[Selector] = st.one_of(
    st.just(All()),
    st.builds(Has, keys),
    *(st.builds(kind, keys, values) for kind in (Equals, Differs, Contains, StartsWith, EndsWith)),
    st.builds(In, keys, sets),
    st.builds(NotIn, keys, sets),
)
selectors = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(And, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        st.builds(Or, st.lists(inner, min_size=2, max_size=3).map(tuple)),
    ),
    max_leaves=8,
)
labels = st.dictionaries(keys, values)


@given(selectors)
def test_the_text_of_a_selector_parses_to_the_same(selector: Selector) -> None:
    assert parse(str(selector)) == selector


@given(st.lists(selectors, min_size=2, max_size=3), labels)
def test_de_morgan(operands: list[Selector], found: dict[str, str]) -> None:
    each = [Not(o) for o in operands]
    assert Not(And(tuple(operands))).matches(found) is Or(tuple(each)).matches(found)
    assert Not(Or(tuple(operands))).matches(found) is And(tuple(each)).matches(found)


@given(keys, values, sets, labels)
def test_negated_operators_are_the_opposite(key: str, value: str, some: tuple[str, ...], found: dict[str, str]) -> None:
    assert Differs(key, value).matches(found) is not Equals(key, value).matches(found)
    assert NotIn(key, some).matches(found) is not In(key, some).matches(found)
    assert In(key, some).matches(found) is any(Equals(key, v).matches(found) for v in some)


@given(st.text(alphabet="arck()!&|='\"{}, not in has with", max_size=30))
def test_any_text_is_a_selector_or_an_error_with_a_position_in_it(text: str) -> None:
    try:
        parse(text).matches({"rack": "r1"})
    except BadSelector as e:
        assert 1 <= e.position <= len(text) + 1
