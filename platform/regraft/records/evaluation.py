"""What a candidate answered, and how that scored."""

from __future__ import annotations

from regraft.records.base import Record


class Likelihood(Record):
    """How likely a candidate finds a reference, token after token.

    `nats` is the sum of the negative log-probabilities of its tokens. `bins` are ten of equal width over the
    probability of the token that the candidate would have said there: how many, their summed probability,
    and how many of them were the reference's.
    """

    tokens: int
    utf8_bytes: int
    nats: float
    bins: tuple[tuple[int, float, int], ...]


class ExampleScore(Record):
    """What one candidate answered to one example, and how that scored.

    A metric that failed on this example is absent from `scores` and present in `failures` with its reason.
    """

    example_id: str
    prompt: str
    reference: str
    output: str
    scores: dict[str, float]
    failures: dict[str, str] = {}
    tags: dict[str, str] = {}
    likelihood: Likelihood | None = None


class EvalReport(Record):
    """Per-example scores of one candidate on one evaluation set.

    `whole` has the figures that only all answers together have, `whole_failures` why some are missing.
    `asked` is a hash of how it was asked and scored: reports may be put together where it is the same.
    """

    dataset_id: str
    split: str
    metric_versions: dict[str, int]
    examples: tuple[ExampleScore, ...]
    whole: dict[str, float] = {}
    whole_failures: dict[str, str] = {}
    asked: str = ""

    def mean(self, metric: str) -> float:
        """Mean of a metric over the examples on which it did not fail.

        Raises:
            ValueError: If no example has that metric.
        """
        values = [e.scores[metric] for e in self.examples if metric in e.scores]
        if not values:
            raise ValueError(f"no example of {self.split} has a value for metric {metric!r}")
        return sum(values) / len(values)

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric that has at least one value."""
        names = sorted({name for e in self.examples for name in e.scores})
        return {name: self.mean(name) for name in names}

    @property
    def failure_count(self) -> int:
        """Metric failures over all examples, and of figures of the whole set."""
        return sum(len(e.failures) for e in self.examples) + len(self.whole_failures)
