"""What people said of answers, and how far a judge agrees with them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: On fewer a rank correlation says nothing: at ten, 0.65 still comes about by chance once in twenty times
#: (the two-sided 5 % value of Spearman's rank correlation).
LEAST_LABELS = 10
_FORMAT = '{"prompt": "…", "reference": "…", "output": "…", "score": 4}'


class HumanLabel(BaseModel):
    """An answer and a person's score of it, on any scale; higher is better."""

    model_config = ConfigDict(frozen=True, strict=True)

    prompt: str
    reference: str
    output: str
    score: float = Field(allow_inf_nan=False)


def read_labels(file: Path) -> tuple[HumanLabel, ...]:
    """Read a file of JSON lines; other keys of a line are left alone.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line is wrong; the message names the file, the line and the field.
    """
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(HumanLabel.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the line"
            raise ValueError(f"{file}:{number}: {field}: {first['msg']}; each is {_FORMAT}") from None
    return tuple(found)


def agreement(judged: Sequence[float], people: Sequence[float]) -> float:
    """Spearman's rank correlation of two scores of the same answers; ties share their mean rank.

    Raises:
        ValueError: If there are too few, or either gave all answers the same score.
    """
    if len(judged) < LEAST_LABELS:
        raise ValueError(f"rests on {len(judged)} labels; a correlation needs {LEAST_LABELS} or more")
    for whose, scores in {"the judge": judged, "people": people}.items():
        if len(set(scores)) == 1:
            raise ValueError(f"{whose} gave all {len(scores)} labelled answers the same score, {scores[0]:g}")
    return statistics.correlation(_ranks(judged), _ranks(people))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    last = {value: place for place, value in enumerate(ordered)}
    return [(first[value] + last[value]) / 2 for value in values]
