"""The form of an answer: its length beside the reference's, and how much it says twice."""

from __future__ import annotations

from typing import ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output


class Form(Metric):
    """Length and repetition, by words between spaces.

    `length_ratio` is the answer's number of words over the reference's. `repetition` is the share of its runs
    of four words that stood in it before (1 - distinct-4 of Li et al., 2016): a loop comes near 1, an answer
    of fewer than five words is 0.
    """

    outputs: ClassVar[tuple[Output, ...]] = (
        Output("length_ratio", "ratio", ""),
        Output("repetition", better="lower"),
    )

    name: Literal["form"] = "form"

    def score(self, answer: Answer) -> dict[str, float]:
        """Count.

        Raises:
            ValueError: If the reference is empty.
        """
        words, wanted = answer.output.split(), answer.reference.split()
        if not wanted:
            raise ValueError("the reference is empty")
        runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        repeated = 1 - len(set(runs)) / len(runs) if runs else 0.0
        return {"length_ratio": len(words) / len(wanted), "repetition": repeated}
