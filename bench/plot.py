"""Distributions as a picture, in text and as PNG, with nothing but the standard library. Pure.

A row for each series, and a logarithmic axis of milliseconds. The picture has a dot for each value, the first ones at
the top of the row, so that drift and bursts are seen too; a line at the median, and two numbers: median and p99. The
text has the range from the least to the greatest value, within it the middle 80 %, and the median.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Final

from bench.stats import Times, percentile

Color = tuple[int, int, int]

_INK: Final = (32, 36, 44)
_PALE: Final = (228, 231, 236)
_COLORS: Final = ((20, 110, 200), (208, 94, 24), (60, 140, 60), (132, 76, 170))
_WIDTH, _ROW, _TOP, _BOTTOM, _RIGHT = 1200, 48, 40, 34, 170
#: A character and, in hex, its 7 rows of 5 dots, from the top left on.
_GLYPHS: Final = (
    "a000e0be2f b421e8c63e c000e8c22e d042f8c62f e000e8fe0e f1928e2108 g01f18bc2e h4216cc631 i100c2108e "
    "j080610a4c k4212a6292 l30842108e m001aad631 n0016cc631 o000e8c62e p001e8fa10 q000f8bc21 r0016cc210 "
    "s000f8383e t211c42126 u00118c66d v00118c544 w00118d6aa x001151151 y00118bc2e z001f1111f 03a33ae62e "
    "111842108e 23a213221f 33a213062e 408ca97c42 57e1e0862e 61910f462e 77c2221108 83a317462e 93a317844c "
    ".00000018c ,000003188 -0000f0000 /042222210 (088842082 )208210888 :018c03180 +0084f9080"
)
_FONT: Final = {glyph[0]: int(glyph[1:], 16) for glyph in _GLYPHS.split()}


def text(rows: Mapping[str, Times], width: int = 72) -> str:
    """Lines of ``width`` characters besides the names."""
    axis = _Axis(rows)
    pad = max(map(len, rows))

    def column(seconds: float) -> int:
        return round(axis.place(seconds) * (width - 1))

    lines = []
    for name, times in rows.items():
        line = [" "] * width
        for first, last, mark in ((0, 100, "-"), (10, 90, "=")):
            begin, end = (column(percentile(times.values, percent)) for percent in (first, last))
            line[begin : end + 1] = mark * (end + 1 - begin)
        line[column(times.p50)] = "|"
        lines.append(f"{name:>{pad}} {''.join(line)}".rstrip())
    below = [" "] * (width + 4)
    for tick in axis.ticks():
        below[column(tick) : column(tick) + 4] = f"{1000 * tick:<4g}"
    return "\n".join([*lines, f"{'ms':>{pad}} {''.join(below)}".rstrip()])


def png(rows: Mapping[str, Times], title: str) -> bytes:
    """The picture's file (PNG, ISO/IEC 15948). Characters of ``title`` and names that are not in the font are blanks;
    series whose names begin with the same word have one color."""
    axis = _Axis(rows)
    left = 24 + 12 * max(map(len, rows))
    canvas = _Canvas(_WIDTH, _TOP + _ROW * len(rows) + _BOTTOM)
    bottom = canvas.height - _BOTTOM

    def x(seconds: float) -> int:
        return left + round(axis.place(seconds) * (_WIDTH - left - _RIGHT))

    canvas.write(12, 12, title)
    for tick in axis.ticks():
        canvas.fill(x(tick), _TOP, 1, bottom - _TOP, _PALE)
        label = f"{1000 * tick:g}"
        canvas.write(x(tick) - 6 * len(label), bottom + 10, label)
    canvas.write(left - 48, bottom + 10, "ms")
    canvas.write(_WIDTH - _RIGHT + 16, 12, "p50    p99")
    colors: dict[str, Color] = {}
    for i, (name, times) in enumerate(rows.items()):
        top = _TOP + _ROW * i
        color = colors.setdefault(name.split()[0], _COLORS[len(colors) % len(_COLORS)])
        canvas.fill(12, top, _WIDTH - 24, 1, _PALE)
        canvas.write(12, top + _ROW // 2 - 7, name)
        for order, seconds in enumerate(times.values):
            canvas.dot(x(seconds), top + 7 + order * (_ROW - 14) // len(times.values), color)
        canvas.fill(x(times.p50) - 1, top + 4, 3, _ROW - 8, _INK)
        for offset, seconds in ((16, times.p50), (100, times.p99)):
            canvas.write(_WIDTH - _RIGHT + offset, top + _ROW // 2 - 7, f"{1000 * seconds:.3g}")
    return canvas.png()


class _Axis:
    def __init__(self, rows: Mapping[str, Times]) -> None:
        every = [seconds for times in rows.values() for seconds in times.values]
        self._low, self._high = math.log(min(every)), max(math.log(max(every)), math.log(min(every)) + 0.1)

    def place(self, seconds: float) -> float:
        """0 to 1."""
        return (math.log(seconds) - self._low) / (self._high - self._low)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten that there is."""
        powers = range(math.floor(self._low / math.log(10)), math.ceil(self._high / math.log(10)) + 1)
        every = (step * 10.0**power for power in powers for step in (1, 2, 5))
        return [tick for tick in every if self._low <= math.log(tick) <= self._high]


class _Canvas:
    """White at first; three bytes a dot."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._lines = [bytearray(b"\xff" * 3 * width) for _ in range(height)]

    def fill(self, x: int, y: int, width: int, height: int, color: Color) -> None:
        for line in self._lines[y : y + height]:
            line[3 * x : 3 * (x + width)] = bytes(color) * width

    def dot(self, x: int, y: int, color: Color) -> None:
        """Round, and transparent: many in one place are darker."""
        for dy, dx in ((-2, 1), (-1, 2), (0, 2), (1, 2), (2, 1)):
            line = self._lines[y + dy]
            for at in range(3 * (x - dx), 3 * (x + dx + 1)):
                line[at] += (color[at % 3] - line[at]) * 2 // 5

    def write(self, x: int, y: int, what: str) -> None:
        """Each dot of the font is 2 by 2; characters are 12 apart."""
        for i, character in enumerate(what.lower()):
            glyph = _FONT.get(character, 0)
            for dot in range(35):
                if glyph >> 34 - dot & 1:
                    self.fill(x + 12 * i + 2 * (dot % 5), y + 2 * (dot // 5), 2, 2, _INK)

    def png(self) -> bytes:
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        body = zlib.compress(b"".join(b"\0" + line for line in self._lines), 9)
        chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
        packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
