"""Exact match of normalised answers."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output


def normalise(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation around them and without articles (after SQuAD)."""
    words = re.findall(r"[a-z0-9]+(?:[.,'-][a-z0-9]+)*", text.lower())
    return [w for w in words if w not in {"a", "an", "the"}]


class ExactMatch(Metric):
    """1 where answer and reference are the same words in the same order, else 0."""

    outputs: ClassVar[tuple[Output, ...]] = (Output("exact_match"),)

    name: Literal["exact_match"] = "exact_match"

    def score(self, answer: Answer) -> dict[str, float]:
        """Compare the normalised words."""
        return {"exact_match": float(normalise(answer.output) == normalise(answer.reference))}
