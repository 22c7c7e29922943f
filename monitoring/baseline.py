"""What quality was when the reference was frozen: counts and samples that later windows are held against."""

from __future__ import annotations

from pydantic import Field, model_validator

from regraft.records import Record


class Count(Record):
    """So many of so many, one of each session; `share` is that of all exchanges, where there were more."""

    bad: int = Field(ge=0)
    of: int = Field(ge=1)
    share: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _is_a_part(self) -> Count:
        if self.bad > self.of:
            raise ValueError(f"bad: is {self.bad}, of {self.of} in all")
        return self

    @property
    def rate(self) -> float:
        """The share of all exchanges."""
        return self.bad / self.of if self.share is None else self.share


class QualityBaseline(Record):
    """Quality of the promoted version, one value of each session.

    Attributes:
        counts: Failed, empty, refusing, truncated and repetitive answers, by the name of their rate.
        latency_ms: Whole answers' times, a sample; empty where only evaluation answers were frozen.
        first_token_ms: Times to the first token, a sample.
        feedback: Scores that users gave, -1 to 1.
        judge: Verdicts of the judge of `evaluate.metrics`, 0 to 1, given as those of later windows are.
        scores: `select.maximise` of each evaluation example, or of answers whose references came later.
    """

    counts: dict[str, Count] = {}
    latency_ms: tuple[float, ...] = ()
    first_token_ms: tuple[float, ...] = ()
    feedback: tuple[float, ...] = ()
    judge: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
