"""What quality was when the reference was frozen: counts and samples that later windows are held against."""

from __future__ import annotations

from regraft.records import Record


class Count(Record):
    """So many of so many."""

    bad: int
    of: int


class QualityBaseline(Record):
    """Quality of the promoted version.

    Attributes:
        counts: Failed, empty, refusing, truncated and repetitive answers, by the name of their rate.
        latency_ms: Whole answers' times, a sample; empty where only evaluation answers were frozen.
        first_token_ms: Times to the first token, a sample.
        feedback: Scores that users gave, -1 to 1.
        judge: Verdicts of the judge of `evaluate.metrics`, 0 to 1.
        scores: `select.maximise` of each evaluation example.
    """

    counts: dict[str, Count] = {}
    latency_ms: tuple[float, ...] = ()
    first_token_ms: tuple[float, ...] = ()
    feedback: tuple[float, ...] = ()
    judge: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
