"""Classification: the label that an answer names, held against the reference's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from regraft.evals.base import Answer, Metric, Output, Scores


class Label(Metric):
    """Whether the answer names the right label, and whether it names one at all.

    The label is the one that stands first in the answer, as words of its own, whatever its case; of two that
    begin at the same place the longer. An answer without one is wrong, and counted apart. Over a whole set
    `label_macro_f1` is the mean over the labels of the references of each one's F1 (an answer without a label
    is no label's).
    """

    outputs: ClassVar[tuple[Output, ...]] = (
        Output("label_accuracy"),
        Output("label_unparsable", better="lower"),
    )
    wholes: ClassVar[tuple[Output, ...]] = (Output("label_macro_f1"),)

    name: Literal["label"] = "label"
    labels: tuple[str, ...] = Field(min_length=2, description="What there is to choose from.")

    def score(self, answer: Answer) -> dict[str, float]:
        """Compare the labels.

        Raises:
            ValueError: If the reference names none of the labels.
        """
        got, want = self.named(answer.output), self._wanted(answer)
        return {"label_accuracy": float(got == want), "label_unparsable": float(got is None)}

    def whole(self, answers: Sequence[Answer], scores: Sequence[Mapping[str, float]]) -> Scores:
        """The macro-averaged F1; nothing without a reference that names a label."""
        pairs = [(self.named(a.output), want) for a in answers if (want := self.named(a.reference))]
        if not pairs:
            return {}
        each = []
        for label in {want for _, want in pairs}:
            right = sum(got == want == label for got, want in pairs)
            given = sum(got == label for got, _ in pairs)
            there = sum(want == label for _, want in pairs)
            each.append(2 * right / (given + there))
        return {"label_macro_f1": sum(each) / len(each)}

    def named(self, text: str) -> str | None:
        """The label that a text names first; None if it names none."""
        found = []
        for label in self.labels:
            words = r"[\s_-]+".join(re.escape(word) for word in re.split(r"[\s_-]+", label.strip()))
            if match := re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE):
                found.append((match.start(), -len(label), label))
        return min(found)[2] if found else None

    def _wanted(self, answer: Answer) -> str:
        want = self.named(answer.reference)
        if want is None:
            raise ValueError(f"the reference {answer.reference[:60]!r} names none of the labels")
        return want
