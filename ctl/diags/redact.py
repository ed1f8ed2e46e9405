"""What is left out of an archive for help: passwords, tokens, keys. Pure.

Twice over: what stands in a secret's place goes (a field, an option, a line), and then every value that stood in one
goes from everything else too, plain or in base64, as a log may repeat what a configuration has.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

LEFT_OUT: Final = "(left out)"

#: Fields that hold no secret whatever they are called: a Secret's name, a switch, a time.
_HARMLESS: Final = re.compile(
    r"secretKeyRef|secretName|imagePullSecrets|automountServiceAccountToken|serviceAccountToken|tokenExpirationSeconds"
    r"|expirationSeconds|md5-base64|.*(seconds|path|file|expir\w*)",
    re.IGNORECASE,
)
_NAMES: Final = r"passw(?:or)?d|passphrase|secret|token|credential|private[-_. ]?key|api[-_. ]?key|authorization|md5"
_SECRET: Final = re.compile(_NAMES, re.IGNORECASE)
#: Of objects: copies of the object, which say everything once more, and what only the API server reads.
_DROPPED: Final = ("managedFields", "kubectl.kubernetes.io/last-applied-configuration")
#: Environment variables of pods whose values are shown: ours, and where the API server is.
_SHOWN: Final = re.compile(r"(UNDERLAY_|KUBERNETES_SERVICE_)\w+")

_KEY_BLOCK: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_JWT: Final = re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?")
_BEARER: Final = re.compile(r"(?i)\b(bearer )([\w.~+/=-]{8,})")
_USER: Final = re.compile(r"(://[^/\s:@]*:)([^/\s@]+)(?=@)")
#: ``password = x``, ``"token": "x"``, ``--token x``, ``md5-password "x";``
_SAID: Final = re.compile(
    rf"""(?ix) ( (?: --[\w-]*(?:{_NAMES})[\w-]* [ =] | (?<![\w-])md5-password \s+
                 | [\w.-]*(?:{_NAMES})[\w.-]* \\*["']? \s* [=:] \s* ) )
         ( \\*"(?:[^"\\\n]|\\[^"\n])* | \\*'[^'\n]* | [^\s,;}})\]"']+ )"""
)
#: Words that say nothing of a secret, and that would tear holes into everything.
_COMMON: Final = {
    "true",
    "false",
    "none",
    "null",
    "yes",
    "no",
    "not",
    "the",
    "required",
    "missing",
    "invalid",
    LEFT_OUT,
}
_SHORT: Final = 8


def structured(value: Any, found: set[str], *, harmless: Collection[str] = ()) -> Any:
    """Plain JSON types without their secrets, which are added to ``found``. Fields called as in ``harmless`` stay."""
    if isinstance(value, dict):
        shown: dict[str, Any] = {}
        for key, below in value.items():
            if key in _DROPPED:
                continue
            if key == "env" and isinstance(below, list):
                shown[key] = [_variable(one, found) for one in below]
            elif _hides(key, below, harmless, found):
                shown[key] = LEFT_OUT
            else:
                shown[key] = structured(below, found, harmless=harmless)
        return shown
    if isinstance(value, list):
        return [structured(below, found, harmless=harmless) for below in value]
    return text(value, found) if isinstance(value, str) else value


def text(value: str, found: set[str]) -> str:
    """Text of any kind without what stands in a secret's place, which is added to ``found``."""

    def said(match: re.Match[str]) -> str:
        before, secret = match[1], match[2]
        name = re.split(r"[\s=:]", before.strip("-"), maxsplit=1)[0].strip("\\\"'")
        if _HARMLESS.fullmatch(name):
            return match[0]
        bare = secret.lstrip("\\").strip("\"'").rstrip(";")
        if "md5-password" in before or secret != bare or (len(bare) >= 6 and re.search(r"\d", bare)):
            found.add(bare)
        quote = secret[: len(secret) - len(secret.lstrip("\\\"'"))]
        return f"{before}{quote}{LEFT_OUT}"

    value = _KEY_BLOCK.sub(LEFT_OUT, value)
    value = _JWT.sub(lambda match: _taken(match[0], found), value)
    # Before what follows, which would take the word "Bearer" for the secret.
    value = _BEARER.sub(lambda match: match[1] + _taken(match[2], found), value)
    value = _USER.sub(lambda match: match[1] + _taken(match[2], found), value)
    return _SAID.sub(said, value)


def scrub(value: str, secrets: Iterable[str]) -> str:
    """The text without these values, as they are and in base64. A short one goes only where it stands alone."""
    forms = sorted({form for secret in secrets for form in _forms(secret)}, key=lambda form: (-len(form), form))
    if not forms:
        return value
    pattern = "|".join(
        re.escape(form) if len(form) >= _SHORT else rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])"
        for form in forms
    )
    return re.sub(pattern, LEFT_OUT, value)


def _taken(secret: str, found: set[str]) -> str:
    found.add(secret)
    return LEFT_OUT


def _variable(value: Any, found: set[str]) -> Any:
    """An environment variable of a pod."""
    if not isinstance(value, dict) or "value" not in value:
        return structured(value, found)
    name, said = str(value.get("name", "")), value["value"]
    if _SHOWN.fullmatch(name) and not _SECRET.search(name):
        return {"name": name, "value": structured(said, found)}
    if _SECRET.search(name) and isinstance(said, str):
        found.add(said)
    return {"name": name, "value": LEFT_OUT}


def _hides(key: str, below: Any, harmless: Collection[str], found: set[str]) -> bool:
    if key in harmless or not _SECRET.search(key) or _HARMLESS.fullmatch(key) or isinstance(below, bool):
        return False
    leaves = list(_leaves(below))
    found.update(leaves)
    return bool(leaves)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            if not _HARMLESS.fullmatch(key):
                yield from _leaves(below)
    elif isinstance(value, list):
        for below in value:
            yield from _leaves(below)
    elif isinstance(value, str) and value:
        yield value


def _forms(secret: str) -> Iterator[str]:
    secret = secret.strip()
    if len(secret) < 3 or secret.lower() in _COMMON:
        return
    yield secret
    coded = base64.b64encode(secret.encode()).decode()
    yield coded.rstrip("=")
    try:
        plain = base64.b64decode(secret, validate=True).decode()
    except (binascii.Error, ValueError):
        return
    if len(plain) >= 3 and plain.isprintable():
        yield plain
