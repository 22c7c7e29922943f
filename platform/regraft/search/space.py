"""What a YAML says of the methods to try: every field may be a value, a list or a range.

An entry of `sweep.methods` becomes an *arm*: one method, with fields that are fixed, chosen from a list,
or drawn from a range (`{loguniform: [low, high]}`, `{uniform: [low, high]}`). A field exists only where the
method has it, so the whole space is conditional on the method.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, NamedTuple, get_args, get_origin

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


class Range(NamedTuple):
    """A range to draw from; whole numbers are rounded."""

    kind: str
    low: float
    high: float
    whole: bool

    def draw(self, rng: random.Random) -> float:
        """A value, to three digits."""
        if self.kind == "loguniform":
            return self.tidy(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.tidy(rng.uniform(self.low, self.high))

    def tidy(self, value: float) -> float:
        """A value as a method gets it: whole, or with three digits, as a label shows it."""
        return round(value) if self.whole else float(f"{value:.3g}")


class Arm(NamedTuple):
    """One method and what is open about it."""

    fixed: dict[str, Any]
    choices: dict[str, list[Any]]
    ranges: dict[str, Range]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.fixed["name"])

    @property
    def is_open(self) -> bool:
        """Whether there is anything to search."""
        return bool(self.choices or self.ranges)

    def grid(self, samples: int, seed: int) -> list[Method]:
        """All combinations of the lists, in their order, with `samples` draws of the ranges for each.

        Raises:
            pydantic.ValidationError: If a resulting method is not valid.
        """
        rng = random.Random(content_hash([*self, seed]))
        found = []
        for point in itertools.product(*self.choices.values()):
            chosen = dict(zip(self.choices, point, strict=True))
            for _ in range(samples if self.ranges else 1):
                drawn = {field: spec.draw(rng) for field, spec in self.ranges.items()}
                found.append(parse_method(self.fixed | chosen | drawn))
        return found

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Settings drawn from the lists and ranges."""
        chosen = {field: rng.choice(values) for field, values in self.choices.items()}
        return self.fixed | chosen | {field: spec.draw(rng) for field, spec in self.ranges.items()}


def arms(settings: dict[str, Any]) -> list[Arm]:
    """Read one entry of `sweep.methods`; a list of names gives an arm for each.

    Raises:
        SearchError: If a range is malformed or a list is empty.
    """
    names = settings.get("name")
    if isinstance(names, list):
        if not names:
            raise SearchError("name", "an empty list: nothing to try")
        return [arm for name in names for arm in arms(settings | {"name": name})]
    fixed: dict[str, Any] = {}
    choices: dict[str, list[Any]] = {}
    ranges: dict[str, Range] = {}
    whole = _whole_number_fields(names)
    for field, value in settings.items():
        if isinstance(value, dict):
            ranges[field] = _range(field, value, whole=field in whole)
        elif isinstance(value, list) and field not in _LIST_FIELDS:
            if not value:
                raise SearchError(field, "an empty list: nothing to try")
            choices[field] = value
        else:
            fixed[field] = value
    return [Arm(fixed, choices, ranges)]


def expand(settings: dict[str, Any], *, samples: int, seed: int) -> list[Method]:
    """Turn one entry of `sweep.methods` into concrete methods: the grid of its lists, with ranges drawn.

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
    return [method for arm in arms(settings) for method in arm.grid(samples, seed)]


def _range(field: str, spec: dict[str, Any], *, whole: bool) -> Range:
    kind: str | None
    bounds: Any
    kind, bounds = next(iter(spec.items()), (None, None))
    if kind is None or len(spec) != 1 or kind not in RANGES:
        raise SearchError(field, f"a range is one of {', '.join(RANGES)}, as in {{loguniform: [1e-5, 1e-3]}}")
    try:
        # YAML 1.1 reads 1e-5, without a dot, as text.
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise SearchError(field, f"{kind} takes two numbers, [low, high]") from None
    if low >= high or (kind == "loguniform" and low <= 0):
        raise SearchError(field, f"{kind} takes [low, high] with low < high, both above 0 for loguniform")
    return Range(kind, low, high, whole)


def _whole_number_fields(name: Any) -> set[str]:
    """Fields of a method that take whole numbers: their draws are rounded."""
    cls = METHODS_BY_NAME.get(name)
    fields = cls.model_fields if cls else {}
    return {f for f, info in fields.items() if info.annotation is int or int in get_args(info.annotation)}
