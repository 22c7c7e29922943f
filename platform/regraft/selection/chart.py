"""A scatter plot as SVG text: quality against a price, the Pareto front joined; no library to ship."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

#: Price, quality, label, whether on the Pareto front, whether a control.
Point = tuple[float, float, str, bool, bool]

#: How wide a letter is, about, at 11 pixels.
_LETTER = 6.0
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


class _Labels:
    """Words beside points, where they cover neither each other nor a point; without room, none.

    Args:
        dots: Where the points are.
    """

    def __init__(self, dots: Sequence[tuple[float, float]]) -> None:
        self._taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]

    def place(self, x: float, y: float, words: str) -> tuple[float, float, str] | None:
        """Where the words beside a point go, and which end of them is there."""
        width = _LETTER * len(words)
        for down in (0, -12, 12, -24, 24):
            for anchor in ("start", "end"):
                left = x + 8 if anchor == "start" else x - 8 - width
                box = (left, y + down - 6, left + width, y + down + 6)
                inside = left >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
                if inside and not any(_overlap(box, other) for other in self._taken):
                    self._taken.append(box)
                    return (x + 8 if anchor == "start" else x - 8), y + down + 4, anchor
        return None


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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
    labels = _Labels(places)
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
        if (on_front or control) and (spot := labels.place(a, b, label)):
            parts.append(_text(*spot, label))
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
    labels = _Labels([(frame.x(points[-1][0]), frame.y(points[-1][1])) for _, points in curves])
    parts = [frame.axes(across, up)]
    for index, (name, points) in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        title = f"<title>{html.escape(name)}</title>"
        line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        x, y = points[-1]
        dot = f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{colour}"/>'
        parts.append(f"<g>{title}{line}{dot}</g>")
        spot = labels.place(frame.x(x), frame.y(y), name) if index < len(_COLOURS) else None
        if spot is not None:
            label = f'<text x="{spot[0]:.1f}" y="{spot[1]:.1f}" text-anchor="{spot[2]}"'
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
