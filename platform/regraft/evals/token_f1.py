"""F1 over the words of answer and reference, as SQuAD scores it."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output
from regraft.evals.exact_match import normalise


class TokenF1(Metric):
    """Harmonic mean of precision and recall of words, blind to their order."""

    outputs: ClassVar[tuple[Output, ...]] = (Output("token_f1"),)

    name: Literal["token_f1"] = "token_f1"

    def score(self, answer: Answer) -> dict[str, float]:
        """Count the words both have."""
        got, want = Counter(normalise(answer.output)), Counter(normalise(answer.reference))
        common = sum((got & want).values())
        if not common:
            return {"token_f1": float(got == want)}
        return {"token_f1": 2 * common / (got.total() + want.total())}
