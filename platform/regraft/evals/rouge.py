"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), by the `rouge-score` package."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

from regraft.evals.base import Metric


class Rouge(Metric):
    """F-measures with stemming, 0 to 1."""

    outputs: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")

    name: Literal["rouge"] = "rouge"

    def score(self, output: str, reference: str) -> dict[str, float]:
        """Score by the overlap of unigrams, of bigrams and of the longest common subsequence."""
        found = _scorer().score(reference, output)
        return {key: float(found[key].fmeasure) for key in self.outputs}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(Rouge.outputs), use_stemmer=True)
