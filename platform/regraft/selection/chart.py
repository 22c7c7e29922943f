"""A scatter plot as SVG text: quality against a price, the Pareto front joined; no library to ship."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

#: Price, quality, label, whether on the Pareto front, whether a control.
Point = tuple[float, float, str, bool, bool]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 420, 300, 52, 40, 12, 14


#: Colours of lines, told apart by people who see few colours (Okabe & Ito); later lines begin anew.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, across: Sequence[float], up: Sequence[float]) -> None:
        self.low, self.high = _padded(across)
        self.bottom, self.top = _padded(up)

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, across: str, up: str, *, log: bool = False) -> str:
        floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for value, shown in _ticks(self.low, self.high):
            at, words = self.x(value), f"{10**value:,.3g}" if log else shown
            parts += [_rule(at, at, _TOP, floor), _text(at, floor + 15, "middle", words)]
        for value, shown in _ticks(self.bottom, self.top):
            at = self.y(value)
            parts += [_rule(_LEFT, right, at, at), _text(_LEFT - 6, at + 4, "end", shown)]
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(_text(middle, _HEIGHT - 6, "middle", across + (" (log)" if log else "")))
        parts.append(
            f'<text x="12" y="{_HEIGHT / 2}" text-anchor="middle" '
            f'transform="rotate(-90 12 {_HEIGHT / 2})">{html.escape(up)}</text>'
        )
        return "".join(parts)


def scatter(points: Sequence[Point], price: str, quality: str) -> str:
    """An SVG picture, about 420 by 300, with a title for each point; what is best at its price is joined.

    The price is on a logarithmic scale where the largest is more than ten times the smallest.

    Args:
        points: At least two.
        price: Name of the horizontal axis.
        quality: Name of the vertical axis.
    """
    prices = [p[0] for p in points]
    log = min(prices) > 0 and max(prices) / min(prices) > 10
    across = [math.log10(x) if log else x for x in prices]
    frame = _Frame(across, [p[1] for p in points])
    places = [(frame.x(a), frame.y(p[1])) for a, p in zip(across, points, strict=True)]
    front = _front(points, places)
    parts = [frame.axes(price, quality, log=log)]
    if len(front) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in front)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#2a78d6" stroke-opacity=".5"/>')
    for (a, b), (cost, value, label, on_front, control) in zip(places, points, strict=True):
        fill = "#888" if control else "#2a78d6" if on_front else "none"
        stroke = "#888" if control else "#2a78d6"
        words = html.escape(f"{label}: {quality} {value:.3f}, {price} {cost:,.4g}")
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{fill}" stroke="{stroke}" stroke-width="1.5">'
            f"<title>{words}</title></circle>"
        )
        if on_front or control:
            anchor = "end" if a > _WIDTH * 0.6 else "start"
            shift = -8 if anchor == "end" else 8
            parts.append(_text(a + shift, b + 4, anchor, label))
    return _picture(parts, f"{quality} against {price}")


def lines(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], across: str, up: str) -> str:
    """An SVG picture of curves, each with its name as a title and at its end.

    Args:
        curves: Names and their points, at least one point in all; in order of importance.
        across: Name of the horizontal axis.
        up: Name of the vertical axis.
    """
    every = [point for _, points in curves for point in points]
    frame = _Frame([x for x, _ in every], [y for _, y in every])
    parts = [frame.axes(across, up)]
    for index, (name, points) in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        title = f"<title>{html.escape(name)}</title>"
        line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        x, y = points[-1]
        dot = f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{colour}"/>'
        parts.append(f"<g>{title}{line}{dot}</g>")
        if index < len(_COLOURS):
            label = f'<text x="{frame.x(x) - 6:.1f}" y="{frame.y(y) - 5:.1f}" text-anchor="end"'
            parts.append(f'{label} style="fill:{colour}">{html.escape(name)}</text>')
    return _picture(parts, f"{up} over {across}")


def _picture(parts: Sequence[str], name: str) -> str:
    label = html.escape(name, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _front(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places of the points that no cheaper one equals, by price: the front of these two axes alone."""
    found, best = [], -math.inf
    for point, place in sorted(zip(points, places, strict=True), key=lambda pair: (pair[0][0], -pair[0][1])):
        if point[1] > best:
            best = point[1]
            found.append(place)
    return found


def _rule(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="#8884"/>'


def _text(x: float, y: float, anchor: str, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or max(abs(high), 1.0) * 0.1
    return low - room, high + room


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Four to eight round values within the bounds, and how they are written: apart from one another."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    first = math.ceil(low / step)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(step * i, f"{step * i:,.{decimals}f}") for i in range(first, math.floor(high / step) + 1)]
