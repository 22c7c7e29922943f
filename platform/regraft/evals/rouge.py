"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), by the `rouge-score` package."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output


class Rouge(Metric):
    """F-measures with stemming: overlap of words, of pairs of words, of the longest common subsequence."""

    outputs: ClassVar[tuple[Output, ...]] = (Output("rouge1"), Output("rouge2"), Output("rougeL"))

    name: Literal["rouge"] = "rouge"

    def score(self, answer: Answer) -> dict[str, float]:
        """Compare with the reference."""
        found = _scorer().score(answer.reference, answer.output)
        return {output.name: float(found[output.name].fmeasure) for output in self.outputs}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([output.name for output in Rouge.outputs], use_stemmer=True)
