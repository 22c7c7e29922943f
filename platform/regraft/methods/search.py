"""From what a YAML says of a method to the methods to try: every field may be a value, a list or a range.

A list is a grid; a range (`{loguniform: [low, high]}`, `{uniform: [low, high]}`) is drawn `samples` times.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from regraft.methods import Method, parse_method
from regraft.records import content_hash

RANGES = ("loguniform", "uniform")
_LIST_FIELDS = {"target_modules"}


class SearchError(ValueError):
    """A value of the search space that makes no sense; `field` names where."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def expand(settings: dict[str, Any], *, samples: int, seed: int) -> list[Method]:
    """Turn one entry of `sweep.methods` into concrete methods.

    Args:
        settings: The entry: `name`, and for each field a value, a list of values or a range.
        samples: How often to draw from ranges, for each point of the grid.
        seed: Seed of the draws. The same entry and seed always give the same methods.

    Returns:
        The methods, in the order of the lists.

    Raises:
        SearchError: If a range is malformed or a list is empty.
        pydantic.ValidationError: If a resulting method is not valid.
    """
    grid: dict[str, list[Any]] = {}
    ranges: dict[str, dict[str, list[float]]] = {}
    for field, value in settings.items():
        if isinstance(value, dict):
            _check_range(field, value)
            ranges[field] = value
        elif isinstance(value, list) and field not in _LIST_FIELDS:
            if not value:
                raise SearchError(field, "an empty list: nothing to try")
            grid[field] = value
        else:
            grid[field] = [value]
    draw = random.Random(content_hash([settings, seed]))
    methods = []
    for point in itertools.product(*grid.values()):
        fixed = dict(zip(grid, point, strict=True))
        for _ in range(samples if ranges else 1):
            drawn = {field: _draw(spec, draw) for field, spec in ranges.items()}
            methods.append(parse_method({**fixed, **drawn}))
    return methods


def _check_range(field: str, spec: dict[str, Any]) -> None:
    kind: str | None
    bounds: Any
    kind, bounds = next(iter(spec.items()), (None, None))
    if len(spec) != 1 or kind not in RANGES:
        raise SearchError(
            field, f"a range is one of {', '.join(RANGES)}, such as {{loguniform: [1e-5, 1e-3]}}"
        )
    if (
        not isinstance(bounds, list)
        or len(bounds) != 2
        or not all(isinstance(b, int | float) for b in bounds)
    ):
        raise SearchError(field, f"{kind} takes two numbers, [low, high]")
    if bounds[0] >= bounds[1] or (kind == "loguniform" and bounds[0] <= 0):
        raise SearchError(field, f"{kind} takes [low, high] with low < high, both above 0 for loguniform")


def _draw(spec: dict[str, list[float]], draw: random.Random) -> float:
    kind, (low, high) = next(iter(spec.items()))
    if kind == "loguniform":
        return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.3g}")
    return float(f"{draw.uniform(low, high):.3g}")
