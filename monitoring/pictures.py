"""Checks over time as SVG text; no library to ship and nothing to load."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 230, 54, 14, 28, 26
#: Colours of lines, told apart by people who see few colours (Okabe & Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
#: Colours of what a check said.
VERDICTS = {"drift": "#b91c1c", "suspected": "#d97706", "stable": "#15803d", "insufficient": "#6b7280"}
_LINE = "#b91c1c"


class Mark(NamedTuple):
    """A value at a time, in seconds since 1970, with the words that a reader who points at it sees."""

    at: float
    value: float
    words: str
    colour: str


class _Time:
    """Where times lie."""

    def __init__(self, times: Sequence[float]) -> None:
        self.first, self.last = min(times), max(times)

    def x(self, at: float) -> float:
        inside = (_LEFT + 10, _WIDTH - _RIGHT - 10)
        if self.first == self.last:
            return sum(inside) / 2
        return inside[0] + (at - self.first) / (self.last - self.first) * (inside[1] - inside[0])

    def axis(self) -> str:
        """The first time and the last one."""
        floor = _HEIGHT - _BOTTOM
        parts = [_rule(_LEFT, _WIDTH - _RIGHT, floor, floor, "#9ca3af")]
        if self.first == self.last:
            return "".join([*parts, _text(_WIDTH / 2 + _LEFT / 2, floor + 18, "middle", _day(self.first))])
        parts.append(_text(_LEFT, floor + 18, "start", _day(self.first)))
        parts.append(_text(_WIDTH - _RIGHT, floor + 18, "end", _day(self.last)))
        return "".join(parts)


def trend(
    curves: Sequence[tuple[str, Sequence[Mark]]],
    *,
    title: str,
    line: float,
    line_name: str,
    most: float = math.inf,
) -> str:
    """An SVG picture of values on a logarithmic scale against a line, about 420 by 230.

    Args:
        curves: Names and marks by time, at least one mark in all. Values of 0 or less lie on the floor.
        title: What is shown.
        line: Where something happens, above 0.
        line_name: What happens there.
        most: No value is larger than this.
    """
    marks = [mark for _, points in curves for mark in points]
    values = [mark.value for mark in marks if mark.value > 0 and math.isfinite(mark.value)]
    low = math.floor(math.log10(min([*values, line])) - 0.15)
    high = math.ceil(min(math.log10(max([*values, line])) + 0.15, math.log10(most)))
    time = _Time([mark.at for mark in marks])

    def y(value: float) -> float:
        up = min(max(math.log10(value), low), high) if value > 0 else low
        return _HEIGHT - _BOTTOM - (up - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    step = math.ceil((high - low) / 6)
    parts = [time.axis()]
    for power in range(low, high + 1, step):
        at = y(10.0**power)
        parts += [
            _rule(_LEFT, _WIDTH - _RIGHT, at, at, "#e5e7eb"),
            _text(_LEFT - 6, at + 4, "end", _ten(power)),
        ]
    for index, (name, points) in enumerate(curves):
        path = " ".join(f"{time.x(mark.at):.1f},{y(mark.value):.1f}" for mark in points)
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [_dot(time.x(mark.at), y(mark.value), mark, name) for mark in points]
    at = y(line)
    parts.append(_rule(_LEFT, _WIDTH - _RIGHT, at, at, _LINE, dashed=True))
    # Above the line, unless that is where the title stands.
    below = at - 5 < _TOP + 8
    parts.append(_text(_LEFT + 4, at + 13 if below else at - 5, "start", line_name, _LINE))
    return _picture(parts, title)


def bars(marks: Sequence[Mark], *, title: str) -> str:
    """An SVG picture of counts as bars, about 420 by 230.

    Args:
        marks: By time, at least one; values of 0 or more.
        title: What is shown.
    """
    time = _Time([mark.at for mark in marks])
    most = max([1.0, *(mark.value for mark in marks)])
    high, floor = _HEIGHT - _BOTTOM - _TOP, _HEIGHT - _BOTTOM
    wide = max(1.5, min(18.0, 0.7 * (_WIDTH - _LEFT - _RIGHT - 20) / len(marks)))
    parts = []
    for share in (0.0, 0.5, 1.0):
        at = floor - share * high
        parts += [
            _rule(_LEFT, _WIDTH - _RIGHT, at, at, "#e5e7eb"),
            _text(
                _LEFT - 6, at + 4, "end", f"{most * share:,.3g}" if most < 1000 else f"{most * share:,.0f}"
            ),
        ]
    for mark in marks:
        tall, words = mark.value / most * high, html.escape(mark.words)
        parts.append(
            f'<rect x="{time.x(mark.at) - wide / 2:.1f}" y="{floor - tall:.1f}" width="{wide:.1f}" '
            f'height="{max(tall, 1):.1f}" fill="{mark.colour}"><title>{words}</title></rect>'
        )
    return _picture([*parts, time.axis()], title)


def _picture(parts: Sequence[str], title: str) -> str:
    heading = f'<text x="0" y="14" style="font-weight:600">{html.escape(title)}</text>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
        f"{heading}{''.join(parts)}</svg>"
    )


def _dot(x: float, y: float, mark: Mark, name: str) -> str:
    words = html.escape(f"{name}: {mark.words}")
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{mark.colour}"><title>{words}</title></circle>'


def _rule(x1: float, x2: float, y1: float, y2: float, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'


def _text(x: float, y: float, anchor: str, words: str, colour: str = "#374151") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} style="fill:{colour}">{html.escape(words)}</text>'


def _ten(power: int) -> str:
    return f"{10.0**power:,g}" if -4 <= power <= 4 else f"1e{power}"


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
