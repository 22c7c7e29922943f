"""From what a YAML says of a method to the methods to try: every field may be a value, a list or a range.

A list is a grid; a range (`{loguniform: [low, high]}`, `{uniform: [low, high]}`) is drawn `samples` times.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, get_args, get_origin

from regraft.methods import METHOD_CLASSES, METHODS_BY_NAME, Method, parse_method
from regraft.records import content_hash

RANGES = ("loguniform", "uniform")
#: Fields whose value may itself be a list: there a list is one value, not several to try.
_LIST_FIELDS = {
    field
    for cls in METHOD_CLASSES
    for field, info in cls.model_fields.items()
    if any(get_origin(kind) is tuple for kind in (info.annotation, *get_args(info.annotation)))
}


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
            ranges[field] = _range(field, value)
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
            whole = _whole_number_fields(fixed.get("name"))
            drawn = {field: _draw(spec, draw, whole=field in whole) for field, spec in ranges.items()}
            methods.append(parse_method({**fixed, **drawn}))
    return methods


def _range(field: str, spec: dict[str, Any]) -> dict[str, list[float]]:
    kind: str | None
    bounds: Any
    kind, bounds = next(iter(spec.items()), (None, None))
    if len(spec) != 1 or kind not in RANGES:
        raise SearchError(field, f"a range is one of {', '.join(RANGES)}, as in {{loguniform: [1e-5, 1e-3]}}")
    try:
        # YAML 1.1 reads 1e-5, without a dot, as text.
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise SearchError(field, f"{kind} takes two numbers, [low, high]") from None
    if low >= high or (kind == "loguniform" and low <= 0):
        raise SearchError(field, f"{kind} takes [low, high] with low < high, both above 0 for loguniform")
    return {kind: [low, high]}


def _whole_number_fields(name: Any) -> set[str]:
    """Fields of a method that take whole numbers: their draws are rounded."""
    cls = METHODS_BY_NAME.get(name)
    fields = cls.model_fields if cls else {}
    return {f for f, info in fields.items() if info.annotation is int or int in get_args(info.annotation)}


def _draw(spec: dict[str, list[float]], draw: random.Random, *, whole: bool) -> float:
    kind, (low, high) = next(iter(spec.items()))
    value = (
        math.exp(draw.uniform(math.log(low), math.log(high)))
        if kind == "loguniform"
        else draw.uniform(low, high)
    )
    return round(value) if whole else float(f"{value:.3g}")
