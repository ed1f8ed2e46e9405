"""Root of everything that the agent raises; the leaves stand beside what raises them."""

from __future__ import annotations


class AgentError(Exception):
    """Root. A message names the thing, what was expected and what to do."""
