"""Calico's selector language over labels: ``rack == "r1" && !has(spare)``. Pure.

Grammar and meaning are those of Calico's documentation, "Selectors" (IPPool and BGPPeer reference), so that people's
selectors carry over. Strings are quoted with ``"`` or ``'`` and know no escapes; an empty text selects everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, NoReturn

import msgspec

from store.errors import BadSelector

#: Characters; a longer text is refused.
MAX_LENGTH = 4096
#: Parentheses and negations inside each other; deeper is refused, so that no file can exhaust the stack.
MAX_DEPTH = 50


@lru_cache(maxsize=1024)
def parse(text: str) -> Selector:
    """The selector that ``text`` says. ``BadSelector`` names the position (from 1) and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise BadSelector(text[:40] + "...", MAX_LENGTH + 1, f"it is longer than {MAX_LENGTH} characters")
    return _Parser(text).selector()


class Selector(msgspec.Struct, frozen=True):
    """A condition on labels. ``str()`` is its canonical text, which parses to an equal selector."""

    def matches(self, labels: Mapping[str, str]) -> bool:
        raise NotImplementedError


class All(Selector, frozen=True):
    def matches(self, labels: Mapping[str, str]) -> bool:
        return True

    def __str__(self) -> str:
        return "all()"


class Has(Selector, frozen=True):
    key: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        return self.key in labels

    def __str__(self) -> str:
        return f"has({self.key})"


class Equals(Selector, frozen=True):
    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        return labels.get(self.key) == self.value

    def __str__(self) -> str:
        return f"{self.key} == {_quote(self.value)}"


class Differs(Selector, frozen=True):
    """Also true where the label is absent."""

    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        return labels.get(self.key) != self.value

    def __str__(self) -> str:
        return f"{self.key} != {_quote(self.value)}"


class In(Selector, frozen=True):
    key: str
    values: tuple[str, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return labels.get(self.key) in self.values

    def __str__(self) -> str:
        return f"{self.key} in {{{', '.join(map(_quote, self.values))}}}"


class NotIn(Selector, frozen=True):
    """Also true where the label is absent."""

    key: str
    values: tuple[str, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return labels.get(self.key) not in self.values

    def __str__(self) -> str:
        return f"{self.key} not in {{{', '.join(map(_quote, self.values))}}}"


class Contains(Selector, frozen=True):
    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.key)
        return found is not None and self.value in found

    def __str__(self) -> str:
        return f"{self.key} contains {_quote(self.value)}"


class StartsWith(Selector, frozen=True):
    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.key)
        return found is not None and found.startswith(self.value)

    def __str__(self) -> str:
        return f"{self.key} starts with {_quote(self.value)}"


class EndsWith(Selector, frozen=True):
    key: str
    value: str

    def matches(self, labels: Mapping[str, str]) -> bool:
        found = labels.get(self.key)
        return found is not None and found.endswith(self.value)

    def __str__(self) -> str:
        return f"{self.key} ends with {_quote(self.value)}"


class Not(Selector, frozen=True):
    operand: Selector

    def matches(self, labels: Mapping[str, str]) -> bool:
        return not self.operand.matches(labels)

    def __str__(self) -> str:
        return f"!{self.operand}" if isinstance(self.operand, (All, Has, Not, And, Or)) else f"!({self.operand})"


