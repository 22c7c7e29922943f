"""What a metric is: settings and behaviour in one frozen class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from regraft.records import Likelihood


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
        likelihood: How likely the candidate finds the reference, where a metric asks for it and the candidate
            is a model that was loaded.
    """

    output: str
    reference: str = ""
    prompt: str = ""
    tags: Mapping[str, str] = {}
    likelihood: Likelihood | None = None


Scores = dict[str, float]


class Metric(BaseModel):
    """Scores one answer.

    `version` is raised whenever a change makes earlier scores incomparable; it is kept with every report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[Output, ...]]
    #: What `whole` gives.
    wholes: ClassVar[tuple[Output, ...]] = ()
    #: Whether `Answer.likelihood` is needed.
    asks_likelihood: ClassVar[bool] = False
    #: Settings that change no score: of prices, patience, access.
    indecisive: ClassVar[frozenset[str]] = frozenset()
    #: The figure of a whole set that must be known before the gate may go by this metric; empty for none.
    trusted_by: ClassVar[str] = ""

    name: str

    def score(self, answer: Answer) -> Scores:
        """Score one answer.

        Returns:
            A value for each of `outputs`.

        Raises:
            Exception: Whatever goes wrong; the caller records it as this metric's failure on the example.
        """
        raise NotImplementedError

    def score_all(self, answers: Sequence[Answer]) -> list[Scores | Exception]:
        """Score answers; for metrics that are quicker over many at once. A failure stands in its place."""
        found: list[Scores | Exception] = []
        for answer in answers:
            try:
                found.append(self.score(answer))
            except Exception as error:  # a metric may be anybody's code: its failure is a value
                found.append(error)
        return found

    def whole(
        self, answers: Sequence[Answer], scores: Sequence[Mapping[str, float]]
    ) -> Mapping[str, float | Exception]:
        """Figures that only a whole set has, such as a macro-averaged F1; none for most metrics.

        A failure of one figure may stand in its place.

        Args:
            answers: All of them.
            scores: What they scored, by any metric.
        """
        return {}

    @property
    def texts(self) -> tuple[str, ...]:
        """What candidate and base are asked the likelihood of, for `of_texts`; nothing for most metrics."""
        return ()

    def of_texts(self, nats: float, base_nats: float) -> Scores:
        """Figures of the candidate itself and not of its answers, named in `wholes`.

        Args:
            nats: Mean negative log-probability that the candidate gives a token of `texts`.
            base_nats: The same of the untuned base, as the candidate's method holds it.
        """
        return {}
