"""What to do about a drift report: a pure function of records, settings and the clock it is given.

Where like prompts are answered otherwise, or worse, no retraining mends it: the former champion comes back,
or a person looks. Prompts of a new kind want examples, and a retraining once all that it waits for is there.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import NamedTuple

from monitoring.measures import SERVICE
from monitoring.sequential import DRIFT, PROMPTS
from monitoring.waiting import Facts, readable, unmet
from regraft.config import RetrainSection
from regraft.records import Action, DriftReport, RetrainDecision, content_hash
from regraft.times import utc

__all__ = ["Facts", "decide", "job_of"]


class _Verdict(NamedTuple):
    action: Action
    reason: str
    waiting: tuple[str, ...] = ()
    page: bool = False
    automatic: bool = True


def decide(report: DriftReport, settings: RetrainSection, facts: Facts, *, now: datetime) -> RetrainDecision:
    """Decide what a drift report becomes.

    Args:
        report: What the check saw.
        settings: What an alarm turns into.
        facts: What else is known.
        now: The present. Without a time zone it is UTC.

    Returns:
        The decision with its reason. Id and job id of a retraining depend on model and alarm alone: whatever
        check of that alarm decides it, it is the same one.
    """
    found = _judge(report, settings, facts, now)
    job_id = None
    identity = [report.id, found.action]
    if found.action == "retrain":
        job_id = job_of(report.model, facts.alarm_id)
        identity = [report.model, facts.alarm_id, found.action]
    return RetrainDecision(
        id=content_hash(identity),
        drift_report_id=report.id,
        model=report.model,
        model_version=report.model_version,
        action=found.action,
        reason=found.reason,
        created=utc(now).isoformat(timespec="microseconds"),
        kind=report.kind,
        alarm_id=facts.alarm_id,
        waiting=found.waiting,
        page=found.page,
        automatic=found.automatic,
        job_id=job_id,
        run_id=report.run_id,
    )


def _judge(report: DriftReport, settings: RetrainSection, facts: Facts, now: datetime) -> _Verdict:
    worse = tuple(name for name in report.alarms if name not in (DRIFT, PROMPTS))
    if report.status != "drift" and not worse:
        return _calm(report)
    # Texts that look ordinary, or are too few to compare, do not excuse answers that got worse.
    kind = report.kind if report.status == "drift" else "quality"
    if kind is None and worse:
        kind = "quality"
    if kind == "quality":
        return _worse(worse, settings, facts)
    if kind == "behaviour":
        return _go_back("Like prompts are answered otherwise", settings, facts)
    if kind == "new_content":
        return _learn("New content", report, settings, facts, now)
    if kind == "prompt_mix":
        return _mixed(report, settings, facts, now)
    unclear = "what changed could not be told: see the report, and review what is collected"
    return _Verdict("collect", f"Drift, but {unclear}.", waiting=(unclear,), page=True)


def _worse(worse: tuple[str, ...], settings: RetrainSection, facts: Facts) -> _Verdict:
    if worse and SERVICE.issuperset(worse):
        return _Verdict(
            "watch",
            f"The endpoint got worse ({', '.join(worse)}), not its answers: look at its load, its machines "
            "and its log. Another version would hardly do better, so the champion stays.",
            page=True,
        )
    return _go_back(f"Answers got worse ({', '.join(worse) or 'by a measure of quality'})", settings, facts)


def _mixed(report: DriftReport, settings: RetrainSection, facts: Facts, now: datetime) -> _Verdict:
    if facts.segment_worse:
        what = f"Known topics in other shares, and worse answers on {', '.join(facts.segment_worse)}"
        return _learn(what, report, settings, facts, now)
    return _Verdict(
        "watch",
        "Known topics come in other shares, and on none of them is quality known to have fallen: "
        "nothing to learn.",
    )


def _calm(report: DriftReport) -> _Verdict:
    if report.status == "insufficient":
        return _Verdict("nothing", f"No verdict yet: {_sizes(report)} are too few to tell.")
    if report.status == "stable" and report.p_value is None:
        return _Verdict(
            "nothing",
            f"Quality is as it was. Whether texts changed cannot be told: {_sizes(report)} are too few.",
        )
    if report.status == "stable":
        return _Verdict(
            "nothing", "No drift: the window looks like the reference, or differs too little to act on."
        )
    return _Verdict(
        "watch", "This window alone looks changed; all checks together do not yet, so there is no alarm."
    )


def _sizes(report: DriftReport) -> str:
    return f"{report.rows} exchanges against a reference of {report.reference_rows}"


def _go_back(what: str, settings: RetrainSection, facts: Facts) -> _Verdict:
    """Back to the former champion, or a person: a retraining would learn from what went wrong."""
    if settings.roll_back == "never":
        return _Verdict("watch", f"{what}, and retrain.roll_back is never: a person has to look.", page=True)
    if facts.former_champion is None:
        return _Verdict(
            "watch",
            f"{what}, and there is no former champion to go back to: a person has to look.",
            page=True,
        )
    automatic = settings.roll_back == "automatic"
    back = f"go back to version {facts.former_champion}"
    return _Verdict(
        "roll_back",
        f"{what}: {back}." if automatic else f"{what}: {back}, if a person who has looked agrees.",
        page=True,
        automatic=automatic,
    )


def _learn(what: str, report: DriftReport, settings: RetrainSection, facts: Facts, now: datetime) -> _Verdict:
    """Retrain, or collect until everything that it waits for is there."""
    if facts.settled:
        return _Verdict(
            "watch",
            f"{what}, but the retraining for this alarm has ended already: {facts.settled}. "
            "A person has to look: the same again would come to the same.",
            page=True,
        )
    if facts.under_way == job_of(report.model, facts.alarm_id):
        return _Verdict("watch", f"{what}, and the retraining for it is under way as {facts.under_way}.")
    waiting, start = unmet(settings, facts, now)
    if waiting:
        when = f" Not before {readable(start)}." if start is not None else ""
        return _Verdict("collect", f"{what}, but no retraining yet: {'; '.join(waiting)}.{when}", waiting)
    return _Verdict("retrain", f"{what}, and {facts.fresh_examples} reviewed fresh examples: retrain.")


def job_of(model: str, alarm_id: str) -> str:
    """Id of the job that retrains because of an alarm."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", model).strip("-") or "model"
    return f"regraft-retrain-{name}-{content_hash([alarm_id], 12)}"
