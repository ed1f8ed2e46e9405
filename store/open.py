"""From a store's URL to the store."""

from __future__ import annotations

from pathlib import Path

from store.base import Store
from store.clock import Clock
from store.errors import Unavailable


def open_store(url: str, *, clock: Clock, agent: str = "underlay") -> Store:
    """The store that ``url`` names: ``kube:`` (an API server, as ``store.kubeaccess.find_access`` finds it; or
    ``kube:/path/kubeconfig``, ``kube:?context=NAME``), ``sqlite:/path/store.db`` (a file that processes share),
    ``memory:`` (an empty one of its own). ``agent`` is the client's name, as an API server's audit log has it. Nothing
    is asked yet: the first call raises what is wrong there. ``Unavailable`` for another URL. Call it where the event
    loop runs, and ``close`` the store there."""
    scheme, colon, rest = url.partition(":")
    match scheme if colon else "":
        # A backend is imported where it is asked for: `underlayctl` answers before the others' libraries are loaded.
        case "memory" if not rest:
            from store.memory import MemoryStore

            return MemoryStore(clock)
        case "kube":
            try:
                from store.kube import KubeStore
            except ModuleNotFoundError as e:
                raise Unavailable(f"store {url!r} needs {e.name}: pip install 'underlay[kube]'") from e
            from store.kubeaccess import find_access

            return KubeStore(find_access(rest), clock, agent=agent)
        case "sqlite" if rest:
            from store.sqlite import SqliteStore

            return SqliteStore(Path(rest), clock)
    raise Unavailable(f"store {url!r}: write sqlite:/path/store.db or kube:, or memory: for a test")
