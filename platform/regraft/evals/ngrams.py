"""BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of single answers, by the `sacrebleu` package."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output


class Ngrams(Metric):
    """BLEU with exponential smoothing and effective order, and chrF; both as shares, not of 100."""

    outputs: ClassVar[tuple[Output, ...]] = (Output("bleu"), Output("chrf"))

    name: Literal["ngrams"] = "ngrams"

    def score(self, answer: Answer) -> dict[str, float]:
        """Compare with the reference."""
        bleu, chrf = _scorers()
        references = [answer.reference]
        return {
            "bleu": float(bleu.sentence_score(answer.output, references).score) / 100,
            "chrf": float(chrf.sentence_score(answer.output, references).score) / 100,
        }


@cache
def _scorers() -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(effective_order=True), CHRF()
