"""Whether the candidate is as often right as it is sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output, Scores
from regraft.evals.perplexity import likelihood_of


class Calibration(Metric):
    """Token probabilities held against how often they come true, along the reference.

    `token_accuracy` is the share of the reference's tokens that the candidate would have said itself at that
    place. Over a whole set `calibration_error` is the expected calibration error of those choices, in ten
    bins of equal width (Guo et al., arXiv:1706.04599): how far, on average, the probability of what it would
    have said lies from how often that is the reference's token.
    """

    outputs: ClassVar[tuple[Output, ...]] = (Output("token_accuracy"),)
    wholes: ClassVar[tuple[Output, ...]] = (Output("calibration_error", better="lower"),)
    asks_likelihood: ClassVar[bool] = True

    name: Literal["calibration"] = "calibration"

    def score(self, answer: Answer) -> Scores:
        """Count.

        Raises:
            ValueError: If the likelihood is not known.
        """
        found = likelihood_of(answer)
        return {"token_accuracy": sum(hits for _, _, hits in found.bins) / found.tokens}

    def whole(self, answers: Sequence[Answer], scores: Sequence[Mapping[str, float]]) -> Scores:
        """The calibration error over all tokens; nothing where no likelihood is known."""
        known = [a.likelihood.bins for a in answers if a.likelihood is not None and a.likelihood.tokens]
        if not known:
            return {}
        total = sum(count for bins in known for count, _, _ in bins)
        gaps = (
            abs(sum(sure for _, sure, _ in same) - sum(hits for _, _, hits in same))
            for same in zip(*known, strict=True)
        )
        return {"calibration_error": sum(gaps) / total}
