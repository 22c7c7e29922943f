"""A scatter plot as SVG text: quality against a price, the Pareto front joined; no library to ship."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

#: Price, quality, label, whether on the Pareto front, whether a control.
Point = tuple[float, float, str, bool, bool]
Scale = Callable[[float], float]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 420, 300, 52, 40, 12, 14


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
    low, high = _padded(across)
    bottom, top = _padded([p[1] for p in points])

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    places = [(x(a), y(p[1])) for a, p in zip(across, points, strict=True)]
    front = _front(points, places)
    parts = [_axes(low, high, bottom, top, log, x, y, price, quality)]
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
    name = html.escape(f"{quality} against {price}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _axes(
    low: float,
    high: float,
    bottom: float,
    top: float,
    log: bool,
    x: Scale,
    y: Scale,
    price: str,
    quality: str,
) -> str:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in _ticks(low, high):
        at, shown = x(value), f"{10**value:,.3g}" if log else f"{value:,.3g}"
        parts += [_rule(at, at, _TOP, floor), _text(at, floor + 15, "middle", shown)]
    for value in _ticks(bottom, top):
        at = y(value)
        parts += [_rule(_LEFT, right, at, at), _text(_LEFT - 6, at + 4, "end", f"{value:.2f}")]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    scale = " (log)" if log else ""
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(price + scale)}</text>'
        f'<text x="12" y="{_HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {_HEIGHT / 2})">{html.escape(quality)}</text>'
    )
    return "".join(parts)


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


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round values within the bounds."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]
