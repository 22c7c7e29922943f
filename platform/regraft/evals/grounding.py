"""Numbers and names in an answer that neither prompt nor reference has: what may be made up."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
#: A word that begins with a capital, or several in a row, not at the beginning of a sentence.
_NAME = re.compile(r"(?<![.!?:\n] )(?<!^)(?<![\n\"'(*#-])\b[A-Z][\w'-]+(?: [A-Z][\w'-]+)*", re.MULTILINE)


class Grounding(Metric):
    """The share of the answer's numbers and names that are in neither prompt nor reference.

    Numbers are compared by value without their separators of thousands; names are words with a capital inside
    a sentence, compared whatever their case. An answer with none is grounded.
    """

    outputs: ClassVar[tuple[Output, ...]] = (
        Output("ungrounded_numbers", better="lower"),
        Output("ungrounded_names", better="lower"),
    )

    name: Literal["grounding"] = "grounding"

    def score(self, answer: Answer) -> dict[str, float]:
        """Look each one up."""
        known = f"{answer.prompt}\n{answer.reference}"
        there = {_value(number) for number in _NUMBER.findall(known)}
        numbers = [_value(number) for number in _NUMBER.findall(answer.output)]
        words = set(re.findall(r"[\w'-]+", known.lower()))
        names = [word for name in _NAME.findall(answer.output) for word in name.lower().split()]
        names = [name for name in names if name not in {"i", "i'm", "i'll", "i've", "i'd"}]
        return {
            "ungrounded_numbers": _share(numbers, there),
            "ungrounded_names": _share(names, words),
        }


def _value(number: str) -> str:
    """A number as one writes it plainly: `1,250.50` and `1250.5` are the same."""
    plain = re.sub(r",(?=\d{3}\b)", "", number)
    try:
        return f"{float(plain):g}"
    except ValueError:  # a time, a date, a version
        return plain


def _share(found: list[str], known: set[str]) -> float:
    return sum(item not in known for item in found) / len(found) if found else 0.0
