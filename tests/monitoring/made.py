"""Drift reports made up for the tests of what shows and sends them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from monitoring.sequential import DRIFT, step
from regraft.records import (
    Attribution,
    DriftReport,
    Evidence,
    QualitySignal,
    RetrainDecision,
    Shown,
    TopicChange,
)

#: What users could write to break a page, a terminal or a message.
HOSTILE = (
    "\u202e</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"' [red] \x1b[31m"
)
_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
QUALITY = (
    QualitySignal(
        name="refusal_rate",
        value=0.2,
        reference=0.02,
        count=412,
        p_value=1e-9,
        worse=True,
        low=0.16,
        high=0.24,
    ),
    QualitySignal(name="latency_p95_ms", value=910.0, reference=905.0, count=412, p_value=0.4),
    QualitySignal(name="feedback_score", value=None, reference=0.4, count=3),
)


def report(
    number: int = 0, previous: DriftReport | None = None, tested: float = 0.5, **more: Any
) -> DriftReport:
    """The check of an hour, its evidence added to that of the check before."""
    start = (_BEGAN + timedelta(hours=number)).isoformat()
    found = dict(previous.evidence) if previous else {}
    found[DRIFT] = step(found.get(DRIFT, Evidence()), tested, report_id=f"r{number}", begun=start, arl=1000.0)
    alarms = (DRIFT,) if found[DRIFT].alarmed_by else ()
    fields: dict[str, Any] = {
        "id": f"r{number}",
        "model": "shop",
        "model_version": 3,
        "reference_id": "abc",
        "window_start": start,
        "window_end": (_BEGAN + timedelta(hours=number + 1)).isoformat(),
        "rows": 200,
        "reference_rows": 600,
        "status": "drift" if alarms else "stable",
        "p_value": tested,
        "effect": 0.21,
        "alpha": 0.01,
        "summary": "Made up.",
        "evidence": found,
        "arl": 1000.0,
        "alarms": alarms,
        "previous": previous.id if previous else None,
    }
    return DriftReport.model_validate(fields | more)


def stream(p_values: list[float], **last: Any) -> list[DriftReport]:
    """Checks one after another."""
    made: list[DriftReport] = []
    for number, p_value in enumerate(p_values):
        more = last if number == len(p_values) - 1 else {}
        made.append(report(number, made[-1] if made else None, p_value, **more))
    return made


def told_by_users() -> Attribution:
    """What changed, full of what users wrote."""
    shown = Shown(id="e", prompt=f"asked {HOSTILE}", answer="long " * 100_000)
    topic = TopicChange(
        name=f"rocket {HOSTILE}", side="prompt", new=True, reference_share=0.0, window_share=0.17, count=34,
        examples=(shown,) * 50,
    )  # fmt: skip
    return Attribution(where="inputs", inputs_p=0.001, new_share=0.2, topics=(topic,))


def decision(about: DriftReport, action: str = "collect", **more: Any) -> RetrainDecision:
    """A decision about a report."""
    fields = {
        "id": f"d-{about.id}",
        "drift_report_id": about.id,
        "model": about.model,
        "model_version": about.model_version,
        "action": action,
        "reason": "Because.",
        "created": about.window_end,
        "kind": about.kind,
    }
    return RetrainDecision.model_validate(fields | more)
