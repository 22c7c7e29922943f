"""How often an alarm is explained rightly, for `drift.py`: requests and answers of Bitext's customer support.

Each stream begins to drift at once in one of three known ways, 200 exchanges a window, until the sequential
alarm; the window that raised it is then classified. `none` stands where no alarm came within six windows,
`unclear` where there were too few pairs to tell.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from drift_traffic import lines

from monitoring.detectors import Calibrated
from monitoring.matching import MatchedTest, classify, matched_test
from monitoring.sequential import step
from monitoring.windows import Row
from regraft.config import MonitorSection
from regraft.records import Evidence

#: Categories that ordinary traffic never has, and the two that a mix turns to.
NEW = ("INVOICE", "PAYMENT")
MIX = ("ORDER", "REFUND")
KINDS = ("new_content", "behaviour", "prompt_mix")
REFERENCE, WINDOW, MOST = 1500, 200, 6
ARL = MonitorSection().arl
_REFUSALS = (
    "I'm sorry, but I cannot help with that.",
    "I am unable to assist with this request.",
    "Sorry, I can't help you with that at the moment.",
)


def exchanges(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Requests and answers by category.

    Raises:
        DataError: If the file is missing.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for row in lines(data / "bitext_support" / "long.jsonl"):
        found.setdefault(row["category"], []).append((row["instruction"], row["response"]))
    return found


def texts(data: Path) -> list[str]:
    """Every text that the streams may have."""
    pairs = [pair for some in exchanges(data).values() for pair in some]
    return [*(text for pair in pairs for text in pair), *_REFUSALS]


def explained(data: Path, detector: Calibrated, seed: int, kind: str) -> dict[str, Any]:
    """One stream that drifts in a known way, and what it is called."""
    draw = random.Random(f"{kind} {seed}")
    by_category = exchanges(data)
    known = [pair for category, some in sorted(by_category.items()) if category not in NEW for pair in some]
    draw.shuffle(known)
    reference = [_row(f"r{i}", *pair) for i, pair in enumerate(known[:REFERENCE])]
    pool = known[REFERENCE:]
    mixed = [pair for pair in pool if pair in {p for category in MIX for p in by_category[category]}]
    new = [pair for category in NEW for pair in by_category[category]]
    evidence = Evidence()
    matched = None
    for check in range(MOST):
        pairs = draw.sample(pool, WINDOW)
        if kind == "new_content":
            pairs[:60] = draw.sample(new, 60)
        elif kind == "behaviour":
            pairs[:40] = [(asked, draw.choice(_REFUSALS)) for asked, _ in pairs[:40]]
        else:
            pairs[:100] = draw.sample(mixed, 100)
            pairs = list(dict.fromkeys(pairs))
        window = [_row(f"{check}.{i}", *pair) for i, pair in enumerate(pairs)]
        detection = detector.detect(reference, window)
        evidence = step(evidence, detection.counted, report_id=str(check), begun="", arl=ARL)
        if evidence.alarmed_by is not None:
            matched = matched_test(reference, window, detector)
            break
    return {"job": "kind", "kind": kind, "found": _called(matched)} | (
        matched.model_dump(exclude={"groups"}) if matched else {}
    )


def tabled(found: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many streams of each kind were called what."""
    table: dict[str, dict[str, int]] = {}
    for stream in found:
        row = table.setdefault(stream["kind"], {})
        row[stream["found"]] = row.get(stream["found"], 0) + 1
    return table


def _called(matched: MatchedTest | None) -> str:
    return "none" if matched is None else classify(matched) or "unclear"


def _row(name: str, asked: str, answered: str) -> Row:
    return Row(id=name, prompt=asked, output=answered)
