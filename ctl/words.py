"""How a value is said to people: numbers, ages, yes and no. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

_EXACT_BELOW = 10**9


def count(number: int) -> str:
    """A number of addresses: exact while it can be read at a glance, else as a power of two or ``1.2e+24``."""
    if number < _EXACT_BELOW:
        return str(number)
    if number & (number - 1) == 0:
        return f"2^{number.bit_length() - 1}"
    return f"{number:.3g}"


def share(part: int, whole: int) -> str:
    """``part`` with its share of ``whole``, as ``5 (8%)``. A whole of nothing has no share."""
    if whole <= 0:
        return count(part)
    percent = 100 * part / whole
    # by the numbers themselves: a float takes 2^80 - 1 of 2^80 for the whole
    text = "<1" if part and percent < 1 else ">99" if part < whole and percent > 99 else str(round(percent))
    return f"{count(part)} ({text}%)"


def age(since: str, now: str) -> str:
    """From one RFC 3339 stamp to another in the two largest units, as ``3d4h``; empty without a beginning."""
    if not since:
        return ""
    seconds = max(0, round((datetime.fromisoformat(now) - datetime.fromisoformat(since)).total_seconds()))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    if minutes:
        return f"{minutes}m{seconds % 60}s"
    return f"{seconds}s"


def yes(value: bool) -> str:
    return "yes" if value else "no"


def listed(values: Iterable[str]) -> str:
    return ",".join(values)
