"""Real texts as traffic for `drift.py`: ordinary sessions, and sessions about things never asked before.

Ordinary are requests of eight domains of CLINC150. New topics come in turn from its two other domains (the
hard case: requests in the same style), from Bitext's customer support, and from reports of piracy. A session
is up to three texts of one intent; a report is a session by itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from monitoring.windows import Row
from regraft.errors import DataError

#: Domains of CLINC150 that ordinary traffic never has.
HELD_OUT = ("banking", "credit_cards")
SOURCES = ("clinc150", "bitext_support", "maritime_incidents")
_FILES = {
    "clinc150": "clinc150/clinc150.jsonl",
    "bitext_support": "bitext_support/long.jsonl",
    "maritime_incidents": "maritime_incidents/incidents.jsonl",
}
TURNS = 3


class Texts(NamedTuple):
    """Texts with their intent: the ordinary ones, and those of each source of new topics."""

    ordinary: list[tuple[str, str]]
    new: dict[str, list[tuple[str, str]]]

    @property
    def all(self) -> list[str]:
        """Every text once, in a fixed order."""
        pairs = [*self.ordinary, *(pair for source in SOURCES for pair in self.new[source])]
        return list(dict.fromkeys(text for text, _ in pairs))


def read(data: Path, ordinary: int, new: int) -> Texts:
    """Read the three data sets.

    Args:
        data: The folder that has a folder for each.
        ordinary: Ordinary texts at most.
        new: Texts at most of each source of new topics.

    Raises:
        DataError: If a file is missing.
    """
    rows = {source: lines(data / file) for source, file in _FILES.items()}
    clinc = rows["clinc150"]
    return Texts(
        ordinary=_some(
            [(r["text"], r["intent"]) for r in clinc if r["domain"] not in (*HELD_OUT, "oos")], ordinary
        ),
        new={
            "clinc150": _some([(r["text"], r["intent"]) for r in clinc if r["domain"] in HELD_OUT], new),
            "bitext_support": _some([(r["instruction"], r["intent"]) for r in rows["bitext_support"]], new),
            "maritime_incidents": _some([(r["text"], "") for r in rows["maritime_incidents"]], new),
        },
    )


def sessions(
    pairs: Sequence[tuple[str, str]], turns: int, prefix: str, draw: random.Random
) -> list[list[Row]]:
    """Shuffle texts into sessions of one to `turns` texts of one intent, in random order."""
    by_intent: dict[str, list[str]] = {}
    for text, intent in pairs:
        by_intent.setdefault(intent, []).append(text)
    made: list[list[Row]] = []
    for intent, texts in sorted(by_intent.items()):
        left = draw.sample(texts, len(texts))
        while left:
            size = draw.randint(1, turns) if intent else 1
            taken, left = left[:size], left[size:]
            name = f"{prefix}{len(made)}"
            made.append(
                [Row(id=f"{name}.{i}", prompt=t, output=t, session=name) for i, t in enumerate(taken)]
            )
    draw.shuffle(made)
    return made


def flat(given: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of sessions."""
    return [row for session in given for row in session]


def lines(file: Path) -> list[dict[str, str]]:
    """The records of a JSONL file.

    Raises:
        DataError: If it is missing.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file", "give the folder of the data sets by --data")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _some(pairs: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    distinct = list(dict(pairs).items())
    return random.Random(0).sample(distinct, min(most, len(distinct)))
