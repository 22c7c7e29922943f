"""What detectors on sentence embeddings have in common: one side of the exchanges, and whole sessions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from monitoring.detectors import permutation as perm
from monitoring.detectors.base import Detector, NovelExchange
from monitoring.vectors import Vectors, vectors
from monitoring.windows import Row, session_of, sessions_in
from regraft.embeddings import DEFAULT
from regraft.errors import DataError


class Embedded(Detector):
    """A detector that compares what prompts or answers say, by their embeddings; sessions stay whole."""

    permutations: int = Field(999, ge=999, description="Random labellings; the smallest p is 1/(this + 1).")
    embedding_model: str = Field(DEFAULT, description="`bundled:<name>`, or a local folder.")
    side: Literal["answers", "prompts"] = Field("answers", description="Which texts are compared.")
    min_reference: int = Field(
        250, ge=10, description="Sessions of the reference below which nothing is told."
    )
    min_window: int = Field(100, ge=5, description="Sessions of the window below which nothing is told.")
    examples: int = Field(8, ge=1, description="Exchanges and terms to show.")
    seed: int = 0
    # Where vectors are kept changes nothing about what is found, so it is no part of what is written down.
    cache: Path | None = Field(None, exclude=True, description="Folder that keeps vectors between processes.")

    def lacking(self, reference: Sequence[Row], window: Sequence[Row]) -> str:
        """See `Detector.lacking`. A session that has rows on both sides counts for the reference."""
        known, own = sessions_in(reference), sessions_in(fresh(reference, window))
        if known < self.min_reference:
            return f"the reference has {known} sessions, at least {self.min_reference} are needed"
        if own < self.min_window:
            return f"the window has {own} sessions of its own, at least {self.min_window} are needed"
        return ""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts, each text embedded once a process.

        Raises:
            ModelError: If the embedding model cannot be had.
        """
        return vectors(texts, self.embedding_model, self.cache)

    def text(self, row: Row) -> str:
        """What of an exchange is compared."""
        return row.output if self.side == "answers" else row.prompt

    def _refuse_little(self, reference: Sequence[Row], window: Sequence[Row]) -> None:
        if lacking := self.lacking(reference, window):
            raise DataError(f"too little to compare: {lacking}", "wait for more exchanges, or ask for fewer")

    def _labels(self, before: Sequence[Row], now: Sequence[Row], permutations: int) -> Iterator[perm.Labels]:
        """Labellings of the reference's rows and then the window's, whole sessions at a time, in parts."""
        taken = [False] * len(before) + [True] * len(now)
        # A row of the window without a session may have the id of one of the reference's: another row.
        units = [f"{side:d}{session_of(row)}" for row, side in zip((*before, *now), taken, strict=True)]
        return perm.in_parts(units, taken, permutations, self.seed)

    def _most_novel(self, rows: Sequence[Row], scores: perm.Floats) -> tuple[NovelExchange, ...]:
        order = np.argsort(-scores, kind="stable")[: self.examples]
        return tuple(NovelExchange(row=rows[i], score=float(scores[i])) for i in order)


def fresh(reference: Sequence[Row], window: Sequence[Row]) -> list[Row]:
    """The window's rows without those of the reference's sessions, which would not be independent."""
    known = {row.session for row in reference if row.session is not None}
    return [row for row in window if row.session not in known]