class And(Selector, frozen=True):
    operands: tuple[Selector, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(operand.matches(labels) for operand in self.operands)

    def __str__(self) -> str:
        return f"({' && '.join(map(str, self.operands))})"


class Or(Selector, frozen=True):
    operands: tuple[Selector, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return any(operand.matches(labels) for operand in self.operands)

    def __str__(self) -> str:
        return f"({' || '.join(map(str, self.operands))})"


def _quote(value: str) -> str:
    return f"'{value}'" if '"' in value else f'"{value}"'


# -- reading ------------------------------------------------------------------------------------------------------


class _Token(NamedTuple):
    kind: str  # "op" | "word" | "string" | "end"
    text: str
    position: int  # from 1, for people


_LEXEME = re.compile(
    r"""(?P<space>\s+) | (?P<op>==|!=|&&|\|\||[!(){},]) | "(?P<double>[^"]*)" | '(?P<single>[^']*)'
      | (?P<word>[A-Za-z0-9_./-]+)""",
    re.VERBOSE,
)
#: Words before a value, and what they make; "in" and "not in" take a set and stand apart.
_TEXT_OPERATORS: Mapping[str, type[Contains] | type[StartsWith] | type[EndsWith]] = {
    "contains": Contains,
    "starts": StartsWith,
    "ends": EndsWith,
}


class _Parser:
    """Recursive descent, one method per rule of the grammar; ``||`` binds weaker than ``&&``, ``!`` strongest."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._lex()
        self._next = 0
        self._depth = 0

    def selector(self) -> Selector:
        if self._peek().kind == "end":
            return All()
        result = self._or()
        if self._peek().kind != "end":
            self._fail(self._peek(), "expected '&&', '||' or the end")
        return result

    def _or(self) -> Selector:
        operands = [self._and()]
        while self._accept("||"):
            operands.append(self._and())
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _and(self) -> Selector:
        operands = [self._operation()]
        while self._accept("&&"):
            operands.append(self._operation())
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _operation(self) -> Selector:
        token = self._take()
        if token.text in ("!", "(") and token.kind == "op":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                self._fail(token, f"nested deeper than {MAX_DEPTH}")
            result = Not(self._operation()) if token.text == "!" else self._or()
            if token.text == "(":
                self._expect(")")
            self._depth -= 1
            return result
        if token.kind != "word":
            self._fail(token, "expected a label, 'has(...)', 'all()', '!' or '('")
        return self._function(token) if self._peek()[:2] == ("op", "(") else self._comparison(token)

    def _function(self, name: _Token) -> Selector:
        if name.text not in ("all", "has"):
            self._fail(name, "there are only the functions all() and has(label)")
        self._expect("(")
        result: Selector = All() if name.text == "all" else Has(self._key())
        self._expect(")")
        return result

    def _comparison(self, key: _Token) -> Selector:
        operator = self._take()
        match operator.text if operator.kind != "string" else "":
            case "==":
                return Equals(key.text, self._string())
            case "!=":
                return Differs(key.text, self._string())
            case "in":
                return In(key.text, self._set())
            case "not":
                self._expect("in")
                return NotIn(key.text, self._set())
            case "contains" | "starts" | "ends" as word:
                if word != "contains":
                    self._expect("with")
                return _TEXT_OPERATORS[word](key.text, self._string())
        return self._fail(operator, "expected ==, !=, in, not in, contains, starts with or ends with")

    def _key(self) -> str:
        token = self._take()
        if token.kind != "word":
            self._fail(token, "expected a label")
        return token.text

    def _string(self) -> str:
        token = self._take()
        if token.kind != "string":
            self._fail(token, f'expected a value in quotes, as "{token.text or "value"}"')
        return token.text

    def _set(self) -> tuple[str, ...]:
        self._expect("{")
        values: list[str] = []
        if not self._accept("}"):
            values.append(self._string())
            while self._accept(","):
                values.append(self._string())
            self._expect("}")
        return tuple(sorted(set(values)))

    def _lex(self) -> list[_Token]:
        tokens: list[_Token] = []
        at = 0
        while at < len(self._text):
            found = _LEXEME.match(self._text, at)
            if found is None:
                what = "a quote that is not closed" if self._text[at] in "\"'" else "a character without a meaning here"
                raise BadSelector(self._text, at + 1, what)
            kind = found.lastgroup or ""
            if kind != "space":
                tokens.append(_Token("string" if kind in ("double", "single") else kind, found[kind], at + 1))
            at = found.end()
        tokens.append(_Token("end", "", len(self._text) + 1))
        return tokens

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token

    def _accept(self, text: str) -> bool:
        token = self._peek()
        if token.kind not in ("op", "word") or token.text != text:
            return False
        self._next += 1
        return True

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            self._fail(self._peek(), f"expected '{text}'")

    def _fail(self, token: _Token, expected: str) -> NoReturn:
        raise BadSelector(self._text, token.position, f"{expected}, found {token.text!r}" if token.text else expected)
