"""What a client thinks of an answer."""

from __future__ import annotations

from pydantic import Field

from regraft.records.base import Record


class Feedback(Record):
    """One judgement of one answer. Of several for the same answer the later ones count.

    Attributes:
        id: Of this record.
        created: UTC, ISO 8601 with microseconds.
        answer_id: The id that the answer, or its captured exchange, carries.
        score: From -1, useless, to 1, perfect.
        correction: The answer as it should have been, made from the one that was given.
        reference: A right answer that was known without it.
        comment: Anything else.
        key: Hash of the API key that judged; None if none was needed.
    """

    id: str
    created: str
    answer_id: str
    score: float | None = Field(None, ge=-1, le=1, allow_inf_nan=False)
    correction: str | None = None
    reference: str | None = None
    comment: str | None = None
    key: str | None = None
