"""A check in words for people: what was seen, what is being done, what a person should do now."""

from __future__ import annotations

from regraft.records import DriftReport, RetrainDecision

_HEADINGS = {
    "stable": "Stable: no drift",
    "suspected": "Suspected: this window looks changed",
    "drift": "Drift",
    "insufficient": "Insufficient: too few exchanges to tell",
}
_KINDS = {
    "new_content": "Drift: users ask about new things",
    "behaviour": "Drift: like questions are answered otherwise",
    "prompt_mix": "Drift: known questions come in other shares",
    "quality": "Quality fell",
}
_SEEN = {
    "new_content": "More prompts than ordinarily are like none of the reference's.",
    "behaviour": "Prompts that are alike get other answers than when the reference was frozen. "
    "Training on such answers would teach the fault.",
    "prompt_mix": "Prompts are about what they always were about, in other shares; "
    "like prompts get like answers.",
    "quality": "Answers got worse by a measure of their own: see the quality signals below.",
}
_LOOK = {
    "new_content": "Read the new topics below and say what good answers to them are.",
    "behaviour": "Look at serving first: engine, settings, adapter, templates, what changed lately.",
    "prompt_mix": "Check the quality of the topics that grew, below: the model may be weaker there.",
    "quality": "Look at what feeds the signals that alarm: serving first, then the model.",
}


def heading(report: DriftReport) -> str:
    """What was found, in a few words."""
    if report.status == "drift" and report.kind is not None:
        return _KINDS[report.kind]
    if report.status == "stable" and report.p_value is None:
        return "Quality is as it was; too few exchanges to compare texts"
    return _HEADINGS[report.status]


def seen(report: DriftReport) -> str:
    """What the finding means; the figures are in the report's summary."""
    if report.kind is not None:
        return _SEEN[report.kind]
    if report.status == "drift":
        return "Checks together raised the alarm; what kind of change it is could not be told."
    if report.status == "suspected":
        return "This window by itself looks changed. The checks together do not raise the alarm yet."
    if report.status == "insufficient":
        return "Nothing can be said about this window, good or bad."
    return "Nothing calls for anything."


def done(decision: RetrainDecision | None) -> str:
    """What is being done, with the decision's own reason."""
    if decision is None:
        return "Nothing: this was only looked at, no decision was made."
    job = f" as job {decision.job_id}" if decision.job_id else ""
    words = {
        "nothing": "Nothing.",
        "watch": "The next windows are watched.",
        "collect": "Exchanges that drifted are collected for review; nothing is trained yet.",
        "roll_back": "The endpoint goes back to the former champion.",
        "retrain": f"A challenger is trained{job}, and put before the gate.",
    }
    if not decision.automatic and decision.action in {"roll_back", "retrain"}:
        proposed = "go back to the former champion" if decision.action == "roll_back" else "retrain"
        return f"Nothing until a person says so. Proposed: {proposed}. {decision.reason}"
    return f"{words[decision.action]} {decision.reason}"


def to_do(report: DriftReport, decision: RetrainDecision | None) -> list[str]:
    """What a person should do now, first things first; never empty."""
    steps = []
    if report.kind is not None:
        steps.append(_LOOK[report.kind])
    action = decision.action if decision else None
    if decision is not None and action == "roll_back" and not decision.automatic:
        steps.append("If nothing there explains it, go back: regraft rollback EXPERIMENT.yaml.")
    if decision is not None and action == "retrain" and not decision.automatic:
        steps.append("Say whether to retrain.")
    if decision is not None and action == "collect":
        steps.append(
            "Review the collected exchanges, write good answers, and name the file in retrain.reviewed."
        )
        steps += [f"Still waited for: {words.rstrip('.')}." for words in decision.waiting]
    if action == "retrain" and decision is not None and decision.automatic:
        steps.append("Wait for the gate: the challenger is promoted only if it is better.")
    if not steps and report.status in {"drift", "suspected"}:
        steps.append("Read below what changed." if report.status == "drift" else "Nothing yet.")
    return steps or ["Nothing."]
