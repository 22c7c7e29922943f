"""One check: a window of captured exchanges against the frozen reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monitoring.detectors import Detection, Detector, Omnibus
from monitoring.windows import Reference, Window, sampled
from regraft.config import MonitorSection
from regraft.records import CapturedExchange, DriftReport, content_hash


def check_window(
    reference: Reference,
    exchanges: Sequence[CapturedExchange],
    settings: MonitorSection,
    html: Path | None = None,
    *,
    detector: Detector | None = None,
) -> DriftReport:
    """Compare a window with the reference.

    Args:
        reference: Frozen at promotion. Exchanges of other models or versions are left out and counted.
        exchanges: What was captured, in any order.
        settings: Thresholds and sizes.
        html: Where to write the report for people, if anywhere.
        detector: How to compare; the calibrated one if not given.

    Returns:
        `drift` only if the p-value is below alpha and the effect at least `min_effect`; `insufficient` if
        either side has fewer than `min_rows` exchanges to compare, or too few for the detector. The same
        input gives the same report.
    """
    detector = detector or Omnibus(permutations=settings.permutations)
    window = Window.of(exchanges, settings.max_rows, model=reference.model, version=reference.version)
    before = sampled(reference.rows, settings.max_rows)
    lacking = (
        f"at least {settings.min_rows} of each are needed"
        if min(len(window.rows), len(before)) < settings.min_rows
        else detector.lacking(before, window.rows)
    )
    detection = None if lacking else detector.detect(before, window.rows)
    if detection is None:
        status = "insufficient"
    elif (
        not detector.advisory
        and detection.p_value < settings.alpha
        and detection.effect >= settings.min_effect
    ):
        status = "drift"
    else:
        status = "stable"
    report = DriftReport.model_validate(
        {
            "id": content_hash(
                [
                    reference.id,
                    sorted(e.id for e in exchanges),
                    # How often checks run changes nothing about what this one finds.
                    settings.model_dump(mode="json", exclude={"every_seconds"}),
                    detector.model_dump(mode="json"),
                ]
            ),
            "model": reference.model,
            "model_version": reference.version,
            "reference_id": reference.id,
            "window_start": window.start,
            "window_end": window.end,
            "rows": len(window.rows),
            "reference_rows": len(before),
            "status": status,
            "p_value": detection.p_value if detection else None,
            "effect": detection.effect if detection else None,
            "alpha": settings.alpha,
            "tests": detection.tests if detection else (),
            "drivers": detection.drivers if detection else (),
            "summary": _summary(
                status,
                detector,
                detection,
                settings=settings,
                window=window,
                reference_rows=len(before),
                lacking=lacking,
            ),
            "report_path": str(html) if html else None,
        }
    )
    if html:
        # Evidently takes seconds to import: only where somebody wants the page.
        from monitoring.report import write_report

        write_report(html, report, detection, before, window.rows)
    return report


def _summary(
    status: str,
    detector: Detector,
    detection: Detection | None,
    *,
    settings: MonitorSection,
    window: Window,
    reference_rows: int,
    lacking: str,
) -> str:
    left_out = f" Left out of {window.given}: {window.left_out}." if window.left_out else ""
    if detection is None:
        return (
            f"Insufficient: {len(window.rows)} exchanges against {reference_rows} of the reference; "
            f"{lacking}.{left_out}"
        )
    figures = f"p = {detection.p_value:.4f} (alpha {settings.alpha:g}), effect {detection.effect:.2f}"
    effect = f"{figures} (at least {settings.min_effect:g} needed; {detector.effect_unit})"
    if status == "drift":
        cause = "; ".join(detection.drivers) or "no single cause stands out"
        return f"Drift over {len(window.rows)} exchanges: {cause}. {effect}.{left_out}"
    if detector.advisory:
        why = "This detector is advisory and decides nothing"
    elif detection.p_value < settings.alpha:
        why = "The window differs from the reference, but too little to act on"
    else:
        why = "The window cannot be told from the reference at this alpha"
    return f"Stable over {len(window.rows)} exchanges. {why}: {effect}.{left_out}"
