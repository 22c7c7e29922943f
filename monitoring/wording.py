"""A drift report in a few sentences."""

from __future__ import annotations

from monitoring.detectors import Detection, Detector
from monitoring.sequential import DRIFT
from monitoring.windows import Window
from regraft.config import MonitorSection
from regraft.records import AnswerLogprob, DriftReport, QualitySignal


def summary(
    report: DriftReport,
    detector: Detector,
    detection: Detection | None,
    settings: MonitorSection,
    window: Window,
    lacking: str,
    unclear: str,
) -> str:
    """Say what was seen, how sure that is, and what was left out.

    Args:
        report: All but its summary.
        detector: That compared.
        detection: What it found; None if there was too little.
        settings: Thresholds.
        window: What was compared.
        lacking: What there was too little of, in words.
        unclear: Why the change cannot be explained, in words; empty if it can.
    """
    left_out = _likelihood(report)
    left_out += f" Left out of {window.given}: {window.left_out}." if window.left_out else ""
    worse = [s for s in report.quality if s.name in report.alarms]
    said = "; ".join(f"{s.name} {s.value:.3g} ({_beside(s)})" for s in worse if s.value is not None)
    if detection is None:
        few = f"{len(window.rows)} exchanges against {report.reference_rows} of the reference; {lacking}"
        if report.status == "insufficient":
            return f"Insufficient: {few}.{left_out}"
        verdict = f"Quality fell: {said}." if worse else "Quality is as it was."
        return f"{verdict} Too few answers to compare their texts: {few}.{left_out}"
    figures = f"p = {detection.p_value:.4f}, effect {detection.effect:.2f}"
    effect = f"{figures} (at least {settings.min_effect:g} needed; {detector.effect_unit})"
    if report.status == "drift":
        parts = [*([f"quality fell: {said}"] if worse else []), *report.drivers]
        cause = "; ".join(parts) or "no single cause stands out"
        about = f", about {report.kind.replace('_', ' ')}" if report.kind else ""
        return f"Drift over {len(window.rows)} exchanges{about}: {cause}. {effect}.{_dot(unclear)}{left_out}"
    weighed = (
        ""
        if DRIFT not in report.evidence
        else f" The evidence is {report.evidence[DRIFT].value:.3g}; {settings.arl:g} raise the alarm."
    )
    if report.status == "suspected":
        cause = "; ".join(report.drivers) or "no single cause stands out"
        more = f"{weighed}{_dot(unclear)}{left_out}"
        return f"Suspected over {len(window.rows)} exchanges: {cause}. {effect}.{more}"
    if detector.advisory:
        why = "This detector is advisory and decides nothing"
    elif detection.p_value <= settings.alpha:
        why = "The window differs from the reference, but too little to act on"
    else:
        why = f"The window cannot be told from the reference at alpha {settings.alpha:g}"
    return f"Stable over {len(window.rows)} exchanges. {why}: {effect}.{weighed}{left_out}"


def _beside(signal: QualitySignal) -> str:
    return "no reference" if signal.reference is None else f"{signal.reference:.3g} in the reference"


def _likelihood(report: DriftReport) -> str:
    found = report.answer_logprob
    return "" if found is None else f" {logprob_words(found)}."


def logprob_words(found: AnswerLogprob) -> str:
    """How likely the model finds its own answers, in words."""
    words = (
        f"Its own answers have a log-probability of {found.window:.2f} nats a token ({found.count} answers"
    )
    if found.reference is None:
        return f"{words}; the reference's prompts are not on record)"
    return f"{words}; {found.reference:.2f} in the reference)"


def _dot(words: str) -> str:
    return f" {words}." if words else ""
