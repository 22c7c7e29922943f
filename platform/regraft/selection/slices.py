"""Scores by a field of the examples: where a candidate is weak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from regraft.records import EvalReport, Interval
from regraft.selection.resampling import mean_interval

#: A slice of fewer examples says nothing.
LEAST = 5
#: A field with more values than this names examples and not kinds of them.
MOST_VALUES = 50


class Slice(NamedTuple):
    """The examples with one value of a field.

    `weak` is whether its mean is below that of all other examples by more than luck: the upper end of its
    interval, widened for how many slices were looked at (Bonferroni), lies below.
    """

    field: str
    value: str
    examples: int
    quality: Interval
    others: float
    weak: bool


def slices(report: EvalReport, metric: str, *, level: float, resamples: int) -> tuple[Slice, ...]:
    """The slices of a report by every tag of its examples, the worst first.

    Args:
        report: Scores with tags.
        metric: What to go by; higher is better.
        level: Coverage of the intervals.
        resamples: Bootstrap samples.
    """
    scored = [e for e in report.examples if metric in e.scores]
    groups: dict[tuple[str, str], list[float]] = {}
    for field in sorted({name for e in scored for name in e.tags}):
        values = {e.tags[field] for e in scored if field in e.tags}
        if 2 <= len(values) <= MOST_VALUES:
            for value in sorted(values):
                groups[field, value] = [e.scores[metric] for e in scored if e.tags.get(field) == value]
    kept = {key: own for key, own in groups.items() if LEAST <= len(own) < len(scored)}
    total = sum(e.scores[metric] for e in scored)
    found = []
    for (field, value), own in kept.items():
        others = (total - sum(own)) / (len(scored) - len(own))
        strict = mean_interval(own, level=1 - (1 - level) / len(kept), resamples=resamples)
        shown = mean_interval(own, level=level, resamples=resamples)
        found.append(Slice(field, value, len(own), shown, others, strict.high < others))
    return tuple(sorted(found, key=lambda s: s.quality.mean))


def in_words(found: Sequence[Slice], metric: str) -> str:
    """The weak ones, for people; empty if there is none."""
    weak = [s for s in found if s.weak]
    if not weak:
        return ""
    worst = ", ".join(f"{s.field} {s.value} ({s.quality.mean:.3f} against {s.others:.3f})" for s in weak[:3])
    return f"It is weak, by {metric}, at {worst}" + (f" and {len(weak) - 3} more." if len(weak) > 3 else ".")
