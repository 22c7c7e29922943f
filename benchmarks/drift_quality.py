"""How soon a collapse of quality is found, for `drift.py`: answers of Bitext's customer support, made worse.

A reference of ordinary exchanges, then windows of 100. In a `truncated`, `looping` or `refusing` window a
share of the answers goes wrong; it is the first window, so that no evidence helps it. Streams of 30 windows
without any tell the false alarms of all signals together. Evidence is counted as a check counts it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from drift_kinds import exchanges

from monitoring.quality import baseline_of, quality_signals
from monitoring.sequential import alarm_at, step
from regraft.config import MonitorSection, QualitySection
from regraft.records import CapturedExchange, Evidence, Message

KINDS = ("truncated", "looping", "refusing")
SHARES = (0.2, 0.4)
SETTINGS = (("none", 0.0), *((kind, share) for kind in KINDS for share in SHARES))
#: As many sessions as are frozen by default, and as few as a small evaluation set has.
REFERENCES = (1500, 300)
WINDOW, CHECKS = 100, 30
ARL = MonitorSection().arl
_REFUSAL = "I'm sorry, but I cannot help with that."


def collapse(data: Path, seed: int, kind: str, share: float, reference: int) -> dict[str, Any]:
    """One stream: in which window a signal alarms; None if none does. Without a share it is ordinary."""
    draw = random.Random(f"quality {kind} {share} {seed}")
    about = {"job": "quality", "kind": kind, "share": share, "reference": reference}
    wrong = round(WINDOW * share)
    pairs = [pair for some in exchanges(data).values() for pair in some]
    baseline = baseline_of([_exchange(f"r{i}", *draw.choice(pairs), draw) for i in range(reference)])
    evidence: dict[str, Evidence] = {}
    for check in range(1 if wrong else CHECKS):
        window = [_exchange(f"{check}.{i}", *draw.choice(pairs), draw) for i in range(WINDOW)]
        window[:wrong] = [_worse(exchange, kind) for exchange in window[:wrong]]
        signals = quality_signals(window, baseline, QualitySection())
        for signal in signals:
            if signal.p_value is None:
                continue
            evidence[signal.name] = step(
                evidence.get(signal.name, Evidence()),
                signal.p_value,
                report_id=str(check),
                begun="",
                arl=alarm_at(signal.name, ARL, len(signals)),
            )
        worse = {signal.name for signal in signals if signal.worse}
        if any(e.alarmed_by is not None and name in worse for name, e in evidence.items()):
            return about | {"window": check + 1}
    return about | {"window": None}


def tabled(found: list[dict[str, Any]]) -> dict[str, float | None]:
    """How many streams of each kind and share, by the size of the reference."""
    made: dict[str, float | None] = {}
    for reference in REFERENCES:
        prefix = "quality" if reference == REFERENCES[0] else f"quality_reference_{reference}"
        for kind, share in SETTINGS:
            asked = (kind, share, reference)
            windows = [f["window"] for f in found if (f["kind"], f["share"], f["reference"]) == asked]
            if kind == "none":
                made[f"{prefix}_false_alarm_rate_30_checks"] = _share([w is not None for w in windows])
            else:
                name = f"{prefix}_{kind}_{share:.0%}_found_in_one_window".replace("%", "pct")
                made[name] = _share([w is not None for w in windows])
    return made


def _worse(exchange: CapturedExchange, kind: str) -> CapturedExchange:
    if kind == "refusing":
        return exchange.model_copy(update={"output": _REFUSAL})
    words = exchange.output.split()
    if kind == "looping":
        return exchange.model_copy(update={"output": " ".join([*words[:12], *(words[12:18] * 12)])})
    cut = " ".join(words[: max(3, len(words) // 3)])
    return exchange.model_copy(update={"output": cut, "finish_reason": "length"})


def _exchange(name: str, asked: str, answered: str, draw: random.Random) -> CapturedExchange:
    latency = draw.lognormvariate(6, 0.4)
    return CapturedExchange(
        id=name,
        created="2026-01-01T00:00:00+00:00",
        model="support",
        model_version=1,
        messages=(Message(role="user", content=asked),),
        output=answered,
        # Ordinary answers run into their longest now and then.
        finish_reason="length" if draw.random() < 0.03 else "stop",
        prompt_tokens=10,
        completion_tokens=len(answered.split()),
        latency_ms=latency,
        first_token_ms=latency / 10,
    )


def _share(given: list[bool]) -> float | None:
    return round(sum(given) / len(given), 4) if given else None
