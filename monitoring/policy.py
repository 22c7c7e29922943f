"""What to do about a drift report: a pure function of records, settings and the clock it is given."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Literal

from regraft.config import RetrainSection
from regraft.records import DriftReport, RetrainDecision, content_hash


def decide(
    report: DriftReport,
    settings: RetrainSection,
    *,
    fresh_examples: int,
    last_retrain: datetime | None,
    now: datetime,
) -> RetrainDecision:
    """Decide whether a drift report becomes a retraining.

    Args:
        report: What the check saw.
        settings: What an alarm turns into.
        fresh_examples: Reviewed examples that no training has seen yet.
        last_retrain: When the last retraining of this model began, if there was one. Without a time zone it
            is taken for UTC, as `now` is.
        now: The present.

    Returns:
        The decision with its reason. The job id depends on the drift report alone, so the same report,
        decided on again, submits the same job.
    """
    action, reason = _judge(report, settings, fresh_examples, last_retrain, now)
    job_id = None
    if action == "retrain":
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", report.model).strip("-") or "model"
        job_id = f"regraft-retrain-{name}-{content_hash([report.id], 12)}"
    return RetrainDecision(
        id=content_hash([report.id, action, reason]),
        drift_report_id=report.id,
        model=report.model,
        model_version=report.model_version,
        action=action,
        reason=reason,
        created=_utc(now).isoformat(timespec="microseconds"),
        job_id=job_id,
    )


def _judge(
    report: DriftReport,
    settings: RetrainSection,
    fresh_examples: int,
    last_retrain: datetime | None,
    now: datetime,
) -> tuple[Literal["nothing", "collect", "retrain"], str]:
    if report.status == "insufficient":
        return "nothing", f"No verdict yet: {report.rows} exchanges are too few to tell."
    if report.status == "stable":
        return "nothing", "No drift: the window looks like the reference, or differs too little to act on."
    waiting = []
    if fresh_examples < settings.min_fresh:
        waiting.append(
            f"{fresh_examples} reviewed fresh examples, {settings.min_fresh} needed: "
            "review answers of this window to get more"
        )
    if last_retrain is not None:
        until = _utc(last_retrain) + timedelta(seconds=settings.cooldown_seconds)
        if _utc(now) < until:
            waiting.append(f"the last retraining was too recent, the next may start at {until.isoformat()}")
    if waiting:
        return "collect", f"Drift, but no retraining yet: {'; '.join(waiting)}."
    return "retrain", f"Drift, and {fresh_examples} reviewed fresh examples to learn from: retrain."


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
