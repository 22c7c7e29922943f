"""What a metric is: settings and behaviour in one frozen class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict


class Output(NamedTuple):
    """A figure that a metric gives for each answer.

    Attributes:
        name: What it is called everywhere.
        unit: What it counts; a share is from 0 to 1.
        better: Which way is better; empty where neither is by itself.
    """

    name: str
    unit: str = "share"
    better: Literal["higher", "lower", ""] = "higher"


class Answer(NamedTuple):
    """What a candidate answered, and what it is held against.

    Attributes:
        output: The answer.
        reference: The answer as it should be.
        prompt: All that was said before, system turn included.
        tags: Of the example, such as its intent.
    """

    output: str
    reference: str = ""
    prompt: str = ""
    tags: Mapping[str, str] = {}


class Metric(BaseModel):
    """Scores one answer.

    `version` is raised whenever a change makes earlier scores incomparable; it is kept with every report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[Output, ...]]
    #: What `whole` gives.
    wholes: ClassVar[tuple[Output, ...]] = ()

    name: str

    def score(self, answer: Answer) -> dict[str, float]:
        """Score one answer.

        Returns:
            A value for each of `outputs`.

        Raises:
            Exception: Whatever goes wrong; the caller records it as this metric's failure on the example.
        """
        raise NotImplementedError

    def whole(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Figures that only a whole set has, such as a macro-averaged F1; none for most metrics."""
        return {}
