"""What people type for a kind, and what we call an object. Pure."""

from __future__ import annotations

from store.model import KINDS, Resource

#: The namespace that is meant where none is said, as in kubectl.
NAMESPACE = "default"


class UnknownKind(ValueError):
    """No kind answers to that word; the message lists those that there are."""


def names_of(kind: type[Resource]) -> tuple[str, ...]:
    """Every word for the kind, in lower case: plural first, then singular, then the short ones."""
    words = (kind.PLURAL, kind.kind().lower(), *kind.SHORT)
    return tuple(dict.fromkeys(words))


_BY_WORD: dict[str, type[Resource]] = {word: kind for kind in KINDS for word in names_of(kind)}


def find_kind(word: str) -> type[Resource]:
    """The kind that people mean by ``word`` (upper and lower case are the same). Raises UnknownKind."""
    kind = _BY_WORD.get(word.strip().lower())
    if kind is None:
        known = "; ".join(", ".join(names_of(k)) for k in KINDS)
        raise UnknownKind(f"no kind is called {word!r}; there are: {known}")
    return kind


def find_kinds(words: str) -> tuple[type[Resource], ...]:
    """The kinds of a comma-separated list, each once, in the order given. Raises UnknownKind."""
    return tuple(dict.fromkeys(find_kind(word) for word in words.split(",")))


def key_of(kind: type[Resource], name: str, namespace: str) -> str:
    """The key of a name that was typed; ``namespace`` is what ``-n`` said, or ""."""
    return f"{namespace or NAMESPACE}/{name}" if kind.NAMESPACED else name


def reference(obj: Resource) -> str:
    """How output names an object: ``ippool/default``, ``pod/shop/web-0``."""
    return reference_to(type(obj), obj.key)


def reference_to(kind: type[Resource], key: str) -> str:
    return f"{kind.kind().lower()}/{key}"
